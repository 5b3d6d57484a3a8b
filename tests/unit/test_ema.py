"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdtrain.ema import Ema


def fill(module: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_updates_follow_the_closed_form(decay):
    module = fill(nn.Linear(3, 2), 2.0)
    ema, expected = Ema(module, decay), 2.0
    for k in range(1, 30):
        value = float((k * 7) % 5)
        ema.update(fill(module, value))
        d = min(decay, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * value
    for parameter in ema.module.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))


def test_a_constant_decay_forgets_geometrically():
    module = fill(nn.Linear(1, 1), 1.0)
    ema = Ema(module, 0.1)  # below 2 / 11, the warm-up's first value
    fill(module, 0.0)
    for _ in range(4):
        ema.update(module)
    assert ema.module.weight.item() == pytest.approx(0.1**4)


def test_the_module_is_left_alone_and_the_average_needs_no_gradient():
    module = fill(nn.Linear(2, 2), 1.0)
    ema = Ema(module, 0.5)
    fill(module, 3.0)
    ema.update(module)
    assert (module.weight == 3.0).all() and module.weight.requires_grad
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_state_goes_through_a_file(tmp_path):
    one = Ema(fill(nn.Linear(2, 2), 1.0), 0.9)
    for value in (5.0, -2.0):
        one.update(fill(nn.Linear(2, 2), value))
    torch.save(one.state_dict(), tmp_path / "ema.pt")
    two = Ema(fill(nn.Linear(2, 2), 0.0), 0.9)
    two.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for ema in (one, two):
        ema.update(fill(nn.Linear(2, 2), 7.0))
    assert two.updates == 3 and torch.equal(one.module.weight, two.module.weight)
