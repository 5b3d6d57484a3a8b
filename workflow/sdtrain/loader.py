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
from safetensors import SafetensorError
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


def keep_samples(
    samples: list[Sample], needed: list[tuple[str, ...]], filters: dict | None
) -> tuple[list[Sample], dict]:
    """Drop samples that lack a field or fail a predicate; returns the rest and the counts by reason.

    `needed` lists alternatives: ("jpg", "png") asks for one of the two. Raises DataError if nothing is left.
    """
    try:
        verdicts = predicates.parse(filters)
    except predicates.PredicateError as error:
        raise DataError(f"dataset.params.{error}") from None
    kept, dropped = [], collections.Counter()
    for sample in samples:
        missing = next((names for names in needed if not any(n in sample.fields for n in names)), None)
        if missing:
            dropped[f"no {'/'.join(missing)}"] += 1
        elif filters and (metadata := _metadata(sample)) is None:
            dropped["no readable json"] += 1
        elif filters and not verdicts.matches(metadata):
            dropped["filters"] += 1
        else:
            kept.append(sample)
    if not kept:
        raise DataError(
            f"no sample is left of {len(samples)}: {dict(dropped)}; loosen dataset.params.filters, or see the shards"
        )
    return kept, dict(dropped)


def _metadata(sample: Sample) -> dict | None:
    """The JSON field of a sample, or None where it is absent or no JSON object."""
    try:
        values = json.loads(sample.read("json"))
    except (KeyError, ValueError):
        return None
    return values if isinstance(values, dict) else None


# ---------------------------------------------------------------- images
def read_image(sample: Sample) -> Image.Image:
    """The decoded RGB image of a sample. Raises DataError, naming it, for one that cannot be decoded."""
    extension = next(e for e in IMAGE_EXTENSIONS if e in sample.fields)
    try:
        return to_rgb(Image.open(io.BytesIO(sample.read(extension))))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{sample.shard}: {sample.key}.{extension}: undecodable image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB, 8 bits: EXIF orientation applied, alpha laid onto white, any mode converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float32).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, resolution: int, crop: str, rng: np.random.Generator, zoom: float = 1.0
) -> Image.Image:
    """The square of `resolution` pixels (center or random) of the image with its shorter side at `resolution` x `zoom`.

    Only the square is resized, so that a strip of extreme length costs no more than any other image.
    """
    short = max(resolution, round(resolution * zoom))
    scale = short / min(image.size)
    scaled = [max(short, round(side * scale)) for side in image.size]
    room = [side - resolution for side in scaled]
    start = [int(rng.integers(r + 1)) if crop == "random" else r // 2 for r in room]
    unit = [side / new for side, new in zip(image.size, scaled, strict=True)]  # source pixels a pixel
    box = [begin * u for begin, u in zip(start, unit, strict=True)]
    box += [min(s, (b + resolution) * u) for s, b, u in zip(image.size, start, unit, strict=True)]
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, tuple(box), reducing_gap=2.0)


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

    def __init__(
        self,
        path: str,
        resolution: int,
        *,
        crop="center",
        flip=False,
        zoom=(1.0, 1.0),
        filters=None,
        idx_to_prompt=None,
        seed=0,
    ):
        needed = [IMAGE_EXTENSIONS, ("cls",) if idx_to_prompt else ("txt",)]
        samples, self.dropped = keep_samples(find_samples(path), needed, filters)
        super().__init__(samples, seed)
        self.resolution, self.crop, self.flip, self.zoom = resolution, crop, flip, zoom
        self.prompts = _read_prompts(idx_to_prompt) if idx_to_prompt else None

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
            raise DataError(
                f"{sample.shard}: {sample.key}.cls: no prompt for class {label!r} in dataset.params.idx_to_prompt"
            ) from None


class LatentDataset(PositionDataset):
    """Precomputed latents and captions: latents float32 C x h x w (already scaled), caption str, key str."""

    def __init__(self, path: str, *, filters=None, seed=0):
        samples, self.dropped = keep_samples(find_samples(path), [("latent",), ("txt",)], filters)
        super().__init__(samples, seed)

    def __getitem__(self, position: int) -> dict:
        sample = self.locate(position)
        try:
            latents = load_safetensors(sample.read("latent"))["latents"].float()
        except (OSError, KeyError, SafetensorError) as error:
            return {"error": f"{sample.shard}: {sample.key}.latent: unreadable ({error})"}
        return {"key": sample.key, "latents": latents, "caption": self.caption(sample)}


def _read_prompts(path: str) -> dict | list:
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"dataset.params.idx_to_prompt: {path}: not a readable JSON file ({error})") from None
    if not isinstance(prompts, dict | list):
        raise DataError(f"dataset.params.idx_to_prompt: {path}: a list or a mapping of class -> prompt is expected")
    return prompts


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
        params.path,
        params.resolution,
        crop=params.crop,
        flip=params.flip,
        filters=filters,
        idx_to_prompt=prompts,
        seed=seed,
    )


# ---------------------------------------------------------------- batches
def batches(
    dataset: PositionDataset, batch_size: int, *, start=0, rank=0, world_size=1, workers=0, pin=False
) -> Iterator[dict]:
    """Endless batches of this rank from image number `start` on.

    A global batch is `world_size * batch_size` consecutive positions; rank r takes the r-th run of `batch_size`.
    Tensors are stacked on a first axis, other values are lists. An undecodable image gives its place to the next
    readable one of the stream; more than 1 in 10 of them (and of 10 images at all) end the training with DataError.
    """
    first, stride = start + rank * batch_size, world_size * batch_size
    loader = DataLoader(
        dataset,
        batch_sampler=_Positions(first, stride, batch_size),
        num_workers=workers,
        collate_fn=list,
        pin_memory=False,
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread,
    )
    seen = lost = 0
    for items in _plain_errors(loader):
        for i, item in enumerate(items):
            seen += 1
            if "error" not in item:
                continue
            lost += 1
            warnings.warn(f"skipped: {item['error']}", stacklevel=2)
            if lost > max(10, seen / 10):
                raise DataError(
                    f"{lost} of {seen} images are lost, the last: {item['error']}; rebuild or filter the shards"
                )
            items[i] = _next_readable(dataset, first + i)
        first += stride
        yield {k: _stack([item[k] for item in items], pin) for k in items[0]}


def _next_readable(dataset: PositionDataset, position: int) -> dict:
    """The first readable item past `position`: the same at any batch and world size."""
    for step in range(1, len(dataset)):
        item = dataset[position + step]
        if "error" not in item:
            return item
    raise DataError(
        f"not one of {len(dataset)} images can be read, the last: {dataset[position]['error']}; rebuild the shards"
    )


def _plain_errors(loader: DataLoader) -> Iterator[list[dict]]:
    """The loader's batches; a DataError of a worker process is raised with its own message, without its traceback."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None


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
