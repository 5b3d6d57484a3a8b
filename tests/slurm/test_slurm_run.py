"""Tests of `snakemake --profile slurm`, unchanged, from a table to a report; and of many grouped jobs."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from cluster import UNCHANGED, edit_profile, ended, overlap, own_profile, snakemake
from samples import make_sample, write_tar
from tiny_run import make_tiny_run

pytestmark = pytest.mark.timeout(900)
LOCAL = {"all", "freeze", "download_component", "gather_shards", "report"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_parts, tiny_unet_params):
    """Run a working copy's default run from table to report; return the folder and Snakemake's output."""
    folder = make_tiny_run(tmp_path_factory.mktemp("run") / "checkout", tiny_parts, tiny_unet_params)
    own_profile(folder)
    edit_profile(folder, **{"slurm-init-seconds-before-status-checks": 5})
    stages = (folder / "configs/tiny.yaml").read_text()
    stages = stages.replace("{num_examples_to_see: 400}", "{num_examples_to_see: 400, milestones: [200]}")
    (folder / "configs/demo.yaml").write_text(stages)
    with snakemake(folder, program=UNCHANGED) as call:
        return folder, call.succeeds(800)


def test_run_leads_from_a_table_to_a_report(finished):
    folder, said = finished
    assert (folder / "results/runs/demo/report.html").exists()
    metrics = json.loads((folder / "results/runs/demo/metrics.json").read_text())
    assert [f"{row['stage']}/{row['images']}" for row in metrics["rows"]] == ["stage1/200", "stage1/400", "stage2/16"]
    assert {row.state for row in ended(folder)} == {"COMPLETED"}
    assert all(row.nodes == 2 for row in ended(folder, "train")) and len(ended(folder, "train")) == 3


def test_only_small_rules_are_local_and_all_others_are_jobs(finished):
    folder, said = finished
    submitted = {path.name.removeprefix("rule_") for path in (folder / ".snakemake/slurm_logs").glob("rule_*")}
    assert {*re.findall(r"^localrule (\w+):", said, re.MULTILINE)} == LOCAL
    assert {*re.findall(r"^rule (\w+):", said, re.MULTILINE)} == submitted and not submitted & LOCAL


def test_a_milestone_is_measured_while_the_next_one_trains(finished):
    folder, _ = finished
    logs = folder / ".snakemake/slurm_logs"
    (sample,) = [path.stem for path in logs.glob("rule_sample/demo_stage1_200/*.log")]
    (train,) = [path.stem for path in logs.glob("rule_train/demo_stage1_400/*.log")]
    rows = {row.id: row for row in ended(folder)}
    assert overlap(rows[sample], rows[train]) > 0


def test_second_invocation_has_nothing_to_do(finished):
    folder, _ = finished
    with snakemake(folder, program=UNCHANGED) as call:
        assert "Nothing to be done" in call.succeeds(60)


# ---------------------------------------------------------------- many jobs
PARTS, IN_A_GROUP, IN_FLIGHT = 20, 4, 3


def test_jobs_are_grouped_and_their_number_is_limited(finished):
    """A group is one SLURM job; the number of jobs in the queue and the rate of submission are limited."""
    folder, _ = finished
    (folder / "many").mkdir()
    tar = write_tar(folder / "many/00000.tar", [make_sample(n) for n in range(2)])
    for number in range(1, PARTS):
        shutil.copyfile(tar, folder / f"many/{number:05d}.tar")
    (folder / "configs/data/many.yaml").write_text(f"shards: {{path: 'many/*.tar', parts: {PARTS}}}")
    limits = {"jobs": IN_FLIGHT, "max-jobs-per-timespan": "1/3s", "group-components": {"index": IN_A_GROUP}}
    edit_profile(folder, **limits)
    target = "results/data/many/train/shards/manifest.json"
    before = {row.id for row in ended(folder)}
    with snakemake(folder, "--", target) as call:
        call.succeeds(850)
    manifest = json.loads((folder / target).read_text())
    assert manifest["samples"] == 2 * PARTS and len(manifest["shards"]) == PARTS

    jobs = [row for row in ended(folder) if row.id not in before]
    assert len(jobs) == -(-PARTS // IN_A_GROUP) and {row.state for row in jobs} == {"COMPLETED"}
    assert max(sum(b.start <= a.start < b.end for b in jobs) for a in jobs) == IN_FLIGHT
    submitted = sorted(row.submitted for row in jobs)
    pauses = [(b - a).total_seconds() for a, b in zip(submitted, submitted[1:], strict=False)]
    assert min(pauses) >= 2  # the table has whole seconds
