"""Latent shards mirror the image shards, and a killed job makes only what is missing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load
from samples import load_script, make_sample, run_script, write_tar

from sdtrain import config, loader, models, schema, shards

script = load_script("precompute_latents")
SETTINGS = config.load(schema.LatentsConfig, overrides=["batch_size=4"])


@pytest.fixture(scope="module")
def made(image_shards, tiny_parts, tmp_path_factory):
    """The manifest of latents of `image_shards` at 32 px, by the real command."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "config.yaml").write_text("batch_size: 4\n")
    arguments = {"config": folder / "config.yaml", "vae": tiny_parts / "vae", "resolution": 32}
    arguments |= {"images": image_shards / "manifest.json", "output": folder / "manifest.json"}
    done = run_script("precompute_latents", *(f"{key}={value}" for key, value in arguments.items()))
    assert done.returncode == 0, done.stderr
    return folder / "manifest.json", done.stdout


def again(made, images, tiny_parts, tmp_path, settings=SETTINGS):
    return script.precompute(settings, str(tiny_parts / "vae"), 32, str(images), tmp_path / "manifest.json")


def test_latents_are_those_of_the_vae(made, image_shards, tiny_parts):
    manifest = shards.read_manifest(made[0], full=True)
    assert (manifest["kind"], manifest["samples"], manifest["dropped"]) == ("latents", 41, {})
    assert [row["samples"] for row in manifest["shards"]] == [17, 5, 19]
    vae = models.load_part("vae", config.load(schema.ModelConfig, values={"vae": {"pretrained": str(tiny_parts)}}))
    images, latents = (loader.find_samples(str(path)) for path in (image_shards / "manifest.json", made[0]))
    for image, latent in list(zip(images, latents, strict=True))[::8]:
        square = loader.resize_and_crop(loader.read_image(image), 32, "center", np.random.default_rng(0))
        expected = models.encode_images(vae, loader.to_pixels(square)[None])[0]
        found = load(latent.read("latent"))["latents"]
        assert found.dtype == torch.float16 and found.shape == (4, 16, 16)
        torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
        assert (latent.key, latent.read("txt"), latent.read("json")) == (
            image.key,
            image.read("txt"),
            image.read("json"),
        )


def test_mean_and_deviation_are_said(made):
    tar = shards.read_manifest(made[0])["shards"][0]["path"]
    values = torch.stack([load(s.read("latent"))["latents"].float() for s in shards.index_tar(tar)])
    expected = f"41 latents of 4x16x16, mean {values.mean():.3f}, standard deviation {values.std():.3f}"
    assert made[1] == f"{made[0]}: {expected}\n"


def test_only_a_missing_shard_is_made_again_with_the_same_bytes(made, image_shards, tiny_parts, tmp_path):
    images = image_shards / "manifest.json"
    first = again(made, images, tiny_parts, tmp_path)
    tars = sorted(tmp_path.glob("*/*.tar"))
    times = [tar.stat().st_mtime_ns for tar in tars]
    tars[1].unlink()
    (tmp_path / "manifest.json").unlink()
    aside = tars[1].parent / ".00001"  # what a killed job leaves
    aside.mkdir()
    (aside / ".00000.tar.tmp").write_bytes(b"half a shard")
    assert again(made, images, tiny_parts, tmp_path) == first == json.loads((tmp_path / "manifest.json").read_text())
    assert [tar.stat().st_mtime_ns == time for tar, time in zip(tars, times, strict=True)] == [True, False, True]
    assert sorted(p.name for p in tars[0].parent.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    by_command = [row["sha256"] for row in shards.read_manifest(made[0])["shards"]]
    assert [row["sha256"] for row in first["shards"]] == by_command


def test_another_crop_lies_in_a_folder_of_its_own(made, image_shards, tiny_parts, tmp_path):
    images = image_shards / "manifest.json"
    one = again(made, images, tiny_parts, tmp_path)
    two = again(made, images, tiny_parts, tmp_path, config.load(schema.LatentsConfig, overrides=["crop=random"]))
    assert one["fingerprint"] != two["fingerprint"] and len(list(tmp_path.glob("*/"))) == 2


def test_undecodable_images_are_left_out_and_counted(made, tiny_parts, tmp_path, capsys):
    samples = [make_sample(n) for n in range(6)]
    samples[2][1]["jpg"] = b"no image"
    tars = [write_tar(tmp_path / "0.tar", samples), write_tar(tmp_path / "1.tar", [("9", {"txt": b"no image at all"})])]
    shards.write_manifest(tmp_path / "images.json", "images", tars, {}, {})
    manifest = again(made, tmp_path / "images.json", tiny_parts, tmp_path)
    assert manifest["samples"] == 5 and manifest["dropped"] == {"undecodable": 2}
    assert "skipped: " in capsys.readouterr().err
    assert "000000002" not in {s.key for s in loader.find_samples(str(tmp_path / "manifest.json"))}


def test_no_image_at_all_leaves_no_manifest(made, tiny_parts, tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("1", {"jpg": b"nothing", "txt": b"a"})])
    shards.write_manifest(tmp_path / "images.json", "images", [tar], {}, {})
    with pytest.raises(loader.DataError, match="images.json: not one image could be encoded"):
        again(made, tmp_path / "images.json", tiny_parts, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_bad_input_is_one_message(image_shards, tiny_parts, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    spoiled = shutil.copytree(image_shards, tmp_path / "spoiled")
    (spoiled / "00001.tar").unlink()
    good = {"vae": tiny_parts / "vae", "resolution": "32", "images": image_shards / "manifest.json"}
    for change, message in [
        ({"resolution": "large"}, "error: resolution=large: a number of pixels is expected"),
        ({"vae": tmp_path / "absent"}, "absent: no such folder; make it with: snakemake"),
        ({"images": spoiled / "manifest.json"}, "00001.tar: shard is missing"),
    ]:
        arguments = {"config": tmp_path / "config.yaml", "output": tmp_path / "out/manifest.json", **good, **change}
        with pytest.raises(SystemExit) as end:
            script.main(["precompute_latents.py", *(f"{key}={value}" for key, value in arguments.items())])
        assert str(end.value.code).startswith("error: ") and message in str(end.value.code)
        assert not (tmp_path / "out/manifest.json").exists()
