"""Tests of rank and world size from torchrun, SLURM or neither, and of collectives between real processes."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from ranks import run_ranks

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.distributed import DistError, World
from sdtrain.training import parallel
from sdtrain.training.step import Sizes

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
def test_world_is_read_from_the_launcher_variables(environ, expected):
    assert distributed.world(environ) == expected
    assert expected.is_main == (expected.rank == 0)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Return a function that writes a fake scontrol, which replaces an installed one."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(body: str):
        path = tmp_path / "scontrol"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return write


def test_slurm_ranks_rendezvous_at_the_first_host(scontrol):
    scontrol('[ "$1 $2 $3" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"')
    env = {**SLURM, "SLURM_JOB_NODELIST": "node[7-8]"}
    distributed._set_rendezvous(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node7", str(20000 + 123456 % 20000))
    env = {**SLURM, "MASTER_ADDR": "chosen", "MASTER_PORT": "1"}
    distributed._set_rendezvous(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("chosen", "1")


def test_failing_or_missing_scontrol_names_the_remedy(scontrol):
    env = {**SLURM, "SLURM_JOB_NODELIST": "node7"}
    with pytest.raises(
        DistError, match="scontrol show hostnames node7: .*No such file.*set MASTER_ADDR to the job's first"
    ):
        distributed._set_rendezvous(env)
    scontrol("exit 3")
    with pytest.raises(DistError, match="scontrol show hostnames node7: .*exit status 3.*set MASTER_ADDR"):
        distributed._set_rendezvous(env)


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_another_number_of_ranks_than_planned_is_refused():
    here = World(0, 2, 0, "slurm")
    distributed.check_world_size(None, here)
    distributed.check_world_size(2, here)
    with pytest.raises(
        DistError, match="distributed.world_size: 128 ranks were planned, but 2 were started .slurm.; .*launch line"
    ):
        distributed.check_world_size(128, here)


def test_one_process_needs_no_process_group(alone):
    here, device = distributed.start()
    assert here == World(0, 1, 0, "single") and device.type in ("cpu", "cuda")
    assert distributed.all_reduce_sum(torch.tensor([2.0, 4.0])).tolist() == [2.0, 4.0]
    assert (
        distributed.broadcast_object("a") == "a"
        and distributed.gather_objects("a") == ["a"]
        and distributed.cpu_group() is None
        and distributed.silent_ranks() == []
    )
    distributed.barrier()
    distributed.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl works here")
def test_nccl_without_cuda_names_the_key_to_set(alone):
    assert distributed.start("nccl")[0].size == 1  # one process needs no backend
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        alone.setenv(name, value)
    with pytest.raises(DistError, match="nccl needs CUDA, which is not available; set distributed.dist_backend=gloo"):
        distributed.start("nccl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="expects the gloo backend")
def test_failed_rendezvous_names_backend_and_address(alone):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        alone.setenv(name, value)
    with pytest.raises(DistError, match="dist_backend=gloo, distributed.dist_url=env://: 2 processes could not join"):
        distributed.start("gloo", timeout_minutes=0.01)
    with pytest.raises(DistError, match="dist_backend=glue, .*could not join"):
        distributed.start("glue", timeout_minutes=0.01)


def agree(rank: int):
    sums = distributed.all_reduce_sum(torch.tensor([float(rank), 10.0])).tolist()
    assert distributed.cpu_group(1.0).size() == 2 and distributed.broadcast_object(["of", rank]) == ["of", 0]
    return sums, distributed.gather_objects({"rank": rank})


def test_collectives_of_two_ranks():
    (sums, gathered), other = run_ranks(agree, 2)
    assert sums == other[0] == [1.0, 20.0]
    assert gathered == [{"rank": 0}, {"rank": 1}] and other[1] is None


def meet(rank: int, system) -> list[float]:
    """Leave the group and start it again with the settings of a `system` section."""
    distributed.stop()
    distributed.start(system.dist_backend, system.dist_url, timeout_minutes=0.5)
    return distributed.all_reduce_sum(torch.tensor([1.0, float(rank)])).tolist()


def test_dist_url_sets_the_rendezvous(tmp_path):
    where = ["distributed.dist_backend=gloo", f"distributed.dist_url=file://{tmp_path}/store"]
    section = load_config(schema.StageConfig, overrides=where).system
    assert run_ranks(meet, 2, section) == [[2.0, 1.0]] * 2 and (tmp_path / "store").exists()


def lose(rank: int, dead: int, folder) -> list[int]:
    """Kill one rank; the others call a collective, which fails, and determine the silent ranks."""
    distributed.barrier()  # all ranks have joined
    if rank == dead:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        distributed.all_reduce_sum(torch.zeros(1))
    except RuntimeError:
        silent = distributed.silent_ranks(2.0)
        (folder / str(rank)).write_text(str(silent))
    os._exit(0)


@pytest.mark.parametrize("dead", [0, 1])
def test_dead_rank_is_named(tmp_path, dead):
    with pytest.raises(AssertionError, match="came to no end"):
        run_ranks(lose, 2, dead, tmp_path)
    assert (tmp_path / str(1 - dead)).read_text() == str([dead])


# ---------------------------------------------------------------- sizes
def system(**values):
    return load_config(schema.SystemConfig, values={"dist_backend": None, "dist_url": "", **values})


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        ({"batch_size": 4}, 2, (4, 1, 8)),
        ({"batch_size": 4, "gradient_accumulation": 3}, 2, (4, 3, 24)),
        ({"batch_size": 4, "global_batch": 64}, 2, (4, 8, 64)),
        ({"batch_size": 4, "global_batch": 64, "gradient_accumulation": 99}, 16, (4, 1, 64)),
    ],
)
def test_global_batch_determines_the_accumulation(values, world_size, expected):
    micro_batch, global_batch = parallel.batch_sizes(system(**values), world_size)
    assert (micro_batch, Sizes(0, world_size, micro_batch, global_batch).accumulation, global_batch) == expected


def test_indivisible_global_batch_is_refused_with_a_valid_value():
    with pytest.raises(
        DistError, match="global_batch: 50 is not a multiple of 2 ranks x system.batch_size=8; set it to 48"
    ):
        parallel.batch_sizes(system(batch_size=8, global_batch=50), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_auto_batch_size_needs_a_gpu():
    with pytest.raises(DistError, match="system.batch_size: auto measures what fits a GPU, and there is none"):
        parallel.batch_sizes(system(batch_size="auto", global_batch=64), 2)


def test_auto_batch_size_needs_a_global_batch_divisible_by_the_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.batch_sizes(system(batch_size="auto", global_batch=64), 2) == (None, 64)
    for size in (None, 63):
        with pytest.raises(DistError, match=f"system.global_batch, a multiple of the 2 ranks; it is {size}"):
            parallel.batch_sizes(system(batch_size="auto", global_batch=size), 2)


# ---------------------------------------------------------------- signals
def test_signals_are_recorded_and_then_ignored():
    before = {number: signal.getsignal(number) for number in distributed.StopHandler.SIGNALS}
    try:
        for number in distributed.StopHandler.SIGNALS:
            stop = distributed.StopHandler()
            stop.listen()
            assert stop.name is None and not stop.agreed
            os.kill(os.getpid(), number)
            assert stop.name == signal.Signals(number).name
        stop.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
