"""Local files and folders: atomic writes, replacement, locks, digests, JSON."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sdtrain.errors import SDTrainError

SETTLE = 0.5  # seconds that a lock is tried at least: `is_locked` of another process holds it for an instant


class FileError(SDTrainError, OSError):
    """A file that cannot be read or replaced."""


class LockedError(SDTrainError):
    """A lock that another process holds."""


# ---------------------------------------------------------------- atomic writes
def temporary_path(path: str | Path) -> Path:
    """Return the one name under which `path` is written before it is renamed; a killed process leaves no other."""
    path = Path(path)
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file; rename it to `path` on success, delete it on error.

    Two processes must not write the same `path` at once; hold a lock where they might.
    """
    temporary = temporary_path(path)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it takes the place of `path`, on error it is deleted."""
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: str | Path, folder: str | Path) -> None:
    """Move a finished folder to `folder`, in the place of an older one, which is deleted last."""
    folder = Path(folder)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raise FileError, with the remedy, if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"make it again: snakemake --force {path}"
        raise FileError(f"{path}: not a readable JSON file ({error}); {remedy}") from None


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- links
def replace_link(link: str | Path, target: str | Path) -> None:
    """Make `link` a relative symbolic link to `target`, atomically. Raise FileError if a folder is in its place."""
    link = Path(link)
    if link.is_dir() and not link.is_symlink():
        raise FileError(f"{link}: a folder is in the way of a link; move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(relative_target(target, link.parent))
    os.replace(temporary, link)


def relative_target(path: str | Path, folder: str | Path) -> str:
    """Return `path` relative to `folder` as the kernel resolves it: `folder` may lie behind a link."""
    path = Path(path)
    return os.path.relpath(path.parent.resolve() / path.name, Path(folder).resolve())


# ---------------------------------------------------------------- locks
@contextlib.contextmanager
def hold_lock(
    path: str | Path,
    wait_seconds: float = 0.0,
    busy: str = "another process is working here",
    say: Callable[[str], None] | None = None,
) -> Iterator[int | None]:
    """Hold the lock file `path`; yield its file descriptor, which a child process may inherit (`pass_fds`).

    The kernel drops the lock when the process and all who inherited it are gone, so it is never stale; forked loader
    processes do not inherit it. The file names its owner. `say` is called with a message at the start of the wait, and
    every 10 s. Raise LockedError, which begins with the folder and `busy`, after `wait_seconds`. On a file system
    without locks, warn and yield None.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptors: list[int] = []
    lock = FileLock(path, preserve_lock_file=True, on_acquired=descriptors.append)
    end, patience = time.monotonic() + wait_seconds, SETTLE
    while True:
        try:
            lock.acquire(timeout=min(patience, max(SETTLE, end - time.monotonic())))
            break
        except Timeout:
            reason = f"{path.parent}: {busy} ({lock_owner(path) or 'unknown'})"
            if time.monotonic() >= end:
                raise LockedError(f"{reason}; wait for it or end it") from None
            if say:
                say(f"{reason}; waiting for its end")
            patience = 10.0
        except OSError as error:
            warnings.warn(f"{path}: this file system has no locks ({error}); start one process only", stacklevel=3)
            yield None
            return
    try:
        job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}{job}, since {since}", encoding="utf-8")
        yield descriptors[-1]
    finally:
        lock.release()


def lock_owner(path: str | Path) -> str:
    """Return who held the lock last, as `hold_lock` wrote it, or an empty text."""
    try:
        return " ".join(Path(path).read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return ""


def is_locked(path: str | Path) -> bool | None:
    """Return whether a process holds the lock file `path`; None if that cannot be determined (no access, no locks)."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False
