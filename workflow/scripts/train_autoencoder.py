"""Train a KL autoencoder and export it as a component: the folder beside `output`, and `output`, its record, last.

On several processes:  torchrun --nproc_per_node N workflow/scripts/train_autoencoder.py config=… train=… …
The same command goes on from the last checkpoint. Beside the component, training/{name} holds checkpoints/, log.jsonl
and samples/, pairs of a held-out image and what comes back of it. SIGTERM, SIGUSR1 and Ctrl-C save at the next step and
end with exit code 75; the file `requeue` there then asks to be started again.
"""

import contextlib
import copy
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import SafetensorError

from sdtrain import distributed
from sdtrain.config import schema, schema_data
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest, differences, record_fingerprint, versions
from sdtrain.data.datasets import ImageDataset
from sdtrain.data.manifest import read_manifest
from sdtrain.data.sources import DataError
from sdtrain.data.stream import batches, prefetched
from sdtrain.data.tars import ShardError
from sdtrain.errors import ConfigError
from sdtrain.io.files import read_json, replace_folder, write_json
from sdtrain.io.storage import StorageError
from sdtrain.models import autoencoder, feature_networks
from sdtrain.models.parts import ModelError
from sdtrain.models.pipeline import grid
from sdtrain.training import checkpoint, identity, objective, parallel
from sdtrain.training.ema import Ema, trainable
from sdtrain.training.optimizer import adamw, learning_rate, state_by_name
from sdtrain.training.progress import Progress
from sdtrain.training.telemetry import Telemetry, TelemetryError, start_wandb

STATISTICS_IMAGES = 512  # images that the latents' mean and standard deviation are measured on
MEASURED_IMAGES = 256  # held-out images that the exported component is measured on
GLIMPSE = 32  # and those at every save
PAIRS = 16  # of the pictures in samples/
CHUNK = 16  # images at once, where there is no gradient
NEUTRAL = (  # keys that do not decide the weights, or that count by a record, or by the global batch
    *("data", "batch_size", "save_every", "log_every", "max_nonfinite", "max_rollbacks", "wait_minutes"),
    *("workers", "prefetch", "threads", "wandb_mode", "distributed"),
)
EXPECTED = (
    *(ConfigError, ModelError, feature_networks.FeatureError, DataError),
    *(ShardError, StorageError, checkpoint.CheckpointError, TelemetryError, OSError, SafetensorError),
)


def train(settings, sides: dict[str, str], output: Path, here: distributed.World, device: torch.device, stop) -> bool:
    """Train from the last checkpoint to the end, and export. Returns False where a signal came before.

    `sides` are the manifests of images, train and held_out.
    """
    check(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    # Sizes: steps count optimizer steps, images count what all ranks have seen
    resolution, share = settings.resolution, settings.batch_size
    global_batch = share * here.size
    steps = math.ceil(settings.num_examples_to_see / global_batch)

    # Folder: checkpoints are keyed by all that decides the weights
    distributed.barrier()  # the main rank may have waited for another trainer's end
    own = identify(settings, sides["train"], global_batch, training_folder(output))
    if distributed.from_main(record_fingerprint(output) == own.key):
        if here.main:
            print(f"{output}: finished already", flush=True)
        return True
    if here.main:
        claim(own, here.size)

    # Data: crops at one to two times the resolution, so that the latents serve a stage and the next one
    zoomed = {"crop": "random", "flip": True, "zoom": (1.0, 2.0)}
    dataset = ImageDataset(sides["train"], resolution, **zoomed, seed=settings.seed)
    held_out = {s: ImageDataset(sides["held_out"], s, seed=settings.seed) for s in (resolution, 2 * resolution)}

    # Network, optimizer, average
    vae = autoencoder.build(OmegaConf.to_container(settings.params), resolution)
    vae.to(device, memory_format=torch.channels_last)
    noise_shape = (vae.config.latent_channels, *[autoencoder.latent_side(vae, resolution)] * 2)
    network = settings.loss.perceptual_network if settings.loss.perceptual else None
    distance = feature_networks.perceptual_distance(network, device) if network else None
    model = parallel.spread(autoencoder.Reconstruction(vae), "ddp", here.size, device)
    blank = torch.zeros(share, 3, resolution, resolution), torch.zeros(share, *noise_shape)
    parallel.settle(model, lambda: model(*[tensor.to(device) for tensor in blank])[0].mean().backward())
    optimizer, ema = adamw(vae, settings.optimizer), Ema(vae, settings.ema_decay)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16")

    # State: with the configuration all that a resume needs, as every random number follows from an image's number
    terms = [name for name in autoencoder.TERMS if settings.loss[name]]
    progress = Progress(len(terms))
    best = {f"psnr_{size}px": torch.tensor(-math.inf, dtype=torch.float64) for size in held_out}
    state = {"vae": trainable(vae), "ema": ema.weights, "optimizer": state_by_name(optimizer, vae)}
    state |= {"best": best, **progress.state}
    saves = checkpoint.Checkpoints(
        own.saves, state, main=here.main, group=distributed.cpu_group(settings.distributed.timeout_minutes), keep=2
    )
    if here.main:
        checkpoint.start_milestone(saves, settings.num_examples_to_see, -1, identity.code())
    distributed.barrier()

    # Resume; a checkpoint before the first step shows in time whether there is room for any
    first = 0
    if found := distributed.from_main(saves.saved()):
        saves.load(found[-1])
        first = found[-1] // global_batch
        if here.main:
            print(f"resumed at {found[-1]:,} images from {own.saves / str(found[-1])}", flush=True)
    else:
        shutil.rmtree(own.folder / "samples", ignore_errors=True)  # of another training
        saves.save(0)
        saves.finish()

    # Stream of batches, from where the last one ended; and the log of what is done with them
    about = dataset.describe()
    position = first * global_batch + progress["moved"]
    ranks = {"start": position, "rank": here.rank, "world_size": here.size}
    stream = batches(dataset, share, **ranks, workers=settings.workers)
    stream = prefetched(stream, settings.prefetch, pin=device.type == "cuda")
    logs = here.main and steps > first
    telemetry = Telemetry(
        own.folder / "log.jsonl" if logs else None,
        total=steps * global_batch,
        start=first * global_batch,
        label=output.stem,
        wandb=open_wandb(settings, own) if logs else None,
        quiet=not here.main,
        position=position,
        world_size=here.size,
        device=device,
    )
    if here.main:
        about += f"; {sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M weights, world size {here.size}"
        print(f"{own.folder}: {about}, global batch {global_batch}, steps {first:,} to {steps:,}", flush=True)

    stop.listen()
    step, waited, lost = first, 0.0, 0
    while step < steps and not stop.agreed:
        for weights in optimizer.param_groups:
            weights["lr"] = learning_rate(step, steps, settings.lr_scheduler)

        # Gradient: ranks exchange it in the backward
        begin = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - begin
        images = batch["pixels"].to(device, non_blocking=True, memory_format=torch.channels_last)
        slots = range(here.rank * share, (here.rank + 1) * share)
        draws = objective.draw(schema.ObjectiveConfig(), settings.seed, position, global_batch, slots)
        (noise,) = objective.normals(draws, 1, noise_shape, device)
        with autocast:
            output_images, mean, logvar = model(images, noise)
        losses = autoencoder.loss_terms(output_images, images, mean, logvar, settings.loss, distance)
        losses = torch.stack(list(losses.values()))
        losses.sum().backward()
        norm = parallel.clip_gradients(vae, settings.optimizer.max_grad_norm)

        # Agreement: one exchange tells every rank the losses, and whether any rank met a non-finite value or a signal
        newly_lost, lost = sum(batch["lost"].values()) - lost, sum(batch["lost"].values())
        flags = [stop.name is not None, stop.name == "SIGUSR1", saves.settled(), newly_lost]
        bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        report = torch.cat([losses.detach().double() * share, bad[None], torch.tensor(flags, device=device)])
        *sums, bad, stop.agreed, stop.warned, settled, newly_lost = distributed.total(report).tolist()

        # Optimizer step, or none where the gradient is no number
        step, position = step + 1, position + global_batch
        progress.counts["lost"] += int(newly_lost)
        if bad:
            progress.skip()
            telemetry.note(step * global_batch, "skipped: the loss or gradient is no number", position)
        else:
            optimizer.step()
            progress.learn(sums, [global_batch] * len(terms))
            ema.update(vae, progress["updates"])
        optimizer.zero_grad(set_to_none=True)
        if settled:
            saves.finish()

        # Rollback: after too many of those, back to the last checkpoint, and on with the data that follow
        if progress["in_a_row"] >= settings.max_nonfinite:
            back = progress.roll_back(saves, step * global_batch, settings.max_rollbacks)
            telemetry.rewind(back)
            telemetry.note(back, "rolled back to the last checkpoint", position)
            step, waited = back // global_batch, 0.0
            continue

        # Log
        if step % settings.log_every == 0 or step == steps:
            _, each = progress.take_losses()
            values = {"loss": sum(each), **{f"loss_{name}": value for name, value in zip(terms, each, strict=True)}}
            values |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}
            values |= {"skipped": progress["skipped"], "data_wait": waited}
            telemetry.log(step * global_batch, values, position)
            waited = 0.0

        # Save, in the background; first show what has been learnt, so that no resume leaves it out
        due = (step % settings.save_every == 0 and not bad) or step == steps
        if due or stop.agreed:
            with telemetry.excluded():
                if due:
                    picture = own.folder / "samples" / f"{step * global_batch}.png"
                    with ema.applied(vae):
                        quality = measure(vae, held_out, GLIMPSE, here, device)
                        if here.main:
                            draw_pairs(vae, held_out[resolution], device, picture)
                    for name, value in quality.items():
                        best[name].clamp_(min=value)
                    quality |= {f"best_{name}": value.item() for name, value in best.items()}
                    telemetry.note(step * global_batch, "held-out images", position, **quality)
                    telemetry.log_image(step * global_batch, picture)
                saves.save(step * global_batch)
    saves.finish()
    stream.close()
    telemetry.close()

    # Stopped by a signal: all is saved, and a file asks for a new start, as exit codes get lost on the way
    if step < steps:
        if here.main:
            checkpoint.ask_for_restart(own.folder, step * global_batch, bool(stop.warned))
        distributed.barrier()
        return False

    # Export: the averaged weights in half precision; what is measured is what is shipped
    with ema.applied(vae):
        shipped = copy.deepcopy(vae).eval().to(memory_format=torch.contiguous_format)
    normalise(shipped, ImageDataset(sides["train"], 2 * resolution, seed=settings.seed), device)
    quality = measure(shipped.half().float(), held_out, MEASURED_IMAGES, here, device)
    if here.main:
        facts = {
            "source": "train",
            "fingerprint": own.key,
            "sources": own.sources,
            "held_out": quality,
            "images": steps * global_batch,
            "steps": steps,
            "world_size": here.size,
            "global_batch": global_batch,
            **{name: progress[name] for name in ("lost", "skipped", "rollbacks")},
            "config": OmegaConf.to_container(settings, resolve=True),
            "code": code_digest(),
            "versions": versions(),
        }
        export(shipped.half(), facts, own.folder, output)
        checkpoint.finish_milestone(saves, settings.num_examples_to_see, identity.code())
        print(f"{output}: {quality}", flush=True)
    distributed.barrier()
    return True


# ---------------------------------------------------------------- before the training
def check(settings) -> None:
    """Refuse values that no training can have. Raises ConfigError or DistError."""
    for key in ("num_examples_to_see", "batch_size", "save_every", "log_every"):
        if settings[key] < 1:
            raise ConfigError(f"{key}: {settings[key]} is not at least 1")
    weights = {name: settings.loss[name] for name in autoencoder.TERMS}
    if min(weights.values()) < 0 or not sum(weights.values()) > weights["kl"]:
        what = "none may be negative, and one besides kl must be above 0"
        raise ConfigError(f"loss: {weights}: {what}, such as loss.l1=1")
    if weights["perceptual"] and not settings.loss.perceptual_network:
        remedy = "name the folder of an image network, such as resources/components/efficientnet-lite0"
        raise ConfigError(f"loss.perceptual_network: loss.perceptual needs one: {remedy}")
    if settings.distributed.strategy != "ddp":
        raise distributed.DistError("distributed.strategy: fsdp shards a UNet; an autoencoder is small: set it to ddp")


def training_folder(output: Path) -> Path:
    """Where a component's training keeps what it goes on from, beside the component, which is replaced whole."""
    return output.parent / "training" / output.stem


def identify(settings, manifest: str, global_batch: int, folder: Path) -> identity.Identity:
    """What the training is known by. Data and the perceptual network count by their records."""
    decisive = OmegaConf.to_container(settings, resolve=True)
    for key in NEUTRAL:
        del decisive[key]
    del decisive["optimizer"]["fused"]
    decisive["system"] = {"global_batch": global_batch}
    sources = {"dataset": read_manifest(manifest)["fingerprint"]}
    if settings.loss.perceptual:
        sources["network"] = record_fingerprint(f"{settings.loss.perceptual_network}.json")
    return identity.Identity(folder, sources, decisive, frozen=True)


def claim(own: identity.Identity, world_size: int) -> None:
    """Mark the folder as this training's; refuse to start anew only because ranks have come or gone."""
    for file in own.folder.glob("checkpoints/*/about.json"):
        other = read_json(file)
        differ = differences(other["decisive"], own.decisive) + differences(other["sources"], own.sources)
        if differ == ["system.global_batch"] and other["world_size"] != world_size and not own.saves.is_dir():
            before, now = (about["decisive"]["system"]["global_batch"] for about in (other, own.about))
            raise checkpoint.CheckpointError(
                f"{file.parent}: these checkpoints saw {before} images a step on {other['world_size']} processes, this "
                f"launch {now} on {world_size}; set batch_size so that it is {before} again, or delete that folder"
            )
    write_json(own.saves / "about.json", {**own.about, "world_size": world_size})
    (own.folder / "requeue").unlink(missing_ok=True)


def open_wandb(settings, own: identity.Identity):
    """A wandb run of project components; its key, entity and server are those of the environment."""
    who = {"wandb": {"api_key": None, "entity": None, "mode": settings.wandb_mode}}
    who["experiment"] = {"project": "components", "name": own.folder.name}
    return start_wandb(
        OmegaConf.create({**OmegaConf.to_container(settings, resolve=True), **who}), own.folder, own.run_id
    )


# ---------------------------------------------------------------- what it has learnt
def chunks(dataset: ImageDataset, positions: range, device: torch.device) -> Iterator[torch.Tensor]:
    """Pixels N x 3 x H x W of the readable images at these positions of the stream."""
    for start in range(0, len(positions), CHUNK):
        items = [dataset[position] for position in positions[start : start + CHUNK]]
        if pixels := [item["pixels"] for item in items if "error" not in item]:
            yield torch.stack(pixels).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def measure(vae, held_out: dict[int, ImageDataset], limit: int, here, device) -> dict[str, float]:
    """Mean PSNR, dB, of what comes back of the first `limit` held-out images, at each side in pixels.

    Ranks share the images. Raises DataError where none of them can be read.
    """
    found = {}
    for size, dataset in held_out.items():
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for images in chunks(dataset, range(here.rank, min(limit, len(dataset)), here.size), device):
            values = autoencoder.psnr(autoencoder.reconstruct(vae, images), images)
            sums += torch.stack([values.double().sum(), torch.tensor(len(values), device=device)])
        total, count = distributed.total(sums).tolist()
        if not count:
            raise DataError("held_out: none of its first images can be read; rebuild its shards")
        found[f"psnr_{size}px"] = round(total / count, 2)
    return found


@torch.no_grad()
def draw_pairs(vae, dataset: ImageDataset, device: torch.device, path: Path) -> None:
    """Write a picture of the first images of a dataset, each beside what comes back of it."""
    images = next(chunks(dataset, range(PAIRS), device))
    pairs = torch.stack([images, autoencoder.reconstruct(vae, images)], 1).flatten(0, 1)
    levels = ((pairs + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    grid([Image.fromarray(image) for image in levels], columns=8).save(aside := path.with_name(f".{path.name}"), "PNG")
    os.replace(aside, path)


@torch.no_grad()
def normalise(vae, dataset: ImageDataset, device: torch.device) -> None:
    """Fold into `vae` what gives the latents of the first images of a dataset zero mean and unit variance."""
    first = range(min(STATISTICS_IMAGES, len(dataset)))
    means = [vae.encode(images).latent_dist.mode() for images in chunks(dataset, first, device)]
    autoencoder.fold_normalisation(vae, *autoencoder.latent_statistics(torch.cat(means)))


def export(vae, facts: dict, folder: Path, output: Path) -> None:
    """Put the component in place, whole, with its log and samples, and write its record last."""
    aside = output.with_name(f".{output.stem}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    vae.save_pretrained(aside, safe_serialization=True)
    shutil.copytree(folder / "samples", aside / "samples")
    shutil.copyfile(folder / "log.jsonl", aside / "log.jsonl")
    write_json(aside / "training.json", facts)
    output.unlink(missing_ok=True)  # an older one must not stand for the new folder
    replace_folder(aside, output.with_suffix(""))
    write_json(output, facts)


def main(argv: list[str]) -> None:
    settings, own = command_line(argv, schema_data.AutoencoderConfig, __doc__, train=None, held_out=None, output=None)
    output = Path(own["output"])
    with distributed.joined(settings.distributed, EXPECTED) as (here, device, stop):
        folder, wait = training_folder(output), settings.wait_minutes
        with checkpoint.lock(folder, wait) if here.main else contextlib.nullcontext():
            finished = train(settings, own, output, here, device, stop)
    if not finished:
        sys.exit(distributed.STOPPED)


if __name__ == "__main__":
    main(sys.argv)
