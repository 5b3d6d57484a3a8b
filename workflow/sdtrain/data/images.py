"""Image files: decode them to upright RGB, and cut squares of pixels with the values of SDXL's micro-conditioning."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from sdtrain.errors import SDTrainError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Image.MAX_IMAGE_PIXELS = 100_000_000  # PIL refuses images of twice as many pixels: decompression bombs
ORIENTATION, TURNED = 0x0112, range(5, 9)  # the EXIF tag, and its values that exchange width and height
LONG = 4  # ratio of the sides from which an image is resized by PIL
ENOUGH = 1.5  # decoded pixels per wanted pixel along a side; with fewer, fine print looks different


class ImageError(SDTrainError, ValueError):
    """Bytes that cannot be decoded as an image; the message says why."""


def prepare(
    data: bytes,
    resolution: int,
    crop: str = "center",
    flip: bool = False,
    rng: np.random.Generator | None = None,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> dict[str, torch.Tensor]:
    """Return the square of `resolution` pixels of an image file, and where it was cut (SDXL's micro-conditioning).

    The image is resized until its shorter side is `resolution` times a factor drawn from `zoom`, cropped ("center" or
    "random"), and mirrored with probability 0.5 if `flip`; `rng` is needed if one of these is random.
    The result has pixels, float32 3 x R x R in [-1, 1]; original_size, int64 (height, width) of the upright file; crop,
    int64 (top, left) of the square in the resized, possibly mirrored image. Raise ImageError for undecodable bytes.
    """
    factor = _needed(rng).uniform(*zoom) if zoom[0] != zoom[1] else zoom[0]
    short = max(resolution, round(resolution * factor))
    image, size = decode(data, short)
    scaled, left, top = _place(size, short, resolution, crop, rng)
    square = _cut(image, scaled, left, top, resolution)
    if flip and _needed(rng).random() < 0.5:
        square, left = square.flip(1), scaled[0] - resolution - left
    pixels = square.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
    return {"pixels": pixels, "original_size": torch.tensor(size[::-1]), "crop": torch.tensor((top, left))}


def decode(data: bytes, at_least: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Return the upright RGB image of a file's bytes, and the file's own upright (width, height).

    With `at_least`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time; its shorter side
    then has at least 1.5 times `at_least` pixels. Raise ImageError for bytes that cannot be decoded.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(ORIENTATION) in TURNED
        size = (image.height, image.width) if turned else image.size
        if at_least:
            side = math.ceil(at_least * ENOUGH)
            image.draft(None, (side, side))
        return to_rgb(image), size
    except UnidentifiedImageError:
        raise ImageError("undecodable image (unknown format)") from None
    except Exception as error:  # PIL's parsers raise many kinds for damaged files
        raise ImageError(f"undecodable image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return upright RGB, 8 bits: apply the EXIF orientation (to `image` itself), lay alpha onto white, convert."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float32).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def center_square(image: Image.Image, resolution: int) -> Image.Image:
    """Return the central square of `resolution` pixels of an RGB image as `prepare` cuts it."""
    scaled, left, top = _place(image.size, resolution, resolution, "center", None)
    return Image.fromarray(_cut(image, scaled, left, top, resolution).numpy())


def _needed(rng: np.random.Generator | None) -> np.random.Generator:
    assert rng is not None, "random crops, flips and zooms need a random generator"
    return rng


def _place(
    size: tuple[int, int], short: int, resolution: int, crop: str, rng: np.random.Generator | None
) -> tuple[list[int], int, int]:
    """Return the (width, height) with a shorter side of `short`, and the square's left and top in it."""
    scaled = [max(short, round(side * short / min(size))) for side in size]
    room = [side - resolution for side in scaled]
    left, top = (int(_needed(rng).integers(r + 1)) if crop == "random" else r // 2 for r in room)
    return scaled, left, top


def _cut(image: Image.Image, scaled: list[int], left: int, top: int, resolution: int) -> torch.Tensor:
    """Return the square at (left, top) of the image resized to `scaled` (width, height): uint8 R x R x 3.

    torch and PIL resize alike, to one level of 255. torch takes a fraction of the time; PIL resizes only what is kept,
    so that an extremely long strip costs no more than any other image.
    """
    if max(scaled) <= LONG * min(scaled):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        whole = torch.nn.functional.interpolate(pixels, scaled[::-1], mode="bicubic", antialias=True)[0]
        return whole[:, top : top + resolution, left : left + resolution].permute(1, 2, 0)
    across, down = (side / new for side, new in zip(image.size, scaled, strict=True))  # source pixels a pixel
    right, bottom = (left + resolution) * across, (top + resolution) * down
    box = (left * across, top * down, min(image.width, right), min(image.height, bottom))
    return torch.from_numpy(np.array(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box)))
