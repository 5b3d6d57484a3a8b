"""Tests of the autoencoder: loss and PSNR in closed form, normalization of latents, and invalid parameters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import AutoencoderKL

from sdtrain.models import autoencoder
from sdtrain.models.parts import ModelError

TERMS = autoencoder.TERMS
NOTHING = torch.zeros(1, 1, 1, 1)
PARAMS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


def terms(output, images, mean=NOTHING, logvar=NOTHING, distance=None, **weights):
    found = autoencoder.loss_terms(
        output, images, mean, logvar, {name: weights.get(name, 0.0) for name in TERMS}, distance
    )
    return {name: value.item() for name, value in found.items()}


# ---------------------------------------------------------------- loss and quality
def test_each_term_of_the_loss_on_simple_errors():
    target = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    grey = target + 0.25  # a constant error: no error of gradients or chroma
    red = target.clone()
    red[:, 0] += 0.3
    blue = target + torch.tensor([0.0, 0.0, 0.3]).view(3, 1, 1)
    columns = target + 0.2 * (torch.arange(8) % 2 * 2 - 1)  # alternately plus and minus 0.2: zero on average
    expected = {
        "l1": (0.25, 0.1, 0.1, 0.2),
        "l2": (0.0625, 0.03, 0.03, 0.04),
        "low_pass": (0.25, 0.1, 0.1, 0.0),
        "gradient": (0.0, 0.0, 0.0, 0.4),
        "chroma": (0.0, 0.15, 0.15, 0.0),
    }
    for term, values in expected.items():
        found = [terms(x, target, **{term: 2.0}) for x in (grey, red, blue, columns)]
        assert [f[term] / 2 for f in found] == pytest.approx(values, abs=1e-6), term
        assert all(f.keys() == {term} for f in found)  # a term of weight 0 is not computed
    weights = dict(zip(expected, (1, 2, 3, 4, 5), strict=True))
    assert terms(red, target, **weights) == pytest.approx({k: v[1] * weights[k] for k, v in expected.items()}, abs=1e-6)


def test_kl_divergence_equals_that_of_torch():
    mean, logvar = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(autoencoder.kl_divergence(mean, logvar), expected)
    images = torch.zeros(2, 3, 8, 8)
    assert terms(images, images, mean, logvar, kl=0.5)["kl"] == pytest.approx(expected.item() / 2)


def test_the_perceptual_term_is_the_mean_distance_of_images_in_0_to_255():
    def distance(a, b):
        assert (a.min(), a.max(), b.min(), b.max()) == (0, 255, 127.5, 127.5)
        return torch.tensor([1.0, 3.0])

    output = torch.tensor([-1.0, 1.0]).repeat(2, 3, 4, 2)
    assert terms(output, torch.zeros(2, 3, 4, 4), distance=distance, perceptual=0.5) == {"perceptual": 1.0}


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    output = torch.stack([images[0] + 0.2, images[1] - 0.02])  # 0.1 and 0.01 of the value range 2
    torch.testing.assert_close(autoencoder.psnr(output, images), torch.tensor([20.0, 40.0]))


# ---------------------------------------------------------------- the network
def test_reconstruction_decodes_a_sample_of_the_posterior():
    torch.manual_seed(0)
    vae = autoencoder.build(PARAMS, 16)
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 8, 8)
    output, mean, logvar = autoencoder.Reconstruction(vae)(images, noise)
    posterior = vae.encode(images).latent_dist
    assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
    torch.testing.assert_close(output, vae.decode(posterior.mean + posterior.std * noise).sample)
    still, _, _ = autoencoder.Reconstruction(vae)(images, torch.zeros_like(noise))
    torch.testing.assert_close(still.clamp(-1, 1), autoencoder.reconstruct(vae, images))


def test_side_of_the_latents():
    vae = autoencoder.build(PARAMS, 16)
    assert [autoencoder.latent_side(vae, resolution) for resolution in (2, 16, 34)] == [1, 8, 17]
    for resolution, near in ((17, "16 or 18"), (1, "2"), (0, "2")):
        with pytest.raises(ModelError, match=f"^resolution: {resolution} is not a multiple of 2 .*: set {near}$"):
            autoencoder.latent_side(vae, resolution)


BAD = {
    "groups": ({"norm_num_groups": 3}, r"params.norm_num_groups: 3 does not divide all of \[8, 16\]; 1, 2, 4, 8 do"),
    "default groups": ({"norm_num_groups": None}, "params: AutoencoderKL refuses them: "),
    "unknown": ({"latent_chanels": 3}, "params: AutoencoderKL refuses them: .*latent_chanels"),
    "type of block": ({"down_block_types": ["Down"] * 2}, "params: AutoencoderKL refuses them: .*Down"),
    "number of blocks": ({"up_block_types": ["UpDecoderBlock2D"]}, "params: "),
    "not a number": ({"latent_channels": "many"}, "params: AutoencoderKL refuses them: "),
    "grey": ({"in_channels": 1}, "params: AutoencoderKL refuses them: "),
    "grey output": ({"out_channels": 1}, r"params: an image of .* its reconstruction is \(1, 16, 16\)"),
    "no quant_conv": ({"use_quant_conv": False}, "params: latents are normalised in quant_conv"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_parameters_are_refused(case):
    params, message = BAD[case]
    with pytest.raises(ModelError, match=f"^{message}") as refusal:
        autoencoder.build(PARAMS | params, 16)
    assert "\n" not in str(refusal.value)


def test_fewer_blocks_than_levels_give_latents_of_another_size():
    params = PARAMS | {"block_out_channels": [8, 8, 8]}
    params |= {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    with pytest.raises(
        ModelError, match=r"has latents of \(8, 8\) .* set a down_block_types and an up_block_types for"
    ):
        autoencoder.build(params, 16)


# ---------------------------------------------------------------- normalised latents
def test_latent_statistics_are_per_channel_with_a_least_deviation():
    latents = torch.stack([torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.full((2, 2), 5.0)])[None]
    mean, std = autoencoder.latent_statistics(latents)
    torch.testing.assert_close(mean, torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(std, torch.tensor([2 / math.sqrt(3), 1e-3]))


def test_folding_the_normalisation_changes_no_image():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8).eval()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(3)
        vae.quant_conv.bias.add_(torch.arange(8.0))
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    folded = copy.deepcopy(vae)
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        mean, std = autoencoder.latent_statistics(before.mode())
        autoencoder.fold_normalisation(folded, mean, std)
        after = folded.encode(images).latent_dist
        channels = autoencoder.latent_statistics(after.mode())
        torch.testing.assert_close(channels[0], torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(channels[1], torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.std * std.view(1, -1, 1, 1), before.std, atol=1e-4, rtol=1e-4)
        one, two = (v.decode(d.mode()).sample for v, d in ((vae, before), (folded, after)))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert folded.config.scaling_factor == 1.0
