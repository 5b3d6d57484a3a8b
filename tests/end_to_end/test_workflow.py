"""A whole run, smaller than the demo, by the real command: killed in the middle of training, called again, finished."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from checkout import make_checkout
from PIL import Image
from trainings import environment, kill_all

RUN = Path("results/runs/tiny")
COLOURS = ("red", "green", "blue", "white", "black")
IMAGES, LOST = 60, 3
pytestmark = pytest.mark.timeout(900)  # the first test of a run waits for it, on a busy machine too

DATA = """
table:
  path: images/table.csv
  columns: {url: URL, caption: TEXT}
select:
  filters: {pwatermark: "<=0.5"}
  held_out: {column: url, fraction: 0.25}
shards: {image_size: 64, samples_per_shard: 16, columns: [pwatermark], parts: 2}
latents: {text_encoder: tiny-parts, posterior: moments}
"""
# Stage 1 on latents of 16 px, long enough to be killed; stage 2 on images of 32 px
STAGES = """
data: tiny
system: {batch_size: 2, workers: 0, threads: 1}
experiment: {save_every: 5, log_every: 5}
lr_scheduler: {params: {warmup_length: 5}}
stages:
  stage1:
    experiment: {num_examples_to_see: 400}
    dataset: {type: LatentDataset, params: {resolution: 16}}
  stage2:
    init: stage1
    experiment: {num_examples_to_see: 16}
    dataset: {params: {resolution: 32, flip: true}}
evaluation:
  num_images: 8
  batch_size: 8
  num_inference_steps: 2
  held_out_grid: 2
  grid: [a red square]
  features: tiny-clip
  alignment: tiny-clip
"""


def write_images(folder: Path) -> None:
    """A table of URLs and captions, some of which lead nowhere, and the images."""
    folder.mkdir()
    with open(folder / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["URL", "TEXT", "pwatermark"])
        for number in range(IMAGES):
            colour, shape = COLOURS[number % len(COLOURS)], ("square", "stripe")[number % 2]
            path = folder / f"{number}.png"
            image = Image.new("RGB", (64, 64), "grey")
            image.paste(colour, (8, 8, 32, 32) if shape == "square" else (8, 8, 56, 16))
            image.save(path)
            url = path.as_uri() if number >= LOST else f"{path.as_uri()}.gone"
            rows.writerow([url, f"a {colour} {shape}", 0.9 if number % 10 == 9 else 0.1])


def write_clip(folder: Path, tokenizer: Path) -> None:
    """An untrained CLIP model: features and scores come from it, though they mean nothing."""
    from transformers import CLIPConfig, CLIPModel

    shutil.copytree(tokenizer, folder)
    words = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"]}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 16} | ends
    vision = tower | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_parts, tiny_unet_params) -> Path:
    """A working copy whose only run is `tiny`."""
    folder = make_checkout(tmp_path_factory.mktemp("workflow") / "checkout")
    write_images(folder / "images")
    write_clip(folder / "clip", tiny_parts / "tokenizer")
    shutil.copytree(tiny_parts, folder / "parts")
    shutil.rmtree(folder / "configs")
    model = {
        part: {"pretrained": "resources/components/tiny-parts"}
        for part in ("vae", "text_encoder", "tokenizer", "scheduler")
    }
    model |= {"unet": {"target": "UNet2DConditionModel", "params": tiny_unet_params}, "use_ema": True}
    components = {
        name: {"source": "folder", "path": path} for name, path in (("tiny-parts", "parts"), ("tiny-clip", "clip"))
    }
    (folder / "configs/data").mkdir(parents=True)
    (folder / "configs/data/tiny.yaml").write_text(DATA)
    (folder / "configs/components.yaml").write_text(yaml.safe_dump(components))
    (folder / "configs/tiny.yaml").write_text(STAGES + yaml.safe_dump({"model": model}))
    return folder


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start the workflow as a user does; it says all it says in `output`."""
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--config", "run=tiny", *arguments]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = open(folder / "output", "w")
    env = environment(PATH=tools, WANDB_MODE="offline")
    return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)


@pytest.fixture(scope="module")
def finished(checkout) -> Path:
    """The run, killed with all its processes once stage 1 has left a checkpoint, then unlocked and finished."""
    first, deadline = snakemake(checkout), time.monotonic() + 300
    try:
        while not list(checkout.glob(f"{RUN}/stage1/checkpoints/*/[1-9]*/.metadata")):
            assert first.poll() is None and time.monotonic() < deadline, (checkout / "output").read_text()
            time.sleep(0.01)
    finally:
        kill_all(first)
    assert not (checkout / RUN / "stage1/400/train.json").exists()
    assert snakemake(checkout, "--unlock").wait(timeout=60) == 0
    assert snakemake(checkout).wait(timeout=280) == 0, (checkout / "output").read_text()
    return checkout


def test_a_failing_step_ends_the_run_with_its_message(checkout):
    (checkout / "configs/data/lost.yaml").write_text("table: {path: images/lost.csv}")
    assert snakemake(checkout, "--", "results/data/lost/table.parquet").wait(timeout=60) == 1
    said = (checkout / "output").read_text()
    assert len([line for line in said.splitlines() if line.startswith("error: ") and "images/lost.csv" in line]) == 1
    assert "Error in rule fetch_table" in said and "completed successfully" not in said
    assert sorted(path.name for path in (checkout / "results/data/lost").iterdir()) == ["config"]


def test_the_run_goes_on_where_it_was_killed(finished):
    said = (finished / "logs/runs/tiny/stage1/400/train.log").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("resumed at")]
    images = int(line.split()[2])
    assert images % 20 == 0 and 0 < images < 400
    entries = [json.loads(line) for line in (finished / RUN / "stage1/log.jsonl").read_text().splitlines()]
    assert [entry["images"] for entry in entries] == list(range(20, 401, 20))
    assert "build_shards" not in (finished / "output").read_text()  # what was done before the kill stays done


def test_a_second_call_has_nothing_to_do(finished):
    assert snakemake(finished).wait(timeout=60) == 0
    assert "Nothing to be done" in (finished / "output").read_text()


def test_rows_and_images_are_accounted_for(finished):
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


def test_yields_and_expected_size_are_printed(finished):
    assert snakemake(finished, "--", "yields").wait(timeout=60) == 0
    said = (finished / "output").read_text()
    assert "pwatermark <= 0.5" in said and "expected" in said and "Finished jobid" in said


def test_verify_names_a_flipped_byte(finished):
    assert snakemake(finished, "--", "verify").wait(timeout=60) == 0
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


def test_shards_are_chosen_from_by_their_metadata(finished):
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


def test_no_process_is_left(finished):
    left = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] and Path(p.info["cwd"]).is_relative_to(finished)]
    assert left == []
