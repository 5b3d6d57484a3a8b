"""Batch sizes of the ranks, and one model on all of them: replicated by DDP or sharded by FSDP2."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdtrain.distributed import DistError, all_reduce_sum


def batch_sizes(system: Any, world_size: int) -> tuple[int | None, int]:
    """Return images per micro-batch, and images per step on all ranks, a multiple of the former on each rank.

    With `system.batch_size=auto` the first is None: it is measured later. Raise DistError for sizes that do not divide.
    """
    micro, step = system.batch_size, system.global_batch
    if micro == "auto":
        if not torch.cuda.is_available():
            raise DistError("system.batch_size: auto measures what fits a GPU, and there is none; set a number")
        if step is None or step % world_size:
            raise DistError(
                f"system.batch_size: auto needs system.global_batch, a multiple of the {world_size} ranks; it is {step}"
            )
        return None, step
    if step is None:
        return micro, micro * system.gradient_accumulation * world_size
    if step % (micro * world_size):
        near = max(1, round(step / (micro * world_size))) * micro * world_size
        raise DistError(
            f"system.global_batch: {step} is not a multiple of {world_size} ranks x system.batch_size={micro}; "
            f"set it to {near}, or another batch_size"
        )
    return micro, step


def blocks(unet: Any) -> list[nn.Module]:
    """Return the residual and transformer blocks of a UNet: the units of sharding and of compilation."""
    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    kinds = ("resnets", "attentions")
    return [block for level in levels for kind in kinds for block in getattr(level, kind, None) or ()]


def compile_model(unet: Any, how: str | None) -> None:
    """Compile the whole UNet ("model") or each block ("blocks"), in place; the weights keep their names."""
    # All residual blocks share one code object, which is compiled once for each shape: more often than torch's limit
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in {"model": [unet], "blocks": blocks(unet)}.get(how or "", []):
        module.compile(dynamic=False)


def spread(unet: nn.Module, strategy: str, world_size: int, device: torch.device, bf16: bool = False) -> nn.Module:
    """Return the module to call in training: the UNet for one process, else the UNet in DDP or FSDP2.

    FSDP (Zhao et al. 2023, arXiv 2304.11277) replaces the UNet's parameters by shards, so create the optimizer and the
    moving average afterwards. With `bf16`, weights are gathered in bfloat16, half the bytes, and gradients are reduced
    in float32. Raise DistError for fsdp on one process.
    """
    if world_size == 1:
        if strategy == "fsdp":
            raise DistError("distributed.strategy: fsdp needs more than one rank; set it to ddp")
        return unet
    if strategy == "ddp":
        return DistributedDataParallel(unet, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (world_size,))
    dtypes: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
    # Inputs and outputs are not cast: in bfloat16, timestep 501.7 would be 502
    whole = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False, output_dtype=torch.float32 if bf16 else None)
    for module in blocks(unet):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes), reshard_after_forward=True)
    fully_shard(unet, mesh=mesh, mp_policy=whole, reshard_after_forward=True)
    return unet


@contextlib.contextmanager
def reduce_gradients(model: nn.Module, now: bool) -> Iterator[None]:
    """Reduce gradients over the ranks in this context's backward pass only if `now`: at the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not now else contextlib.nullcontext():
        yield


def warm_up_ddp_buckets(model: nn.Module, dummy_pass: Callable[[], None]) -> None:
    """Let DDP choose its buckets before the first step, by a dummy forward and backward pass.

    DDP rebuilds its buckets after its first pass, and with more than two ranks the last bits of a sum depend on the
    buckets. Without the dummy pass, the first step after a resume would differ from that of an uninterrupted run.
    """
    if isinstance(model, DistributedDataParallel):
        dummy_pass()
        model.zero_grad(set_to_none=True)


def clip_gradients(unet: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scale the gradients to a norm of at most `max_norm` and return the norm before, a scalar."""
    weights = [p for p in unet.parameters() if p.requires_grad]
    return whole(torch.nn.utils.clip_grad_norm_(weights, max_norm or math.inf))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor; if it is sharded, all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_unet(unet: Any, main: bool) -> diffusers.UNet2DConditionModel | None:
    """Return a copy of the UNet with whole weights on the CPU if `main`, else None; all ranks call this together."""
    weights = {}
    for name, tensor in unet.state_dict().items():
        tensor = whole(tensor.detach())
        if main:
            weights[name] = tensor.to("cpu", memory_format=torch.contiguous_format, copy=True)
    if not main:
        return None
    with torch.device("meta"):
        plain = diffusers.UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(weights, assign=True)
    return plain


def largest_that_fits(share: int, attempt: Callable[[int], None], device: torch.device) -> int:
    """Return the largest divisor of `share` for which `attempt(images)` leaves a tenth of every rank's GPU free.

    Raise DistError if not even one image fits.
    """
    best = 0
    for count in (n for n in range(1, share + 1) if share % n == 0):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            attempt(count)
            fits = torch.cuda.max_memory_allocated(device) < 0.9 * torch.cuda.get_device_properties(device).total_memory
        except torch.OutOfMemoryError:
            fits = False
        if all_reduce_sum(torch.tensor(int(not fits), device=device)):  # too many for any rank
            break
        best = count
    if not best:
        raise DistError(
            "system.batch_size: auto: not even one image fits the GPU; set model.gradient_checkpointing=true"
        )
    return best
