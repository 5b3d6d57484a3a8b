"""Tables with an image a row, or the path or address of one, as the source of a dataset."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data import formats, tables
from sdtrain.data.sources import Shard, Source, Wanted
from sdtrain.errors import DataError, did_you_mean
from sdtrain.io import storage
from sdtrain.io.cache import LocalCache

BLOCK_ROWS = 10_000  # rows of a CSV file that make a shard
MAX_BYTES = 100 << 20  # of an image file that a table points to


@dataclass(eq=False)
class TableShard(Shard):
    """The kept rows of a part of a table. `columns` maps image and caption to columns; `rows` are the kept ones."""

    name: str
    label: str  # the table's path below the folder that all tables of the dataset have in common
    folder: str  # of the table: relative paths of images start there
    first: int  # number of the part's first row in the file
    rows: np.ndarray
    columns: dict[str, pa.ChunkedArray]

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """Return the file's label and the number of the row in the file, from 0."""
        return f"{self.label}:{self.first + int(self.rows[row])}"

    def read(self, row: int, names: Sequence[str] = ()) -> dict[str, bytes]:
        """Return the bytes of these fields (by default of all); the path or address of an image is followed."""
        at = int(self.rows[row])
        return {name: self._bytes(name, self.columns[name][at].as_py()) for name in names or self.columns}

    def _bytes(self, name: str, value: Any) -> bytes:
        if isinstance(value, dict):  # {bytes, path}, as the datasets library stores images
            value = value.get("bytes") or value.get("path") or b""
        if isinstance(value, bytes):
            return value
        if name != "image":
            return str(value).encode()
        address = value.removeprefix("file://")
        if address.startswith("pipe:"):
            raise storage.StorageError(
                f"{self.name}: {address}: expected the path or the s3:// or http(s):// address of an image"
            )
        if storage.is_local(address):
            here = storage.is_local(self.folder)
            address = os.path.join(self.folder, address) if here else f"{self.folder}/{address}"
        return storage.read(address, MAX_BYTES)


class TableSource(Source):
    """Parquet, CSV, TSV or JSON lines files with an image a row (bytes, path or address) and a caption.

    A shard is a row group of Parquet, or 10,000 rows of the other formats. The needed columns are cached as Arrow files
    that are mapped into memory, so that rows are read in any order; of Parquet, those of the last two windows are kept.
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
        super().__init__(path, 0, wanted, filters, True, cache)
        self.window, self.columns = window, dict(columns or {})
        self.parts: list[tuple[str, int, int]] = []  # file, number of the part in it, its first row
        with _data_errors():
            files = tables.find_files(path)
            self.common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
            for file in files:
                first = 0
                for part, size in enumerate(self._list_sizes(file)):
                    self.parts.append((file, part, first))
                    first += size
        self.counts = np.full(len(self.parts), -1, np.int64)

    def load(self, number: int) -> TableShard:
        """Open a shard: return the rows of it that are kept."""
        file, part, first = self.parts[number]
        with _data_errors():
            table = self._read_part(file, part)
        names, _ = self._find_columns(file, table.schema.names)
        kept, _ = self._judge_rows(names, table, len(table))
        columns = {ours: table.column(theirs) for ours, theirs in names.items()}
        label = os.path.relpath(file, self.common)
        return TableShard(file, label, os.path.dirname(file), first, np.flatnonzero(kept), columns)

    def _measure(self, number: int) -> tuple[int, Counter[str]]:
        file, part, _ = self.parts[number]
        with _data_errors():
            if _is_parquet(file):  # columns without nulls, by the footer, are not read: images, above all
                parquet = _open_parquet(file)
                names, needed = self._find_columns(file, parquet.schema_arrow.names)
                group = parquet.metadata.row_group(part)
                full = {
                    path.partition(".")[0] for path in formats.full_columns(group)
                }  # of a struct, one field will do
                columns = [name for name in needed if name not in full - set(self.predicates.columns)]
                rows, table = group.num_rows, parquet.read_row_group(part, columns, use_threads=False)
            else:
                table = self._read_part(file, part)
                names, rows = self._find_columns(file, table.schema.names)[0], len(table)
        return rows, self._judge_rows(names, table, rows)[1]

    def _judge_rows(self, names: dict[str, str], table: pa.Table, rows: int) -> tuple[np.ndarray, Counter[str]]:
        """Return which rows are kept, and the number of the others by reason. An absent column has no nulls."""
        has = {
            theirs: np.asarray(table.column(theirs).is_valid()) if theirs in table.column_names else np.ones(rows, bool)
            for theirs in names.values()
        }
        return self._judge(has, table, np.ones(rows, bool))

    def _list_sizes(self, file: str) -> list[int]:
        """Return the number of rows of each part of a file."""
        if _is_parquet(file):
            footer = _open_parquet(file).metadata
            return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        reader = _map(self._convert_text(file))
        return [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]

    def _read_part(self, file: str, part: int) -> pa.Table:
        """Return the needed columns of a part of a file, mapped into memory."""
        if _is_parquet(file):
            return _map(self._convert_group(file, part)).read_all()
        return pa.Table.from_batches([_map(self._convert_text(file)).get_batch(part)])

    def _convert_group(self, file: str, part: int) -> BinaryIO:
        def write(path: Path) -> None:
            parquet = _open_parquet(file)
            _, needed = self._find_columns(file, parquet.schema_arrow.names)
            _write_arrow(path, parquet.read_row_group(part, needed, use_threads=False).to_batches(), file)

        groups = LocalCache(self.folder / "passing", 2 * self.window)
        return groups.open(f"{file} {part} {storage.version(file)} {self._needs()}", write)

    def _convert_text(self, file: str) -> BinaryIO:
        def write(path: Path) -> None:
            table = tables.Table(file, texts=[*self.columns.values(), *itertools.chain(*self.wanted.values())])
            _, needed = self._find_columns(file, table.schema.names)
            _write_arrow(path, _blocks(batch for _, batch in table.batches(needed)), file)

        return LocalCache(self.folder / "kept").open(f"{file} {storage.version(file)} {self._needs()}", write)

    def _needs(self) -> str:
        return f"{self.wanted} {self.columns} {self.predicates.columns}"

    def _find_columns(self, file: str, present: list[str]) -> tuple[dict[str, str], list[str]]:
        """Return our name -> the table's of image and caption, and all needed columns. Raise DataError if one lacks."""
        names = {}
        for ours, alternatives in self.wanted.items():
            theirs = self.columns.get(ours)
            if theirs is not None:
                _require_column(f"columns.{ours}", file, theirs, present)
            found = theirs or next((name for name in alternatives if name in present), None)
            if found is None:
                raise DataError(
                    f"{file}: none of the columns {', '.join(alternatives)}; name the {ours} in "
                    f"dataset.params.columns.{ours}; columns here: {', '.join(present)}"
                )
            names[ours] = found
        for column in self.predicates.columns:
            _require_column(f"filters.{column}", file, column, present)
        return names, list(dict.fromkeys([*names.values(), *self.predicates.columns]))


def _require_column(key: str, file: str, column: str, present: list[str]) -> None:
    if column not in present:
        raise DataError(f"dataset.params.{key}: {file}: no column {column}{did_you_mean(column, present)}")


def _is_parquet(file: str) -> bool:
    return file.lower().endswith(".parquet")


def _open_parquet(file: str) -> pq.ParquetFile:
    filesystem, (place,) = formats.find_filesystem([file])
    return pq.ParquetFile(place, filesystem=filesystem)


def _blocks(batches: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Yield record batches of BLOCK_ROWS rows; the last may have fewer."""
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
        raise formats.TableError(f"{file}: a header, but no rows; fill it, or leave it out")
    with pa.ipc.new_file(path, first.schema) as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)


def _map(file: BinaryIO) -> pa.RecordBatchFileReader:
    """Map an Arrow file into memory; the mapping stays when the file is closed and deleted."""
    with file:
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


@contextlib.contextmanager
def _data_errors() -> Iterator[None]:
    """Turn the errors of tables and storage into DataError."""
    try:
        yield
    except (formats.TableError, pa.ArrowException, OSError) as error:
        raise DataError(f"dataset.params.path: {error}") from None
