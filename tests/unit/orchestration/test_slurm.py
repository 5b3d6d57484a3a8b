"""Tests of SLURM functions that need no cluster; tests/slurm has the others."""

from __future__ import annotations

import json
import subprocess

import pytest
from checkout import ROOT

from sdtrain.orchestration import slurm


def test_reasons_of_failed_jobs_are_quoted_from_slurm(tmp_path):
    log = tmp_path / ".snakemake/slurm_logs/rule_train/demo_stage1_400/12.log"
    log.parent.mkdir(parents=True)
    words = ["slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***"]
    words += [f"srun: error: n{n}: task {n}: Killed" for n in range(9)]
    log.write_text("\n".join(["Building DAG of jobs...", words[0], *words, "Error in rule train:"]))
    said = f"Error in rule train:\n    log: logs/train.log, {log} (check log file(s) for error details)\n" * 2
    assert slurm.reasons(said) == [f"rule train, SLURM job 12, {log}:", *[f"  {word}" for word in words[:5]]]
    log.unlink()
    assert slurm.reasons(said) == [] == slurm.reasons("")


@pytest.mark.parametrize(
    ("marker", "job"), [(None, "7"), ({"images": 8, "warned": False}, "7"), ({"images": 8, "warned": True}, "")]
)
def test_only_a_job_warned_by_slurm_is_requeued(tmp_path, monkeypatch, marker, job):
    if marker:
        (tmp_path / "requeue").write_text(json.dumps(marker))
    monkeypatch.setenv("SLURM_JOB_ID", job)
    words = [ROOT / "workflow/scripts/requeue.sh", tmp_path / "requeue"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stdout) == (1, "")
