"""Fixtures of the end-to-end tests: a training of seconds, and the command that runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from samples import write_tar
from trainings import trainer


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Start a trainings.Trainer: train(folder, *arguments, ranks=1) runs train.py in `folder` to its end."""
    with trainer(tmp_path_factory.mktemp("train") / "log") as run:
        yield run


@pytest.fixture(scope="session")
def stage_values(tiny_parts, image_shards, tiny_unet_params) -> dict:
    """Return the YAML content of a stage of 16 images in batches of 2."""
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
    """Write the YAML of `stage_values`; return its path."""
    path = tmp_path_factory.mktemp("stage") / "stage.yaml"
    path.write_text(yaml.safe_dump(stage_values))
    return str(path)


# ---------------------------------------------------------------- latents with states of the captions
@pytest.fixture(scope="session")
def text_parts(tiny_parts, tmp_path_factory) -> Path:
    """Return the model components as a component folder with a record."""
    from sdtrain.io.files import write_json

    folder = shutil.copytree(tiny_parts, tmp_path_factory.mktemp("components") / "parts")
    write_json(f"{folder}.json", {"fingerprint": "00000000000000aa"})
    return folder


@pytest.fixture(scope="session")
def latents(text_parts, image_shards, tmp_path_factory) -> dict[str, Path]:
    """Return manifests of equal latents: online (captions), cached (text states too), permuted (other captions)."""
    from sdtrain.config import schema_data
    from sdtrain.config.load import load_config
    from sdtrain.data import tars
    from sdtrain.data.latents import precompute
    from sdtrain.data.manifest import read_manifest, write_manifest

    root = tmp_path_factory.mktemp("latents")
    images = read_manifest(image_shards / "manifest.json")["shards"]
    for row in images:
        samples = [(s.key, {e: s.read(e) for e in s.fields}) for s in tars.index_tar(row["path"])]
        captions = [fields["txt"] for _, fields in samples]
        for (_, fields), caption in zip(samples, captions[1:] + captions[:1], strict=True):
            fields["txt"] = caption
        write_tar(root / Path(row["path"]).name, samples)
    write_manifest(root / "permuted.json", "images", sorted(root.glob("*.tar")), {}, {})
    manifests = {}
    for name, text in (("online", None), ("cached", str(text_parts)), ("permuted", str(text_parts))):
        (root / name).mkdir()
        manifests[name] = root / name / "manifest.json"
        source = root / "permuted.json" if name == "permuted" else image_shards / "manifest.json"
        settings = load_config(schema_data.LatentsConfig, overrides=["workers=0"])
        precompute(settings, str(text_parts), text, 32, str(source), manifests[name])
    return manifests
