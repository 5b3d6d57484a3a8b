"""URL tables in and out, streamed: CSV, TSV, JSON lines or parquet, with their columns renamed to ours."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import csv

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json"}
BATCH_ROWS = 65536


class TableError(ValueError):
    """A table that cannot be read; the message names the file or column and the remedy."""


class Table:
    """A table on disk, in one file or many, seen under our column names and read in batches.

    `columns` maps our name to the file's; columns it does not name keep their own. Raises TableError for a path
    without tables, files of several formats, and columns that are missing.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, str] | None = None):
        self.path = str(path)
        self.files = find_files(path)
        suffixes = {Path(f).suffix.lower() for f in self.files}
        if len(suffixes) > 1:
            raise TableError(
                f"{path}: tables of several formats ({', '.join(sorted(suffixes))}); name one, as *.parquet"
            )
        form = FORMATS[suffixes.pop()]
        if form == "tsv":
            form = ds.CsvFileFormat(parse_options=csv.ParseOptions(delimiter="\t"))
        try:
            self._dataset = ds.dataset(self.files, format=form)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{path}: cannot read the table: {error}") from None
        self._theirs = self._rename(dict(columns or {}))
        fields = [self._dataset.schema.field(theirs).with_name(ours) for ours, theirs in self._theirs.items()]
        self.schema = pa.schema(fields)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order, at most 65,536 at a time; `columns` (our names) limits what is read."""
        names = list(self._theirs) if columns is None else columns
        self.require(names)
        chosen = {name: ds.field(self._theirs[name]) for name in names}
        try:
            for batch in self._dataset.to_batches(columns=chosen, batch_size=BATCH_ROWS, batch_readahead=4):
                yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{self.path}: cannot read the table: {error}") from None

    def require(self, names: list[str]) -> None:
        """Raise TableError, naming the nearest column, unless all these columns are here."""
        for name in names:
            if name not in self._theirs:
                raise TableError(f"{self.path}: no column {name}; {_nearest(name, list(self._theirs))}")

    def _rename(self, columns: dict[str, str]) -> dict[str, str]:
        """Our name -> the file's name, for every column: the named ones first."""
        present = self._dataset.schema.names
        for ours, theirs in columns.items():
            if theirs not in present:
                raise TableError(f"{self.path}: columns.{ours}: no column {theirs}; {_nearest(theirs, present)}")
        rest = {name: name for name in present if name not in columns.values()}
        twice = sorted(set(columns) & set(rest))
        if twice:
            raise TableError(f"{self.path}: columns.{twice[0]}: the table has a column of that name too; map that one")
        return {**columns, **rest}


def find_files(path: str | Path) -> list[str]:
    """The table files behind a file, a folder or a glob, sorted. Raises TableError where there is none."""
    path = str(path)
    known = ", ".join(FORMATS)
    if os.path.isfile(path):
        if Path(path).suffix.lower() not in FORMATS:
            raise TableError(f"{path}: unknown kind of table; known are {known}")
        return [path]
    pattern = f"{glob.escape(path)}/**" if os.path.isdir(path) else path
    found = sorted(
        f for f in glob.glob(pattern, recursive=True) if Path(f).suffix.lower() in FORMATS and os.path.isfile(f)
    )
    if not found:
        raise TableError(f"{path}: no table there; a file, folder or glob of {known} is expected")
    return found


class ParquetFile:
    """A parquet file written batch by batch, whole or not at all. Use as a context; `rows` counts."""

    def __init__(self, path: str | Path, schema: pa.Schema):
        self.path = Path(path)
        self.rows = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._writer = pq.ParquetWriter(self._aside, schema)

    def __enter__(self) -> ParquetFile:
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._writer.write_table(table.cast(self._writer.schema))
        self.rows += table.num_rows

    def __exit__(self, *error) -> None:
        self._writer.close()
        if error[0] is None:
            os.replace(self._aside, self.path)
        else:
            self._aside.unlink()


def _nearest(name: str, known: list[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), list(lower), 1)
    return f"did you mean {lower[near[0]]}?" if near else f"columns here: {', '.join(known)}"
