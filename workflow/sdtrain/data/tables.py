"""Tables of image URLs, read and written in batches, with columns renamed to those of this project."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sdtrain.data.formats import READERS, TableError, table_errors
from sdtrain.errors import did_you_mean
from sdtrain.io import storage
from sdtrain.io.files import atomic_path

BATCH_ROWS = 65536
TEXTS = ("url", "caption")  # columns that are read as strings even if all values are numbers


class Table:
    """A table in one or several files, local or on S3, read in batches under this project's column names.

    `path` is a file, a folder, a glob, brace notation, or a list of these. `columns` maps a name of ours to the name in
    the files; other columns keep their names. A column has one type in all files, the narrowest that fits every value.
    In CSV and TSV an empty cell is null, and url, caption and the columns in `texts` stay strings, since the caption
    1.50 is not 1.5. Raise TableError for a path without tables, files of several formats, and missing columns.
    """

    def __init__(
        self, path: str | Path | Sequence[str], columns: Mapping[str, str] | None = None, texts: Iterable[str] = ()
    ):
        columns = dict(columns or {})
        self.path = str(path) if isinstance(path, str | Path) else ", ".join(path)
        self.files = find_files(path)
        readers = {READERS[Path(file).suffix.lower()] for file in self.files}
        if len(readers) > 1:
            suffixes = ", ".join(sorted({Path(file).suffix for file in self.files}))
            raise TableError(f"{self.path}: tables of several formats ({suffixes}); name files of one format")
        self._reader = readers.pop()(self.files, {columns.get(ours, ours) for ours in TEXTS} | set(texts))
        self._theirs = self._rename(columns)
        fields = [self._reader.schema.field(theirs).with_name(ours) for ours, theirs in self._theirs.items()]
        self.schema = pa.schema(fields)

    def batches(self, columns: list[str] | None = None, label: str | None = None) -> Iterator[tuple[str, pa.Table]]:
        """Yield the rows in order, at most 65,536 at a time, each batch with the file that it comes from.

        `columns` (names of ours) limits what is read. With a `label`, show a progress bar if it takes long.
        """
        names = list(self._theirs) if columns is None else columns
        self.require(names)
        total, off = (None, True) if label is None else (self.count(), False)
        with tqdm(total=total, unit="row", unit_scale=True, desc=label, delay=5, mininterval=1, disable=off) as bar:
            for file in self.files:
                with table_errors(file):
                    for table in self._reader.read(file, [self._theirs[name] for name in names]):
                        for begin in range(0, table.num_rows, BATCH_ROWS):
                            batch = table.slice(begin, BATCH_ROWS).rename_columns(names)
                            yield file, batch
                            bar.update(batch.num_rows)

    def count(self) -> int | None:
        """Return the number of rows if the files tell it without being read (parquet), else None."""
        return self._reader.count()

    def is_full(self, name: str) -> bool:
        """Return whether the metadata of the files (parquet statistics) proves that a column has no null."""
        return self._reader.is_full(self._theirs[name])

    def require(self, names: Iterable[str]) -> None:
        """Raise TableError, with the nearest name, if one of these columns is missing."""
        for name in names:
            if name not in self._theirs:
                raise TableError(f"{self.path}: no column {name}{did_you_mean(name, self._theirs)}")

    def _rename(self, columns: dict[str, str]) -> dict[str, str]:
        """Return our name -> the file's name for every column: first those in `columns`, then the others."""
        known = self._reader.schema.names
        for ours, theirs in columns.items():
            if theirs not in known:
                raise TableError(f"{self.path}: columns.{ours}: no column {theirs}{did_you_mean(theirs, known)}")
        rest = {name: name for name in known if name not in columns.values()}
        twice = sorted(set(columns) & set(rest))
        if twice:
            raise TableError(f"{self.path}: columns.{twice[0]}: the table has a column of that name too; map that one")
        return {**columns, **rest}


def find_files(path: str | Path | Sequence[str]) -> list[str]:
    """Return the table files behind files, folders, globs, braces and s3:// addresses, in order.

    Raise TableError if there are none.
    """
    known, found = ", ".join(READERS), []
    expected = f"expected a file, folder, glob or s3:// address of {known}"
    for pattern in [str(path)] if isinstance(path, str | Path) else path:
        try:
            files = [file for address in storage.expand(pattern) for file in storage.walk(address)]
        except storage.StorageError as error:
            reason = str(error).removeprefix(f"{pattern}: ")
            raise TableError(f"{pattern}: no table there ({reason}); {expected}") from None
        tables = [file for file in files if Path(file).suffix.lower() in READERS]
        if files == [pattern] and not tables:
            raise TableError(f"{pattern}: unknown kind of table; known are {known}")
        found += tables
    if not found:
        raise TableError(f"{path}: no table there; {expected}")
    return found


class RowWriter:
    """Collect rows into row groups of a parquet file; `rows` counts them.

    The bytes depend on the rows only, not on the batches in which they come. A thread compresses one row group while
    the next one is collected.
    """

    def __init__(self, writer: pq.ParquetWriter, thread: ThreadPoolExecutor, schema: pa.Schema):
        self.schema, self.rows = schema, 0
        self._writer, self._thread = writer, thread
        self._pending = schema.empty_table()
        self._written: Future[None] | None = None

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self.rows += table.num_rows
        self._pending = pa.concat_tables([self._pending, table.cast(self.schema)])
        while self._pending.num_rows >= BATCH_ROWS:
            self._write_group(self._pending.slice(0, BATCH_ROWS))
            self._pending = self._pending.slice(BATCH_ROWS)

    def finish(self) -> None:
        """Write the rows that are left and wait until all are written."""
        self._write_group(self._pending)
        self._wait()

    def _write_group(self, group: pa.Table) -> None:
        self._wait()
        self._written = self._thread.submit(self._writer.write_table, group)

    def _wait(self) -> None:
        """Wait for the row group that is being written, and raise what went wrong."""
        if self._written:
            self._written.result()


@contextlib.contextmanager
def write_parquet(path: str | Path, schema: pa.Schema) -> Iterator[RowWriter]:
    """Yield a writer of rows to a parquet file, which appears at `path` on success only."""
    distinct = (*TEXTS, *(field.name for field in schema if pa.types.is_floating(field.type)))
    repeated = [name for name in schema.names if name not in distinct]  # a dictionary of distinct values is waste
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=repeated) as writer,
        ThreadPoolExecutor(1) as thread,
    ):
        rows = RowWriter(writer, thread, schema)
        yield rows
        rows.finish()
