"""Tar shards, written whole; an index of each, made without decoding; a manifest of all, checked before use."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sdtrain import storage
from sdtrain.config import code_digest, fingerprint, write_json
from sdtrain.predicates import add_yields

BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)
WINDOW = 8 * BLOCK  # bytes read at once: small members and the headers after them
INDEX = ".index.parquet"  # 00000.parquet is img2dataset's
INDEX_VERSION = 1
CHUNK = 1 << 20  # bytes summed at once: long enough that other threads' turns at the interpreter do not count
THREADS = min(8, len(os.sched_getaffinity(0)))


class ShardError(ValueError):
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
            self._tar = tarfile.open(self._aside(), "w", format=tarfile.USTAR_FORMAT)
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of shards alone. Raises ShardError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{folder}: another process still writes there; wait for it, or end it") from None
        yield


# ---------------------------------------------------------------- manifests
def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def write_manifest(
    path: str | Path, kind: str, shards: Iterable[str | Path], dropped: dict[str, int], made_by: dict, **more: Any
) -> dict:
    """Index `shards` (local paths or addresses), describe them in a manifest at `path` and return it.

    `kind` is "images" or "latents"; `dropped` counts lost samples by reason; `made_by` is what decides the content
    (its fingerprint names it); `more` stands in the manifest as it is. Names are relative to the manifest's folder.
    Indices that a run before this one has finished are used again.
    """
    folder = Path(path).parent
    places = []
    for shard in sorted(map(str, shards)):
        name = os.path.relpath(shard, folder) if storage.is_local(shard) else shard
        places.append((name, shard, _place_index(name, shard, folder, fingerprint(made_by))))
    facts = in_threads(lambda place: describe_shard(place[1], place[2]), places, "index")
    rows = [
        {"name": name, **fact, "index": os.path.relpath(index, folder), "index_sha256": sha256_file(index)}
        for (name, _, index), fact in zip(places, facts, strict=True)
    ]
    return write_rows(path, kind, rows, dropped, made_by, more)


def gather_manifests(paths: Sequence[str | Path], output: str | Path) -> dict:
    """One manifest at `output` of the shards of several, and return it. Raises ShardError unless all are of one kind.

    `made_by` has what the parts have in common; dropped samples and yields are added up.
    """
    parts = [read_manifest(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part["kind"] != parts[0]["kind"]:
            raise ShardError(
                f"{path}: holds {part['kind']}, but {paths[0]} {parts[0]['kind']}; gather one kind at a time"
            )
    rows = [
        {"part": os.path.relpath(path, Path(output).parent), **row}
        for path, part in zip(paths, parts, strict=True)
        for row in move_rows(part["shards"], Path(output).parent)
    ]
    dropped = sum((Counter(part["dropped"]) for part in parts), Counter())
    shared = {
        key: value for key, value in parts[0]["made_by"].items() if all(p["made_by"].get(key) == value for p in parts)
    }
    yields = None
    for part in parts:
        yields = add_yields(yields, part["yields"]) if part.get("yields") else yields
    if not any(part["samples"] for part in parts):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "nothing"
        raise ShardError(f"{output}: no sample in any of {len(parts)} parts; dropped: {reasons}; loosen the filters")
    return write_rows(output, parts[0]["kind"], rows, dict(dropped), shared, {"yields": yields} if yields else {})


def move_rows(rows: list[dict], folder: Path) -> list[dict]:
    """The rows of a manifest that was read, for a manifest in another folder."""
    moved = []
    for row in rows:
        names = {"name": row["path"], "index": row["index_path"]}
        names = {k: os.path.relpath(v, folder) if storage.is_local(v) else v for k, v in names.items() if v}
        moved.append({k: v for k, v in row.items() if k not in ("path", "index_path")} | names)
    return moved


def write_rows(path: str | Path, kind: str, rows: list[dict], dropped: dict, made_by: dict, more: dict) -> dict:
    """Write the manifest of shards that are described already: rows as `read_manifest` or `move_rows` gives them."""
    manifest = {
        "kind": kind,
        "fingerprint": fingerprint(made_by, [row["sha256"] for row in rows]),
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "dropped": dropped,
        "made_by": made_by,
        "code": code_digest(),
        **more,
        "shards": rows,
    }
    write_json(path, manifest)
    return manifest


def _place_index(name: str, shard: str, folder: Path, key: str) -> Path:
    """Beside a shard below the manifest's folder, for it is ours; else in a neighbour folder of the manifest."""
    if storage.is_local(shard) and not name.startswith(".."):
        return Path(shard.removesuffix(".tar") + INDEX)
    return folder / key / (hashlib.sha256(name.encode()).hexdigest()[:24] + INDEX)


def describe_shard(
    shard: str, index: Path, known: ShardIndex | None = None, sha256: str | None = None
) -> dict[str, Any]:
    """The facts of a shard (samples, bytes, sha256), from its finished index at `index`, which is made where needed.

    Whoever has just written the shard knows where its samples lie, `known`, and its sum: then it is not read for them.
    """
    source = _version(shard)
    facts = read_facts(index)
    if not facts or not _is_current(shard, index, facts, source):
        with storage.local(shard) as path:
            with contextlib.suppress(OSError):  # what is wrong with the file, `index_tar` says
                facts = {"bytes": os.path.getsize(path), "sha256": sha256 or sha256_file(path), "source": source}
            found = read_metadata(index_tar(path, shard) if known is None else known, path)
        facts["samples"] = len(found)
        write_index(index, found, facts)
    return {key: facts[key] for key in ("samples", "bytes", "sha256")}


def _is_current(shard: str, index: Path, facts: dict[str, Any], source: str | None) -> bool:
    """Whether an index is of the shard as it is now: a local one must not have been touched since."""
    if facts.get("version") != INDEX_VERSION or facts.get("source") != source or "sha256" not in facts:
        return False
    if not storage.is_local(shard):
        return True
    try:
        now = os.stat(shard)
    except OSError:
        return False
    touched = max(now.st_mtime_ns, now.st_ctime_ns)
    return now.st_size == facts["bytes"] and touched < os.stat(index).st_mtime_ns


def _version(shard: str) -> str | None:
    """What tells one content of an s3:// address from the next; None for other addresses."""
    if shard.startswith("s3://"):
        with contextlib.suppress(Exception):  # botocore's are many; the copy that follows says what is wrong
            filesystem, path = storage.find_filesystem(shard)
            return str(filesystem.info(path)["ETag"])
    return None


def in_threads(work: Callable, items: Sequence, label: str) -> list:
    """The results of `work` on each item, in order, by several threads, with progress; the first error ends all."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            return list(progress(pool.map(work, items), len(items), label))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def progress(items: Iterable, total: int, label: str) -> tqdm:
    """A progress bar over shards where it takes some time; in a log a line now and then."""
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(items, total=total, unit="shard", desc=label, mininterval=every, delay=2)


def read_manifest(path: str | Path, full: bool = False) -> dict:
    """Read a manifest; `shards[i]["path"]` is where shard i lies, and "index_path" its index (None: it has none).

    Local shards must be there with the right size; where `full`, all that `find_faults` looks at must be right.
    Raises ShardError naming the shard at fault.
    """
    manifest = _load_manifest(path)
    for row in manifest["shards"]:
        if fault := next(_shard_faults(row, path) if full else _size_faults(row, path), None):
            raise ShardError(fault)
    return manifest


def _load_manifest(path: str | Path) -> dict:
    try:
        manifest = json.loads(Path(path).read_text())
        rows = manifest["shards"]
        if any({"name", "bytes", "sha256", "samples"} - set(row) for row in rows):
            raise ValueError
    except FileNotFoundError:
        raise ShardError(f"{path}: no such manifest; make it with: snakemake {path}") from None
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{path}: not a shard manifest; delete it and make it again") from None
    folder = os.path.dirname(path)
    for row in rows:
        row["path"] = os.path.join(folder, row["name"]) if storage.is_local(row["name"]) else row["name"]
        row["index_path"] = os.path.join(folder, row["index"]) if row.get("index") else None
    return manifest


def find_shards(path: str, part: int = 0, parts: int = 1) -> dict:
    """A manifest (read), or one of as much as is known of the shards in brace notation: one part's run of its rows.

    Raises ShardError where a shard is named twice, StorageError where there is none.
    """
    if path.endswith(".json") and storage.is_local(path):
        manifest = read_manifest(path)
    else:
        manifest = {"kind": "images", "shards": [{"path": p, "index_path": None} for p in storage.expand(path)]}
    rows = manifest["shards"]
    twice = [name for name, count in Counter(row["path"] for row in rows).items() if count > 1]
    if twice:
        raise ShardError(f"{path}: names {twice[0]} more than once; its samples would count twice")
    return manifest | {"shards": rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]}


def read_part(part: str, parts: str) -> tuple[int, int]:
    """A command's part= and parts= as numbers. Raises ShardError unless 0 <= part < parts."""
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ShardError(f"part={part} parts={parts}: a part from 0 to parts - 1 is expected, such as part=0 parts=4")
    return int(part), int(parts)


# ---------------------------------------------------------------- checks
def find_faults(path: str | Path) -> list[str]:
    """Everything wrong with a manifest, its shards and their indices, each with the file and the remedy.

    Every byte is read: sha256, whole tars, counts of samples, indices, shards that no row lists.
    """
    try:
        manifest = _load_manifest(path)
    except ShardError as error:
        return [str(error)]
    rows = manifest["shards"]
    faults = []
    for key in ("samples", "bytes"):
        if manifest.get(key) != (total := sum(row[key] for row in rows)):
            faults.append(f"{path}: {key} is {manifest.get(key)}, but its shards have {total}; {_remedy({}, path)}")
    found = in_threads(lambda row: list(_shard_faults(row, path)), rows, "verify")
    return faults + list(itertools.chain.from_iterable(found)) + list(_foreign_shards(rows, path))


def _shard_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    sizes = list(_size_faults(row, manifest))
    yield from sizes or _content_faults(row, manifest)
    index, remedy = row["index_path"], _remedy(row, manifest, row["index_path"])
    if index and not os.path.isfile(index):
        yield f"{index}: index is missing, though {manifest} lists it; {_remedy(row, manifest)}"
    elif index and sha256_file(index) != row.get("index_sha256"):
        yield f"{index}: sha256 of the index differs from the one in {manifest}; {remedy}"


def _size_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    shard = row["path"]
    if not storage.is_local(shard):
        return
    if not os.path.isfile(shard):
        yield f"{shard}: shard is missing, though {manifest} lists it; {_remedy(row, manifest)}"
    elif (size := os.path.getsize(shard)) != row["bytes"]:
        yield f"{shard}: {size} bytes, {row['bytes']} expected by {manifest}; {_remedy(row, manifest, shard)}"


def _content_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    """The first of what is wrong inside a shard: the rest follows from it."""
    shard, remedy = row["path"], _remedy(row, manifest, row["path"])
    try:
        with storage.local(shard) as path:
            if sha256_file(path) != row["sha256"]:
                yield f"{shard}: sha256 differs from the one in {manifest}; {remedy}"
                return
            found = index_tar(path, shard)
        if len(found) != row["samples"]:
            yield f"{shard}: {len(found)} samples, {row['samples']} expected by {manifest}; {remedy}"
        elif row["index_path"] and os.path.isfile(row["index_path"]):
            with contextlib.suppress(ShardError):  # a damaged index is found by its own sum
                if read_index(row["index_path"], shard, ()) != found:
                    remedy = _remedy(row, manifest, row["index_path"])
                    yield f"{row['index_path']}: does not fit the samples of {shard}; {remedy}"
    except (ShardError, storage.StorageError) as error:
        yield str(error)


def _foreign_shards(rows: list[dict], manifest: str | Path) -> Iterator[str]:
    """Tars with samples that lie among shards of ours, which are those with their indices beside them."""
    ours = {os.path.dirname(row["path"]): row for row in rows if row["index_path"] and _is_beside(row)}
    listed = {os.path.abspath(row["path"]) for row in rows}
    for folder, row in ours.items():
        for tar in sorted(Path(folder).glob("*.tar")):
            with contextlib.suppress(ShardError):
                if os.path.abspath(tar) in listed or not index_tar(tar):
                    continue  # img2dataset leaves an empty tar where every download failed
            if os.path.abspath(tar) not in listed:
                yield f"{tar}: foreign shard, not listed in {manifest}; {_remedy(row, manifest, tar)}"


def _is_beside(row: dict) -> bool:
    return os.path.dirname(row["index_path"]) == os.path.dirname(row["path"])


def _remedy(row: dict, manifest: str | Path, file: str | Path | None = None) -> str:
    """How to get right again. What is not ours to delete, shards that were adopted, is to be restored."""
    part = os.path.normpath(os.path.join(os.path.dirname(manifest), row["part"])) if "part" in row else None
    command = f"snakemake --force {part} {manifest}" if part else f"snakemake --force {manifest}"
    if row and file == row["path"] and row["index_path"] and not _is_beside(row):
        return f"restore it from its source, or if it should be so, index it anew: {command}"
    return f"delete it, then rebuild it: {command}" if file else f"rebuild it: {command}"
