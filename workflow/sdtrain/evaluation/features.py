"""Features of dataset images and of generated images, and the records that evaluation steps exchange."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
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
from sdtrain.data.datasets import ImageDataset
from sdtrain.errors import SDTrainError
from sdtrain.io.files import read_json
from sdtrain.models import feature_networks

Network = Callable[[torch.Tensor], torch.Tensor]  # uint8 N x 3 x H x W -> float N x D

SHUFFLES = 20
PAIRED = 5000  # images a side of a kernel distance at most: it holds every pair's kernel in memory


class EvaluationError(SDTrainError, ValueError):
    """An evaluation that cannot continue."""


# ---------------------------------------------------------------- images -> features
def dataset_features(network: Network, dataset: ImageDataset, count: int, label: str) -> tuple[torch.Tensor, list[str]]:
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
        raise EvaluationError(f"{label}: no image could be read; rebuild the shards")
    return torch.cat(parts)


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the kernel distance of the first PAIRED rows of each; it is unbiased, so fewer rows only add noise."""
    return feature_networks.kernel_distance(x[:PAIRED], y[:PAIRED])


# ---------------------------------------------------------------- generated images
def read_samples(path: str | Path) -> dict:
    """Return the record of generated images: images, prompts, folder, resolution and more. Raise EvaluationError."""
    record = read_record(path, "images", "prompts", "folder", "resolution")
    if len(record["prompts"]) != record["images"]:
        raise EvaluationError(f"{path}: {record['images']} images and {len(record['prompts'])} prompts; {remake(path)}")
    return record


def sample_images(samples: dict) -> Iterator[torch.Tensor]:
    """Yield the generated images, uint8 3 x R x R. Raise EvaluationError if one is missing or wrong."""
    resolution = samples["resolution"]
    for i in range(samples["images"]):
        path = Path(samples["folder"], f"{i:05d}.png")
        try:
            pixels = np.asarray(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise EvaluationError(f"{path}: not a readable image ({error}); sample again") from None
        if pixels.shape != (resolution, resolution, 3):
            raise EvaluationError(
                f"{path}: {pixels.shape[1]} x {pixels.shape[0]} px, {resolution} expected; sample again"
            )
        yield torch.tensor(pixels).permute(2, 0, 1)


# ---------------------------------------------------------------- images with their captions, and with others'
def caption_scores(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    texts: torch.Tensor,
    captions: list[str],
    seed: int,
) -> dict[str, float]:
    """Return the mean score of images (N x D) with their own captions, and with captions of other images.

    `score` maps N x D and N x E to N. `shuffled` is the mean over SHUFFLES permutations, `shuffled_standard_error` its
    standard error. `difference` is the mean advantage of an image's own caption; its error is that of N images.
    """
    matched = score(images, texts).double()
    orders = [shuffle(captions, seed + i) for i in range(SHUFFLES)]
    shuffled = torch.stack([score(images, texts[order]).double() for order in orders])
    difference = matched - shuffled.mean(0)
    return {
        "value": matched.mean().item(),
        "shuffled": shuffled.mean().item(),
        "shuffled_standard_error": standard_error(shuffled.mean(1)),
        "difference": difference.mean().item(),
        "difference_standard_error": standard_error(difference),
    }


def shuffle(captions: list[str], seed: int) -> torch.Tensor:
    """Return a random permutation, int64 N, that gives no image a caption equal to its own.

    Images are put in random order, grouped by caption. Each takes the caption k places later, where k is the number of
    images of the most frequent caption. Raise EvaluationError if more than half of the images have the same caption.
    """
    counts = Counter(captions)
    most = max(counts.values(), default=0)
    if most * 2 > len(captions):
        raise EvaluationError(
            f"{most} of {len(captions)} captions are the same: shuffling cannot part them from their images"
        )
    rng = np.random.default_rng(seed)
    place = dict(zip(sorted(counts), rng.permutation(len(counts)), strict=True))
    order = sorted(rng.permutation(len(captions)), key=lambda i: place[captions[i]])
    shuffled = torch.empty(len(captions), dtype=torch.int64)
    shuffled[torch.tensor(order)] = torch.tensor(np.roll(order, -most))
    return shuffled


def standard_error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of N values, N >= 2."""
    return (values.std() / len(values) ** 0.5).item()


# ---------------------------------------------------------------- records
def read_record(path: str | Path, *keys: str) -> dict:
    """Return the JSON record of a step. Raise EvaluationError if one of `keys` is missing."""
    record = read_json(path)
    absent = [key for key in keys if not isinstance(record, dict) or key not in record]
    if absent:
        raise EvaluationError(f"{path}: lacks {', '.join(absent)}; {remake(path)}")
    return record


def remake(path: str | Path) -> str:
    """Return the remedy of an error: how to make a result again."""
    return f"make it again: snakemake --force {path}"


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file atomically, with `about` as its metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside, metadata=about)
    os.replace(aside, path)


def load_tensors(path: str | Path, *keys: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors `keys` (by default all) and the metadata of a safetensors file. Raise EvaluationError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys or file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file; make it with: snakemake {path}") from None
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"{path}: not the tensors expected ({error}); {remake(path)}") from None
