"""The task of training a latent diffusion model: the network, the losses of a batch, sample grids, the pipeline."""

from __future__ import annotations

import contextlib
import copy
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from sdtrain import distributed
from sdtrain.config.fingerprint import decisive_keys
from sdtrain.data.datasets import open_dataset
from sdtrain.errors import ConfigError
from sdtrain.io.files import atomic_path, replace_link, write_json
from sdtrain.models import lora
from sdtrain.models.attention import attention_kernel, set_attention
from sdtrain.models.parts import (
    ModelError,
    TextEncoding,
    check_resolution,
    encode_moments,
    load_parts,
    load_weights,
)
from sdtrain.models.pipeline import export_pipeline, generate, grid, pipeline_of
from sdtrain.training import identity, objective, parallel
from sdtrain.training.ema import Ema, decay_of, trainable
from sdtrain.training.task import LoopSettings, Task
from sdtrain.training.telemetry import Telemetry, peak_flops, training_flops

QUARTILES = 4  # of time, from little noise to much: losses are logged for each


class DiffusionTask(Task):
    """Train the UNet of a stage, on images or on cached latents."""

    def __init__(self, cfg: DictConfig):
        e, params = cfg.experiment, cfg.dataset.params
        self.cfg = self.reported = cfg
        self.label = f"{e.project}/{e.name}"
        self.losses = [f"q{i + 1}" for i in range(QUARTILES)]
        milestone = e.num_examples_to_see if e.stop_at is None else e.stop_at
        self.folder = identity.run_folder(cfg)
        self.result = self.folder / str(milestone)
        self.record = self.result / "train.json"
        self.settings = LoopSettings(
            experiment=e,
            loader=params,
            system=cfg.system,
            optimizer=cfg.optimizer,
            lr_scheduler=cfg.lr_scheduler,
            milestone=milestone,
            timeout_minutes=cfg.distributed.timeout_minutes,
            objective=cfg.objective,
            milestones=e.milestones,
            keep_checkpoints=e.keep_checkpoints if e.save_only_most_recent else None,
            requeue=e.requeue,
            max_lost=params.max_lost,
        )

    def identify(self, global_batch: int) -> identity.Identity:
        """Return the identity of the stage's training. Raise ModelError for latents that other networks made."""
        sources = identity.source_fingerprints(self.cfg)
        identity.check_latents(self.cfg, sources)
        decisive = {**decisive_keys(self.cfg), "system": {"global_batch": global_batch}}
        return identity.Identity(self.folder, sources, decisive, bool(self.cfg.frozen))

    # ------------------------------------------------------------ network
    def build(self, here: distributed.World, device: torch.device, global_batch: int) -> None:
        """Open the dataset, read the captions of the sample grid, build the network on all ranks."""
        cfg, self.here, self.device = self.cfg, here, device
        self.dataset = open_dataset(cfg.dataset, cfg.experiment.seed)
        self.dataset.require_complete(cfg.dataset.params.max_lost)
        self.captions = read_captions(cfg.experiment) if cfg.experiment.eval_caption_file else []
        self.bf16 = cfg.model.mixed_precision == "bf16"
        self.peak = peak_flops(device, self.bf16, cfg.system.peak_tflops)
        self._load_network()
        self._spread_network(global_batch)

    def _load_network(self) -> None:
        """Load the components, with the weights of `init` and low-rank additions if there are any."""
        cfg = self.cfg
        self.parts = load_parts(cfg.model).to(self.device)
        self.module = unet = self.parts.unet
        side = check_resolution(self.parts, cfg.dataset.params.resolution)
        self.process = objective.process_of(self.parts.scheduler).to(self.device)
        trial = self.process.timesteps(torch.rand(1))
        objective.loss_weights(self.process, trial, cfg.objective)  # raises early for wrong ones
        if cfg.init:
            load_weights(unet, cfg.init, "init", cfg.init_weights)
        if cfg.model.lora.rank is not None:
            if cfg.distributed.strategy == "fsdp":
                raise ModelError("model.lora: low-rank additions are not sharded; set distributed.strategy=ddp")
            lora.add(unet, cfg.model.lora)
        self.encode_text = TextEncoding(self.parts.tokenizer, self.parts.text_encoder, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        with self.autocast:  # as in training, which keeps the cast weights in the autocast cache
            self.empty_text = self.encode_text([""])  # 1 x tokens x width
        self.latents_shape = (unet.config.in_channels, side, side)
        if self.peak:  # else no MFU is logged
            self.flops = training_flops(unet, self.latents_shape, (self.empty_text.shape[1], self.empty_text.shape[2]))

    def _spread_network(self, global_batch: int) -> None:
        """Set attention, gradient checkpointing, memory format and compilation; spread the UNet; start its average."""
        cfg, unet = self.cfg, self.parts.unet
        average = None
        if cfg.model.use_ema and cfg.model.ema.path:
            start = copy.deepcopy(unet)
            load_weights(start, cfg.model.ema.path, "model.ema.path")
            average = dict(start.named_parameters())
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        set_attention(unet, cfg.model.xformers, cfg.model.attention, self.device, dtype)
        self.kernel = attention_kernel(cfg.model.attention)
        if cfg.model.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.layout = torch.channels_last if cfg.system.channels_last else torch.contiguous_format
        if cfg.system.channels_last:
            self.parts.vae.to(memory_format=torch.channels_last)
            if cfg.distributed.strategy == "ddp":  # sharded weights must stay contiguous
                unet.to(memory_format=torch.channels_last)
        parallel.compile_model(unet, cfg.model.compile)
        unet.train()
        self.model = parallel.spread(unet, cfg.distributed.strategy, self.here.size, self.device, self.bf16)
        ema = cfg.model.ema
        self.ema = Ema(unet, decay_of(ema, global_batch), ema.warmup) if cfg.model.use_ema else None
        if self.ema and average:
            self.ema.load(average)

    def state(self) -> dict[str, Any]:
        """Return the weights and their average."""
        return {"unet": trainable(self.module), **({"ema": self.ema.weights} if self.ema else {})}

    def averaged(self) -> contextlib.AbstractContextManager:
        """Return a context in which the UNet has the averaged weights, if there are any."""
        return self.ema.applied(self.module) if self.ema else contextlib.nullcontext()

    def find_micro_batch(self, images: int) -> int:
        """Return the largest divisor of `images`, a rank's images per step, that fits the GPU of every rank."""

        def attempt(count: int) -> None:
            try:
                # not through DDP, which would wait for other ranks whose pass ran out of memory
                self.dummy_pass(count, self.module)
                if self.cfg.dataset.type != "LatentDataset":  # images are encoded first
                    side = self.cfg.dataset.params.resolution
                    with self.autocast:
                        encode_moments(self.parts.vae, torch.zeros(count, 3, side, side, device=self.device))
            finally:
                self.module.zero_grad(set_to_none=True)

        return parallel.largest_that_fits(images, attempt, self.device)

    def dummy_pass(self, micro_batch: int, model: nn.Module | None = None) -> None:
        """Run a forward and backward pass, through `self.model` or the one given; its gradients are discarded."""
        with self.autocast, self.kernel():
            latents = torch.zeros(micro_batch, *self.latents_shape, device=self.device).to(memory_format=self.layout)
            text, times = self.empty_text.expand(micro_batch, -1, -1), torch.zeros(micro_batch, device=self.device)
            network = self.model if model is None else model
            network(latents, times, encoder_hidden_states=text).sample.square().mean().backward()

    # ------------------------------------------------------------ a batch
    def loss(self, batch: dict, draws: objective.Draws, losses: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a micro-batch; losses are summed for each quartile of time."""
        each = self.batch_losses(batch, draws)
        quartile = (draws.time * QUARTILES).long().to(each.device)
        losses.index_add_(0, quartile, each.detach().double())
        images.index_add_(0, quartile, torch.ones_like(each, dtype=torch.float64))
        return each.mean()

    def batch_losses(self, batch: dict, draws: objective.Draws) -> torch.Tensor:
        """Return the losses float32 N of the images of a micro-batch."""
        settings, process, device = self.settings.objective, self.process, self.device
        with torch.no_grad(), self.autocast:
            text = self._text_states(batch, draws.drop)
            if "latents" in batch:
                clean = batch["latents"].to(device, non_blocking=True)
                (noise,) = objective.normals(draws, 1, clean.shape[1:], device, settings.offset_noise)
            else:
                pixels = batch["pixels"].to(device, non_blocking=True, memory_format=self.layout)
                noise, own_noise = objective.normals(draws, 2, self.latents_shape, device, settings.offset_noise)
                mean, deviation = encode_moments(self.parts.vae, pixels)
                clean = mean + deviation * own_noise
            t = process.timesteps(draws.time).to(device)
            noisy = objective.add_noise(process, clean, noise, t).to(memory_format=self.layout)
            target = objective.target(process, clean, noise, t)
            weights = objective.loss_weights(process, t, settings)
        with self.autocast, self.kernel():
            output = self.model(noisy, t, encoder_hidden_states=text).sample
            return objective.loss(output, target, weights)

    def _text_states(self, batch: dict, drop: torch.Tensor) -> torch.Tensor:
        """Return the states of the captions, N x tokens x width; of the empty caption where `drop`, bool N, is true."""
        if "text" in batch:
            cached = batch["text"].to(self.device, non_blocking=True)
            return torch.where(drop.to(self.device)[:, None, None], self.dataset.empty_text.to(self.device), cached)
        return self.encode_text(["" if d else c for c, d in zip(batch["caption"], drop.tolist(), strict=True)])

    # ------------------------------------------------------------ samples and export
    def after_save(self, telemetry: Telemetry, images: int) -> None:
        """Draw the captions of `experiment.eval_caption_file` with the averaged weights, if any.

        Each rank draws a part; all call this, as FSDP needs.
        """
        experiment, captions = self.cfg.experiment, self.captions
        if not captions:
            return
        share = math.ceil(len(captions) / self.here.size)
        first = self.here.rank * share
        mine = [captions[min(i, len(captions) - 1)] for i in range(first, first + share)]
        options = {"guidance_scale": experiment.eval_guidance_scale, "steps": experiment.eval_steps}
        options |= {"seed": experiment.seed + first, "batch_size": min(16, share)}
        self.module.eval()
        with self.averaged(), self.autocast:
            pipe = pipeline_of(self.parts, self.module)
            drawn = generate(pipe, mine, self.cfg.dataset.params.resolution, **options)
            gathered = distributed.gather_objects([np.asarray(image) for image in drawn])
        self.module.train()
        picture = self.folder / "samples" / f"{images}.png"
        if gathered:
            whole = [Image.fromarray(image) for part in gathered for image in part][: len(captions)]
            with atomic_path(picture) as temporary:
                grid(whole).save(temporary, "PNG")
        telemetry.log_image(images, picture)

    def export(self, facts: dict[str, Any]) -> object:
        """Write the pipeline of the averaged weights, if any, with the raw ones as unet_raw, and the record.

        LoRA weights are merged into its UNet, and written to its folder lora as well.
        """
        unet: Any
        extra: dict[str, Callable[[Path], object]]
        main, pipeline, has_lora = self.here.is_main, self.result / "pipeline", self.cfg.model.lora.rank is not None
        raw = parallel.plain_unet(self.module, main) if self.ema and not has_lora else None
        with self.averaged():
            if has_lora:
                unet, extra = lora.merged(self.module), {"lora": lambda path: lora.export(self.module, path)}
            else:
                unet, extra = parallel.plain_unet(self.module, main), {"unet_raw": raw.save_pretrained} if raw else {}
            if main:
                export_pipeline(pipeline, self.parts, unet, extra)
        if main:
            replace_link(self.folder / "pipeline", pipeline)
            paths = {"pipeline": str(pipeline), "log": str(self.folder / "log.jsonl")}
            resolution = self.cfg.dataset.params.resolution
            samples = {"samples": self.dataset.source.kept, "dropped": self.dataset.dropped}
            write_json(self.record, {**facts, **paths, "resolution": resolution, **samples})
        return pipeline


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
