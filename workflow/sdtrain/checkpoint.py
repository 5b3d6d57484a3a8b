"""Save, find and load the whole training state; export a diffusers pipeline.

A checkpoint is one file, named by images seen, in a folder keyed by the fingerprint of what decides the weights. It
appears whole or not at all, and older ones go only when the new one is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from sdtrain.config import write_text


class CheckpointError(RuntimeError):
    """A checkpoint or run folder that cannot be used; the message names it and the remedy."""


def save(
    folder: str | Path, images: int, state: dict, keep: set[int] = frozenset(), only_most_recent: bool = True
) -> Path:
    """Write `state` as `{images}.pt`; then, where `only_most_recent`, delete older ones but those in `keep`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, aside = folder / f"{images}.pt", folder / f".{images}.tmp"
    try:
        torch.save(state, aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: could not be saved ({error}); the checkpoint before it is untouched") from error
    if only_most_recent:
        for old in saved(folder):
            if old < images and old not in keep:
                (folder / f"{old}.pt").unlink()
    return path


def saved(folder: str | Path) -> list[int]:
    """Images seen of the checkpoints in a folder, ascending."""
    return sorted(int(p.stem) for p in Path(folder).glob("*.pt") if p.stem.isdigit())


def load(folder: str | Path, images: int, device: torch.device | str = "cpu") -> dict:
    """Read one checkpoint (tensors and plain values only: nothing in it is executed)."""
    path = Path(folder) / f"{images}.pt"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: unreadable checkpoint ({error}); delete it to go on from the one before"
        ) from error


def start_milestone(folder: str | Path, images: int, previous: int) -> None:
    """Prepare a folder for the job that trains up to `images` images, having `previous` behind it.

    `previous` is where the milestone before it ended, with a whole batch. The mark of a finished milestone outlives its
    declared result only if that result was removed on purpose (a forced rerun): then what lies past the previous
    milestone is wiped, so that it is trained again. A killed job left no mark.
    """
    folder = Path(folder)
    if (folder / f"{images}.done").exists():
        wipe(folder, previous)


def wipe(folder: str | Path, previous: int) -> None:
    """Delete checkpoints and marks past `previous` images."""
    folder = Path(folder)
    for step in saved(folder):
        if step > previous:
            (folder / f"{step}.pt").unlink()
    for mark in folder.glob("*.done"):
        if int(mark.stem) > previous:
            mark.unlink()


def finish_milestone(folder: str | Path, images: int) -> None:
    """Mark a milestone as finished; call it once its declared result is written."""
    write_text(Path(folder) / f"{images}.done", "")


@contextlib.contextmanager
def lock(folder: str | Path, wait_minutes: float = 0.0) -> Iterator[None]:
    """Keep a second trainer out of `folder`, or let it wait for the first one's end.

    The kernel drops the lock with the process, so it never goes stale. Raises CheckpointError once the wait is over.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "w") as file:
        end = time.monotonic() + 60 * wait_minutes
        while not _locked(file):
            if time.monotonic() >= end:
                raise CheckpointError(f"{folder}: another process is training here; wait for it or end it")
            print(f"{folder}: another process is training here; waiting for its end", flush=True)
            time.sleep(min(10.0, max(0.1, end - time.monotonic())))
        yield


def _locked(file) -> bool:
    """Take the file's lock if it is free."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def replace_folder(aside: Path, folder: Path) -> None:
    """Put a finished folder in the place of an old one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def point_link(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, replacing an older one in one step."""
    if link.is_dir() and not link.is_symlink():
        raise CheckpointError(f"{link}: a folder is in the way of a link; move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    aside = link.with_name(f".{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(_from_folder(target, link.parent))
    os.replace(aside, link)


def _from_folder(path: Path, folder: Path) -> str:
    """`path` relative to `folder` as the kernel follows it: `folder` may lie behind a link to another disk."""
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def export_pipeline(folder: str | Path, parts, unet, extra: dict[str, object] | None = None) -> Path:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` loads; returns it.

    UNet and scheduler are written as safetensors and JSON; frozen parts that came from a local folder are linked, not
    copied. `extra` names further folders, such as {"unet_raw": module}.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    unet.save_pretrained(aside / "unet", safe_serialization=True)
    for name, module in (extra or {}).items():
        module.save_pretrained(aside / name, safe_serialization=True)
    parts.scheduler.save_pretrained(aside / "scheduler")
    for name, part in (("vae", parts.vae), ("text_encoder", parts.text_encoder), ("tokenizer", parts.tokenizer)):
        source = parts.folders.get(name)
        if source is not None:  # relative to where the folder will lie, which is as deep as where it is written
            (aside / name).symlink_to(_from_folder(Path(source), aside))
        else:
            part.save_pretrained(aside / name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        **{n: [type(p).__module__.split(".")[0], type(p).__name__] for n, p in parts.named().items()},
        "unet": ["diffusers", type(unet).__name__],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    write_text(aside / "model_index.json", json.dumps(index, indent=1) + "\n")
    replace_folder(aside, folder)
    return folder
