"""Tests of a training as one job of several nodes: its shape, its ranks and its weights."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from checkout import ROOT
from cluster import (
    NODES,
    command,
    copy_profile,
    edit_resources,
    ended,
    executable,
    running,
    slurm,
    snakemake,
    start_now,
    state,
    wait_for,
)
from conftest import assert_identical, frozen, saved, stage_folder, write_run

pytestmark = pytest.mark.timeout(600)


def status(folder: Path, run: str) -> str:
    return command("python", "workflow/scripts/status.py", f"run={run}", folder=folder)


def test_two_nodes_give_the_same_training_as_torchrun(ready, undisturbed):
    """Check also that `make status` shows the job while it waits and while it runs."""
    write_run(ready, "plain")
    with snakemake(ready, "--config", "run=plain", "--", "stages") as call:
        (job,) = wait_for(lambda: running(ready, "plain"), "the job to be submitted", 60, call.said)
        shown = status(ready, "plain")
        assert job.id in shown and "train" in shown and "stage1" in shown
        wait_for(lambda: (stage_folder(ready, "plain") / "log.jsonl").exists(), "the training to begin", 100, call.said)
        assert job.log.exists()
        shown = status(ready, "plain")
        assert "RUNNING" in shown and str(job.log.relative_to(ready)) in shown and "training" in shown
        call.succeeds()
    assert "480 of 480 images" in status(ready, "plain")
    assert_identical(ready, "plain", undisturbed)
    assert ended(ready, "train")[-1].nodes == 2


def test_torchrun_under_slurm_gives_the_same_training(ready, undisturbed):
    """Use the lines of docs/slurm.md: one task per node, the rest of the job unchanged."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/slurm.md").read_text(), re.DOTALL)
    (values,) = [yaml.safe_load(block) for block in blocks if "torch.distributed.run" in block]
    write_run(ready, "elastic")
    edit_resources(ready, profile := copy_profile(ready, "elastic"), train=values)
    with snakemake(ready, "--config", "run=elastic", "--", "stages", profile=profile) as call:
        call.succeeds()
    assert_identical(ready, "elastic", undisturbed)


def test_sbatch_script_resumes_after_a_requeue_with_identical_weights(ready, undisturbed):
    write_run(ready, "script")
    shape = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gres=gpu:2", "--mem=4000")
    words = (*shape, "profiles/slurm/multinode.sbatch", f"config={frozen(ready, 'script')}")
    (ready / "logs/slurm").mkdir(parents=True)
    job = command("sbatch", "--parsable", *words, folder=ready).strip()
    log_file = ready / f"logs/slurm/sd-training-{job}.out"
    said = lambda: log_file.read_text() if log_file.exists() else state(job)  # noqa: E731
    wait_for(lambda: saved(ready, "script"), "a checkpoint", 120, said)
    command("scontrol", "requeue", job)
    start_now(job)
    wait_for(lambda: state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "its end", 200, said)
    assert state(job) == "COMPLETED" and "resumed at" in said(), said()
    assert_identical(ready, "script", undisturbed)


# ---------------------------------------------------------------- the shape of the job
PROBE = """#!/bin/bash
echo "$SLURM_PROCID $SLURM_LOCALID $SLURM_STEP_NUM_TASKS $(hostname) $SLURM_CPUS_PER_TASK $CUDA_VISIBLE_DEVICES" \\
    > "$PROBED/$SLURM_PROCID"
"""
RECORD = """#!/bin/bash
printf '%s\\n' "$@" > "$PROBED/sbatch"
exec {sbatch} "$@"
"""


def test_shipped_profile_starts_sixteen_nodes_of_eight_ranks(ready, tmp_path, monkeypatch):
    """Use the shipped profile, except for the program of each rank; check also the options of sbatch."""
    write_run(ready, "large")
    profile = copy_profile(ready, "large", of=ROOT / "profiles/slurm")
    executable(probe := tmp_path / "probe.sh", PROBE)
    ranks = "profiles/slurm/rank.sh $(command -v python)"
    launch = shipped_launch()
    assert launch.endswith(ranks)
    edit_resources(ready, profile, train={"launch": f"'{launch.removesuffix(ranks)}{probe}'"})
    executable(tmp_path / "sbatch", RECORD.format(sbatch="/usr/bin/sbatch"))
    monkeypatch.setenv("PROBED", str(tmp_path))
    options = ("--retries", "0", "--latency-wait", "2")
    with snakemake(ready, "--config", "run=large", *options, "--", "stages", profile=profile, first=tmp_path) as call:
        assert call.ends() == 1  # the probe trains nothing
    assert "train.json" in call.said()

    given = (tmp_path / "sbatch").read_text().split("\n")
    for word in ("--nodes=16", "--ntasks-per-node=8", "--cpus-per-task=6", "--gres=gpu:8", "--exclusive", "--requeue"):
        assert word in given
    assert not [word for word in given if word.startswith(("--ntasks-per-gpu", "--gpus"))]

    rows = [path.read_text().split() for path in tmp_path.iterdir() if path.name.isdigit()]
    assert sorted(int(row[0]) for row in rows) == list(range(128))
    assert {row[2] for row in rows} == {"128"} and {row[4] for row in rows} == {"6"}
    assert Counter(row[3] for row in rows) == {f"n{n}": 8 for n in range(1, NODES + 1)}
    assert {row[5] for row in rows} == {"0,1,2,3,4,5,6,7"}
    assert Counter(row[1] for row in rows) == {str(n): 16 for n in range(8)}  # a separate GPU for each rank of a node


def shipped_launch() -> str:
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    return profile["set-resources"]["train"]["launch"].strip("'")


# ---------------------------------------------------------------- another number of ranks than planned
@pytest.mark.parametrize(
    ("train", "came"),
    [
        ({"launch": "'srun profiles/slurm/rank.sh $(command -v python)'"}, 2),  # without the counts
        ({"launch": "'profiles/slurm/rank.sh $(command -v python)'"}, 1),  # without srun
    ],
)
def test_unplanned_number_of_ranks_is_refused(ready, train, came):
    write_run(ready, f"short{came}")
    edit_resources(ready, profile := copy_profile(ready, f"short{came}"), train=train)
    with snakemake(ready, "--config", f"run=short{came}", "--retries", "0", "--", "stages", profile=profile) as call:
        assert call.ends() == 1
    assert f"distributed.world_size: 4 ranks were planned, but {came} were started" in call.said()
    assert not (stage_folder(ready, f"short{came}") / "checkpoints").exists()


def test_set_resources_that_replace_the_profile_are_refused(ready):
    """A key on the command line replaces the whole key of the profile, so all other resources are missing."""
    write_run(ready, "bare")
    with snakemake(ready, "--config", "run=bare", "--set-resources", "train:nodes=4", "--", "stages") as call:
        assert call.ends() == 1
    assert "--set-resources" in call.said() and "cp -r profiles/slurm profiles/mine" in call.said()
    assert not [job for job in slurm.jobs(ready) if job.rule]
