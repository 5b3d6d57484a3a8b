"""Tests of the objective: closed forms, and random draws that do not depend on the split of a batch."""

from __future__ import annotations

import dataclasses
import math

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sdtrain.config import schema
from sdtrain.config.keys import all_keys
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError
from sdtrain.training import objective

STEPS = 1000
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = diffusers.DDIMScheduler(**SD)
ZERO = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True)
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def process(prediction, scheduler=SCHEDULE):
    """Return a forward process in double precision."""
    alphas = None if prediction == "flow_prediction" else scheduler.alphas_cumprod.double()
    return objective.Process(prediction, STEPS, alphas)


def weights(forward, t, **keys):
    """Loss weights with these keys of `objective`, all others at their defaults."""
    return objective.loss_weights(forward, t, load_config(schema.ObjectiveConfig, values=keys))


@pytest.fixture
def batch():
    """Return clean latents, noise and timesteps of 8 images, in double precision."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 8, 4, 5, 3, generator=generator, dtype=torch.float64)
    return clean, noise, torch.tensor([0, 1, 10, 100, 300, 500, 900, 999])


# ---------------------------------------------------------------- forward processes
def test_noisy_latents_are_those_of_the_scheduler(batch):
    clean, noise, t = batch
    found = objective.add_noise(objective.process_of(SCHEDULE), clean.float(), noise.float(), t)
    torch.testing.assert_close(found, SCHEDULE.add_noise(clean.float(), noise.float(), t))


def test_noisy_latents_of_a_flow_are_those_of_the_scheduler(batch):
    """Compare with another class of diffusers for flow matching, which uses only noise levels."""
    clean, noise, _ = batch
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    t = scheduler.timesteps[[0, 1, 10, 100, 300, 500, 900, 999]]
    found = objective.add_noise(process("flow_prediction"), clean.float(), noise.float(), t)
    torch.testing.assert_close(found, scheduler.scale_noise(clean.float(), t, noise.float()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_recovers_the_clean_latents(prediction, batch):
    clean, noise, t = batch
    forward = process(prediction)
    t = t.double() + 0.5 if prediction == "flow_prediction" else t
    noisy, goal = objective.add_noise(forward, clean, noise, t), objective.target(forward, clean, noise, t)
    signal, scale = (x.view(-1, 1, 1, 1) for x in forward.scales(t))
    recovered = {
        "epsilon": lambda: (noisy - scale * goal) / signal,
        "v_prediction": lambda: signal * noisy - scale * goal,
        "sample": lambda: goal,
        "flow_prediction": lambda: noisy - scale * goal,
    }[prediction]()
    torch.testing.assert_close(recovered, clean)


def test_v_targets_equal_the_published_formula(batch):
    clean, noise, t = batch
    v = objective.target(process("v_prediction"), clean, noise, t)
    torch.testing.assert_close(v.float(), SCHEDULE.get_velocity(clean, noise, t).float(), atol=1e-5, rtol=1e-5)
    signal, scale = (x.view(-1, 1, 1, 1) for x in process("v_prediction").scales(t))
    torch.testing.assert_close(
        signal * v + scale * objective.add_noise(process("v_prediction"), clean, noise, t), noise
    )

    flow, sigma = process("flow_prediction"), torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    there, further = (objective.add_noise(flow, clean, noise, s * STEPS) for s in (sigma, sigma + 0.1))
    torch.testing.assert_close((further - there) / 0.1, objective.target(flow, clean, noise, sigma * STEPS))


def test_flow_is_a_straight_line_from_image_to_noise(batch):
    clean, noise, _ = batch
    flow = process("flow_prediction")
    for t, expected in ((0.0, clean), (500.0, (clean + noise) / 2), (1000.0, noise)):
        found = objective.add_noise(flow, clean, noise, torch.full((8,), t, dtype=torch.float64))
        torch.testing.assert_close(found, expected)


def test_zero_terminal_snr_equals_the_closed_form_of_its_paper():
    """Lin et al. 2023, algorithm 1: sqrt(a) is shifted and stretched; its first value stays, its last becomes 0."""
    root, _ = process("epsilon").scales(torch.arange(STEPS))
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    found, scale = objective.process_of(
        diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ).scales(torch.arange(STEPS))
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    assert found[0] == pytest.approx(root[0].item(), abs=1e-6) and found[-1] == 0 and scale[-1] == 1
    assert root[-1] > 0.06  # the factor of the image without the rescaling


def test_at_zero_terminal_snr_the_last_step_is_noise_and_v_is_minus_the_image(batch):
    clean, noise, _ = batch
    forward, last = process("v_prediction", ZERO), torch.full((8,), STEPS - 1)
    assert torch.equal(objective.add_noise(forward, clean, noise, last), noise)
    assert torch.equal(objective.target(forward, clean, noise, last), -clean)


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
def test_half_precision_latents_use_a_full_precision_schedule(prediction, batch):
    clean, noise = batch[0].bfloat16(), batch[1].float()
    forward = objective.process_of(SCHEDULE) if prediction == "epsilon" else process(prediction)
    t = torch.ones(8, dtype=torch.int64 if prediction == "epsilon" else torch.float32)
    exact = objective.add_noise(forward, clean.float(), noise, t)
    found = objective.add_noise(forward, clean, noise, t)
    assert found.dtype == torch.float32 and torch.equal(found, exact)
    assert objective.target(forward, clean, noise, t).dtype == torch.float32
    assert not torch.equal(exact[0], clean[0].float())  # in bf16, such an early step would add hardly any noise


def test_timesteps_divide_the_process_evenly():
    u = torch.tensor([2.0**-53, 0.0009999, 0.001, 0.5, 0.9999, 1 - 2.0**-53], dtype=torch.float64)
    found = process("epsilon").timesteps(u)
    assert found.tolist() == [0, 0, 1, 500, 999, 999] and found.dtype == torch.int64
    found = process("flow_prediction").timesteps(u)
    torch.testing.assert_close(found, (u * STEPS).float())
    assert found.dtype == torch.float32 and 0 < found.min() and found.max() <= STEPS
    for steps in (1, 3, 4, 999, 2**20 + 1):  # no product rounds up to `steps`
        assert objective.Process("epsilon", steps, torch.ones(1)).timesteps(u[-1:]).tolist() == [steps - 1]


def test_a_process_moves_to_a_device():
    meta = torch.device("meta")
    moved = objective.process_of(SCHEDULE).to(meta)
    assert moved.alphas_cumprod.device == meta and (moved.prediction, moved.steps) == ("epsilon", STEPS)
    assert process("flow_prediction").to(meta).alphas_cumprod is None


# ---------------------------------------------------------------- schedulers
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize("prediction", PREDICTIONS[:3])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_diffusion_schedulers_are_understood(name, prediction):
    scheduler = getattr(diffusers, name)(**SD, num_train_timesteps=100, prediction_type=prediction)
    found = objective.process_of(scheduler)
    assert (found.prediction, found.steps) == (prediction, 100)
    assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]
)
def test_flow_schedulers_are_understood(name):
    found = objective.process_of(getattr(diffusers, name)(**FLOW, num_train_timesteps=100))
    assert (found.prediction, found.steps, found.alphas_cumprod) == ("flow_prediction", 100, None)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),  # it lacks init_noise_sigma, which the pipeline needs
        diffusers.DEISMultistepScheduler(**FLOW),  # stops at the last noise level before zero
        diffusers.DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
        diffusers.DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True),  # noise levels far above 1
        diffusers.DPMSolverMultistepScheduler(**FLOW, use_lu_lambdas=True),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),  # of noise prediction
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),  # at levels of diffusion
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_flow_that_the_pipeline_cannot_sample_is_refused(scheduler):
    with pytest.raises(ConfigError, match="model.scheduler: .*target to DPMSolverMultistep") as error:
        objective.process_of(scheduler)
    assert type(scheduler).__name__ in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(prediction_type="trigflow"),
        diffusers.RePaintScheduler(),  # no prediction_type
        diffusers.EDMEulerScheduler(),  # no alphas
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_an_unknown_prediction_is_refused(scheduler):
    with pytest.raises(ValueError, match="model.scheduler: .*prediction_type to one of epsilon, v_prediction, sample,"):
        objective.process_of(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        ZERO,
        diffusers.EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True),  # it uses 2^-24 instead of 0
        diffusers.DDIMScheduler(num_train_timesteps=2, trained_betas=[0.5, 1.0]),
    ],
    ids=["DDIM", "Euler", "trained_betas"],
)
def test_noise_prediction_at_zero_terminal_snr_is_refused(scheduler):
    with pytest.raises(ConfigError, match="model.scheduler.params.prediction_type to v_prediction"):
        objective.process_of(scheduler)


# ---------------------------------------------------------------- weights
def test_min_snr_weights_at_known_ratios():
    snr = torch.tensor([0.0, 0.25, 5.0, 20.0], dtype=torch.float64)
    alphas, t = snr / (1 + snr), torch.arange(4)
    expected = {
        "epsilon": [1.0, 1.0, 1.0, 0.25],
        "v_prediction": [0.0, 0.2, 5 / 6, 5 / 21],
        "sample": [0.0, 0.25, 5.0, 5.0],
    }
    for prediction, values in expected.items():
        forward = objective.Process(prediction, 4, alphas)
        found = weights(forward, t, snr_gamma=5.0)
        torch.testing.assert_close(found, torch.tensor(values))
        assert found.dtype == torch.float32
        assert weights(forward, t).tolist() == [1.0] * 4


@pytest.mark.parametrize("scheduler", [SCHEDULE, ZERO], ids=["standard", "zero"])
def test_min_snr_weights_are_finite_and_consistent_between_predictions(scheduler):
    """The same error in x0 has the same loss in every parametrization, which the divisors ensure."""
    t = torch.arange(STEPS)
    alphas = scheduler.alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    found = {p: weights(process(p, scheduler), t, snr_gamma=5.0).double() for p in PREDICTIONS[:3]}
    assert all(torch.isfinite(w).all() for w in found.values())
    torch.testing.assert_close(found["epsilon"] * snr, found["sample"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["v_prediction"] * (snr + 1), found["sample"], rtol=1e-5, atol=1e-7)


def test_min_snr_weights_of_a_flow_are_refused():
    t = torch.tensor([500.0])
    with pytest.raises(ConfigError, match="objective.snr_gamma: .*set it to null"):
        weights(process("flow_prediction"), t, snr_gamma=5.0)
    assert weights(process("flow_prediction"), t).tolist() == [1.0]


def test_loss_is_a_weighted_mean_square_for_each_image():
    output = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([[1.0, 1.0, 3.0, 5.0], [2.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    found = objective.loss(output, target, torch.tensor([1.0, 0.5]))
    assert found.tolist() == [9.0, 0.5] and found.dtype == torch.float32


# ---------------------------------------------------------------- draws
def draws(count, *, position=0, seed=0, slots=None, **settings):
    """Return the random draws of a whole batch, or of some slots of it."""
    settings = schema.ObjectiveConfig(**settings)
    return objective.draw(settings, seed, position, count, range(count) if slots is None else slots)


def pixels(found):
    """Return two normals per image, and one with offset noise, each N x 2 x 3 x 5 (not a multiple of 16 values)."""
    return torch.cat([objective.normals(found, 2, (2, 3, 5), "cpu", offset) for offset in (0.0, 0.5)])


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    total=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    kind=st.sampled_from(["uniform", "stratified", "logit_normal"]),
    position=st.integers(0, 2**40),
)
def test_random_draws_do_not_depend_on_the_split_of_a_batch(total, cuts, kind, position):
    whole = draws(total, position=position, timesteps=kind, caption_dropout=0.5)
    edges = sorted({0, total, *(c for c in cuts if c < total)})
    pieces = [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    parts = [draws(total, position=position, slots=s, timesteps=kind, caption_dropout=0.5) for s in pieces]
    assert torch.equal(torch.cat([p.drop for p in parts]), whole.drop)
    assert torch.equal(torch.cat([p.time for p in parts]), whole.time)
    assert torch.equal(torch.cat([pixels(p) for p in parts], dim=1), pixels(whole))


def test_random_draws_depend_on_seed_and_position():
    first, again = draws(8, position=16, seed=1), draws(8, position=16, seed=1)
    assert torch.equal(first.time, again.time) and torch.equal(pixels(first), pixels(again))
    for other in (draws(8, position=24, seed=1), draws(8, position=16, seed=2)):
        assert not torch.isclose(first.time, other.time).any()
        assert not torch.isclose(pixels(first), pixels(other)).all(-1).any()


def test_setting_changes_only_its_own_random_draws():
    plain = draws(16)
    other = draws(16, timesteps="stratified", caption_dropout=0.9, offset_noise=1.0)
    assert torch.equal(pixels(plain), pixels(other))
    assert (plain.drop <= other.drop).all() and not torch.equal(plain.drop, other.drop)
    assert torch.equal(draws(16, caption_dropout=0.9).time, plain.time)


def test_a_slot_outside_the_batch_is_an_error():
    with pytest.raises(IndexError, match="8 is out of bounds"):
        draws(8, slots=range(4, 9))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_dropped_captions_is_caption_dropout(share):
    found = draws(20_000, caption_dropout=share).drop
    assert found.dtype == torch.bool
    assert found.double().mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000))


@pytest.mark.parametrize("count", [1, 7, 32, 1000])
def test_stratified_timesteps_have_one_draw_per_slice(count):
    for position in range(20):
        time = draws(count, position=position, timesteps="stratified").time
        assert time.dtype == torch.float64 and 0 < time.min() and time.max() < 1
        assert (time * count).floor().long().sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_timesteps_of_each_image_of_a_batch_are_uniform(kind):
    times = torch.stack([draws(4, position=4 * i, timesteps=kind).time for i in range(4000)])
    for place in range(4):
        assert scipy.stats.kstest(times[:, place], "uniform").pvalue > 1e-4
    sums = times.sum(1).var()  # 4 / 12 for 4 independent uniform numbers; 4 / 12 / 16 for one in each quarter
    assert sums == pytest.approx({"uniform": 1 / 3, "stratified": 1 / 48}[kind], rel=0.1)


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (-0.5, 1.5)])
def test_logit_normal_timesteps_have_normal_logits(mean, std):
    time = draws(20_000, timesteps="logit_normal", logit_mean=mean, logit_std=std).time
    assert time.dtype == torch.float64
    assert scipy.stats.kstest(torch.logit(time), "norm", args=(mean, std)).pvalue > 1e-4
    assert torch.logit(time).mean() == pytest.approx(mean, abs=4 * std / math.sqrt(20_000))
    assert torch.logit(time).std() == pytest.approx(std, rel=0.03)
    quantiles = scipy.stats.norm.ppf(draws(20_000).time)  # in the order of the uniform draws
    torch.testing.assert_close(torch.logit(time), torch.from_numpy(mean + std * quantiles), atol=1e-9, rtol=1e-9)


def test_extreme_logits_give_timesteps_within_range():
    for mean in (-1e3, 1e3):
        time = draws(64, timesteps="logit_normal", logit_mean=mean).time
        assert 0 < time.min() and time.max() < 1
    settings, ends = schema.ObjectiveConfig(), np.array([0.0, 1 - 2.0**-53])
    for kind in ("uniform", "stratified", "logit_normal"):
        settings.timesteps = kind
        time = objective.TIMESTEPS[kind](ends, np.arange(2), settings).clamp(objective.EDGE, 1 - objective.EDGE)
        assert 0 < time.min() and time.max() < 1


# ---------------------------------------------------------------- noise
def test_noise_is_standard_normal_and_independent_between_images():
    found = objective.normals(draws(64), 2, (4, 8, 8), "cpu")
    assert found.shape == (2, 64, 4, 8, 8) and found.dtype == torch.float32
    assert scipy.stats.kstest(found.flatten().double(), "norm").pvalue > 1e-4
    rows = found.flatten(2).flatten(0, 1)  # 128 rows of 256 numbers
    correlation = torch.corrcoef(rows) - torch.eye(128)
    assert correlation.abs().max() < 6 / math.sqrt(256)


def test_offset_noise_has_the_variance_and_correlation_of_its_closed_form():
    """Within a channel the correlation is s^2 / (1 + s^2); between channels and images there is none."""
    s, found = 0.5, draws(2000)
    noise, shifted = (objective.normals(found, 1, (3, 4, 4), "cpu", offset)[0] for offset in (0.0, s))
    shifted = shifted.double()
    assert shifted.var() == pytest.approx(1 + s**2, rel=0.03)
    among = torch.corrcoef(shifted.flatten(1).T)  # 48 pixels, over images
    within = torch.block_diag(*[torch.ones(16, 16)] * 3).bool()
    expected = torch.eye(48).double() + (within & ~torch.eye(48).bool()) * s**2 / (1 + s**2)
    torch.testing.assert_close(among, expected, atol=5 / math.sqrt(2000), rtol=0)
    shift = (shifted - noise)[:, :, 0, 0] / s
    torch.testing.assert_close(shifted - noise, s * shift[:, :, None, None].expand_as(noise), atol=1e-6, rtol=0)
    assert scipy.stats.kstest(shift.flatten(), "norm").pvalue > 1e-4


def test_offset_noise_is_independent_of_the_noise():
    found = draws(2000)
    noise, shifted = (objective.normals(found, 1, (3, 2, 2), "cpu", offset)[0] for offset in (0.0, 1.0))
    shift = (shifted - noise)[:, :, 0, 0]
    correlation = torch.corrcoef(torch.cat([noise.flatten(1), shift], dim=1).T)
    assert (correlation - torch.eye(15)).abs().max() < 5 / math.sqrt(2000)


def test_offset_noise_applies_only_to_the_first_normals():
    """The second normals sample the autoencoder's posterior, which has no offset."""
    found = draws(4)
    noise, other = objective.normals(found, 2, (4, 3, 3), "cpu")
    shifted, same = objective.normals(found, 2, (4, 3, 3), "cpu", 0.5)
    assert torch.equal(same, other)
    assert torch.equal(shifted, objective.normals(found, 1, (4, 3, 3), "cpu", 0.5)[0])
    assert not torch.isclose(shifted, noise).any()


def test_noise_is_the_same_for_precomputed_latents():
    """Without precomputed latents, a second normal is drawn for the posterior."""
    found = draws(4)
    alone, first = (objective.normals(found, count, (4, 3, 5), "cpu")[0] for count in (1, 2))
    assert torch.equal(alone, first)


# ---------------------------------------------------------------- registries
CHOICES = {key.name: key.choices for key in all_keys(schema.StageConfig)}


def test_choices_of_the_schema_equal_the_registered_names():
    assert {*objective.TIMESTEPS} == {*CHOICES["objective.timesteps"]}
    assert {*objective.WEIGHTINGS} <= {field.name for field in dataclasses.fields(schema.ObjectiveConfig)}
    assert {*objective.TARGETS} == {*objective.DIFFUSION, objective.FLOW}


def test_weightings_are_multiplied(monkeypatch):
    def divided(process, t, by):
        return torch.full((len(t),), 1 / by)

    monkeypatch.setattr(objective, "WEIGHTINGS", {"halved": divided, "thirded": divided, "off": divided})
    settings = {"halved": 2.0, "thirded": 3.0, "off": None}
    found = objective.loss_weights(process("epsilon"), torch.tensor([1, 2]), settings)
    torch.testing.assert_close(found, torch.full((2,), 1 / 6))
