"""Train the UNet of a latent diffusion model up to a milestone of images seen.

By hand:  torchrun --nproc_per_node N workflow/scripts/train.py config=path/to/yaml dataset.params.path=path/to/shards
The same command goes on from the last checkpoint. Results lie in log_dir/project/name: log.jsonl, samples/,
{images}/train.json, {images}/pipeline, and pipeline, a link to the newest. SIGTERM, SIGUSR1 and Ctrl-C save at the next
step and end with exit code 75; the file `requeue` in the folder then asks to be started again.
"""

import contextlib
import copy
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdtrain import (
    checkpoint,
    config,
    dist,
    identity,
    loader,
    lora,
    models,
    objective,
    parallel,
    sampling,
    schema,
    storage,
    tars,
)
from sdtrain.ema import Ema, decay_of, trainable
from sdtrain.optimizer import adamw, learning_rate, state_by_name
from sdtrain.telemetry import Telemetry, TelemetryError, peak_flops, start_wandb, training_flops

STOPPED = os.EX_TEMPFAIL  # 75: stopped by a signal, with everything saved
QUARTILES = 4


def train(cfg, here: dist.World, device: torch.device, stop: dist.Stop) -> bool:
    """Train from the last checkpoint to the milestone, and export it. Returns False where a signal came before."""
    e = cfg.experiment
    if cfg.system.threads:
        torch.set_num_threads(cfg.system.threads)
    torch.manual_seed(e.seed)

    # Sizes: steps count optimizer steps, images count what all ranks have seen
    micro_batch, accumulation, global_batch = dist.batch_sizes(cfg.system, here.size)
    steps = math.ceil(e.num_examples_to_see / global_batch)
    milestone = e.num_examples_to_see if e.stop_at is None else e.stop_at
    last = math.ceil(milestone / global_batch)
    ends = {m: math.ceil(m / global_batch) * global_batch for m in e.milestones}  # each with a whole batch
    previous = max((end for m, end in ends.items() if m < milestone), default=0)
    captions = read_captions(e) if e.eval_caption_file else []

    # Folders: checkpoints are keyed by all that decides the weights
    dist.barrier()  # the main rank may have waited for another trainer's end
    own = identity.identify(cfg, global_batch)
    result = own.folder / str(milestone)
    if config.record_fingerprint(result / "train.json") == own.key:
        if here.main:
            print(f"{result / 'train.json'}: finished already", flush=True)
        return True
    if here.main:
        identity.claim(own, anew=not e.requeue)
        (own.folder / "requeue").unlink(missing_ok=True)

    # Model: its weights, from `init` where a stage has one, then how it is computed
    parts = models.load_parts(cfg.model).to(device)
    unet = parts.unet
    side = models.check_resolution(parts, cfg.dataset.params.resolution)
    if cfg.init:
        models.load_weights(unet, cfg.init, "init", cfg.init_weights)
    if cfg.model.lora.rank is not None:
        lora.add(unet, cfg.model.lora)
    encode_text = models.TextEncoding(parts.tokenizer, parts.text_encoder, device)
    process = objective.process_of(parts.scheduler).to(device)
    objective.snr_weights(
        process, process.timesteps(torch.rand(1)), cfg.objective.snr_gamma
    )  # refused before the start
    precise = cfg.model.mixed_precision != "bf16"
    layout = torch.channels_last if cfg.system.channels_last else torch.contiguous_format
    empty_text = encode_text([""])
    flops = training_flops(unet, (unet.config.in_channels, side, side), empty_text.shape[1:])
    average = initial_average(cfg, unet)
    prepare(cfg, unet, parts.vae, device)
    model = parallel.spread(unet, cfg.distributed.strategy, here.size, device, bf16=not precise)
    optimizer = adamw(unet, cfg.optimizer, device)
    ema = Ema(unet, decay_of(cfg.model.ema, global_batch), cfg.model.ema.warmup) if cfg.model.use_ema else None
    if ema and average:
        ema.load(average)

    # State: live tensors, all that a resume needs besides the configuration; randomness follows from image numbers
    progress = {name: torch.zeros((), dtype=torch.int64) for name in PROGRESS}
    window = torch.zeros(2 * QUARTILES, dtype=torch.float64)  # sums and counts of losses since the last log line
    state = {"unet": trainable(unet), "optimizer": state_by_name(optimizer, unet), "progress": progress}
    state |= {"window": {"losses": window}} | ({"ema": ema.weights} if ema else {})
    group = dist.cpu_group()
    saves = checkpoint.Checkpoints(
        own.saves,
        state,
        main=here.main,
        group=group,
        keep=e.keep_checkpoints if e.save_only_most_recent else None,
        always={*ends.values()},
    )
    if here.main:
        checkpoint.start_milestone(saves, milestone, previous, identity.code())
        if not e.requeue:
            checkpoint.wipe(saves, previous)
    dist.barrier()

    # Resume; a first checkpoint before the first step shows in time whether there is room for any
    first = 0
    if found := [i for i in saves.saved() if i <= last * global_batch]:
        saves.load(found[-1])
        first = found[-1] // global_batch
        if here.main:
            print(f"resumed at {found[-1]:,} images from {own.saves / str(found[-1])}", flush=True)
    elif last > 0:
        saves.save(0)
        saves.finish()

    # Micro-batches: where their size is open, the largest that fits the device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=not precise)
    kernel = models.attention_kernel(cfg.model.attention)
    if micro_batch is None:
        with autocast:
            share = global_batch // here.size
            micro_batch = find_micro_batch(cfg, model, parts, empty_text, kernel, side, share, device)
        accumulation = global_batch // here.size // micro_batch

    # Data and telemetry
    dataset = loader.open_dataset(cfg.dataset, e.seed)
    dataset.require_complete(cfg.dataset.params.max_lost)

    def stream_from(position: int):
        """Batches of this rank from image number `position` of the stream on."""
        batches = loader.batches(
            dataset,
            micro_batch,
            start=position,
            rank=here.rank,
            world_size=here.size,
            workers=cfg.dataset.params.workers,
            max_lost=cfg.dataset.params.max_lost,
        )
        return loader.prefetched(batches, cfg.dataset.params.prefetch, pin=device.type == "cuda")

    position = first * global_batch + int(progress["moved"])
    stream = stream_from(position)
    logs = here.main and last > first
    telemetry = Telemetry(
        own.folder / "log.jsonl" if logs else None,
        total=last * global_batch,
        start=first * global_batch,
        label=f"{e.project}/{e.name}",
        wandb=start_wandb(cfg, own.folder, own.key) if logs else None,
        quiet=not here.main,
        position=position,
        world_size=here.size,
        flops_per_image=flops,
        peak=peak_flops(device, not precise, cfg.system.peak_tflops),
        device=device,
    )
    if here.main:
        about = f"{dataset.describe()}; {sum(p.numel() for p in trainable(unet).values()) / 1e6:.1f} M weights"
        about += f", world size {here.size}, global batch {global_batch} ({accumulation} x {micro_batch} a rank)"
        print(f"{own.folder}: {about}, steps {first:,} to {last:,} of {steps:,}", flush=True)

    step, waited, lost, norm = first, 0.0, {}, torch.zeros(())
    while step < last and not stop.agreed:
        position = step * global_batch + int(progress["moved"])
        for group_of_weights in optimizer.param_groups:
            group_of_weights["lr"] = learning_rate(step, steps, cfg.lr_scheduler)

        # Gradient: micro-batches add up, ranks exchange once, at the last of them
        report = torch.zeros(2 * QUARTILES + 3, dtype=torch.float64, device=device)
        for micro in range(accumulation):
            begin = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - begin
            lost = batch["lost"]
            slot = (micro * here.size + here.rank) * micro_batch
            draws = objective.draw(cfg.objective, e.seed, position, global_batch, range(slot, slot + micro_batch))
            torch.manual_seed(draws.offset_seeds[0])  # of dropout inside the UNet
            with torch.no_grad(), autocast:
                text = text_states(batch, draws.drop, encode_text, dataset, device)
                if "latents" in batch:
                    clean = batch["latents"].to(device, non_blocking=True)
                    (noise,) = objective.normals(draws, 1, clean.shape[1:], device, cfg.objective.offset_noise)
                else:
                    pixels = batch["pixels"].to(device, non_blocking=True, memory_format=layout)
                    shape = (unet.config.in_channels, side, side)
                    noise, own_noise = objective.normals(draws, 2, shape, device, cfg.objective.offset_noise)
                    clean = models.encode_images(parts.vae, pixels, own_noise)
                t = process.timesteps(draws.time).to(device)
                noisy = objective.add_noise(process, clean, noise, t).to(memory_format=layout)
                goal = objective.target(process, clean, noise, t)
                weights = objective.snr_weights(process, t, cfg.objective.snr_gamma)
            with parallel.exchange(model, now=micro + 1 == accumulation), autocast, kernel:
                output = model(noisy, t, encoder_hidden_states=text).sample
                losses = objective.loss(output, goal, weights)
                (losses.mean() / accumulation).backward()
            quartile = (draws.time * QUARTILES).long().to(device)
            report[:QUARTILES].index_add_(0, quartile, losses.detach().double())
            report[QUARTILES : 2 * QUARTILES].index_add_(0, quartile, torch.ones_like(losses, dtype=torch.float64))

        # Agreement: one exchange tells every rank the losses, and whether any met a non-finite value or a signal
        norm = parallel.clip_gradients(unet, cfg.optimizer.max_grad_norm)
        bad = ~(torch.isfinite(norm) & torch.isfinite(report).all())
        report[2 * QUARTILES] = bad
        report[2 * QUARTILES + 1] = stop.name is not None
        report[2 * QUARTILES + 2] = saves.settled()
        *sums, bad, stop.agreed, settled = dist.total(report).tolist()

        # Optimizer step, or none where the gradient is no number
        step += 1
        if bad:
            progress["skipped"] += 1
            progress["in_a_row"] += 1
            telemetry.note(step * global_batch, "skipped: the loss or gradient is no number", position + global_batch)
        else:
            optimizer.step()
            progress["in_a_row"].zero_()
            progress["updates"] += 1
            window += torch.tensor(sums, dtype=torch.float64)
            if ema:
                ema.update(unet, int(progress["updates"]))
        optimizer.zero_grad(set_to_none=True)

        # Rollback: after too many of those, back to the last checkpoint, and on with the data that follow
        if settled or progress["in_a_row"] >= e.max_nonfinite:
            saves.finish()
        if progress["in_a_row"] >= e.max_nonfinite:
            dist.barrier()
            back = saves.newest
            roll_back(saves, progress, step * global_batch, e.max_rollbacks)
            telemetry.rewind(back)
            telemetry.note(back, "rolled back to the last checkpoint", position + global_batch)
            step = back // global_batch
            stream.close()
            stream = stream_from(position + global_batch)
            continue

        # Log
        if step % e.log_every == 0 or step == last:
            values = {**window_losses(window), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}
            values |= {"skipped": int(progress["skipped"]), "data_wait": waited}
            telemetry.log(step * global_batch, values, position + global_batch)
            window.zero_()
            waited = 0.0

        # Save, in the background; draw what the model has learnt
        if step % e.save_every == 0 or step == last or stop.agreed:
            with telemetry.excluded():
                progress["tries"].zero_()
                saves.save(step * global_batch)
                if captions and not stop.agreed:
                    path = own.folder / "samples" / f"{step * global_batch}.png"
                    draw_grid(cfg, here, parts, unet, ema, captions, path, group)
                    telemetry.log_image(step * global_batch, path)
    saves.finish()
    stream.close()
    telemetry.close()

    # Stopped by a signal: all is saved, and a file asks for a new start, as exit codes get lost on the way
    if step < last:
        if here.main:
            config.write_json(own.folder / "requeue", {"signal": stop.name, "images": step * global_batch})
            print(
                f"{own.folder}: stopped, saved at {step * global_batch:,} images; the same command goes on", flush=True
            )
        dist.barrier()
        return False

    # Export
    pipeline = export(cfg, here, parts, unet, ema, result / "pipeline")
    if here.main:
        checkpoint.point_link(own.folder / "pipeline", pipeline)
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
            "samples": dataset.source.kept,
            "dropped": dataset.dropped,
            "lost": lost,
            **{name: int(progress[name]) for name in ("skipped", "rollbacks")},
            "code": config.code_digest(),
            "versions": config.versions(),
        }
        config.write_json(result / "train.json", facts)
        checkpoint.finish_milestone(saves, milestone, identity.code())
        print(f"{result / 'train.json'}: {pipeline}", flush=True)
    dist.barrier()
    return True


# ---------------------------------------------------------------- pieces of the loop
PROGRESS = ("updates", "skipped", "in_a_row", "moved", "rollbacks", "tries")


def prepare(cfg, unet, vae, device) -> None:
    """Set how the UNet is computed: attention, recomputation, memory format, compilation. Its weights stay."""
    dtype = torch.bfloat16 if cfg.model.mixed_precision == "bf16" else torch.float32
    models.set_attention(unet, cfg.model.xformers, cfg.model.attention, device, dtype)
    if cfg.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if cfg.system.channels_last:
        vae.to(memory_format=torch.channels_last)
        if cfg.distributed.strategy == "ddp":  # weights that are sharded must be contiguous; their input decides then
            unet.to(memory_format=torch.channels_last)
    parallel.compile_model(unet, cfg.model.compile)
    unet.train()


def initial_average(cfg, unet) -> dict[str, torch.Tensor] | None:
    """The weights that the moving average starts from, where they are not the UNet's own."""
    if not (cfg.model.use_ema and cfg.model.ema.path):
        return None
    start = copy.deepcopy(unet)
    models.load_weights(start, cfg.model.ema.path, "model.ema.path")
    return dict(start.named_parameters())


def text_states(batch: dict, drop: torch.Tensor, encode_text, dataset, device) -> torch.Tensor:
    """States of a batch's captions N x tokens x width, those of the empty caption where `drop`, bool N, says so."""
    if "text" in batch:
        cached = batch["text"].to(device, non_blocking=True)
        return torch.where(drop.to(device)[:, None, None], dataset.empty_text.to(device), cached)
    return encode_text(["" if d else c for c, d in zip(batch["caption"], drop.tolist(), strict=True)])


def window_losses(window: torch.Tensor) -> dict[str, float]:
    """Mean loss, whole and by quartile of time from little noise (q1) to much (q4); without images, no number."""
    sums, counts = window[:QUARTILES], window[QUARTILES:]
    quartiles = (sums / counts).tolist()
    return {"loss": (sums.sum() / counts.sum()).item(), **{f"loss_q{i + 1}": q for i, q in enumerate(quartiles)}}


def roll_back(saves: checkpoint.Checkpoints, progress: dict, now: int, limit: int) -> None:
    """Load the newest checkpoint, and move the data on past the `now` images seen; `limit` times at most to one."""
    kept = {name: int(progress[name]) for name in ("skipped", "moved", "rollbacks", "tries")}
    if kept["tries"] >= limit:
        raise models.ModelError(
            f"non-finite losses after {limit} returns to the checkpoint at {saves.newest:,} images; lower "
            "optimizer.params.learning_rate, or look for damaged samples"
        )
    saves.load(saves.newest)
    kept["moved"] += now - saves.newest
    for name in ("rollbacks", "tries"):
        kept[name] += 1
    for name, value in {**kept, "in_a_row": 0}.items():
        progress[name].fill_(value)


def draw_grid(cfg, here, parts, unet, ema, captions: list[str], path: Path, group) -> None:
    """Draw captions with the averaged weights, where there are any; each rank draws a share."""
    e = cfg.experiment
    share = math.ceil(len(captions) / here.size)
    mine = [captions[min(i, len(captions) - 1)] for i in range(here.rank * share, (here.rank + 1) * share)]
    options = {"guidance_scale": e.eval_guidance_scale, "steps": e.eval_steps, "batch_size": min(16, share)}
    unet.eval()
    with ema.applied(unet) if ema else contextlib.nullcontext():
        pipe, seed = sampling.pipeline_of(parts, unet), e.seed + here.rank * share
        images = sampling.generate(pipe, mine, cfg.dataset.params.resolution, seed=seed, **options)
        drawn = dist.gather([np.asarray(image) for image in images], group)
    unet.train()
    if here.main:
        whole = [Image.fromarray(image) for share in drawn for image in share][: len(captions)]
        path.parent.mkdir(parents=True, exist_ok=True)
        sampling.grid(whole).save(aside := path.with_name(f".{path.name}"), "PNG")
        os.replace(aside, path)


def read_captions(experiment) -> list[str]:
    """The first `num_eval_images` captions of `eval_caption_file`. Raises ConfigError where there is none."""
    try:
        lines = Path(experiment.eval_caption_file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise config.ConfigError(f"experiment.eval_caption_file: {error}") from None
    captions = [line.strip() for line in lines if line.strip()][: experiment.num_eval_images]
    if not captions:
        raise config.ConfigError(f"experiment.eval_caption_file: {experiment.eval_caption_file}: no caption in it")
    return captions


def find_micro_batch(cfg, model, parts, text, kernel, side: int, share: int, device: torch.device) -> int:
    """The largest divisor of `share`, a rank's images a step, whose forward and backward fit the GPU on every rank."""

    def attempt(count: int) -> None:
        if cfg.dataset.type != "LatentDataset":
            resolution = cfg.dataset.params.resolution
            models.encode_moments(parts.vae, torch.zeros(count, 3, resolution, resolution, device=device))
        latents = torch.randn(count, parts.unet.config.in_channels, side, side, device=device)
        times = torch.zeros(count, device=device)
        with kernel:
            output = model(latents, times, encoder_hidden_states=text.expand(count, -1, -1)).sample
            output.square().mean().backward()
        parts.unet.zero_grad(set_to_none=True)

    return parallel.largest_that_fits(share, attempt, device)


def export(cfg, here, parts, unet, ema, folder: Path) -> Path:
    """Write the milestone's pipeline: averaged weights where there are any, the raw ones beside them as unet_raw."""
    raw = parallel.plain_unet(unet, here.main) if ema and cfg.model.lora.rank is None else None
    with ema.applied(unet) if ema else contextlib.nullcontext():
        if cfg.model.lora.rank is not None:
            exported, extra = lora.merged(unet), {"lora": lambda path: lora.export(unet, path)}
        else:
            exported = parallel.plain_unet(unet, here.main)
            extra = {"unet_raw": raw.save_pretrained} if raw else {}
        return checkpoint.export_pipeline(folder, parts, exported, extra) if here.main else folder


def main(argv: list[str]) -> None:
    cfg, _ = config.command_line(argv, schema.StageConfig, __doc__)
    expected = (config.ConfigError, dist.DistError, models.ModelError, loader.DataError, tars.ShardError)
    expected += (checkpoint.CheckpointError, storage.StorageError, TelemetryError, objective.ObjectiveError)
    d, stop, rank = cfg.distributed, dist.Stop(), dist.world().rank
    try:
        here, device = dist.start(cfg.system.dist_backend, cfg.system.dist_url, d.timeout_minutes)
        folder = identity.run_folder(cfg)
        with checkpoint.lock(folder, cfg.experiment.wait_minutes) if here.main else contextlib.nullcontext():
            finished = train(cfg, here, device, stop)
    except expected as error:
        end(f"error: {error}" if rank == 0 else f"rank {rank} ends: {error}")
    except RuntimeError as error:
        silent = dist.silent_ranks()
        if not silent:
            raise
        named = ", ".join(map(str, silent))
        end(f"error: rank {rank} has lost rank {named}, which died or hangs: {str(error).splitlines()[0]}")
    dist.stop()
    stop.ignore()
    if not finished:
        sys.exit(STOPPED)


def end(message: str) -> None:
    """Print and end at once: ranks that wait in a collective must not keep this one from ending."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv)
