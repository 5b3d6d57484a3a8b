"""Build model components (VAE, text encoder, tokenizer, scheduler, UNet) from `pretrained` or `target` and `params`."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn

from sdtrain.errors import SDTrainError

transformers.utils.logging.disable_progress_bar()  # frozen components load in an instant
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
ATTENTION_BLOCKS = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}  # of a UNet


class ModelError(SDTrainError, ValueError):
    """A model that cannot be built."""


@dataclass
class Parts:
    """The components of a latent diffusion model; `folders` maps frozen components to their local folders."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    unet: Any
    folders: dict[str, Path] = field(default_factory=dict)

    def named(self) -> dict[str, Any]:
        """Return the frozen components by their names in a diffusers pipeline."""
        return {name: getattr(self, name) for name in PARTS}

    def to(self, device: torch.device) -> Parts:
        """Move the networks to a device."""
        for module in (self.vae, self.text_encoder, self.unet):
            module.to(device)
        return self


def load_parts(model) -> Parts:
    """Build all components of a stage's `model` section; the frozen ones are in eval mode and without gradients.

    A component's `pretrained` or `target` takes precedence over `model.pretrained`, a whole pipeline. Raise ModelError
    if a component is not declared, does not exist or does not fit the others. Local folders need no network access.
    """
    built = {name: load_part(name, model) for name in (*PARTS, "unet")}
    folders = {}
    for name in ("vae", "text_encoder", "tokenizer"):
        source = _source(name, model)
        if source and Path(source).is_dir():
            folders[name] = Path(source, _subfolder(source, name)[1] or "")
    parts = Parts(**built, folders=folders)
    check_fit(parts)
    return parts


def load_part(name: str, model):
    """Build one component of a `model` section; a VAE or text encoder is frozen.

    A text encoder is any encoder of transformers whose first output is `last_hidden_state`: CLIP, BERT-like, T5. The
    `params` and `target` of the section override the configuration of a pretrained scheduler.
    """
    part, source = model[name], _source(name, model)
    if source:
        built = _from_pretrained(name, *_subfolder(source, name))
        if name == "scheduler":
            built = _changed_scheduler(built, part) if part.target or part.params else built
        elif part.params and not part.target:
            where = f"model.{name}.pretrained" if part.pretrained else "model.pretrained"
            raise ModelError(
                f"model.{name}.params: {where} brings its own; set model.{name}.target, or leave params out"
            )
    elif part.target:
        built = _from_target(name, part)
    else:
        raise ModelError(f"model.{name}: set model.{name}.pretrained, model.{name}.target, or model.pretrained")
    return built.requires_grad_(False).eval() if name in ("vae", "text_encoder") else built


def _source(name: str, model) -> str | None:
    """Return the folder or hub address of a component: its own, else the whole pipeline's; None if it has a target."""
    return model[name].pretrained or (None if model[name].target else model.pretrained)


def check_fit(parts: Parts) -> None:
    """Raise ModelError if the shapes of the components do not fit each other."""
    unet, width, channels = parts.unet.config, parts.text_encoder.config.hidden_size, parts.vae.config.latent_channels
    if "cross_attention_dim" not in unet:
        raise ModelError(f"model.unet.target: {type(parts.unet).__name__} takes no captions; UNet2DConditionModel does")
    key = "encoder_hid_dim" if unet.encoder_hid_dim else "cross_attention_dim"  # the width of the states it takes
    if any(w != width for w in _per_level(unet[key], 1)):
        raise ModelError(
            f"model.unet.params.{key}: {unet[key]}, but the text encoder's states are {width} wide: set that"
        )
    for key in ("in_channels", "out_channels"):
        if unet[key] != channels:
            raise ModelError(f"model.unet.params.{key}: {unet[key]}, but the VAE's latents have {channels} channels")
    check_length(parts.tokenizer, parts.text_encoder)


def check_resolution(parts: Parts, resolution: int) -> int:
    """Return the side of the latents of square images; an exported pipeline generates that size by default.

    Raise ModelError if the downsampling factors of the VAE and the UNet do not divide `resolution`, in pixels.
    """
    vae, unet = (2 ** (len(net.config.block_out_channels) - 1) for net in (parts.vae, parts.unet))
    reason = f"the VAE divides by {vae}, the UNet by {unet}"
    check_multiple("dataset.params.resolution", resolution, vae * unet, reason)
    side, given = resolution // vae, parts.unet.config.sample_size
    if given not in (None, side):
        meaning = f"the side of the latents of {resolution} pixels"
        warnings.warn(f"model.unet.params.sample_size: {given} is replaced by {side}, {meaning}", stacklevel=2)
    parts.unet.register_to_config(sample_size=side)
    return side


def check_multiple(key: str, resolution: int, step: int, reason: str) -> None:
    """Raise ModelError, with the nearest valid sizes, if `resolution` is not a positive multiple of `step`."""
    if resolution < 1 or resolution % step:
        below = resolution // step * step
        nearest = f"{below} or {below + step}" if below > 0 else step
        raise ModelError(f"{key}: {resolution} is not a multiple of {step} ({reason}): set {nearest}")


def check_length(tokenizer: Any, text_encoder: Any) -> None:
    """Raise ModelError if the tokenizer pads captions to more tokens than the text encoder takes, or without limit."""
    length, limit = tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", None)
    if length > (limit or 10_000):  # without an entry in tokenizer_config.json it is 10^30; T5 has no limit
        takes = f", the text encoder takes {limit}" if limit else ""
        remedy = f"set model_max_length to {limit or 512} at most in its tokenizer_config.json"
        raise ModelError(f"model.tokenizer: pads captions to {length} tokens{takes}; {remedy}")


def _subfolder(source: str, name: str) -> tuple[str, str | None]:
    """Return the folder of a component and its subfolder there: None if it is at the root of its own folder."""
    if not Path(source).is_dir():  # a hub address: a pipeline's, by its usual layout
        if source.startswith((".", "/")) or source.count("/") != 1:
            raise ModelError(
                f"model.{name}.pretrained: {source}: no such folder; make it with: snakemake {source}.json"
            )
        return source, name
    return source, name if Path(source, name).is_dir() else None


def _from_pretrained(name: str, source: str, subfolder: str | None, key: str | None = None):
    where = {"subfolder": subfolder} if subfolder else {}
    try:
        if name == "tokenizer":
            return transformers.AutoTokenizer.from_pretrained(source, **where)
        if name == "scheduler":
            config = diffusers.DDPMScheduler.load_config(source, **where)
            return getattr(diffusers, config["_class_name"]).from_config(config)
        if name == "text_encoder":
            return _text_encoder_class(source, where).from_pretrained(source, dtype=torch.float32, **where)
        cls = diffusers.AutoencoderKL if name == "vae" else diffusers.UNet2DConditionModel
        return cls.from_pretrained(source, torch_dtype=torch.float32, **where)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        key = key or f"model.{name}.pretrained"
        raise ModelError(f"{key}: {source}: not loadable: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _text_encoder_class(source: str, where: dict):
    """Return the class of the encoder if the model has a second half (CLIP, T5), else the configured class."""
    found = transformers.AutoConfig.from_pretrained(source, **where)
    if found.model_type == "clip":
        return transformers.CLIPTextModel
    return transformers.MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(found), transformers.AutoModel)


def _from_target(name: str, part):
    cls = _target_class(name, part.target)
    params: Any = OmegaConf.to_container(part.params, resolve=True)
    if "vocab_file" in params:  # transformers 5 ignores it silently and returns wrong token ids
        raise ModelError(
            f"model.{name}.params.vocab_file: is not read; set vocab and merges, or model.{name}.pretrained"
        )
    with refusals(f"model.{name}.params", cls):
        check_divisors(f"model.{name}.params", cls, params)
        return cls(**params)


def _changed_scheduler(scheduler, part):
    """Return a pretrained scheduler with the class and the parameters of its section."""
    cls: Any = _target_class("scheduler", part.target) if part.target else type(scheduler)
    params: Any = OmegaConf.to_container(part.params, resolve=True)
    if unknown := sorted(params.keys() - inspect.signature(cls).parameters.keys()):
        raise ModelError(f"model.scheduler.params.{unknown[0]}: {cls.__name__} has no such parameter")
    with refusals("model.scheduler.params", cls):
        return cls.from_config(scheduler.config, **params)


def _target_class(name: str, target: str) -> type:
    module, _, cls = target.rpartition(".")
    library = {"": diffusers, "diffusers": diffusers, "transformers": transformers}.get(module)
    if library is None or not isinstance(getattr(library, cls, None), type):
        raise ModelError(f"model.{name}.target: {target}: a class of diffusers or transformers is expected")
    return getattr(library, cls)


@contextlib.contextmanager
def refusals(key: str, cls: type):
    """Convert the errors that a class raises for its arguments to a ModelError that names their key."""
    try:
        yield
    except ModelError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError, OSError) as error:
        raise ModelError(f"{key}: {cls.__name__} refuses them: {first_line(error)}") from error


def check_divisors(key: str, cls: type, params: dict) -> None:
    """Raise ModelError if groups or attention heads do not divide the channels of their level."""
    values = {name: p.default for name, p in inspect.signature(cls).parameters.items()} | params
    channels, groups = values.get("block_out_channels"), values.get("norm_num_groups")
    if channels and groups is not None and (groups < 1 or any(c % groups for c in channels)):
        fit = _divisors(math.gcd(*channels))
        raise ModelError(f"{key}.norm_num_groups: {groups} does not divide all of {list(channels)}; {fit} do")
    if cls is diffusers.UNet2DConditionModel:
        _check_heads(f"{key}.attention_head_dim", values)


def _check_heads(key: str, unet: dict) -> None:
    """Raise ModelError if the number of heads does not divide the width of a level with attention.

    In diffusers, `attention_head_dim` is the number of heads of a level: of its down and up blocks, and of the middle
    block, which is as wide as the last level. With a remainder, diffusers silently builds narrower attention.
    """
    channels = unet["block_out_channels"]
    levels = [set(kinds) for kinds in zip(unet["down_block_types"], reversed(unet["up_block_types"]), strict=False)]
    levels[-1].add(unet["mid_block_type"])
    heads = _per_level(unet["attention_head_dim"], len(levels))
    for i, (kinds, count, width) in enumerate(zip(levels, heads, channels, strict=False)):
        if kinds & ATTENTION_BLOCKS and (count < 1 or width % count):
            fit = _divisors(width)
            raise ModelError(f"{key}: {count} heads do not divide the {width} channels of level {i}; {fit} do")


def _per_level(value, levels: int) -> list:
    return [value] * levels if isinstance(value, int) else list(value)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def load_weights(unet: nn.Module, folder: str | Path, key: str, which: str = "ema") -> None:
    """Load the weights of a UNet from a pipeline folder or from a UNet folder into `unet`.

    `which` is "ema", the weights that the pipeline samples with, or "raw". A pipeline that was trained without EMA has
    no `unet_raw`; its `unet` has the raw weights. Raise ModelError, which names `key`, if the weights do not fit.
    """
    if not Path(folder).is_dir():
        raise ModelError(f"{key}: {folder}: no such folder")
    names = ("unet_raw", "unet") if which == "raw" else ("unet",)
    subfolder = next((name for name in names if Path(folder, name).is_dir()), None)
    try:
        unet.load_state_dict(_from_pretrained("unet", str(folder), subfolder, key).state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ModelError(f"{key}: {folder}: these weights do not fit model.unet: {reason}") from error


class TextEncoding:
    """Map captions to the states of the frozen text encoder, as StableDiffusionPipeline computes them.

    The states of the last `cache` captions are cached, so that small datasets encode each caption once.
    """

    def __init__(self, tokenizer: Any, encoder: Any, device: torch.device, cache: int = 2048):
        self.tokenizer, self.encoder, self.device, self.cache = tokenizer, encoder, device, cache
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Return the states, float32 N x tokens x width."""
        unknown = sorted({c for c in captions if c not in self._known})
        fresh = dict(zip(unknown, self._encode(unknown), strict=True)) if unknown else {}
        states = torch.stack([fresh[c] if c in fresh else self._known[c] for c in captions])
        self._known.update(fresh)
        while len(self._known) > self.cache:
            self._known.popitem(last=False)
        return states

    def _encode(self, captions: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # the pipeline passes a mask only to encoders whose configuration asks for it; training must do the same
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        return self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0].float()


@torch.no_grad()
def encode_moments(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of the posterior of images N x 3 x H x W in [-1, 1], both float32 and scaled."""
    posterior = vae.encode(pixels).latent_dist
    mean = (posterior.mean.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return mean, posterior.std.float() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return the images N x 3 x H x W, float32 in [-1, 1], of scaled latents."""
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(unscaled).sample.float().clamp(-1, 1)
