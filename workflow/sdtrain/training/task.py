"""What the training loop needs of a task: a network, the losses of a micro-batch, what is saved and exported."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtrain.distributed import World
from sdtrain.training.ema import Ema
from sdtrain.training.identity import Identity
from sdtrain.training.objective import Draws
from sdtrain.training.telemetry import Telemetry


@dataclass(frozen=True)
class LoopSettings:
    """The keys of a configuration that the loop reads, whatever the task. Each means what it means in a stage."""

    system: Any  # a `system` section: batch_size, gradient_accumulation, global_batch
    optimizer: Any  # an `optimizer` section
    lr_scheduler: Any  # an `lr_scheduler` section
    objective: Any  # an `objective` section: how random numbers are drawn
    num_examples_to_see: int  # images of the whole training, over which the learning rate is scheduled
    milestone: int  # images at which this job ends
    milestones: list[int]  # images whose checkpoints are kept
    save_every: int
    log_every: int
    max_nonfinite: int
    max_rollbacks: int
    keep_checkpoints: int | None  # None: all
    requeue: bool
    workers: int
    prefetch: int
    max_lost: float
    seed: int
    threads: int | None
    timeout_minutes: float


class Task:
    """One kind of training. The loop calls the methods in the order in which they stand here.

    A subclass sets `settings`, `losses`, `label` and `record` when it is made, and the other attributes in `build`.
    """

    settings: LoopSettings
    losses: list[str]  # names of the losses that are logged apart
    label: str  # the name of the training in messages
    record: Path  # the result's record, written last: it carries the fingerprint of the training

    dataset: Any  # a data.datasets.PositionDataset
    module: nn.Module  # holds the trainable weights
    model: nn.Module  # is called in training: the module itself, or DDP around it
    ema: Ema | None
    kernel: contextlib.AbstractContextManager = contextlib.nullcontext()  # around the backward pass
    flops: int = 0  # of a forward and backward pass for one image; 0: unknown
    peak: float | None = None  # FLOP/s of a device; None: unknown

    def identify(self, global_batch: int) -> Identity:
        """Return the identity of the training: its folder, and all that decides its weights."""
        raise NotImplementedError

    def claim(self, own: Identity, world_size: int) -> None:
        """Mark the folder as this training's, on rank 0. Raise CheckpointError if that would abandon another one."""
        raise NotImplementedError

    def build(self, here: World, device: torch.device, global_batch: int) -> None:
        """Open the dataset and build the network; set the attributes above."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return the live tensors that a checkpoint holds, besides the optimizer state and the loop's counters."""
        raise NotImplementedError

    def start_anew(self) -> None:
        """Prepare for a training that resumes from no checkpoint."""

    def find_micro_batch(self, images: int) -> int:
        """Return the largest micro-batch that fits the GPU and divides `images`, a rank's images per step."""
        raise NotImplementedError

    def dummy_pass(self, micro_batch: int) -> None:
        """Run a forward and backward pass of `model`; its gradients are discarded."""
        raise NotImplementedError

    def start_wandb(self, own: Identity) -> Any:
        """Return a wandb run, or None."""
        raise NotImplementedError

    def loss(self, batch: dict, draws: Draws, losses: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return the loss of a micro-batch, a scalar whose graph leads to the weights.

        Add the sum of each of the `losses` and the number of images it is over to the float64 tensors given.
        """
        raise NotImplementedError

    def log_values(self, mean: float, each: list[float]) -> dict[str, float]:
        """Return the losses of a log line: from the mean of all losses, and the mean of each of `losses`."""
        raise NotImplementedError

    def before_save(self, telemetry: Telemetry, images: int, position: int) -> None:
        """Measure what was learned; state that changes here is part of the checkpoint. All ranks call this."""

    def after_save(self, telemetry: Telemetry, images: int) -> None:
        """Draw what was learned, while the checkpoint is written in the background. All ranks call this."""

    def export(self, facts: dict[str, Any]) -> object:
        """Export the result and write `record` with these facts, on rank 0; return what to print. All ranks call it."""
        raise NotImplementedError
