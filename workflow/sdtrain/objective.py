"""Noise, targets and loss weights of the diffusion objective: pure functions of tensors.

Notation: clean latents x0, noise e, cumulative alphas a; noisy latents x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e (Ho et al.
2020, arXiv 2006.11239, eq. 4). All latents are N x C x h x w, timesteps int64 N.
"""

from __future__ import annotations

import torch


def at(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values of the schedule at `timesteps`, shaped N x 1 x 1 x 1, float32 at least: in bf16, 0.9991 would be 1."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return alphas_cumprod.to(like.device)[timesteps].to(dtype).view(-1, 1, 1, 1)


def sample_timesteps(count: int, total: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """`count` timesteps in [0, total): independent ("uniform"), or one of each of `count` equal slices ("stratified").

    Both have the same distribution for each image; stratified ones vary less between batches (Kingma et al. 2021,
    arXiv 2107.00630, appendix I.1). int64, on the generator's device.
    """
    if kind == "uniform":
        return torch.randint(total, (count,), generator=generator, device=generator.device)
    offset = torch.rand((), generator=generator, device=generator.device)
    slots = (torch.arange(count, device=generator.device) + offset) / count
    order = torch.randperm(count, generator=generator, device=generator.device)
    return (slots[order] * total).long().clamp(max=total - 1)


def add_noise(
    clean: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """x_t of clean latents x0."""
    a = at(alphas_cumprod, timesteps, clean)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def target(
    clean: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, prediction: str
) -> torch.Tensor:
    """What the network is to predict: "epsilon" e, "v_prediction" sqrt(a) e - sqrt(1 - a) x0 (Salimans & Ho 2022,

    arXiv 2202.00512), or "sample" x0. Raises ValueError for another name.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return clean
    if prediction == "v_prediction":
        a = at(alphas_cumprod, timesteps, clean)
        return a.sqrt() * noise - (1 - a).sqrt() * clean
    raise ValueError(f"prediction_type {prediction!r} is not one of epsilon, v_prediction, sample")


def snr_weights(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, prediction: str, gamma: float | None
) -> torch.Tensor:
    """Loss weights N of min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556); ones where gamma is None.

    With SNR = a / (1 - a): min(SNR, gamma) over SNR for epsilon, over SNR + 1 for v, and itself for x0.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    a = alphas_cumprod.to(timesteps.device)[timesteps].double()
    snr = a / (1 - a)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    # at zero terminal SNR the epsilon weight is the limit 1
    ratio = torch.where(divisor > 0, snr.clamp(max=gamma) / divisor.clamp(min=1e-12), torch.ones_like(snr))
    return ratio.float()


def loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared error: a value for each image, N."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1) * weights
