"""URL tables in and out, streamed: CSV, TSV, JSON lines or parquet, with their columns renamed to ours."""

from __future__ import annotations

import collections
import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv, fs, json

from sdtrain.errors import SDTrainError
from sdtrain.io import storage

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json"}
BATCH_ROWS = 65536
BLOCK = 8 << 20  # bytes of text read at a time; no row may be longer
TEXTS = ("url", "caption")  # our columns that are texts whatever they look like
PLAIN = (pa.int64(), pa.float64(), pa.bool_())  # what a column of CSV may hold, the first that fits all; else texts
NULLS = pa.array(csv.ConvertOptions().null_values)
PADDED = r"^\s*[+-]?0\d"  # 007 is a name, not a number: it would come back as 7
BOOLEANS = pa.array(["true", "True", "TRUE", "false", "False", "FALSE"])


class TableError(SDTrainError, ValueError):
    """A table that cannot be read; the message names the file or column and the remedy."""


class Table:
    """A table in one file or many, here or on S3, seen under our column names and read in batches.

    `path` is a file, a folder, a glob, brace notation, or a list of these. `columns` maps our name to the file's;
    columns it does not name keep their own. A column has one type in all files, the narrowest that fits every value;
    of CSV and TSV, url, caption and the file's columns in `texts` stay texts, as 1.50 is another caption than 1.5, and
    an empty cell is null.
    Raises TableError for a path without tables, files of several formats, and columns that are missing.
    """

    def __init__(
        self, path: str | Path | Sequence[str], columns: Mapping[str, str] | None = None, texts: Iterable[str] = ()
    ):
        columns = dict(columns or {})
        self.path = path if isinstance(path, str) else str(path) if isinstance(path, Path) else ", ".join(path)
        self.files = find_files(path)
        forms = {FORMATS[Path(file).suffix.lower()] for file in self.files}
        if len(forms) > 1:
            raise TableError(f"{self.path}: tables of several formats ({', '.join(sorted(forms))}); name one kind")
        self._reader = _READERS[forms.pop()](self.files, {columns.get(ours, ours) for ours in TEXTS} | set(texts))
        self._theirs = self._rename(columns)
        fields = [self._reader.schema.field(theirs).with_name(ours) for ours, theirs in self._theirs.items()]
        self.schema = pa.schema(fields)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order, at most 65,536 at a time; `columns` (our names) limits what is read."""
        for file in self.files:
            yield from self.batches_of(file, columns)

    def batches_of(self, file: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows of one of `files`."""
        names = list(self._theirs) if columns is None else columns
        self.require(names)
        with _readable(file):
            for table in self._reader.read(file, [self._theirs[name] for name in names]):
                for begin in range(0, table.num_rows, BATCH_ROWS):
                    yield table.slice(begin, BATCH_ROWS).rename_columns(names)

    def count(self) -> int | None:
        """The number of rows where the files tell it without being read (parquet), else None."""
        return self._reader.count()

    def is_full(self, name: str) -> bool:
        """Whether the files tell, without being read, that a column has no null (parquet's statistics)."""
        return self._reader.is_full(self._theirs[name])

    def require(self, names: list[str]) -> None:
        """Raise TableError, naming the nearest column, unless all these columns are here."""
        for name in names:
            if name not in self._theirs:
                raise TableError(f"{self.path}: no column {name}; {_nearest(name, list(self._theirs))}")

    def _rename(self, columns: dict[str, str]) -> dict[str, str]:
        """Our name -> the file's name, for every column: the named ones first."""
        schema = self._reader.schema
        for ours, theirs in columns.items():
            if theirs not in schema.names:
                hint = _nearest(theirs, schema.names)
                raise TableError(f"{self.path}: columns.{ours}: no column {theirs}; {hint}")
        rest = {name: name for name in schema.names if name not in columns.values()}
        twice = sorted(set(columns) & set(rest))
        if twice:
            raise TableError(f"{self.path}: columns.{twice[0]}: the table has a column of that name too; map that one")
        return {**columns, **rest}


def find_files(path: str | Path | Sequence[str]) -> list[str]:
    """The table files behind files, folders, globs, braces and s3:// addresses, in order. TableError for none."""
    known, found = ", ".join(FORMATS), []
    expected = f"a file, folder, glob or s3:// address of {known} is expected"
    for pattern in [str(path)] if isinstance(path, str | Path) else path:
        try:
            files = [file for address in storage.expand(pattern) for file in storage.walk(address)]
        except storage.StorageError as error:
            raise TableError(
                f"{pattern}: no table there ({str(error).removeprefix(f'{pattern}: ')}); {expected}"
            ) from None
        tables = [file for file in files if Path(file).suffix.lower() in FORMATS]
        if files == [pattern] and not tables:
            raise TableError(f"{pattern}: unknown kind of table; known are {known}")
        found += tables
    if not found:
        raise TableError(f"{path}: no table there; {expected}")
    return found


def _filesystem(files: list[str]) -> tuple[fs.FileSystem, list[str]]:
    """Arrow's file system for these files, and their paths there."""
    if all(storage.is_local(file) for file in files):
        return fs.LocalFileSystem(), files
    if len({file.partition("://")[0] for file in files}) > 1:
        raise TableError(f"{files[0]}, {files[-1]}: tables of several places; name one")
    filesystem = storage.find_filesystem(files[0])[0]
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), [file.partition("://")[2] for file in files]


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turn what reading a file raises into a TableError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        encoding = "; write it in UTF-8" if "UTF" in reason.upper() else ""
        raise TableError(f"{file}: cannot read the table: {reason}{encoding}") from None


# ---------------------------------------------------------------- formats: the types of columns, and how to read them
class _Reader:
    """The files of one format: `schema`, of all files together; `read`, the rows of one, in blocks."""

    def __init__(self, files: list[str], texts: set[str]):
        filesystem, places = _filesystem(files)
        self.texts = texts  # columns that are texts, where a format does not tell
        self.filesystem, self.places = filesystem, dict(zip(files, places, strict=True))
        self.schema = pa.schema([])
        for file in files:
            with _readable(file):
                self.learn(file)

    def learn(self, file: str) -> None:
        """Widen `schema` to the columns and values of a file."""
        raise NotImplementedError

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of a file, with these columns, in `schema`'s types."""
        raise NotImplementedError

    def count(self) -> int | None:
        """The rows of all files, where they need not be read for it."""
        return None

    def is_full(self, column: str) -> bool:
        """Whether it is known, without a look at the rows, that a column has no null."""
        return False

    def open(self, file: str) -> pa.NativeFile:
        """A file's bytes."""
        return self.filesystem.open_input_stream(self.places[file])

    def widen(self, found: pa.Schema) -> None:
        """Make `schema` hold another's columns too. Raises ArrowTypeError where their types have none in common."""
        self.schema = pa.unify_schemas([self.schema, found], promote_options="permissive")


class _Parquet(_Reader):
    def learn(self, file: str) -> None:
        found = pq.read_schema(self.places[file], filesystem=self.filesystem).remove_metadata()
        plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in found]
        self.widen(pa.schema(plain))

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        """A row group at a time, and the next one meanwhile: Arrow's own reading ahead takes up to a GiB."""
        wanted = pa.schema([self.schema.field(name) for name in columns])
        with pq.ParquetFile(self.places[file], filesystem=self.filesystem) as source, ThreadPoolExecutor(1) as thread:
            here = [name for name in columns if name in source.schema_arrow.names]
            ahead = collections.deque()
            for group in range(source.num_row_groups):
                ahead.append(thread.submit(source.read_row_group, group, here))
                if len(ahead) > 1:
                    yield _conform(ahead.popleft().result(), wanted)
            if ahead:
                yield _conform(ahead.popleft().result(), wanted)

    def count(self) -> int:
        return sum(pq.read_metadata(place, filesystem=self.filesystem).num_rows for place in self.places.values())

    def is_full(self, column: str) -> bool:
        for place in self.places.values():
            footer = pq.read_metadata(place, filesystem=self.filesystem)
            if not all(column in full_columns(footer.row_group(i)) for i in range(footer.num_row_groups)):
                return False
        return True


def full_columns(group: pq.RowGroupMetaData) -> set[str]:
    """The columns of a parquet row group that have no null, by its statistics; fields of structs by their paths."""
    columns = (group.column(i) for i in range(group.num_columns))
    told = ((column.path_in_schema, column.statistics) for column in columns)
    return {path for path, s in told if s is not None and s.has_null_count and not s.null_count}


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the schema's columns and types; a column that is not there is null."""
    there = set(table.column_names)
    columns = [table.column(f.name).cast(f.type) if f.name in there else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, schema=schema)


class _Json(_Reader):
    """Read once to learn the types, as Arrow alone would judge by the first block, then again for the rows."""

    def learn(self, file: str) -> None:
        with self.open(file) as stream:
            for block in _whole_lines(stream):
                found = json.read_json(pa.BufferReader(block), json.ReadOptions(block_size=len(block))).schema
                dates = [f.name for f in found if pa.types.is_timestamp(f.type)]  # they stay the texts that JSON has
                self.widen(pa.schema([f.with_type(pa.string()) if f.name in dates else f for f in found]))

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        wanted = pa.schema([self.schema.field(name) for name in columns])
        parse = json.ParseOptions(explicit_schema=wanted, unexpected_field_behavior="ignore")
        with self.open(file) as stream:
            for block in _whole_lines(stream):
                table = json.read_json(pa.BufferReader(block), json.ReadOptions(block_size=len(block)), parse)
                yield table.select(columns)


class _Csv(_Reader):
    """Read once to learn the types, as Arrow alone would judge by the first block, then again for the rows."""

    parse = csv.ParseOptions(newlines_in_values=True)

    def __init__(self, files: list[str], texts: set[str]):
        self.types: dict[str, list[pa.DataType] | None] = {}  # those that fit all values; None: no value yet
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
                self.types |= {name: _narrow(self.types[name], block.column(name)) for name in names}

    def read(self, file: str, columns: list[str]) -> Iterator[pa.Table]:
        types = {name: self.schema.field(name).type for name in columns}
        convert = csv.ConvertOptions(column_types=types, include_columns=columns, include_missing_columns=True)
        with self._open_csv(file, convert) as blocks:
            for block in blocks:
                yield pa.table([_empty_to_null(column) for column in block.columns], schema=block.schema)

    @contextlib.contextmanager
    def _open_csv(self, file: str, convert: csv.ConvertOptions) -> Iterator[csv.CSVStreamingReader]:
        read = csv.ReadOptions(block_size=BLOCK)
        with self.open(file) as stream, csv.open_csv(stream, read, self.parse, convert) as blocks:
            yield blocks


class _Tsv(_Csv):
    parse = csv.ParseOptions(newlines_in_values=True, delimiter="\t")


_READERS = {"parquet": _Parquet, "json": _Json, "csv": _Csv, "tsv": _Tsv}


def _narrow(types: list[pa.DataType] | None, texts: pa.Array) -> list[pa.DataType] | None:
    """Those of the types that fit these texts as well; a text that spells null fits all."""
    if types == []:
        return types
    values = texts.filter(pc.invert(pc.is_in(texts, NULLS)))
    if not len(values):
        return types
    return [kind for kind in (PLAIN if types is None else types) if _fits(values, kind)]


def _empty_to_null(column: pa.Array) -> pa.Array:
    """Null for each empty text, as Arrow gives for an empty cell in a column of numbers."""
    if not pa.types.is_string(column.type):
        return column
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _fits(texts: pa.Array, kind: pa.DataType) -> bool:
    if kind == pa.bool_():
        return pc.all(pc.is_in(texts, BOOLEANS)).as_py()
    if pc.any(pc.match_substring_regex(texts, PADDED)).as_py():
        return False
    try:
        pc.cast(pc.ascii_trim_whitespace(texts), kind)
    except pa.ArrowInvalid:
        return False
    return True


def _whole_lines(stream: pa.NativeFile) -> Iterator[bytes]:
    """The bytes of a text, in blocks that end with a line."""
    rest = b""
    while data := stream.read(BLOCK):
        head, newline, tail = (rest + data).rpartition(b"\n")
        rest = tail
        if head.strip():
            yield head + newline
    if rest.strip():
        yield rest


# ---------------------------------------------------------------- writing
class ParquetFile:
    """A parquet file written batch by batch, whole or not at all. Use as a context; `rows` counts.

    Its bytes depend on the rows alone, not on the batches they came in. A thread compresses while the next rows come.
    """

    def __init__(self, path: str | Path, schema: pa.Schema):
        self.path, self.schema, self.rows = Path(path), schema, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.path.with_name(f".{self.path.name}.tmp")  # one name: a killed process leaves no second file
        unlike = (*TEXTS, *(field.name for field in schema if pa.types.is_floating(field.type)))
        repeated = [name for name in schema.names if name not in unlike]  # a dictionary of the others wastes time
        self._writer = pq.ParquetWriter(self._aside, schema, use_dictionary=repeated)
        self._pending = schema.empty_table()
        self._thread, self._written = ThreadPoolExecutor(1), None

    def __enter__(self) -> ParquetFile:
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self.rows += table.num_rows
        self._pending = pa.concat_tables([self._pending, table.cast(self.schema)])
        while self._pending.num_rows >= BATCH_ROWS:
            self._write(self._pending.slice(0, BATCH_ROWS))
            self._pending = self._pending.slice(BATCH_ROWS)

    def _write(self, group: pa.Table) -> None:
        """Write one row group, when the one before it is written."""
        if self._written:
            self._written.result()
        self._written = self._thread.submit(self._writer.write_table, group)

    def __exit__(self, *error) -> None:
        try:
            with self._thread, self._writer:
                if error[0] is None:
                    self._write(self._pending)
                    self._written.result()
            if error[0] is None:
                os.replace(self._aside, self.path)
        finally:
            self._aside.unlink(missing_ok=True)


# ---------------------------------------------------------------- yields
def show(result: Mapping[str, Any]) -> str:
    """What a selection keeps, as a text table: `rows`, `predicates` (of Predicates.yields) and what else is known."""
    keys = ["null", "alone_kept", "alone_dropped", "kept", "dropped"]
    lines = [
        ["predicate", *(key.replace("_", " ") for key in keys)],
        ["(all rows)", "", "", "", f"{result['rows']:,}", ""],
    ]
    lines += [[f"{p['column']} {p['predicate']}", *(f"{p[key]:,}" for key in keys)] for p in result["predicates"]]
    width = max(len(line[0]) for line in lines)
    text = [line[0].ljust(width) + "".join(cell.rjust(15) for cell in line[1:]) for line in lines]
    return "\n".join([*text, *_remarks(result)])


def _remarks(result: Mapping[str, Any]) -> Iterable[str]:
    if without_url := result.get("without_url"):
        yield f"rows without a url dropped: {without_url:,}"
    if duplicates := result.get("duplicates"):
        yield f"duplicates of {duplicates['column']} dropped: {duplicates['dropped']:,}"
    if limit := result.get("rows_limit"):
        few = "" if result["kept"] >= limit else f"; only {result['kept']:,} are left, and all are kept"
        yield f"{limit:,} rows at random asked for{few}"
    yield f"kept {result['kept']:,}: train {result['train']:,}, held out {result['held_out']:,}"
    if sizes := result.get("bytes"):
        train, held_out = (show_bytes(sizes[side]) for side in ("train", "held_out"))
        yield f"expected download: train {train}, held out {held_out} (from {result['size_from']})"


def show_shards(result: Mapping[str, Any]) -> str:
    """What was kept of shards that exist, as text: a manifest's `yields` (None: no filter), `dropped` and `samples`."""
    lines = [] if result.get("yields") else ["no filter was applied"]
    for row in result.get("yields") or []:
        counts = f"{row['alone_kept']:,} alone, {row['kept']:,} after those before it; {row['null']:,} have no value"
        lines.append(f"{row['column']} {row['predicate']}: keeps {counts}")
    lines += [f"dropped, {reason}: {count:,}" for reason, count in result["dropped"].items() if count]
    return "\n".join([*lines, f"kept {result['samples']:,}"])


def show_bytes(size: float) -> str:
    """1234567 -> 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def _nearest(name: str, known: list[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), list(lower), 1)
    return f"did you mean {lower[near[0]]}?" if near else f"columns here: {', '.join(known)}"
