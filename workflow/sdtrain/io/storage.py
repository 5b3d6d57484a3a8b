"""List, copy and read local paths, s3:// and http(s):// addresses, and the output of pipe: commands.

The environment gives S3 credentials and endpoints (AWS_*, or FSSPEC_S3_ANON=true for public buckets).
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand

from sdtrain.errors import SDTrainError

TIMEOUT = 30  # seconds without data from an HTTP server
S3 = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 4, "mode": "standard"}}
BLOCK = 1 << 20  # bytes


class StorageError(SDTrainError, OSError):
    """An address that cannot be read; the message names the address, the reason and the remedy."""


def is_local(address: str) -> bool:
    """Return whether an address is a local path."""
    return not (address.startswith("pipe:") or "://" in address)


def expand(address: str | Path) -> list[str]:
    """Return the addresses that braces, then globs (of paths and s3://) stand for, in order.

    Globs in pipe: commands are left to the shell. Raise StorageError for unbalanced braces and for a glob without
    matches.
    """
    try:
        expanded = list(braceexpand(str(address)))
    except ValueError:
        raise StorageError(f"{address}: unbalanced braces; write ranges as {{00000..00127}}") from None
    return [found for one in expanded for found in _glob(one)]


def walk(address: str) -> list[str]:
    """Return the sorted files below a local or s3:// folder, or the address itself if it is a file."""
    if is_local(address):
        pattern = f"{glob.escape(address)}/**" if os.path.isdir(address) else glob.escape(address)
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if address.startswith(("http://", "https://", "pipe:")):
        raise StorageError(f"{address}: files cannot be listed there; copy them to a local folder or to s3://")
    with _named(address):
        filesystem, path = find_filesystem(address)
        protocol = address.partition("://")[0]
        return sorted(f"{protocol}://{found}" for found in filesystem.find(path))


def copy(address: str, file: IO[bytes]) -> None:
    """Append all bytes of an address to an open local file. Bash runs a pipe: command, with pipefail."""
    if address.startswith("pipe:"):
        command = ["bash", "-o", "pipefail", "-c", address.removeprefix("pipe:")]
        file.flush()  # the command writes to the descriptor, past Python's buffer
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no output"]
            raise StorageError(f"{address}: the command failed with exit code {done.returncode}: {said[-1]}")
        return
    with _named(address), _open(address) as source:
        expected = getattr(source, "length", None)  # of an HTTP response
        begin = file.tell()
        shutil.copyfileobj(source, file, BLOCK)
        if expected is not None and file.tell() - begin != expected:
            raise OSError(f"cut off after {file.tell() - begin} of {expected} bytes")


def read(address: str, limit: int | None = None) -> bytes:
    """Return all bytes of an address (not pipe:). Raise StorageError if there are more than `limit` bytes."""
    with _named(address), _open(address) as source:
        data = source.read(-1 if limit is None else limit + 1)
        if limit is not None and len(data) > limit:
            raise OSError(f"more than {limit:,} bytes")
        if getattr(source, "length", None):  # bytes missing from an HTTP response
            raise OSError(f"cut off after {len(data)} bytes")
        return data


def read_range(address: str, offset: int, size: int) -> bytes:
    """Return `size` bytes from `offset`, or fewer at the end of the file, of an address (not pipe:)."""
    with _named(address):
        if is_local(address):
            with open(address, "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        if address.startswith(("http://", "https://")):
            with _open(address, {"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
                if answer.status != 206:  # the server ignores ranges and sends the whole file
                    answer.read(offset)
                data = answer.read(size)
                if len(data) < size and answer.length:
                    raise OSError(f"cut off after {len(data)} of {len(data) + answer.length} bytes")
                return data
        filesystem, path = find_filesystem(address)
        return filesystem.cat_file(path, start=offset, end=offset + size)


@contextlib.contextmanager
def local(address: str) -> Iterator[str]:
    """Yield a local path with the bytes of an address: the address itself if it is local, else a temporary copy."""
    if is_local(address):
        yield address
        return
    with tempfile.NamedTemporaryFile(prefix="sdtrain-") as file:
        copy(address, file)
        file.flush()
        yield file.name


def version(address: str) -> str | None:
    """Return a text that changes when the content of an address does; None if there is none (pipe:, some servers).

    It is the size and modification time of a local file, the ETag or modification time of a remote one.
    """
    if is_local(address):
        found = os.stat(address)
        return f"{found.st_size} {found.st_mtime_ns}"
    if address.startswith(("http://", "https://")):
        with contextlib.suppress(OSError, http.client.HTTPException):  # some servers answer no HEAD request
            request = urllib.request.Request(address, method="HEAD")
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                about = answer.headers
            if about["ETag"] or about["Last-Modified"]:
                return about["ETag"] or f"{about['Last-Modified']} {about['Content-Length']}"
    if address.startswith("s3://"):
        with contextlib.suppress(Exception):  # botocore raises many kinds; reading the address names the cause
            filesystem, path = find_filesystem(address)
            return str(filesystem.info(path)["ETag"])
    return None


@contextlib.contextmanager
def _named(address: str) -> Iterator[None]:
    """Convert the errors of file systems, botocore and urllib to a StorageError that names the address."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        raise StorageError(f"{address}: no such file; correct the path") from None
    except Exception as error:
        expected = isinstance(error, OSError | ValueError | http.client.HTTPException)
        if not expected and "boto" not in type(error).__module__:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"{address}: cannot be read ({reason[0]}); check the address, access and network") from None


def find_filesystem(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address and the path in it. Raise StorageError for an unknown protocol.

    fsspec keeps one file system of each protocol per process, and makes a new one after a fork.
    """
    import fsspec

    protocol, separator, path = address.partition("://")
    if not separator:
        protocol, path = "file", address
    elif protocol == "file":
        path = urllib.parse.unquote(path)
    # without the listings cache, because objects on S3 may change between two calls
    options = {"config_kwargs": S3, "use_listings_cache": False} if protocol == "s3" else {}
    try:
        return fsspec.filesystem(protocol, **options), path
    except (ImportError, ValueError) as error:
        raise StorageError(
            f"{address}: {protocol}:// is not supported ({error}); use a local path, s3:// or http(s)://"
        ) from None


def _glob(address: str) -> list[str]:
    if not glob.has_magic(address) or address.startswith(("pipe:", "http://", "https://")):
        return [address]
    if is_local(address):
        # a file name may contain brackets
        found = [address] if os.path.exists(address) else sorted(glob.glob(address, recursive=True))
    else:
        with _named(address):
            filesystem, path = find_filesystem(address)
            protocol = address.partition("://")[0]
            found = sorted(f"{protocol}://{name}" for name in filesystem.glob(path))
    if not found:
        raise StorageError(f"{address}: no file matches; correct the path")
    return found


@contextlib.contextmanager
def _open(address: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
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
