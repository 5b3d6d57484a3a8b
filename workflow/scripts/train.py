"""Train the UNet of a latent diffusion model up to a milestone of images seen.

By hand:  torchrun --nproc_per_node N workflow/scripts/train.py config=path/to/yaml dataset.params.path=path/to/shards
The same command goes on from the last checkpoint. Results lie in log_dir/project/name: log.jsonl, samples/,
{images}/train.json, {images}/pipeline, and pipeline, a link to the newest. SIGTERM, SIGUSR1 and Ctrl-C save at the next
step and end with exit code 75; the file `requeue` in the folder then asks to be started again.
"""

import contextlib
import csv
import math
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest, record_fingerprint, versions
from sdtrain.config.load import OmegaConf
from sdtrain.data.datasets import open_dataset
from sdtrain.data.sources import DataError
from sdtrain.data.stream import batches, prefetched
from sdtrain.data.tars import ShardError
from sdtrain.errors import ConfigError
from sdtrain.io.files import replace_link, write_json
from sdtrain.io.storage import StorageError
from sdtrain.models.parts import ModelError
from sdtrain.training import checkpoint, identity, objective, parallel
from sdtrain.training.diffusion_task import batch_losses, build, draw_grid, export, find_micro_batch, trial_pass
from sdtrain.training.ema import trainable
from sdtrain.training.optimizer import adamw, learning_rate, state_by_name
from sdtrain.training.progress import Progress
from sdtrain.training.telemetry import Telemetry, TelemetryError, peak_flops, start_wandb

QUARTILES = 4  # of time, from little noise to much, that losses are told by
EXPECTED = (
    *(ConfigError, ModelError, objective.ObjectiveError, DataError),
    *(ShardError, StorageError, checkpoint.CheckpointError, TelemetryError, OSError, SafetensorError),
)


def train(cfg, here: distributed.World, device: torch.device, stop: distributed.Stop) -> bool:
    """Train from the last checkpoint to the milestone, and export it. Returns False where a signal came before."""
    e = cfg.experiment
    if cfg.system.threads:
        torch.set_num_threads(cfg.system.threads)
    torch.manual_seed(e.seed)

    # Sizes: steps count optimizer steps, images count what all ranks have seen
    micro_batch, accumulation, global_batch = distributed.batch_sizes(cfg.system, here.size)
    steps = math.ceil(e.num_examples_to_see / global_batch)
    milestone = e.num_examples_to_see if e.stop_at is None else e.stop_at
    last = math.ceil(milestone / global_batch)
    ends = {m: math.ceil(m / global_batch) * global_batch for m in e.milestones}  # each with a whole batch
    previous = max((end for m, end in ends.items() if m < milestone), default=0)

    # Folder: checkpoints are keyed by all that decides the weights
    distributed.barrier()  # the main rank may have waited for another trainer's end
    own = identity.identify(cfg, global_batch)
    result = own.folder / str(milestone)
    finished = e.requeue and record_fingerprint(result / "train.json") == own.key
    if distributed.from_main(finished):
        if here.main:
            print(f"{result / 'train.json'}: finished already", flush=True)
        return True
    if here.main:
        identity.claim(own, anew=not e.requeue)
        (own.folder / "requeue").unlink(missing_ok=True)

    # Data, network, optimizer
    dataset = open_dataset(cfg.dataset, e.seed)
    dataset.require_complete(cfg.dataset.params.max_lost)
    about, kept = dataset.describe(), {"samples": dataset.source.kept, "dropped": dataset.dropped}
    captions = read_captions(e) if e.eval_caption_file else []
    net = build(cfg, here.size, device, global_batch)
    optimizer = adamw(net.unet, cfg.optimizer)

    # State: with the configuration all that a resume needs, as every random number follows from an image's number
    progress = Progress(QUARTILES)
    state = {"unet": trainable(net.unet), "optimizer": state_by_name(optimizer, net.unet), **progress.state}
    if net.ema:
        state["ema"] = net.ema.weights
    saves = checkpoint.Checkpoints(
        own.saves,
        state,
        main=here.main,
        group=distributed.cpu_group(cfg.distributed.timeout_minutes),
        keep=e.keep_checkpoints if e.save_only_most_recent else None,
        always={*ends.values()},
    )
    if here.main:
        checkpoint.start_milestone(saves, milestone, previous, identity.code())
        if not e.requeue:
            checkpoint.wipe(saves, -1)
    distributed.barrier()

    # Resume; a checkpoint before the first step shows in time whether there is room for any
    first = 0
    if found := distributed.from_main([i for i in saves.saved() if i <= last * global_batch]):
        saves.load(found[-1])
        first = found[-1] // global_batch
        if here.main:
            print(f"resumed at {found[-1]:,} images from {own.saves / str(found[-1])}", flush=True)
    elif last > 0:
        saves.save(0)
        saves.finish()

    # Stream of batches, from where the last one ended; and the log of what is done with them
    if micro_batch is None:
        online = cfg.dataset.type != "LatentDataset"
        pixels = cfg.dataset.params.resolution if online else None
        micro_batch = find_micro_batch(net, global_batch // here.size, pixels)
        accumulation = global_batch // here.size // micro_batch
    parallel.settle(net.model, lambda: trial_pass(net, net.model, micro_batch))
    position = first * global_batch + progress["moved"]
    ranks = {"start": position, "rank": here.rank, "world_size": here.size}
    loading = {"workers": cfg.dataset.params.workers, "max_lost": cfg.dataset.params.max_lost}
    stream = batches(dataset, micro_batch, **ranks, **loading)
    stream = prefetched(stream, cfg.dataset.params.prefetch, pin=device.type == "cuda")
    logs = here.main and last > first
    telemetry = Telemetry(
        own.folder / "log.jsonl" if logs else None,
        total=last * global_batch,
        start=first * global_batch,
        label=f"{e.project}/{e.name}",
        wandb=start_wandb(cfg, own.folder, own.run_id) if logs else None,
        quiet=not here.main,
        position=position,
        world_size=here.size,
        flops_per_image=net.flops,
        peak=peak_flops(device, cfg.model.mixed_precision == "bf16", cfg.system.peak_tflops),
        device=device,
    )
    if here.main:
        about += f"; {sum(p.numel() for p in trainable(net.unet).values()) / 1e6:.1f} M weights"
        about += f", world size {here.size}, global batch {global_batch} ({accumulation} x {micro_batch} a rank)"
        print(f"{own.folder}: {about}, steps {first:,} to {last:,} of {steps:,}", flush=True)

    stop.listen()
    step, waited, lost = first, 0.0, 0
    while step < last and not stop.agreed:
        for weights in optimizer.param_groups:
            weights["lr"] = learning_rate(step, steps, cfg.lr_scheduler)

        # Gradient: micro-batches add up, ranks exchange it once, at the last of them
        losses, images = torch.zeros(2, QUARTILES, dtype=torch.float64, device=device)
        for micro in range(accumulation):
            begin = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - begin
            slot = (micro * here.size + here.rank) * micro_batch
            draws = objective.draw(cfg.objective, e.seed, position, global_batch, range(slot, slot + micro_batch))
            torch.manual_seed(draws.offset_seeds[0])  # of dropout inside the UNet
            with parallel.exchange(net.model, now=micro + 1 == accumulation):
                each = batch_losses(net, batch, draws, dataset, cfg.objective)
                with net.kernel:  # what was not kept is computed again
                    (each.mean() / accumulation).backward()
            quartile = (draws.time * QUARTILES).long().to(device)
            losses.index_add_(0, quartile, each.detach().double())
            images.index_add_(0, quartile, torch.ones_like(each, dtype=torch.float64))
        norm = parallel.clip_gradients(net.unet, cfg.optimizer.max_grad_norm)

        # Agreement: one exchange tells every rank the losses, and whether any rank met a non-finite value or a signal
        newly_lost, lost = sum(batch["lost"].values()) - lost, sum(batch["lost"].values())
        flags = [stop.name is not None, stop.name == "SIGUSR1", saves.settled(), newly_lost]
        bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        report = torch.cat([losses, images, bad[None], torch.tensor(flags, device=device)])
        report = distributed.total(report.double()).tolist()
        bad, stop.agreed, stop.warned, settled, newly_lost = report[2 * QUARTILES :]

        # Optimizer step, or none where the gradient is no number
        step, position = step + 1, position + global_batch
        progress.counts["lost"] += int(newly_lost)
        if bad:
            progress.skip()
            telemetry.note(step * global_batch, "skipped: the loss or gradient is no number", position)
        else:
            optimizer.step()
            progress.learn(report[:QUARTILES], report[QUARTILES : 2 * QUARTILES])
            if net.ema:
                net.ema.update(net.unet, progress["updates"])
        optimizer.zero_grad(set_to_none=True)
        if settled:
            saves.finish()

        # Rollback: after too many of those, back to the last checkpoint, and on with the data that follow
        if progress["in_a_row"] >= e.max_nonfinite:
            back = progress.roll_back(saves, step * global_batch, e.max_rollbacks)
            telemetry.rewind(back)
            telemetry.note(back, "rolled back to the last checkpoint", position)
            step, waited = back // global_batch, 0.0
            continue

        # Log
        if step % e.log_every == 0 or step == last:
            mean, quartiles = progress.take_losses()
            values = {"loss": mean, **{f"loss_q{i + 1}": value for i, value in enumerate(quartiles)}}
            values |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}
            values |= {"skipped": progress["skipped"], "data_wait": waited}
            telemetry.log(step * global_batch, values, position)
            waited = 0.0

        # Save, in the background, but not in the midst of a bad streak; draw what has been learnt
        if (step % e.save_every == 0 and not bad) or step == last or stop.agreed:
            with telemetry.excluded():
                saves.save(step * global_batch)
                if captions and not stop.agreed:
                    picture = own.folder / "samples" / f"{step * global_batch}.png"
                    draw_grid(net, captions, cfg.dataset.params.resolution, e, here, picture)
                    telemetry.log_image(step * global_batch, picture)
    saves.finish()
    stream.close()
    telemetry.close()

    # Stopped by a signal: all is saved, and a file asks for a new start, as exit codes get lost on the way
    if step < last:
        if here.main:
            checkpoint.ask_for_restart(own.folder, step * global_batch, bool(stop.warned))
        distributed.barrier()
        return False

    # Export
    pipeline = export(net, result / "pipeline", here.main)
    if here.main:
        replace_link(own.folder / "pipeline", pipeline)
        facts = {
            "images": last * global_batch,
            "steps": last,
            "fingerprint": own.key,
            "sources": own.sources,
            "pipeline": str(pipeline),
            "log": str(own.folder / "log.jsonl"),
            "resolution": cfg.dataset.params.resolution,
            "world_size": here.size,
            "global_batch": global_batch,
            **kept,
            **{name: progress[name] for name in ("lost", "skipped", "rollbacks")},
            "code": code_digest(),
            "versions": versions(),
        }
        write_json(result / "train.json", facts)
        checkpoint.finish_milestone(saves, milestone, identity.code())
        print(f"{result / 'train.json'}: {pipeline}", flush=True)
    distributed.barrier()
    return True


def read_captions(experiment) -> list[str]:
    """The first `num_eval_images` captions of `eval_caption_file`. Raises ConfigError where there is none."""
    path = Path(experiment.eval_caption_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"experiment.eval_caption_file: {error}") from None
    if path.suffix == ".csv":
        lines = [row.get("caption") or "" for row in csv.DictReader(lines)]
    captions = [line.strip() for line in lines if line.strip()][: experiment.num_eval_images]
    if not captions:
        raise ConfigError(f"experiment.eval_caption_file: {path}: no caption in it")
    return captions


def main(argv: list[str]) -> None:
    cfg, _ = command_line(argv, schema.StageConfig, __doc__)
    backend = {"dist_backend": cfg.system.dist_backend, "dist_url": cfg.system.dist_url}  # the seed has them twice
    with distributed.joined(OmegaConf.merge(cfg.distributed, backend), EXPECTED) as (here, device, stop):
        folder, wait = identity.run_folder(cfg), cfg.experiment.wait_minutes
        with checkpoint.lock(folder, wait) if here.main else contextlib.nullcontext():
            finished = train(cfg, here, device, stop)
    if not finished:
        sys.exit(distributed.STOPPED)


if __name__ == "__main__":
    main(sys.argv)
