"""Closed forms of the diffusion objective."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from sdtrain import objective

STEPS = 1000
SCHEDULE = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ALPHAS = SCHEDULE.alphas_cumprod.double()
ZERO = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod.double()


@pytest.fixture
def batch():
    """Clean latents, noise and timesteps, in double precision."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 8, 4, 5, 3, generator=generator, dtype=torch.float64)
    return clean, noise, torch.tensor([0, 1, 10, 100, 300, 500, 900, 999])


def test_noisy_latents_are_those_of_the_scheduler(batch):
    clean, noise, t = batch
    expected = SCHEDULE.add_noise(clean.float(), noise.float(), t)
    torch.testing.assert_close(objective.add_noise(clean.float(), noise.float(), SCHEDULE.alphas_cumprod, t), expected)


def test_every_target_recovers_the_clean_latents(batch):
    clean, noise, t = batch
    noisy = objective.add_noise(clean, noise, ALPHAS, t)
    a = ALPHAS[t].view(-1, 1, 1, 1)
    epsilon, v, sample = (objective.target(clean, noise, ALPHAS, t, p) for p in ("epsilon", "v_prediction", "sample"))
    torch.testing.assert_close((noisy - (1 - a).sqrt() * epsilon) / a.sqrt(), clean)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, clean)
    torch.testing.assert_close(a.sqrt() * v + (1 - a).sqrt() * noisy, noise)
    assert sample is clean
    torch.testing.assert_close(v.float(), SCHEDULE.get_velocity(clean, noise, t).float(), atol=1e-5, rtol=1e-5)


def test_at_zero_terminal_snr_the_last_step_is_noise_and_v_is_minus_the_image(batch):
    clean, noise, _ = batch
    last = torch.full((8,), STEPS - 1)
    assert ZERO[-1] < 1e-12
    torch.testing.assert_close(objective.add_noise(clean, noise, ZERO, last), noise, atol=1e-6, rtol=0)
    torch.testing.assert_close(objective.target(clean, noise, ZERO, last, "v_prediction"), -clean, atol=1e-6, rtol=0)


def test_an_unknown_prediction_is_refused(batch):
    with pytest.raises(ValueError, match="'flow' is not one of epsilon, v_prediction, sample"):
        objective.target(*batch[:2], ALPHAS, batch[2], "flow")


def test_half_precision_latents_meet_a_full_precision_schedule(batch):
    clean, noise, t = batch
    clean, noise = clean.bfloat16().float(), noise.float()
    exact = objective.add_noise(clean, noise, SCHEDULE.alphas_cumprod, t)
    assert torch.equal(objective.add_noise(clean.bfloat16(), noise, SCHEDULE.alphas_cumprod, t), exact)
    assert not torch.equal(exact[0], clean[0])  # in bf16 the first step would carry no noise at all


# ---------------------------------------------------------------- weights
def test_min_snr_weights_at_known_ratios():
    snr = torch.tensor([0.0, 0.25, 5.0, 20.0], dtype=torch.float64)
    alphas, t = snr / (1 + snr), torch.arange(4)
    expected = {
        "epsilon": [1.0, 1.0, 1.0, 0.25],
        "v_prediction": [0.0, 0.2, 5 / 6, 5 / 21],
        "sample": [0.0, 0.25, 5.0, 5.0],
    }
    for prediction, weights in expected.items():
        found = objective.snr_weights(alphas, t, prediction, 5.0)
        torch.testing.assert_close(found, torch.tensor(weights))
        assert found.dtype == torch.float32
        assert objective.snr_weights(alphas, t, prediction, None).tolist() == [1.0] * 4


def test_weights_of_a_real_schedule_are_finite_and_of_one_objective(batch):
    """The same error in x0 costs the same in every parametrisation: that is what the divisors are for."""
    t = torch.arange(STEPS - 1)
    for alphas in (ALPHAS, ZERO):
        snr = alphas[t] / (1 - alphas[t])
        weights = {p: objective.snr_weights(alphas, t, p, 5.0).double() for p in ("epsilon", "v_prediction", "sample")}
        assert all(torch.isfinite(w).all() for w in weights.values())
        torch.testing.assert_close(weights["epsilon"] * snr, weights["sample"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(weights["v_prediction"] * (snr + 1), weights["sample"], rtol=1e-5, atol=1e-7)


def test_loss_is_a_weighted_mean_square_for_each_image():
    output = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([[1.0, 1.0, 3.0, 5.0], [2.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    found = objective.loss(output, target, torch.tensor([1.0, 0.5]))
    assert found.tolist() == [9.0, 0.5] and found.dtype == torch.float32


# ---------------------------------------------------------------- timesteps
@pytest.mark.parametrize("count", [1, 7, 32, 1000])
def test_stratified_timesteps_take_one_from_each_slice(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        t = objective.sample_timesteps(count, STEPS, "stratified", generator)
        assert t.dtype == torch.int64 and t.shape == (count,) and 0 <= t.min() and t.max() < STEPS
        gaps = t.sort().values.diff()  # equal slices, the same offset in each
        assert all(STEPS // count <= gap <= math.ceil(STEPS / count) for gap in gaps)


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_each_image_sees_every_timestep_alike(kind):
    generator, draws = torch.Generator().manual_seed(2), 4000
    t = torch.stack([objective.sample_timesteps(4, STEPS, kind, generator) for _ in range(draws)])
    for place in range(4):
        counts = torch.bincount(t[:, place] // 100, minlength=10).double()
        chi_square = ((counts - draws / 10).square() / (draws / 10)).sum()
        assert chi_square < 33.7  # 9 degrees of freedom, p = 1e-4
    again = torch.Generator().manual_seed(2)
    assert torch.equal(t[0], objective.sample_timesteps(4, STEPS, kind, again))
