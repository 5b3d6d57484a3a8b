"""Images of the report as data URIs: tiles of the sampled grids, beside real images of the same captions."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrain.data import images, tars
from sdtrain.data.manifest import read_manifest
from sdtrain.models.feature_networks import FeatureError

TILE = 256  # pixels per side at most
SEARCHED = 16  # shards that are searched for the real image of a caption


def show_grids(rows: list[dict[str, Any]], labels: list[str], data: Path | None) -> list[dict[str, Any]]:
    """Return the grids: title, labels of columns, and per caption the images of all rows and a real one, or None."""
    tiles = []
    for samples in (row["samples"] for row in rows):
        tiles.append({grid["title"]: cut(grid, samples["resolution"]) for grid in samples["grids"]})
    captions: dict[str, dict[str, None]] = {}
    for row in tiles:
        for title, shown in row.items():
            captions.setdefault(title, {}).update(dict.fromkeys(shown))
    wanted = {caption for group in captions.values() for caption in group}
    real = real_images(data, wanted, rows[-1]["samples"]["resolution"]) if data else {}
    found = []
    for title, group in captions.items():
        columns = [row.get(title, {}) for row in tiles]
        columns += [real] if any(caption in real for caption in group) else []
        cards = [{"caption": caption, "images": [column.get(caption) for column in columns]} for caption in group]
        found.append({"title": title, "labels": [*labels, "real image"][: len(columns)], "cards": cards})
    return found


def cut(grid: dict[str, Any], resolution: int) -> dict[str, str | None]:
    """Return the data URI of each image of a grid, by caption."""
    try:
        sheet = Image.open(grid["image"]).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise FeatureError(f"{grid['image']}: not a readable image ({error}); sample again") from None
    places = [divmod(i, grid["columns"]) for i in range(len(grid["prompts"]))]
    boxes = [(x * resolution, y * resolution, (x + 1) * resolution, (y + 1) * resolution) for y, x in places]
    return {prompt: data_uri(sheet.crop(box)) for prompt, box in zip(grid["prompts"], boxes, strict=True)}


def data_uri(image: Image.Image) -> str:
    """Return a WebP of at most TILE pixels a side as a data URI."""
    image.thumbnail((TILE, TILE))
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def real_images(data: Path, captions: set[str], resolution: int) -> dict[str, str | None]:
    """Return the data URI of the first image with each caption, from the first shards of both splits."""
    found: dict[str, str | None] = {}
    for split in ("train", "held_out"):
        manifest = data / split / "shards" / "manifest.json"
        paths = [row["path"] for row in read_manifest(manifest)["shards"]] if manifest.exists() else []
        for sample in (sample for path in paths[:SEARCHED] for sample in tars.index_tar(path)):
            caption = sample.read("txt").decode("utf-8", "replace").strip() if "txt" in sample.fields else None
            extension = next((e for e in images.IMAGE_EXTENSIONS if e in sample.fields), None)
            if caption in captions and not found.get(caption) and extension:
                found[caption] = real_image(sample.read(extension), resolution)
    return found


def real_image(data: bytes, resolution: int) -> str | None:
    """Return the data URI of an image as the training sees it, or None if it cannot be decoded."""
    try:
        image, _ = images.decode(data)
    except images.ImageError:
        return None
    return data_uri(images.center_square(image, resolution))
