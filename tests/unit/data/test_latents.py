"""Tests of precompute_latents: the same bytes for any number of ranks, any batch size, and after kills."""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file
from samples import call_script, load_script, make_sample, run_script, write_tar

from sdtrain.config import schema, schema_data
from sdtrain.config.load import load_config
from sdtrain.data import images, latents, tars
from sdtrain.data.manifest import read_manifest, write_manifest
from sdtrain.data.verify import find_faults
from sdtrain.errors import DataError
from sdtrain.models.parts import TextEncoding, encode_moments, load_part

script = load_script("precompute_latents")
EMOJI = Path(__file__).resolve().parents[3] / "resources/pretrained/emoji-autoencoder"


def run(
    folder: Path, manifest: Path, vae: Path, *settings: str, text: Path | None = None, resolution: int = 32
) -> dict:
    """Compute latents in `folder` in this process; return their manifest."""
    values = load_config(schema_data.LatentsConfig, overrides=["workers=0", *settings])
    text = str(text) if text else None
    return latents.precompute(values, str(vae), text, resolution, str(manifest), folder / "manifest.json")


def arguments(folder: Path, manifest: Path, parts: Path, *settings: str) -> list[str]:
    """Return the arguments of the command, with text states."""
    (folder / "config.yaml").write_text("{batch_size: 4}")
    named = {"config": folder / "config.yaml", "vae": parts / "vae", "text_encoder": parts, "resolution": 32}
    named |= {"images": manifest, "output": folder / "manifest.json"}
    return [*(f"{key}={value}" for key, value in named.items()), *settings]


def samples_of(manifest: Path) -> list[tars.Sample]:
    return [sample for row in read_manifest(manifest)["shards"] for sample in tars.index_tar(row["path"])]


def tensors_of(manifest: Path, member: str = "latent") -> list[dict[str, torch.Tensor]]:
    return [load(sample.read(member)) for sample in samples_of(manifest)]


def digests(manifest: dict) -> list[str]:
    return [row["sha256"] for row in manifest["shards"]]


def files(folder: Path) -> dict[str, bytes]:
    """Return all files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def image_manifest(folder: Path, *tars: list) -> Path:
    """Write tars of (key, fields); return the path of their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [write_tar(folder / f"{number}.tar", samples) for number, samples in enumerate(tars)]
    write_manifest(folder / "images.json", "images", paths, {}, {"test": str(len(paths))})
    return folder / "images.json"


@pytest.fixture(scope="module")
def source(image_shards) -> Path:
    return image_shards / "manifest.json"


@pytest.fixture(scope="module")
def made(source, tiny_parts, tmp_path_factory):
    """Run the command on `image_shards` at 32 px, with text states; return its folder and output."""
    folder = tmp_path_factory.mktemp("latents")
    done = run_script("precompute_latents", *arguments(folder, source, tiny_parts, "workers=2"))
    assert done.returncode == 0, done.stderr
    return folder, done


# ---------------------------------------------------------------- what is in them
def test_latents_equal_those_of_the_vae(made, source, tiny_parts):
    assert find_faults(made[0] / "manifest.json") == []
    manifest = read_manifest(made[0] / "manifest.json")
    assert (manifest["kind"], manifest["samples"], manifest["dropped"]) == ("latents", 41, {})
    assert [row["samples"] for row in manifest["shards"]] == [17, 5, 19]
    vae = load_part("vae", load_config(schema.ModelConfig, values={"vae": {"pretrained": str(tiny_parts)}}))
    pairs = list(zip(samples_of(source), samples_of(made[0] / "manifest.json"), strict=True))
    for image, latent in pairs[::8]:
        prepared, found = images.prepare(image.read("jpg"), 32), load(latent.read("latent"))
        expected = encode_moments(vae, prepared["pixels"][None])[0][0]
        assert found["latents"].dtype == torch.float16 and found["latents"].shape == (4, 16, 16)
        torch.testing.assert_close(found["latents"].float(), expected, atol=2e-3, rtol=2e-3)
        assert torch.equal(found["original_size"], prepared["original_size"])
        assert torch.equal(found["crop"], prepared["crop"])
    for image, latent in pairs:
        assert [latent.key, *map(latent.read, ("txt", "json"))] == [image.key, *map(image.read, ("txt", "json"))]


def test_moments_and_samples_have_the_same_posterior(source, tiny_parts, tmp_path):
    vae = tiny_parts / "vae"
    kinds = ["mean", "moments", "sample", "sample"]
    for number, posterior in enumerate(kinds):
        seed = 1 if number == 3 else 0
        (tmp_path / str(number)).mkdir()
        run(tmp_path / str(number), source, vae, f"posterior={posterior}", f"seed={seed}")
    mean, moments, drawn, other = (tensors_of(tmp_path / f"{number}/manifest.json") for number in range(4))
    noise = [], []
    for m, both, one, two in zip(mean, moments, drawn, other, strict=True):
        assert torch.equal(m["latents"], both["mean"]) and both["std"].dtype == torch.float16
        assert set(both) == {"mean", "std", "original_size", "crop"}
        for draws, sample in zip(noise, (one, two), strict=True):
            draws.append((sample["latents"].float() - both["mean"].float()) / both["std"].float())
    noise = [torch.stack(draws) for draws in noise]
    for values in noise:  # standard normal, to the precision of 41,984 draws
        assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.02
    assert abs((noise[0] * noise[1]).mean()) < 0.03
    assert abs((noise[0][0] * noise[0][1]).mean()) < 0.15  # different samples have independent noise


def test_batches_processes_and_ranks_do_not_change_the_bytes(made, source, tiny_parts, tmp_path):
    """Random crops and samples of the posterior depend only on the sample."""
    random_ones = ("crop=random", "posterior=sample", "seed=3")
    alone = run(tmp_path, source, tiny_parts / "vae", *random_ones, "batch_size=3", text=tiny_parts)
    (folder := tmp_path / "ranks").mkdir()
    processes = start(folder, arguments(folder, source, tiny_parts, *random_ones, "batch_size=16", "workers=1"), 2)
    assert ended(processes) == [0, 0], folder.with_suffix(".log").read_text()
    assert json.loads((folder / "manifest.json").read_text()) == alone
    assert folder.with_suffix(".log").read_text().count("41 latents") == 1  # only one rank prints


def test_a_random_crop_is_recorded_and_follows_the_seed(source, tiny_parts, tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        run(tmp_path / str(seed), source, tiny_parts / "vae", "crop=random", f"seed={seed}")
    one, two = ([t["crop"].tolist() for t in tensors_of(tmp_path / f"{seed}/manifest.json")] for seed in (0, 1))
    assert one != two and len({tuple(crop) for crop in one}) > 10
    sizes = [t["original_size"].tolist() for t in tensors_of(tmp_path / "0/manifest.json")]
    for (top, left), (height, width) in zip(one, sizes, strict=True):
        scale = 32 / min(height, width)
        assert 0 <= top <= math.ceil(height * scale) - 32 and 0 <= left <= math.ceil(width * scale) - 32


# ---------------------------------------------------------------- text
def test_text_states_equal_those_of_a_training(made, tiny_parts):
    folder = made[0]
    values = {name: {"pretrained": str(tiny_parts)} for name in ("text_encoder", "tokenizer")}
    model = load_config(schema.ModelConfig, values=values)
    encode = TextEncoding(load_part("tokenizer", model), load_part("text_encoder", model), torch.device("cpu"))
    samples = samples_of(folder / "manifest.json")
    captions = [sample.read("txt").decode() for sample in samples]
    states = [load(sample.read("text"))["text"] for sample in samples]
    assert states[0].dtype == torch.float16 and states[0].shape == (16, 32) and len(set(captions)) > 3
    torch.testing.assert_close(torch.stack(states).float(), encode(captions), atol=2e-3, rtol=1e-3)
    empty = load_file(folder / read_manifest(folder / "manifest.json")["empty_text"])["text"]
    torch.testing.assert_close(empty.float(), encode([""])[0], atol=2e-3, rtol=1e-3)
    assert not torch.allclose(empty.float(), states[0].float(), atol=0.1)


def test_samples_without_a_caption_are_dropped_and_counted(tiny_parts, tmp_path):
    samples = [make_sample(n) for n in range(8)]
    for lost in (samples[1], samples[4]):
        del lost[1]["txt"]
    samples[2][1]["jpg"] = b"no image"
    del samples[6][1]["jpg"]
    manifest = image_manifest(tmp_path / "images", samples)
    found = run(tmp_path, manifest, tiny_parts / "vae", text=tiny_parts)
    assert found["samples"] == 4 and found["dropped"] == {"no caption": 2, "no image": 1, "undecodable": 1}
    assert found["checks"]["samples"] + found["checks"]["dropped"] == 8
    without = run(tmp_path, manifest, tiny_parts / "vae")
    assert without["samples"] == 6 and without["dropped"] == {"no image": 1, "undecodable": 1}
    assert "empty_text" in found and "empty_text" not in without


def test_class_does_not_count_as_a_caption(tiny_parts, tmp_path):
    key, fields = make_sample(0)
    manifest = image_manifest(tmp_path, [(key, {"jpg": fields["jpg"], "cls": b"3"})])
    with pytest.raises(DataError, match=r"0\.tar: 000000000 has a class, cls, and no caption.*text_encoder"):
        run(tmp_path, manifest, tiny_parts / "vae", text=tiny_parts)
    assert run(tmp_path, manifest, tiny_parts / "vae")["samples"] == 1
    assert samples_of(tmp_path / "manifest.json")[0].read("cls") == b"3"


# ---------------------------------------------------------------- checks
def test_a_vae_that_fits_passes_the_checks(source, tmp_path):
    found = run(tmp_path, source, EMOJI, resolution=64)
    checks = found["checks"]
    assert checks["warnings"] == [] and checks["psnr"] > 15
    values = torch.stack([t["latents"].double() for t in tensors_of(tmp_path / "manifest.json")])
    assert (checks["mean"], checks["std"]) == pytest.approx((values.mean().item(), values.std().item()), abs=1e-4)
    both = np.asarray(Image.open(tmp_path / "check.png")).astype(float)
    assert both.shape == (64, 128, 3)
    error = ((both[:, :64] - both[:, 64:]) ** 2).mean()
    assert 10 * math.log10(255**2 / error) == pytest.approx(checks["psnr"], abs=0.2)
    image = images.prepare(samples_of(source)[0].read("jpg"), 64)["pixels"]
    assert np.abs(both[:, :64] - ((image + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_wrong_scaling_factor_causes_a_warning(source, tmp_path, posterior):
    vae = shutil.copytree(EMOJI, tmp_path / "vae")
    values = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**values, "scaling_factor": 0.1}))
    checks = run(tmp_path, source, vae, f"posterior={posterior}", resolution=64)["checks"]
    assert checks["std"] < 0.2 and checks["psnr"] > 15  # the decoder reverses the scaling
    (warning,) = checks["warnings"]
    assert "scaling_factor" in warning and str(checks["std"]) in warning


def test_vae_that_decodes_to_other_images_causes_a_warning(made):
    folder, done = made
    checks = read_manifest(folder / "manifest.json")["checks"]
    assert checks["psnr"] < 15 and f"a decoded sample is {checks['psnr']} dB" in done.stderr
    expected = f"41 latents, 0 dropped, mean {checks['mean']:.3f}, standard deviation {checks['std']:.3f}"
    assert done.stdout == f"{folder / 'manifest.json'}: {expected}, PSNR {checks['psnr']:.1f} dB (check.png)\n"


# ---------------------------------------------------------------- killed
def command(folder: Path, values: list[str], rank: int, ranks: int, replaces: int | None) -> None:
    """Run the command in this forked process as one of several ranks, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    sys.stdout = sys.stderr = open(folder.with_suffix(".log"), "a", buffering=1)
    call_script("precompute_latents", values, replaces)


def start(folder: Path, values: list[str], ranks: int, replaces: int | None = None) -> list:
    """Start ranks; with `replaces`, each kills itself after so many renames, just before the next."""
    fork = multiprocessing.get_context("fork")  # torch is already imported, so a start takes milliseconds
    arguments = [(folder, values, rank, ranks, replaces) for rank in range(ranks)]
    processes = [fork.Process(target=command, args=given) for given in arguments]
    for process in processes:
        process.start()
    return processes


def ended(processes: list) -> list[int]:
    """Wait for processes; return their exit codes."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_encoding_ends_with_the_same_bytes(source, tiny_parts, tmp_path, ranks):
    """Kill -9 between a shard and its record, between shards, and before the manifest."""
    (whole := tmp_path / "whole").mkdir()
    assert ended(start(whole, arguments(whole, source, tiny_parts, "workers=0"), 1)) == [0]
    expected = files(whole)
    assert {"manifest.json", "check.png"} < set(expected) and len(list(whole.glob("*/*.tar"))) == 3
    (folder := tmp_path / "killed").mkdir()
    values = arguments(folder, source, tiny_parts, "workers=0")
    for replaces in (0, 1, 2, 3, 1, 4):
        processes = start(folder, values, ranks, replaces)
        multiprocessing.connection.wait([process.sentinel for process in processes])
        for process in processes:  # such as rank 0, which waits for the shards of a killed rank
            process.kill()
        assert -signal.SIGKILL in ended(processes) and not (folder / "manifest.json").exists()
    assert ended(start(folder, values, ranks)) == [0] * ranks, folder.with_suffix(".log").read_text()
    assert files(folder) == expected


def test_only_a_missing_shard_is_encoded_again(source, tiny_parts, tmp_path):
    first = run(tmp_path, source, tiny_parts / "vae")
    tars = sorted(tmp_path.glob("*/*.tar"))
    times = [tar.stat().st_mtime_ns for tar in tars]
    tars[1].unlink()
    (tmp_path / "manifest.json").unlink()
    aside = tars[1].parent / ".00001-killed"  # files that a killed job leaves
    aside.mkdir()
    (aside / ".00000.tar.tmp").write_bytes(b"half a shard")
    assert run(tmp_path, source, tiny_parts / "vae") == first == json.loads((tmp_path / "manifest.json").read_text())
    assert [tar.stat().st_mtime_ns == t for tar, t in zip(tars, times, strict=True)] == [True, False, True]
    assert not list(tars[0].parent.glob(".*"))


def test_several_processes_can_clean_up_at_the_same_time(tmp_path):
    for _ in range(10):
        (copies := tmp_path / ".fetched-1").mkdir()
        (tmp_path / ".file.tmp").touch()
        for number in range(200):
            (copies / str(number)).touch()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(latents.delete, [list(tmp_path.iterdir())] * 4))
        assert not list(tmp_path.iterdir())


def test_settings_that_change_the_content_change_the_folder(source, tiny_parts, tmp_path):
    ways = [(), ("crop=random",), ("crop=random", "seed=1"), ("posterior=moments",)]
    made = [run(tmp_path, source, tiny_parts / "vae", *way)["fingerprint"] for way in ways]
    made.append(run(tmp_path, source, tiny_parts / "vae", text=tiny_parts)["fingerprint"])
    made.append(run(tmp_path, source, EMOJI)["fingerprint"])
    assert len(set(made)) == len(list(tmp_path.glob("*/"))) == 6
    assert run(tmp_path, source, tiny_parts / "vae", "seed=7", "batch_size=5")["fingerprint"] == made[0]


# ---------------------------------------------------------------- shards elsewhere, shards that are bad
def test_shards_in_s3_give_the_same_bytes(source, tiny_parts, tmp_path, s3):
    local = run(tmp_path, source, tiny_parts / "vae")
    rows = read_manifest(source)["shards"]
    addresses = [s3.put(f"latents/{n}.tar", Path(row["path"]).read_bytes()) for n, row in enumerate(rows)]
    folder = tmp_path / "remote"
    folder.mkdir()
    write_manifest(folder / "images.json", "images", addresses, {}, {"test": "remote"})
    remote = run(folder, folder / "images.json", tiny_parts / "vae")
    assert digests(remote) == digests(local)
    names = {Path(name).name for name in files(folder) if name.startswith(Path(remote["shards"][0]["name"]).parts[0])}
    assert {name.split(".", 1)[1] for name in names} == {"tar", "json", "index.parquet"}  # no local copies remain


def test_shards_of_the_same_name_do_not_collide(tiny_parts, tmp_path):
    for name, numbers in (("a", range(3)), ("b", range(3, 7))):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", [make_sample(n) for n in numbers])
    tars = [tmp_path / "a/00000.tar", tmp_path / "b/00000.tar"]
    write_manifest(tmp_path / "images.json", "images", tars, {}, {})
    found = run(tmp_path, tmp_path / "images.json", tiny_parts / "vae")
    assert [Path(row["name"]).name for row in found["shards"]] == ["00000.tar", "00001.tar"]
    assert [row["samples"] for row in found["shards"]] == [3, 4]


def test_undecodable_images_are_left_out_and_counted(tiny_parts, tmp_path, capsys):
    samples = [make_sample(n) for n in range(6)]
    samples[2][1]["jpg"] = b"no image"
    lost = ("7", {"jpg": b"nothing", "txt": b"a"})
    manifest = image_manifest(tmp_path, samples, [lost], [make_sample(8)])
    for _ in range(2):  # a shard without decodable images is not encoded again
        found = run(tmp_path, manifest, tiny_parts / "vae")
        assert found["samples"] == 6 and found["dropped"] == {"undecodable": 2}
        assert [Path(row["name"]).name for row in found["shards"]] == ["00000.tar", "00002.tar"]
    said = capsys.readouterr().err
    assert said.count("skipped: ") == 2 and "0.tar: 000000002.jpg" in said
    assert "000000002" not in {s.key for s in samples_of(tmp_path / "manifest.json")}


def test_shards_without_images_give_no_manifest(tiny_parts, tmp_path):
    manifest = image_manifest(tmp_path, [("1", {"jpg": b"nothing", "txt": b"a"})])
    with pytest.raises(DataError, match="images.json: not one image could be encoded"):
        run(tmp_path, manifest, tiny_parts / "vae")
    assert not (tmp_path / "manifest.json").exists()


def test_invalid_input_ends_with_one_message(image_shards, source, tiny_parts, tmp_path):
    spoiled = shutil.copytree(image_shards, tmp_path / "spoiled")
    (spoiled / "00001.tar").unlink()
    for change, message in [
        ({"resolution": "large"}, "resolution: must be a positive whole number, got 'large'"),
        ({"vae": tmp_path / "absent"}, "absent: no such folder; make it with: snakemake"),
        ({"text_encoder": tmp_path / "absent"}, "absent: no such folder; make it with: snakemake"),
        ({"images": spoiled / "manifest.json"}, "00001.tar: shard is missing"),
        ({"posterior": "all"}, "posterior: must be one of mean, sample, moments, got 'all'"),
    ]:
        changed = [f"{key}={value}" for key, value in change.items()]
        with pytest.raises(SystemExit) as end:
            script.main(["precompute_latents.py", *arguments(tmp_path, source, tiny_parts, "workers=0", *changed)])
        assert str(end.value.code).startswith("error: ") and message in str(end.value.code)
        assert not (tmp_path / "manifest.json").exists()
