"""Low-rank additions to a UNet (Hu et al. 2021, arXiv 2106.09685), by peft.

A weight W of the layers named becomes W + alpha / rank * B A, with A rank x in and B out x rank. B starts at zero, so
that the UNet starts as it was; only A and B are trained.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from sdtrain.errors import ConfigError
from sdtrain.io.files import atomic_path

FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it


def add(unet: Any, settings: Any) -> None:
    """Freeze a UNet and add the trainable float32 weights of `settings`, a `model.lora` section.

    Raise ConfigError for a target that names no layer.
    """
    import peft  # imported here: it takes a second, which only trainings with LoRA need

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
    """Return the layers whose dotted name ends in one of the targets. Raise ConfigError for a target without one."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets or [""]:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            there = sorted({match[0] for name in layers if (match := re.search(r"[^.]+(\.\d+)?$", name))})
            raise ConfigError(f"model.lora.targets: '{target}' is not a layer of the UNet; it has {', '.join(there)}")
    return [name for name in layers if f".{name}".endswith(tuple(f".{target}" for target in targets))]


def export(unet: Any, folder: str | Path) -> Path:
    """Write the LoRA weights as FILE, atomically, and return its path.

    `StableDiffusionPipeline.load_lora_weights(folder)` reads it. The scale is multiplied into B, so that readers of the
    file need the weights only.
    """
    weights: dict[str, Any] = {}
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        (adapter,) = layer.active_adapters
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
        weights |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
    path = Path(folder, FILE)
    tensors = {key: w.detach().contiguous().cpu() for key, w in weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path


def merged(unet: Any) -> Any:
    """Return a copy of the UNet with the LoRA weights merged into its own: a plain UNet."""
    plain = copy.deepcopy(unet)
    plain.fuse_lora()
    plain.unload_lora()
    return plain
