"""Optimizers and learning rate schedules, each a function with a name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

State = dict[str, torch.Tensor]


# ---------------------------------------------------------------- optimizers
def build_optimizer(module: nn.Module, settings: Any) -> torch.optim.Optimizer:
    """Return the optimizer `settings.name`, an `optimizer` section, of the trainable parameters.

    Its state exists from the start, so that a checkpoint can be loaded into it in place.
    """
    return OPTIMIZERS[settings.name]([p for p in module.parameters() if p.requires_grad], settings)


def adamw(weights: list[nn.Parameter], settings: Any) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""
    p = settings.params
    optimizer = torch.optim.AdamW(
        weights, p.learning_rate, (p.beta1, p.beta2), p.epsilon, p.weight_decay, fused=settings.fused or None
    )
    for w in weights:
        step = torch.zeros((), dtype=torch.float32, device=w.device if settings.fused else "cpu")
        optimizer.state[w] = {"step": step, "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
    return optimizer


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], Any], torch.optim.Optimizer]] = {"adamw": adamw}  # optimizer.name


def state_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, State]:
    """Return the live tensors of the optimizer state: parameter name -> {name: tensor}."""
    return {name: optimizer.state[w] for name, w in module.named_parameters() if w.requires_grad}


# ---------------------------------------------------------------- learning rate schedules
def learning_rate(step: int, steps: int, schedule: Any) -> float:
    """Return the learning rate of optimizer step `step` of `steps`: linear warm-up, then the schedule.

    `schedule` is an `lr_scheduler` section.
    """
    p = schedule.params
    if step < p.warmup_length:
        return p.learning_rate * (step + 1) / p.warmup_length
    return SCHEDULES[schedule.scheduler](step, steps, p)


def constant(step: int, steps: int, p: Any) -> float:
    """Return the constant learning rate."""
    return p.learning_rate


def cosine(step: int, steps: int, p: Any) -> float:
    """Return a cosine (Loshchilov & Hutter 2016, arXiv 1608.03983) from `decay_from`, a fraction of the steps, on."""
    begin = max(p.warmup_length, p.decay_from * steps)
    progress = min(1.0, max(0.0, (step - begin) / max(1.0, steps - begin)))
    return p.learning_rate * (p.final + (1 - p.final) * 0.5 * (1 + math.cos(math.pi * progress)))


SCHEDULES: dict[str, Callable[[int, int, Any], float]] = {  # lr_scheduler.scheduler, each after the warm-up
    "ConstantWithWarmup": constant,
    "CosineWithWarmup": cosine,
}
