"""The endless, deterministic stream of a training: image number p of a run -> a sample -> resumable batches.

Everything is a pure function of (seed, p): a resume needs one number, images seen, and the same global batch follows at
any world size. The order needs little memory at any scale: in each epoch the shards are permuted, and the samples of
each `window` of consecutive shards are permuted together.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import warnings
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from sdtrain.config.load import TABLE_DATASETS
from sdtrain.data import images
from sdtrain.data.manifest import read_manifest
from sdtrain.data.sources import DataError, Sample, Source, TableSource, TarSource
from sdtrain.data.tars import ShardError

IMAGE = images.IMAGE_EXTENSIONS
TABLE_COLUMNS = {"image": (*IMAGE, "image", "image_path", "path", "url"), "caption": ("txt", "caption", "text")}
TRIES = 100  # unreadable samples in a row that end the training


# ---------------------------------------------------------------- order
class Recent:
    """The results of a function of one argument, for the few latest arguments."""

    def __init__(self, function: Callable, size: int):
        self.function, self.size, self.results = function, size, OrderedDict()

    def __call__(self, argument: Any) -> Any:
        if argument not in self.results:
            self.results[argument] = self.function(argument)
            if len(self.results) > self.size:
                self.results.popitem(last=False)
        self.results.move_to_end(argument)
        return self.results[argument]

    def __getstate__(self) -> dict:  # a process that is started anew opens its own
        return {**self.__dict__, "results": OrderedDict()}


class Order:
    """Where number p of the stream lies: a pure function of (seed, p) and of how many samples each shard has.

    `count` maps shard numbers to their numbers of samples, and is asked no earlier than needed: in the first epoch for
    the windows up to p. Memory: two windows' permutations, and a number a shard.
    """

    def __init__(self, count: Callable[[np.ndarray], np.ndarray], shards: int, window: int, seed: int):
        self.count, self.shards, self.window, self.seed = count, shards, window, seed
        self.windows = -(-shards // window)
        self.total: int | None = None  # samples an epoch, once all were counted
        self._epoch, self._permutation = Recent(self._start_epoch, 2), Recent(self._permute, 2)

    def __len__(self) -> int:
        if self.total is None:
            self.total = int(self.count(np.arange(self.shards)).sum())
        return self.total

    def locate(self, position: int) -> tuple[int, int] | None:
        """The shard and the number of the sample in it; None where there are no samples at all."""
        if self.total == 0:
            return None
        epoch, offset = divmod(position, self.total) if self.total else (0, position)
        shards, ends = self._epoch(epoch)
        while ends[-1] <= offset and len(ends) <= self.windows:
            ends.append(ends[-1] + int(self.count(self._members(shards, len(ends) - 1)).sum()))
        if ends[-1] <= offset:  # the first epoch is over
            self.total = ends[-1]
            return self.locate(position)
        window = bisect_right(ends, offset) - 1
        permutation, members, starts = self._permutation((epoch, window))
        place = int(permutation[offset - ends[window]])
        member = bisect_right(starts, place) - 1
        return members[member], place - starts[member]

    def _members(self, shards: np.ndarray, window: int) -> np.ndarray:
        return shards[window * self.window : (window + 1) * self.window]

    def _start_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The order of the shards, and the ends of the windows counted so far, which grows."""
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.shards), [0]

    def _permute(self, at: tuple[int, int]) -> tuple[np.ndarray, list[int], list[int]]:
        """A window's permutation of its samples, its shards, and the number of each one's first sample."""
        epoch, window = at
        members = self._members(self._epoch(epoch)[0], window)
        counts = self.count(members).tolist()
        permutation = np.random.default_rng([self.seed, 2, epoch, window]).permutation(sum(counts))
        return permutation, members.tolist(), list(accumulate(counts, initial=0))[:-1]


# ---------------------------------------------------------------- datasets indexed by position
class PositionDataset(Dataset):
    """Item p is number p of the endless, shuffled stream: a dict of tensors and texts, the same for the same (seed, p).

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
        """Samples that are no part of the stream, by reason, in the shards counted so far."""
        return dict(self.source.dropped)

    def locate(self, position: int) -> Sample:
        """The sample at a position of the stream. Raises DataError where there is none at all."""
        found = self.order.locate(position)
        if found is None:
            raise DataError(
                f"no sample is left of {self.source.seen}: {self.dropped}; loosen dataset.params.filters, "
                "or see the shards"
            )
        shard, row = found
        return self._load(shard)[row]

    def __getitem__(self, position: int) -> dict:
        sample = self.locate(position)
        try:
            fields = sample.read()
        except OSError as error:
            return {"error": f"{sample.place}: unreadable ({error})", "reason": "unreadable"}
        try:
            return {"key": sample.key, **self.prepare(fields, position)}
        except images.ImageError as error:
            return {"error": f"{sample.place}: {error}", "reason": "undecodable image"}
        except (KeyError, SafetensorError) as error:
            return {"error": f"{sample.place}: unreadable latent ({error})", "reason": "unreadable latent"}
        except DataError as error:
            raise DataError(f"{sample.place}: {error}") from None

    def prepare(self, fields: dict[str, bytes], position: int) -> dict:
        """What becomes of a sample's fields."""
        raise NotImplementedError

    def caption(self, sample: Sample) -> str:
        """The text of a sample."""
        return self.text(sample.read("caption")["caption"])

    def text(self, caption: bytes) -> str:
        """The caption behind a sample's field, or the prompt of its class."""
        label = caption.decode("utf-8", "replace").strip()
        if self.prompts is None:
            return label
        try:
            return self.prompts[label] if isinstance(self.prompts, dict) else self.prompts[int(label)]
        except (KeyError, IndexError, ValueError):
            raise DataError(f"no prompt for class {label!r} in dataset.params.idx_to_prompt") from None

    def rng(self, position: int) -> np.random.Generator:
        """Randomness of this position's augmentations."""
        return np.random.default_rng([self.seed, 1, position])

    def require_complete(self, max_lost: float) -> None:
        """Raise DataError if more than this share of the samples (and than 10) lack a field or their JSON.

        Of shards far away, only those counted so far are looked at.
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
        """How many samples there are and why others are not; of shards far away, only of those counted so far."""
        if self.source.cheap:
            len(self)
        source = self.source
        part = (
            "" if source.counted == source.shards else f" in the first {source.counted:,} of {source.shards:,} shards"
        )
        about = f"{source.kept:,} of {source.seen:,} samples{part} ({self.dropped or 'none'} dropped)"
        if 2 * source.dropped["filters"] > source.seen:
            about += (
                f"; re-shard: only {source.kept / source.seen:.1%} are kept, and the rest is read past; shards of the "
                "samples kept load faster: put dataset.params.filters into select.filters of configs/data"
            )
        return about


class ImageDataset(PositionDataset):
    """Images and captions: pixels float32 3 x R x R in [-1, 1], caption and key str, and `images.prepare`'s int64
    original_size (height, width) and crop (top, left).

    `path` names tars or, with `columns`, tables. With `idx_to_prompt`, a JSON file, captions are prompts of classes.
    """

    def __init__(
        self,
        path: str,
        resolution: int,
        *,
        crop: str = "center",
        flip: bool = False,
        zoom: tuple[float, float] = (1.0, 1.0),
        filters: dict[str, Any] | None = None,
        idx_to_prompt: str | None = None,
        columns: dict[str, str] | None = None,
        seed: int = 0,
        window: int = 64,
        cache: str | None = None,
    ):
        self.resolution, self.crop, self.flip, self.zoom = resolution, crop, flip, zoom
        if columns is None:
            wanted = {"image": IMAGE, "caption": ("cls",) if idx_to_prompt else ("txt",)}
            source = TarSource(path, wanted, filters, cache=cache, window=window)
        else:
            source = TableSource(path, TABLE_COLUMNS, filters, columns=columns, cache=cache, window=window)
        super().__init__(source, seed, window, idx_to_prompt)

    def prepare(self, fields: dict[str, bytes], position: int) -> dict:
        """The square of the image, and the caption."""
        rng = self.rng(position)
        image = images.prepare(fields["image"], self.resolution, self.crop, self.flip, rng, self.zoom)
        return {**image, "caption": self.text(fields["caption"])}


class LatentDataset(PositionDataset):
    """Precomputed latents: latents float32 C x h x w (already scaled), caption and key str; where they were kept, int64
    original_size and crop as of an image, and text, the states of the caption: float32 tokens x width.

    Of stored moments the latents are drawn anew at each position. `empty_text` is the text of the empty caption.
    With `idx_to_prompt`, a JSON file, captions are prompts of classes.
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

    def prepare(self, fields: dict[str, bytes], position: int) -> dict:
        """The latents, the caption and what was kept with them."""
        kept = load_safetensors(fields["latent"])
        if "mean" in kept:
            noise = self.rng(position).standard_normal(kept["mean"].shape, dtype=np.float32)
            latents = kept["mean"].float() + kept["std"].float() * torch.from_numpy(noise)
        else:
            latents = kept["latents"].float()
        item = {"latents": latents, "caption": self.text(fields["caption"])}
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
        raise DataError(f"dataset.params.idx_to_prompt: {path}: a list or a mapping of class -> prompt is expected")
    return prompts


def _read_empty_text(manifest: str) -> torch.Tensor | None:
    """The states of the empty caption that a manifest names, float32 tokens x width."""
    name = read_manifest(manifest).get("empty_text")
    try:
        return load_file(Path(manifest).parent / name)["text"].float() if name else None
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{Path(manifest).parent / name}: not the states of the empty caption ({error}); make them again: "
            f"snakemake --force {manifest}"
        ) from None


def open_dataset(config, seed: int) -> PositionDataset:
    """The dataset of a stage's `dataset` section."""
    params = config.params
    filters = dict(params.filters) if params.filters else None
    if params.window < 1:
        raise DataError(f"dataset.params.window={params.window}: at least one shard is shuffled at a time")
    shared = {"filters": filters, "seed": seed, "window": params.window, "cache": params.cache}
    if config.type == "LatentDataset":
        return LatentDataset(params.path, idx_to_prompt=params.idx_to_prompt, **shared)
    if config.type == "ClassificationWebDataset" and not params.idx_to_prompt:
        raise DataError("dataset.params.idx_to_prompt: ClassificationWebDataset needs a JSON file of class -> prompt")
    return ImageDataset(
        params.path,
        params.resolution,
        crop=params.crop,
        flip=params.flip,
        idx_to_prompt=params.idx_to_prompt if config.type == "ClassificationWebDataset" else None,
        columns=dict(params.columns) if config.type in TABLE_DATASETS else None,
        **shared,
    )


# ---------------------------------------------------------------- batches
def batches(
    dataset: PositionDataset,
    batch_size: int,
    *,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    max_lost: float = 0.1,
) -> Generator[dict]:
    """Endless batches of this rank from image number `start` on.

    A global batch is `world_size * batch_size` consecutive positions; rank r takes the r-th run of `batch_size`.
    Tensors are stacked on a first axis, other values are lists. An unreadable sample gives its place to the next
    readable one of the stream, which then stands twice in that epoch; "lost" counts those of all batches so far by
    reason. More of them than the share `max_lost` (and than 10 at all) end the training with DataError, as does a tar
    that cannot be read.
    """
    first, stride = start + rank * batch_size, world_size * batch_size
    loader = DataLoader(
        _Messages(dataset),
        batch_sampler=_Positions(first, stride, batch_size),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # its seed of the workers would come from torch's global randomness
    )
    return _readable(dataset, iter(loader), first, stride, batch_size, max_lost)  # workers start here, in any thread


def _readable(
    dataset: PositionDataset, loaded: Iterator, first: int, stride: int, batch_size: int, max_lost: float
) -> Generator[dict]:
    """Batches in which other samples stand for those that cannot be read."""
    seen, lost = 0, Counter()
    try:
        for batch in loaded:
            seen += batch_size
            if isinstance(batch, list):
                for i, item in enumerate(batch):
                    if "error" in item:
                        _count_lost(lost, item, seen, max_lost)
                        batch[i] = _next_readable(dataset, first + i)
                batch = _collate(batch)
            first += stride
            yield {**batch, "lost": dict(lost)}
    finally:
        del loaded  # and with it the workers, which the traceback of an error would keep


def _count_lost(lost: Counter, item: dict, seen: int, max_lost: float) -> None:
    if "reason" not in item:
        raise DataError(item["error"])
    lost[item["reason"]] += 1
    warnings.warn(f"skipped: {item['error']}", stacklevel=3)
    if lost.total() > max(10, seen * max_lost):
        raise DataError(
            f"{lost.total()} of {seen} samples are lost ({dict(lost)}), the last: {item['error']}; rebuild or filter "
            "the shards, or allow more with dataset.params.max_lost"
        )


def _next_readable(dataset: PositionDataset, position: int) -> dict:
    """The first readable item past `position`: the same at any batch and world size."""
    for step in range(1, TRIES):
        item = dataset[position + step]
        if "error" not in item:
            return item
    raise DataError(f"not one of {TRIES} samples in a row can be read, the last: {item['error']}; rebuild the shards")


class _Messages(Dataset):
    """A dataset whose DataError comes as an item without "reason": a worker would raise it with all its traceback."""

    def __init__(self, dataset: PositionDataset):
        self.dataset = dataset

    def __getitem__(self, position: int) -> dict:
        try:
            return self.dataset[position]
        except (DataError, ShardError) as error:
            return {"error": str(error)}


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


def _collate(items: list[dict]) -> dict | list[dict]:
    """One dict of stacked tensors and of lists; the items as they are where one has an error."""
    if any("error" in item for item in items):
        return items
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {k: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for k, v in columns.items()}


# ---------------------------------------------------------------- batches ahead
def prefetched(stream: Generator[dict], count: int = 2, pin: bool = False) -> Generator[dict]:
    """The same batches, and an error in the same place: up to `count` are made ahead in a thread, with 0 none.

    `pin` copies their tensors to page-locked memory. What makes the stream, such as a dataset, is the thread's from the
    first batch on; closing this generator waits for the batch in the making and ends the thread, the stream, and with
    it the worker processes. Raises DataError where `count` is negative.
    """
    if count < 0:
        raise DataError(f"dataset.params.prefetch={count}: a number of batches is expected, 0 for none ahead")
    made = map(_pinned, stream) if pin else stream
    try:
        yield from _ahead(made, count, torch.cuda.current_device() if pin else None) if count else made
    finally:
        if not sys.is_finalizing():  # a process that ends by an error has stopped its thread in the midst of it
            stream.close()


def _ahead(made: Iterator[dict], count: int, device: int | None) -> Generator[dict]:
    slots, ready, ended = threading.Semaphore(count), queue.SimpleQueue(), threading.Event()
    thread = threading.Thread(target=_fill, args=(made, slots, ready, ended, device), name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), BaseException):
            slots.release()
            yield item
        if not isinstance(item, StopIteration):
            raise item
    finally:
        ended.set()
        slots.release()
        thread.join()


def _fill(
    made: Iterator[dict],
    slots: threading.Semaphore,
    ready: queue.SimpleQueue,
    ended: threading.Event,
    device: int | None,
) -> None:
    """Put what is made into `ready` while there are slots, and at last the error, StopIteration at a plain end."""
    try:
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins at the first GPU, where every rank would take memory
        while slots.acquire() and not ended.is_set():
            ready.put(next(made))
    except BaseException as error:  # of any kind: the thread that waits for this item is to end by it
        ready.put(error)


def _pinned(batch: dict) -> dict:
    return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
