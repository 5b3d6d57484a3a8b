"""Train the UNet of a latent diffusion model up to a milestone of images seen.

By hand:  torchrun --nproc_per_node N workflow/scripts/train.py config=path/to/yaml dataset.params.path=path/to/shards
The same command goes on from the last checkpoint. Results lie in log_dir/project/name: log.jsonl, {images}/train.json,
{images}/pipeline, and pipeline, a link to the newest.
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from sdtrain import checkpoint, config, dist, loader, models, objective, sampling, schema, shards, storage, tars
from sdtrain.ema import Ema
from sdtrain.telemetry import Telemetry, start_wandb


def learning_rate(step: int, steps: int, schedule) -> float:
    """Learning rate of optimizer step `step` of `steps`: linear warm-up, then constant or a cosine to `final`."""
    p = schedule.params
    if step < p.warmup_length:
        return p.learning_rate * (step + 1) / p.warmup_length
    if schedule.scheduler == "ConstantWithWarmup":
        return p.learning_rate
    begin = max(p.warmup_length, p.decay_from * steps)
    share = min(1.0, max(0.0, (step - begin) / max(1.0, steps - begin)))
    return p.learning_rate * (p.final + (1 - p.final) * 0.5 * (1 + math.cos(math.pi * share)))


def generator_for(seed: int, position: int, device: torch.device) -> torch.Generator:
    """Randomness of the micro-batch whose first image is number `position` of the run.

    A resume has no random state to restore, and ranks or micro-batches that share a batch in another way draw the same.
    """
    state = np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def build_unet(cfg, parts, device):
    """The UNet to train, its weights from `init` where a stage has one, and its moving average or None."""
    unet = parts.unet
    if cfg.init:
        models.load_weights(unet, cfg.init, "init")
    ema = Ema(unet, cfg.model.ema.decay) if cfg.model.use_ema else None
    if ema and cfg.model.ema.path:
        models.load_weights(ema.module, cfg.model.ema.path, "model.ema.path")
    if cfg.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    models.set_attention(unet, cfg.model.xformers, device)
    return unet, ema


def source_fingerprints(cfg) -> dict[str, str]:
    """What the inputs' own records say they are: they decide the weights as the configuration does."""
    records = {part: cfg.model[part].pretrained or cfg.model.pretrained for part in (*models.PARTS, "unet")}
    found = {part: config.record_fingerprint(f"{source}.json") for part, source in records.items() if source}
    found["dataset"] = data_fingerprint(cfg.dataset.params.path)
    if cfg.init:
        found["init"] = config.record_fingerprint(Path(cfg.init).parent / "train.json")
    return {k: v for k, v in found.items() if v}


def data_fingerprint(path: str) -> str:
    """What a manifest says it is; of shards or tables without one, which files they are and how large."""
    if path.endswith(".json"):
        return shards.read_manifest(path)["fingerprint"]
    try:
        addresses = storage.expand(path)
    except storage.StorageError as error:
        raise loader.DataError(f"dataset.params.path: {error}") from None
    return config.fingerprint([(a, os.path.getsize(a) if os.path.isfile(a) else None) for a in addresses])


def check_latents(cfg, sources: dict[str, str]) -> None:
    """Refuse latents, and states of captions, that were made by other networks than this run's."""
    path = cfg.dataset.params.path
    if cfg.dataset.type != "LatentDataset" or not path.endswith(".json"):
        return
    made_by = config.read_json(path).get("made_by", {})
    for part, maker in (("vae", "vae"), ("text_encoder", "text_encoder"), ("tokenizer", "text_encoder")):
        ours, theirs = sources.get(part), made_by.get(maker)
        if ours and theirs and ours != theirs:
            folder = cfg.model[part].pretrained or cfg.model.pretrained
            remedy = f"train with the {part} it was made with, or make it again: snakemake --force {path}"
            raise models.ModelError(f"model.{part}: {folder} is {ours}, but {path} was made with {theirs}; {remedy}")


def run_folder(cfg) -> Path:
    """log_dir/project/name; a frozen configuration with other values by hand gets a folder of its own beside it."""
    e, trial = cfg.experiment, ""
    if cfg.frozen and cfg.frozen != config.stage_fingerprint(cfg):
        trial = f"-trial-{config.stage_fingerprint(cfg)[:6]}"
    return Path(e.log_dir, e.project, e.name + trial)


def train(cfg, here: dist.World, device: torch.device) -> None:
    """Train from the last checkpoint to the milestone, and export it."""
    e = cfg.experiment
    if cfg.system.threads:
        torch.set_num_threads(cfg.system.threads)
    torch.manual_seed(e.seed)

    # Sizes: steps count optimizer steps, images count what all ranks have seen
    global_batch = cfg.system.batch_size * cfg.system.gradient_accumulation * here.size
    steps = math.ceil(e.num_examples_to_see / global_batch)
    milestone = e.num_examples_to_see if e.stop_at is None else e.stop_at
    last = math.ceil(milestone / global_batch)
    ends = {m: math.ceil(m / global_batch) * global_batch for m in e.milestones}  # each with a whole batch
    previous = max((end for m, end in ends.items() if m < milestone), default=0)

    # Folders: checkpoints are keyed by all that decides the weights
    folder = run_folder(cfg)
    sources = source_fingerprints(cfg)
    check_latents(cfg, sources)
    key = config.fingerprint(config.stage_fingerprint(cfg), sources, global_batch)
    saves = folder / "checkpoints" / key
    result = folder / str(milestone)
    dist.barrier()  # the main rank may have waited for another trainer's end
    if config.record_fingerprint(result / "train.json") == key:
        if here.main:
            print(f"{result / 'train.json'}: finished already", flush=True)
        return
    if here.main:
        checkpoint.start_milestone(saves, milestone, previous)
        if not e.requeue:
            checkpoint.wipe(saves, previous)
    dist.barrier()

    # Model, moving average, optimizer
    parts = models.load_parts(cfg.model).to(device)
    unet, ema = build_unet(cfg, parts, device)
    encode_text = models.TextEncoding(parts.tokenizer, parts.text_encoder, device)
    alphas_cumprod = parts.scheduler.alphas_cumprod.to(device)
    prediction = parts.scheduler.config.prediction_type
    o = cfg.optimizer.params
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=o.learning_rate, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, eps=o.epsilon
    )

    # Resume
    first = 0
    if found := [i for i in checkpoint.saved(saves) if i <= last * global_batch]:
        state = checkpoint.load(saves, found[-1], device)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])
        first = found[-1] // global_batch
        if here.main:
            print(f"resumed at {found[-1]:,} images from {saves / str(found[-1])}.pt", flush=True)

    # Data: a resume needs only the number of images seen
    dataset = loader.open_dataset(cfg.dataset, e.seed)
    dataset.require_complete(cfg.dataset.params.max_lost)
    stream = loader.batches(
        dataset,
        cfg.system.batch_size,
        start=first * global_batch,
        rank=here.rank,
        world_size=here.size,
        workers=cfg.dataset.params.workers,
        pin=device.type == "cuda",
        max_lost=cfg.dataset.params.max_lost,
    )
    model = DistributedDataParallel(unet, gradient_as_bucket_view=True) if here.size > 1 else unet
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.model.mixed_precision == "bf16")
    if here.main:
        about = dataset.describe()
        about += f"; {unet.num_parameters() / 1e6:.1f} M weights"
        about += f", world size {here.size}, global batch {global_batch}, steps {first:,} to {last:,} of {steps:,}"
        print(f"{folder}: {about}", flush=True)
    telemetry = Telemetry(
        folder / "log.jsonl" if here.main and last > first else None,
        total=last * global_batch,
        start=first * global_batch,
        label=f"{e.project}/{e.name}",
        wandb=start_wandb(cfg, folder, key) if here.main and last > first else None,
        quiet=not here.main,
    )

    losses, waited = [], 0.0
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, cfg.lr_scheduler)

        # Gradient: micro-batches add up, ranks exchange once, at the last of them
        for micro in range(cfg.system.gradient_accumulation):
            begin = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - begin
            part = (step * cfg.system.gradient_accumulation + micro) * here.size + here.rank
            rng = generator_for(e.seed, part * cfg.system.batch_size, device)
            final = micro + 1 == cfg.system.gradient_accumulation
            with autocast, contextlib.nullcontext() if final or here.size == 1 else model.no_sync():
                with torch.no_grad():
                    captions = batch["caption"]
                    drop = torch.rand(len(captions), generator=rng, device=device) < cfg.objective.caption_dropout
                    if "text" in batch:
                        cached = batch["text"].to(device, non_blocking=True)
                        text = torch.where(drop[:, None, None], dataset.empty_text.to(device), cached)
                    else:
                        text = encode_text(["" if d else c for c, d in zip(captions, drop.tolist(), strict=True)])
                    if "latents" in batch:
                        clean = batch["latents"].to(device, non_blocking=True)
                    else:
                        clean = models.encode_images(parts.vae, batch["pixels"].to(device, non_blocking=True), rng)
                    noise = torch.randn(clean.shape, generator=rng, device=device)
                    t = objective.sample_timesteps(len(clean), len(alphas_cumprod), cfg.objective.timesteps, rng)
                    noisy = objective.add_noise(clean, noise, alphas_cumprod, t)
                    goal = objective.target(clean, noise, alphas_cumprod, t, prediction)
                    weights = objective.snr_weights(alphas_cumprod, t, prediction, cfg.objective.snr_gamma)
                output = model(noisy, t, encoder_hidden_states=text).sample
                loss = objective.loss(output, goal, weights).mean() / cfg.system.gradient_accumulation
            loss.backward()
            losses.append(loss.detach() * cfg.system.gradient_accumulation)

        # Optimizer step
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), cfg.optimizer.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            raise models.ModelError(
                f"step {step}: gradient norm is {norm.item()}; lower optimizer.params.learning_rate"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(unet)

        # Log
        images = (step + 1) * global_batch
        if (step + 1) % e.log_every == 0 or step + 1 == last:
            value = dist.mean(torch.stack(losses).mean()).item()
            lr = optimizer.param_groups[0]["lr"]
            telemetry.log(images, {"loss": value, "lr": lr, "grad_norm": norm.item(), "data_wait": waited})
            losses, waited = [], 0.0

        # Save
        if (step + 1) % e.save_every == 0 or step + 1 == last:
            with telemetry.excluded():
                if here.main:
                    state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict()}
                    state["ema"] = ema.state_dict() if ema else None
                    checkpoint.save(
                        saves, images, state, keep={*ends.values()}, only_most_recent=e.save_only_most_recent
                    )
                dist.barrier()
    telemetry.close()

    # Export
    if here.main:
        pipeline = checkpoint.export_pipeline(result / "pipeline", parts, ema.module if ema else unet)
        checkpoint.point_link(folder / "pipeline", pipeline)
        if e.eval_caption_file:
            sample_captions(cfg, pipeline, result / "eval.png", device)
        facts = {"images": last * global_batch, "steps": last, "fingerprint": key, "sources": sources}
        facts |= {
            "pipeline": str(pipeline),
            "log": str(folder / "log.jsonl"),
            "resolution": cfg.dataset.params.resolution,
        }
        facts |= {
            "world_size": here.size,
            "global_batch": global_batch,
            "samples": dataset.source.kept,
            "dropped": dataset.dropped,
            "lost": dict(dataset.lost),
        }
        config.write_json(result / "train.json", {**facts, "code": config.code_digest(), "versions": config.versions()})
        checkpoint.finish_milestone(saves, milestone)
        print(f"{result / 'train.json'}: {pipeline}", flush=True)
    dist.barrier()


def sample_captions(cfg, pipeline: Path, output: Path, device) -> None:
    """A grid of images of the first captions of `experiment.eval_caption_file`."""
    captions = Path(cfg.experiment.eval_caption_file).read_text().split("\n")
    captions = [c.strip() for c in captions if c.strip()][: cfg.experiment.num_eval_images]
    pipe = sampling.load_pipeline(pipeline, device)
    options = {"guidance_scale": 5.0, "steps": 25, "seed": cfg.experiment.seed, "batch_size": cfg.system.batch_size}
    sampling.grid(list(sampling.generate(pipe, captions, cfg.dataset.params.resolution, **options))).save(output)


def main(argv: list[str]) -> None:
    cfg, _ = config.command_line(argv, schema.StageConfig, __doc__)
    expected = (dist.DistError, models.ModelError, loader.DataError, tars.ShardError, checkpoint.CheckpointError)
    d = cfg.distributed
    try:
        here, device = dist.start(cfg.system.dist_backend, cfg.system.dist_url, d.timeout_minutes)
        with checkpoint.lock(run_folder(cfg), cfg.experiment.wait_minutes) if here.main else contextlib.nullcontext():
            train(cfg, here, device)
    except expected as error:
        print(
            f"error: {error}" if dist.world().main else f"rank {dist.world().rank} ends: {error}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # ranks that wait in a collective must not keep this one from ending
    dist.stop()


if __name__ == "__main__":
    main(sys.argv)
