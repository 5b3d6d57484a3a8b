"""The objective: forward processes, targets, loss weights, and the random numbers of each image.

Notation: clean latents x0, noise e, noisy latents x_t = signal * x0 + scale * e. Diffusion has signal sqrt(a_t) and
scale sqrt(1 - a_t) with cumulative alphas a (Ho et al. 2020, arXiv 2006.11239, eq. 4); flow matching has 1 - sigma and
sigma = t / steps (Lipman et al. 2022, arXiv 2210.02747; rectified flow, Liu et al. 2022, arXiv 2209.03003). Latents are
N x C x h x w, timesteps N: int64 for diffusion, floating point for flow matching.

To add a target, a loss weighting or a distribution of timesteps, write a function and name it in TARGETS, WEIGHTINGS or
TIMESTEPS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sdtrain.errors import ConfigError

DIFFUSION = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"
STREAM = 3  # sub-stream of random numbers below a run's seed; the loader uses others
EDGE = 2.0**-53  # smallest distance of a draw from 0 and from 1


# ---------------------------------------------------------------- forward processes
@dataclass(frozen=True, eq=False)
class Process:
    """A forward process, which turns latents into noise, and what the network predicts.

    `prediction` is a key of TARGETS, `steps` the scheduler's num_train_timesteps, `alphas_cumprod` `steps` floats in
    [0, 1], or None for flow matching.
    """

    prediction: str
    steps: int
    alphas_cumprod: torch.Tensor | None

    def to(self, device: torch.device | str) -> Process:
        """Return the process with its schedule on a device, so that `scales` of timesteps there need no copy."""
        return self if self.alphas_cumprod is None else replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        """Return the timesteps at fractions `u` of the process, float64 N in (0, 1).

        They are int64 in [0, steps), or float32 in (0, steps] for flow matching, which samplers round down to integers.
        """
        if self.alphas_cumprod is None:
            return (u * self.steps).float()
        return (u * self.steps).long()

    def scales(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of x0 and of e at timesteps, N each, on the device of `t`.

        They are float64 if the schedule (for flow matching: `t`) is, else float32.
        """
        if self.alphas_cumprod is None:
            sigma = t / self.steps
            return 1 - sigma, sigma
        a = self.alphas_cumprod.to(t.device)[t]
        return a.sqrt(), (1 - a).sqrt()


def process_of(scheduler: Any) -> Process:
    """Return the forward process that a diffusers scheduler reverses.

    Raise ConfigError for a scheduler of another kind, for one with which StableDiffusionPipeline cannot sample flow
    matching, and for noise prediction with zero terminal SNR, where x_t is the noise itself (Lin et al. 2023, arXiv
    2305.08891, section 3.3).
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction, alphas = config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if prediction == FLOW or config.get("use_flow_sigmas") or name.startswith("FlowMatch"):
        _check_flow(name, config)
        return Process(FLOW, config.num_train_timesteps, None)
    if prediction not in DIFFUSION or alphas is None:
        raise ConfigError(
            f"model.scheduler: {name} with prediction_type {prediction} has no training objective; set "
            f"model.scheduler.params.prediction_type to one of {', '.join((*DIFFUSION, FLOW))}, and "
            "model.scheduler.target to a scheduler of StableDiffusionPipeline such as DDIMScheduler"
        )
    if prediction == "epsilon" and (config.get("rescale_betas_zero_snr") or alphas[-1] == 0):
        raise ConfigError(
            "model.scheduler: at zero terminal SNR, prediction_type epsilon gives no gradient at the last step; "
            "set model.scheduler.params.prediction_type to v_prediction"
        )
    return Process(prediction, len(alphas), alphas)


def _check_flow(name: str, config: Any) -> None:
    """Raise ConfigError if a scheduler samples at other noise levels than those of training, or ends above zero."""
    levels = [k for k in config if k.startswith("use_") and k.endswith(("_sigmas", "_lambdas")) and config[k]]
    found = (config.get("prediction_type"), levels, config.get("final_sigmas_type"))
    if found != (FLOW, ["use_flow_sigmas"], "zero"):
        raise ConfigError(
            f"model.scheduler: StableDiffusionPipeline cannot sample flow matching with this {name}; set "
            "model.scheduler.target to DPMSolverMultistepScheduler or UniPCMultistepScheduler, and of its params "
            f"prediction_type to {FLOW}, use_flow_sigmas to true, and no other use_*_sigmas nor final_sigmas_type"
        )


def _scales_like(process: Process, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both factors as N x 1 x 1 x 1 on the device of `like`, at least float32: in bf16, 0.9991 would be 1."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    signal, scale = process.scales(t)
    return signal.to(like.device, dtype).view(-1, 1, 1, 1), scale.to(like.device, dtype).view(-1, 1, 1, 1)


def add_noise(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return x_t of clean latents x0, at least float32. `t` may be on the CPU even if the latents are not."""
    signal, scale = _scales_like(process, t, clean)
    return signal * clean + scale * noise


# ---------------------------------------------------------------- targets
def target(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return what the network predicts from x_t, by `process.prediction`."""
    return TARGETS[process.prediction](process, clean, noise, t)


def epsilon(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the noise e."""
    return noise


def sample(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the clean latents x0."""
    return clean


def v_prediction(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return sqrt(a) e - sqrt(1 - a) x0 (Salimans & Ho 2022, arXiv 2202.00512)."""
    signal, scale = _scales_like(process, t, clean)
    return signal * noise - scale * clean


def flow_prediction(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the velocity dx_t / dsigma = e - x0."""
    return noise - clean


Target = Callable[[Process, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
TARGETS: dict[str, Target] = {  # the scheduler's prediction_type
    "epsilon": epsilon,
    "sample": sample,
    "v_prediction": v_prediction,
    FLOW: flow_prediction,
}


# ---------------------------------------------------------------- loss
def loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean squared error of each image, N."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1) * weights


def loss_weights(process: Process, t: torch.Tensor, settings: Any) -> torch.Tensor:
    """Return the loss weights float32 N at timesteps: the product of the weightings that `settings` switches on.

    `settings` is an `objective` section; each key of WEIGHTINGS is a key of it, and null switches a weighting off.
    """
    weights = torch.ones(len(t), device=t.device)
    for key, weighting in WEIGHTINGS.items():
        if settings[key] is not None:
            weights = weights * weighting(process, t, settings[key])
    return weights


def min_snr(process: Process, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the weights float32 N of min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556).

    With SNR = a / (1 - a), a weight is min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v, and
    min(SNR, gamma) for x0. Raise ConfigError for flow matching, whose weighting is the distribution of timesteps.
    """
    if process.alphas_cumprod is None:
        raise ConfigError(
            "objective.snr_gamma: flow matching has no min-SNR weights; set it to null, and "
            "objective.timesteps=logit_normal to give more weight to the middle of the process"
        )
    a = process.alphas_cumprod.to(t.device)[t].double()
    snr = a / (1 - a)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[process.prediction]
    # at zero terminal SNR the epsilon weight is the limit 1
    ratio = torch.where(divisor > 0, snr.clamp(max=gamma) / divisor.clamp(min=1e-12), torch.ones_like(snr))
    return ratio.float()


WEIGHTINGS: dict[str, Callable[[Process, torch.Tensor, Any], torch.Tensor]] = {"snr_gamma": min_snr}  # objective.*


# ---------------------------------------------------------------- timesteps
def uniform(u: np.ndarray, order: np.ndarray, settings: Any) -> torch.Tensor:
    """Return `u`, uniform numbers in [0, 1), as they are."""
    return torch.from_numpy(u)


def stratified(u: np.ndarray, order: np.ndarray, settings: Any) -> torch.Tensor:
    """Return one number in each of N equal slices of [0, 1), in the order `order`, a permutation.

    Batches differ less, and the number of each image is still uniform (Kingma et al. 2021, arXiv 2107.00630, appendix
    I.1).
    """
    return torch.from_numpy((order + u) / len(u))


def logit_normal(u: np.ndarray, order: np.ndarray, settings: Any) -> torch.Tensor:
    """Return the sigmoid of normal numbers (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(torch.from_numpy(u)))


TIMESTEPS: dict[str, Callable[[np.ndarray, np.ndarray, Any], torch.Tensor]] = {  # objective.timesteps
    "uniform": uniform,
    "stratified": stratified,
    "logit_normal": logit_normal,
}


# ---------------------------------------------------------------- random draws
@dataclass(frozen=True, eq=False)
class Draws:
    """Random numbers of N images, on the CPU.

    `drop` (bool N) says which captions are dropped, `time` (float64 N in (0, 1)) the place in the process; `seeds` and
    `offset_seeds` (N integers in [0, 2^63)) are those of each image's noise and offset noise.
    """

    drop: torch.Tensor
    time: torch.Tensor
    seeds: list[int]
    offset_seeds: list[int]


def draw(settings: Any, seed: int, position: int, global_batch: int, slots: Sequence[int]) -> Draws:
    """Return the draws of the images `slots`, such as a range, of the global batch that starts at image `position`.

    The numbers of the whole global batch are drawn and `slots` selected, so that they do not depend on ranks and
    micro-batches, and a resume has no random state to restore. `settings` is an `objective` section; a number does not
    depend on the settings of others. Raise IndexError for a slot outside the batch.
    """
    rng = np.random.default_rng([seed, STREAM, position])
    u, drop = rng.random((2, global_batch))
    order = rng.permutation(global_batch)
    seeds, offset_seeds = rng.integers(2**63, size=(2, global_batch))
    rows = list(slots)
    time = TIMESTEPS[settings.timesteps](u, order, settings).clamp(EDGE, 1 - EDGE)
    return Draws(
        drop=torch.from_numpy(drop[rows] < settings.caption_dropout),
        time=time[rows],
        seeds=seeds[rows].tolist(),
        offset_seeds=offset_seeds[rows].tolist(),
    )


def normals(
    draws: Draws, count: int, shape: Sequence[int], device: torch.device | str, offset: float = 0.0
) -> torch.Tensor:
    """Return standard normal numbers float32, count x N x `shape`; those of an image depend on its own seed only.

    The first of `count`, the same for any count, is the noise of the objective. `offset` times one normal number for
    each channel of each image is added to it: its variance is 1 + offset^2, and the model learns to change the
    brightness of a whole image (Guttenberg 2023, "Diffusion with offset noise"). Another kind of device gives other
    numbers.
    """
    found = _seeded(draws.seeds, count, shape, device)
    if offset:
        found[0] += offset * _seeded(draws.offset_seeds, 1, (shape[0], 1, 1), device)[0]
    return found


def _seeded(seeds: list[int], count: int, shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Return standard normal numbers, count x N x `shape`, with one of N seeds for each image."""
    generator = torch.Generator(device)
    found = torch.empty(count, len(seeds), *shape, device=device)
    for place, seed in enumerate(seeds):
        generator.manual_seed(seed)
        for values in found[:, place]:  # contiguous: another memory layout is filled in another order
            values.normal_(generator=generator)
    return found
