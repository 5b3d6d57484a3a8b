"""Features of dataset images and of generated images, and the records that evaluation steps exchange."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from sdtrain import distributed
from sdtrain.data.datasets import PositionDataset
from sdtrain.io.files import atomic_path, read_json
from sdtrain.models.feature_networks import FeatureError

Network = Callable[[torch.Tensor], torch.Tensor]  # uint8 N x 3 x H x W -> float N x D


# ---------------------------------------------------------------- images -> features
def dataset_features(
    network: Network, dataset: PositionDataset, count: int, label: str
) -> tuple[torch.Tensor, list[str]]:
    """Return features N x D and captions of `count` different images of a dataset, or of all if it has fewer.

    The dataset's seed determines the images. Undecodable images are skipped with a warning.
    """
    count, captions = min(count, len(dataset)), []

    def images() -> Iterator[torch.Tensor]:
        for position in range(count):
            item = dataset[position]
            if "error" in item:
                warnings.warn(f"left out: {item['error']}", stacklevel=2)
                continue
            captions.append(item["caption"])
            yield ((item["pixels"] + 1) * 127.5).round().byte()

    return embed(network, images(), count, label), captions


def sample_features(network: Network, samples: dict, label: str) -> torch.Tensor:
    """Return features N x D of generated images in the order of their prompts; `samples` is from `read_samples`."""
    return embed(network, sample_images(samples), samples["images"], label)


def embed(network: Network, images: Iterator[torch.Tensor], total: int, label: str) -> torch.Tensor:
    """Return float32 features N x D of uint8 images 3 x H x W, computed in batches with a progress bar."""
    # on a CPU, memory for larger activations costs more than it saves
    size = 4 if distributed.only_device().type == "cpu" else 64
    parts, every = [], 1 if sys.stderr.isatty() else 10  # seconds between the bar's updates: few in a log
    with tqdm(total=total, desc=label, unit="img", mininterval=every, maxinterval=every) as bar:
        while batch := list(islice(images, size)):
            parts.append(network(torch.stack(batch)).float().cpu())
            bar.update(len(batch))
    if not parts:
        raise FeatureError(f"{label}: no image could be read; rebuild the shards")
    return torch.cat(parts)


# ---------------------------------------------------------------- generated images
def read_samples(path: str | Path) -> dict:
    """Return the record of generated images: images, prompts, folder, resolution and more. Raise FeatureError."""
    record = read_record(path, "images", "prompts", "folder", "resolution")
    if len(record["prompts"]) != record["images"]:
        raise FeatureError(f"{path}: {record['images']} images and {len(record['prompts'])} prompts; {remake(path)}")
    return record


def sample_images(samples: dict) -> Iterator[torch.Tensor]:
    """Yield the generated images, uint8 3 x R x R. Raise FeatureError if one is missing or wrong."""
    resolution = samples["resolution"]
    for i in range(samples["images"]):
        path = Path(samples["folder"], f"{i:05d}.png")
        try:
            pixels = np.asarray(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise FeatureError(f"{path}: not a readable image ({error}); sample again") from None
        if pixels.shape != (resolution, resolution, 3):
            raise FeatureError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} px, {resolution} expected; sample again")
        yield torch.tensor(pixels).permute(2, 0, 1)


# ---------------------------------------------------------------- records
def read_record(path: str | Path, *keys: str) -> dict:
    """Return the JSON record of a step. Raise FeatureError if one of `keys` is missing."""
    record = read_json(path)
    absent = [key for key in keys if not isinstance(record, dict) or key not in record]
    if absent:
        raise FeatureError(f"{path}: lacks {', '.join(absent)}; {remake(path)}")
    return record


def remake(path: str | Path) -> str:
    """Return the remedy of an error: how to make a result again."""
    return f"make it again: snakemake --force {path}"


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file atomically, with `about` as its metadata."""
    with atomic_path(path) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=about)


def load_tensors(path: str | Path, *keys: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors `keys` (by default all) and the metadata of a safetensors file. Raise FeatureError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys or file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise FeatureError(f"{path}: no such file; make it with: snakemake {path}") from None
    except (OSError, SafetensorError) as error:
        raise FeatureError(f"{path}: not the tensors expected ({error}); {remake(path)}") from None
