"""Rank, world size, collectives and signals; the only reader of the launchers' environment variables."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sdtrain.errors import SDTrainError

STOPPED = os.EX_TEMPFAIL  # 75: exit code of a process that saved a checkpoint and ended because of a signal


class DistError(SDTrainError, RuntimeError):
    """A launch that cannot work."""


@dataclass(frozen=True)
class World:
    """The place of this process in the process group."""

    rank: int
    size: int
    local_rank: int
    launcher: str

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files and logs."""
        return self.rank == 0


def world(environ: MutableMapping[str, str] | None = None) -> World:
    """Return the place by the launcher's variables: torchrun's, else those of an `srun` task, else rank 0 of 1."""
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), "torchrun")
    # A batch shell has SLURM_PROCID, too, but only tasks of srun have the number of tasks of their step
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        size = int(env["SLURM_STEP_NUM_TASKS"])
        return World(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), "slurm")
    return World(0, 1, 0, "single")


def only_device() -> torch.device:
    """Return the device of a command of one process: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def own_device(here: World) -> torch.device:
    """Return the device of this rank: the GPU of its local rank if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def start(backend: str | None = None, url: str = "env://", timeout_minutes: float = 30.0) -> tuple[World, torch.device]:
    """Join the process group (none for one process) and return the place and the device of this process.

    `backend` defaults to nccl with CUDA, else gloo. Raise DistError for nccl without CUDA and if the rendezvous fails.
    """
    here = world()
    cuda = torch.cuda.is_available()
    device = own_device(here)
    if here.size > 1:
        backend = backend or ("nccl" if cuda else "gloo")
        if backend == "nccl" and not cuda:
            raise DistError(
                "distributed.dist_backend: nccl needs CUDA, which is not available; set distributed.dist_backend=gloo"
            )
        if here.launcher == "slurm":
            _set_rendezvous(os.environ)
        timeout = timedelta(minutes=timeout_minutes)
        try:
            dist.init_process_group(backend, init_method=url, rank=here.rank, world_size=here.size, timeout=timeout)
        except (ValueError, RuntimeError) as error:
            where = f"distributed.dist_backend={backend}, distributed.dist_url={url}"
            raise DistError(
                f"{where}: {here.size} processes could not join a process group: {str(error).splitlines()[0]}"
            ) from error
    return here, device


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(settings: Any) -> Iterator[tuple[World, torch.device, StopHandler]]:
    """Join the process group of a `distributed` section. On error, print one line and exit.

    Yield the place of this process, its device and the handler of stop signals. An SDTrainError or OSError prints its
    message only, a failed collective the ranks that do not respond; any other error also prints a traceback.
    """
    here, handler = world(), StopHandler()
    if not here.is_main:
        warnings.simplefilter("ignore")  # rank 0 prints the same warnings
    try:
        check_world_size(settings.world_size, here)
        _, device = start(settings.dist_backend, settings.dist_url, settings.timeout_minutes)
        yield here, device, handler
    except (SDTrainError, OSError) as error:
        end(str(error))
    except Exception as error:
        silent = silent_ranks() if is_lost(error) else []
        if not silent:
            traceback.print_exc()
            end(f"{type(error).__name__}: {error}")
        named = ", ".join(map(str, silent))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        end(f"rank {here.rank} has lost rank {named}, which died or hangs: {reason}")
    stop()
    handler.ignore()


def check_world_size(planned: int | None, here: World) -> None:
    """Raise DistError if the world size differs from the planned one: a launcher may give another one silently."""
    if planned is not None and planned != here.size:
        raise DistError(
            f"distributed.world_size: {planned} ranks were planned, but {here.size} were started ({here.launcher}); "
            "make the launch line agree with the job's nodes and tasks per node"
        )


def end(message: str) -> NoReturn:
    """Print an error and exit at once, even if other threads or ranks wait in a collective."""
    here = world()
    print(f"error: {message}" if here.is_main else f"rank {here.rank} ends: {message}", file=sys.stderr, flush=True)
    os._exit(1)


# ---------------------------------------------------------------- collectives
def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, computed in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def cpu_group(timeout_minutes: float = 30.0) -> Any:
    """Return a gloo process group, with which checkpoints are written in the background; None for one process."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value, a picklable object. A shared disk may show other ranks an older state."""
    found = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def gather_objects(value: Any) -> list | None:
    """Return the picklable objects of all ranks on rank 0, and None on the others."""
    if not dist.is_initialized():
        return [value]
    found: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found)
    return found


# ---------------------------------------------------------------- lost ranks
def is_lost(error: BaseException) -> bool:
    """Return whether an error is that of a collective in which another rank did not take part."""
    causes = [error, *(cause for cause, _ in getattr(error, "failures", {}).values())]
    signs = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|socket"
    return any(isinstance(c, dist.DistError) or re.search(signs, str(c), re.IGNORECASE) for c in causes)


def silent_ranks(wait_seconds: float = 5.0) -> list[int]:
    """Return the ranks that do not respond after a failed collective. Each rank that is alive calls this.

    Ranks report to the store of the rendezvous. If the store is gone, rank 0 or its launcher, which keeps it, is gone.
    """
    if not dist.is_initialized():
        return []
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"alive/{rank}", "1")
        end = time.monotonic() + wait_seconds
        while time.monotonic() < end and not store.check([f"alive/{r}" for r in range(size)]):
            time.sleep(0.1)
        return [r for r in range(size) if not store.check([f"alive/{r}"])]
    except RuntimeError:
        return [0]


# ---------------------------------------------------------------- signals
class StopHandler:
    """The handler of signals that ask to save a checkpoint and stop.

    SIGUSR1, SLURM's warning before a time limit, is handled from the start. SIGTERM and SIGINT end the process as usual
    until `listen` is called, when there is something to save.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self.agreed = False  # whether any rank received a signal
        self.warned = False  # whether any rank received SIGUSR1: SLURM is then to requeue the job
        signal.signal(signal.SIGUSR1, self._note)

    def listen(self) -> None:
        """Handle all of SIGNALS from now on."""
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def ignore(self) -> None:
        """Ignore SIGNALS from now on: they would kill an interpreter that is shutting down."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _set_rendezvous(env: MutableMapping[str, str]) -> None:
    """Set the rendezvous of an `srun` step: the job's first host, and a port derived from the job id."""
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            raise DistError(f"{' '.join(command)}: {error}; set MASTER_ADDR to the job's first host") from error
        env["MASTER_ADDR"] = hosts[0]
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
