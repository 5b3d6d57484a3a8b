"""Tests of the EMA: closed forms, and the temporary swap of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.training.ema import Ema, decay_of


def constant(value: float) -> nn.Module:
    module = nn.Linear(2, 1)
    for p in module.parameters():
        nn.init.constant_(p, value)
    return module


def average(ema: Ema) -> float:
    (value,) = {v for w in ema.weights.values() for v in w.flatten().tolist()}
    return value


def test_ema_without_warmup_equals_its_closed_form():
    module = constant(0.0)
    ema = Ema(module, 0.9, warmup=False)
    for p in module.parameters():
        nn.init.constant_(p, 1.0)
    for k in range(1, 6):
        ema.update(module, k)
        assert average(ema) == pytest.approx(1 - 0.9**k, rel=1e-6)


def test_warmup_limits_the_first_decays():
    module, expected = constant(0.0), 0.0
    ema = Ema(module, 0.3)
    for k in range(1, 9):
        for p in module.parameters():
            nn.init.constant_(p, float(k))
        ema.update(module, k)
        decay = min(0.3, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * k
        assert average(ema) == pytest.approx(expected, rel=1e-6)
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 8) / (10 + 8)  # both terms of the minimum occurred


@pytest.mark.parametrize("batch", [1, 16, 2048])
def test_half_life_in_images_is_independent_of_the_batch_size(batch):
    settings = load_config(schema.EmaConfig, values={"half_life": 65536})
    assert decay_of(settings, batch) ** (65536 / batch) == pytest.approx(0.5)
    assert decay_of(load_config(schema.EmaConfig, values={"decay": 0.7}), batch) == 0.7


def test_applied_weights_are_the_average_and_are_restored():
    module = constant(1.0)
    ema = Ema(module, 0.5, warmup=False)
    for p in module.parameters():
        nn.init.constant_(p, 3.0)
    ema.update(module, 1)
    x = torch.ones(1, 2)
    with pytest.raises(KeyError), ema.applied(module):
        assert module(x).item() == pytest.approx(6.0)  # 2 + 2 + 2
        raise KeyError
    assert module(x).item() == pytest.approx(9.0) and average(ema) == 2.0


def test_only_trained_weights_are_averaged():
    module = constant(1.0)
    module.bias.requires_grad_(False)
    assert list(Ema(module, 0.5).weights) == ["weight"]


def test_ema_can_start_from_other_weights():
    module = constant(1.0)
    ema = Ema(module, 0.5)
    ema.load(dict(constant(7.0).named_parameters()))
    assert average(ema) == 7.0 and module.weight.tolist() == [[1.0, 1.0]]
