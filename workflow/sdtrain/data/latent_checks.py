"""Checks of finished latent shards: their scale, and how well the VAE decodes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load
from torch import nn

from sdtrain.data import tars
from sdtrain.io.files import atomic_path
from sdtrain.models.parts import decode_latents

CHECKED = (8, 128)  # shards, and samples of each, whose mean and standard deviation are measured
MEAN, DEVIATION, PSNR = 0.5, (0.5, 2.0), 15.0  # beyond these, the VAE's scaling is wrong, or it is for other images


def measure(made: list[Path]) -> dict[str, float]:
    """Return the mean and standard deviation of the latents of some shards; of moments, one draw each is taken."""
    rng, values = torch.Generator().manual_seed(0), []
    count, samples = CHECKED
    for tar in made[:: math.ceil(len(made) / count)]:
        for sample in tars.index_tar(tar)[:samples]:
            values.append(draw(load(sample.read("latent")), rng))
    stacked = torch.stack(values).double()
    return {"mean": round(stacked.mean().item(), 4), "std": round(stacked.std().item(), 4)}


def draw(tensors: dict[str, torch.Tensor], rng: torch.Generator) -> torch.Tensor:
    """Return the latents of one sample, float32; of moments, a random draw."""
    if "latents" in tensors:
        return tensors["latents"].float()
    mean, std = tensors["mean"].float(), tensors["std"].float()
    return mean + std * torch.randn(mean.shape, generator=rng)


def compare(tar: Path, pixels: torch.Tensor, vae: nn.Module, device: torch.device, output: Path) -> float:
    """Decode the first latents of a tar, and write the image and the result side by side. Return the PSNR in dB."""
    latents = draw(load(tars.index_tar(tar)[0].read("latent")), torch.Generator().manual_seed(0))
    decoded = decode_latents(vae, latents[None].to(device))[0].cpu()
    both = (torch.cat([pixels, decoded], dim=2) + 1) * 127.5
    with atomic_path(output) as temporary:
        Image.fromarray(both.round().byte().permute(1, 2, 0).numpy()).save(temporary, "PNG")
    error = torch.nn.functional.mse_loss(decoded, pixels).item()
    return round(10 * math.log10(4 / max(error, 1e-10)), 2)


def find_warnings(checks: dict[str, Any]) -> list[str]:
    """Return what looks wrong in the checks, and what to do about it."""
    found = []
    if abs(checks["mean"]) > MEAN or not DEVIATION[0] <= checks["std"] <= DEVIATION[1]:
        found.append(
            f"latents have mean {checks['mean']} and standard deviation {checks['std']}, not near 0 and 1: "
            "set scaling_factor (and shift_factor) in the VAE's config.json"
        )
    if checks["psnr"] < PSNR:
        found.append(f"the PSNR of a decoded sample is {checks['psnr']} dB; is the VAE made for such images?")
    return found
