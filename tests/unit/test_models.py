"""Parts come from folders or classes, must fit each other, and captions are encoded as the pipeline encodes them."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import pytest
import torch
import transformers

from sdtrain import config, models, schema
from sdtrain.models import ModelError, TextEncoding

CPU = torch.device("cpu")
CAPTIONS = ["a red square", "", "a photo of a small blue circle on white", "a red square"]


def section(tiny_parts, tiny_unet_params, **changes):
    """A `model` section of the tiny parts; a change is given as part={…}."""
    values = {part: {"pretrained": str(tiny_parts)} for part in models.PARTS}
    values["unet"] = {"target": "UNet2DConditionModel", "params": tiny_unet_params}
    return config.load(schema.ModelConfig, values={**values, **changes})


@pytest.fixture
def build(tiny_parts, tiny_unet_params):
    return lambda **changes: models.load_parts(section(tiny_parts, tiny_unet_params, **changes))


# ---------------------------------------------------------------- building
def test_parts_come_from_a_pipeline_folder_or_a_class(build, tiny_parts):
    parts = build(scheduler={"target": "diffusers.DDPMScheduler", "params": {"prediction_type": "v_prediction"}})
    kinds = [type(part).__name__ for part in (*parts.named().values(), parts.unet)]
    assert kinds == ["AutoencoderKL", "CLIPTextModel", "CLIPTokenizer", "DDPMScheduler", "UNet2DConditionModel"]
    assert parts.scheduler.config.prediction_type == "v_prediction"
    assert parts.folders == {name: tiny_parts / name for name in ("vae", "text_encoder", "tokenizer")}
    frozen = [*parts.vae.parameters(), *parts.text_encoder.parameters()]
    assert not any(p.requires_grad for p in frozen) and not parts.vae.training and not parts.text_encoder.training
    assert all(p.requires_grad for p in parts.unet.parameters())


def test_a_part_may_be_the_root_of_its_own_folder(build, tiny_parts):
    parts = build(vae={"pretrained": str(tiny_parts / "vae")}, scheduler={"pretrained": str(tiny_parts / "scheduler")})
    assert parts.folders["vae"] == tiny_parts / "vae" and type(parts.scheduler).__name__ == "DDIMScheduler"


def test_a_whole_pipeline_serves_the_parts_that_are_not_named(tiny_parts, tiny_unet_params):
    model = section(tiny_parts, tiny_unet_params, **{part: {} for part in models.PARTS}, pretrained=str(tiny_parts))
    parts = models.load_parts(model)  # the UNet's own class comes before model.pretrained, which has none
    assert parts.folders["vae"] == tiny_parts / "vae" and parts.unet.config.cross_attention_dim == 32


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
def test_parts_that_cannot_be_built_name_their_key(build, changes, message):
    with pytest.raises(ModelError, match=f"^{message}"):
        build(**changes)


def test_parts_that_do_not_fit_are_refused(build, tiny_unet_params):
    unet = {"target": "UNet2DConditionModel", "params": {**tiny_unet_params, "cross_attention_dim": 16}}
    with pytest.raises(
        ModelError, match="cross_attention_dim: 16, but the text encoder's states are 32 wide: set that"
    ):
        build(unet=unet)
    unet["params"] = {**tiny_unet_params, "out_channels": 8}
    with pytest.raises(ModelError, match="model.unet.params.out_channels: 8, but the VAE's latents have 4 channels"):
        build(unet=unet)


def test_captions_longer_than_the_encoder_takes_are_refused(build, tiny_parts, tmp_path):
    folder = shutil.copytree(tiny_parts / "tokenizer", tmp_path / "tokenizer")
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    del facts["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(
        ModelError, match=r"model.tokenizer: pads captions to 10+\d+ tokens, the text encoder takes 16; set model_max"
    ):
        build(tokenizer={"pretrained": str(folder)})


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_a_damaged_part_is_named(build, tiny_parts, tmp_path, part):
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
    models.load_weights(fresh, tmp_path / "same", "init")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), unet.parameters(), strict=True))
    with pytest.raises(ModelError, match="^init: .*other: these weights do not fit model.unet: size mismatch for"):
        models.load_weights(fresh, tmp_path / "other", "init")
    with pytest.raises(ModelError, match="^model.ema.path: .*absent: no such folder"):
        models.load_weights(fresh, tmp_path / "absent", "model.ema.path")


def test_xformers_without_cuda_is_a_warning(build):
    unet = build().unet
    with pytest.warns(UserWarning, match="model.xformers: needs CUDA; torch's own attention is used"):
        models.set_attention(unet, True, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.set_attention(unet, False, CPU)


# ---------------------------------------------------------------- captions
def bert(**settings):
    """A text encoder of another family, as wide as the tiny CLIP."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    cfg = transformers.BertConfig(vocab_size=600, max_position_embeddings=16, **sizes, **settings)
    return transformers.BertModel(cfg).eval()


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


def test_the_cache_is_exact_and_bounded(build):
    parts = build()
    calls = []
    parts.text_encoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    encode, plain = (TextEncoding(parts.tokenizer, parts.text_encoder, CPU, cache=size) for size in (3, 0))
    first = encode(CAPTIONS)
    assert calls == [3]  # each different caption once
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
    latents = models.encode_images(vae, pixels)
    assert latents.shape == (2, 4, 16, 16)
    torch.testing.assert_close(latents, posterior.mean * 0.5)
    drawn = [models.encode_images(vae, pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with torch.autocast("cpu", torch.bfloat16):
        assert models.encode_images(vae, pixels, torch.Generator().manual_seed(1)).dtype == torch.float32
    vae.register_to_config(shift_factor=0.25)
    torch.testing.assert_close(models.encode_images(vae, pixels), (posterior.mean - 0.25) * 0.5)
