"""The stream of a training: which sample stands where, what becomes of an image, and what is lost on the way."""

from __future__ import annotations

import io
import json
import random
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from samples import draw, jpeg, make_sample, write_tar

from sdtrain import config, loader, schema, shards
from sdtrain.loader import DataError


@pytest.fixture(scope="module")
def dataset(image_shards):
    return loader.ImageDataset(str(image_shards / "manifest.json"), 32, crop="random", flip=True, seed=7)


def take(stream, count: int) -> list[dict]:
    return [batch for batch, _ in zip(stream, range(count), strict=False)]


def keys(dataset, count: int, **options) -> list[str]:
    return [key for batch in take(loader.batches(dataset, **options), count) for key in batch["key"]]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------- order
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), samples=st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed, epoch, samples):
    assert sorted(loader.order(seed, epoch, samples)) == list(range(samples))


def test_epochs_and_seeds_differ():
    assert not np.array_equal(loader.order(0, 0, 50), loader.order(0, 1, 50))
    assert not np.array_equal(loader.order(0, 0, 50), loader.order(1, 0, 50))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_ranks_and_workers_share_the_epoch_out(dataset, world_size, workers):
    """Two epochs of 41 samples, in global batches of 6: each sample once an epoch, in one order at any world size."""
    ranks = [
        keys(dataset, 14, batch_size=6 // world_size, rank=r, world_size=world_size, workers=workers)
        for r in range(world_size)
    ]
    size = 6 // world_size
    stream = [key for batch in range(14) for rank in ranks for key in rank[batch * size : (batch + 1) * size]]
    expected = [dataset.locate(p).key for p in range(84)]
    assert stream == expected
    assert sorted(stream[:41]) == sorted(stream[41:82]) == sorted(s.key for s in dataset.samples)


def test_a_resume_goes_on_with_the_same_images(dataset):
    whole = take(loader.batches(dataset, 4), 6)
    again = take(loader.batches(dataset, 4, start=12), 3)
    for one, two in zip(whole[3:], again, strict=True):
        assert one["key"] == two["key"] and one["caption"] == two["caption"]
        assert torch.equal(one["pixels"], two["pixels"])  # crops and flips too
    assert whole[0]["pixels"].shape == (4, 3, 32, 32) and whole[0]["pixels"].dtype == torch.float32
    assert -1 <= whole[0]["pixels"].min() and whole[0]["pixels"].max() <= 1


# ---------------------------------------------------------------- which samples
def test_samples_without_a_field_or_outside_a_filter_are_counted(tmp_path):
    samples = [make_sample(n) for n in range(10)]  # pwatermark 0.0, 0.1 … 0.9
    del samples[0][1]["txt"], samples[1][1]["jpg"], samples[2][1]["json"]
    samples[3][1]["json"] = b"{cut"
    samples[4][1]["json"] = b"[1]"
    found = loader.find_samples(str(write_tar(tmp_path / "a.tar", samples)))
    kept, dropped = loader.keep_samples(found, [("png", "jpg"), ("txt",)], {"pwatermark": "<=0.7"})
    assert [int(s.key) for s in kept] == [5, 6, 7]
    assert dropped == {"no txt": 1, "no png/jpg": 1, "no readable json": 3, "filters": 2}
    kept, dropped = loader.keep_samples(found, [("jpg",)], None)
    assert len(kept) == 9 and dropped == {"no jpg": 1}


def test_nothing_left_says_why(image_shards):
    found = loader.find_samples(str(image_shards / "manifest.json"))
    with pytest.raises(DataError, match=r"no sample is left of 41: .'filters': 41.; loosen dataset.params.filters"):
        loader.keep_samples(found, [("jpg",)], {"original_width": ">=512"})
    with pytest.raises(DataError, match=r"^dataset\.params\.filters\.original_width: cannot read predicate '=>5'"):
        loader.keep_samples(found, [("jpg",)], {"original_width": "=>5"})


def test_braces_and_manifests_name_the_same_samples(image_shards):
    braces = loader.find_samples(f"{image_shards}/{{00000..00002}}.tar")
    assert braces == loader.find_samples(str(image_shards / "manifest.json")) and len(braces) == 41
    with pytest.raises(shards.ShardError, match="00003.tar: shard is missing"):
        loader.find_samples(f"{image_shards}/{{00000..00003}}.tar")


@pytest.mark.parametrize("path", ["s3://bucket/{0..3}.tar", "pipe:aws s3 cp s3://bucket/0.tar -"])
def test_remote_shards_are_refused_with_a_remedy(path):
    with pytest.raises(
        shards.ShardError, match="shards are read from local folders; copy them, then set dataset.params.path"
    ):
        loader.find_samples(path)


# ---------------------------------------------------------------- images
def same(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 3) -> bool:
    return np.abs(np.asarray(loader.to_rgb(image), dtype=int) - colour).max() <= tolerance


def test_every_mode_becomes_upright_rgb():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert same(clear, (255, 255, 255)) and same(clear.convert("LA"), (255, 255, 255))
    assert same(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), (255, 127, 127))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert same(palette, (10, 200, 30))
    palette.info["transparency"] = 1
    assert same(palette, (255, 255, 255))
    assert same(Image.new("1", (4, 4), 1), (255, 255, 255)) and same(Image.new("L", (4, 4), 99), (99, 99, 99))
    assert same(Image.open(io.BytesIO(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))), (254, 0, 0), 4)


def test_sixteen_bits_of_grey_keep_their_shades():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO(encode(Image.fromarray(ramp), "PNG"))
    found = np.asarray(loader.to_rgb(Image.open(file)))
    assert np.array_equal(found[..., 0], np.arange(256).reshape(16, 16)) and (found[..., 0] == found[..., 2]).all()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (0, 0, 8, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright = loader.to_rgb(Image.open(io.BytesIO(encode(image, "PNG", exif=exif))))
    assert (
        upright.size == (4, 8) and upright.getpixel((3, 0)) == (0, 0, 255) and upright.getpixel((0, 0)) == (255, 0, 0)
    )


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "green", "blue")]
    file = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert same(Image.open(io.BytesIO(file)), (255, 0, 0))


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    resolution=st.integers(1, 96),
    crop=st.sampled_from(["center", "random"]),
    zoom=st.floats(1.0, 3.0),
)
@settings(deadline=None, max_examples=60)
def test_crops_are_square_whatever_the_shape(width, height, resolution, crop, zoom):
    image = Image.new("RGB", (width, height), (9, 120, 230))
    found = loader.resize_and_crop(image, resolution, crop, np.random.default_rng(0), zoom)
    assert found.size == (resolution, resolution)
    assert (np.asarray(found) == (9, 120, 230)).all()


def test_a_strip_of_extreme_length_costs_little():
    found = loader.resize_and_crop(Image.new("RGB", (1, 60_000), "red"), 512, "random", np.random.default_rng(0))
    assert found.size == (512, 512)  # resized whole, it would be 47 GB


def test_the_center_is_the_center_and_random_crops_move():
    image = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (32, 1))).convert("RGB")
    rng = np.random.default_rng(0)
    columns = np.asarray(loader.resize_and_crop(image, 32, "center", rng))[0, :, 0]
    assert np.array_equal(columns, np.arange(32, 64))
    starts = {int(np.asarray(loader.resize_and_crop(image, 32, "random", rng))[0, 0, 0]) for _ in range(300)}
    assert min(starts) == 0 and max(starts) == 64 and len(starts) > 50
    zoomed = np.asarray(loader.resize_and_crop(image, 32, "center", rng, zoom=2.0), dtype=int)[0, :, 0]
    assert abs(zoomed[0] - 40) <= 1 and abs(zoomed[-1] - 55) <= 1


def test_a_bomb_is_refused(tmp_path):
    bomb = bytearray(encode(Image.new("1", (1, 1)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (sample,) = loader.find_samples(str(write_tar(tmp_path / "a.tar", [("7", {"png": bytes(bomb)})])))
    with pytest.raises(DataError, match=r"a.tar: 7.png: undecodable image \(.*decompression bomb"):
        loader.read_image(sample)


@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), seed=st.integers(0, 2**32), cut=st.booleans())
@settings(deadline=None, max_examples=80)
def test_damaged_files_decode_or_are_named(tmp_path_factory, kind, seed, cut):
    rng = random.Random(seed)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    data = bytearray(encode(draw(seed % 9)[0], kind, exif=exif))
    for _ in range(rng.randrange(1, 12)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    data = bytes(data[: rng.randrange(len(data))] if cut else data)
    tar = write_tar(tmp_path_factory.mktemp("damaged") / "a.tar", [("7", {"jpg": data})])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert loader.read_image(loader.find_samples(str(tar))[0]).mode == "RGB"
        except DataError as error:
            assert "7.jpg: undecodable image" in str(error)


# ---------------------------------------------------------------- losses
def spoiled(folder, bad: set[int], count: int = 40) -> loader.ImageDataset:
    """Images whose files at these numbers are no images; stream position p is dataset.locate(p)."""
    samples = [make_sample(n) for n in range(count)]
    for number in bad:
        samples[number][1]["jpg"] = b"no image"
    return loader.ImageDataset(str(write_tar(folder / "a.tar", samples)), 16)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_gives_its_place_to_the_next_at_any_world_size(tmp_path, workers):
    dataset = spoiled(tmp_path, {5, 6, 31})
    bad = [p for p in range(40) if int(dataset.locate(p).key) in {5, 6, 31}]
    expected = [dataset.locate(p).key for p in range(41)]
    for p in reversed(bad):
        expected[p] = expected[p + 1]
    assert keys(dataset, 40, batch_size=1, workers=workers) == expected[:40]
    two = [keys(dataset, 10, batch_size=2, rank=rank, world_size=2, workers=workers) for rank in (0, 1)]
    assert [k for i in range(10) for rank in two for k in rank[2 * i : 2 * i + 2]] == expected[:40]


def test_a_skipped_image_is_said(tmp_path):
    dataset = spoiled(tmp_path, {3})
    with pytest.warns(UserWarning, match=r"skipped: .*a.tar: 000000003.jpg: undecodable image"):
        keys(dataset, 10, batch_size=4)


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_many_lost_images_end_the_training(tmp_path):
    dataset = spoiled(tmp_path, set(range(0, 40, 5)))  # one in five
    with pytest.raises(
        DataError, match=r"11 of \d+ images are lost, the last: .*undecodable.*; rebuild or filter the shards"
    ):
        keys(dataset, 100, batch_size=4)
    tolerable = spoiled(tmp_path, {7, 9})  # one in twenty, for as long as it takes
    assert len(keys(tolerable, 100, batch_size=4)) == 400


@pytest.mark.filterwarnings("ignore:skipped")
def test_not_one_image_is_one_message(tmp_path):
    with pytest.raises(DataError, match="not one of 3 images can be read, the last: .*; rebuild the shards"):
        keys(spoiled(tmp_path, {0, 1, 2}, count=3), 1, batch_size=2)


# ---------------------------------------------------------------- classes
def classes(folder, prompts, workers=0):
    samples = [(f"{n}", {"jpg": jpeg(draw(n)[0]), "cls": str(n % 3).encode()}) for n in range(6)]
    (folder / "prompts.json").write_text(prompts if isinstance(prompts, str) else json.dumps(prompts))
    params = {
        "path": str(write_tar(folder / "a.tar", samples)),
        "resolution": 16,
        "idx_to_prompt": str(folder / "prompts.json"),
    }
    cfg = config.load(
        schema.DatasetConfig, values={"type": "ClassificationWebDataset", "params": {**params, "batch_size": 1}}
    )
    return loader.open_dataset(cfg, 0)


@pytest.mark.parametrize("prompts", [["cat", "dog", "fox"], {"0": "cat", "1": "dog", "2": "fox"}])
def test_a_class_becomes_its_prompt(tmp_path, prompts):
    (batch,) = take(loader.batches(classes(tmp_path, prompts), 6), 1)
    assert batch["caption"] == [("cat", "dog", "fox")[int(key) % 3] for key in batch["key"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_a_prompt_is_one_plain_message(tmp_path, workers):
    stream = loader.batches(classes(tmp_path, ["cat", "dog"]), 6, workers=workers)
    with pytest.raises(DataError) as error:
        next(stream)
    assert str(error.value).startswith(str(tmp_path / "a.tar")) and "\n" not in str(error.value)
    assert "no prompt for class '2' in dataset.params.idx_to_prompt" in str(error.value)


def test_prompts_that_cannot_be_read_are_named(tmp_path):
    for text, reason in (
        ("{", "not a readable JSON file"),
        ("3", "a list or a mapping of class -> prompt is expected"),
    ):
        with pytest.raises(DataError, match=f"dataset.params.idx_to_prompt: .*prompts.json: {reason}"):
            classes(tmp_path, text)
    cfg = config.load(schema.DatasetConfig, values={"type": "ClassificationWebDataset", "params": {"path": "x"}})
    with pytest.raises(DataError, match="idx_to_prompt: ClassificationWebDataset needs a JSON file"):
        loader.open_dataset(cfg, 0)


# ---------------------------------------------------------------- latents
@pytest.mark.filterwarnings("ignore:skipped")
def test_latents_are_read_and_broken_ones_skipped(tmp_path):
    fields = [
        {"latent": save({"latents": torch.full((4, 8, 8), float(n)).half()}), "txt": f"caption {n}".encode()}
        for n in range(30)
    ]
    fields[3]["latent"] = b"nothing"
    fields[4]["latent"] = save({"other": torch.zeros(1)})
    dataset = loader.LatentDataset(str(write_tar(tmp_path / "a.tar", [(str(n), f) for n, f in enumerate(fields)])))
    (batch,) = take(loader.batches(dataset, 30), 1)
    assert batch["latents"].shape == (30, 4, 8, 8) and batch["latents"].dtype == torch.float32
    assert batch["latents"][:, 0, 0, 0].tolist() == [float(key) for key in batch["key"]]
    assert batch["caption"] == [f"caption {key}" for key in batch["key"]] and not {"3", "4"} & set(batch["key"])
