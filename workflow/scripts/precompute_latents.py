"""Encode a manifest's images into latent shards, one for each shard of images, captions and metadata beside them.

A killed job goes on with the shards that are missing. Latents are the posterior's mean, scaled, in float16.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from tqdm import tqdm

from sdtrain import config, dist, loader, models, schema, shards


def encode_shard(source: str, folder: Path, vae, resolution: int, settings, device) -> None:
    """Write the latents of one image shard as `folder`/{its name}; undecodable images are left out."""
    samples = [s for s in shards.index_tar(source) if any(e in s.fields for e in loader.IMAGE_EXTENSIONS)]
    target = folder / Path(source).name
    with shards.ShardWriter(folder / f".{target.stem}", samples_per_shard=len(samples)) as writer:
        for start in range(0, len(samples), settings.batch_size):
            chunk, pixels = [], []
            for sample in samples[start : start + settings.batch_size]:
                try:
                    image = loader.read_image(sample)
                except loader.DataError as error:
                    print(f"skipped: {error}", file=sys.stderr)
                    continue
                rng = np.random.default_rng(0)
                pixels.append(loader.to_pixels(loader.resize_and_crop(image, resolution, settings.crop, rng)))
                chunk.append(sample)
            if chunk:
                latents = models.encode_images(vae, torch.stack(pixels).to(device)).half().cpu()
                for sample, latent in zip(chunk, latents, strict=True):
                    rest = {e: sample.read(e) for e in ("txt", "cls", "json") if e in sample.fields}
                    writer.add(sample.key, {"latent": save({"latents": latent.contiguous()}), **rest})
    if writer.paths:
        writer.paths[0].replace(target)
    writer.folder.rmdir()


def precompute(settings, vae_folder: str, resolution: int, images: str, output: Path) -> dict:
    """Encode every shard of the manifest `images` that is not there yet; write the manifest of latents last."""
    source = shards.read_manifest(images)
    made_by = {
        "images": source["fingerprint"],
        "vae": config.record_fingerprint(f"{vae_folder}.json"),
        "crop": settings.crop,
    }
    made_by["resolution"] = resolution
    folder = output.parent / config.fingerprint(made_by)
    device = dist.only_device()
    part = config.load(schema.ModelConfig, values={"vae": {"pretrained": vae_folder}})
    vae = models.load_part("vae", part).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    for row in tqdm(source["shards"], unit="shard", desc=f"latents {resolution} px", mininterval=5):
        if not (folder / Path(row["path"]).name).exists():
            encode_shard(row["path"], folder, vae, resolution, settings, device)
    made = sorted(folder.glob("*.tar"))
    lost = source["samples"] - sum(len(shards.index_tar(tar)) for tar in made)
    if not made:
        raise loader.DataError(f"{images}: not one image could be encoded; see the lines above")
    return shards.write_manifest(output, "latents", made, {"undecodable": lost} if lost else {}, made_by)


def describe(manifest: dict, folder: Path) -> str:
    """Counts, and mean and standard deviation of some latents: near 0 and 1 where the VAE's scaling fits."""
    samples = shards.index_tar(folder / manifest["shards"][0]["name"])[:256]
    values = torch.stack([load(s.read("latent"))["latents"].float() for s in samples])
    shape = "x".join(map(str, values.shape[1:]))
    return (
        f"{manifest['samples']:,} latents of {shape}, mean {values.mean():.3f}, standard deviation {values.std():.3f}"
    )


def main(argv: list[str]) -> None:
    settings, own = config.command_line(
        argv, schema.LatentsConfig, __doc__, vae=None, resolution=None, images=None, output=None
    )
    output = Path(own["output"])
    try:
        if not own["resolution"].isdigit():
            raise config.ConfigError(f"resolution={own['resolution']}: a number of pixels is expected")
        manifest = precompute(settings, own["vae"], int(own["resolution"]), own["images"], output)
    except (config.ConfigError, shards.ShardError, loader.DataError, models.ModelError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{output}: {describe(manifest, output.parent)}")


if __name__ == "__main__":
    main(sys.argv)
