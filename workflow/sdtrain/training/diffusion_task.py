"""The task of training a latent diffusion model: the network, the losses of a batch, sample grids, the pipeline."""

from __future__ import annotations

import contextlib
import copy
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from sdtrain import distributed
from sdtrain.data.datasets import open_dataset
from sdtrain.errors import ConfigError
from sdtrain.io.files import atomic_path, replace_link, write_json
from sdtrain.models import lora
from sdtrain.models.attention import attention_kernel, set_attention
from sdtrain.models.parts import (
    ModelError,
    Parts,
    TextEncoding,
    check_resolution,
    encode_images,
    encode_moments,
    load_parts,
    load_weights,
)
from sdtrain.models.pipeline import export_pipeline, generate, grid, pipeline_of
from sdtrain.training import identity, objective, parallel
from sdtrain.training.ema import Ema, decay_of, trainable
from sdtrain.training.task import LoopSettings, Task
from sdtrain.training.telemetry import Telemetry, peak_flops, start_wandb, training_flops

QUARTILES = 4  # of time, from little noise to much: losses are logged for each


class DiffusionTask(Task):
    """Train the UNet of a stage, on images or on cached latents."""

    def __init__(self, cfg: DictConfig):
        e, params = cfg.experiment, cfg.dataset.params
        self.cfg, self.label = cfg, f"{e.project}/{e.name}"
        self.losses = [f"q{i + 1}" for i in range(QUARTILES)]
        milestone = e.num_examples_to_see if e.stop_at is None else e.stop_at
        self.folder = identity.run_folder(cfg)
        self.result = self.folder / str(milestone)
        self.record = self.result / "train.json"
        self.settings = LoopSettings(
            system=cfg.system,
            optimizer=cfg.optimizer,
            lr_scheduler=cfg.lr_scheduler,
            objective=cfg.objective,
            num_examples_to_see=e.num_examples_to_see,
            milestone=milestone,
            milestones=list(e.milestones),
            save_every=e.save_every,
            log_every=e.log_every,
            max_nonfinite=e.max_nonfinite,
            max_rollbacks=e.max_rollbacks,
            keep_checkpoints=e.keep_checkpoints if e.save_only_most_recent else None,
            requeue=e.requeue,
            workers=params.workers,
            prefetch=params.prefetch,
            max_lost=params.max_lost,
            seed=e.seed,
            threads=cfg.system.threads,
            timeout_minutes=cfg.distributed.timeout_minutes,
        )

    def identify(self, global_batch: int) -> identity.Identity:
        """Return the identity of the stage's training."""
        return identity.identify(self.cfg, global_batch)

    def claim(self, own: identity.Identity, world_size: int) -> None:
        """Mark the folder as this training's."""
        identity.claim(own, anew=not self.settings.requeue)

    def build(self, here: distributed.World, device: torch.device, global_batch: int) -> None:
        """Open the dataset, read the captions of the sample grid, build the network."""
        cfg, self.here = self.cfg, here
        self.dataset = open_dataset(cfg.dataset, cfg.experiment.seed)
        self.dataset.require_complete(cfg.dataset.params.max_lost)
        self.samples = {"samples": self.dataset.source.kept, "dropped": self.dataset.dropped}
        self.captions = read_captions(cfg.experiment) if cfg.experiment.eval_caption_file else []
        self.net = net = build(cfg, here.size, device, global_batch)
        self.module, self.model, self.ema, self.kernel, self.flops = net.unet, net.model, net.ema, net.kernel, net.flops
        self.peak = peak_flops(device, cfg.model.mixed_precision == "bf16", cfg.system.peak_tflops)

    def state(self) -> dict[str, Any]:
        """Return the weights and their average."""
        return {"unet": trainable(self.module), **({"ema": self.ema.weights} if self.ema else {})}

    def find_micro_batch(self, images: int) -> int:
        """Return the largest micro-batch that fits the GPU."""
        online = self.cfg.dataset.type != "LatentDataset"
        return find_micro_batch(self.net, images, self.cfg.dataset.params.resolution if online else None)

    def dummy_pass(self, micro_batch: int) -> None:
        """Run a forward and backward pass; its gradients are discarded."""
        trial_pass(self.net, self.model, micro_batch)

    def start_wandb(self, own: identity.Identity) -> Any:
        """Return the wandb run of the stage, or None."""
        return start_wandb(self.cfg, own.folder, own.run_id)

    def loss(self, batch: dict, draws: objective.Draws, losses: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a micro-batch; losses are summed for each quartile of time."""
        each = batch_losses(self.net, batch, draws, self.dataset, self.settings.objective)
        quartile = (draws.time * QUARTILES).long().to(each.device)
        losses.index_add_(0, quartile, each.detach().double())
        images.index_add_(0, quartile, torch.ones_like(each, dtype=torch.float64))
        return each.mean()

    def log_values(self, mean: float, each: list[float]) -> dict[str, float]:
        """Return the mean loss, and that of each quartile of time."""
        return {"loss": mean, **{f"loss_{name}": value for name, value in zip(self.losses, each, strict=True)}}

    def after_save(self, telemetry: Telemetry, images: int) -> None:
        """Draw the captions of `experiment.eval_caption_file`."""
        if self.captions:
            picture = self.folder / "samples" / f"{images}.png"
            resolution = self.cfg.dataset.params.resolution
            draw_grid(self.net, self.captions, resolution, self.cfg.experiment, self.here, picture)
            telemetry.log_image(images, picture)

    def export(self, facts: dict[str, Any]) -> object:
        """Export the pipeline of the milestone and write its record."""
        pipeline = export(self.net, self.result / "pipeline", self.here.is_main)
        if self.here.is_main:
            replace_link(self.folder / "pipeline", pipeline)
            paths = {"pipeline": str(pipeline), "log": str(self.folder / "log.jsonl")}
            resolution = self.cfg.dataset.params.resolution
            write_json(self.record, {**facts, **paths, "resolution": resolution, **self.samples})
        return pipeline


# ---------------------------------------------------------------- the network
@dataclass
class Network:
    """A latent diffusion model in training: `unet` holds the weights; `model` is called: the UNet, or DDP around it."""

    parts: Parts
    unet: nn.Module
    model: nn.Module
    ema: Ema | None
    process: objective.Process
    encode_text: TextEncoding
    empty_text: torch.Tensor  # states of the empty caption, 1 x tokens x width
    latents_shape: tuple[int, int, int]
    device: torch.device
    autocast: contextlib.AbstractContextManager
    kernel: contextlib.AbstractContextManager  # of attention
    layout: torch.memory_format
    lora: bool
    flops: int  # of a forward and backward, an image


def build(cfg, world_size: int, device: torch.device, global_batch: int) -> Network:
    """Return the network of a stage on all ranks, with the weights of `init` if there is one, and its average."""
    parts = load_parts(cfg.model).to(device)
    unet, bf16 = parts.unet, cfg.model.mixed_precision == "bf16"
    side = check_resolution(parts, cfg.dataset.params.resolution)
    process = objective.process_of(parts.scheduler).to(device)
    objective.loss_weights(process, process.timesteps(torch.rand(1)), cfg.objective)  # raises early for wrong ones
    if cfg.init:
        load_weights(unet, cfg.init, "init", cfg.init_weights)
    if cfg.model.lora.rank is not None:
        if cfg.distributed.strategy == "fsdp":
            raise ModelError("model.lora: additions are few weights, not to be sharded; set distributed.strategy=ddp")
        lora.add(unet, cfg.model.lora)
    encode_text = TextEncoding(parts.tokenizer, parts.text_encoder, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with autocast:  # as in training, which keeps the cast weights in the autocast cache
        empty_text = encode_text([""])
    latents_shape = (unet.config.in_channels, side, side)
    flops = training_flops(unet, latents_shape, (empty_text.shape[1], empty_text.shape[2]))
    average = _initial_average(cfg, unet)
    _set_computation(cfg, unet, parts.vae, device, torch.bfloat16 if bf16 else torch.float32)
    model = parallel.spread(unet, cfg.distributed.strategy, world_size, device, bf16)
    ema = Ema(unet, decay_of(cfg.model.ema, global_batch), cfg.model.ema.warmup) if cfg.model.use_ema else None
    if ema and average:
        ema.load(average)
    return Network(
        parts=parts,
        unet=unet,
        model=model,
        ema=ema,
        process=process,
        encode_text=encode_text,
        empty_text=empty_text,
        latents_shape=latents_shape,
        device=device,
        autocast=autocast,
        kernel=attention_kernel(cfg.model.attention),
        layout=torch.channels_last if cfg.system.channels_last else torch.contiguous_format,
        lora=cfg.model.lora.rank is not None,
        flops=flops,
    )


def _initial_average(cfg, unet: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the weights that the moving average starts from, or None for the UNet's own."""
    if not (cfg.model.use_ema and cfg.model.ema.path):
        return None
    start = copy.deepcopy(unet)
    load_weights(start, cfg.model.ema.path, "model.ema.path")
    return dict(start.named_parameters())


def _set_computation(cfg: Any, unet: Any, vae: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Set attention, gradient checkpointing, memory format and compilation of the UNet. Its weights do not change."""
    set_attention(unet, cfg.model.xformers, cfg.model.attention, device, dtype)
    if cfg.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if cfg.system.channels_last:
        vae.to(memory_format=torch.channels_last)
        if cfg.distributed.strategy == "ddp":  # sharded weights must stay contiguous
            unet.to(memory_format=torch.channels_last)
    parallel.compile_model(unet, cfg.model.compile)
    unet.train()


# ---------------------------------------------------------------- a batch
def batch_losses(net: Network, batch: dict, draws: objective.Draws, dataset, settings) -> torch.Tensor:
    """Return the losses float32 N of the images of a micro-batch; `settings` is an `objective` section."""
    with torch.no_grad(), net.autocast:
        text = _text_states(net, batch, draws.drop, dataset)
        if "latents" in batch:
            clean = batch["latents"].to(net.device, non_blocking=True)
            (noise,) = objective.normals(draws, 1, clean.shape[1:], net.device, settings.offset_noise)
        else:
            pixels = batch["pixels"].to(net.device, non_blocking=True, memory_format=net.layout)
            noise, own_noise = objective.normals(draws, 2, net.latents_shape, net.device, settings.offset_noise)
            clean = encode_images(net.parts.vae, pixels, own_noise)
        t = net.process.timesteps(draws.time).to(net.device)
        noisy = objective.add_noise(net.process, clean, noise, t).to(memory_format=net.layout)
        target = objective.target(net.process, clean, noise, t)
        weights = objective.loss_weights(net.process, t, settings)
    with net.autocast, net.kernel:
        output = net.model(noisy, t, encoder_hidden_states=text).sample
        return objective.loss(output, target, weights)


def _text_states(net: Network, batch: dict, drop: torch.Tensor, dataset) -> torch.Tensor:
    """Return the states of the captions, N x tokens x width; of the empty caption where `drop`, bool N, is true."""
    if "text" in batch:
        cached = batch["text"].to(net.device, non_blocking=True)
        return torch.where(drop.to(net.device)[:, None, None], dataset.empty_text.to(net.device), cached)
    return net.encode_text(["" if d else c for c, d in zip(batch["caption"], drop.tolist(), strict=True)])


def find_micro_batch(net: Network, share: int, pixels: int | None) -> int:
    """Return the largest divisor of `share`, a rank's images per step, that fits the GPU of every rank.

    `pixels` is the side of the images that are encoded first, or None for cached latents.
    """

    def attempt(count: int) -> None:
        try:
            # not through DDP, which would wait for other ranks whose pass ran out of memory
            trial_pass(net, net.unet, count)
            if pixels:
                with net.autocast:
                    encode_moments(net.parts.vae, torch.zeros(count, 3, pixels, pixels, device=net.device))
        finally:
            net.unet.zero_grad(set_to_none=True)

    return parallel.largest_that_fits(share, attempt, net.device)


def trial_pass(net: Network, model: nn.Module, count: int) -> None:
    """Run a dummy forward and backward pass of `count` latents, through the UNet itself or the module around it."""
    with net.autocast, net.kernel:
        latents = torch.zeros(count, *net.latents_shape, device=net.device).to(memory_format=net.layout)
        text, times = net.empty_text.expand(count, -1, -1), torch.zeros(count, device=net.device)
        model(latents, times, encoder_hidden_states=text).sample.square().mean().backward()


# ---------------------------------------------------------------- samples and export
def read_captions(experiment: Any) -> list[str]:
    """Return the first `num_eval_images` captions of `eval_caption_file`. Raise ConfigError if there are none."""
    path = Path(experiment.eval_caption_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"experiment.eval_caption_file: {error}") from None
    if path.suffix == ".csv":
        lines = [row.get("caption") or "" for row in csv.DictReader(lines)]
    captions = [line.strip() for line in lines if line.strip()][: experiment.num_eval_images]
    if not captions:
        raise ConfigError(
            f"experiment.eval_caption_file: {path}: no caption; write one a line, or a CSV with a caption column"
        )
    return captions


def draw_grid(
    net: Network, captions: list[str], resolution: int, experiment, here: distributed.World, path: Path
) -> None:
    """Draw captions with the averaged weights, if any. Each rank draws a part; all call this, as FSDP needs."""
    share = math.ceil(len(captions) / here.size)
    first = here.rank * share
    mine = [captions[min(i, len(captions) - 1)] for i in range(first, first + share)]
    options = {"guidance_scale": experiment.eval_guidance_scale, "steps": experiment.eval_steps}
    options |= {"seed": experiment.seed + first, "batch_size": min(16, share)}
    net.unet.eval()
    with net.ema.applied(net.unet) if net.ema else contextlib.nullcontext(), net.autocast:
        pipe = pipeline_of(net.parts, net.unet)
        drawn = distributed.gather_objects([np.asarray(image) for image in generate(pipe, mine, resolution, **options)])
    net.unet.train()
    if drawn:
        whole = [Image.fromarray(image) for part in drawn for image in part][: len(captions)]
        with atomic_path(path) as temporary:
            grid(whole).save(temporary, "PNG")


def export(net: Network, folder: Path, main: bool) -> Path:
    """Write the pipeline of the averaged weights, if any, with the raw ones as unet_raw. All ranks call this.

    LoRA weights are merged into its UNet, and written to its folder lora as well.
    """
    unet: Any
    extra: dict[str, Callable[[Path], object]]
    raw = parallel.plain_unet(net.unet, main) if net.ema and not net.lora else None
    with net.ema.applied(net.unet) if net.ema else contextlib.nullcontext():
        if net.lora:
            unet, extra = lora.merged(net.unet), {"lora": lambda path: lora.export(net.unet, path)}
        else:
            unet, extra = parallel.plain_unet(net.unet, main), {"unet_raw": raw.save_pretrained} if raw else {}
        return export_pipeline(folder, net.parts, unet, extra) if main else folder
