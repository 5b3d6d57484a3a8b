"""Tests of datasets: images and latents, captions and classes, and every value of dataset.type."""

from __future__ import annotations

import itertools
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save, save_file
from samples import draw, jpeg, make_sample, write_tar

from sdtrain.config import schema
from sdtrain.config.keys import keys_of
from sdtrain.config.load import load_config
from sdtrain.data import images
from sdtrain.data.datasets import FORMS, ImageDataset, LatentDataset, open_dataset
from sdtrain.data.manifest import write_manifest
from sdtrain.data.stream import batches
from sdtrain.errors import DataError


@pytest.fixture(scope="module")
def manifest(image_shards):
    return str(image_shards / "manifest.json")


def take(stream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def test_an_empty_dataset_is_one_message(manifest):
    with pytest.raises(DataError, match=r"no sample is left of 41: .'filters': 41.; loosen dataset.params.filters"):
        ImageDataset(manifest, 32, filters={"original_width": ">=512"})


def test_a_dataset_can_be_pickled(manifest):
    dataset = ImageDataset(manifest, 16, window=2)
    there = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(dataset[p]["pixels"], there[p]["pixels"]) for p in (0, 50))


# ---------------------------------------------------------------- what is said of it
def test_the_description_advises_to_reshard_if_few_samples_are_kept(manifest):
    assert ImageDataset(manifest, 16).describe() == "41 of 41 samples (none dropped)"
    about = ImageDataset(manifest, 16, filters={"pwatermark": "<=0.6"}).describe()
    assert about == "29 of 41 samples ({'filters': 12} dropped)"
    about = ImageDataset(manifest, 16, filters={"pwatermark": "<=0.1"}).describe()
    assert about.startswith("9 of 41 samples ({'filters': 32} dropped); re-shard: only 22.0% are kept")


def test_incomplete_samples_above_the_threshold_are_refused(tmp_path):
    samples = [make_sample(n) for n in range(40)]
    for _, fields in samples[:12]:
        del fields["txt"]
    path = str(write_tar(tmp_path / "a.tar", samples))
    dataset = ImageDataset(path, 16, cache=str(tmp_path / "c"))
    with pytest.raises(DataError, match=r"12 of 40 samples are incomplete .*'no txt': 12.*dataset\.params\.max_lost"):
        dataset.require_complete(0.1)
    dataset.require_complete(0.3)
    whole = str(write_tar(tmp_path / "b.tar", [make_sample(n) for n in range(40)]))
    filtered = ImageDataset(whole, 16, filters={"pwatermark": "<=0.1"}, cache=str(tmp_path / "c"))
    filtered.require_complete(0.1)  # samples dropped by filters do not count as lost


# ---------------------------------------------------------------- classes
def classes(folder, prompts, workers=0):
    samples = [(f"{n}", {"jpg": jpeg(draw(n)[0]), "cls": str(n % 3).encode()}) for n in range(6)]
    (folder / "prompts.json").write_text(prompts if isinstance(prompts, str) else json.dumps(prompts))
    params = {
        "path": str(write_tar(folder / "a.tar", samples)),
        "resolution": 16,
        "idx_to_prompt": str(folder / "prompts.json"),
        "cache": str(folder / "c"),
    }
    cfg = load_config(
        schema.DatasetConfig, values={"type": "ClassificationWebDataset", "params": {**params, "batch_size": 1}}
    )
    return open_dataset(cfg, 0)


@pytest.mark.parametrize("prompts", [["cat", "dog", "fox"], {"0": "cat", "1": "dog", "2": "fox"}])
def test_a_class_becomes_its_prompt(tmp_path, prompts):
    (batch,) = take(batches(classes(tmp_path, prompts), 6), 1)
    assert batch["caption"] == [("cat", "dog", "fox")[int(key) % 3] for key in batch["key"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_a_prompt_is_one_message(tmp_path, workers):
    stream = batches(classes(tmp_path, ["cat", "dog"]), 6, workers=workers)
    with pytest.raises(DataError) as error:
        next(stream)
    assert str(error.value).startswith(str(tmp_path / "a.tar")) and "\n" not in str(error.value)
    assert "no prompt for class '2' in dataset.params.idx_to_prompt" in str(error.value)


def test_prompts_that_cannot_be_read_are_named(tmp_path):
    for text, reason in (
        ("{", "not a readable JSON file"),
        ("3", "expected a list or a mapping of class -> prompt"),
    ):
        with pytest.raises(DataError, match=f"dataset.params.idx_to_prompt: .*prompts.json: {reason}"):
            classes(tmp_path, text)
    cfg = load_config(schema.DatasetConfig, values={"type": "ClassificationWebDataset", "params": {"path": "x"}})
    with pytest.raises(DataError, match="idx_to_prompt: ClassificationWebDataset needs a JSON file"):
        open_dataset(cfg, 0)


# ---------------------------------------------------------------- latents
@pytest.mark.filterwarnings("ignore:skipped")
def test_latents_are_read_and_broken_ones_skipped(tmp_path):
    fields = [
        {"latent": save({"latents": torch.full((4, 8, 8), float(n)).half()}), "txt": f"caption {n}".encode()}
        for n in range(30)
    ]
    fields[3]["latent"] = b"nothing"
    fields[4]["latent"] = save({"other": torch.zeros(1)})
    path = write_tar(tmp_path / "a.tar", [(str(n), f) for n, f in enumerate(fields)])
    dataset = LatentDataset(str(path), cache=str(tmp_path / "c"))
    (batch,) = take(batches(dataset, 30), 1)
    assert batch["latents"].shape == (30, 4, 8, 8) and batch["latents"].dtype == torch.float32
    assert batch["latents"][:, 0, 0, 0].tolist() == [float(key) for key in batch["key"]]
    assert batch["caption"] == [f"caption {key}" for key in batch["key"]] and not {"3", "4"} & set(batch["key"])
    assert batch["lost"] == {"unreadable latent": 2} and dataset.empty_text is None


def test_latents_of_classes_have_prompts(tmp_path):
    (tmp_path / "prompts.json").write_text('["cat", "dog"]')
    latent = save({"latents": torch.zeros(4, 8, 8)})
    tar = write_tar(tmp_path / "a.tar", [(f"{n}", {"latent": latent, "cls": str(n).encode()}) for n in range(2)])
    params = {"path": str(tar), "idx_to_prompt": str(tmp_path / "prompts.json"), "cache": str(tmp_path / "c")}
    cfg = load_config(schema.DatasetConfig, values={"type": "LatentDataset", "params": params})
    batch = next(batches(open_dataset(cfg, 0), 2))
    assert batch["caption"] == [["cat", "dog"][int(key)] for key in batch["key"]]


def test_latents_are_sampled_from_stored_moments_at_each_position(tmp_path):
    mean, std = torch.randn(4, 8, 8), torch.rand(4, 8, 8)
    tar = write_tar(tmp_path / "a.tar", [("0", {"latent": save({"mean": mean, "std": std}), "txt": b"one"})])
    dataset = LatentDataset(str(tar), seed=3, cache=str(tmp_path / "c"))
    drawn = torch.cat([batch["latents"] for batch in take(batches(dataset, 16), 16)])
    assert torch.equal(drawn[32:48], next(batches(dataset, 16, start=32))["latents"])
    noise = (drawn - mean) / std
    assert len(drawn.unique(dim=0)) == 256 and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_stored_text_states_come_with_the_latents(tmp_path):
    latent = {"latents": torch.zeros(4, 8, 8), "original_size": torch.tensor([30, 40]), "crop": torch.tensor([0, 5])}
    states = [torch.full((7, 5), float(n)).half() for n in range(6)]
    samples = [(f"{n}", {"latent": save(latent), "txt": b"t", "text": save({"text": s})}) for n, s in enumerate(states)]
    tar = write_tar(tmp_path / "a.tar", samples)
    save_file({"text": torch.ones(7, 5).half()}, tmp_path / "empty.safetensors")
    write_manifest(tmp_path / "m.json", "latents", [tar], {}, {}, empty_text="empty.safetensors")
    dataset = LatentDataset(str(tmp_path / "m.json"))
    batch = next(batches(dataset, 6))
    assert batch["text"].shape == (6, 7, 5) and batch["text"].dtype == torch.float32
    assert batch["text"][:, 0, 0].tolist() == [float(key) for key in batch["key"]]
    assert batch["original_size"].tolist() == [[30, 40]] * 6 and batch["crop"].tolist() == [[0, 5]] * 6
    assert torch.equal(dataset.empty_text, torch.ones(7, 5))
    (tmp_path / "empty.safetensors").unlink()
    with pytest.raises(DataError, match=r"empty.safetensors: not the states of the empty caption .*; make them again"):
        LatentDataset(str(tmp_path / "m.json"))


# ---------------------------------------------------------------- the types of the configuration
@pytest.mark.parametrize("kind", ["WebDataset", "ParquetDataset", "CSVDataset"])
def test_every_form_gives_the_same_batches(kind, tmp_path):
    samples = [make_sample(n) for n in range(10)]
    data = [fields["jpg"] for _, fields in samples]
    table = {"photo": data, "words": [fields["txt"].decode() for _, fields in samples], "n": range(10)}
    params = {"resolution": 16, "batch_size": 1, "filters": {"n": "<8"}, "cache": str(tmp_path / "c")}
    if kind == "WebDataset":
        samples = [(k, {**f, "json": json.dumps({"n": n}).encode()}) for n, (k, f) in enumerate(samples)]
        path = write_tar(tmp_path / "a.tar", samples)
    else:
        params["columns"] = {"image": "photo", "caption": "words"}
        path = tmp_path / ("a.parquet" if kind == "ParquetDataset" else "a.csv")
    if kind == "ParquetDataset":
        pq.write_table(pa.table(table), path)
    if kind == "CSVDataset":
        for n, image in enumerate(data):
            (tmp_path / f"{n}.jpg").write_bytes(image)
        pa.table({**table, "photo": [f"{n}.jpg" for n in range(10)]}).to_pandas().to_csv(path, index=False)
    cfg = load_config(schema.DatasetConfig, values={"type": kind, "params": {"path": str(path), **params}})
    dataset = open_dataset(cfg, 0)
    assert len(dataset) == 8 and dataset.dropped == {"filters": 2}
    (batch,) = take(batches(dataset, 8, workers=1), 1)
    found = {(text, pixels.numpy().tobytes()) for text, pixels in zip(batch["caption"], batch["pixels"], strict=True)}
    expected = [images.prepare(image, 16)["pixels"].numpy().tobytes() for image in data[:8]]
    assert found == set(zip(table["words"], expected, strict=False))


def test_every_form_of_the_schema_is_in_the_registry_and_no_other():
    assert set(FORMS) == set(keys_of(schema.DatasetConfig)["type"].choices)
