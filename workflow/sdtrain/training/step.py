"""One step: the gradient of a global batch, and the all-reduce that gives every rank the same report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sdtrain import distributed
from sdtrain.training import objective, parallel
from sdtrain.training.task import Task


@dataclass(frozen=True)
class Sizes:
    """How a global batch is divided: `world_size` ranks, each with `accumulation` micro-batches."""

    rank: int
    world_size: int
    micro_batch: int
    global_batch: int  # images of an optimizer step, a multiple of world_size * micro_batch

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of a rank in an optimizer step."""
        return self.global_batch // (self.world_size * self.micro_batch)


@dataclass(frozen=True)
class Gradient:
    """The results of a rank's backward passes in a step; the gradients themselves are in the module."""

    losses: torch.Tensor  # sums of the task's losses, float64
    images: torch.Tensor  # over how many images each of them is
    norm: torch.Tensor  # of the gradient before clipping, over all ranks
    waited: float  # seconds spent waiting for data
    lost: int  # unreadable samples of this rank's stream so far


@dataclass(frozen=True)
class Report:
    """The results of a step summed over all ranks, equal on each of them."""

    losses: list[float]
    images: list[float]
    bad: bool  # whether a loss or the gradient norm of any rank is not finite
    flags: list[float]  # sums of the flags that each rank gave


def compute_gradient(task: Task, next_batch: Callable[[], dict], position: int, sizes: Sizes) -> Gradient:
    """Accumulate the gradients of the global batch that starts at image `position`, and clip them.

    Micro-batches are accumulated, and the ranks reduce their gradients once, in the last backward pass.
    """
    s, waited, lost = task.settings, 0.0, 0
    device = next(task.module.parameters()).device
    losses, images = torch.zeros(2, len(task.losses), dtype=torch.float64, device=device)
    for micro in range(sizes.accumulation):
        begin = time.perf_counter()
        batch = next_batch()
        waited += time.perf_counter() - begin
        slot = (micro * sizes.world_size + sizes.rank) * sizes.micro_batch
        slots = range(slot, slot + sizes.micro_batch)
        draws = objective.draw(s.objective, s.experiment.seed, position, sizes.global_batch, slots)
        torch.manual_seed(draws.offset_seeds[0])  # of dropout inside the network
        with parallel.reduce_gradients(task.model, now=micro + 1 == sizes.accumulation):
            loss = task.loss(batch, draws, losses, images)
            with task.kernel():  # activations that were not kept are computed again
                (loss / sizes.accumulation).backward()
        lost = sum(batch["lost"].values())
    norm = parallel.clip_gradients(task.module, s.optimizer.max_grad_norm)
    return Gradient(losses, images, norm, waited, lost)


def all_reduce_report(gradient: Gradient, flags: Sequence[float]) -> Report:
    """Sum losses, counts and flags over all ranks in one all-reduce, so that all ranks take the same decisions."""
    losses, images = gradient.losses, gradient.images
    bad = ~(torch.isfinite(gradient.norm) & torch.isfinite(losses).all())
    values = torch.cat([losses, images, bad[None], torch.tensor(flags, device=losses.device)])
    sums = distributed.all_reduce_sum(values.double()).tolist()
    kinds = len(losses)
    return Report(sums[:kinds], sums[kinds : 2 * kinds], bool(sums[2 * kinds]), sums[2 * kinds + 1 :])


def apply_gradient(task: Task, optimizer: torch.optim.Optimizer, update: int) -> None:
    """Take optimizer step number `update`, from 1, and update the moving average."""
    optimizer.step()
    if task.ema:
        task.ema.update(task.module, update)
