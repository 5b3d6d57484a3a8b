"""This call of Snakemake among others in its folder: what a killed one left behind, what its own jobs read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from pathlib import Path

LIVING: dict[Path, object] = {}  # open files, kept for as long as this process lives: a closed one is no mark any more


def enter(folder: str | Path = ".snakemake") -> bool:
    """Mark this process as a living call in the folder above; True where no other is alive.

    Then locks of Snakemake are those of a call that was killed, and are taken off, as `--unlock` does. Where the file
    system knows no locks, nothing is touched.
    """
    folder = Path(folder).resolve()
    folder.mkdir(exist_ok=True)
    if folder not in LIVING:
        LIVING[folder] = open(folder / "calls.lock", "a+")
    alone = _locked(LIVING[folder], fcntl.LOCK_EX)
    if alone:
        for lock in (folder / "locks").glob("*.lock"):
            lock.unlink(missing_ok=True)
    _locked(LIVING[folder], fcntl.LOCK_SH)
    return alone


def _locked(file, kind: int) -> bool:
    with contextlib.suppress(OSError):
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
        return True
    return False


def keep_copy(configs: Path, folder: str | Path = ".snakemake/configs") -> Path:
    """A copy of the configurations as they are now, in a folder named after their content; returns it."""
    files = sorted(path for path in configs.rglob("*.yaml") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(configs)}\0".encode() + path.read_bytes() + b"\0")
    copy = Path(folder).resolve() / digest.hexdigest()[:16]
    if not copy.exists():
        aside = copy.with_name(f".{copy.name}.{os.getpid()}")
        for path in files:
            (aside / path.relative_to(configs)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, aside / path.relative_to(configs))
        with contextlib.suppress(FileExistsError):  # another call was faster
            aside.rename(copy)
    return copy
