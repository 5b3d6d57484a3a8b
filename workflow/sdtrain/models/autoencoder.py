"""A KL autoencoder: its network, the terms of its loss, its quality, and latents of unit variance.

Images are float N x 3 x H x W in [-1, 1], latents N x C x h x w. The loss is that of Rombach et al. 2022 (arXiv
2112.10752) without its adversarial term, with terms that small networks need.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from sdtrain.models.parts import ModelError, check_divisors, check_multiple, refusals

TERMS = ("l1", "l2", "low_pass", "gradient", "chroma", "kl", "perceptual")  # the weights of an AutoencoderLoss


# ---------------------------------------------------------------- the network
def build(params: dict, resolution: int) -> AutoencoderKL:
    """Return an AutoencoderKL with these parameters, for images of `resolution` pixels per side and of twice that.

    Raise ModelError, naming the key, for invalid parameters and resolutions.
    """
    with refusals("params", AutoencoderKL):
        check_divisors("params", AutoencoderKL, params)
        vae = AutoencoderKL(**params)
        side = latent_side(vae, resolution)
        with torch.no_grad():
            latents = vae.encode(torch.zeros(1, 3, resolution, resolution)).latent_dist.mode()
            shapes = [tuple(latents.shape[-2:]), tuple(vae.decode(latents).sample.shape[1:])]
    if shapes != [(side, side), (3, resolution, resolution)]:
        raise ModelError(
            f"params: an image of {resolution} pixels has latents of {shapes[0]} and its reconstruction is "
            f"{shapes[1]}; set a down_block_types and an up_block_types for each of block_out_channels"
        )
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ModelError("params: latents are normalised in quant_conv and post_quant_conv; leave both in use")
    return vae


def latent_side(vae: AutoencoderKL, resolution: int) -> int:
    """Return the side of the latents of images of `resolution` pixels. Raise ModelError if they do not divide."""
    step = 2 ** (len(vae.config.block_out_channels) - 1)
    check_multiple("resolution", resolution, step, "a network of these params divides by it")
    return resolution // step


class Reconstruction(nn.Module):
    """Encode images and decode a sample of the posterior: one module, so that DDP can reduce its gradient."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return output, mean and log variance of the posterior, all float32, for noise of the latents' shape."""
        posterior = self.vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (logvar / 2).exp() * noise
        return self.vae.decode(latents).sample.float(), mean, logvar


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return the reconstructions, in [-1, 1], from the mean of the posterior."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)


# ---------------------------------------------------------------- loss and quality
def loss_terms(
    output: torch.Tensor,
    images: torch.Tensor,
    mean: torch.Tensor,
    logvar: torch.Tensor,
    weights: Any,
    distance: Any = None,
) -> dict[str, torch.Tensor]:
    """Return each term of an AutoencoderLoss with a weight other than 0, times its weight; their sum is the loss.

    `mean` and `logvar` are the posterior's; `distance`, a function of two batches of images in 0..255, is the
    perceptual one, N, which only the perceptual term needs.
    """
    error = output - images
    terms = {
        "l1": lambda: error.abs().mean(),
        "l2": lambda: error.square().mean(),
        "low_pass": lambda: F.avg_pool2d(error, 4).abs().mean(),
        "gradient": lambda: error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
        "chroma": lambda: (error - error[:, 1:2])[:, ::2].abs().mean(),  # R-G and B-G
        "kl": lambda: kl_divergence(mean, logvar),
        "perceptual": lambda: distance((output + 1) * 127.5, (images + 1) * 127.5).mean(),
    }
    return {name: weights[name] * term() for name, term in terms.items() if weights[name]}


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence from the unit normal, mean over all values (Kingma & Welling 2014, arXiv 1312.6114)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def psnr(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each image, dB, N."""
    return -10 * ((output - images) / 2).square().flatten(1).mean(1).log10()


# ---------------------------------------------------------------- normalised latents
def latent_statistics(means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (at least 0.001) of the posterior means for each channel, C each."""
    flat = means.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1).clamp(min=1e-3)  # a constant channel is not amplified


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
