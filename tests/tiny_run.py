"""Make a working copy whose only run, `tiny`, is smaller than the demo."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import yaml
from checkout import make_checkout
from PIL import Image

COLOURS = ("red", "green", "blue", "white", "black")
IMAGES, LOST = 60, 3  # rows of the table, and how many of their URLs have no image
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")

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


def make_tiny_run(folder: Path, tiny_parts: Path, tiny_unet_params: dict) -> Path:
    """Make the working copy in the new folder `folder`; return it."""
    make_checkout(folder)
    write_images(folder / "images")
    write_clip(folder / "clip", tiny_parts / "tokenizer")
    shutil.copytree(tiny_parts, folder / "parts")
    shutil.rmtree(folder / "configs")
    model = {part: {"pretrained": "resources/components/tiny-parts"} for part in PARTS}
    model |= {"unet": {"target": "UNet2DConditionModel", "params": tiny_unet_params}, "use_ema": True}
    components = {
        name: {"source": "folder", "path": path} for name, path in (("tiny-parts", "parts"), ("tiny-clip", "clip"))
    }
    (folder / "configs/data").mkdir(parents=True)
    (folder / "configs/data/tiny.yaml").write_text(DATA)
    (folder / "configs/components.yaml").write_text(yaml.safe_dump(components))
    (folder / "configs/tiny.yaml").write_text(STAGES + yaml.safe_dump({"model": model}))
    return folder


def write_images(folder: Path) -> None:
    """Write images, and a table of URLs and captions; some URLs have no image."""
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
    """Write an untrained CLIP model, so that features and scores can be computed."""
    from transformers import CLIPConfig, CLIPModel

    shutil.copytree(tokenizer, folder)
    words = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"]}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 16} | ends
    vision = tower | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
