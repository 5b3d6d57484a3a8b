"""The objective: forward processes, targets, loss weights, and the random draws of each image.

Notation: clean latents x0, noise e, noisy latents x_t = signal * x0 + scale * e. Diffusion has signal sqrt(a_t) and
scale sqrt(1 - a_t), of cumulative alphas a (Ho et al. 2020, arXiv 2006.11239, eq. 4); flow matching 1 - sigma and
sigma = t / steps (Lipman et al. 2022, arXiv 2210.02747; rectified flow, Liu et al. 2022, arXiv 2209.03003). Latents are
N x C x h x w, timesteps N: int64 for diffusion, floating for flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sdtrain.errors import SDTrainError

DIFFUSION = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"
STREAM = 3  # of the numbers below a run's seed; the loader's are others
EDGE = 2.0**-53  # the closest to 0 that a draw gets, and to 1


class ObjectiveError(SDTrainError, ValueError):
    """A scheduler or setting that nothing can be trained with; the message names the key and the remedy."""


# ---------------------------------------------------------------- forward processes
@dataclass(frozen=True, eq=False)
class Process:
    """How latents become noise, and what the network is to predict of it.

    `prediction` is epsilon, v_prediction, sample or flow_prediction; `steps` the scheduler's num_train_timesteps;
    `alphas_cumprod` N floats in [0, 1], None for flow matching.
    """

    prediction: str
    steps: int
    alphas_cumprod: torch.Tensor | None

    def to(self, device: torch.device | str) -> Process:
        """The process with its schedule on a device, where `scales` of timesteps there need no copy of it."""
        return self if self.alphas_cumprod is None else replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        """Timesteps at shares `u` of the process, float64 N in (0, 1).

        int64 in [0, steps), or float32 in (0, steps] for flow matching. Samplers round the latter down to integers.
        """
        if self.alphas_cumprod is None:
            return (u * self.steps).float()
        return (u * self.steps).long()

    def scales(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of x0 and of e at timesteps, N each, on their device: float64 where the schedule is, or t of a

        flow; else float32.
        """
        if self.alphas_cumprod is None:
            sigma = t / self.steps
            return 1 - sigma, sigma
        a = self.alphas_cumprod.to(t.device)[t]
        return a.sqrt(), (1 - a).sqrt()


def process_of(scheduler) -> Process:
    """The forward process that a diffusers scheduler reverses.

    Raises ObjectiveError for a scheduler of another kind, one that StableDiffusionPipeline cannot sample flow matching
    with, and noise prediction with zero terminal SNR: there x_t is the noise, which teaches nothing (Lin et al. 2023,
    arXiv 2305.08891, section 3.3).
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction, alphas = config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if prediction == FLOW or config.get("use_flow_sigmas") or name.startswith("FlowMatch"):
        _check_flow(name, config)
        return Process(FLOW, config.num_train_timesteps, None)
    if prediction not in DIFFUSION or alphas is None:
        raise ObjectiveError(
            f"model.scheduler: {name} with prediction_type {prediction} fits no objective; set "
            f"model.scheduler.params.prediction_type to one of {', '.join((*DIFFUSION, FLOW))}, and "
            "model.scheduler.target to a scheduler of StableDiffusionPipeline such as DDIMScheduler"
        )
    if prediction == "epsilon" and (config.get("rescale_betas_zero_snr") or alphas[-1] == 0):
        raise ObjectiveError(
            "model.scheduler: at zero terminal SNR, prediction_type epsilon has nothing to learn at the last step; "
            "set model.scheduler.params.prediction_type to v_prediction"
        )
    return Process(prediction, len(alphas), alphas)


def _check_flow(name: str, config) -> None:
    """Refuse what would sample at other noise levels than it was trained at, stop before zero, or not run at all."""
    levels = [k for k in config if k.startswith("use_") and k.endswith(("_sigmas", "_lambdas")) and config[k]]
    found = (config.get("prediction_type"), levels, config.get("final_sigmas_type"))
    if found != (FLOW, ["use_flow_sigmas"], "zero"):
        raise ObjectiveError(
            f"model.scheduler: StableDiffusionPipeline cannot sample flow matching with this {name}; set "
            "model.scheduler.target to DPMSolverMultistepScheduler or UniPCMultistepScheduler, and of its params "
            f"prediction_type to {FLOW}, use_flow_sigmas to true, and no other use_*_sigmas nor final_sigmas_type"
        )


def _scales_like(process: Process, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors as N x 1 x 1 x 1 beside `like`, float32 at least: in bf16, 0.9991 would be 1."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    signal, scale = process.scales(t)
    return signal.to(like.device, dtype).view(-1, 1, 1, 1), scale.to(like.device, dtype).view(-1, 1, 1, 1)


def add_noise(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t of clean latents x0, float32 at least. `t` may lie on the CPU, whatever the latents' device."""
    signal, scale = _scales_like(process, t, clean)
    return signal * clean + scale * noise


def target(process: Process, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is to predict from x_t: "epsilon" e; "sample" x0; "v_prediction" sqrt(a) e - sqrt(1 - a) x0

    (Salimans & Ho 2022, arXiv 2202.00512); "flow_prediction" e - x0, the velocity dx_t / dsigma.
    """
    if process.prediction == "epsilon":
        return noise
    if process.prediction == "sample":
        return clean
    if process.prediction == FLOW:
        return noise - clean
    signal, scale = _scales_like(process, t, clean)
    return signal * noise - scale * clean


# ---------------------------------------------------------------- loss
def snr_weights(process: Process, t: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Loss weights float32 N of min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556); ones where gamma is None.

    With SNR = a / (1 - a): min(SNR, gamma) over SNR for epsilon, over SNR + 1 for v, and itself for x0. Raises
    ObjectiveError for flow matching, whose weights the choice of timesteps gives.
    """
    if gamma is None:
        return torch.ones(len(t), device=t.device)
    if process.alphas_cumprod is None:
        raise ObjectiveError(
            "objective.snr_gamma: flow matching has no min-SNR weights; set it to null, and "
            "objective.timesteps=logit_normal to dwell on the middle of the process"
        )
    a = process.alphas_cumprod.to(t.device)[t].double()
    snr = a / (1 - a)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[process.prediction]
    # at zero terminal SNR the epsilon weight is the limit 1
    ratio = torch.where(divisor > 0, snr.clamp(max=gamma) / divisor.clamp(min=1e-12), torch.ones_like(snr))
    return ratio.float()


def loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared error: a value for each image, N."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1) * weights


# ---------------------------------------------------------------- random draws
@dataclass(frozen=True, eq=False)
class Draws:
    """Of N images, on the CPU: which captions to drop (bool N), where in the process they are (float64 N in (0, 1)),

    and the seeds of each one's own noise and offset noise (N integers in [0, 2^63) each).
    """

    drop: torch.Tensor
    time: torch.Tensor
    seeds: list[int]
    offset_seeds: list[int]


def draw(settings, seed: int, position: int, global_batch: int, slots: Sequence[int]) -> Draws:
    """The draws of images `slots`, such as a range, of the global batch whose first image is number `position`.

    All of the batch is drawn and `slots` picked, so that ranks and micro-batches draw the same however they share it,
    and a resume has no random state to restore. `settings` is a stage's `objective` section; each number is the same
    whatever the others' settings. Raises IndexError for a slot outside the batch.
    """
    rng = np.random.default_rng([seed, STREAM, position])
    u, drop = rng.random((2, global_batch))
    order = rng.permutation(global_batch)
    seeds, offset_seeds = rng.integers(2**63, size=(2, global_batch))
    rows = list(slots)
    return Draws(
        drop=torch.from_numpy(drop[rows] < settings.caption_dropout),
        time=_times(settings, u, order)[rows],
        seeds=seeds[rows].tolist(),
        offset_seeds=offset_seeds[rows].tolist(),
    )


def _times(settings, u: np.ndarray, order: np.ndarray) -> torch.Tensor:
    """Shares of the process of a whole batch: "uniform"; "stratified", one in each of N equal slices, so that batches

    differ less while each image's remains uniform (Kingma et al. 2021, arXiv 2107.00630, appendix I.1); or
    "logit_normal" (Esser et al. 2024, arXiv 2403.03206, eq. 19).
    """
    if settings.timesteps == "stratified":
        u = (order + u) / len(u)
    time = torch.from_numpy(u)
    if settings.timesteps == "logit_normal":
        time = torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(time))
    return time.clamp(EDGE, 1 - EDGE)


def normals(
    draws: Draws, count: int, shape: Sequence[int], device: torch.device | str, offset: float = 0.0
) -> torch.Tensor:
    """Standard normals float32, count x N x `shape`: each image's from its own seed, whatever is beside it.

    The first of `count`, the same for any count, is the objective's noise: with offset noise of strength `offset`.
    Devices of another kind have other numbers.
    """
    found = _seeded(draws.seeds, count, shape, device)
    if offset:
        found[0] = offset_noise(found[0], draws, offset)
    return found


def offset_noise(noise: torch.Tensor, draws: Draws, strength: float) -> torch.Tensor:
    """Noise N x C x h x w plus `strength` times one more normal for each channel of each image: its variance becomes

    1 + strength^2, so that a model learns to change a whole image's brightness (Guttenberg 2023, "Diffusion with offset
    noise").
    """
    return noise + strength * _seeded(draws.offset_seeds, 1, (noise.shape[1], 1, 1), noise.device)[0]


def _seeded(seeds: list[int], count: int, shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Standard normals count x N x `shape`, one of N a seed."""
    generator = torch.Generator(device)
    found = torch.empty(count, len(seeds), *shape, device=device)
    for place, seed in enumerate(seeds):
        generator.manual_seed(seed)
        for values in found[:, place]:  # each contiguous: other layouts are filled in another order
            values.normal_(generator=generator)
    return found
