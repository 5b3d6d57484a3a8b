"""One tar shard: its samples, an index of them made without decoding, and a writer of equal shards."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.errors import SDTrainError
from sdtrain.io import storage

BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)
WINDOW = 8 * BLOCK  # bytes read at once: small members and the headers after them
INDEX = ".index.parquet"  # 00000.parquet is img2dataset's
INDEX_VERSION = 1


class ShardError(SDTrainError, ValueError):
    """Shards or a manifest that cannot be used; the message names the file and the remedy."""


# ---------------------------------------------------------------- samples and their index
@dataclass(frozen=True)
class Sample:
    """Where one sample's fields lie: `fields` maps an extension to (offset, bytes) in the tar at `shard`."""

    shard: str
    key: str
    fields: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        """The bytes of one field."""
        return storage.read_range(self.shard, *self.fields[extension])


@dataclass(eq=False)
class ShardIndex(Sequence):
    """The n samples of one tar, in columns: about 1 MB for 10,000. As a sequence it gives `Sample`s.

    keys: text (n,). begin, end: int64 (n,), the bytes of the sample's members with headers and padding.
    fields: extension -> int64 (n, 2) of offset and size, -1 where a sample has no such field.
    metadata: a column for each key of the samples' JSON, null where absent: boolean, int64, double or string where
    all values are, else JSON text, in a field with metadata {b"json": b"1"}; None until it is read.
    readable: bool (n,), whether a sample has a JSON object.
    """

    shard: str
    keys: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    fields: dict[str, np.ndarray]
    metadata: pa.Table | None = None
    readable: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int | slice) -> Sample | ShardIndex:
        if isinstance(item, slice):
            return self.take(np.arange(len(self))[item])
        spans = {extension: tuple(values[item].tolist()) for extension, values in self.fields.items()}
        return Sample(self.shard, str(self.keys[item]), {e: span for e, span in spans.items() if span[0] >= 0})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, rows: np.ndarray) -> ShardIndex:
        """The index of some rows: their numbers, or a bool for each row."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return ShardIndex(
            self.shard,
            self.keys[rows],
            self.begin[rows],
            self.end[rows],
            {extension: values[rows] for extension, values in self.fields.items()},
            None if self.metadata is None else self.metadata.take(pa.array(rows)),
            None if self.readable is None else self.readable[rows],
        )

    def select(self, columns: Iterable[str]) -> pa.Table:
        """These columns of the metadata; a key that no sample has gives nulls."""
        pairs = []
        for name in columns:
            known = self.metadata.column_names.count(name)
            field = self.metadata.schema.field(name) if known else pa.field(name, pa.null())
            pairs.append((field, self.metadata[name] if known else pa.nulls(len(self))))
        return pa.Table.from_arrays([c for _, c in pairs], schema=pa.schema([f for f, _ in pairs]))


# ---------------------------------------------------------------- tar -> index
Member = tuple[str, int, int, int]  # name, begin of its headers, offset and size of its data


def index_tar(path: str | Path, shard: str | None = None) -> ShardIndex:
    """The samples of a local tar in order, without metadata; `shard` is the address they give, by default the path.

    Consecutive members with one name before the first dot are a sample (the WebDataset format). Bytes of a name that
    are no UTF-8 read as \\xff. Raises ShardError for a missing, truncated or foreign file.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            members = _scan(file.fileno(), size)
        if members is None:
            members = list(_scan_with_tarfile(path, size))
    except FileNotFoundError:
        raise ShardError(f"{path}: shard is missing; rebuild it, or correct the path") from None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ShardError(f"{path}: not a whole tar ({error}); delete it and rebuild the shards") from None
    return _group(str(path) if shard is None else shard, members)


def _scan(descriptor: int, end: int) -> list[Member] | None:
    """The files of a tar of plain headers, many times as fast as tarfile; None where anything is out of the ordinary.

    Ordinary are files, folders, and extended headers that change no name and no size (most give a time's fraction).
    """
    members, at, begin, window, start = [], 0, None, b"", 0
    while True:
        if at + BLOCK > start + len(window):
            window, start = os.pread(descriptor, WINDOW, at), at
        header = window[at - start : at - start + BLOCK]
        if header == END:
            return members if begin is None else None
        size, kind, data = _read_header(header), header[156:157], at + BLOCK
        if size is None or data + size > end:
            return None
        following = data + -(-size // BLOCK) * BLOCK
        if kind == b"x" and not _changes_member(os.pread(descriptor, size, data)):
            begin = at if begin is None else begin
        elif kind == b"5" and not size:
            begin = None
        elif kind in b"0\0":
            name, folder = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
            if kind == b"\0" and name.endswith(b"/"):  # a folder, in old tars
                return None
            name = (folder + b"/" + name if folder else name).decode("utf-8", "backslashreplace")
            members.append((name, at if begin is None else begin, data, size))
            begin = None
        else:
            return None
        at = following


def _read_header(header: bytes) -> int | None:
    """The size that a tar header gives, in plain octal; None where it does not, or where the checksum is wrong."""
    try:
        size, checksum = int(header[124:136].rstrip(b"\0"), 8), int(header[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    # the lower half of adler32 is 1 + the sum of all bytes; a tar's checksum takes its own 8 bytes for spaces
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    return size if len(header) == BLOCK and size >= 0 and (total - checksum) % 65521 == 0 else None


def _changes_member(extended: bytes) -> bool:
    return any(word in extended for word in (b"path=", b"size=", b"GNU.", b"charset="))


def _scan_with_tarfile(path: str | Path, end: int) -> Iterator[Member]:
    """The files of any tar. Raises tarfile.TarError where it is not whole."""
    with tarfile.open(path, "r:", errors="backslashreplace") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is sparse")
            if member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            yield member.name, member.offset, member.offset_data, member.size
        # tarfile takes a cut between two members, or a damaged header, for the end: the end mark must be there
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(BLOCK) != END:
            raise tarfile.ReadError(f"no end-of-archive mark after {tar.offset} bytes")


def _group(shard: str, members: Iterable[Member]) -> ShardIndex:
    keys, begins, ends = [], [], []
    spans: dict[str, list[tuple[int, int, int]]] = {}  # extension -> (sample, offset, size)
    for name, begin, offset, size in members:
        folder, slash, name = name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem:  # hidden: macOS puts a ._000.jpg before each 000.jpg
            continue
        key = folder + slash + stem if folder else stem
        if not keys or keys[-1] != key:
            keys.append(key)
            begins.append(begin)
            ends.append(0)
        ends[-1] = offset + -(-size // BLOCK) * BLOCK
        spans.setdefault(extension.lower(), []).append((len(keys) - 1, offset, size))
    fields = {}
    for extension in sorted(spans):
        rows = np.array(spans[extension], np.int64)
        fields[extension] = np.full((len(keys), 2), -1, np.int64)
        fields[extension][rows[:, 0]] = rows[:, 1:]
    return ShardIndex(
        shard, np.array(keys, np.dtypes.StringDType()), np.array(begins, np.int64), np.array(ends, np.int64), fields
    )


def join_indices(shard: str, parts: Sequence[ShardIndex]) -> ShardIndex:
    """The index, without metadata, of a tar that holds the samples of others, and nothing else, one after the other."""
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


# ---------------------------------------------------------------- metadata: the samples' JSON in columns
def read_metadata(index: ShardIndex, path: str | Path, columns: Iterable[str] | None = None) -> ShardIndex:
    """Fill `metadata` and `readable` from the JSON fields in the local tar at `path`; returns the index.

    `columns` names the keys wanted, by default all; one that no sample has gives a column of nulls. A key that is no
    proper text (half of a surrogate pair) is left out: no filter can name it.
    """
    documents: list[dict | None] = [None] * len(index)
    with open(path, "rb", buffering=0) as file:
        for row, (offset, size) in enumerate(index.fields.get("json", np.empty((0, 2), int)).tolist()):
            if offset >= 0:
                documents[row] = _parse_json(os.pread(file.fileno(), size, offset))
    found = [document for document in documents if document is not None]
    if columns is None:
        columns = filter(_is_text, dict.fromkeys(itertools.chain.from_iterable(found)))
    names = list(columns)
    arrays = [_to_column(name, [None if d is None else d.get(name) for d in documents]) for name in names]
    index.metadata = pa.Table.from_arrays([a for _, a in arrays], schema=pa.schema([f for f, _ in arrays]))
    index.readable = np.array([document is not None for document in documents], bool)
    return index


def from_json_column(column: pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """The values of a metadata column, as they stand in the samples' JSON."""
    values = column.to_pylist()
    if (field.metadata or {}).get(b"json") != b"1":
        return values
    return [None if value is None else json.loads(value) for value in values]


def _parse_json(data: bytes) -> dict | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _to_column(name: str, values: list[Any]) -> tuple[pa.Field, pa.Array]:
    """Typed where all values agree, to the last digit; else the values' JSON texts."""
    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    kinds = set(map(type, values)) - {type(None)}
    with contextlib.suppress(KeyError, OverflowError, UnicodeEncodeError, pa.ArrowException):
        if len(kinds) < 2:
            kind = types[kinds.pop()] if kinds else pa.null()
            return pa.field(name, kind), pa.array(values, kind)
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.field(name, pa.string(), metadata={"json": "1"}), pa.array(texts, pa.string())


# ---------------------------------------------------------------- index <-> parquet beside the shard
def write_index(path: str | Path, index: ShardIndex, facts: dict[str, Any] | None = None) -> None:
    """Write an index with its metadata as parquet, whole or not at all; the same index gives the same bytes.

    Columns: key, begin, end, readable; offset:EXTENSION and size:EXTENSION; json:KEY of the samples' JSON.
    """
    columns = [
        (pa.field("key", pa.string()), pa.array(index.keys.tolist(), pa.string())),
        (pa.field("begin", pa.int64()), pa.array(index.begin)),
        (pa.field("end", pa.int64()), pa.array(index.end)),
        (pa.field("readable", pa.bool_()), pa.array(index.readable)),
    ]
    for extension, spans in index.fields.items():
        for name, values in zip(("offset", "size"), spans.T, strict=True):
            columns.append((pa.field(f"{name}:{extension}", pa.int64()), pa.array(np.ascontiguousarray(values))))
    for field, column in zip(index.metadata.schema, index.metadata.columns, strict=True):
        columns.append((field.with_name(f"json:{field.name}"), column))
    about = {"version": INDEX_VERSION, "samples": len(index)} | (facts or {})
    schema = pa.schema([field for field, _ in columns], {"sdtrain": json.dumps(about, sort_keys=True)})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_arrays([c for _, c in columns], schema=schema), aside, compression="zstd")
    os.replace(aside, path)


def read_index(path: str | Path, shard: str, columns: Iterable[str] | None = None) -> ShardIndex:
    """The index at `path` of the tar at `shard`, with all of its metadata or only the keys in `columns`.

    A key that no sample has gives a column of nulls. Raises ShardError for an index that is missing or damaged.
    """
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        own = [name for name in names if not name.startswith("json:")]
        wanted = [name[5:] for name in names if name.startswith("json:")] if columns is None else list(columns)
        present = [f"json:{key}" for key in wanted if f"json:{key}" in names]
        table = file.read([*own, *present], use_threads=False).combine_chunks()
        keys = np.array(table["key"].to_pylist(), np.dtypes.StringDType())
        begin, end, readable = (table[name].to_numpy() for name in ("begin", "end", "readable"))
        extensions = [name[7:] for name in own if name.startswith("offset:")]
        fields = {e: np.stack([table[f"{part}:{e}"].to_numpy() for part in ("offset", "size")], 1) for e in extensions}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ShardError(
            f"{path}: no readable index of {shard} ({error}); delete it and index the shards anew"
        ) from None
    stored = table.select(present).rename_columns([name[5:] for name in present])
    index = ShardIndex(shard, keys, begin, end, fields, stored, readable)
    index.metadata = index.select(wanted)
    return index


def read_facts(path: str | Path) -> dict[str, Any] | None:
    """What a readable index says of its shard (version, samples, bytes, sha256, source), else None."""
    try:
        return json.loads(pq.read_schema(path).metadata[b"sdtrain"])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return None


# ---------------------------------------------------------------- writing
class ShardWriter:
    """Write samples to numbered tars of equal length; the same samples give the same bytes. Use as a context."""

    def __init__(self, folder: str | Path, samples_per_shard: int):
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []
        self._tar: tarfile.TarFile | None = None
        self._count = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._aside().unlink()

    def add(self, key: str, fields: dict[str, bytes]) -> None:
        """Append one sample; a full shard is closed and renamed to its final name."""
        if self._tar is None:
            self._tar = tarfile.open(self._aside(), "w", format=tarfile.PAX_FORMAT)
        for extension, data in fields.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self._count += 1
        if self._count == self.samples_per_shard:
            self._finish()

    def _aside(self) -> Path:
        return self.folder / f".{len(self.paths):05d}.tar.tmp"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self.folder / f"{len(self.paths):05d}.tar"
        os.replace(self._aside(), path)
        self.paths.append(path)
        self._tar, self._count = None, 0
