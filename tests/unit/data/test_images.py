"""Tests of decoding and cropping: upright RGB from any file, the square crop, and its reported position."""

from __future__ import annotations

import io
import random
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import draw, jpeg

from sdtrain.data import images


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 3) -> bool:
    return np.abs(np.asarray(images.to_rgb(image), dtype=int) - colour).max() <= tolerance


def square(image: Image.Image, resolution: int, *crop, zoom: float = 1.0) -> np.ndarray:
    """Return the levels of the square that `prepare` cuts from an image, R x R x 3."""
    pixels = images.prepare(encode(image, "PNG"), resolution, *crop, zoom=(zoom, zoom))["pixels"]
    return ((pixels.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(int)


def photo(width: int, height: int) -> Image.Image:
    """Return a smooth picture with an edge."""
    coarse = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 :, width // 2 :] //= 2
    return Image.fromarray(pixels)


# ---------------------------------------------------------------- decoding
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
    found = np.asarray(images.decode(encode(Image.fromarray(ramp), "PNG"))[0])
    assert np.array_equal(found[..., 0], np.arange(256).reshape(16, 16)) and (found[..., 0] == found[..., 2]).all()


def test_first_frame_of_an_animation_is_used():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "green", "blue")]
    file = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert same(images.decode(file)[0], (255, 0, 0))


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (0, 0, 8, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: rotate by 90 degrees clockwise
    data = encode(image, "PNG", exif=exif)
    upright, size = images.decode(data)
    assert upright.size == size == (4, 8)
    assert upright.getpixel((3, 0)) == (0, 0, 255) and upright.getpixel((0, 0)) == (255, 0, 0)
    assert images.prepare(data, 4)["original_size"].tolist() == [8, 4]  # height, width


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_small_enough_and_looks_the_same(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(1001, 800).convert(mode), "JPEG", quality=90, exif=exif)
    whole, small = images.decode(data)[0], images.decode(data, at_least=100)[0]
    assert min(whole.size) == 800 and 150 <= min(small.size) <= 200
    assert min(images.decode(data, at_least=600)[0].size) == 800  # half the size would be too small
    expected = np.asarray(images.center_square(whole, 100), dtype=float)
    found = (images.prepare(data, 100)["pixels"].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(found - expected).mean() < 1.5
    assert images.prepare(data, 100)["original_size"].tolist() == [*whole.size[::-1]]


def test_decompression_bomb_is_refused():
    bomb = bytearray(encode(Image.new("1", (1, 1)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(images.ImageError, match=r"undecodable image \(.*decompression bomb"):
        images.decode(bytes(bomb))


@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), seed=st.integers(0, 2**32), cut=st.booleans())
@settings(deadline=None, max_examples=150)
def test_damaged_files_decode_or_are_refused(kind, seed, cut):
    rng = random.Random(seed)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    data = bytearray(encode(draw(seed % 9)[0], kind, exif=exif))
    for _ in range(rng.randrange(1, 12)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    data = bytes(data[: rng.randrange(len(data))] if cut else data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert images.prepare(data, 16)["pixels"].isfinite().all()
        except images.ImageError as error:
            assert "undecodable image" in str(error)


# ---------------------------------------------------------------- squares
def test_pixels_are_between_minus_one_and_one():
    colours = np.array([[[0, 51, 255], [255, 0, 102]]] * 2, dtype=np.uint8)
    pixels = images.prepare(encode(Image.fromarray(colours), "PNG"), 2)["pixels"]
    assert pixels.shape == (3, 2, 2) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.allclose(pixels[:, 0].T, torch.tensor([[-1.0, -0.6, 1.0], [1.0, -1.0, -0.2]]))


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    resolution=st.integers(1, 96),
    crop=st.sampled_from(["center", "random"]),
    zoom=st.floats(1.0, 3.0),
)
@settings(deadline=None, max_examples=60)
def test_crops_are_square_whatever_the_shape(width, height, resolution, crop, zoom):
    data = encode(Image.new("RGB", (width, height), (9, 120, 230)), "PNG")
    found = images.prepare(data, resolution, crop, True, np.random.default_rng(0), (1.0, zoom))
    assert found["pixels"].shape == (3, resolution, resolution)
    assert torch.allclose(found["pixels"][:, 0, 0], torch.tensor([9.0, 120.0, 230.0]) / 127.5 - 1)
    assert torch.equal(found["pixels"], found["pixels"][:, :1, :1].expand_as(found["pixels"]))
    assert found["original_size"].tolist() == [height, width] and (found["crop"] >= 0).all()


def test_a_strip_of_extreme_length_costs_little():
    found = square(Image.new("RGB", (1, 60_000), "red"), 512, "random", False, np.random.default_rng(0))
    assert found.shape == (512, 512, 3)  # the whole resized image would need 47 GB


@given(width=st.integers(20, 300), height=st.integers(20, 300), resolution=st.integers(8, 96), zoom=st.floats(1.0, 2.0))
@settings(deadline=None, max_examples=40)
def test_strips_and_other_images_are_resized_alike(width, height, resolution, zoom):
    """Both ways of resizing give the result of PIL for the whole image."""
    image = photo(width, height)
    short = max(resolution, round(resolution * zoom))
    size = [max(short, round(side * short / min(image.size))) for side in image.size]
    left, top = ((side - resolution) // 2 for side in size)
    whole = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + resolution, top + resolution))
    difference = np.abs(square(image, resolution, zoom=zoom) - np.asarray(whole, dtype=int))
    assert difference.max() <= 2 and difference.mean() < 0.5


def test_center_crop_is_centered_and_random_crops_vary():
    image = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (32, 1))).convert("RGB")
    rng = np.random.default_rng(0)
    columns = square(image, 32)[0, :, 0]
    assert np.array_equal(columns, np.arange(32, 64))
    starts = {int(square(image, 32, "random", False, rng)[0, 0, 0]) for _ in range(300)}
    assert min(starts) == 0 and max(starts) == 64 and len(starts) > 50
    zoomed = square(image, 32, zoom=2.0)[0, :, 0]
    assert abs(zoomed[0] - 40) <= 1 and abs(zoomed[-1] - 55) <= 1


def test_reported_crop_is_the_actual_one():
    """Column x of the image has level x, so the pixels show the left edge of the crop, mirrored or not."""
    data = encode(Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (32, 1))).convert("RGB"), "PNG")
    mirrored = 0
    for seed in range(20):
        found = images.prepare(data, 32, "random", True, np.random.default_rng(seed))
        levels = ((found["pixels"][0, 0] + 1) * 127.5).round()
        top, left = found["crop"].tolist()
        assert top == 0 and found["original_size"].tolist() == [32, 96]
        mirror = bool(levels[0] > levels[-1])
        assert levels[0] == (95 - left if mirror else left)
        mirrored += mirror
    assert 0 < mirrored < 20
    assert images.prepare(data, 32)["crop"].tolist() == [0, 32]


def test_same_seed_gives_the_same_crop():
    data = jpeg(draw(4)[0])
    one, two, other = (
        images.prepare(data, 16, "random", True, np.random.default_rng(s), (1.0, 2.0)) for s in (5, 5, 6)
    )
    assert torch.equal(one["pixels"], two["pixels"]) and torch.equal(one["crop"], two["crop"])
    assert not torch.equal(one["pixels"], other["pixels"])
