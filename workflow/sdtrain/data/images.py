"""Bytes of an image file -> upright RGB -> a square of pixels, with what SDXL's conditioning wants to know of it."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from sdtrain.errors import SDTrainError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Image.MAX_IMAGE_PIXELS = 100_000_000  # PIL warns of a larger image and refuses one of twice that: a decompression bomb
ORIENTATION, TURNED = 0x0112, range(5, 9)  # the EXIF tag, and its values that exchange width and height
LONG = 4  # sides' ratio of a strip
ENOUGH = 1.5  # decoded pixels a pixel wanted, a side: fewer, and fine print looks different


class ImageError(SDTrainError, ValueError):
    """Bytes that are no image; the message says why."""


def prepare(
    data: bytes,
    resolution: int,
    crop: str = "center",
    flip: bool = False,
    rng: np.random.Generator | None = None,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> dict[str, torch.Tensor]:
    """The square of `resolution` pixels of an image file, and where it was cut (SDXL's micro-conditioning).

    The image is resized until its shorter side is `resolution` times a factor drawn from `zoom`, cut ("center" or
    "random"), and mirrored in half of the cases if `flip`; `rng` is needed where one of these is random.
    Returns pixels float32 3 x R x R in [-1, 1]; original_size int64 (height, width) of the file, upright; crop int64
    (top, left) of the square in the resized, perhaps mirrored image. Raises ImageError for undecodable bytes.
    """
    factor = rng.uniform(*zoom) if zoom[0] != zoom[1] else zoom[0]
    short = max(resolution, round(resolution * factor))
    image, size = _decode(data, short)
    scaled, left, top = _place(size, short, resolution, crop, rng)
    square = _cut(image, scaled, left, top, resolution)
    if flip and rng.random() < 0.5:
        square, left = square.flip(1), scaled[0] - resolution - left
    return {"pixels": _scale(square), "original_size": torch.tensor(size[::-1]), "crop": torch.tensor((top, left))}


def decode(data: bytes, at_least: int | None = None) -> Image.Image:
    """The upright RGB image of a file's bytes; raises ImageError for bytes that cannot be decoded.

    With `at_least`, a JPEG may come at 1/2, 1/4 or 1/8 of its size, decoded so in a fraction of the time: with half as
    many pixels again as `at_least` on its shorter side, or more.
    """
    return _decode(data, at_least)[0]


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB, 8 bits: EXIF orientation applied (to `image` itself), alpha laid onto white, any mode converted."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float32).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_and_crop(
    image: Image.Image, resolution: int, crop: str, rng: np.random.Generator | None, zoom: float = 1.0
) -> Image.Image:
    """The square of `resolution` pixels, "center" or "random", of an RGB image as `prepare` cuts it."""
    short = max(resolution, round(resolution * zoom))
    scaled, left, top = _place(image.size, short, resolution, crop, rng)
    return Image.fromarray(_cut(image, scaled, left, top, resolution).numpy())


def to_pixels(image: Image.Image) -> torch.Tensor:
    """float32 tensor 3 x H x W in [-1, 1] of an RGB image."""
    return _scale(torch.from_numpy(np.array(image)))


def _scale(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 H x W x 3 -> float32 3 x H x W in [-1, 1]."""
    pixels = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(127.5).sub_(1.0)


def _decode(data: bytes, at_least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The image as `decode` gives it, and the file's own upright (width, height)."""
    try:
        image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(ORIENTATION) in TURNED
        size = image.size[::-1] if turned else image.size
        if at_least:
            image.draft(None, [math.ceil(at_least * ENOUGH)] * 2)
        return to_rgb(image), size
    except UnidentifiedImageError:
        raise ImageError("undecodable image (of no kind that is known)") from None
    except Exception as error:  # of a damaged file, PIL's parsers raise nearly everything
        raise ImageError(f"undecodable image ({error})") from None


def _place(size: tuple[int, int], short: int, resolution: int, crop: str, rng: np.random.Generator | None):
    """The (width, height) with a shorter side of `short`, and the square's left and top in it."""
    scaled = [max(short, round(side * short / min(size))) for side in size]
    room = [side - resolution for side in scaled]
    left, top = (int(rng.integers(r + 1)) if crop == "random" else r // 2 for r in room)
    return scaled, left, top


def _cut(image: Image.Image, scaled: list[int], left: int, top: int, resolution: int) -> torch.Tensor:
    """The square at (left, top) of the image resized to `scaled` (width, height): uint8 R x R x 3.

    torch and PIL resize alike, to one level of 255: torch in a fraction of the time; PIL only what is kept, so that a
    strip of extreme length costs no more than any other image.
    """
    if max(scaled) <= LONG * min(scaled):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        whole = torch.nn.functional.interpolate(pixels, scaled[::-1], mode="bicubic", antialias=True)[0]
        return whole[:, top : top + resolution, left : left + resolution].permute(1, 2, 0)
    unit = [side / new for side, new in zip(image.size, scaled, strict=True)]  # source pixels a pixel
    box = [begin * u for begin, u in zip((left, top), unit, strict=True)]
    box += [min(side, (b + resolution) * u) for side, b, u in zip(image.size, (left, top), unit, strict=True)]
    return torch.from_numpy(np.array(image.resize((resolution, resolution), Image.Resampling.BICUBIC, tuple(box))))
