"""Factory: VAE, text encoder, tokenizer, scheduler, UNet from `pretrained` or `target` + `params`; attention choice."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn

transformers.utils.logging.disable_progress_bar()  # a frozen part is read in a blink
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")


class ModelError(ValueError):
    """A model that cannot be built; the message names the key and the remedy."""


@dataclass
class Parts:
    """The parts of a latent diffusion model; `folders` says which local folder a frozen part came from."""

    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: object
    scheduler: object
    unet: nn.Module
    folders: dict[str, Path] = field(default_factory=dict)

    def named(self) -> dict[str, object]:
        """The frozen parts by the names that a diffusers pipeline gives them."""
        return {name: getattr(self, name) for name in PARTS}

    def to(self, device: torch.device) -> Parts:
        """Move the networks."""
        for module in (self.vae, self.text_encoder, self.unet):
            module.to(device)
        return self


def load_parts(model) -> Parts:
    """Build every part of a stage's `model` section; the frozen ones are in eval mode and need no gradient.

    A part's own `pretrained` or `target` comes before `model.pretrained`, the whole pipeline. Raises ModelError naming
    the key of a part that is not declared, not there or does not fit the others.
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
    """Build one part of a `model` section; a VAE or text encoder comes frozen."""
    source = _source(name, model)
    if source:
        built = _from_pretrained(name, *_subfolder(source, name))
    elif model[name].target:
        built = _from_target(name, model[name])
    else:
        raise ModelError(f"model.{name}: set model.{name}.pretrained, model.{name}.target, or model.pretrained")
    return built.requires_grad_(False).eval() if name in ("vae", "text_encoder") else built


def _source(name: str, model) -> str | None:
    """The folder or hub address of a part: its own, else the whole pipeline's unless a target is declared."""
    return model[name].pretrained or (None if model[name].target else model.pretrained)


def check_fit(parts: Parts) -> None:
    """Refuse parts whose shapes do not fit each other."""
    width, cross = parts.text_encoder.config.hidden_size, parts.unet.config.cross_attention_dim
    if isinstance(cross, int) and cross != width:
        raise ModelError(
            f"model.unet.params.cross_attention_dim: {cross}, but the text encoder's states are {width} wide: set that"
        )
    channels = parts.vae.config.latent_channels
    for key in ("in_channels", "out_channels"):
        if parts.unet.config[key] != channels:
            raise ModelError(
                f"model.unet.params.{key}: {parts.unet.config[key]}, but the VAE's latents have {channels} channels"
            )
    check_length(parts.tokenizer, parts.text_encoder)


def check_length(tokenizer, text_encoder: nn.Module) -> None:
    """Refuse a tokenizer that pads captions to more tokens than the text encoder takes."""
    length, limit = tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", 10_000)
    if length > limit:  # where tokenizer_config.json says nothing, it is 10^30
        remedy = f"set model_max_length to {limit} at most in its tokenizer_config.json"
        raise ModelError(f"model.tokenizer: pads captions to {length} tokens, the text encoder takes {limit}; {remedy}")


def _subfolder(source: str, name: str) -> tuple[str, str | None]:
    """Where a part lies: in its subfolder of a pipeline, or at the root of its own folder."""
    if not Path(source).is_dir():  # a hub address: a pipeline's, by its usual layout
        if source.startswith((".", "/")) or source.count("/") != 1:
            raise ModelError(
                f"model.{name}.pretrained: {source}: no such folder; make it with: snakemake {source}.json"
            )
        return source, name
    return source, name if Path(source, name).is_dir() else None


def _from_pretrained(name: str, source: str, subfolder: str | None):
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"model.{name}.pretrained: {source}: not loadable: {reason}") from error


def _text_encoder_class(source: str, where: dict):
    """The encoder half of CLIP and T5 models, else what the folder's configuration names (BERT and its kin)."""
    kind = transformers.AutoConfig.from_pretrained(source, **where).model_type
    encoders = {
        "clip": transformers.CLIPTextModel,
        "clip_text_model": transformers.CLIPTextModel,
        "t5": transformers.T5EncoderModel,
    }
    return encoders.get(kind, transformers.AutoModel)


def _from_target(name: str, part):
    module, _, cls = part.target.rpartition(".")
    library = {"": diffusers, "diffusers": diffusers, "transformers": transformers}.get(module)
    if library is None or not isinstance(getattr(library, cls, None), type):
        raise ModelError(f"model.{name}.target: {part.target}: a class of diffusers or transformers is expected")
    params = OmegaConf.to_container(part.params, resolve=True)
    try:
        return getattr(library, cls)(**params)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"model.{name}.params: {part.target} refuses them: {error}") from error


def load_unet(folder: str | Path) -> nn.Module:
    """The UNet of a pipeline folder, or of its own folder, in float32."""
    return _from_pretrained("unet", *_subfolder(str(folder), "unet"))


def load_weights(unet: nn.Module, folder: str | Path, key: str) -> None:
    """Give `unet` the weights of the one in a folder. Raises ModelError, naming `key`, where they do not fit."""
    if not Path(folder).is_dir():
        raise ModelError(f"{key}: {folder}: no such folder")
    try:
        unet.load_state_dict(load_unet(folder).state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ModelError(f"{key}: {folder}: these weights do not fit model.unet: {reason}") from error


def set_attention(unet: nn.Module, xformers: bool, device: torch.device) -> None:
    """Use xformers' attention where asked for and possible; torch's scaled_dot_product_attention otherwise."""
    if not xformers:
        return
    if device.type != "cuda":
        warnings.warn("model.xformers: needs CUDA; torch's own attention is used on this device", stacklevel=2)
        return
    try:
        unet.enable_xformers_memory_efficient_attention()
    except ModuleNotFoundError:
        raise ModelError(
            "model.xformers: the package is not installed: pip install xformers, or set model.xformers=false"
        ) from None


class TextEncoding:
    """Captions -> states of the frozen text encoder, as StableDiffusionPipeline computes them.

    Captions seen before come from a cache of `cache` entries: small datasets encode each caption once.
    """

    def __init__(self, tokenizer, encoder: nn.Module, device: torch.device, cache: int = 2048):
        self.tokenizer, self.encoder, self.device, self.cache = tokenizer, encoder, device, cache
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        """States float32 N x tokens x width."""
        unknown = sorted({c for c in captions if c not in self._known})
        if unknown:
            fresh = dict(zip(unknown, self._encode(unknown), strict=True))
        states = torch.stack([self._known[c] if c in self._known else fresh[c] for c in captions])
        if unknown:
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


def encode_images(vae: nn.Module, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Scaled float32 latents of images N x 3 x H x W in [-1, 1]: a posterior sample, its mean without a generator."""
    mean, deviation = encode_moments(vae, pixels)
    if generator is None:
        return mean
    return mean + deviation * torch.randn(mean.shape, generator=generator, device=mean.device)


@torch.no_grad()
def encode_moments(vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior of images N x 3 x H x W in [-1, 1], both float32 and scaled."""
    posterior = vae.encode(pixels).latent_dist
    mean = (posterior.mean.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return mean, posterior.std.float() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Images N x 3 x H x W, float32 in [-1, 1], of scaled latents."""
    return (
        vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample.float().clamp(-1, 1)
    )
