"""Low-rank additions to a UNet (Hu et al. 2021, arXiv 2106.09685), by peft.

A weight W of the layers named becomes W + alpha / rank * B A, with A rank x in and B out x rank. B starts at zero, so
that the UNet starts as it was; only A and B are trained.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from sdtrain.errors import ConfigError

FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it


def add(unet: nn.Module, settings) -> None:
    """Freeze a UNet and add what `settings`, a `model.lora` section, says: new float32 weights, the ones to train.

    Raises ConfigError for a rank or dropout out of range and for a target that names no layer.
    """
    import peft  # here: a second of start-up that only trainings of additions pay

    if settings.rank < 1:
        raise ConfigError(f"model.lora.rank: {settings.rank} is no rank; set 1 or more, such as 4")
    if not 0 <= settings.dropout < 1:
        raise ConfigError(f"model.lora.dropout: {settings.dropout} is no share; set 0 or more, and less than 1")
    layers = _find_layers(unet, settings.targets)
    unet.requires_grad_(False)
    unet.add_adapter(
        peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=layers,
        )
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _find_layers(unet: nn.Module, targets: list[str]) -> list[str]:
    """The layers whose dotted name ends in one of the targets; each target has one at least."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets or [""]:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            there = sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in layers})
            raise ConfigError(f"model.lora.targets: '{target}' is no layer of the UNet; there are {', '.join(there)}")
    return [name for name in layers if f".{name}".endswith(tuple(f".{target}" for target in targets))]


def export(unet: nn.Module, folder: str | Path) -> Path:
    """Write the additions as FILE, whole or not at all, and return its path.

    `StableDiffusionPipeline.load_lora_weights(folder)` reads it. The scale is multiplied into B: whatever reads the
    file needs to know nothing but the weights.
    """
    weights = {}
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        (adapter,) = layer.active_adapters
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
        weights |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
    path = Path(folder, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    save_file({key: w.detach().contiguous().cpu() for key, w in weights.items()}, aside, metadata={"format": "pt"})
    os.replace(aside, path)
    return path


def merged(unet: nn.Module) -> nn.Module:
    """A copy of the UNet with the additions in its own weights and no other layers: a plain UNet."""
    plain = copy.deepcopy(unet)
    plain.fuse_lora()
    plain.unload_lora()
    return plain
