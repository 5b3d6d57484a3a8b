"""The task of training a KL autoencoder, and its export as a component."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.fingerprint import decisive_keys, record_fingerprint
from sdtrain.config.schema_data import AutoencoderConfig
from sdtrain.data.datasets import ImageDataset
from sdtrain.data.manifest import read_manifest
from sdtrain.errors import ConfigError, DataError
from sdtrain.io.files import atomic_folder, atomic_path, write_json
from sdtrain.models import autoencoder, feature_networks
from sdtrain.models.pipeline import grid
from sdtrain.training import objective, parallel
from sdtrain.training.ema import Ema, trainable
from sdtrain.training.identity import Identity
from sdtrain.training.task import LoopSettings, Task
from sdtrain.training.telemetry import Telemetry

STATISTICS_IMAGES = 512  # images from which mean and standard deviation of the latents are measured
MEASURED_IMAGES = 256  # held-out images on which the exported component is measured
SAVE_IMAGES = 32  # held-out images that are measured at every save
PAIRS = 16  # images of a picture in samples/
CHUNK = 16  # images per forward pass without a gradient
REMEDIES = "set batch_size so that it is {} again", "delete that folder"  # see Identity


class AutoencoderTask(Task):
    """Train an autoencoder on crops at one to two times the resolution, so that its latents serve both stages."""

    def __init__(self, settings: DictConfig, train: str, held_out: str, output: Path):
        """`train` and `held_out` are manifests of images, `output` the record of the component."""
        check(settings)
        self.config, self.train, self.held_out = settings, train, held_out
        self.record, self.label = output, output.stem
        self.folder = output.parent / "training" / output.stem  # not in the component, which is replaced whole
        self.losses = [name for name in autoencoder.TERMS if settings.loss[name]]
        self.settings = LoopSettings(
            experiment=settings,
            loader=settings,
            system=schema.SystemConfig(batch_size=settings.batch_size, threads=settings.threads),
            optimizer=settings.optimizer,
            lr_scheduler=settings.lr_scheduler,
            milestone=settings.num_examples_to_see,
            timeout_minutes=settings.distributed.timeout_minutes,
        )
        plain: Any = OmegaConf.to_container(settings, resolve=True)
        self.plain = plain
        # The run's key, entity and server are those of the environment
        wandb = {"api_key": None, "entity": None, "mode": settings.wandb_mode}
        experiment = {"project": "components", "name": self.label}
        self.reported = OmegaConf.create({**plain, "wandb": wandb, "experiment": experiment})

    # ------------------------------------------------------------ identity
    def identify(self, global_batch: int) -> Identity:
        """Return the identity of the training. Data and the perceptual network count by their records."""
        decisive = {**decisive_keys(self.config, AutoencoderConfig), "system": {"global_batch": global_batch}}
        sources = {"dataset": read_manifest(self.train)["fingerprint"]}
        if self.config.loss.perceptual:
            sources["network"] = record_fingerprint(f"{self.config.loss.perceptual_network}.json")
        world_size = global_batch // self.config.batch_size
        return Identity(self.folder, sources, decisive, frozen=True, world_size=world_size, remedies=REMEDIES)

    # ------------------------------------------------------------ network and losses
    def build(self, here: distributed.World, device: torch.device, global_batch: int) -> None:
        """Open the images, build the autoencoder on all ranks, and its moving average."""
        settings, resolution, seed = self.config, self.config.resolution, self.config.seed
        self.here, self.device = here, device
        self.dataset = ImageDataset(self.train, resolution, crop="random", flip=True, zoom=(1.0, 2.0), seed=seed)
        sides = (resolution, 2 * resolution)
        self.measured = {side: ImageDataset(self.held_out, side, seed=seed) for side in sides}
        params: Any = OmegaConf.to_container(settings.params)
        vae = autoencoder.build(params, resolution)
        vae.to(device, memory_format=torch.channels_last)
        self.noise_shape = (vae.config.latent_channels, *[autoencoder.latent_side(vae, resolution)] * 2)
        network = settings.loss.perceptual_network if settings.loss.perceptual else None
        self.distance = feature_networks.perceptual_distance(network, device) if network else None
        self.module = self.vae = vae
        self.model = parallel.spread(autoencoder.Reconstruction(vae), "ddp", here.size, device)
        self.ema: Ema = Ema(vae, settings.ema_decay)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16")
        self.best = {f"psnr_{side}px": torch.tensor(-math.inf, dtype=torch.float64) for side in sides}

    def state(self) -> dict[str, Any]:
        """Return weights, average and the best quality so far."""
        return {"vae": trainable(self.vae), "ema": self.ema.weights, "best": self.best}

    def start_anew(self) -> None:
        """Delete the pictures of another training."""
        if self.here.is_main:
            shutil.rmtree(self.folder / "samples", ignore_errors=True)

    def dummy_pass(self, micro_batch: int) -> None:
        """Run a forward and backward pass; its gradients are discarded."""
        resolution = self.config.resolution
        blank = torch.zeros(micro_batch, 3, resolution, resolution), torch.zeros(micro_batch, *self.noise_shape)
        self.model(*[tensor.to(self.device) for tensor in blank])[0].mean().backward()

    def loss(self, batch: dict, draws: objective.Draws, losses: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return the sum of the terms of the loss of a micro-batch."""
        pixels = batch["pixels"].to(self.device, non_blocking=True, memory_format=torch.channels_last)
        (noise,) = objective.normals(draws, 1, self.noise_shape, self.device)
        with self.autocast:
            output, mean, logvar = self.model(pixels, noise)
        terms = autoencoder.loss_terms(output, pixels, mean, logvar, self.config.loss, self.distance)
        each = torch.stack(list(terms.values()))
        losses += each.detach().double() * len(pixels)
        images += len(pixels)
        return each.sum()

    def log_values(self, mean: float, each: list[float]) -> dict[str, float]:
        """Return the loss, the sum of its terms, and the terms."""
        return super().log_values(sum(each), each)

    # ------------------------------------------------------------ quality
    def before_save(self, telemetry: Telemetry, images: int, position: int) -> None:
        """Measure held-out images and draw them, before the checkpoint, which holds the best quality so far."""
        picture = self.folder / "samples" / f"{images}.png"
        with self.ema.applied(self.vae):
            quality = self.measure(self.vae, SAVE_IMAGES)
            if self.here.is_main:
                draw_pairs(self.vae, self.measured[self.config.resolution], self.device, picture)
        for name, value in quality.items():
            self.best[name].clamp_(min=value)
        quality |= {f"best_{name}": value.item() for name, value in self.best.items()}
        telemetry.note(images, "held-out images", position, **quality)
        telemetry.log_image(images, picture)

    @torch.no_grad()
    def measure(self, vae: Any, limit: int) -> dict[str, float]:
        """Return the mean PSNR, dB, of the reconstructions of the first `limit` held-out images, for each side.

        The ranks divide the images. Raise DataError if none of them can be read.
        """
        found = {}
        for side, dataset in self.measured.items():
            sums = torch.zeros(2, dtype=torch.float64, device=self.device)
            positions = range(self.here.rank, min(limit, len(dataset)), self.here.size)
            for images in chunks(dataset, positions, self.device):
                values = autoencoder.psnr(autoencoder.reconstruct(vae, images), images)
                sums += torch.stack([values.double().sum(), torch.tensor(len(values), device=self.device)])
            total, count = distributed.all_reduce_sum(sums).tolist()
            if not count:
                raise DataError("held_out: none of its first images can be read; rebuild its shards")
            found[f"psnr_{side}px"] = round(total / count, 2)
        return found

    def export(self, facts: dict[str, Any]) -> object:
        """Export the averaged weights in half precision. What is measured is what is exported."""
        with self.ema.applied(self.vae):
            shipped = copy.deepcopy(self.vae).eval().to(memory_format=torch.contiguous_format)
        dataset = ImageDataset(self.train, 2 * self.config.resolution, seed=self.config.seed)
        normalise(shipped, dataset, self.device)
        quality = self.measure(shipped.half().float(), MEASURED_IMAGES)
        if self.here.is_main:
            record = {"source": "train", **facts, "held_out": quality, "config": self.plain}
            export_component(shipped.half(), record, self.folder, self.record)
        return quality


# ---------------------------------------------------------------- settings
def check(settings: DictConfig) -> None:
    """Raise ConfigError or DistError for losses that cannot be computed and for sharding."""
    weights = {name: settings.loss[name] for name in autoencoder.TERMS}
    if not any(weight for name, weight in weights.items() if name != "kl"):
        raise ConfigError(f"loss: {weights}: one besides kl must be above 0, such as loss.l1=1")
    if weights["perceptual"] and not settings.loss.perceptual_network:
        remedy = "name the folder of an image network, such as resources/components/efficientnet-lite0"
        raise ConfigError(f"loss.perceptual_network: loss.perceptual needs one: {remedy}")
    if settings.distributed.strategy != "ddp":
        raise distributed.DistError("distributed.strategy: an autoencoder is not sharded; set it to ddp")


# ---------------------------------------------------------------- images and export
def chunks(dataset: ImageDataset, positions: range, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the pixels N x 3 x H x W of the readable images at these positions of the stream."""
    for start in range(0, len(positions), CHUNK):
        items = [dataset[position] for position in positions[start : start + CHUNK]]
        if pixels := [item["pixels"] for item in items if "error" not in item]:
            yield torch.stack(pixels).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def draw_pairs(vae: Any, dataset: ImageDataset, device: torch.device, path: Path) -> None:
    """Write a picture of the first images of a dataset, each beside its reconstruction."""
    images = next(chunks(dataset, range(PAIRS), device))
    pairs = torch.stack([images, autoencoder.reconstruct(vae, images)], 1).flatten(0, 1)
    levels = ((pairs + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with atomic_path(path) as temporary:
        grid([Image.fromarray(image) for image in levels], columns=8).save(temporary, "PNG")


@torch.no_grad()
def normalise(vae: Any, dataset: ImageDataset, device: torch.device) -> None:
    """Change `vae` so that the latents of the first images of a dataset have zero mean and unit variance."""
    first = range(min(STATISTICS_IMAGES, len(dataset)))
    means = [vae.encode(images).latent_dist.mode() for images in chunks(dataset, first, device)]
    autoencoder.fold_normalisation(vae, *autoencoder.latent_statistics(torch.cat(means)))


def export_component(vae: Any, facts: dict, folder: Path, output: Path) -> None:
    """Write the component atomically, with its log and samples, and its record last."""
    with atomic_folder(output.with_suffix("")) as temporary:
        vae.save_pretrained(temporary, safe_serialization=True)
        shutil.copytree(folder / "samples", temporary / "samples")
        shutil.copyfile(folder / "log.jsonl", temporary / "log.jsonl")
        write_json(temporary / "training.json", facts)
        output.unlink(missing_ok=True)  # an older record must not describe the new folder
    write_json(output, facts)
