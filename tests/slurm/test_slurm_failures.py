"""Tests of failures on a cluster: the message names the rule, the job and its log."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import FILES, NODES, Call, command, copy_profile, edit_resources, executable, running, snakemake, wait_for
from conftest import STEPS, stage_folder, write_run

pytestmark = pytest.mark.timeout(600)


@contextmanager
def training(folder: Path, name: str, first: Path | None = None, steps: int = STEPS, **resources) -> Iterator[Call]:
    """Train a run with other resources of the rule train."""
    write_run(folder, name, steps)
    edit_resources(folder, profile := copy_profile(folder, name), train=resources)
    words = ("--config", f"run={name}", "--retries", "0", "--", "stages")
    with snakemake(folder, *words, profile=profile, first=first) as call:
        yield call


def names_rule_job_and_log(said: str) -> str:
    """Assert that the output names rule, job and log; return the text of the log."""
    assert "Error in rule train:" in said
    job = re.search(r"external_jobid: (\d+)", said)[1]
    assert f"SLURM-job '{job}' failed" in said
    return Path(re.search(rf"\S+/{job}\.log", said)[0]).read_text()


def test_jobs_refused_by_sbatch_name_the_reason(ready):
    """Plan three runs in one invocation; each requests something that the cluster does not have."""
    partition, constraint = {"none": "nowhere", "closed": "lab", "feature": "gpu"}, {"feature": "unheard-of"}
    for run in partition:
        write_run(ready, f"refused-{run}")
    choices = {f"refused-{run}": value for run, value in partition.items()}
    features = {f"refused-{run}": value for run, value in constraint.items()}
    edit_resources(
        ready,
        profile := copy_profile(ready, "refused"),
        train={"slurm_partition": f"{choices}[wildcards.run]", "constraint": f"{features}.get(wildcards.run)"},
    )
    targets = [f"results/runs/{run}/stage1/{8 * STEPS}/train.json" for run in choices]
    words = ("--config", "run=refused-none", "--retries", "0", "--keep-going", "--", *targets)
    with snakemake(ready, *words, profile=profile) as call:
        assert call.ends() == 1
    for message in (
        "invalid partition specified: nowhere",
        "Invalid account or account/partition combination specified",
        "Invalid feature specification",
    ):
        assert message in call.said()
    assert "rule train" in call.said()


def test_exceeded_memory_is_named(ready):
    with training(ready, "greedy", mem_mb=30) as call:
        assert call.ends() == 1
    assert "exceeded memory limit" in names_rule_job_and_log(call.said())
    assert "exceeded memory limit" in call.said()


def test_exceeded_time_limit_is_named(ready):
    with training(ready, "slow", steps=300, slurm_extra="'--no-requeue'") as call:
        wait_for(lambda: (stage_folder(ready, "slow") / "log.jsonl").exists(), "the training to begin", 100, call.said)
        (job,) = running(ready, "slow")
        command("scontrol", "update", f"jobid={job.id}", "endtime=now+1")
        assert call.ends() == 1
    assert "DUE TO TIME LIMIT" in names_rule_job_and_log(call.said())
    assert "DUE TO TIME LIMIT" in call.said()


def test_environment_missing_on_a_node_is_named(ready):
    tools = FILES / "private/bin"  # the last node does not see this folder
    tools.mkdir(exist_ok=True)
    executable(tools / "python", f'#!/bin/bash\nexec {shutil.which("python")} "$@"\n')
    with training(ready, "nowhere", first=tools, slurm_extra=f"'--nodelist=n1,n{NODES}'") as call:
        assert call.ends() == 1
    assert f"n{NODES}: {tools}/python is not on this node" in names_rule_job_and_log(call.said())


# ---------------------------------------------------------------- files that appear late
@contextmanager
def lagging(folder: Path, seconds: float) -> Iterator[None]:
    """Share a folder between the last node and all others with a delay of `seconds`."""
    (slurmd,) = command("pgrep", "-f", f"slurmd -D -N n{NODES}$").split()
    sides = folder, Path(f"/proc/{slurmd}/root{folder}")
    for side in sides:
        side.mkdir(parents=True)
    over = threading.Event()

    def carry() -> None:
        while not over.wait(0.2):
            for here, there in (sides, sides[::-1]):
                for path in [p for p in here.rglob("*") if p.is_file() and not p.name.endswith(".tmp")]:
                    copy = there / path.relative_to(here)
                    if not copy.exists() and time.time() - path.stat().st_mtime > seconds:
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(path, copy)

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("wait", "code"), [(30, 0), (2, 1)])
def test_late_files_are_waited_for_until_latency_wait(ready, wait, code):
    name = f"late{wait}"
    (ready / f"configs/data/{name}.yaml").write_text(
        "table: {path: images/table.csv, columns: {url: URL, caption: TEXT}}"
    )
    (ready / "results/data").mkdir(parents=True, exist_ok=True)
    (ready / f"results/data/{name}").symlink_to(FILES / "private" / name)
    profile = copy_profile(ready, name)
    edit_resources(ready, profile, fetch_table={"slurm_extra": f"'--nodelist=n{NODES}'"})
    words = ("--retries", "0", "--latency-wait", str(wait), "--config", "run=tiny", "--")
    with (
        lagging(FILES / "private" / name, 6),
        snakemake(ready, *words, f"results/data/{name}/table.parquet", profile=profile) as call,
    ):
        assert call.ends() == code, call.said()
    if code:
        assert "fetch_table" in call.said() and "latency" in call.said()
