"""Fixtures of all tests: a tiny latent diffusion model with a tokenizer, and shards of small images."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import SHARD_SIZES, make_sample, make_tokenizer, write_tar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported, here and in the commands that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory) -> Path:
    """Return a folder with vae/ (two levels, f2, 4 channels), text_encoder/ (CLIP, 32 wide), tokenizer/, scheduler/."""
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
    """Return arguments of a UNet2DConditionModel that fits `tiny_parts`."""
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


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory) -> Path:
    """Return a folder of three unequal tars of jpg, txt and json (41 images in all) and their manifest.json."""
    from sdtrain.data.manifest import write_manifest

    folder = tmp_path_factory.mktemp("image_shards")
    number, tars = 0, []
    for shard, size in enumerate(SHARD_SIZES):
        tars.append(write_tar(folder / f"{shard:05d}.tar", [make_sample(n) for n in range(number, number + size)]))
        number += size
    write_manifest(folder / "manifest.json", "images", tars, {}, {"test": "image_shards"})
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[types.SimpleNamespace]:
    """Start an S3 server on loopback; set the environment so that this process and its commands use it.

    `endpoint`; `put(key, data) -> "s3://tests/key"`; `url(key)`; and `client`, boto3's.
    """
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints one line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    names = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**names, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="tests")

        def url(key: str) -> str:
            return f"s3://tests/{key}"

        def put(key: str, data: bytes) -> str:
            client.put_object(Bucket="tests", Key=key, Body=data)
            return url(key)

        yield types.SimpleNamespace(endpoint=endpoint, url=url, put=put, client=client)
    server.stop()
