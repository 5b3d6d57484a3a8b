"""Tests of low-rank additions: only they train, they start at zero, and exports compute the same as training."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors import safe_open

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError
from sdtrain.models import lora
from sdtrain.models.parts import PARTS, load_parts

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def settings(**values):
    """Return a `model.lora` section."""
    return load_config(schema.LoraConfig, values={"rank": 2, **values})


@pytest.fixture
def unet(tiny_unet_params):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**tiny_unet_params)


def inputs() -> dict:
    generator = torch.Generator().manual_seed(1)
    latents, states = (torch.randn(size, generator=generator) for size in ((2, 4, 16, 16), (2, 16, 32)))
    return {"sample": latents, "timestep": torch.tensor([3, 700]), "encoder_hidden_states": states}


@torch.no_grad()
def output(unet) -> torch.Tensor:
    return unet.eval()(**inputs()).sample


def train(unet, steps=3, lr=0.05) -> None:
    """Take some optimizer steps on the trainable weights."""
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        unet.train()(**inputs()).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_low_rank_additions_train_and_they_start_at_zero(unet):
    before, plain = output(unet), {name: p.clone() for name, p in unet.named_parameters()}
    lora.add(unet, settings())
    assert torch.equal(output(unet), before)
    train(unet)
    assert not torch.allclose(output(unet), before, atol=1e-3)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2 * 4  # A and B of four layers, self- and cross-attention, in four transformers
    assert all(".lora_" in name for name in trained)
    frozen = {name.replace(".base_layer", ""): p for name, p in unet.named_parameters() if name not in trained}
    assert frozen.keys() == plain.keys() and all(torch.equal(p, plain[name]) for name, p in frozen.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_addition(unet, checkpointing):
    lora.add(unet, settings())
    train(unet, steps=1)  # the gradient of A is zero while B is zero
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()(**inputs()).sample.square().mean().backward()
    assert all((p.grad is not None and p.grad.abs().max() > 0) == p.requires_grad for p in unet.parameters())


def test_additions_to_a_half_precision_unet_are_single_precision(unet):
    lora.add(unet.bfloat16(), settings())
    dtypes = {p.requires_grad: set() for p in unet.parameters()}
    for p in unet.parameters():
        dtypes[p.requires_grad].add(p.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.0, 0.25), (12, 3.0)])
def test_a_weight_becomes_w_plus_alpha_over_rank_b_a(unet, alpha, scale):
    lora.add(unet, settings(rank=4, alpha=alpha))
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 32) and b.shape == (16, 4)
    torch.nn.init.normal_(b.data)
    w = layer.base_layer.weight + scale * b @ a
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), x @ w.T)
    merged = lora.merged(unet)
    torch.testing.assert_close(merged.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight, w)


def test_dropout_is_active_only_in_training(unet):
    lora.add(unet, settings(dropout=0.5))
    train(unet)
    with torch.no_grad():
        drawn = [unet.train()(**inputs()).sample for _ in range(2)]
    assert not torch.equal(*drawn) and torch.equal(output(unet), output(unet))


@pytest.mark.parametrize("changes", [{"alpha": 7}, {"targets": [*TARGETS, "conv1", "proj_in", "linear_2"]}])
def test_a_pipeline_with_the_file_and_a_merged_unet_compute_what_was_trained(
    unet, tiny_parts, tiny_unet_params, tmp_path, changes
):
    plain = diffusers.UNet2DConditionModel(**tiny_unet_params)
    plain.load_state_dict(unet.state_dict())
    untrained = output(plain)
    lora.add(unet, settings(**changes))
    train(unet)
    trained = output(unet)
    assert not torch.allclose(trained, untrained, atol=1e-3)

    merged = lora.merged(unet)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    torch.testing.assert_close(output(merged), trained, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output(unet), trained, atol=0, rtol=0)  # merging did not change the original UNet
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        output(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")), output(merged)
    )

    assert lora.export(unet, tmp_path / "new/lora") == tmp_path / "new/lora/pytorch_lora_weights.safetensors"
    pipe = as_pipeline(tiny_parts, tiny_unet_params, plain)
    pipe.load_lora_weights(tmp_path / "new/lora")
    torch.testing.assert_close(output(pipe.unet), trained, atol=1e-5, rtol=1e-4)


def as_pipeline(tiny_parts, tiny_unet_params, unet):
    parts = {name: {"pretrained": str(tiny_parts)} for name in PARTS}
    parts["unet"] = {"target": "UNet2DConditionModel", "params": tiny_unet_params}
    named = load_parts(load_config(schema.ModelConfig, values=parts)).named()
    kept = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**named, unet=unet, **kept)


def test_exported_file_replaces_an_older_one_atomically(unet, tmp_path, monkeypatch):
    lora.add(unet, settings())
    path = lora.export(unet, tmp_path)
    before = path.read_bytes()
    train(unet)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        lora.export(unet, tmp_path)
    assert path.read_bytes() == before
    lora.export(unet, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() != before
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"} and len(list(file.keys())) == 64


@pytest.mark.parametrize("target", ["to_z", "q", "attn1", "norm1", ""])
def test_target_without_a_layer_is_named_with_the_valid_ones(unet, target):
    named = rf"^model.lora.targets: '{target}' is not a layer of the UNet; it has conv, conv1, .*to_out.0, to_q, to_v"
    with pytest.raises(ConfigError, match=named):
        lora.add(unet, settings(targets=["to_q", target]))
    assert all(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank: must be at least 1, got 0"),
        ({"rank": -1}, "rank: must be at least 1, got -1"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and less than 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: must be at least 0 and less than 1, got -0.1"),
    ],
)
def test_ranks_and_dropouts_out_of_range_are_named(values, message):
    with pytest.raises(ConfigError, match=f"{message}$"):
        settings(**values)


def test_empty_targets_are_refused(unet):
    with pytest.raises(ConfigError, match="^model.lora.targets: '' is not a layer of the UNet; it has conv, conv1"):
        lora.add(unet, settings(targets=[]))
