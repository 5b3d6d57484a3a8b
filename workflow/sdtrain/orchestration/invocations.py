"""Snakemake invocations in one folder: which others are running, and the configurations that their jobs read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
from pathlib import Path

from sdtrain.io.files import atomic_folder, hold_lock, is_locked

WAIT = 60.0  # seconds for another invocation that registers itself at the same moment
_held_locks: dict[Path, contextlib.ExitStack] = {}  # by lock file; held until this process ends


def register(folder: str | Path = ".snakemake") -> bool:
    """Register this process as a Snakemake invocation in `folder`; return True if no other one is running.

    In that case the locks of Snakemake in `folder` are stale and are deleted, as `snakemake --unlock` does. On a file
    system without locks, return False and delete nothing.
    """
    invocations = Path(folder).resolve() / "invocations"
    own = invocations / f"{socket.gethostname()}-{os.getpid()}.lock"
    with hold_lock(invocations / ".lock", wait_seconds=WAIT) as descriptor:
        others = [path for path in invocations.glob("[!.]*.lock") if path != own]
        running = [path for path in others if is_locked(path) is not False]
        if own not in _held_locks:
            _held_locks[own] = contextlib.ExitStack()
            _held_locks[own].enter_context(hold_lock(own))
        if running or descriptor is None:
            return False
        for path in [*others, *Path(folder).glob("locks/*.lock")]:
            path.unlink(missing_ok=True)
        return True


def keep_configs(configs: Path, folder: str | Path = ".snakemake/configs") -> Path:
    """Copy the YAML files of `configs` to a folder named by their digest, if it does not exist; return its path."""
    files = sorted(path for path in configs.rglob("*.yaml") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(configs)}\0".encode() + path.read_bytes() + b"\0")
    kept = Path(folder).resolve() / digest.hexdigest()[:16]
    with hold_lock(kept.parent / ".lock", wait_seconds=WAIT):
        if not kept.exists():
            with atomic_folder(kept) as temporary:
                for path in files:
                    (temporary / path.relative_to(configs)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, temporary / path.relative_to(configs))
    return kept


def pass_on_api_key(key: str | None) -> None:
    """Pass the wandb API key of a run to its jobs in the environment, so that no file and no command line has it."""
    if key:
        os.environ["WANDB_API_KEY"] = key
