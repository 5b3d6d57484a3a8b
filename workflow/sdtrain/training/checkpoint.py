"""Save, find and load the whole training state.

A checkpoint is a folder of torch.distributed.checkpoint, named by images seen, in a folder keyed by the fingerprint of
what decides the weights. Every rank writes its part in the background. The folder appears atomically, older
checkpoints are deleted only afterwards, and any number of ranks, replicated or sharded, can read it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata

from sdtrain.distributed import is_lost
from sdtrain.errors import SDTrainError
from sdtrain.io.files import hold_lock, temporary_path, write_json, write_text

# One process without a process group is intended
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class CheckpointError(SDTrainError, RuntimeError):
    """A checkpoint or run folder that cannot be used."""


# ---------------------------------------------------------------- the state of a training
class Checkpoints:
    """The checkpoints of one training, whose `state` is a nested dict of its live tensors, on every rank the same keys.

    All ranks call `save`, `finish` and `load` together. `keep` is how many of the newest stay (None: all); those at
    the image counts in `always` stay too. `group` is a process group with a CPU backend, None for one process.
    """

    def __init__(
        self,
        folder: str | Path,
        state: dict,
        *,
        main: bool = True,
        group: Any = None,
        keep: int | None = 1,
        always: Iterable[int] = (),
    ):
        self.folder, self.state, self.main, self.group = Path(folder), state, main, group
        self.keep, self.always = keep, set(always)
        self.pending: tuple[int, Any] | None = None
        self.newest: int | None = None  # images of what was last written, or read

    def saved(self) -> list[int]:
        """Return the images seen of the complete checkpoints, ascending."""
        whole = (path.parent.name for path in self.folder.glob("*/.metadata"))
        return sorted(int(name) for name in whole if name.isdigit())

    def save(self, images: int) -> None:
        """Copy the current state and write it as `{images}` in the background. Raise what `finish` raises."""
        self.finish()
        temporary = temporary_path(self.folder / str(images))
        with self._named(images):
            if self.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True, exist_ok=True)
            writer = dcp.FileSystemWriter(temporary, per_thread_copy_ahead=0)  # staged on the CPU: no GPU is asked
            future = dcp.async_save(
                self.state, storage_writer=writer, process_group=self.group, no_dist=self.group is None
            )
        self.pending = images, future

    def settled(self) -> bool:
        """Return whether the last save has ended on this rank, successfully or not."""
        return self.pending is not None and self.pending[1].done()

    def finish(self) -> None:
        """Wait for the pending save, rename its folder, then delete checkpoints that are no longer kept.

        Raise CheckpointError on every rank if one of them could not write; earlier checkpoints are untouched.
        """
        if self.pending is None:
            return
        (images, future), self.pending = self.pending, None
        with self._named(images):
            future.result()
            self.newest = images
            if self.main:
                remove_checkpoint(self.folder, images)  # one that was half deleted would be in the way
                path = self.folder / str(images)
                os.replace(temporary_path(path), path)
                self._prune(images)
        if self.group is not None:
            dist.barrier(self.group)  # it is in place for all

    def _prune(self, newest: int) -> None:
        if self.keep is None:
            return
        rolling = [i for i in self.saved() if i <= newest and i not in self.always]
        for images in rolling[: -self.keep or None]:
            remove_checkpoint(self.folder, images)

    @contextlib.contextmanager
    def _named(self, images: int) -> Iterator[None]:
        """Raise a failed write as CheckpointError, and delete the temporary folder."""
        try:
            yield
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            if is_lost(error):
                raise
            path = self.folder / str(images)
            if self.main:
                shutil.rmtree(temporary_path(path), ignore_errors=True)
            raise CheckpointError(
                f"{path}: could not be saved ({_reason(error)}); the checkpoint before it is untouched"
            ) from error

    def load(self, images: int) -> None:
        """Read a checkpoint into the live tensors. Nothing in it is executed.

        Raise CheckpointError if it is damaged or of another architecture.
        """
        path, self.newest = self.folder / str(images), images
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(self.state, storage_reader=_Reader(path), process_group=self.group, no_dist=self.group is None)
        except (Exception, dcp.CheckpointException) as error:
            if is_lost(error):
                raise
            raise CheckpointError(
                f"{path}: unreadable checkpoint, or one of another architecture ({_reason(error)}); "
                "delete it to resume from the one before"
            ) from error


class _Reader(dcp.FileSystemReader):
    """A reader of tensors only: the pickled index may create nothing but torch's own plain classes."""

    def read_metadata(self, *args, **kwargs) -> dcp_metadata.Metadata:
        """Return the index of a checkpoint's tensors."""
        with open(Path(self.path, ".metadata"), "rb") as file:
            found = _Unpickler(file).load()
        odd = [k for k, v in found.state_dict_metadata.items() if not isinstance(v, dcp_metadata.TensorStorageMetadata)]
        if odd:
            raise pickle.UnpicklingError(f"{odd[0]}: not a tensor")
        found.storage_meta = found.storage_meta or dcp_metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


INDEX_NAMES = {  # the only names that an index of tensors needs
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        """Return a class of INDEX_NAMES; raise UnpicklingError for any other."""
        if name not in INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def _reason(error: BaseException) -> str:
    """Return the error of one rank in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = sorted(failures.items())[0]
        return f"rank {rank}: {_reason(cause)}" if len(failures) < 2 else _reason(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def remove_checkpoint(folder: Path, images: int) -> None:
    """Delete a checkpoint. A partly deleted one no longer counts as a checkpoint."""
    path = Path(folder, str(images))
    (path / ".metadata").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- milestones
def start_milestone(checkpoints: Checkpoints, images: int, previous: int, code: str) -> None:
    """Prepare a job that trains up to `images` images, after `previous` images: the end of the milestone before it.

    The mark of a finished milestone holds the digest of the code that trained it. With other code, the milestone is
    trained again from the one before; with the same code the weights would be the same, so it is only exported again.
    """
    for remains in checkpoints.folder.glob(".*.tmp"):  # of killed saves
        shutil.rmtree(remains, ignore_errors=True)
    mark = checkpoints.folder / f"{images}.done"
    if mark.exists() and mark.read_text().strip() != code:
        wipe(checkpoints, previous)


def wipe(checkpoints: Checkpoints, previous: int) -> None:
    """Delete checkpoints and marks past `previous` images."""
    for images in checkpoints.saved():
        if images > previous:
            remove_checkpoint(checkpoints.folder, images)
    for mark in checkpoints.folder.glob("*.done"):
        if int(mark.stem) > previous:
            mark.unlink()


def finish_milestone(checkpoints: Checkpoints, images: int, code: str) -> None:
    """Mark a milestone as finished; call it once its declared result is written."""
    write_text(checkpoints.folder / f"{images}.done", code + "\n")


def request_requeue(folder: Path, images: int, warned: bool) -> None:
    """Write the requeue marker of a training that a signal stopped; `warned`: by SLURM, ahead of a time limit."""
    write_json(folder / "requeue", {"images": images, "warned": warned})
    print(f"{folder}: stopped, saved at {images} images; the same command resumes", flush=True)


# ---------------------------------------------------------------- one trainer a folder
@contextlib.contextmanager
def lock(folder: str | Path, wait_minutes: float = 0.0) -> Iterator[None]:
    """Keep a second trainer out of `folder`, or let it wait. Raise LockedError if the wait is over."""
    busy = "another process is training here"
    with hold_lock(Path(folder, ".lock"), 60 * wait_minutes, busy, lambda line: print(line, flush=True)):
        yield
