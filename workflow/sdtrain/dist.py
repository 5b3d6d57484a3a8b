"""Rank and world size from torchrun, else SLURM, else one process; the only reader of those variables."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class DistError(RuntimeError):
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


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The average of a tensor over all ranks (in place)."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank; all ranks get the same answer."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


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
