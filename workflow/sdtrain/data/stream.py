"""Endless batches of a dataset's stream: the same global batch at any world size and after any resume."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sdtrain.data.datasets import PositionDataset
from sdtrain.errors import DataError

TRIES = 100  # consecutive unreadable samples that end the training


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
) -> Generator[dict[str, Any]]:
    """Yield endless batches of this rank from position `start` on.

    A global batch is `world_size * batch_size` consecutive positions; rank r takes the r-th run of `batch_size`.
    Tensors are stacked along a new first axis, other values are lists. The next readable sample of the stream replaces
    an unreadable one, and so occurs twice in that epoch; "lost" counts the unreadable samples of all batches so far by
    reason. Raise DataError if more than the share `max_lost` of the samples (and more than 10) are lost, or if a shard
    cannot be read.
    """
    first, stride = start + rank * batch_size, world_size * batch_size
    loader = DataLoader(
        _ErrorItems(dataset),
        batch_sampler=(list(range(begin, begin + batch_size)) for begin in itertools.count(first, stride)),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=use_one_thread,
        generator=torch.Generator(),  # else the workers' seed is drawn from torch's global generator
    )
    return _replace_lost(dataset, iter(loader), first, stride, batch_size, max_lost)  # workers start here


def _replace_lost(
    dataset: PositionDataset, loaded: Iterator, first: int, stride: int, batch_size: int, max_lost: float
) -> Generator[dict[str, Any]]:
    """Yield the batches with other samples in the place of unreadable ones."""
    seen, lost = 0, Counter[str]()
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
        del loaded  # ends the workers, which the traceback of an error would keep alive


def _count_lost(lost: Counter[str], item: dict[str, Any], seen: int, max_lost: float) -> None:
    if "reason" not in item:
        raise DataError(item["error"])
    lost[item["reason"]] += 1
    warnings.warn(f"skipped: {item['error']}", stacklevel=3)
    if lost.total() > max(10, seen * max_lost):
        raise DataError(
            f"{lost.total()} of {seen} samples are lost ({dict(lost)}), the last: {item['error']}; rebuild or filter "
            "the shards, or allow more with dataset.params.max_lost"
        )


def _next_readable(dataset: PositionDataset, position: int) -> dict[str, Any]:
    """Return the first readable item after `position`: the same at any batch size and world size."""
    item: dict[str, Any] = {}
    for step in range(1, TRIES):
        item = dataset[position + step]
        if "error" not in item:
            return item
    raise DataError(
        f"not one of {TRIES} consecutive samples can be read, the last: {item['error']}; rebuild the shards"
    )


class _ErrorItems(Dataset):
    """A dataset that returns its DataError as an item without "reason": a worker would add its whole traceback."""

    def __init__(self, dataset: PositionDataset):
        self.dataset = dataset

    def __getitem__(self, position: int) -> dict[str, Any]:
        try:
            return self.dataset[position]
        except DataError as error:
            return {"error": str(error)}


def use_one_thread(worker: int) -> None:
    """Initialise a DataLoader's worker process: many workers of many threads each would slow each other down."""
    torch.set_num_threads(1)


def _collate(items: list[dict[str, Any]]) -> Any:
    """Return one dict of stacked tensors and of lists, or the items unchanged if one of them is an error."""
    if any("error" in item for item in items):
        return items
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {k: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for k, v in columns.items()}


# ---------------------------------------------------------------- prefetching
def prefetched(stream: Generator[dict], count: int = 2, pin: bool = False) -> Generator[dict]:
    """Yield the same batches (and raise the same error in the same place) while a thread makes up to `count` ahead.

    `pin` copies the tensors to page-locked memory. From the first batch on only the thread uses the stream and its
    dataset. Closing this generator waits for the batch in progress, then ends the thread, the stream and its worker
    processes. With `count` 0 there is no thread.
    """
    made = map(_pinned, stream) if pin else stream
    try:
        yield from _ahead(made, count, torch.cuda.current_device() if pin else None) if count else made
    finally:
        if not sys.is_finalizing():  # when the interpreter ends by an error, it has stopped the thread in mid-batch
            stream.close()


def _ahead(made: Iterator[dict], count: int, device: int | None) -> Generator[dict]:
    slots, ended = threading.Semaphore(count), threading.Event()
    ready: queue.SimpleQueue = queue.SimpleQueue()
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
    """Put batches into `ready` while there are free slots, and finally the error, StopIteration at a normal end."""
    try:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread starts on GPU 0, where each rank would allocate memory
        while slots.acquire() and not ended.is_set():
            ready.put(next(made))
    except BaseException as error:  # of any kind: the consumer, which waits for an item, raises it
        ready.put(error)


def _pinned(batch: dict) -> dict:
    return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
