"""Train a KL autoencoder and export it as a component.

Reconstruction loss (L1, L2, low-pass, gradient and chroma terms) plus a KL term, as in Rombach et al. 2022
(arXiv 2112.10752) without their adversarial term; see AutoencoderLoss for the weights. The same command resumes.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from omegaconf import OmegaConf

from sdtrain import checkpoint, config, dist, loader, models, schema, shards, tars
from sdtrain.ema import Ema
from sdtrain.telemetry import Telemetry

STATISTICS_IMAGES = 512  # images that the latents' mean and standard deviation are measured on


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, weights) -> torch.Tensor:
    """Weighted sum of the terms of AutoencoderLoss but KL; tensors N x 3 x H x W in [-1, 1], result a scalar."""
    error = output - target
    chroma = error - error[:, 1:2]  # R-G and B-G (and zero)
    return (
        weights.l1 * error.abs().mean()
        + weights.l2 * error.square().mean()
        + weights.low_pass * F.avg_pool2d(error, 4).abs().mean()
        + weights.gradient * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        + weights.chroma * chroma[:, ::2].abs().mean()
    )


def kl_divergence(moments) -> torch.Tensor:
    """KL of the latent distribution from the unit normal, mean over all latent values (Kingma & Welling 2014)."""
    return 0.5 * (moments.mean.square() + moments.var - 1.0 - moments.logvar).mean()


def learning_rate(step: int, steps: int, base: float, warmup: int) -> float:
    """Linear warm-up, then a half cosine to zero."""
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def first_images(dataset: loader.ImageDataset, limit: int, device) -> list[torch.Tensor]:
    """Pixels 1 x 3 x H x W of the readable ones among the first `limit` images of the stream, an epoch at most."""
    items = [dataset[position] for position in range(min(limit, len(dataset)))]
    return [item["pixels"][None].to(device) for item in items if "error" not in item]


@torch.no_grad()
def psnr(vae: AutoencoderKL, dataset: loader.ImageDataset, device, limit: int = 256) -> float:
    """Mean peak signal-to-noise ratio, dB, of reconstructions through the latents' mean, images in [0, 1]."""
    values = []
    for image in first_images(dataset, limit, device):
        output = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((output - image) / 2).square().mean()).item())
    return float(np.mean(values))


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make latents zero-mean and unit-variance by channel, exactly, inside the 1x1 convolutions around them.

    A pipeline knows one scalar scaling factor; after this it is 1. `mean` and `std` have one value a latent channel.
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2.0 * std.log()  # log variances
    post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mean)
    post.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, dataset, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents by channel over the first images of the stream."""
    means = [vae.encode(image).latent_dist.mode() for image in first_images(dataset, STATISTICS_IMAGES, device)]
    flat = torch.cat(means).transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


def train(settings, train_manifest: str, held_out_manifest: str, output: Path) -> None:
    """Train, resume, export to the folder beside `output`, and write `output` last."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = dist.only_device()

    # Data: crops at one to two times the resolution, so that the latents serve a stage and the next one
    dataset = loader.ImageDataset(
        train_manifest, settings.resolution, crop="random", flip=True, zoom=(1.0, 2.0), seed=settings.seed
    )
    held_out = {
        size: loader.ImageDataset(held_out_manifest, size, seed=settings.seed)
        for size in (settings.resolution, 2 * settings.resolution)
    }

    # Model, optimizer, average
    try:
        vae = AutoencoderKL(**OmegaConf.to_container(settings.params)).to(device, memory_format=torch.channels_last)
    except (TypeError, ValueError) as error:
        raise models.ModelError(f"params: AutoencoderKL refuses them: {error}") from error
    ema = Ema(vae, settings.ema_decay)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    steps = settings.num_examples_to_see // settings.batch_size

    # Resume: the folder is keyed by all that decides the weights
    decisive = {
        k: v for k, v in OmegaConf.to_container(settings).items() if k not in ("threads", "save_every", "log_every")
    }
    key = config.fingerprint(decisive, shards.read_manifest(train_manifest)["fingerprint"])
    folder = output.with_suffix("") / "checkpoints" / key
    checkpoint.start_milestone(folder, steps * settings.batch_size, 0)
    first = 0
    if found := checkpoint.saved(folder):
        state = checkpoint.load(folder, found[-1], device)
        (
            vae.load_state_dict(state["vae"]),
            ema.load_state_dict(state["ema"]),
            optimizer.load_state_dict(state["optimizer"]),
        )
        first = found[-1] // settings.batch_size

    # Loop
    telemetry = Telemetry(
        folder.parent.parent / "log.jsonl", total=steps * settings.batch_size, start=first * settings.batch_size
    )
    started, running = time.time(), []
    stream = loader.batches(dataset, settings.batch_size, start=first * settings.batch_size)
    for step in range(first, steps):
        images = next(stream)["pixels"].to(device, memory_format=torch.channels_last)
        torch.manual_seed(
            settings.seed + 1 + step
        )  # the noise of a step follows from its number: resume needs no RNG state
        moments = vae.encode(images).latent_dist
        output_images = vae.decode(moments.sample()).sample
        loss = reconstruction_loss(output_images, images, settings.loss) + settings.loss.kl * kl_divergence(moments)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise SystemExit(f"error: step {step}: gradient norm is {norm.item()}; lower learning_rate")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings.learning_rate, settings.warmup_length)
        optimizer.step()
        ema.update(vae)
        running.append(loss.item())
        seen = (step + 1) * settings.batch_size
        if (step + 1) % settings.log_every == 0:
            telemetry.log(seen, {"loss": float(np.mean(running)), "lr": optimizer.param_groups[0]["lr"]})
            running.clear()
        if (step + 1) % settings.save_every == 0 or step + 1 == steps:
            state = {"vae": vae.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(folder, seen, state)
            print({f"psnr_{s}px": round(psnr(ema.module, d, device, 32), 2) for s, d in held_out.items()}, flush=True)
    telemetry.close()

    # Export: average of the weights, latents normalised, half precision
    vae = ema.module.eval()
    plain = loader.ImageDataset(train_manifest, 2 * settings.resolution, seed=settings.seed)
    fold_normalisation(vae, *latent_statistics(vae, plain, device))
    vae.half().float()  # what is measured is what is shipped
    quality = {f"psnr_{size}px": round(psnr(vae, d, device), 2) for size, d in held_out.items()}
    aside = output.with_name(f".{output.stem}.tmp")
    vae.half().save_pretrained(aside, safe_serialization=True)
    facts = {
        "source": "train",
        "fingerprint": key,
        "held_out": quality,
        "images_seen": steps * settings.batch_size,
        "minutes": round((time.time() - started) / 60, 1),
        "config": OmegaConf.to_container(settings),
        "command": " ".join(["python", *sys.argv]),
        "code": config.code_digest(),
        "torch": torch.__version__,
    }
    config.write_json(aside / "training.json", facts)
    for file in aside.iterdir():
        file.replace(output.with_suffix("") / file.name)
    aside.rmdir()
    config.write_json(output, facts)
    checkpoint.finish_milestone(folder, steps * settings.batch_size)
    print(f"{output}: {quality}")


def main(argv: list[str]) -> None:
    settings, own = config.command_line(argv, schema.AutoencoderConfig, __doc__, train=None, held_out=None, output=None)
    output = Path(own["output"])
    try:
        with checkpoint.lock(output.with_suffix("") / "checkpoints"):
            train(settings, own["train"], own["held_out"], output)
    except (tars.ShardError, loader.DataError, models.ModelError, checkpoint.CheckpointError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv)
