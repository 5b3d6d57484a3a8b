"""Local paths, s3:// and http(s):// addresses and pipe: commands under one roof: list, copy, read whole or a range.

Credentials and endpoints of S3 come from the environment (AWS_*, or FSSPEC_S3_ANON=true for public buckets).
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from sdtrain.errors import SDTrainError

TIMEOUT = 30  # seconds without an answer
S3 = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 4, "mode": "standard"}}
BLOCK = 1 << 20  # bytes


class StorageError(SDTrainError, OSError):
    """A place that cannot be read; the message names it, what it answered and the remedy."""


def is_local(address: str) -> bool:
    """Whether an address is a path of this machine."""
    return not (address.startswith("pipe:") or "://" in address)


def expand(address: str | Path) -> list[str]:
    """The addresses behind brace notation, then globs (of paths and s3://), in order; a pipe: command has no globs.

    Raises StorageError for unbalanced braces and for a glob that finds nothing.
    """
    try:
        expanded = list(braceexpand(str(address)))
    except UnbalancedBracesError:
        raise StorageError(f"{address}: unbalanced braces; write ranges as {{00000..00127}}") from None
    return [found for one in expanded for found in _glob(one)]


def walk(address: str) -> list[str]:
    """The files below a folder of this machine or of s3://, in order, or the address itself where it is a file."""
    if is_local(address):
        pattern = f"{glob.escape(address)}/**" if os.path.isdir(address) else glob.escape(address)
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if address.startswith(("http://", "https://", "pipe:")):
        raise StorageError(f"{address}: files are not listed there; copy them to this machine or to s3://")
    with _named(address):
        filesystem, path = find_filesystem(address)
        protocol = address.partition("://")[0]
        return sorted(f"{protocol}://{found}" for found in filesystem.find(path))


def copy(address: str, file: BinaryIO) -> None:
    """Append all bytes of an address to an open file of this machine. A pipe: command is run by bash, with pipefail."""
    if address.startswith("pipe:"):
        command = ["bash", "-o", "pipefail", "-c", address.removeprefix("pipe:")]
        file.flush()  # the command writes behind Python's back
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no output"]
            raise StorageError(f"{address}: the command ended with {done.returncode}: {said[-1]}")
        return
    with _named(address), _open(address) as source:
        expected = getattr(source, "length", None)  # of an http answer
        begin = file.tell()
        shutil.copyfileobj(source, file, BLOCK)
        if expected is not None and file.tell() - begin != expected:
            raise OSError(f"cut off after {file.tell() - begin} of {expected} bytes")


def read(address: str, limit: int | None = None) -> bytes:
    """All bytes of an address that is no pipe: command. Raises StorageError for one of more than `limit` bytes."""
    with _named(address), _open(address) as source:
        data = source.read(-1 if limit is None else limit + 1)
        if limit is not None and len(data) > limit:
            raise OSError(f"more than {limit:,} bytes")
        if getattr(source, "length", None):  # what an http answer still owes
            raise OSError(f"cut off after {len(data)} bytes")
        return data


def read_range(address: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, or fewer at the end, of an address that is no pipe: command."""
    with _named(address):
        if is_local(address):
            with open(address, "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        if address.startswith(("http://", "https://")):
            with _open(address, {"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
                if answer.status != 206:  # the server knows no ranges
                    answer.read(offset)
                data = answer.read(size)
                if len(data) < size and answer.length:
                    raise OSError(f"cut off after {len(data)} of {len(data) + answer.length} bytes")
                return data
        filesystem, path = find_filesystem(address)
        return filesystem.cat_file(path, start=offset, end=offset + size)


@contextlib.contextmanager
def local(address: str) -> Iterator[str]:
    """A path with the address's bytes, as a context: itself where it is local, else a temporary copy."""
    if is_local(address):
        yield address
        return
    with tempfile.NamedTemporaryFile(prefix="sdtrain-") as file:
        copy(address, file)
        file.flush()
        yield file.name


def fetch(address: str, folder: str | Path) -> str:
    """A copy of an address in `folder`, made once, whole or not at all; processes that want it together wait for it."""
    target = Path(folder, hashlib.sha256(address.encode()).hexdigest()[:24])
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{target}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                aside = Path(f"{target}.tmp")
                with open(aside, "wb") as file:
                    copy(address, file)
                os.replace(aside, target)
    return str(target)


@contextlib.contextmanager
def _named(address: str) -> Iterator[None]:
    """Turn whatever a file system, botocore or urllib raises into a StorageError that names the address."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        raise StorageError(f"{address}: nothing is there; correct the path") from None
    except Exception as error:
        if (
            not isinstance(error, OSError | ValueError | http.client.HTTPException)
            and "boto" not in type(error).__module__
        ):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"{address}: cannot be read ({reason[0]}); check the address, access and network") from None


def find_filesystem(address: str):
    """fsspec's file system for an address, and the path there. Raises StorageError for a protocol that has none."""
    protocol, separator, rest = address.partition("://")
    rest = urllib.parse.unquote(rest) if protocol == "file" else rest
    try:
        return (_filesystem(protocol), rest) if separator else (_filesystem("file"), address)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{address}: no access to {protocol}:// here ({error}); s3:// and http(s):// are") from None


def _filesystem(protocol: str):
    """fsspec keeps one a process, and makes another after a fork; what lies on S3 may change between two looks."""
    import fsspec

    return fsspec.filesystem(
        protocol, **({"config_kwargs": S3, "use_listings_cache": False} if protocol == "s3" else {})
    )


def _glob(address: str) -> list[str]:
    if not glob.has_magic(address) or address.startswith(("pipe:", "http://", "https://")):
        return [address]
    if is_local(address):
        # brackets may be part of a name
        found = [address] if os.path.exists(address) else sorted(glob.glob(address, recursive=True))
    else:
        with _named(address):
            filesystem, path = find_filesystem(address)
            protocol = address.partition("://")[0]
            found = sorted(f"{protocol}://{name}" for name in filesystem.glob(path))
    if not found:
        raise StorageError(f"{address}: nothing there matches; correct the path")
    return found


@contextlib.contextmanager
def _open(address: str, headers: dict[str, str] | None = None) -> Iterator[BinaryIO]:
    if is_local(address):
        with open(address, "rb") as file:
            yield file
    elif address.startswith(("http://", "https://")):
        request = urllib.request.Request(address, headers=headers or {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            yield answer
    else:
        filesystem, path = find_filesystem(address)
        with filesystem.open(path, "rb") as file:
            yield file
