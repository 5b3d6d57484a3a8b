"""The choice of the attention kernel of a UNet: xformers, or one of torch."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrain.models.parts import ModelError, first_line

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def set_attention(
    unet: nn.Module, xformers: bool, attention: str | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Use the attention of xformers if requested, otherwise torch's, and test the named kernel of torch.

    `dtype` is that of the training's matrix products. Raise ModelError if the attention cannot run on this machine.
    """
    if xformers and attention:
        raise ModelError(
            "model.attention: xformers has a kernel of its own; set model.xformers=false or leave this out"
        )
    if attention:
        _try_kernel(unet, attention, device, dtype)
    if xformers and device.type != "cuda":
        warnings.warn("model.xformers: needs CUDA; torch's own attention is used on this device", stacklevel=2)
    elif xformers:
        _use_xformers(unet)


def attention_kernel(name: str | None) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a function that makes a context in which torch computes attention with one kernel; its default for None.

    Kernels: flash (Dao et al. 2022, arXiv 2205.14135), efficient (Rabe & Staats 2021, arXiv 2112.05682), cudnn, math.
    Use it for the forward and backward pass of the UNet only (checkpointing repeats the forward in the backward): some
    kernels support neither the wide heads of a VAE nor the mask of a text encoder.
    """
    return functools.partial(sdpa_kernel, KERNELS[name]) if name else contextlib.nullcontext


def _try_kernel(unet: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run a small forward and backward pass for each head width of the UNet."""
    for width in sorted({m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)}):
        x = torch.ones(1, 1, 16, width, device=device, dtype=dtype, requires_grad=True)
        try:
            with attention_kernel(name)():
                nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
        except RuntimeError as error:
            case = f"on {device.type} with {str(dtype).removeprefix('torch.')} and heads {width} wide"
            raise ModelError(f"model.attention: {name} cannot run {case}; leave it out, or name another") from error


def _use_xformers(unet: Any) -> None:
    try:
        unet.enable_xformers_memory_efficient_attention()
    except ModuleNotFoundError:
        remedy = "pip install -r requirements/gpu.txt, or set model.xformers=false"
        raise ModelError(f"model.xformers: the package is not installed: {remedy}") from None
    except (ValueError, RuntimeError) as error:  # no CUDA device, or a build for another one
        raise ModelError(f"model.xformers: cannot run here: {first_line(error)}; set model.xformers=false") from error
