"""Images a second of one loader process: 256 px from 512 px JPEGs, against latent shards of the same."""

import io
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from sdtrain import loader, shards

SAMPLES, BATCH, ROUNDS = 128, 16, 3


def write_shards(folder: Path) -> dict[str, str]:
    """One shard of JPEGs and one of latents; returns their paths."""
    rng = np.random.default_rng(0)
    with (
        shards.ShardWriter(folder / "images", SAMPLES) as images,
        shards.ShardWriter(folder / "latents", SAMPLES) as latents,
    ):
        for i in range(SAMPLES):
            coarse = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
            images.add(f"{i:05d}", {"jpg": buffer.getvalue(), "txt": b"a caption"})
            latents.add(f"{i:05d}", {"latent": save({"latents": torch.randn(4, 32, 32).half()}), "txt": b"a caption"})
    return {"images": str(images.paths[0]), "latents": str(latents.paths[0])}


def rate(dataset: loader.PositionDataset) -> float:
    """Images a second over one epoch."""
    stream = loader.batches(dataset, BATCH)
    begin = time.perf_counter()
    for _ in itertools.islice(stream, SAMPLES // BATCH):
        pass
    return SAMPLES / (time.perf_counter() - begin)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder))
        images, latents = loader.ImageDataset(paths["images"], 256), loader.LatentDataset(paths["latents"])
        for round_ in range(ROUNDS):  # in turn, so that a machine that slows down slows both
            a, b = rate(images), rate(latents)
            print(f"round {round_ + 1}: images {a:,.0f} img/s, latents {b:,.0f} img/s, ratio {b / a:.1f}")


if __name__ == "__main__":
    main()
