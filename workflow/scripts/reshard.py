"""Copy the samples of existing shards whose metadata pass the filters, undecoded, into shards of equal size."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import fingerprint
from sdtrain.config.load import check_existing
from sdtrain.data.manifest import (
    THREADS,
    describe_shard,
    find_shards,
    locked,
    progress,
    read_part,
    was_touched,
    write_manifest,
)
from sdtrain.data.predicates import PredicateError, Predicates, add_yields, held_out_side, parse
from sdtrain.data.tars import (
    END,
    INDEX,
    ShardError,
    ShardIndex,
    from_json_column,
    index_tar,
    join_indices,
    read_index,
    read_metadata,
)
from sdtrain.data.yields import show_shards
from sdtrain.errors import ConfigError
from sdtrain.io import storage

BUFFER = 1 << 20  # bytes copied at once


def main(argv: list[str]) -> None:
    """Run the command."""
    defaults = {"split": "train", "part": "0", "parts": "1", "output": None}
    config, own = command_line(argv, schema.ExistingShardsConfig, __doc__, **defaults)
    try:
        manifest = reshard(config, own["split"], *read_part(own["part"], own["parts"]), own["output"])
    except (ConfigError, PredicateError, ShardError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(show_shards(manifest))


def reshard(config: DictConfig, split: str, part: int, parts: int, output: str) -> dict:
    """Write one part's shards into a folder beside `output`, keyed by what decides them, then their manifest.

    A command that was killed starts over; the same input gives the same bytes, whatever was there before.
    """
    choice = Choice(config, split)
    source = find_shards(choice.path, part, parts)
    made_by = choice.made_by | {"samples_per_shard": config.samples_per_shard, "part": part, "parts": parts}
    made_by["source"] = source.get("fingerprint")
    folder = Path(output).parent / fingerprint(made_by)
    with locked(folder):
        with ShardCopier(folder, config.samples_per_shard) as copier:
            for row in progress(source["shards"], len(source["shards"]), "reshard"):
                with storage.local(row["path"]) as path:
                    index = choice.keep(read_source(row, path, choice.columns))
                    copier.add(path, index, stays=storage.is_local(row["path"]))
            choice.check_column()  # before anything is finished
        yields = {"yields": choice.yields} if choice.yields else {}
        result = {"samples": copier.samples, "dropped": dict(choice.dropped), **yields}
        if parts == 1 and not copier.samples:
            raise ShardError(f"{choice.path}: no sample is left for {split}; loosen the filters\n{show_shards(result)}")
        return write_manifest(output, source["kind"], copier.paths, result["dropped"], made_by, **yields)


def read_source(row: dict, path: str, columns: list[str]) -> ShardIndex:
    """The index of a source with these columns: the one that its manifest names, or one made now from the local tar."""
    if row["index_path"] and not is_outdated(row["index_path"], row["path"]):
        return read_index(row["index_path"], row["path"], columns)
    index = index_tar(path, row["path"])
    return read_metadata(index, path, columns) if columns else index


def is_outdated(index: str, shard: str) -> bool:
    """Whether an index may be of another shard; that it is missing, `read_index` says."""
    return storage.is_local(shard) and os.path.isfile(index) and was_touched(shard, index)


class Choice:
    """Which samples of the source belong to a split, and the count of the others by reason."""

    def __init__(self, config: DictConfig, split: str):
        self.predicates, self.held = check(config, split)
        self.split = split
        self.path = config.held_out_path if split == "held_out" and config.held_out_path else config.path
        self.columns = list(dict.fromkeys([*self.predicates.columns, *([self.held.column] if self.held else [])]))
        self.made_by = {"path": self.path, "filters": self.predicates.explain()}
        if self.held:
            self.made_by |= {"split": split, "held_out": OmegaConf.to_container(self.held)}
        self.dropped: Counter[str] = Counter()
        self.yields: list[dict[str, Any]] | None = None
        self._asked, self._told = 0, 0  # samples that were looked at, those of them that have the held-out rule's key

    def keep(self, index: ShardIndex) -> ShardIndex:
        """The samples that belong here. Those without a JSON object are dropped where one of its keys is asked for."""
        if not self.columns:
            return index
        asked, before = index.take(index.readable), len(index)
        passed, yields = self.predicates.judge(asked.metadata)
        self.yields = add_yields(self.yields, yields)
        if self.held:
            self._asked += len(asked)
            self._told += len(asked) - asked.metadata[self.held.column].null_count
        kept = asked.take(passed)
        here = kept.take(self._side(kept)) if self.held else kept
        other = "in the held-out split" if self.split == "train" else "in the training split"
        counts = {
            "no readable json": before - len(asked),
            "filters": len(asked) - len(kept),
            other: len(kept) - len(here),
        }
        self.dropped += Counter(counts)
        return here

    def check_column(self) -> None:
        """Raise ConfigError where no sample had the key that decides the side: all would fall on one."""
        if self._asked and not self._told:
            raise ConfigError(
                f"select.held_out.column: no sample of {self.path} has {self.held.column}, so all would be on "
                "one side; name a key of the samples' JSON"
            )

    def _side(self, index: ShardIndex) -> np.ndarray:
        column = self.held.column
        values = from_json_column(index.metadata[column], index.metadata.schema.field(column))
        return held_out_side(values, self.held.fraction, self.held.seed) == (self.split == "held_out")


def check(config: DictConfig, split: str) -> tuple[Predicates, DictConfig | None]:
    """The filters, and the held-out rule unless nothing is held out. Raises ConfigError for what shards cannot do.

    Shards of their own for the held-out split make the rule void: then nothing of `path` is held out.
    """
    select, held = config.select, config.select.held_out
    check_existing(select)
    if not 0 <= held.fraction < 1:
        raise ConfigError(f"select.held_out.fraction: {held.fraction} is not in [0, 1)")
    if split == "held_out" and not (config.held_out_path or held.fraction):
        raise ConfigError(
            "shards.held_out_path: name the shards that the metrics compare with, such as a validation set, "
            "or set select.held_out.fraction"
        )
    if config.samples_per_shard < 1:
        raise ConfigError(f"shards.samples_per_shard: {config.samples_per_shard} is not above 0")
    return parse(select.filters), held if held.fraction and not config.held_out_path else None


# ---------------------------------------------------------------- copying
class ShardCopier:
    """Fill shards of equal length with whole samples of other tars, byte for byte. Use as a context.

    Threads copy, sum and index while the caller looks for the next samples. `paths`, `samples`: what was written.
    """

    def __init__(self, folder: Path, samples_per_shard: int):
        self.folder, self.samples_per_shard = folder, samples_per_shard
        self.paths: list[Path] = []
        self.samples = 0
        self._shard: ShardCopy | None = None
        self._finished: list[Future] = []
        self._last: tuple[str, str] | None = None  # shard and key of the sample before
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> ShardCopier:
        for old in {*self.folder.glob("*.tar*"), *self.folder.glob("*.parquet*")}:  # those aside, too
            old.unlink()
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None and self._shard is not None:
            self._finish()
        self._pool.shutdown(cancel_futures=error[0] is not None)
        if error[0] is None:
            wait(self._finished)

    def add(self, path: str, index: ShardIndex, stays: bool = True) -> None:
        """Append the samples of an index of the local tar at `path`; if that does not stay, they are copied at once."""
        self._check_neighbours(index)
        at = 0
        while at < len(index):
            self._shard = self._shard or ShardCopy(self.folder / f"{len(self.paths):05d}.tar")
            part = index[at : at + self.samples_per_shard - self.samples % self.samples_per_shard]
            self._shard.parts.append((path, part))
            if not stays:
                self._shard.copy()
            self.samples += len(part)
            at += len(part)
            if self.samples % self.samples_per_shard == 0:
                self._finish()

    def _check_neighbours(self, index: ShardIndex) -> None:
        """Raises ShardError where two samples that come to lie side by side have one key: they would be read as one."""
        if not len(index):
            return
        twice = np.flatnonzero(index.keys[1:] == index.keys[:-1])
        key, shard = str(index.keys[0]), index.shard
        if len(twice):
            key = str(index.keys[twice[0]])
            self._last = (shard, key)
        if self._last and self._last[1] == key:
            raise ShardError(
                f"{shard}: sample {key} would lie beside a sample of the same key from {self._last[0]}, "
                "and both be read as one; rename the keys of one of them"
            )
        self._last = (shard, str(index.keys[-1]))

    def _finish(self) -> None:
        self._finished.append(self._pool.submit(self._shard.finish))
        self.paths.append(self._shard.path)
        self._shard = None
        wait(self._finished[: -2 * THREADS])  # no more than so many at a time
        del self._finished[: -2 * THREADS]


def wait(futures: list[Future]) -> None:
    """Wait for all, and raise the first error."""
    for future in futures:
        future.result()


class ShardCopy:
    """One shard that is filled. Its bytes are summed on their way, so that they are read once."""

    def __init__(self, path: Path):
        self.path = path
        self.parts: list[tuple[str, ShardIndex]] = []  # path of a tar, the samples taken from it
        self._copied = 0  # of these parts
        self._aside = path.with_name(f".{path.name}.tmp")
        self._digest = hashlib.sha256()

    def copy(self) -> None:
        """Append the parts that were added since the last time."""
        buffer = memoryview(bytearray(BUFFER))
        with open(self._aside, "ab") as file:
            for path, index in self.parts[self._copied :]:
                for data in read_ranges(path, merge(index.begin, index.end), buffer):
                    self._digest.update(data)
                    file.write(data)
        self._copied = len(self.parts)

    def finish(self) -> None:
        """Copy what is left, end the tar, give it its name, and write its index."""
        self.copy()
        with open(self._aside, "ab") as file:
            file.write(2 * END)
        self._digest.update(2 * END)
        os.replace(self._aside, self.path)
        index = join_indices(str(self.path), [part for _, part in self.parts])
        describe_shard(str(self.path), self.path.with_suffix(INDEX), index, self._digest.hexdigest())


def merge(begin: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    """Byte ranges in order, those that touch made one."""
    breaks = np.flatnonzero(begin[1:] != end[:-1])
    first, last = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(begin) - 1]])
    return list(zip(begin[first].tolist(), end[last].tolist(), strict=True))


def read_ranges(path: str, ranges: list[tuple[int, int]], buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of these ranges of a file, a buffer full at a time."""
    filled = 0
    with open(path, "rb", buffering=0) as file:
        for begin, end in ranges:
            file.seek(begin)
            while begin < end:
                count = file.readinto(buffer[filled : filled + end - begin])
                if not count:
                    raise ShardError(f"{path}: ends at {begin}, before the sample does; it changed while it was read")
                begin, filled = begin + count, filled + count
                if filled == len(buffer):
                    yield buffer
                    filled = 0
    yield buffer[:filled]


if __name__ == "__main__":
    main(sys.argv)
