"""What the training loop needs of a task: a network, the losses of a micro-batch, what is saved and exported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtrain.config import schema
from sdtrain.distributed import World
from sdtrain.training.ema import Ema
from sdtrain.training.identity import Identity
from sdtrain.training.objective import Draws
from sdtrain.training.telemetry import Telemetry


@dataclass(frozen=True)
class LoopSettings:
    """The keys of a configuration that the loop reads, for any task. Each means what it means in a stage.

    The defaults are for tasks whose configuration has no such key.
    """

    experiment: Any  # the section with num_examples_to_see, save_every, log_every, max_nonfinite, max_rollbacks, seed
    loader: Any  # the section with workers and prefetch
    system: Any  # a `system` section: batch_size, gradient_accumulation, global_batch, threads
    optimizer: Any  # an `optimizer` section
    lr_scheduler: Any  # an `lr_scheduler` section
    milestone: int  # images at which this job ends
    timeout_minutes: float
    objective: Any = field(default_factory=schema.ObjectiveConfig)  # how random numbers are drawn
    milestones: Sequence[int] = ()  # images whose checkpoints are kept
    keep_checkpoints: int | None = 2  # None: all
    requeue: bool = True
    max_lost: float = schema.DatasetParams.max_lost


class Task:
    """One kind of training. The loop calls the methods in the order of this class.

    A subclass sets the first group of attributes when it is made, and the second in `build`.
    """

    settings: LoopSettings
    losses: list[str]  # names of the losses that are logged apart
    label: str  # the name of the training in messages
    reported: Any  # the configuration for wandb, with the sections `wandb` and `experiment` of a stage
    record: Path  # the result's record, written last: it carries the fingerprint of the training

    dataset: Any  # a data.datasets.PositionDataset
    module: nn.Module  # holds the trainable weights
    model: nn.Module  # is called in training: the module itself, or DDP around it
    ema: Ema | None
    kernel: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around the backward pass
    flops: int = 0  # of a forward and backward pass for one image; 0: unknown
    peak: float | None = None  # FLOP/s of a device; None: unknown

    def identify(self, global_batch: int) -> Identity:
        """Return the identity of the training: its folder, and all that decides its weights."""
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

    def loss(self, batch: dict, draws: Draws, losses: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return the loss of a micro-batch, a scalar whose graph leads to the weights.

        Add the sum of each of the `losses` and the number of images it is over to the float64 tensors given.
        """
        raise NotImplementedError

    def log_values(self, mean: float, each: list[float]) -> dict[str, float]:
        """Return the losses of a log line: from the mean of all losses, and the mean of each of `losses`."""
        return {"loss": mean, **{f"loss_{name}": value for name, value in zip(self.losses, each, strict=True)}}

    def before_save(self, telemetry: Telemetry, images: int, position: int) -> None:
        """Measure what was learned; state that changes here is part of the checkpoint. All ranks call this."""

    def after_save(self, telemetry: Telemetry, images: int) -> None:
        """Draw what was learned, while the checkpoint is written in the background. All ranks call this."""

    def export(self, facts: dict[str, Any]) -> object:
        """Export the result and write `record` with these facts, on rank 0; return what to print. All ranks call it."""
        raise NotImplementedError
