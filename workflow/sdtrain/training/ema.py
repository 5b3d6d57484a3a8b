"""Exponential moving averages of the trainable weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def decay_of(settings: Any, global_batch: int) -> float:
    """Return the EMA decay per update, from `decay` or from `half_life` in images, of a `model.ema` section."""
    return 0.5 ** (global_batch / settings.half_life) if settings.half_life else settings.decay


class Ema:
    """Exponential moving average of a module's trainable parameters, updated once per optimizer step.

    With `warmup` the decay of update k = 1, 2, … is min(decay, (1 + k) / (10 + k)), so that early averages forget the
    initial weights. Each rank averages its own shard of sharded parameters.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True):
        self.decay, self.warmup = decay, warmup
        self.weights = {name: p.detach().clone() for name, p in trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, k: int) -> None:
        """Move the average towards `module`, which has the same parameters; this is update number `k`, from 1."""
        decay = min(self.decay, (1 + k) / (10 + k)) if self.warmup else self.decay
        torch._foreach_lerp_(_local(self.weights), _local(trainable(module)), 1.0 - decay)

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Start from whole weights by name; each rank takes its own shard of a sharded average."""
        for name, own in self.weights.items():
            given = weights[name].detach()
            own.copy_(distribute_tensor(given, own.device_mesh, own.placements) if isinstance(own, DTensor) else given)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield the module with the averaged weights; the trained weights return at the end of the context."""
        live = _local(trainable(module))
        kept = [p.clone() for p in live]
        torch._foreach_copy_(live, _local(self.weights))
        try:
            yield module
        finally:
            torch._foreach_copy_(live, kept)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _local(weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return this rank's tensors of parameters, which may be sharded."""
    return [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in weights.values()]
