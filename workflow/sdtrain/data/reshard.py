"""Existing shards: adopt them where they are, or copy the samples that pass the filters, undecoded, into new shards."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from sdtrain.config.fingerprint import fingerprint
from sdtrain.config.load import check_existing
from sdtrain.data.indices import INDEX, from_json_column, read_index, read_metadata
from sdtrain.data.manifest import (
    THREADS,
    describe_shard,
    find_shards,
    move_rows,
    progress,
    was_touched,
    write_manifest,
    write_rows,
)
from sdtrain.data.predicates import add_yields, held_out_side, parse
from sdtrain.data.tars import END, ShardIndex, index_tar
from sdtrain.data.yields import show_shards
from sdtrain.errors import ConfigError, DataError
from sdtrain.io import storage
from sdtrain.io.files import hold_lock, temporary_path

BUFFER = 1 << 20  # bytes copied at once
NO_HELD_OUT = "shards.held_out_path: name the shards that the metrics compare with, such as a validation set"


def index_shards(config: DictConfig, split: str, part: int, parts: int, output: str) -> dict[str, Any]:
    """Write the manifest of one partition of existing shards, and return it.

    Shards that a manifest describes are not read again. Raise ConfigError for settings that shards do not support,
    DataError for a split without shards and for a shard that is not whole.
    """
    check_existing(config.select)
    path = config.path if split == "train" else config.held_out_path
    if not path:
        raise DataError(NO_HELD_OUT)
    found = find_shards(path, part, parts)
    made_by = {"path": path}  # without the partition: the indices of all partitions share a folder
    if all(row["index_path"] for row in found["shards"]):
        return write_rows(output, found["kind"], move_rows(found["shards"], Path(output).parent), {}, made_by, {})
    return write_manifest(output, found["kind"], [row["path"] for row in found["shards"]], {}, made_by)


def reshard(config: DictConfig, split: str, part: int, parts: int, output: str) -> dict[str, Any]:
    """Write one partition's shards into a folder beside `output`, named by what decides them, then their manifest.

    A killed command starts again from the beginning; the same input gives the same bytes.
    """
    choice = Choice(config, split)
    source = find_shards(choice.path, part, parts)
    made_by = choice.made_by | {"samples_per_shard": config.samples_per_shard, "part": part, "parts": parts}
    made_by["source"] = source.get("fingerprint")
    folder = Path(output).parent / fingerprint(made_by)
    with hold_lock(folder / ".lock", busy="another process writes these shards"):
        with ShardCopier(folder, config.samples_per_shard) as copier:
            for row in progress(source["shards"], len(source["shards"]), "reshard"):
                with storage.local(row["path"]) as path:
                    index = choice.keep(read_source(row, path, choice.columns))
                    copier.add(path, index, stays=storage.is_local(row["path"]))
            choice.check_column()  # before anything is finished
        dropped, yields = dict(choice.dropped), {"yields": choice.yields} if choice.yields else {}
        if parts == 1 and not copier.samples:
            shown = show_shards({"samples": 0, "dropped": dropped, **yields})
            raise DataError(f"{choice.path}: no sample is left for {split}; loosen the filters\n{shown}")
        return write_manifest(output, source["kind"], copier.paths, dropped, made_by, **yields)


def read_source(row: dict, path: str, columns: list[str]) -> ShardIndex:
    """Return a source shard's index with these columns: the one its manifest names, or one made of the local tar."""
    index = row["index_path"]
    touched = storage.is_local(row["path"]) and index and os.path.isfile(index) and was_touched(row["path"], index)
    if index and not touched:
        return read_index(index, row["path"], columns)
    found = index_tar(path, row["path"])
    return read_metadata(found, path, columns) if columns else found


# ---------------------------------------------------------------- choosing
class Choice:
    """Which samples of the source belong to a split. `dropped` counts the others by reason, `yields` by filter.

    Raise ConfigError for wrong settings. Where the held-out split has shards of its own, nothing of `path` is held out.
    """

    def __init__(self, config: DictConfig, split: str):
        select, own = config.select, config.held_out_path
        check_existing(select)
        if split == "held_out" and not (own or select.held_out.fraction):
            raise ConfigError(f"{NO_HELD_OUT}, or set select.held_out.fraction")
        self.predicates = parse(select.filters)
        self.held = select.held_out if select.held_out.fraction and not own else None
        self.split = split
        self.path = own if split == "held_out" and own else config.path
        self.columns = list(dict.fromkeys([*self.predicates.columns, *([self.held.column] if self.held else [])]))
        self.made_by: dict[str, Any] = {"path": self.path, "filters": self.predicates.explain()}
        if self.held:
            self.made_by |= {"split": split, "held_out": OmegaConf.to_container(self.held)}
        self.dropped: Counter[str] = Counter()
        self.yields: list[dict[str, Any]] | None = None
        self._asked, self._told = 0, 0  # samples that were looked at, and those of them with the held-out rule's key

    def keep(self, index: ShardIndex) -> ShardIndex:
        """Return the samples that belong to the split. Where a JSON key is used, those without JSON are dropped."""
        if not self.columns:
            return index
        assert index.readable is not None
        asked, before = index.take(index.readable), len(index)
        passed, yields = self.predicates.judge(asked.metadata)
        self.yields = add_yields(self.yields, yields)
        kept = asked.take(passed)
        here = kept
        if self.held and asked.metadata is not None:
            self._asked += len(asked)
            self._told += len(asked) - asked.metadata[self.held.column].null_count
            here = kept.take(self._side(kept))
        other = "in the held-out split" if self.split == "train" else "in the training split"
        counts = {
            "no readable json": before - len(asked),
            "filters": len(asked) - len(kept),
            other: len(kept) - len(here),
        }
        self.dropped += Counter(counts)
        return here

    def check_column(self) -> None:
        """Raise ConfigError if no sample has the key of the held-out rule: all would be in one split."""
        if self.held and self._asked and not self._told:
            raise ConfigError(
                f"select.held_out.column: no sample of {self.path} has {self.held.column}, so all would be in "
                "one split; name a key of the samples' JSON"
            )

    def _side(self, index: ShardIndex) -> np.ndarray:
        assert self.held is not None and index.metadata is not None
        column = self.held.column
        values = from_json_column(index.metadata[column], index.metadata.schema.field(column))
        return held_out_side(values, self.held.fraction, self.held.seed) == (self.split == "held_out")


# ---------------------------------------------------------------- copying
class ShardCopier:
    """Fill shards of equal length with whole samples of other tars, byte for byte, as a context.

    Threads copy, hash and index while the caller looks for the next samples. `paths` and `samples`: what was written.
    """

    def __init__(self, folder: Path, samples_per_shard: int):
        self.folder, self.samples_per_shard = folder, samples_per_shard
        self.paths: list[Path] = []
        self.samples = 0
        self._shard: ShardCopy | None = None
        self._finished: deque[Future] = deque()
        self._last: tuple[str, str] | None = None  # shard and key of the previous sample
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> ShardCopier:
        for old in {*self.folder.glob("*.tar*"), *self.folder.glob("*.parquet*")}:  # unfinished ones as well
            old.unlink()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._finish()
        self._pool.shutdown(cancel_futures=error[0] is not None)
        for future in self._finished if error[0] is None else []:
            future.result()

    def add(self, path: str, index: ShardIndex, stays: bool = True) -> None:
        """Append the samples of an index of the local tar at `path`; copy them at once unless that tar stays."""
        self._check_neighbours(index)
        at = 0
        while at < len(index):
            shard = self._shard = self._shard or ShardCopy(self.folder / f"{len(self.paths):05d}.tar")
            part = index[at : at + self.samples_per_shard - self.samples % self.samples_per_shard]
            shard.parts.append((path, part))
            if not stays:
                shard.copy()
            self.samples += len(part)
            at += len(part)
            if self.samples % self.samples_per_shard == 0:
                self._finish()

    def _check_neighbours(self, index: ShardIndex) -> None:
        """Raise DataError if two samples that become neighbours have the same key: they would be read as one."""
        if not len(index):
            return
        twice = np.flatnonzero(index.keys[1:] == index.keys[:-1])
        key, shard = str(index.keys[0]), index.shard
        if len(twice):
            key = str(index.keys[twice[0]])
            self._last = (shard, key)
        if self._last and self._last[1] == key:
            raise DataError(
                f"{shard}: sample {key} would be the neighbour of a sample of the same key from {self._last[0]}, "
                "and both be read as one; rename the keys of one of them"
            )
        self._last = (shard, str(index.keys[-1]))

    def _finish(self) -> None:
        if self._shard is None:
            return
        self._finished.append(self._pool.submit(self._shard.finish))
        self.paths.append(self._shard.path)
        self._shard = None
        if len(self._finished) > 2 * THREADS:  # bounds the number of shards in progress
            self._finished.popleft().result()


class ShardCopy:
    """A shard in progress. Its bytes are hashed while they are copied, so that they are read once."""

    def __init__(self, path: Path):
        self.path = path
        self.parts: list[tuple[str, ShardIndex]] = []  # path of a tar, the samples taken from it
        self._copied = 0  # of these parts
        self._temporary = temporary_path(path)
        self._digest = hashlib.sha256()

    def copy(self) -> None:
        """Append the parts that were added since the last call."""
        buffer = memoryview(bytearray(BUFFER))
        with open(self._temporary, "ab") as file:
            for path, index in self.parts[self._copied :]:
                for data in read_ranges(path, merge(index.begin, index.end), buffer):
                    self._digest.update(data)
                    file.write(data)
        self._copied = len(self.parts)

    def finish(self) -> None:
        """Copy the remaining parts, end the tar, rename it to its final name, and write its index."""
        self.copy()
        with open(self._temporary, "ab") as file:
            file.write(2 * END)
        self._digest.update(2 * END)
        os.replace(self._temporary, self.path)
        index = join_indices(str(self.path), [part for _, part in self.parts])
        describe_shard(str(self.path), self.path.with_suffix(INDEX), index, self._digest.hexdigest())


def join_indices(shard: str, parts: Sequence[ShardIndex]) -> ShardIndex:
    """Return the index, without metadata, of a tar that holds the samples of these indices and nothing else."""
    begin, end = (np.concatenate([getattr(part, name) for part in parts]) for name in ("begin", "end"))
    ends = np.cumsum(end - begin)
    moved = ends - end  # bytes, a sample
    fields = {}
    for extension in sorted(set().union(*(part.fields for part in parts))):
        absent = [np.full((len(part), 2), -1, np.int64) for part in parts]
        spans = np.concatenate([p.fields.get(extension, a) for p, a in zip(parts, absent, strict=True)])
        spans[:, 0] += np.where(spans[:, 0] < 0, 0, moved)
        if np.any(spans >= 0):
            fields[extension] = spans
    return ShardIndex(shard, np.concatenate([part.keys for part in parts]), begin + moved, ends, fields)


def merge(begin: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    """Return byte ranges in order, those that touch merged into one."""
    breaks = np.flatnonzero(begin[1:] != end[:-1])
    first, last = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(begin) - 1]])
    return list(zip(begin[first].tolist(), end[last].tolist(), strict=True))


def read_ranges(path: str, ranges: list[tuple[int, int]], buffer: memoryview) -> Iterator[memoryview]:
    """Yield the bytes of these ranges of a file, a full buffer at a time."""
    filled = 0
    with open(path, "rb", buffering=0) as file:
        for begin, end in ranges:
            file.seek(begin)
            while begin < end:
                count = file.readinto(buffer[filled : filled + end - begin])
                if not count:
                    raise DataError(f"{path}: ends at {begin}, in mid-sample; it changed while it was read")
                begin, filled = begin + count, filled + count
                if filled == len(buffer):
                    yield buffer
                    filled = 0
    yield buffer[:filled]
