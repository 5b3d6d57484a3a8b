"""Where samples lie: tar shards or tables, here or far away, as numbered shards that are opened when needed."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import hashlib
import itertools
import mmap
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data import formats, predicates, tables
from sdtrain.data.manifest import THREADS, describe_shard, read_manifest
from sdtrain.data.tars import INDEX, INDEX_VERSION, ShardError, ShardIndex, read_facts, read_index
from sdtrain.errors import SDTrainError
from sdtrain.io import storage

BLOCK_ROWS = 10_000  # rows of a CSV file that make a shard
MAX_BYTES = 100 << 20  # of an image file that a table points to
WAITS = (0.5, 1, 2, 4)  # seconds before a shard far away is asked again

Wanted = Mapping[str, Sequence[str]]  # our name of a field -> the names it may have; the first one present counts


class DataError(SDTrainError, ValueError):
    """Data that cannot be trained on; the message names the place and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One sample: row `row` of an opened shard."""

    shard: TarShard | TableShard
    row: int

    @property
    def key(self) -> str:
        """Its name, unique in the shard."""
        return self.shard.key(self.row)

    @property
    def place(self) -> str:
        """For messages: the shard and the name."""
        return f"{self.shard.name}: {self.key}"

    def read(self, *names: str) -> dict[str, bytes]:
        """The bytes of these fields, or of all that are wanted. Raises OSError where they cannot be read."""
        return self.shard.read(self.row, names)


class Source:
    """Numbered shards; of each, the samples are kept that have all that is wanted and pass the filters.

    `shards` is their number. `seen`, `kept` and `dropped` (by reason) count the samples of `counted` shards: those that
    were asked for so far. `cheap`: all can be counted without reading the data itself.
    """

    def __init__(self, shards: int, wanted: Wanted, filters: Mapping[str, Any] | None, cheap: bool):
        self.shards, self.wanted, self.cheap = shards, wanted, cheap
        try:
            self.predicates = predicates.parse(filters)
        except predicates.PredicateError as error:
            raise DataError(f"dataset.params.{error}") from None
        self.counts = np.full(shards, -1, np.int64)
        self.seen, self.dropped = 0, Counter()

    @property
    def counted(self) -> int:
        """How many shards were counted."""
        return int((self.counts >= 0).sum())

    @property
    def kept(self) -> int:
        """How many samples the counted shards have for us."""
        return int(self.counts[self.counts >= 0].sum())

    def count(self, numbers: Sequence[int]) -> np.ndarray:
        """The samples kept of each of these shards, int64."""
        unknown = [int(number) for number in numbers if self.counts[number] < 0]
        with ThreadPoolExecutor(THREADS) as pool:
            for begin in range(0, len(unknown), 64):  # a pool's queue of a hundred thousand would take its own gigabyte
                some = unknown[begin : begin + 64]
                for number, (seen, dropped) in zip(some, pool.map(self._measure, some), strict=True):
                    self.counts[number] = seen - dropped.total()
                    self.seen += seen
                    self.dropped += dropped
        return self.counts[numbers]

    def load(self, number: int) -> TarShard | TableShard:
        """The kept samples of a shard: a sequence of Sample."""
        raise NotImplementedError

    def _measure(self, number: int) -> tuple[int, Counter]:
        """How many samples a shard has, and how many are dropped, by reason."""
        raise NotImplementedError

    def _judge(
        self, has: dict[str, np.ndarray], metadata: pa.Table, readable: np.ndarray
    ) -> tuple[np.ndarray, Counter]:
        """Which rows are kept, bool, and why the others are not. `has` tells who has which field."""
        checks = {f"no {name}": rows for name, rows in has.items()}
        if self.predicates.items:
            try:
                checks |= {"no readable json": readable, "filters": self.predicates.mask(metadata)}
            except predicates.PredicateError as error:
                raise DataError(f"dataset.params.{error}") from None
        kept, dropped = np.ones(len(readable), bool), Counter()
        for reason, passes in checks.items():
            if lost := int(np.count_nonzero(kept & ~passes)):
                dropped[reason] = lost
            kept &= passes
        return kept, dropped


# ---------------------------------------------------------------- tar shards
@dataclass(eq=False)
class TarShard(Sequence):
    """The kept samples of one tar; `spans` maps each wanted field to int64 (n, 2), offset and bytes."""

    name: str
    keys: np.ndarray
    spans: dict[str, np.ndarray]
    copies: Copies | None  # of a shard that cannot be read in parts
    size: int | None  # bytes of the whole shard, where it is copied

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Sample:
        return Sample(self, range(len(self))[row])

    def key(self, row: int) -> str:
        """The name of a sample."""
        return str(self.keys[row])

    def read(self, row: int, names: Iterable[str] = ()) -> dict[str, bytes]:
        """The bytes of these fields (by default of all), by one read of the range that they span.

        Raises DataError where the shard cannot be read, one far away not after several tries either.
        """
        spans = {name: self.spans[name][row].tolist() for name in names or self.spans}
        begin, end = min(o for o, _ in spans.values()), max(o + size for o, size in spans.values())
        data = self._read_range(begin, end)
        return {name: data[offset - begin : offset - begin + size] for name, (offset, size) in spans.items()}

    def _read_range(self, begin: int, end: int) -> bytes:
        for wait in [*(() if storage.is_local(self.name) else WAITS), None]:
            try:
                data = self._read_copy(begin, end) if self.copies else storage.read_range(self.name, begin, end - begin)
                if len(data) == end - begin:
                    return data
                raise storage.StorageError(f"cut off before byte {end}; rebuild it, and what was made of it")
            except OSError as error:
                if wait is None:
                    about = str(error).removeprefix(f"{self.name}: ")
                    raise DataError(f"{self.name}: {about}; once that is right, start again") from None
                time.sleep(wait)

    def _read_copy(self, begin: int, end: int) -> bytes:
        with self.copies.fetch(self.name) as file:
            if (size := os.fstat(file.fileno()).st_size) != self.size:
                raise DataError(
                    f"{self.name}: the source has changed: {size} bytes, but {self.size} when it was indexed; delete "
                    f"{self.copies.folder} and start again"
                )
            return os.pread(file.fileno(), end - begin, begin)


class TarSource(Source):
    """Tars in the WebDataset format: those of a manifest.json, or in brace notation, a glob, s3:// or pipe: addresses.

    Where a manifest brings an index, fields and JSON are known without a look at the tar. Others are indexed when they
    are first needed, and the index is kept in `cache`. Behind pipe: a shard is copied there, as the newest of those of
    two windows; of s3:// and http(s):// each sample is read by its range of bytes.
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
        if path.endswith(".json"):
            rows = read_manifest(path)["shards"]
            self.addresses, self.indices = ([row[key] for row in rows] for key in ("path", "index_path"))
        else:
            self.addresses = _expand(path)
            self.indices = [None] * len(self.addresses)
        self.copies = Copies(path, cache, 2 * window)
        super().__init__(len(self.addresses), wanted, filters, cheap=None not in self.indices)

    def load(self, number: int) -> TarShard:
        """The kept samples of a shard."""
        index, spans = self._read(number)
        kept, _ = self._judge_index(index, spans)
        address = self.addresses[number]
        copies, size = None, None
        if address.startswith("pipe:"):
            copies, size = self.copies, read_facts(self.indices[number])["bytes"]
        return TarShard(address, index.keys[kept], {name: s[kept] for name, s in spans.items()}, copies, size)

    def _measure(self, number: int) -> tuple[int, Counter]:
        if not self.predicates.items and (complete := self._count_complete(self.indices[number])):
            return complete, Counter()
        index, spans = self._read(number)
        return len(index), self._judge_index(index, spans)[1]

    def _judge_index(self, index: ShardIndex, spans: dict[str, np.ndarray]) -> tuple[np.ndarray, Counter]:
        has = {"/".join(self.wanted[name]): span[:, 0] >= 0 for name, span in spans.items()}
        return self._judge(has, index.metadata, index.readable)

    def _count_complete(self, index: str | None) -> int | None:
        """The samples of a shard if the statistics in its index's footer say that none lacks a field, else None."""
        try:
            footer = pq.read_metadata(index) if index else None
        except (OSError, pa.ArrowException):
            return None
        if footer is None or not footer.num_rows:
            return None
        complete = (any(_minimum(footer, f"offset:{e}") >= 0 for e in names) for names in self.wanted.values())
        return footer.num_rows if all(complete) else None

    def _read(self, number: int) -> tuple[ShardIndex, dict[str, np.ndarray]]:
        """A shard's index, and the spans of each wanted field: int64 (n, 2), -1 where a sample has none."""
        if self.indices[number] is None:  # asked once a process: what was counted must stay
            self.indices[number] = self._make_index(self.addresses[number])
        index = read_index(self.indices[number], self.addresses[number], self.predicates.columns)
        spans = {}
        for name, extensions in self.wanted.items():
            spans[name] = np.full((len(index), 2), -1, np.int64)
            for found in (index.fields[e] for e in reversed(extensions) if e in index.fields):
                spans[name][found[:, 0] >= 0] = found[found[:, 0] >= 0]
        return index, spans

    def _make_index(self, address: str) -> Path:
        """The index of a shard that comes without one, made once and kept in the cache."""
        index = self.copies.folder / f"{_digest(address)}{INDEX}"
        with _alone(index):
            try:
                if not address.startswith("pipe:"):
                    describe_shard(address, index)
                elif not self._fits(index, address):
                    with self.copies.fetch(address) as file:
                        describe_shard(f"/proc/self/fd/{file.fileno()}", index)
            except (ShardError, storage.StorageError) as error:
                raise DataError(str(error) if address in str(error) else f"{address}: {error}") from None
        return index

    def _fits(self, index: Path, address: str) -> bool:
        """Whether there is an index, of a shard as large as its copy, if there is one: a command tells no version."""
        facts = read_facts(index) or {}
        size = self.copies.size(address)
        return facts.get("version") == INDEX_VERSION and size in (None, facts.get("bytes"))


def _minimum(footer: pq.FileMetaData, column: str) -> int:
    """The least value of a column of whole numbers by a parquet footer; -1 where it is not told."""
    names = footer.schema.names
    if column not in names:
        return -1
    parts = (footer.row_group(i).column(names.index(column)).statistics for i in range(footer.num_row_groups))
    return min((part.min if part is not None and part.has_min_max else -1 for part in parts), default=-1)


def _expand(path: str) -> list[str]:
    """The addresses of tars; those of this machine must be there."""
    try:
        addresses = storage.expand(path)
    except storage.StorageError as error:
        raise DataError(f"dataset.params.path: {error}") from None
    for address in addresses:
        if storage.is_local(address) and not os.path.isfile(address):
            raise ShardError(f"{address}: shard is missing; rebuild it, or correct the path")
    return addresses


# ---------------------------------------------------------------- tables of images
@dataclass(eq=False)
class TableShard(Sequence):
    """The kept rows of a part of a table: `columns` maps image and caption to Arrow arrays, `rows` are theirs in it."""

    name: str
    label: str  # the table's path below the folder that all of the dataset have in common
    folder: str  # where the table lies: its paths are relative to it
    first: int  # number of the part's first row in the file
    rows: np.ndarray
    columns: dict[str, pa.ChunkedArray]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return Sample(self, range(len(self))[row])

    def key(self, row: int) -> str:
        """The file's label and the row's number in it, from 0."""
        return f"{self.label}:{self.first + int(self.rows[row])}"

    def read(self, row: int, names: Iterable[str] = ()) -> dict[str, bytes]:
        """The bytes of these fields (by default of all); a path or an address of an image is followed."""
        return {
            name: self._bytes(name, self.columns[name][int(self.rows[row])].as_py()) for name in names or self.columns
        }

    def _bytes(self, name: str, value: Any) -> bytes:
        if isinstance(value, dict):  # {bytes, path}, as datasets on the hub have it
            value = value.get("bytes") or value.get("path") or b""
        if isinstance(value, bytes):
            return value
        if name != "image":
            return str(value).encode()
        address = value.removeprefix("file://")
        if storage.is_local(address) and storage.is_local(self.folder):
            address = os.path.join(self.folder, address)
        elif storage.is_local(address):
            address = f"{self.folder}/{address}"
        if address.startswith("pipe:"):
            raise storage.StorageError(
                f"{self.name}: {address}: a table's images are paths or s3://, http(s):// addresses"
            )
        return storage.read(address, MAX_BYTES)


class TableSource(Source):
    """Parquet, CSV, TSV or JSON lines with an image a row: its bytes, its path or its address; and a caption.

    A shard is a row group of parquet, or 10,000 rows of the others. What is needed of it is kept in `cache` as Arrow
    tables mapped into memory, so that rows can be read in any order; of parquet, those of two windows.
    `columns` maps our names (image, caption) to the table's; other columns serve the filters.
    """

    def __init__(
        self,
        path: str,
        wanted: Wanted,
        filters: Mapping[str, Any] | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        cache: str | None = None,
        window: int = 64,
    ):
        super().__init__(0, wanted, filters, cheap=True)
        self.copies, self.columns = Copies(path, cache, 2 * window), dict(columns or {})
        self.parts: list[tuple[str, int, int]] = []  # file, number of the part in it, its first row
        with _plainly():
            files = tables.find_files(path)
            self.common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
            for file in files:
                sizes, first = self._list_sizes(file), 0
                for part, size in enumerate(sizes):
                    self.parts.append((file, part, first))
                    first += size
        self.shards, self.counts = len(self.parts), np.full(len(self.parts), -1, np.int64)

    def load(self, number: int) -> TableShard:
        """The kept rows of a part."""
        file, part, first = self.parts[number]
        with _plainly():
            if _is_parquet(file):
                table = _map(self._copy_group(file, part)).read_all()
            else:
                table = pa.Table.from_batches([_map(self._copy_text(file)).get_batch(part)])
        names, _ = self._find_columns(file, table.schema.names)
        kept, _ = self._judge_rows(names, table, len(table))
        columns = {ours: table.column(theirs) for ours, theirs in names.items()}
        label = os.path.relpath(file, self.common)
        return TableShard(file, label, os.path.dirname(file), first, np.flatnonzero(kept), columns)

    def _measure(self, number: int) -> tuple[int, Counter]:
        file, part, _ = self.parts[number]
        with _plainly():
            if _is_parquet(file):  # what its footer tells is not read: images, above all
                parquet = _open_parquet(file)
                names, needed = self._find_columns(file, parquet.schema_arrow.names)
                paths = formats.full_columns(parquet.metadata.row_group(part))  # of a struct, one full field is enough
                full = {path.partition(".")[0] for path in paths} - set(self.predicates.columns)
                rows = parquet.metadata.row_group(part).num_rows
                table = parquet.read_row_group(part, [name for name in needed if name not in full], use_threads=False)
            else:
                table = pa.Table.from_batches([_map(self._copy_text(file)).get_batch(part)])
                names, rows = self._find_columns(file, table.schema.names)[0], len(table)
        return rows, self._judge_rows(names, table, rows)[1]

    def _judge_rows(self, names: dict[str, str], table: pa.Table, rows: int) -> tuple[np.ndarray, Counter]:
        """Which rows are kept. A column that the table lacks has no null."""
        has = {
            theirs: np.asarray(table.column(theirs).is_valid()) if theirs in table.column_names else np.ones(rows, bool)
            for theirs in names.values()
        }
        return self._judge(has, table, np.ones(rows, bool))

    def _list_sizes(self, file: str) -> list[int]:
        """The rows of each part of a file."""
        if not _is_parquet(file):
            reader = _map(self._copy_text(file))
            return [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        footer = _open_parquet(file).metadata
        return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]

    def _copy_group(self, file: str, part: int) -> BinaryIO:
        def write(path: Path) -> None:
            parquet = _open_parquet(file)
            _, needed = self._find_columns(file, parquet.schema_arrow.names)
            _write_arrow(path, parquet.read_row_group(part, needed, use_threads=False).to_batches(), file)

        return self.copies.open(f"{file} {part} {_version(file)} {self._needs()}", write)

    def _copy_text(self, file: str) -> BinaryIO:
        def write(path: Path) -> None:
            table = tables.Table(file, texts=[*self.columns.values(), *itertools.chain(*self.wanted.values())])
            _, needed = self._find_columns(file, table.schema.names)
            _write_arrow(path, _blocks(table.batches(needed)), file)

        return self.copies.open(f"{file} {_version(file)} {self._needs()}", write, keep=True)

    def _needs(self) -> str:
        return f"{self.wanted} {self.columns} {self.predicates.columns}"

    def _find_columns(self, file: str, present: list[str]) -> tuple[dict[str, str], list[str]]:
        """The table's names of image and caption, and all columns that are needed; DataError where one is missing."""
        names = {}
        for ours, alternatives in self.wanted.items():
            theirs = self.columns.get(ours)
            if theirs is not None and theirs not in present:
                raise DataError(f"dataset.params.columns.{ours}: {file}: no column {theirs}{_nearest(theirs, present)}")
            names[ours] = theirs or next((name for name in alternatives if name in present), None)
            if names[ours] is None:
                raise DataError(
                    f"{file}: none of the columns {', '.join(alternatives)}; name the {ours} in "
                    f"dataset.params.columns.{ours}; columns here: {', '.join(present)}"
                )
        for column in self.predicates.columns:
            if column not in present:
                raise DataError(
                    f"dataset.params.filters.{column}: {file}: no column {column}{_nearest(column, present)}"
                )
        return names, list(dict.fromkeys([*names.values(), *self.predicates.columns]))


def _is_parquet(file: str) -> bool:
    return file.lower().endswith(".parquet")


def _open_parquet(file: str) -> pq.ParquetFile:
    if storage.is_local(file):
        return pq.ParquetFile(file)
    filesystem, path = storage.find_filesystem(file)
    return pq.ParquetFile(filesystem.open(path))


def _blocks(batches: Iterator[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Record batches of BLOCK_ROWS rows, the last perhaps of fewer."""
    rest = None
    for table in batches:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while len(rest) >= BLOCK_ROWS:
            yield from rest.slice(0, BLOCK_ROWS).combine_chunks().to_batches()
            rest = rest.slice(BLOCK_ROWS)
    if rest is not None and len(rest):
        yield from rest.combine_chunks().to_batches()


def _write_arrow(path: Path, batches: Iterable[pa.RecordBatch], file: str) -> None:
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise tables.TableError(f"{file}: a header, but no rows; fill it, or leave it out")
    with pa.ipc.new_file(path, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _map(copy: BinaryIO) -> pa.RecordBatchFileReader:
    """The Arrow table in a file, mapped into memory: it stays when the file is closed and removed."""
    with copy:
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; columns here: {', '.join(known)}"


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Turn the errors of tables and places into DataError."""
    try:
        yield
    except (tables.TableError, pa.ArrowException, OSError) as error:
        raise DataError(f"dataset.params.path: {error}") from None


# ---------------------------------------------------------------- copies on this machine
class Copies:
    """Files made or fetched for one dataset, in a folder that the processes of a machine share.

    Of those that can be had again, the `number` that were used last stay; one that goes while it is open can be read
    on. `root` is by default the machine's temporary folder.
    """

    def __init__(self, dataset: str, root: str | None, number: int):
        self.number, self.root, self.name = number, root, _digest(dataset)

    @functools.cached_property
    def folder(self) -> Path:
        """Where they lie: a folder of this user's."""
        root = Path(self.root or tempfile.gettempdir())
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.root or root.stat().st_uid != os.getuid():  # such as /tmp
            root /= f"sdtrain-{os.getuid()}"
            root.mkdir(mode=0o700, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise DataError(f"{root}: belongs to another user; set dataset.params.cache to a folder of yours")
        return root / self.name

    def fetch(self, address: str) -> BinaryIO:
        """The open copy of a shard."""

        def write(path: Path) -> None:
            with open(path, "wb") as file:
                storage.copy(address, file)

        return self.open(address, write)

    def size(self, address: str) -> int | None:
        """The bytes of the copy of a shard, None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.getsize(self._place(address))
        return None

    def open(self, key: str, write: Callable[[Path], None], keep: bool = False) -> BinaryIO:
        """What `write` makes of a path, once for each key, open for reading; its file may go again unless `keep`."""
        target = self._place(key, keep)
        with contextlib.suppress(FileNotFoundError):
            return _reopen(target)
        with _alone(target):
            with contextlib.suppress(FileNotFoundError):  # who held it before us has made it
                return _reopen(target)
            aside = target.with_name(f"{target.name}.tmp")
            write(aside)
            file = open(aside, "rb")  # before others can see it, and drop it
            os.replace(aside, target)
        if not keep:
            self._drop_old()
        return file

    def _place(self, key: str, keep: bool = False) -> Path:
        return self.folder / ("kept" if keep else "passing") / _digest(key)

    def _drop_old(self) -> None:
        files = []
        for path in (self.folder / "passing").iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process drops too
                files += [] if path.suffix else [(path.stat().st_mtime_ns, path)]
        for _, path in sorted(files)[: -self.number]:
            path.unlink(missing_ok=True)


def _reopen(path: Path) -> BinaryIO:
    """Open a copy, which counts as its use."""
    os.utime(path)
    return open(path, "rb")


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the making of a file alone, among the processes and threads of this machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _version(file: str) -> str:
    """What tells one content of a file from the next."""
    if storage.is_local(file):
        found = os.stat(file)
        return f"{found.st_size} {found.st_mtime_ns}"
    filesystem, path = storage.find_filesystem(file)
    about = filesystem.info(path)
    return f"{about.get('size')} {about.get('ETag')}"
