"""Tests of a complete run, smaller than the demo, by the command: killed during training, then run again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from checkout import set_key
from tiny_run import IMAGES, LOST, make_tiny_run
from trainings import environment, kill_all

RUN = Path("results/runs/tiny")
pytestmark = pytest.mark.timeout(900)  # the first test waits for the whole run, possibly on a busy machine


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_parts, tiny_unet_params) -> Path:
    """Return a working copy whose only run is `tiny`."""
    folder = make_tiny_run(tmp_path_factory.mktemp("workflow") / "checkout", tiny_parts, tiny_unet_params)
    set_key(folder, "tiny.yaml", "system/batch_size", 4)  # as many images per step as two ranks with 2 each
    set_key(folder, "data/tiny.yaml", "shards/parts", 1)
    return folder


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start the workflow with the user's command, on one rank; write its output to the file `output`."""
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--set-resources"]
    command += ["train:tasks_per_node=1", "--config", "run=tiny", *arguments]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = open(folder / "output", "w")
    env = environment(PATH=tools, WANDB_MODE="offline")
    return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)


@pytest.fixture(scope="module")
def finished(checkout) -> Path:
    """Kill the run with all processes after stage 1 wrote a checkpoint, then finish it with the same command."""
    first, deadline = snakemake(checkout), time.monotonic() + 300
    try:
        while not list(checkout.glob(f"{RUN}/stage1/checkpoints/*/[1-9]*/.metadata")):
            assert first.poll() is None and time.monotonic() < deadline, (checkout / "output").read_text()
            time.sleep(0.01)
    finally:
        kill_all(first)
    assert not (checkout / RUN / "stage1/400/train.json").exists()
    assert snakemake(checkout).wait(timeout=280) == 0, (checkout / "output").read_text()
    return checkout


def test_a_failing_step_ends_the_run_with_its_message(checkout):
    (checkout / "configs/data/lost.yaml").write_text("table: {path: images/lost.csv}")
    assert snakemake(checkout, "--", "results/data/lost/table.parquet").wait(timeout=60) == 1
    said = (checkout / "output").read_text()
    assert len([line for line in said.splitlines() if line.startswith("error: ") and "images/lost.csv" in line]) == 1
    assert "Error in rule fetch_table" in said and "completed successfully" not in said
    assert sorted(path.name for path in (checkout / "results/data/lost").iterdir()) == ["config"]


def test_killed_run_resumes_from_its_last_checkpoint(finished):
    said = (finished / "logs/runs/tiny/stage1/400/train.log").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("resumed at")]
    images = int(line.split()[2])
    assert images % 20 == 0 and 0 < images < 400
    entries = [json.loads(line) for line in (finished / RUN / "stage1/log.jsonl").read_text().splitlines()]
    assert [entry["images"] for entry in entries] == list(range(20, 401, 20))
    assert "build_shards" not in (finished / "output").read_text()  # no finished step is repeated


def test_second_invocation_has_nothing_to_do(finished):
    assert snakemake(finished).wait(timeout=120) == 0
    assert "Nothing to be done" in (finished / "output").read_text()


def test_every_row_is_counted_as_kept_or_dropped(finished):
    data = finished / "results/data/tiny"
    manifests = {
        split: json.loads((data / split / "shards/manifest.json").read_text()) for split in ("train", "held_out")
    }
    selected = sum(m["samples"] + sum(m["dropped"].values()) for m in manifests.values())
    assert selected == IMAGES - IMAGES // 10
    assert sum(sum(m["dropped"].values()) for m in manifests.values()) == LOST
    assert manifests["held_out"]["samples"] >= 5
    latents = json.loads((data / "train/latents/tiny-parts-16px/manifest.json").read_text())
    assert latents["samples"] == manifests["train"]["samples"]
    assert not (data / "held_out/latents").exists()


def test_yields_are_printed_and_verify_names_a_flipped_byte(finished):
    assert snakemake(finished, "--", "yields", "verify").wait(timeout=120) == 0
    said = (finished / "output").read_text()
    assert "pwatermark <= 0.5" in said and "expected" in said and "Finished jobid" in said
    folder = next((finished / "results/data/tiny/train/built").glob("*/"))
    shard = sorted(folder.glob("*.tar"))[0]
    whole, times = shard.read_bytes(), shard.stat()
    try:
        shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
        assert snakemake(finished, "--", "verify").wait(timeout=60) == 1
        said = (finished / "output").read_text()
        assert str(shard.relative_to(finished)) in said and "sha256" in said
    finally:
        shard.write_bytes(whole)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_existing_shards_are_resharded_by_metadata(finished):
    (finished / "configs/data/wide.yaml").write_text(CHOSEN)
    manifest = finished / "results/data/wide/train/shards/manifest.json"
    assert snakemake(finished, "--", str(manifest.relative_to(finished))).wait(timeout=60) == 0
    assert "build_shards" not in (finished / "output").read_text()
    images = json.loads((finished / "results/data/tiny/train/shards/manifest.json").read_text())
    chosen = json.loads(manifest.read_text())
    assert 0 < chosen["samples"] < images["samples"] and len(chosen["shards"]) == 2


CHOSEN = """
select: {filters: {caption: "!=a red square"}}
shards: {path: results/data/tiny/train/shards/manifest.json, parts: 2, samples_per_shard: 1000}
"""


def test_every_milestone_is_measured_and_reported(finished):
    metrics = json.loads((finished / RUN / "metrics.json").read_text())
    assert [f"{row['stage']}/{row['images']}" for row in metrics["rows"]] == ["stage1/400", "stage2/16"]
    for record in ("train", "samples", "frechet_distance", "clip_score"):
        assert (finished / RUN / f"stage2/16/{record}.json").exists()
    assert len(list((finished / RUN / "stage2/16/samples").glob("0*.png"))) == 8
    page = (finished / RUN / "report.html").read_text()
    assert "stage2" in page and re.search("data:image/[a-z]+;base64,", page)
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    assert "CLIPScore (tiny-clip)" in page


def test_the_pipeline_samples_offline(finished):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(finished / RUN / "stage2/pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red square", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)


def test_no_process_remains(finished):
    left = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] and Path(p.info["cwd"]).is_relative_to(finished)]
    assert left == []
