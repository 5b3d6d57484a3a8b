"""This process among all ranks: rank and world size from torchrun, else SLURM, else one process; sums, signals.

The only reader of the launchers' variables.
"""

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
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from sdtrain.errors import SDTrainError

STOPPED = os.EX_TEMPFAIL  # 75: the exit code of a process that a signal stopped, with everything saved


class DistError(SDTrainError, RuntimeError):
    """A launch that cannot work; the message names the key and the remedy."""


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    launcher: str

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


def world(environ: dict[str, str] | None = None) -> World:
    """Read the launcher's variables: torchrun's, else those of an `srun` task, else one process alone."""
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), "torchrun")
    # A batch shell has SLURM_PROCID too, but is no task of a step: only srun's ranks carry a step's task count
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        size = int(env["SLURM_STEP_NUM_TASKS"])
        return World(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), "slurm")
    return World(0, 1, 0, "single")


def only_device() -> torch.device:
    """The device of a command that runs as one process: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def own_device(here: World) -> torch.device:
    """This process's device: the GPU of its local rank, also where it joins no process group, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def start(backend: str | None = None, url: str = "env://", timeout_minutes: float = 30.0) -> tuple[World, torch.device]:
    """Join the process group (none for one process) and return this process's place and device.

    `backend` defaults to nccl where CUDA is there, else gloo. Raises DistError for nccl without CUDA and for processes
    that cannot meet.
    """
    here = world()
    cuda = torch.cuda.is_available()
    device = own_device(here)
    if here.size > 1:
        backend = backend or ("nccl" if cuda else "gloo")
        if backend == "nccl" and not cuda:
            raise DistError(
                "distributed.dist_backend: nccl needs CUDA, which is not here; set distributed.dist_backend=gloo"
            )
        if here.launcher == "slurm":
            _set_rendezvous(os.environ)
        timeout = timedelta(minutes=timeout_minutes)
        try:
            dist.init_process_group(backend, init_method=url, rank=here.rank, world_size=here.size, timeout=timeout)
        except (ValueError, RuntimeError) as error:
            where = f"distributed.dist_backend={backend}, distributed.dist_url={url}"
            raise DistError(f"{where}: {here.size} processes cannot meet: {str(error).splitlines()[0]}") from error
    return here, device


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(settings, expected: tuple[type[Exception], ...]) -> Iterator[tuple[World, torch.device, Stop]]:
    """This process among all ranks for as long as the context lasts, by a `distributed` section; ends it by one line.

    Gives its place, its device and whether signals asked to stop. Of `expected` errors only the message is shown; of a
    failed exchange, which ranks were lost.
    """
    here, signals = world(), Stop()
    if not here.main:
        warnings.simplefilter("ignore")  # the main rank gives the same
    try:
        require_planned(settings.world_size, here)
        _, device = start(settings.dist_backend, settings.dist_url, settings.timeout_minutes)
        yield here, device, signals
    except (*expected, DistError) as error:
        end(str(error))
    except Exception as error:
        silent = silent_ranks() if is_lost(error) else []
        if not silent:
            traceback.print_exc()
            end(f"{type(error).__name__}: {error}")
        named = ", ".join(map(str, silent))
        end(f"rank {here.rank} has lost rank {named}, which died or hangs: {str(error).splitlines()[0]}")
    stop()
    signals.ignore()


def require_planned(size: int | None, here: World) -> None:
    """Refuse to run as other than the planned number of ranks: a launcher may give another one without a word."""
    if size is not None and size != here.size:
        raise DistError(
            f"distributed.world_size: {size} ranks were planned and {here.size} came ({here.launcher}); let the counts "
            "of the launch line (nodes x tasks a node) agree with those of the job"
        )


def end(message: str) -> NoReturn:
    """Print why this process ends, and end at once: ranks that wait in an exchange must not keep it from doing so."""
    here = world()
    print(f"error: {message}" if here.main else f"rank {here.rank} ends: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks (in place)."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def least(value: int, device: torch.device) -> int:
    """The smallest of the ranks' values."""
    found = torch.tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def cpu_group(timeout_minutes: float = 30.0):
    """A process group that moves what lies on CPUs, for checkpoints in the background; None for one process."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def from_main(value):
    """The main rank's value, a plain object, for all: a shared disk may show other ranks an older state."""
    found = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def gather(value) -> list | None:
    """Every rank's value, a plain object, on the main rank; None on the others."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found)
    return found


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of an exchange which another rank did not take part in."""
    causes = [error, *(cause for cause, _ in getattr(error, "failures", {}).values())]
    signs = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|socket"
    return any(isinstance(c, dist.DistError) or re.search(signs, str(c), re.IGNORECASE) for c in causes)


def silent_ranks(wait_seconds: float = 5.0) -> list[int]:
    """After a failed exchange: the ranks that do not answer any more. Each rank that is still there calls this.

    Ranks report to the rendezvous' store; if that is gone, so is the rank that keeps it, rank 0 (or its launcher).
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


def batch_sizes(system, world_size: int) -> tuple[int | None, int | None, int]:
    """Images a micro-batch (None: to be found), micro-batches a step (None: follows), and images a step on all ranks.

    `system` is that section of a stage. Raises DistError for sizes that do not divide.
    """
    micro, step = system.batch_size, system.global_batch
    if micro == "auto":
        if not torch.cuda.is_available():
            raise DistError("system.batch_size: auto looks for what fits a GPU, and there is none; set a number")
        if step is None or step % world_size:
            raise DistError(
                f"system.batch_size: auto needs system.global_batch, a multiple of the {world_size} ranks; it is {step}"
            )
        return None, None, step
    if step is None:
        return micro, system.gradient_accumulation, micro * system.gradient_accumulation * world_size
    if step % (micro * world_size):
        near = max(1, round(step / (micro * world_size))) * micro * world_size
        raise DistError(
            f"system.global_batch: {step} is no multiple of {world_size} ranks x system.batch_size={micro}; "
            f"set it to {near}, or another batch_size"
        )
    return micro, step // (micro * world_size), step


class Stop:
    """Whether a signal has asked to save and stop: SIGUSR1 (SLURM's warning before a limit) at any time, and SIGTERM

    and SIGINT once there is something to save; before that, these two end the process as ever.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.name: str | None = None
        self.agreed = False  # whether a signal has come to any of the ranks
        self.warned = False  # whether it was SIGUSR1: then SLURM is to start the job again
        signal.signal(signal.SIGUSR1, self._note)

    def listen(self) -> None:
        """From now on all of them are noted."""
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.name = signal.Signals(number).name

    def ignore(self) -> None:
        """From now on these signals do nothing: they would kill an interpreter that is on its way out."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _set_rendezvous(env) -> None:
    """Under srun: meet at the job's first host, at a port derived from the job id."""
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            raise DistError(f"{' '.join(command)}: {error}; set MASTER_ADDR to the job's first host") from error
        env["MASTER_ADDR"] = hosts[0]
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
