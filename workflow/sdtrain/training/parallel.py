"""One model over many ranks: replicated (DDP) or sharded (FSDP2), behind the same few functions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import diffusers
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdtrain.distributed import DistError, least


def blocks(unet: nn.Module) -> list[nn.Module]:
    """The parts of a UNet that repeat: residual and transformer blocks, the unit of sharding and of compilation."""
    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    kinds = ("resnets", "attentions")
    return [block for level in levels for kind in kinds for block in getattr(level, kind, None) or ()]


def compile_model(unet: nn.Module, how: str | None) -> None:
    """Compile the UNet whole ("model") or block by block ("blocks"), in place: names of weights stay."""
    # all residual blocks share one code, which is compiled anew for each of their shapes: more often than torch's limit
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in {"model": [unet], "blocks": blocks(unet)}.get(how, []):
        module.compile(dynamic=False)


def spread(unet: nn.Module, strategy: str, world_size: int, device: torch.device, bf16: bool = False) -> nn.Module:
    """The module to call in training: the UNet itself for one process, else over all ranks by DDP or FSDP2.

    Sharding (Zhao et al. 2023, arXiv 2304.11277) turns the UNet's own parameters into this rank's shares, so make
    optimizer and average afterwards. With `bf16` shares are gathered in bfloat16, half the bytes, and gradients are
    summed in float32. Raises DistError for fsdp on one process.
    """
    if world_size == 1:
        if strategy == "fsdp":
            raise DistError("distributed.strategy: fsdp shards over ranks, and there is one; set it to ddp")
        return unet
    if strategy == "ddp":
        return DistributedDataParallel(unet, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (world_size,))
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
    # timesteps go in, and predictions come out, as they are: in bfloat16, 501.7 would be 502
    whole = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False, output_dtype=torch.float32 if bf16 else None)
    for module in blocks(unet):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes), reshard_after_forward=True)
    fully_shard(unet, mesh=mesh, mp_policy=whole, reshard_after_forward=True)
    return unet


@contextlib.contextmanager
def exchange(model: nn.Module, now: bool):
    """Run forward and backward of a micro-batch; ranks exchange gradients only where `now`, at the last of them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    skip = isinstance(model, DistributedDataParallel) and not now
    with model.no_sync() if skip else contextlib.nullcontext():
        yield


def settle(model: nn.Module, one_pass: Callable[[], None]) -> None:
    """Let DDP choose its buckets before the first step, by a forward and backward whose gradients are thrown away.

    It does so anew after its first pass, and the sum over more than two ranks depends on the buckets in its last bits:
    if that pass were a step, the first one after a resume would differ from the same step of a run that went on.
    """
    if isinstance(model, DistributedDataParallel):
        one_pass()
        model.zero_grad(set_to_none=True)


def clip_gradients(unet: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scale the gradients to a norm of at most `max_norm`, over all ranks; returns the norm before, a scalar."""
    weights = [p for p in unet.parameters() if p.requires_grad]
    return whole(torch.nn.utils.clip_grad_norm_(weights, max_norm or math.inf))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece; all ranks call this together where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_unet(unet: nn.Module, main: bool) -> diffusers.UNet2DConditionModel | None:
    """A UNet of its own with these weights in one piece, on the CPU: for `main`; all ranks call this together."""
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
    """The largest divisor of `share` images for which `attempt(images)` leaves a tenth of every rank's GPU free.

    Raises DistError where not even one image fits.
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
        if not least(int(fits), device):
            break
        best = count
    if not best:
        raise DistError(
            "system.batch_size: auto: not even one image fits the GPU; set model.gradient_checkpointing=true"
        )
    return best
