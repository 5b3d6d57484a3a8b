"""Moving averages of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """Exponential moving average of a module's parameters, updated once per optimizer step.

    The decay warms up as min(decay, (1 + k) / (10 + k)) at update k, so that early averages forget the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`, which has the same parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1.0 - decay)

    def state_dict(self) -> dict:
        """Weights and update count."""
        return {"weights": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.module.load_state_dict(state["weights"])
        self.updates = state["updates"]
