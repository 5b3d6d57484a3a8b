"""Tests that an interrupted training ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from cluster import (
    command,
    ended,
    log_of,
    nodes_of,
    overlap,
    running,
    snakemake,
    start_node,
    start_now,
    state,
    urgent_job,
    wait_for,
)
from conftest import STEPS, assert_identical, saved, write_run

pytestmark = pytest.mark.timeout(600)
IMAGES = 8 * STEPS


def train_until_saved(call, run: str) -> str:
    """Wait until a training has written a checkpoint; return the number of its job."""
    wait_for(lambda: saved(call.folder, run), f"a checkpoint of {run}", 200, call.said)
    (job,) = running(call.folder, run)
    assert job.state == "RUNNING"
    return job.id


def assert_resumed_as_one_job(folder: Path, run: str, job: str) -> None:
    """Assert that the same job was requeued once, resumed from a checkpoint and completed."""
    states = [row.state for row in ended(folder) if row.id == job]
    assert len(states) == 2 and states[-1] == "COMPLETED", states
    assert len(resumed(folder, run)) == 1 and 0 < resumed(folder, run)[0] < IMAGES


def resumed(folder: Path, run: str) -> list[int]:
    """Return the images seen at each resume of the run's jobs."""
    text = log_of(folder, "train")
    return [int(n.replace(",", "")) for n in re.findall(rf"resumed at ([\d,]+) images from \S*runs/{run}/", text)]


def test_resume_after_scontrol_requeue_is_identical(ready, undisturbed):
    write_run(ready, "requeued")
    with snakemake(ready, "--config", "run=requeued", "--", "stages") as call:
        job = train_until_saved(call, "requeued")
        command("scontrol", "requeue", job)
        start_now(job)
        call.succeeds()
    assert_resumed_as_one_job(ready, "requeued", job)
    assert_identical(ready, "requeued", undisturbed)


def test_resume_after_preemption_is_identical(ready, undisturbed):
    write_run(ready, "preempted")
    with snakemake(ready, "--config", "run=preempted", "--", "stages") as call:
        job = train_until_saved(call, "preempted")
        with urgent_job(f"--nodelist={nodes_of(job)}"):
            start_now(job)  # on other nodes
            call.succeeds()
    assert_resumed_as_one_job(ready, "preempted", job)
    assert_identical(ready, "preempted", undisturbed)


def test_resume_after_a_lost_node_is_identical(ready, undisturbed):
    """Kill slurmd and all processes of one node at once."""
    write_run(ready, "lost")
    with snakemake(ready, "--config", "run=lost", "--", "stages") as call:
        job = train_until_saved(call, "lost")
        nodes = command("scontrol", "show", "hostnames", nodes_of(job)).split()
        try:
            for process in command("ip", "netns", "pids", f"sd-{nodes[-1]}").split():
                os.kill(int(process), signal.SIGKILL)
            wait_for(lambda: state(job) != "RUNNING", "SLURM to see the loss", 90, call.said)
            if state(job) == "PENDING":
                start_now(job)
            call.succeeds()
        finally:
            start_node(nodes[-1])
    assert 0 < resumed(ready, "lost")[-1] < IMAGES
    assert_identical(ready, "lost", undisturbed)


def test_resume_after_the_time_limit_warning_is_identical(ready, undisturbed):
    """SLURM's warning comes ten minutes before the limit: write a checkpoint, requeue the job, resume."""
    write_run(ready, "limited")
    with snakemake(ready, "--config", "run=limited", "--", "stages") as call:
        job = train_until_saved(call, "limited")
        ranks = ranks_of("limited")
        assert len(ranks) == 4
        for rank in ranks:
            rank.suspend()  # a fast training would end before SLURM checks the time; the signal wakes the ranks
        command("scontrol", "update", f"jobid={job}", "timelimit=11")
        wait_for(lambda: state(job) == "PENDING", "the job back in the queue", 120, call.said)
        command("scontrol", "update", f"jobid={job}", "timelimit=600")
        start_now(job)
        call.succeeds()
    assert "goes back into the queue" in log_of(ready, "train")
    assert_resumed_as_one_job(ready, "limited", job)
    assert_identical(ready, "limited", undisturbed)


def ranks_of(run: str) -> list[psutil.Process]:
    """Return the processes that train a run."""
    processes = psutil.process_iter(["name", "cmdline"])
    ours = [p for p in processes if f"config=results/runs/{run}/stage1/config/train.yaml" in (p.info["cmdline"] or ())]
    return [p for p in ours if p.info["name"].startswith("python")]


def test_resume_after_scancel_is_identical(ready, undisturbed):
    write_run(ready, "cancelled")
    with snakemake(ready, "--config", "run=cancelled", "--retries", "0", "--", "stages") as call:
        job = train_until_saved(call, "cancelled")
        command("scancel", job)
        assert call.ends() == 1
        assert "Error in rule train" in call.said() and job in call.said()
    with snakemake(ready, "--config", "run=cancelled", "--", "stages") as call:
        call.succeeds()
    assert 0 < resumed(ready, "cancelled")[-1] < IMAGES
    assert_identical(ready, "cancelled", undisturbed)


def test_second_invocation_waits_for_jobs_of_a_killed_one(ready, undisturbed):
    """The job of the killed invocation continues; the second one waits for it and trains nothing twice."""
    write_run(ready, "orphaned")
    with snakemake(ready, "--config", "run=orphaned", "--", "stages") as first:
        orphan = train_until_saved(first, "orphaned")
        first.process.kill()
        first.process.wait()
        with snakemake(ready, "--config", "run=orphaned", "--", "stages") as second:
            waits = "waiting for SLURM jobs of an earlier invocation"
            wait_for(lambda: waits in second.said(), "its message", 60, second.said)
            assert [job.id for job in running(ready, "orphaned")] == [orphan]
            second.succeeds()
    jobs = [row for row in ended(ready, "train") if int(row.id) >= int(orphan)]
    assert jobs[0].state == "COMPLETED" and len(jobs) <= 2 and all(overlap(jobs[0], job) <= 0 for job in jobs[1:])
    assert resumed(ready, "orphaned") in ([], [IMAGES])
    assert_identical(ready, "orphaned", undisturbed)


def test_edits_do_not_affect_a_waiting_job(ready, undisturbed):
    """Edits that make the configuration invalid have no effect either."""
    write_run(ready, "edited")
    files = [ready / "configs/edited.yaml", ready / "configs/data/ready.yaml", ready / "configs/components.yaml"]
    before = [file.read_text() for file in files]
    try:
        with snakemake(ready, "--config", "run=edited", "--", "stages") as call, urgent_job("--nodes=16") as blocker:
            (job,) = wait_for(lambda: running(ready, "edited"), "the job to be submitted", 60, call.said)
            assert job.state == "PENDING"
            write_run(ready, "edited", 2 * STEPS, milestones=[8, 16], seed=7)
            files[1].write_text("shards: {path: elsewhere.tar}")
            files[2].write_text("no: [yaml")
            command("scancel", blocker)
            call.succeeds()
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)
    assert_identical(ready, "edited", undisturbed)
