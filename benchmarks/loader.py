"""Measure the loader beside the plain webdataset pipeline, with latent shards, and at ten times the shards.

Images a second of one process: 256 px from 1024 px JPEGs, by this loader and by decode("pil"), resize, centre crop, to
tensor; latents of the same. Then the peak memory of a process that walks an epoch of n and of 10 n shards.
"""

import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import save

from sdtrain.data import tars
from sdtrain.data.datasets import ImageDataset, LatentDataset
from sdtrain.data.manifest import write_manifest
from sdtrain.data.stream import batches

SIDE, RESOLUTION, BATCH, ROUNDS = 1024, 256, 16, 5
IMAGES, LATENTS = 64, 1024
SHARDS, WINDOW, READ = 40, 16, 2000


# ---------------------------------------------------------------- data
def draw_photo(seed: int) -> bytes:
    """Return a JPEG like a photograph: smooth shapes at several scales, edges, a little noise; about 200 KB."""
    rng = np.random.default_rng(seed)
    pixels = np.full((SIDE, SIDE, 3), 128.0)
    for cells, contrast in ((4, 80), (16, 40), (64, 20), (256, 8)):
        for channel, noise in enumerate(rng.normal(0, contrast, (3, cells, cells)).astype(np.float32)):
            pixels[..., channel] += Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    for a, b, c in rng.normal(0, 1, (12, 3)):
        pixels[a * x + b * y > 0.3 * c] += rng.normal(0, 30, 3)
    pixels += rng.normal(0, 3, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shards(folder: Path) -> dict[str, str]:
    """Write one shard of JPEGs and one of latents. Return the paths of their manifests."""
    photos = [draw_photo(i) for i in range(8)]
    paths = {kind: folder / f"{kind}.tar" for kind in ("images", "latents")}
    with (
        tars.write_tar(paths["images"]) as add_image,
        tars.write_tar(paths["latents"]) as add_latents,
    ):
        for i in range(IMAGES):
            add_image(f"{i:05d}", {"jpg": photos[i % len(photos)], "txt": b"a caption"})
        for i in range(LATENTS):
            add_latents(f"{i:05d}", {"latent": save({"latents": torch.randn(4, 32, 32).half()}), "txt": b"a caption"})
    for kind, path in paths.items():
        write_manifest(folder / f"{kind}.json", kind, [path], {}, {})
    return {"images": str(folder / "images.json"), "latents": str(folder / "latents.json"), "tar": str(paths["images"])}


# ---------------------------------------------------------------- speed
def plain(path: str) -> Iterable[tuple[torch.Tensor, list[str]]]:
    """Return webdataset's usual pipeline (as in open-diffusion), in batches."""

    def transform(sample: dict) -> tuple[torch.Tensor, str, str]:
        image = sample["jpg"]
        scale = RESOLUTION / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - RESOLUTION) // 2 for side in image.size)
        image = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
        return pixels, sample["txt"], sample["__key__"]

    return wds.WebDataset(path, shardshuffle=False).decode("pil").map(transform).batched(BATCH)


def rate(stream: Iterable, images: int) -> float:
    """Return images a second."""
    begin = time.perf_counter()
    for _ in itertools.islice(stream, images // BATCH):
        pass
    return images / (time.perf_counter() - begin)


def difference(dataset: ImageDataset, path: str) -> float:
    """Return the mean absolute difference of this loader's pixels and the plain pipeline's, in levels of 255."""
    reference = {key: pixels for batch in plain(path) for pixels, key in zip(batch[0], batch[2], strict=True)}
    items = [dataset[position] for position in range(IMAGES)]
    return 127.5 * statistics.mean((i["pixels"] - reference[i["key"]]).abs().mean().item() for i in items)


# ---------------------------------------------------------------- memory
def peak() -> float:
    """Return the peak memory of this process in MB. (getrusage would include that of the parent.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def walk(manifest: str) -> None:
    """Read samples across an epoch; print this process's peak memory, and the part due to reading, in MB."""
    before = peak()
    dataset = LatentDataset(manifest, window=WINDOW)
    for position in range(0, len(dataset), len(dataset) // READ):
        dataset[position]
    print(peak(), peak() - before)


def memory(folder: Path, tar: Path, count: int) -> tuple[float, float]:
    """Return the peak MB of a process that reads an epoch of `count` linked shards, and the part of reading."""
    links = [folder / f"{count}-{i:05d}.tar" for i in range(count)]
    for link in links:
        os.link(tar, link)
    manifest = folder / f"{count}.json"
    write_manifest(manifest, "latents", links, {}, {})
    done = subprocess.run([sys.executable, __file__, str(manifest)], check=True, capture_output=True, text=True)
    whole, part = map(float, done.stdout.split())
    print(f"peak memory at {count} shards: {whole:.0f} MB, of which the walk {part:.0f} MB")
    return whole, part


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_shards(folder)
        images, latents = ImageDataset(paths["images"], RESOLUTION), LatentDataset(paths["latents"])
        ratios, gains = [], []
        for round_ in range(ROUNDS):  # alternately, so that a slower machine slows all
            w = rate(plain(paths["tar"]), IMAGES)
            i = rate(batches(images, BATCH), IMAGES)
            z = rate(batches(latents, BATCH), LATENTS)
            ratios.append(i / w)
            gains.append(z / i)
            print(f"round {round_ + 1}: webdataset {w:,.0f} img/s, images {i:,.0f} img/s, latents {z:,.0f} img/s")
        print(f"images / webdataset: {statistics.median(ratios):.2f} (at least 2)")
        print(f"pixels differ by {difference(images, paths['tar']):.2f} of 255 on average (at most 2)")
        print(f"latents / images: {statistics.median(gains):.1f} (at least 20)")
        few, many = (memory(folder, folder / "latents/00000.tar", count) for count in (SHARDS, 10 * SHARDS))
        print(f"memory at ten times the shards: {many[0] / few[0]:.2f} times, of the walk {many[1] / few[1]:.2f} times")


if __name__ == "__main__":
    walk(sys.argv[1]) if len(sys.argv) > 1 else main()
