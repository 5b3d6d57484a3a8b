"""Rank and world from torchrun, SLURM or neither; real processes for what they do together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdtrain import dist
from sdtrain.dist import DistError, World

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2", "SLURM_JOB_ID": "123456"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, World(0, 1, 0, "single")),
        (TORCHRUN, World(3, 4, 1, "torchrun")),
        (SLURM, World(5, 8, 2, "slurm")),
        ({**SLURM, **TORCHRUN}, World(3, 4, 1, "torchrun")),  # torchrun inside a SLURM job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World(0, 1, 0, "single")),  # the batch shell of a job
        ({"RANK": "1"}, World(0, 1, 0, "single")),
    ],
)
def test_world_reads_the_launcher(environ, expected):
    assert dist.world(environ) == expected
    assert expected.main == (expected.rank == 0)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Write a command of that name in front of all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(body: str):
        path = tmp_path / "scontrol"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return write


def test_slurm_ranks_meet_at_the_first_host(scontrol):
    scontrol('[ "$1 $2 $3" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"')
    env = {**SLURM, "SLURM_JOB_NODELIST": "node[7-8]"}
    dist._set_rendezvous(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node7", str(20000 + 123456 % 20000))
    env = {**SLURM, "MASTER_ADDR": "chosen", "MASTER_PORT": "1"}
    dist._set_rendezvous(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("chosen", "1")


def test_scontrol_that_fails_or_is_absent_leaves_a_remedy(scontrol):
    env = {**SLURM, "SLURM_JOB_NODELIST": "node7"}
    with pytest.raises(
        DistError, match="scontrol show hostnames node7: .*No such file.*set MASTER_ADDR to the job's first"
    ):
        dist._set_rendezvous(env)
    scontrol("exit 3")
    with pytest.raises(DistError, match="scontrol show hostnames node7: .*exit status 3.*set MASTER_ADDR"):
        dist._set_rendezvous(env)


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_needs_no_group(alone):
    here, device = dist.start()
    assert here == World(0, 1, 0, "single") and device.type in ("cpu", "cuda")
    assert dist.mean(torch.tensor([2.0, 4.0])).tolist() == [2.0, 4.0]
    assert dist.any_rank(True, torch.device("cpu")) and not dist.any_rank(False, torch.device("cpu"))
    dist.barrier()
    dist.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl works here")
def test_nccl_without_cuda_says_what_to_set(alone):
    assert dist.start("nccl")[0].size == 1  # one process needs no backend: the seed's files run on a laptop
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        alone.setenv(name, value)
    with pytest.raises(DistError, match="nccl needs CUDA, which is not here; set distributed.dist_backend=gloo"):
        dist.start("nccl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of gloo")
def test_processes_that_cannot_meet_say_where(alone):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        alone.setenv(name, value)
    with pytest.raises(DistError, match="dist_backend=gloo, distributed.dist_url=env://: 2 processes cannot meet"):
        dist.start("gloo", timeout_minutes=0.01)
    with pytest.raises(DistError, match="dist_backend=glue, .*cannot meet"):
        dist.start("glue", timeout_minutes=0.01)


PROGRAM = """
import os, sys
import torch
from sdtrain import dist
here, device = dist.start("gloo", timeout_minutes=1)
device = torch.device("cpu")
average = dist.mean(torch.tensor([float(here.rank), 10.0]))
answers = [dist.any_rank(here.rank == 1, device), dist.any_rank(False, device)]
dist.barrier()
line = f"{here.rank} {here.size} {here.launcher} {average.tolist()} {answers}\\n"
os.write(sys.stdout.fileno(), line.encode())  # in one piece: both ranks write to one pipe
dist.stop()
"""


def test_two_processes_average_and_agree(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "workflow"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path / "program.py"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.split("\n"))
    assert [f"{rank} 2 torchrun [0.5, 10.0] [True, False]" for rank in (0, 1)] == [line for line in lines if line]
