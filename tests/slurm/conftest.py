"""Fixtures of the SLURM tests: a working copy with data, on the test cluster that `make test-slurm` starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster import FILES, own_profile, snakemake, surroundings
from tiny_run import make_tiny_run
from trainings import SCRIPTS, TORCHRUN, last_checkpoint, log, same, weights

HERE = Path(__file__).parent
STEPS = 60  # of a training that `write_run` describes, each of 8 images: 2 nodes x 2 ranks x 2


def why_not() -> str | None:
    """Return why there is no test cluster, or None if there is one."""
    if missing := [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(tool)]:
        return f"{', '.join(missing)} not installed (packages munge, slurmctld, slurmd, slurm-client)"
    if not (FILES / "pids").exists():
        return "no test cluster; run as root: make test-slurm"
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True)
    return None if "is UP" in ping.stdout else f"the test cluster is down: {ping.stdout}{ping.stderr}"


def pytest_collection_modifyitems(items) -> None:
    """Skip these tests if there is no cluster; fail if SLURM_TESTS=required."""
    own = [item for item in items if HERE in item.path.parents]
    if not own or not (reason := why_not()):
        return
    if os.environ.get("SLURM_TESTS") == "required":
        raise pytest.UsageError(f"SLURM_TESTS=required, but {reason}")
    for item in own:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def ready(tmp_path_factory, tiny_parts, tiny_unet_params, image_shards) -> Path:
    """Return a working copy with components and shards, so that runs of `write_run` only need training."""
    folder = make_tiny_run(tmp_path_factory.mktemp("ready") / "checkout", tiny_parts, tiny_unet_params)
    own_profile(folder)
    shutil.copytree(image_shards, folder / "shards")
    (folder / "configs/data/ready.yaml").write_text("shards: {path: 'shards/*.tar'}")
    write_run(folder, "prepared")
    targets = ("data", "resources/components/tiny-parts.json")
    with snakemake(folder, "--config", "run=prepared", "--", *targets, profile="profiles/local") as call:
        call.succeeds()
    return folder


def write_run(folder: Path, name: str, steps: int = STEPS, **experiment) -> None:
    """Write a run with one stage of `steps` steps of 8 images; runs of different names train identically."""
    tiny = yaml.safe_load((folder / "configs/tiny.yaml").read_text())
    experiment = {"num_examples_to_see": 8 * steps, "save_every": 5, "log_every": 1, **experiment}
    stage = {"experiment": experiment, "dataset": {"params": {"resolution": 32, "flip": True}}}
    run = {**tiny, "data": "ready", "stages": {"stage1": stage}}
    (folder / f"configs/{name}.yaml").write_text(yaml.safe_dump(run))


def stage_folder(folder: Path, run: str) -> Path:
    """Return the folder of the run's only stage."""
    return folder / "results/runs" / run / "stage1"


def frozen(folder: Path, run: str) -> str:
    """Let the workflow freeze the configuration of a run's stage; return its path in the working copy."""
    path = str((stage_folder(folder, run) / "config/train.yaml").relative_to(folder))
    with snakemake(folder, "--config", f"run={run}", "--", path, profile="profiles/local") as call:
        call.succeeds()
    return path


def torchrun(folder: Path, run: str) -> Path:
    """Train a run with torchrun, on this machine and without the workflow; return the folder of its stage."""
    words = [*TORCHRUN[:-1], "4", str(SCRIPTS / "train.py"), f"config={frozen(folder, run)}"]
    done = subprocess.run(words, cwd=folder, env=surroundings(), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return stage_folder(folder, run)


@pytest.fixture(scope="session")
def undisturbed(ready) -> Path:
    """Return the stage folder of an uninterrupted training with torchrun."""
    write_run(ready, "undisturbed")
    return torchrun(ready, "undisturbed")


def saved(folder: Path, run: str) -> int:
    """Return the images seen at the newest complete checkpoint, or 0 if there is none."""
    found = stage_folder(folder, run).glob("checkpoints/*/[1-9]*/.metadata")
    return max((int(path.parent.name) for path in found), default=0)


def assert_identical(folder: Path, run: str, undisturbed: Path) -> None:
    """Assert four ranks and identical weights, EMA, optimizer state, counts, log and exported pipeline."""
    stage = stage_folder(folder, run)
    assert json.loads((stage / f"{8 * STEPS}/train.json").read_text())["world_size"] == 4
    assert same(last_checkpoint(stage), last_checkpoint(undisturbed))
    assert same(weights(stage / "pipeline"), weights(undisturbed / "pipeline"))
    assert log(stage) == log(undisturbed)
    assert not (stage / "requeue").exists()
