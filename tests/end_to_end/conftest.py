"""Fixtures of the end-to-end tests: a training of seconds, and the command that runs it."""

from __future__ import annotations

import pytest
import yaml
from trainings import trainer


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(folder, *arguments, ranks=1): run train.py in `folder` to its end."""
    with trainer(tmp_path_factory.mktemp("train") / "log") as run:
        yield run


@pytest.fixture(scope="session")
def stage_values(tiny_parts, image_shards, tiny_unet_params) -> dict:
    """A stage of 16 images in batches of 2, as the content of its YAML."""
    parts = {name: {"pretrained": str(tiny_parts)} for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return {
        "system": {"batch_size": 2, "workers": 0, "threads": 1},
        "experiment": {
            "log_dir": "logs",
            "project": "tiny",
            "name": "stage1",
            "num_examples_to_see": 16,
            "milestones": [0, 8],
            "save_every": 2,
            "log_every": 1,
        },
        "optimizer": {"params": {"learning_rate": 1.0e-3}},
        "model": {**parts, "unet": {"target": "UNet2DConditionModel", "params": tiny_unet_params}, "use_ema": True},
        "dataset": {"params": {"path": str(image_shards / "manifest.json"), "resolution": 32, "flip": True}},
        "lr_scheduler": {"params": {"warmup_length": 2}},
    }


@pytest.fixture(scope="session")
def stage_yaml(stage_values, tmp_path_factory) -> str:
    """The path of that YAML."""
    path = tmp_path_factory.mktemp("stage") / "stage.yaml"
    path.write_text(yaml.safe_dump(stage_values))
    return str(path)
