"""Tar shards in the WebDataset format as the source of a dataset, local or remote."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data.indices import INDEX, INDEX_VERSION, read_facts, read_index
from sdtrain.data.manifest import describe_shard, read_manifest
from sdtrain.data.sources import Shard, Source, Wanted
from sdtrain.data.tars import ShardIndex
from sdtrain.errors import DataError
from sdtrain.io import storage
from sdtrain.io.cache import LocalCache, exclusive, short_digest

WAITS = (0.5, 1, 2, 4)  # seconds before each further attempt to read a remote shard


@dataclass(eq=False)
class TarShard(Shard):
    """The kept samples of one tar. `spans` maps each wanted field to int64 (n, 2): offset and size in bytes."""

    name: str
    keys: np.ndarray
    spans: dict[str, np.ndarray]
    copies: LocalCache | None  # of a shard that can only be read as a whole
    size: int | None  # bytes of the whole shard, where it is copied

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Return the name of a sample."""
        return str(self.keys[row])

    def read(self, row: int, names: Sequence[str] = ()) -> dict[str, bytes]:
        """Return the bytes of these fields (by default of all), by one read of the range that they span.

        Raise DataError if the shard cannot be read; a remote one is tried several times.
        """
        spans = {name: self.spans[name][row].tolist() for name in names or self.spans}
        begin, end = min(o for o, _ in spans.values()), max(o + size for o, size in spans.values())
        data = self._read_range(begin, end)
        return {name: data[offset - begin : offset - begin + size] for name, (offset, size) in spans.items()}

    def _read_range(self, begin: int, end: int) -> bytes:
        waits = iter(() if storage.is_local(self.name) else WAITS)
        while True:
            try:
                data = self._read_copy(begin, end) if self.copies else storage.read_range(self.name, begin, end - begin)
                if len(data) == end - begin:
                    return data
                raise storage.StorageError(f"cut off before byte {end}; rebuild it and the results that depend on it")
            except OSError as error:
                if (wait := next(waits, None)) is None:
                    reason = str(error).removeprefix(f"{self.name}: ")
                    raise DataError(f"{self.name}: {reason}; correct that, then run the command again") from None
                time.sleep(wait)

    def _read_copy(self, begin: int, end: int) -> bytes:
        assert self.copies is not None
        with self.copies.fetch(self.name) as file:
            if (size := os.fstat(file.fileno()).st_size) != self.size:
                raise DataError(
                    f"{self.name}: the source has changed: {size} bytes, but {self.size} when it was indexed; delete "
                    f"{self.copies.folder.parent} and start again"
                )
            return os.pread(file.fileno(), end - begin, begin)


class TarSource(Source):
    """Tars of a manifest.json, or named by brace notation, globs, s3:// or http(s):// addresses or pipe: commands.

    A manifest brings indices: fields and JSON are then known without reading the tar. Other shards are indexed when
    they are first needed, and the index is cached. Of s3:// and http(s):// each sample is read by its byte range. A
    pipe: command is run for the whole shard, whose copy is cached; the copies of the last two windows are kept.
    """

    def __init__(
        self,
        path: str,
        wanted: Wanted,
        filters: Mapping[str, Any] | None = None,
        *,
        cache: str | None = None,
        window: int = 64,
    ):
        self.indices: list[str | Path | None]
        if path.endswith(".json"):
            rows = read_manifest(path)["shards"]
            self.addresses, self.indices = [row["path"] for row in rows], [row["index_path"] for row in rows]
        else:
            self.addresses = _expand(path)
            self.indices = [None] * len(self.addresses)
        self.window = window
        super().__init__(path, len(self.addresses), wanted, filters, None not in self.indices, cache)

    @property
    def copies(self) -> LocalCache:
        """Return the cache of whole shards."""
        return LocalCache(self.folder / "passing", 2 * self.window)

    def load(self, number: int) -> TarShard:
        """Open a shard: return the samples of it that are kept."""
        index, spans = self._read(number)
        kept, _ = self._judge_index(index, spans)
        address = self.addresses[number]
        copies, size = None, None
        if address.startswith("pipe:"):
            copies, size = self.copies, (read_facts(self.indices[number]) or {}).get("bytes")
        return TarShard(address, index.keys[kept], {name: s[kept] for name, s in spans.items()}, copies, size)

    def _measure(self, number: int) -> tuple[int, Counter[str]]:
        if not self.predicates.items and (complete := self._count_complete(self.indices[number])):
            return complete, Counter()
        index, spans = self._read(number)
        return len(index), self._judge_index(index, spans)[1]

    def _judge_index(self, index: ShardIndex, spans: dict[str, np.ndarray]) -> tuple[np.ndarray, Counter[str]]:
        assert index.readable is not None
        has = {"/".join(self.wanted[name]): span[:, 0] >= 0 for name, span in spans.items()}
        return self._judge(has, index.metadata, index.readable)

    def _count_complete(self, index: str | Path | None) -> int | None:
        """Return the number of samples if the statistics in the index's footer say that all have every field."""
        try:
            footer = pq.read_metadata(index) if index else None
        except (OSError, pa.ArrowException):
            return None
        if footer is None or not footer.num_rows:
            return None
        complete = (any(_minimum(footer, f"offset:{e}") >= 0 for e in names) for names in self.wanted.values())
        return footer.num_rows if all(complete) else None

    def _read(self, number: int) -> tuple[ShardIndex, dict[str, np.ndarray]]:
        """Return a shard's index, and the spans of each wanted field: int64 (n, 2), -1 where a sample has none."""
        place = self.indices[number]
        if place is None:  # made once a process: the numbers of samples must not change while it runs
            place = self.indices[number] = self._make_index(self.addresses[number])
        index = read_index(place, self.addresses[number], self.predicates.columns)
        spans = {}
        for name, extensions in self.wanted.items():
            spans[name] = np.full((len(index), 2), -1, np.int64)
            for found in (index.fields[e] for e in reversed(extensions) if e in index.fields):
                spans[name][found[:, 0] >= 0] = found[found[:, 0] >= 0]
        return index, spans

    def _make_index(self, address: str) -> Path:
        """Return the cached index of a shard that comes without one; make it unless it fits the shard."""
        index = self.folder / f"{short_digest(address)}{INDEX}"
        with exclusive(index):
            try:
                if not address.startswith("pipe:"):
                    describe_shard(address, index)
                elif not self._fits(index, address):
                    with self.copies.fetch(address) as file:
                        describe_shard(f"/proc/self/fd/{file.fileno()}", index)
            except (DataError, storage.StorageError) as error:
                raise DataError(str(error) if address in str(error) else f"{address}: {error}") from None
        return index

    def _fits(self, index: Path, address: str) -> bool:
        """Return whether an index is of a shard as large as the cached copy: outputs of commands have no version."""
        facts, size = read_facts(index) or {}, None
        with contextlib.suppress(FileNotFoundError):
            size = os.path.getsize(self.copies.path(address))
        return facts.get("version") == INDEX_VERSION and size in (None, facts.get("bytes"))


def _minimum(footer: pq.FileMetaData, column: str) -> int:
    """Return the least value of a column of integers by a Parquet footer; -1 if it does not tell."""
    names = footer.schema.names
    if column not in names:
        return -1
    parts = (footer.row_group(i).column(names.index(column)).statistics for i in range(footer.num_row_groups))
    return min((part.min if part is not None and part.has_min_max else -1 for part in parts), default=-1)


def _expand(path: str) -> list[str]:
    """Return the addresses of tars. Raise an error if a local one is missing."""
    try:
        addresses = storage.expand(path)
    except storage.StorageError as error:
        raise DataError(f"dataset.params.path: {error}") from None
    for address in addresses:
        if storage.is_local(address) and not os.path.isfile(address):
            raise DataError(f"{address}: shard is missing; rebuild it, or correct the path")
    return addresses
