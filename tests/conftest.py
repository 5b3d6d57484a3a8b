"""Fixtures of all tests: a tiny latent diffusion model with a real tokenizer, and real shards of small images."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the commands that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "square",
    "circle",
    "stripe",
    "on",
    "white",
    "black",
    "a",
    "photo",
    "of",
]
SHARD_SIZES = (17, 5, 19)
ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str):
    """A command of workflow/scripts as a module, to call its functions."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "workflow/scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command of workflow/scripts as a user does, from the repository's root."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    command = [sys.executable, f"workflow/scripts/{name}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory) -> Path:
    """A folder with vae/ (two levels, f2, 4 channels), text_encoder/ (CLIP, 32 wide), tokenizer/ and scheduler/."""
    import diffusers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny_parts")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=32,
        scaling_factor=0.5,
    )
    vae.save_pretrained(folder / "vae")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.CLIPTextModel(encoder).save_pretrained(folder / "text_encoder")
    diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def tiny_unet_params() -> dict:
    """Arguments of a UNet2DConditionModel that fits `tiny_parts`."""
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }


def make_tokenizer():
    """A CLIP tokenizer, 16 tokens long, whose byte-pair merges spell WORDS and nothing else."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    merges = list(dict.fromkeys(merges))
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def draw(number: int) -> tuple[Image.Image, str]:
    """A small picture and what it shows; sizes and shapes vary with the number."""
    rng = np.random.default_rng(number)
    width, height = (int(v) for v in rng.integers(32, 72, 2))
    colour = ("red", "green", "blue")[number % 3]
    shape = ("square", "circle")[number // 3 % 2]
    image = Image.new("RGB", (width, height), "white")
    side = int(rng.integers(12, 24))
    left, top = int(rng.integers(width - side)), int(rng.integers(height - side))
    patch = Image.new("RGB", (side, side), colour)
    mask = Image.new("L", (side, side), 255)
    if shape == "circle":
        y, x = np.ogrid[:side, :side]
        inside = (x - side / 2 + 0.5) ** 2 + (y - side / 2 + 0.5) ** 2 <= side**2 / 4
        mask = Image.fromarray(np.uint8(inside * 255))
    image.paste(patch, (left, top), mask)
    return image, f"a {colour} {shape}"


def jpeg(image: Image.Image) -> bytes:
    """The bytes of an image's JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar of (key, {extension: bytes}), as any other tool would write it."""
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for extension, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def make_sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Sample `number` of `image_shards`: image, caption and metadata (width, height, pwatermark, group)."""
    image, caption = draw(number)
    meta = {
        "caption": caption,
        "original_width": image.width,
        "original_height": image.height,
        "pwatermark": round(number % 10 / 10, 1),
        "group": "even" if number % 2 == 0 else "odd",
    }
    return f"{number:09d}", {"jpg": jpeg(image), "txt": caption.encode(), "json": json.dumps(meta).encode()}


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory) -> Path:
    """A folder of three unequal tars of jpg, txt and json (41 images in all) and their manifest.json."""
    from sdtrain import shards

    folder = tmp_path_factory.mktemp("image_shards")
    number, tars = 0, []
    for shard, size in enumerate(SHARD_SIZES):
        tars.append(write_tar(folder / f"{shard:05d}.tar", [make_sample(n) for n in range(number, number + size)]))
        number += size
    shards.write_manifest(folder / "manifest.json", "images", tars, {}, {"test": "image_shards"})
    return folder
