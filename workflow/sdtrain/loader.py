"""Manifest or brace URL -> deterministic, resumable batches, split by rank and worker.

The stream of a training is endless and indexed by position: image number p of the run is sample `order(seed, epoch)[p]`
with augmentations drawn from (seed, p). A batch is a range of positions, so a resume needs one number, images seen, and
the same global batch follows at any world size.
"""

from __future__ import annotations

import collections
import io
import json
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps
from safetensors.torch import load as load_safetensors
from torch.utils.data import DataLoader, Dataset

from sdtrain import predicates
from sdtrain.shards import Sample, ShardError, index_tar, read_manifest

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Image.MAX_IMAGE_PIXELS = 100_000_000  # a larger image is a decompression bomb, refused by PIL


class DataError(ValueError):
    """Data that cannot be trained on; the message names the place and the remedy."""


# ---------------------------------------------------------------- samples
def find_samples(path: str) -> list[Sample]:
    """The samples of a `manifest.json`, or of tars in brace notation, in the order of the shards."""
    if path.endswith(".json"):
        paths = [row["path"] for row in read_manifest(path)["shards"]]
    else:
        paths = webdataset.shardlists.expand_urls(path)
    remote = [p for p in paths if p.startswith("pipe:") or "://" in p]
    if remote:
        raise ShardError(f"{remote[0]}: shards are read from local folders; copy them, then set dataset.params.path")
    return [sample for shard in paths for sample in index_tar(shard)]


def keep_samples(samples: list[Sample], needed: list[tuple[str, ...]], filters: dict | None) -> tuple[list[Sample], dict]:
    """Drop samples that lack a field or fail a predicate; returns the rest and the counts by reason.

    `needed` lists alternatives: ("jpg", "png") asks for one of the two. Raises DataError if nothing is left.
    """
    verdicts = predicates.parse(filters or {})
    kept, dropped = [], collections.Counter()
    for sample in samples:
        missing = next((names for names in needed if not any(n in sample.fields for n in names)), None)
        if missing:
            dropped[f"no {'/'.join(missing)}"] += 1
        elif filters and not ("json" in sample.fields and verdicts.matches(json.loads(sample.read("json")))):
            dropped["filters"] += 1
        else:
            kept.append(sample)
    if not kept:
        raise DataError(f"no sample is left of {len(samples)}: {dict(dropped)}; loosen dataset.params.filters, or see the shards")
    return kept, dict(dropped)


# ---------------------------------------------------------------- images
def read_image(sample: Sample) -> Image.Image:
    """The decoded RGB image of a sample. Raises DataError, naming it, for one that cannot be decoded."""
    extension = next(e for e in IMAGE_EXTENSIONS if e in sample.fields)
    try:
        return to_rgb(Image.open(io.BytesIO(sample.read(extension))))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{sample.shard}: {sample.key}.{extension}: undecodable image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF orientation applied, alpha laid onto white, any mode converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, resolution: int, crop: str, rng: np.random.Generator, zoom: float = 1.0) -> Image.Image:
    """Resize the shorter side to `resolution` x `zoom` pixels, then cut a square of `resolution` (center or random)."""
    short = max(resolution, round(resolution * zoom))
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    room = width - resolution, height - resolution
    left, top = (int(rng.integers(r + 1)) for r in room) if crop == "random" else (r // 2 for r in room)
    return image.crop((left, top, left + resolution, top + resolution))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """float32 tensor 3 x H x W in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------- datasets indexed by position
class PositionDataset(Dataset):
    """Item p is sample number p of the endless, shuffled stream; a pure function of (seed, p)."""

    def __init__(self, samples: list[Sample], seed: int):
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return len(self.samples)

    def locate(self, position: int) -> Sample:
        """The sample at a position of the stream."""
        epoch, offset = divmod(position, len(self.samples))
        return self.samples[order(self.seed, epoch, len(self.samples))[offset]]

    def caption(self, sample: Sample) -> str:
        """The text of a sample."""
        return sample.read("txt").decode("utf-8", "replace").strip()

    def rng(self, position: int) -> np.random.Generator:
        """Randomness of this position's augmentations."""
        return np.random.default_rng([self.seed, 1, position])


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The permutation of sample indices in one epoch: int64 array of length `samples`."""
    return np.random.default_rng([seed, 0, epoch]).permutation(samples)


class ImageDataset(PositionDataset):
    """Images and captions: pixels float32 3 x R x R in [-1, 1], caption str, key str."""

    def __init__(self, path: str, resolution: int, *, crop="center", flip=False, zoom=(1.0, 1.0), filters=None, idx_to_prompt=None, seed=0):
        needed = [IMAGE_EXTENSIONS, ("cls",) if idx_to_prompt else ("txt",)]
        samples, self.dropped = keep_samples(find_samples(path), needed, filters)
        super().__init__(samples, seed)
        self.resolution, self.crop, self.flip, self.zoom = resolution, crop, flip, zoom
        self.prompts = json.loads(Path(idx_to_prompt).read_text()) if idx_to_prompt else None

    def __getitem__(self, position: int) -> dict:
        rng, sample = self.rng(position), self.locate(position)
        try:
            image = read_image(sample)
        except DataError as error:
            return {"error": str(error)}
        image = resize_and_crop(image, self.resolution, self.crop, rng, rng.uniform(*self.zoom))
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return {"key": sample.key, "pixels": to_pixels(image), "caption": self.caption(sample)}

    def caption(self, sample: Sample) -> str:
        """The text of a sample, or the prompt of its class."""
        if self.prompts is None:
            return super().caption(sample)
        label = sample.read("cls").decode().strip()
        try:
            return self.prompts[label] if isinstance(self.prompts, dict) else self.prompts[int(label)]
        except (KeyError, IndexError, ValueError):
            raise DataError(f"{sample.shard}: {sample.key}.cls: no prompt for class {label!r} in dataset.params.idx_to_prompt") from None


class LatentDataset(PositionDataset):
    """Precomputed latents and captions: latents float32 C x h x w (already scaled), caption str, key str."""

    def __init__(self, path: str, *, filters=None, seed=0):
        samples, self.dropped = keep_samples(find_samples(path), [("latent",), ("txt",)], filters)
        super().__init__(samples, seed)

    def __getitem__(self, position: int) -> dict:
        sample = self.locate(position)
        latents = load_safetensors(sample.read("latent"))["latents"].float()
        return {"key": sample.key, "latents": latents, "caption": self.caption(sample)}


def open_dataset(config, seed: int) -> PositionDataset:
    """The dataset of a stage's `dataset` section."""
    params = config.params
    filters = dict(params.filters) if params.filters else None
    if config.type == "LatentDataset":
        return LatentDataset(params.path, filters=filters, seed=seed)
    if config.type == "ClassificationWebDataset" and not params.idx_to_prompt:
        raise DataError("dataset.params.idx_to_prompt: ClassificationWebDataset needs a JSON file of class -> prompt")
    prompts = params.idx_to_prompt if config.type == "ClassificationWebDataset" else None
    return ImageDataset(
        params.path, params.resolution, crop=params.crop, flip=params.flip, filters=filters, idx_to_prompt=prompts, seed=seed
    )


# ---------------------------------------------------------------- batches
def batches(dataset: PositionDataset, batch_size: int, *, start=0, rank=0, world_size=1, workers=0, pin=False) -> Iterator[dict]:
    """Endless batches of this rank from image number `start` on.

    A global batch is `world_size * batch_size` consecutive positions; rank r takes the r-th run of `batch_size`.
    Tensors are stacked on a first axis, other values are lists. An undecodable image gives its place to the batch's
    next image; more than 1 in 10 of them end the training with DataError.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Positions(start + rank * batch_size, world_size * batch_size, batch_size),
        num_workers=workers,
        collate_fn=list,
        pin_memory=False,
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread,
    )
    seen, errors = 0, []
    for items in loader:
        good = [item for item in items if "error" not in item]
        bad = [item["error"] for item in items if "error" in item]
        seen, errors = seen + len(items), errors + bad
        for error in bad:
            warnings.warn(f"skipped: {error}", stacklevel=2)
        if not good or (len(errors) > 10 and len(errors) > seen / 10):
            raise DataError(f"{len(errors)} of {seen} images are lost, the last: {errors[-1]}; rebuild or filter the shards")
        items = [item if "error" not in item else good[i % len(good)] for i, item in enumerate(items)]
        yield {k: _stack([item[k] for item in items], pin) for k in items[0]}


class _Positions:
    """Lists of stream positions, one a batch, without end."""

    def __init__(self, first: int, stride: int, batch_size: int):
        self.first, self.stride, self.batch_size = first, stride, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        position = self.first
        while True:
            yield list(range(position, position + self.batch_size))
            position += self.stride


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _stack(values: list, pin: bool):
    if not isinstance(values[0], torch.Tensor):
        return values
    stacked = torch.stack(values)
    return stacked.pin_memory() if pin else stacked
