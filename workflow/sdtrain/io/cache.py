"""Cached files that the processes of one machine share: local copies of remote files, and what is derived from them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from sdtrain.io import storage
from sdtrain.io.files import atomic_path, hold_lock


class LocalCache:
    """A folder of files that are made once, whole or not at all, by whichever process needs one first.

    `number` is how many files are kept, those that were used last; None keeps all. A file that is deleted while it is
    open can still be read.
    """

    def __init__(self, folder: str | Path, number: int | None = None):
        self.folder, self.number = Path(folder), number

    def path(self, key: str) -> Path:
        """Return the path of the file of a key, which may not exist yet."""
        return self.folder / short_digest(key)

    def fetch(self, address: str) -> BinaryIO:
        """Return the open local copy of an address. Raise StorageError if it cannot be copied."""

        def write(path: Path) -> None:
            with open(path, "wb") as file:
                storage.copy(address, file)

        return self.open(address, write)

    def open(self, key: str, write: Callable[[Path], None]) -> BinaryIO:
        """Return the open file of a key; where there is none yet, `write` makes it at the path it is given."""
        target = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            return _reopen(target)
        with exclusive(target):
            with contextlib.suppress(FileNotFoundError):  # another process made it while this one waited
                return _reopen(target)
            with atomic_path(target) as temporary:
                write(temporary)
                file = open(temporary, "rb")  # before other processes can see it, and delete it
        self._delete_oldest()
        return file

    def _delete_oldest(self) -> None:
        if self.number is None:
            return
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process deletes files too
                files += [] if path.suffix else [(path.stat().st_mtime_ns, path)]
        for _, path in sorted(files)[: -self.number]:
            path.unlink(missing_ok=True)


def _reopen(path: Path) -> BinaryIO:
    """Open a cached file; its modification time is the time of its last use."""
    os.utime(path)
    return open(path, "rb")


def exclusive(path: Path) -> AbstractContextManager[int | None]:
    """Hold the lock `{path}.lock`, for which any number of processes may wait, while the file at `path` is made."""
    return hold_lock(f"{path}.lock", wait_seconds=math.inf)


def short_digest(text: str) -> str:
    """Return a file name for a text: 24 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]
