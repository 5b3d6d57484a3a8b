"""Training as one job of two nodes: its shape, its ranks, and what it learns."""

from __future__ import annotations

import json

import pytest
from cluster import snakemake
from conftest import stage_folder, write_run
from trainings import last_checkpoint, log, same

pytestmark = pytest.mark.timeout(600)


def test_two_nodes_learn_what_torchrun_learns(ready, undisturbed):
    write_run(ready, "plain")
    with snakemake(ready, "--config", "run=plain", "--", "stages") as call:
        call.succeeds()
    stage = stage_folder(ready, "plain")
    assert json.loads((stage / "960/train.json").read_text())["world_size"] == 4
    assert same(last_checkpoint(stage), last_checkpoint(undisturbed))
    assert log(stage) == log(undisturbed)
