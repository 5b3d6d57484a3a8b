"""One tar shard: its samples, found without decoding, and a writer of shards."""

from __future__ import annotations

import contextlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sdtrain.errors import DataError
from sdtrain.io import storage
from sdtrain.io.files import atomic_path

BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)
WINDOW = 8 * BLOCK  # bytes read at once: small members and the headers after them


# ---------------------------------------------------------------- samples and their index
@dataclass(frozen=True)
class Sample:
    """Where the fields of one sample lie: `fields` maps an extension to (offset, bytes) in the tar at `shard`."""

    shard: str
    key: str
    fields: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        """Return the bytes of one field."""
        return storage.read_range(self.shard, *self.fields[extension])


@dataclass(eq=False)
class ShardIndex(Sequence):
    """The n samples of one tar, in columns: about 1 MB for 10,000 samples. As a sequence it gives `Sample`s.

    keys: text (n,). begin, end: int64 (n,), the byte range of a sample's members with headers and padding.
    fields: extension -> int64 (n, 2) of offset and size, -1 where a sample has no such field.
    metadata: a column for each key of the samples' JSON, null where absent: boolean, int64, double or string where
    all values are of that type, else JSON texts, in a field with metadata {b"json": b"1"}.
    readable: bool (n,), whether a sample has a JSON object.
    Both are empty until `read_metadata` fills them.
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

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return self.take(np.arange(len(self))[item])
        spans = {extension: tuple(values[item].tolist()) for extension, values in self.fields.items()}
        return Sample(self.shard, str(self.keys[item]), {e: span for e, span in spans.items() if span[0] >= 0})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, rows: np.ndarray) -> ShardIndex:
        """Return the index of some rows: their numbers, or a bool for each row."""
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


# ---------------------------------------------------------------- tar -> index
Member = tuple[str, int, int, int]  # name, begin of its headers, offset and size of its data


def index_tar(path: str | Path, shard: str | None = None) -> ShardIndex:
    """Return the samples of a local tar in order, without metadata, with `shard` (default: the path) as their address.

    Consecutive members with the same name before the first dot are a sample (the WebDataset format). Bytes of a name
    that are not UTF-8 are read as \\xff. Raise DataError for a file that is missing, truncated or no tar.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            members = _scan(file.fileno(), size)
        if members is None:
            members = list(_scan_with_tarfile(path, size))
    except FileNotFoundError:
        raise DataError(f"{path}: shard is missing; rebuild it, or correct the path") from None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole tar ({error}); delete it and rebuild the shards") from None
    return _group(str(path) if shard is None else shard, members)


def _scan(descriptor: int, end: int) -> list[Member] | None:
    """Return the files of a tar of plain headers, many times as fast as tarfile; None if anything is unusual.

    Usual are files, folders, and extended headers that change no name and no size (most hold a fraction of a time).
    """
    members: list[Member] = []
    at, begin, window, start = 0, None, b"", 0
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
            text = (folder + b"/" + name if folder else name).decode("utf-8", "backslashreplace")
            members.append((text, at if begin is None else begin, data, size))
            begin = None
        else:
            return None
        at = following


def _read_header(header: bytes) -> int | None:
    """Return the size in a tar header, in plain octal; None if it is written otherwise or the checksum is wrong."""
    try:
        size, checksum = int(header[124:136].rstrip(b"\0"), 8), int(header[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    # the lower half of adler32 is 1 + the sum of all bytes; a tar's checksum counts its own 8 bytes as spaces
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    return size if len(header) == BLOCK and size >= 0 and (total - checksum) % 65521 == 0 else None


def _changes_member(extended: bytes) -> bool:
    return any(word in extended for word in (b"path=", b"size=", b"GNU.", b"charset="))


def _scan_with_tarfile(path: str | Path, end: int) -> Iterator[Member]:
    """Yield the files of any tar. Raise tarfile.TarError if it is not whole."""
    with tarfile.open(path, "r:", errors="backslashreplace") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is sparse")
            if member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            yield member.name, member.offset, member.offset_data, member.size
        # tarfile takes a cut between two members, or a damaged header, for the end: require the end mark
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(BLOCK) != END:
            raise tarfile.ReadError(f"no end-of-archive mark after {tar.offset} bytes")


def _group(shard: str, members: Iterable[Member]) -> ShardIndex:
    keys: list[str] = []
    begins: list[int] = []
    ends: list[int] = []
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
    texts = np.array(keys, np.dtypes.StringDType())
    return ShardIndex(shard, texts, np.array(begins, np.int64), np.array(ends, np.int64), fields)


# ---------------------------------------------------------------- writing
@contextlib.contextmanager
def write_tar(path: Path) -> Iterator[Callable[[str, dict[str, bytes]], None]]:
    """Write a tar atomically: yield a function that appends the fields of a sample to it.

    The same samples give the same bytes: headers name no time and no user.
    """
    from webdataset import TarWriter  # here, as it imports torch where it can: readers need neither

    headers: dict[str, Any] = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "PAX_FORMAT"}
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, encoder=False, **headers) as tar,
    ):

        def add(key: str, fields: dict[str, bytes]) -> None:
            for extension, data in fields.items():  # one by one: TarWriter would sort them by extension
                tar.write({"__key__": key, extension: data})

        yield add
