"""Readers of table files, one class for each format: parquet, JSON lines, CSV and TSV."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv, fs, json

from sdtrain.errors import SDTrainError
from sdtrain.io import storage

BLOCK = 8 << 20  # bytes of text read at a time; no row may be longer
CSV_TYPES = (pa.int64(), pa.float64(), pa.bool_())  # a column takes the first that fits all its values, else string
NULLS = pa.array(csv.ConvertOptions().null_values)
BOOLEANS = pa.array(["true", "True", "TRUE", "false", "False", "FALSE"])
PADDED = r"^\s*[+-]?0\d"  # 007 is a name, not a number: it would be written back as 7


class TableError(SDTrainError, ValueError):
    """A table that cannot be read. The message names the file or column and the remedy."""


class Reader:
    """The files of one table, all in one format.

    `schema` has the columns of all files, each with the narrowest type that fits every value. `texts` names columns
    that are strings in formats that do not declare types.
    """

    def __init__(self, files: list[str], texts: set[str]):
        filesystem, places = find_filesystem(files)
        self.texts = texts
        self.filesystem, self.places = filesystem, dict(zip(files, places, strict=True))
        self.schema = pa.schema([])
        for file in files:
            with table_errors(file):
                self.learn(file)

    def learn(self, file: str) -> None:
        """Widen `schema` to the columns and values of a file."""
        raise NotImplementedError

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        """Yield the rows of a file in blocks, with these columns in the types of `schema`."""
        raise NotImplementedError

    def count(self) -> int | None:
        """Return the number of rows of all files, or None if the files would have to be read."""
        return None

    def is_full(self, column: str) -> bool:
        """Return whether the metadata of the files proves that a column has no null."""
        return False

    def open(self, file: str) -> pa.NativeFile:
        """Open a file for reading bytes."""
        return self.filesystem.open_input_stream(self.places[file])

    def widen(self, found: pa.Schema) -> None:
        """Extend `schema` by another one. Raise ArrowTypeError if a column's types have no common type."""
        self.schema = pa.unify_schemas([self.schema, found], promote_options="permissive")


class ParquetReader(Reader):
    """Parquet files: schema and counts come from the footers."""

    def learn(self, file: str) -> None:
        found = pq.read_schema(self.places[file], filesystem=self.filesystem).remove_metadata()
        plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in found]
        self.widen(pa.schema(plain))

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        """Yield one row group at a time, and read the next one meanwhile. Arrow's own read-ahead takes up to 1 GiB."""
        wanted = pa.schema([self.schema.field(name) for name in columns])
        with pq.ParquetFile(self.places[file], filesystem=self.filesystem) as source, ThreadPoolExecutor(1) as thread:
            present = [name for name in columns if name in source.schema_arrow.names]
            ahead: collections.deque[Future[pa.Table]] = collections.deque()
            for group in range(source.num_row_groups):
                ahead.append(thread.submit(source.read_row_group, group, present))
                if len(ahead) > 1:
                    yield conform(ahead.popleft().result(), wanted)
            if ahead:
                yield conform(ahead.popleft().result(), wanted)

    def count(self) -> int:
        return sum(footer.num_rows for footer in self._footers())

    def is_full(self, column: str) -> bool:
        groups = (footer.row_group(i) for footer in self._footers() for i in range(footer.num_row_groups))
        return all(column in full_columns(group) for group in groups)

    def _footers(self) -> Iterator[pq.FileMetaData]:
        for place in self.places.values():
            yield pq.read_metadata(place, filesystem=self.filesystem)


def full_columns(group: pq.RowGroupMetaData) -> set[str]:
    """Return the columns of a parquet row group that have no null by its statistics; fields of structs by path."""
    columns = [group.column(i) for i in range(group.num_columns)]
    return {c.path_in_schema for c in columns if (s := c.statistics) and s.has_null_count and not s.null_count}


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the schema's columns and types; a column that is absent is null."""
    present = set(table.column_names)
    columns = [table.column(f.name).cast(f.type) if f.name in present else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, schema=schema)


class JsonReader(Reader):
    """JSON lines, read twice: Arrow infers types from the first block only, so a first pass looks at every block."""

    def learn(self, file: str) -> None:
        with self.open(file) as stream:
            for block in whole_lines(stream):
                found = json.read_json(pa.BufferReader(block), json.ReadOptions(block_size=len(block))).schema
                dates = [f.name for f in found if pa.types.is_timestamp(f.type)]  # JSON has strings, no dates
                self.widen(pa.schema([f.with_type(pa.string()) if f.name in dates else f for f in found]))

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        wanted = pa.schema([self.schema.field(name) for name in columns])
        parse = json.ParseOptions(explicit_schema=wanted, unexpected_field_behavior="ignore")
        with self.open(file) as stream:
            for block in whole_lines(stream):
                table = json.read_json(pa.BufferReader(block), json.ReadOptions(block_size=len(block)), parse)
                yield table.select(columns)


class CsvReader(Reader):
    """CSV files, read twice: Arrow infers types from the first block only, so a first pass looks at every block."""

    parse = csv.ParseOptions(newlines_in_values=True)

    def __init__(self, files: list[str], texts: set[str]):
        self.types: dict[str, list[pa.DataType] | None] = {}  # types that fit all values; None: no value seen yet
        super().__init__(files, texts)
        kinds = {name: pa.null() if fit is None else (*fit, pa.string())[0] for name, fit in self.types.items()}
        self.schema = pa.schema(list(kinds.items()))

    def learn(self, file: str) -> None:
        with self._open_csv(file, csv.ConvertOptions()) as blocks:
            names = blocks.schema.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise TableError(f"{file}: two columns are called {twice[0]!r}; rename one")
        self.types |= {name: self.types.get(name, [] if name in self.texts else None) for name in names}
        with self._open_csv(file, csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))) as blocks:
            for block in blocks:
                self.types |= {name: narrow(self.types[name], block.column(name)) for name in names}

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        types = {name: self.schema.field(name).type for name in columns}
        convert = csv.ConvertOptions(column_types=types, include_columns=columns, include_missing_columns=True)
        with self._open_csv(file, convert) as blocks:
            for block in blocks:
                yield pa.table([empty_to_null(column) for column in block.columns], schema=block.schema)

    @contextlib.contextmanager
    def _open_csv(self, file: str, convert: csv.ConvertOptions) -> Iterator[csv.CSVStreamingReader]:
        read = csv.ReadOptions(block_size=BLOCK)
        with self.open(file) as stream, csv.open_csv(stream, read, self.parse, convert) as blocks:
            yield blocks


class TsvReader(CsvReader):
    """TSV files."""

    parse = csv.ParseOptions(newlines_in_values=True, delimiter="\t")


def narrow(types: list[pa.DataType] | None, texts: pa.Array) -> list[pa.DataType] | None:
    """Return those of the types that fit these texts too; a text that means null fits all."""
    if types == []:
        return types
    values = texts.filter(pc.invert(pc.is_in(texts, NULLS)))
    if not len(values):
        return types
    return [kind for kind in (CSV_TYPES if types is None else types) if fits(values, kind)]


def fits(texts: pa.Array, kind: pa.DataType) -> bool:
    """Return whether all texts are values of a type."""
    if kind == pa.bool_():
        return pc.all(pc.is_in(texts, BOOLEANS)).as_py()
    if pc.any(pc.match_substring_regex(texts, PADDED)).as_py():
        return False
    try:
        pc.cast(pc.ascii_trim_whitespace(texts), kind)
    except pa.ArrowInvalid:
        return False
    return True


def empty_to_null(column: pa.Array) -> pa.Array:
    """Return null for each empty text, as Arrow does for an empty cell in a column of numbers."""
    if not pa.types.is_string(column.type):
        return column
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def whole_lines(stream: pa.NativeFile) -> Iterator[bytes]:
    """Yield the bytes of a text in blocks that end with a line."""
    rest = b""
    while data := stream.read(BLOCK):
        head, newline, rest = (rest + data).rpartition(b"\n")
        if head.strip():
            yield head + newline
    if rest.strip():
        yield rest


def find_filesystem(files: list[str]) -> tuple[fs.FileSystem, list[str]]:
    """Return Arrow's file system for these files, and their paths in it."""
    if all(storage.is_local(file) for file in files):
        return fs.LocalFileSystem(), files
    if len({file.partition("://")[0] for file in files}) > 1:
        raise TableError(f"{files[0]}, {files[-1]}: tables must be on one file system; copy them to one")
    filesystem = storage.find_filesystem(files[0])[0]
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), [file.partition("://")[2] for file in files]


@contextlib.contextmanager
def table_errors(file: str) -> Iterator[None]:
    """Raise what goes wrong while a file is read as a TableError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        encoding = "; write it in UTF-8" if "UTF" in reason.upper() else ""
        raise TableError(f"{file}: cannot read the table: {reason}{encoding}") from None


READERS: dict[str, type[Reader]] = {  # the formats of tables, by the end of a file's name
    ".parquet": ParquetReader,
    ".csv": CsvReader,
    ".tsv": TsvReader,
    ".jsonl": JsonReader,
    ".ndjson": JsonReader,
}
