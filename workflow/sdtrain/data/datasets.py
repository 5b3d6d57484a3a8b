"""Datasets of images and of latents, indexed by the position in a training's endless, shuffled stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch.utils.data import Dataset

from sdtrain.data import images
from sdtrain.data.manifest import read_manifest
from sdtrain.data.order import Order, Recent
from sdtrain.data.sources import Shard, Source
from sdtrain.data.table_source import TableSource
from sdtrain.data.tar_source import TarSource
from sdtrain.errors import DataError

IMAGE = images.IMAGE_EXTENSIONS
TABLE_COLUMNS = {"image": (*IMAGE, "image", "image_path", "path", "url"), "caption": ("txt", "caption", "text")}


class PositionDataset(Dataset):
    """Item p is the sample at position p of the stream: a dict of tensors and texts, a pure function of (seed, p).

    An item that cannot be read has "error", a message, and "reason".
    """

    def __init__(self, source: Source, seed: int, window: int, idx_to_prompt: str | None = None):
        self.source, self.seed = source, seed
        self.prompts = _read_prompts(idx_to_prompt) if idx_to_prompt else None
        self.order = Order(source.count, source.shards, window, seed)
        self._load = Recent(source.load, window + 2)
        self.locate(0)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def dropped(self) -> dict[str, int]:
        """Return the number of samples that are left out of the stream, by reason, in the shards counted so far."""
        return dict(self.source.dropped)

    def locate(self, position: int) -> tuple[Shard, int]:
        """Return the shard and the row of the sample at a position of the stream. Raise DataError if it is empty."""
        found = self.order.locate(position)
        if found is None:
            raise DataError(
                f"no sample is left of {self.source.seen}: {self.dropped}; loosen dataset.params.filters, "
                "or check the shards"
            )
        shard, row = found
        return self._load(shard), row

    def __getitem__(self, position: int) -> dict[str, Any]:
        shard, row = self.locate(position)
        key = shard.key(row)
        place = f"{shard.name}: {key}"
        try:
            fields = shard.read(row)
        except OSError as error:
            return {"error": f"{place}: unreadable ({error})", "reason": "unreadable"}
        try:
            return {"key": key, **self.prepare(fields, position)}
        except images.ImageError as error:
            return {"error": f"{place}: {error}", "reason": "undecodable image"}
        except (KeyError, SafetensorError) as error:
            return {"error": f"{place}: unreadable latent ({error})", "reason": "unreadable latent"}
        except DataError as error:
            raise DataError(f"{place}: {error}") from None

    def prepare(self, fields: dict[str, bytes], position: int) -> dict[str, Any]:
        """Return the item of a sample's fields."""
        raise NotImplementedError

    def caption(self, position: int) -> str:
        """Return the text of the sample at a position of the stream."""
        shard, row = self.locate(position)
        return self.text(shard.read(row, ["caption"])["caption"])

    def text(self, caption: bytes) -> str:
        """Return the text of a caption field, or the prompt of the class in it."""
        label = caption.decode("utf-8", "replace").strip()
        if self.prompts is None:
            return label
        try:
            return self.prompts[label] if isinstance(self.prompts, dict) else self.prompts[int(label)]
        except (KeyError, IndexError, ValueError):
            raise DataError(f"no prompt for class {label!r} in dataset.params.idx_to_prompt") from None

    def rng(self, position: int) -> np.random.Generator:
        """Return the random generator of a position's augmentations."""
        return np.random.default_rng([self.seed, 1, position])

    def require_complete(self, max_lost: float) -> None:
        """Raise DataError if more than the share `max_lost` of the samples (and more than 10) lack a field or JSON.

        Only the shards counted so far are considered where counting all would mean reading remote shards.
        """
        if self.source.cheap:
            len(self)
        lacking = {reason: count for reason, count in self.dropped.items() if reason != "filters"}
        if sum(lacking.values()) > max(10, self.source.seen * max_lost):
            raise DataError(
                f"{sum(lacking.values())} of {self.source.seen} samples are incomplete ({lacking}); rebuild the shards "
                f"or correct the columns, or allow more than {max_lost:g} of them with dataset.params.max_lost"
            )

    def describe(self) -> str:
        """Return one line: how many samples there are, and why others are left out, in the shards counted so far."""
        if self.source.cheap:
            len(self)
        source, part = self.source, ""
        if source.counted < source.shards:
            part = f" in the first {source.counted:,} of {source.shards:,} shards"
        about = f"{source.kept:,} of {source.seen:,} samples{part} ({self.dropped or 'none'} dropped)"
        if 2 * source.dropped["filters"] > source.seen:
            about += (
                f"; re-shard: only {source.kept / source.seen:.1%} are kept, and the rest is skipped; shards of the "
                "kept samples load faster: put dataset.params.filters into select.filters of configs/data"
            )
        return about


class ImageDataset(PositionDataset):
    """Images and captions: pixels float32 3 x R x R in [-1, 1], caption and key str, and `images.prepare`'s int64
    original_size (height, width) and crop (top, left).

    `source` has the fields image and caption, or is the path of tars; then `filters` and `cache` are for these. With
    `idx_to_prompt`, a JSON file, captions are prompts of classes.
    """

    def __init__(
        self,
        source: Source | str,
        resolution: int,
        *,
        crop: str = "center",
        flip: bool = False,
        zoom: tuple[float, float] = (1.0, 1.0),
        filters: dict[str, Any] | None = None,
        idx_to_prompt: str | None = None,
        seed: int = 0,
        window: int = 64,
        cache: str | None = None,
    ):
        self.resolution, self.crop, self.flip, self.zoom = resolution, crop, flip, zoom
        if isinstance(source, str):
            wanted = {"image": IMAGE, "caption": ("cls",) if idx_to_prompt else ("txt",)}
            source = TarSource(source, wanted, filters, cache=cache, window=window)
        super().__init__(source, seed, window, idx_to_prompt)

    def prepare(self, fields: dict[str, bytes], position: int) -> dict[str, Any]:
        """Return the square of the image, and the caption."""
        rng = self.rng(position)
        image = images.prepare(fields["image"], self.resolution, self.crop, self.flip, rng, self.zoom)
        return {**image, "caption": self.text(fields["caption"])}


class LatentDataset(PositionDataset):
    """Precomputed latents: latents float32 C x h x w (already scaled), caption and key str; where they were kept, int64
    original_size and crop as of an image, and text, the text encoder's states of the caption, float32 tokens x width.

    From stored moments, latents are drawn anew at each position. `empty_text` is the text of the empty caption. With
    `idx_to_prompt`, a JSON file, captions are prompts of classes.
    """

    def __init__(
        self,
        path: str,
        *,
        filters: dict[str, Any] | None = None,
        idx_to_prompt: str | None = None,
        seed: int = 0,
        window: int = 64,
        cache: str | None = None,
    ):
        self.empty_text = _read_empty_text(path) if path.endswith(".json") else None
        wanted = {"latent": ("latent",), "caption": ("cls",) if idx_to_prompt else ("txt",)}
        if self.empty_text is not None:
            wanted["text"] = ("text",)
        source = TarSource(path, wanted, filters, cache=cache, window=window)
        super().__init__(source, seed, window, idx_to_prompt)

    def prepare(self, fields: dict[str, bytes], position: int) -> dict[str, Any]:
        """Return the latents and the caption, with the text states and sizes stored beside them."""
        kept = load_safetensors(fields["latent"])
        if "mean" in kept:
            noise = self.rng(position).standard_normal(kept["mean"].shape, dtype=np.float32)
            latents = kept["mean"].float() + kept["std"].float() * torch.from_numpy(noise)
        else:
            latents = kept["latents"].float()
        item: dict[str, Any] = {"latents": latents, "caption": self.text(fields["caption"])}
        item |= {name: kept[name] for name in ("original_size", "crop") if name in kept}
        if "text" in fields:
            item["text"] = load_safetensors(fields["text"])["text"].float()
        return item


def _read_prompts(path: str) -> dict | list:
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"dataset.params.idx_to_prompt: {path}: not a readable JSON file ({error})") from None
    if not isinstance(prompts, dict | list):
        raise DataError(f"dataset.params.idx_to_prompt: {path}: expected a list or a mapping of class -> prompt")
    return prompts


def _read_empty_text(manifest: str) -> torch.Tensor | None:
    """Return the text encoder's states of the empty caption that a manifest names, float32 tokens x width."""
    name = read_manifest(manifest).get("empty_text")
    if not name:
        return None
    path = Path(manifest).parent / name
    try:
        return load_file(path)["text"].float()
    except (OSError, KeyError, SafetensorError) as error:
        remedy = f"make them again: snakemake --force {manifest}"
        raise DataError(f"{path}: not the states of the empty caption ({error}); {remedy}") from None


# ---------------------------------------------------------------- dataset forms: what dataset.type may name
def _open_images(source: Source | str, params: DictConfig, shared: dict[str, Any], **more: Any) -> PositionDataset:
    return ImageDataset(source, params.resolution, crop=params.crop, flip=params.flip, **more, **shared)


def _open_tars(params: DictConfig, shared: dict[str, Any]) -> PositionDataset:
    return _open_images(params.path, params, shared)


def _open_classes(params: DictConfig, shared: dict[str, Any]) -> PositionDataset:
    if not params.idx_to_prompt:
        raise DataError("dataset.params.idx_to_prompt: ClassificationWebDataset needs a JSON file of class -> prompt")
    return _open_images(params.path, params, shared, idx_to_prompt=params.idx_to_prompt)


def _open_tables(params: DictConfig, shared: dict[str, Any]) -> PositionDataset:
    about = {name: shared[name] for name in ("filters", "cache", "window")}
    source = TableSource(params.path, TABLE_COLUMNS, columns=dict(params.columns), **about)
    return _open_images(source, params, shared)


def _open_latents(params: DictConfig, shared: dict[str, Any]) -> PositionDataset:
    return LatentDataset(params.path, idx_to_prompt=params.idx_to_prompt, **shared)


FORMS: dict[str, Callable[[DictConfig, dict[str, Any]], PositionDataset]] = {
    "WebDataset": _open_tars,
    "ClassificationWebDataset": _open_classes,
    "ParquetDataset": _open_tables,
    "CSVDataset": _open_tables,
    "LatentDataset": _open_latents,
}


def open_dataset(config: DictConfig, seed: int) -> PositionDataset:
    """Open the dataset of a stage's `dataset` section. Raise DataError for what cannot be opened."""
    params = config.params
    filters = dict(params.filters) if params.filters else None
    shared = {"filters": filters, "seed": seed, "window": params.window, "cache": params.cache}
    return FORMS[config.type](params, shared)
