"""Tests of model components: loading, mutual fit, and captions encoded as the pipeline encodes them."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers.utils import is_xformers_available
from omegaconf import OmegaConf
from samples import ROOT, WORDS
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.models.attention import attention_kernel, set_attention
from sdtrain.models.parts import (
    PARTS,
    ModelError,
    TextEncoding,
    check_resolution,
    encode_moments,
    load_part,
    load_parts,
    load_weights,
)
from sdtrain.models.pipeline import export_pipeline

CPU = torch.device("cpu")
CAPTIONS = ["a red square", "", "a photo of a small blue circle on white", "a red square"]


def section(tiny_parts, tiny_unet_params, **changes):
    """Return a function that builds the tiny components with changes given as component={…}."""
    values = {part: {"pretrained": str(tiny_parts)} for part in PARTS}
    values["unet"] = {"target": "UNet2DConditionModel", "params": tiny_unet_params}
    return load_config(schema.ModelConfig, values={**values, **changes})


@pytest.fixture
def build(tiny_parts, tiny_unet_params):
    return lambda **changes: load_parts(section(tiny_parts, tiny_unet_params, **changes))


# ---------------------------------------------------------------- building
def test_components_come_from_a_pipeline_folder_or_a_class(build, tiny_parts):
    parts = build(scheduler={"target": "diffusers.DDPMScheduler", "params": {"prediction_type": "v_prediction"}})
    kinds = [type(part).__name__ for part in (*parts.named().values(), parts.unet)]
    assert kinds == ["AutoencoderKL", "CLIPTextModel", "CLIPTokenizer", "DDPMScheduler", "UNet2DConditionModel"]
    assert parts.scheduler.config.prediction_type == "v_prediction"
    assert parts.folders == {name: tiny_parts / name for name in ("vae", "text_encoder", "tokenizer")}
    frozen = [*parts.vae.parameters(), *parts.text_encoder.parameters()]
    assert not any(p.requires_grad for p in frozen) and not parts.vae.training and not parts.text_encoder.training
    assert all(p.requires_grad for p in parts.unet.parameters())


def test_component_folder_needs_no_subfolder(build, tiny_parts):
    parts = build(vae={"pretrained": str(tiny_parts / "vae")}, scheduler={"pretrained": str(tiny_parts / "scheduler")})
    assert parts.folders["vae"] == tiny_parts / "vae" and type(parts.scheduler).__name__ == "DDIMScheduler"


def test_unet_can_be_loaded_from_a_folder(build, tiny_unet_params, tmp_path):
    torch.manual_seed(5)
    saved = diffusers.UNet2DConditionModel(**tiny_unet_params).half()
    saved.save_pretrained(tmp_path / "unet")
    found = build(unet={"pretrained": str(tmp_path)}).unet
    for before, after in zip(saved.parameters(), found.parameters(), strict=True):
        assert after.requires_grad and after.dtype == torch.float32 and torch.equal(after, before.float())


def test_tokenizer_can_be_built_from_vocab_and_merges(build):
    params = {"vocab": {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, "merges": [], "model_max_length": 4}
    found = build(tokenizer={"target": "transformers.CLIPTokenizer", "params": params}).tokenizer
    assert found(["a"], padding="max_length").input_ids == [[1, 0, 2, 2]]


def test_a_text_encoder_comes_from_a_folder(build):
    """The classes of transformers take a configuration object, not arguments."""
    part = {"target": "transformers.CLIPTextModel", "params": {"hidden_size": 32}}
    with pytest.raises(ModelError, match="^model.text_encoder.params: CLIPTextModel refuses them: .*hidden_size'$"):
        build(text_encoder=part)


def test_pretrained_pipeline_provides_components_that_are_not_set(tiny_parts, tiny_unet_params):
    model = section(tiny_parts, tiny_unet_params, **{part: {} for part in PARTS}, pretrained=str(tiny_parts))
    parts = load_parts(model)  # model.unet.target takes precedence over model.pretrained, which has no UNet
    assert parts.folders["vae"] == tiny_parts / "vae" and parts.unet.config.cross_attention_dim == 32


def test_params_override_those_of_a_pretrained_scheduler(build, tiny_parts):
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    plain, found = build().scheduler, build(scheduler={"pretrained": str(tiny_parts), "params": changes}).scheduler
    assert type(found) is diffusers.DDIMScheduler and found.alphas_cumprod[-1] == 0 < plain.alphas_cumprod[-1]
    changed = {key for key in plain.config if plain.config[key] != found.config[key] and not key.startswith("_")}
    assert changed == changes.keys()


def test_a_target_changes_the_class_of_a_pretrained_scheduler(build, tiny_parts):
    part = {"pretrained": str(tiny_parts), "target": "DPMSolverMultistepScheduler", "params": {"solver_order": 3}}
    found = build(scheduler=part).scheduler
    assert type(found) is diffusers.DPMSolverMultistepScheduler and found.config.solver_order == 3
    assert (found.config.beta_schedule, found.config.steps_offset) == ("scaled_linear", 1)  # from the folder
    torch.testing.assert_close(found.alphas_cumprod, build().scheduler.alphas_cumprod)


def test_scheduler_params_override_those_of_a_pretrained_pipeline(tiny_parts, tiny_unet_params):
    named = {**{part: {} for part in PARTS}, "scheduler": {"params": {"prediction_type": "v_prediction"}}}
    found = load_parts(section(tiny_parts, tiny_unet_params, **named, pretrained=str(tiny_parts))).scheduler
    assert (found.config.prediction_type, found.config.beta_schedule) == ("v_prediction", "scaled_linear")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet"])
@pytest.mark.parametrize("whole", [False, True])
def test_params_beside_a_pretrained_component_are_refused(tiny_parts, tiny_unet_params, tmp_path, part, whole):
    diffusers.UNet2DConditionModel(**tiny_unet_params).save_pretrained(tmp_path / "unet")
    folder = str(tmp_path if part == "unet" else tiny_parts)
    changes = {part: {"params": {"a": 1}}, "pretrained": folder}
    if not whole:
        changes[part]["pretrained"] = changes.pop("pretrained")
    key = "model.pretrained" if whole else f"model.{part}.pretrained"
    with pytest.raises(ModelError, match=f"^model.{part}.params: {key} brings its own; set model.{part}.target, or"):
        load_part(part, section(tiny_parts, tiny_unet_params, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {"prediction": "sample"}}, "params.prediction: DDIMScheduler has no such parameter"),
        ({"params": {"beta_schedule": "round"}}, "params: DDIMScheduler refuses them: round is not implemented for"),
        ({"target": "PNDMScheduler", "params": {"eta": 1}}, "params.eta: PNDMScheduler has no such parameter"),
        ({"target": "NoScheduler"}, "target: NoScheduler: a class of diffusers or transformers is expected"),
    ],
)
def test_invalid_scheduler_params_name_their_key(build, tiny_parts, changes, message):
    with pytest.raises(ModelError, match=f"^model.scheduler.{message}"):
        build(scheduler={"pretrained": str(tiny_parts), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": {}}, "model.vae: set model.vae.pretrained, model.vae.target, or model.pretrained"),
        (
            {"vae": {"pretrained": "./nowhere"}},
            "model.vae.pretrained: ./nowhere: no such folder; make it with: snakemake",
        ),
        (
            {"unet": {"target": "UNet3000"}},
            "model.unet.target: UNet3000: a class of diffusers or transformers is expected",
        ),
        (
            {"tokenizer": {"target": "transformers.CLIPTokenizer", "params": {"vocab_file": "vocab.json"}}},
            "model.tokenizer.params.vocab_file: is not read; set vocab and merges, or model.tokenizer.pretrained",
        ),
        (
            {"text_encoder": {"target": "transformers.AutoModel"}},
            "model.text_encoder.params: AutoModel refuses them: AutoModel is designed to be instantiated",
        ),
        ({"unet": {"target": "os.system"}}, "model.unet.target: os.system: a class of"),
        ({"unet": {"target": "transformers.pipeline"}}, "model.unet.target: transformers.pipeline: a class of"),
        (
            {"unet": {"target": "UNet2DConditionModel", "params": {"chanels": 3}}},
            "model.unet.params: UNet2DConditionModel refuses them: .*chanels",
        ),
        (
            {"vae": {"target": "AutoencoderKL", "params": {"latent_channels": 3}}},
            "model.unet.params.in_channels: 4, .* have 3 channels",
        ),
    ],
)
def test_components_that_cannot_be_built_name_their_key(build, changes, message):
    with pytest.raises(ModelError, match=f"^{message}"):
        build(**changes)


def test_components_that_do_not_fit_each_other_are_refused(build, tiny_unet_params):
    unet = {"target": "UNet2DConditionModel", "params": {**tiny_unet_params, "cross_attention_dim": 16}}
    with pytest.raises(
        ModelError, match="cross_attention_dim: 16, but the text encoder's states are 32 wide: set that"
    ):
        build(unet=unet)
    unet["params"] = {**tiny_unet_params, "out_channels": 8}
    with pytest.raises(ModelError, match="model.unet.params.out_channels: 8, but the VAE's latents have 4 channels"):
        build(unet=unet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_head_dim": 3}, "attention_head_dim: 3 heads do not divide the 16 channels of level 0; 1, 2, 4, 8"),
        ({"attention_head_dim": 64}, "attention_head_dim: 64 heads do not divide the 16 channels of level 0; 1, 2, 4,"),
        ({"attention_head_dim": [5, 4]}, "attention_head_dim: 5 heads do not divide the 16 channels of level 0"),
        (
            {"attention_head_dim": [4, 5]},
            "attention_head_dim: 5 heads do not divide the 32 channels of level 1; .*32 do",
        ),
        ({"norm_num_groups": 12}, r"norm_num_groups: 12 does not divide all of \[16, 32\]; 1, 2, 4, 8, 16 do"),
        ({"attention_head_dim": 0}, "attention_head_dim: 0 heads do not divide the 16 channels of level 0"),
        ({"norm_num_groups": 0}, "norm_num_groups: 0 does not divide all of"),
        ({"norm_num_groups": -8}, "norm_num_groups: -8 does not divide all of"),
        ({"block_out_channels": [16, 24]}, None),
        (
            {"block_out_channels": [16, 24], "norm_num_groups": 16},
            r"norm_num_groups: 16 .* of \[16, 24\]; 1, 2, 4, 8 do",
        ),
        ({"mid_block_type": None, "attention_head_dim": [4, 5]}, None),  # then level 1 has no attention
        (
            {"up_block_types": ["CrossAttnUpBlock2D"] * 2, "mid_block_type": None, "attention_head_dim": [4, 5]},
            "attention_head_dim: 5 heads do not divide the 32 channels of level 1",
        ),
    ],
)
def test_heads_and_groups_must_divide_their_channels(build, tiny_unet_params, changes, message):
    unet = {"target": "UNet2DConditionModel", "params": {**tiny_unet_params, **changes}}
    with pytest.raises(ModelError, match=f"^model.unet.params.{message}") if message else contextlib.nullcontext():
        build(unet=unet)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_head_dim": [4, 4, 4]},
        {"attention_head_dim": "four"},
        {"num_attention_heads": 4},
        {"norm_num_groups": None},
        {"block_out_channels": 16},
        {"block_out_channels": []},
        {"down_block_types": []},
        {"act_fn": "smooth"},
    ],
)
def test_invalid_unet_arguments_are_refused_with_one_line(build, tiny_unet_params, changes):
    with pytest.raises(ModelError, match="^model.unet.params: UNet2DConditionModel refuses them: [^\n]+$"):
        build(unet={"target": "UNet2DConditionModel", "params": {**tiny_unet_params, **changes}})


def test_groups_of_a_vae_must_divide_its_channels(build):
    part = {"target": "AutoencoderKL", "params": {"block_out_channels": [24], "norm_num_groups": 16}}
    with pytest.raises(
        ModelError, match="^model.vae.params.norm_num_groups: 16 does not divide all of .*24.; 1, 2, 3,"
    ):
        build(vae=part)


def test_unet_can_project_the_caption_states(build, tiny_unet_params):
    projected = {**tiny_unet_params, "cross_attention_dim": 8, "encoder_hid_dim_type": "text_proj"}
    build(unet={"target": "UNet2DConditionModel", "params": {**projected, "encoder_hid_dim": 32}})
    with pytest.raises(ModelError, match="model.unet.params.encoder_hid_dim: 16, but the text encoder's states are 32"):
        build(unet={"target": "UNet2DConditionModel", "params": {**projected, "encoder_hid_dim": 16}})


def test_unet_without_cross_attention_is_refused(build):
    with pytest.raises(
        ModelError, match="^model.unet.target: UNet2DModel takes no captions; UNet2DConditionModel does"
    ):
        build(unet={"target": "UNet2DModel", "params": {"block_out_channels": [32, 32, 32, 32]}})


# ---------------------------------------------------------------- sizes
@pytest.mark.parametrize(("resolution", "nearest"), [(30, "28 or 32"), (33, "32 or 36"), (3, "4"), (0, "4"), (-8, "4")])
def test_resolution_that_the_networks_cannot_halve_is_refused(build, resolution, nearest):
    parts, why = build(), r"\(the VAE divides by 2, the UNet by 2\)"
    message = f"^dataset.params.resolution: {resolution} is not a multiple of 4 {why}: set {nearest}$"
    with pytest.raises(ModelError, match=message):
        check_resolution(parts, resolution)


@pytest.mark.parametrize("sample_size", [8, 16, None])
def test_exported_pipeline_samples_at_the_resolution_of_its_training(build, tiny_unet_params, tmp_path, sample_size):
    params = {**tiny_unet_params, "sample_size": sample_size}
    parts = build(unet={"target": "UNet2DConditionModel", "params": params})
    said = "^model.unet.params.sample_size: 8 is replaced by 16, the side of the latents of 32 pixels$"
    with pytest.warns(UserWarning, match=said) if sample_size == 8 else warnings.catch_warnings(action="error"):
        assert check_resolution(parts, 32) == 16
    export_pipeline(tmp_path / "pipeline", parts, parts.unet)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    assert pipe("a red square", num_inference_steps=1).images[0].size == (32, 32)


def test_caption_length_above_the_limit_of_the_encoder_is_refused(build, tiny_parts, tmp_path):
    folder = shutil.copytree(tiny_parts / "tokenizer", tmp_path / "tokenizer")
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    del facts["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(
        ModelError, match=r"model.tokenizer: pads captions to 10+\d+ tokens, the text encoder takes 16; set model_max"
    ):
        build(tokenizer={"pretrained": str(folder)})


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_damaged_component_is_named(build, tiny_parts, tmp_path, part):
    folder = shutil.copytree(tiny_parts / part, tmp_path / part)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    if part == "scheduler":
        (folder / "scheduler_config.json").write_text('{"_class_name": "NoScheduler"}')
    with pytest.raises(ModelError, match=rf"model.{part}.pretrained: .*{part}: not loadable: \S"):
        build(**{part: {"pretrained": str(folder)}})


def test_weights_of_another_unet_are_refused(build, tiny_unet_params, tmp_path):
    unet = build().unet
    unet.save_pretrained(tmp_path / "same/unet")
    diffusers.UNet2DConditionModel(**{**tiny_unet_params, "block_out_channels": [8, 16]}).save_pretrained(
        tmp_path / "other"
    )
    fresh = build().unet
    load_weights(fresh, tmp_path / "same", "init")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), unet.parameters(), strict=True))
    with pytest.raises(ModelError, match="^init: .*other: these weights do not fit model.unet: size mismatch for"):
        load_weights(fresh, tmp_path / "other", "init")
    with pytest.raises(ModelError, match="^model.ema.path: .*absent: no such folder"):
        load_weights(fresh, tmp_path / "absent", "model.ema.path")
    (tmp_path / "other/config.json").write_text("{")
    with pytest.raises(ModelError, match=r"^init: .*other: not loadable: \S"):
        load_weights(fresh, tmp_path / "other", "init")


@pytest.mark.parametrize("averaged", [True, False])
def test_init_weights_selects_ema_or_raw_weights(build, tmp_path, averaged):
    unets = {name: build().unet for name in ("unet", "unet_raw")}
    for unet in list(unets.values())[: 1 + averaged]:
        torch.nn.init.normal_(unet.conv_in.weight)
    for name in list(unets)[: 1 + averaged]:
        unets[name].save_pretrained(tmp_path / name)
    for which, name in {"ema": "unet", "raw": "unet_raw" if averaged else "unet"}.items():
        found = build().unet
        load_weights(found, tmp_path, "init", which)
        assert torch.equal(found.conv_in.weight, unets[name].conv_in.weight)


# ---------------------------------------------------------------- attention
def test_xformers_without_cuda_is_a_warning(build):
    unet = build().unet
    with pytest.warns(UserWarning, match="model.xformers: needs CUDA; torch's own attention is used"):
        set_attention(unet, True, None, CPU)
    with warnings.catch_warnings(action="error"):
        set_attention(unet, False, None, CPU)


@pytest.mark.skipif(is_xformers_available(), reason="xformers is installed")
def test_missing_xformers_names_the_remedy(build):
    with pytest.raises(
        ModelError, match="^model.xformers: the package is not installed: pip install -r requirements/gpu"
    ):
        set_attention(build().unet, True, None, torch.device("cuda"))


@pytest.mark.skipif(not is_xformers_available() or torch.cuda.is_available(), reason="needs xformers and no CUDA")
def test_xformers_that_cannot_run_names_the_reason(build):
    with pytest.raises(ModelError, match="^model.xformers: cannot run here: .*cuda.*; set model.xformers=false"):
        set_attention(build().unet, True, None, torch.device("cuda"))


def test_xformers_and_a_kernel_of_torch_exclude_each_other(build):
    with pytest.raises(
        ModelError, match="^model.attention: xformers has a kernel of its own; set model.xformers=false"
    ):
        set_attention(build().unet, True, "math", CPU)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_kernel_that_cannot_run_here_is_refused(build, name):
    message = (
        f"^model.attention: {name} cannot run on cpu with bfloat16 and heads 4 wide; leave it out, or name another"
    )
    with pytest.raises(ModelError, match=message):
        set_attention(build().unet, False, name, CPU, torch.bfloat16)


class Operators(TorchDispatchMode):
    """Record the names of the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def test_configured_kernel_computes_attention_and_its_gradient(build):
    unet, flash = build().unet, "aten::_scaled_dot_product_flash_attention_for_cpu"
    unet.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)
    latents, states = (torch.randn(size, generator=generator) for size in ((2, 4, 16, 16), (2, 16, 32)))
    found = {}
    for name in ("flash", "math", None):
        set_attention(unet, False, name, CPU)
        kernel = attention_kernel(name)
        for _ in range(2):  # a new context each time
            unet.zero_grad()
            with kernel(), Operators() as operators:
                output = unet.train()(latents, torch.tensor([1, 500]), encoder_hidden_states=states).sample
                output.square().mean().backward()
        assert {flash, f"{flash}_backward"} <= operators.names if name != "math" else flash not in operators.names
        found[name] = [output.detach(), unet.conv_in.weight.grad.clone()]
    for name in ("math", None):
        torch.testing.assert_close(found[name], found["flash"], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- captions
def bert(**settings):
    """Return a BERT text encoder as wide as the tiny CLIP."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    cfg = transformers.BertConfig(vocab_size=600, max_position_embeddings=16, **sizes, **settings)
    return transformers.BertModel(cfg).eval()


def t5(folder: Path) -> Path:
    """Write a T5, encoder and decoder, as wide as the tiny CLIP, with a tokenizer of WORDS; return its folder."""
    torch.manual_seed(4)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), *((f"\u2581{w}", -2.0) for w in WORDS)]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=12)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    cfg = transformers.T5Config(vocab_size=len(tokenizer), **sizes)
    tokenizer.save_pretrained(folder / "tokenizer")
    transformers.T5ForConditionalGeneration(cfg).save_pretrained(folder / "text_encoder")
    return folder


def as_pipeline(parts, encoder):
    kept = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(parts.vae, encoder, parts.tokenizer, parts.unet, parts.scheduler, **kept)


@pytest.mark.parametrize("family", ["clip", "bert", "bert with a mask"])
def test_captions_are_encoded_as_the_pipeline_does(build, family):
    parts = build()
    encoder = (
        parts.text_encoder if family == "clip" else bert(**({"use_attention_mask": True} if "mask" in family else {}))
    )
    with torch.no_grad():
        expected, _ = as_pipeline(parts, encoder).encode_prompt(CAPTIONS, CPU, 1, False)
    found = TextEncoding(parts.tokenizer, encoder, CPU)(CAPTIONS)
    assert found.shape == (4, 16, 32) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    if family == "bert with a mask":
        unmasked = TextEncoding(parts.tokenizer, bert(), CPU)(CAPTIONS)
        assert not torch.allclose(found, unmasked, atol=1e-3)


def test_the_encoder_of_a_t5_conditions_a_pipeline(build, tmp_path):
    folder = {"pretrained": str(t5(tmp_path))}
    parts = build(text_encoder=folder, tokenizer=folder)
    assert type(parts.text_encoder) is transformers.T5EncoderModel and not parts.text_encoder.training
    encode = TextEncoding(parts.tokenizer, parts.text_encoder, CPU)
    assert encode(CAPTIONS).shape == (4, 12, 32)
    assert not torch.allclose(encode(["a red square"]), encode(["a blue square"]), atol=1e-3)
    export_pipeline(tmp_path / "pipeline", parts, parts.unet)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(CAPTIONS, CPU, 1, False)
    torch.testing.assert_close(encode(CAPTIONS), expected, atol=1e-6, rtol=1e-5)
    assert pipe("a red square", num_inference_steps=1).images[0].size == (32, 32)


def test_a_t5_tokenizer_without_a_length_is_refused(build, tmp_path):
    folder = {"pretrained": str(t5(tmp_path))}
    file = tmp_path / "tokenizer/tokenizer_config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in facts.items() if k != "model_max_length"}))
    with pytest.raises(
        ModelError, match=r"^model.tokenizer: pads captions to 10+\d+ tokens; set model_max_length to 512"
    ):
        build(text_encoder=folder, tokenizer=folder)


def test_a_bert_from_a_folder_conditions_a_pipeline(build, tmp_path):
    bert(use_attention_mask=True).save_pretrained(tmp_path / "bert")
    parts = build(text_encoder={"pretrained": str(tmp_path / "bert")})
    with torch.no_grad():
        expected, _ = as_pipeline(parts, parts.text_encoder).encode_prompt(CAPTIONS, CPU, 1, False)
    found = TextEncoding(parts.tokenizer, parts.text_encoder, CPU)(CAPTIONS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_caption_cache_is_exact_and_bounded(build):
    parts = build()
    calls = []
    parts.text_encoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    encode, plain = (TextEncoding(parts.tokenizer, parts.text_encoder, CPU, cache=size) for size in (3, 0))
    first = encode(CAPTIONS)
    assert calls == [3]  # each distinct caption once
    assert torch.equal(encode(CAPTIONS), first) and calls == [3]
    captions = ["a red square", "small", "large", "black", "white", "on"]
    torch.testing.assert_close(encode(captions), plain(captions), atol=1e-6, rtol=1e-5)
    assert len(encode._known) == 3 and len(plain._known) == 0
    assert torch.equal(encode(captions[-3:]), encode(captions)[-3:])


# ---------------------------------------------------------------- latents
def test_latents_are_scaled_and_full_precision(build):
    vae = build().vae
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    mean, deviation = encode_moments(vae, pixels)
    assert mean.shape == deviation.shape == (2, 4, 16, 16)
    torch.testing.assert_close((mean, deviation), (posterior.mean * 0.5, posterior.std * 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert {moment.dtype for moment in encode_moments(vae, pixels)} == {torch.float32}
    vae.register_to_config(shift_factor=0.25)
    torch.testing.assert_close(encode_moments(vae, pixels)[0], (posterior.mean - 0.25) * 0.5)


# ---------------------------------------------------------------- network
@pytest.fixture
def hub():
    """Serve an empty hub on loopback; return its address and the requested paths."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


LOADING = """
import contextlib
import os
import sys
import urllib.request
import diffusers
from omegaconf import OmegaConf
from sdtrain.models import lora, parts as models
from sdtrain.models.pipeline import export_pipeline

*sections, folder = sys.argv[1:]
for i, section in enumerate(sections):
    model = OmegaConf.create(section)
    found = models.load_parts(model)
    pipeline = export_pipeline(f"{folder}/{i}", found, found.unet)
    lora.add(found.unet, OmegaConf.create({"rank": 2, "alpha": None, "dropout": 0.0, "targets": ["to_q"]}))
    lora.merged(found.unet)
    lora.export(found.unet, f"{folder}/lora")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(f"{folder}/lora")
    models.load_weights(models.load_part("unet", model), pipeline, "init")
with contextlib.suppress(OSError):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/done")
models.load_part("vae", OmegaConf.create({"vae": {"pretrained": "some/model"}}))
"""


def test_local_folders_are_loaded_and_saved_without_a_request(hub, tiny_parts, tiny_unet_params, tmp_path):
    t5(tmp_path / "t5")
    bert().save_pretrained(tmp_path / "bert")
    local = {"pretrained": str(tmp_path / "t5")}
    changes = [
        {},
        {"text_encoder": local, "tokenizer": local},
        {"text_encoder": {"pretrained": str(tmp_path / "bert")}},
    ]
    sections = [json.dumps(OmegaConf.to_container(section(tiny_parts, tiny_unet_params, **c))) for c in changes]
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env |= {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", LOADING, *sections, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT / "workflow", env=env, capture_output=True, text=True, timeout=240)
    assert "ModelError: model.vae.pretrained: some/model: not loadable: " in done.stderr
    assert hub.asked[0] == "/done" and "/some/model/resolve/main/vae/config.json" in hub.asked
