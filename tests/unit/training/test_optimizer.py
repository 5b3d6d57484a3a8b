"""Tests of optimizers with an initial state by parameter name, and of learning rates in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdtrain.config import schema
from sdtrain.config.keys import all_keys
from sdtrain.config.load import load_config
from sdtrain.training.optimizer import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate, state_by_name

CPU = torch.device("cpu")


def settings(**changes):
    return load_config(schema.OptimizerConfig, values=changes)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(module: nn.Module, optimizer, steps: int) -> list[torch.Tensor]:
    for step in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (module(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_with_initial_state_equals_that_of_torch(fused):
    ours, theirs = network(), network()
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.01, eps=1e-8)
    found, expected = train(ours, build_optimizer(ours, settings(fused=fused)), 5), train(theirs, plain, 5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 * fused, atol=1e-7 * fused)


def test_settings_are_passed_to_the_optimizer():
    params = {"learning_rate": 0.5, "beta1": 0.7, "beta2": 0.8, "weight_decay": 0.3, "epsilon": 0.1}
    (group,) = build_optimizer(network(), settings(params=params)).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.7, 0.8), 0.3, 0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_weights_have_no_state(name):
    module = network()
    module[0].requires_grad_(False)
    optimizer = build_optimizer(module, settings(name=name))
    assert list(state_by_name(optimizer, module)) == ["2.weight", "2.bias"]
    before = module[0].weight.clone()
    train(module, optimizer, 2)
    assert torch.equal(module[0].weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_loaded_in_place_resumes_exactly(name):
    whole = network()
    expected = train(whole, build_optimizer(whole, settings(name=name)), 1)
    one, two = network(), network()
    first, second = build_optimizer(one, settings(name=name)), build_optimizer(two, settings(name=name))
    train(one, first, 1)
    for name, tensors in state_by_name(first, one).items():
        for key, tensor in tensors.items():
            state_by_name(second, two)[name][key].copy_(tensor)
    two.load_state_dict(one.state_dict())
    again = [train(module, optimizer, 3) for module, optimizer in ((one, first), (two, second))]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    assert not torch.equal(again[0][0], expected[0])


# ---------------------------------------------------------------- schedule
def schedule(scheduler: str, **params):
    values = {"learning_rate": 2.0, **params}
    return load_config(schema.LRConfig, values={"scheduler": scheduler, "params": values})


def test_constant_with_warmup_rises_linearly_then_stays_constant():
    rates = [learning_rate(s, 100, schedule("ConstantWithWarmup", warmup_length=4)) for s in range(8)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert learning_rate(0, 100, schedule("ConstantWithWarmup", warmup_length=0)) == 2.0


def test_cosine_decays_to_its_final_value():
    falling = schedule("CosineWithWarmup", warmup_length=10, decay_from=0.5, final=0.1)
    assert [learning_rate(s, 100, falling) for s in (9, 10, 50)] == [2.0, 2.0, 2.0]
    for step in (60, 75, 99, 100):
        expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 50) / 50)) / 2)
        assert learning_rate(step, 100, falling) == pytest.approx(expected)
    assert learning_rate(500, 100, falling) == pytest.approx(0.2)  # after the end it stays constant


# ---------------------------------------------------------------- registries
CHOICES = {key.name: key.choices for key in all_keys(schema.StageConfig)}


def test_choices_of_the_schema_equal_the_registered_names():
    assert {*OPTIMIZERS} == {*CHOICES["optimizer.name"]}
    assert {*SCHEDULES} == {*CHOICES["lr_scheduler.scheduler"]}


def test_optimizer_name_selects_the_optimizer(monkeypatch):
    def sgd(weights, chosen):
        return torch.optim.SGD(weights, chosen.params.learning_rate)

    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)
    chosen = SimpleNamespace(name="sgd", params=settings().params)
    assert isinstance(build_optimizer(network(), chosen), torch.optim.SGD)
