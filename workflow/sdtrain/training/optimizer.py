"""AdamW over the trainable parameters, its state by their names, and the learning rate of each of its steps."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(module: nn.Module, settings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) of an `optimizer` section.

    Its moments are made at once, as zeros: a checkpoint is then read into them in place.
    """
    p = settings.params
    weights = [w for w in module.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, p.learning_rate, (p.beta1, p.beta2), p.epsilon, p.weight_decay, fused=settings.fused or None
    )
    for w in weights:
        step = torch.zeros((), dtype=torch.float32, device=w.device if settings.fused else "cpu")
        optimizer.state[w] = {"step": step, "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
    return optimizer


def state_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The live tensors of the optimizer's state: parameter name -> {step, exp_avg, exp_avg_sq}."""
    return {name: optimizer.state[w] for name, w in module.named_parameters() if w.requires_grad}


def learning_rate(step: int, steps: int, schedule) -> float:
    """Learning rate of optimizer step `step` of `steps`: linear warm-up, then constant or a cosine to `final`.

    `schedule` is an `lr_scheduler` section; the cosine (Loshchilov & Hutter 2016, arXiv 1608.03983) falls from the
    share `decay_from` of the steps on.
    """
    p = schedule.params
    if step < p.warmup_length:
        return p.learning_rate * (step + 1) / p.warmup_length
    if schedule.scheduler == "ConstantWithWarmup":
        return p.learning_rate
    begin = max(p.warmup_length, p.decay_from * steps)
    share = min(1.0, max(0.0, (step - begin) / max(1.0, steps - begin)))
    return p.learning_rate * (p.final + (1 - p.final) * 0.5 * (1 + math.cos(math.pi * share)))
