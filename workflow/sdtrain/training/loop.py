"""The training loop of this project: from the last checkpoint of a task to its milestone, and its export."""

from __future__ import annotations

import math

import torch

from sdtrain import distributed
from sdtrain.config.fingerprint import code_digest, record_fingerprint, versions
from sdtrain.data.stream import batches, prefetched
from sdtrain.training import checkpoint, identity, parallel
from sdtrain.training.ema import trainable
from sdtrain.training.optimizer import build_optimizer, learning_rate, state_by_name
from sdtrain.training.progress import Progress
from sdtrain.training.step import Sizes, all_reduce_report, apply_gradient, compute_gradient
from sdtrain.training.task import Task
from sdtrain.training.telemetry import Telemetry, start_wandb


def train(task: Task, here: distributed.World, device: torch.device, stop: distributed.StopHandler) -> bool:
    """Train from the last checkpoint to the milestone, and export it. Return False if a signal came before."""
    s, e = task.settings, task.settings.experiment
    if s.system.threads:
        torch.set_num_threads(s.system.threads)
    torch.manual_seed(e.seed)

    # Sizes: steps count optimizer steps, images count those of all ranks
    micro_batch, global_batch = parallel.batch_sizes(s.system, here.size)
    steps = math.ceil(e.num_examples_to_see / global_batch)
    last = math.ceil(s.milestone / global_batch)
    ends = {m: math.ceil(m / global_batch) * global_batch for m in s.milestones}  # each with a whole batch
    previous = max((end for m, end in ends.items() if m < s.milestone), default=-1)

    # Folder: checkpoints are keyed by all that decides the weights
    distributed.barrier()  # rank 0 may have waited for another process to finish
    own = task.identify(global_batch)
    if distributed.broadcast_object(s.requeue and record_fingerprint(task.record) == own.key):
        if here.is_main:
            print(f"{task.record}: finished already", flush=True)
        return True
    if here.is_main:
        identity.claim(own, anew=not s.requeue)
        (own.folder / "requeue").unlink(missing_ok=True)

    # Data, network, optimizer
    task.build(here, device, global_batch)
    optimizer = build_optimizer(task.module, s.optimizer)

    # State: with the configuration all that a resume needs, as every random number follows from an image's number
    progress = Progress(len(task.losses))
    state = {**task.state(), "optimizer": state_by_name(optimizer, task.module), **progress.state}
    group = distributed.cpu_group(s.timeout_minutes)
    saves = checkpoint.Checkpoints(
        own.saves, state, main=here.is_main, group=group, keep=s.keep_checkpoints, always={*ends.values()}
    )
    if here.is_main:
        checkpoint.start_milestone(saves, s.milestone, previous, identity.code())
        if not s.requeue:
            checkpoint.wipe(saves, -1)
    distributed.barrier()

    # Resume; a checkpoint before the first step shows early whether there is enough disk space
    first = 0
    if found := distributed.broadcast_object([i for i in saves.saved() if i <= last * global_batch]):
        saves.load(found[-1])
        first = found[-1] // global_batch
        if here.is_main:
            print(f"resumed at {found[-1]:,} images from {own.saves / str(found[-1])}", flush=True)
    elif last > 0:
        task.start_anew()
        saves.save(0)
        saves.finish()

    # Stream of batches from the position of the checkpoint, and the log
    if micro_batch is None:
        micro_batch = task.find_micro_batch(global_batch // here.size)
    sizes = Sizes(here.rank, here.size, micro_batch, global_batch)
    parallel.warm_up_ddp_buckets(task.model, lambda: task.dummy_pass(sizes.micro_batch))
    position = first * global_batch + progress["moved"]
    ranks = {"start": position, "rank": here.rank, "world_size": here.size}
    loaded = batches(task.dataset, micro_batch, **ranks, workers=s.loader.workers, max_lost=s.max_lost)
    stream = prefetched(loaded, s.loader.prefetch, pin=device.type == "cuda")
    logs = here.is_main and last > first
    telemetry = Telemetry(
        own.folder / "log.jsonl" if logs else None,
        total=last * global_batch,
        start=first * global_batch,
        label=task.label,
        wandb=start_wandb(task.reported, own.folder, own.run_id) if logs else None,
        quiet=not here.is_main,
        position=position,
        world_size=here.size,
        flops_per_image=task.flops,
        peak=task.peak,
        device=device,
    )
    if here.is_main:
        weights = sum(p.numel() for p in trainable(task.module).values()) / 1e6
        batch = f"global batch {global_batch} ({sizes.accumulation} x {micro_batch} per rank)"
        about = f"{task.dataset.describe()}; {weights:.1f} M weights, world size {here.size}, {batch}"
        print(f"{own.folder}: {about}, steps {first:,} to {last:,} of {steps:,}", flush=True)

    stop.listen()
    step, waited, lost = first, 0.0, 0
    while step < last and not stop.agreed:
        for weights_group in optimizer.param_groups:
            weights_group["lr"] = learning_rate(step, steps, s.lr_scheduler)

        # Gradient, then one all-reduce: losses, non-finite values, signals, finished saves, lost samples
        gradient = compute_gradient(task, lambda: next(stream), position, sizes)
        newly_lost, lost, waited = gradient.lost - lost, gradient.lost, waited + gradient.waited
        flags = [stop.name is not None, stop.name == "SIGUSR1", saves.settled(), newly_lost]
        report = all_reduce_report(gradient, flags)
        stop.agreed, stop.warned, settled = (bool(flag) for flag in report.flags[:3])

        # Optimizer step, or none if the loss or the gradient is not finite
        step, position = step + 1, position + global_batch
        progress.counts["lost"] += int(report.flags[3])
        if report.bad:
            progress.skip()
            telemetry.note(step * global_batch, "skipped step: non-finite loss or gradient norm", position)
        else:
            progress.learn(report.losses, report.images)
            apply_gradient(task, optimizer, progress["updates"])
        optimizer.zero_grad(set_to_none=True)
        if settled:
            saves.finish()

        # Rollback: after too many skipped steps in a row, resume from the last checkpoint with the data that follow
        if progress["in_a_row"] >= e.max_nonfinite:
            back = progress.roll_back(saves, step * global_batch, e.max_rollbacks)
            telemetry.rewind(back)
            telemetry.note(back, "rolled back to the last checkpoint", position)
            step, waited = back // global_batch, 0.0
            continue

        # Log
        images = step * global_batch
        if step % e.log_every == 0 or step == last:
            values = task.log_values(*progress.take_losses())
            values |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": gradient.norm.item()}
            values |= {"skipped": progress["skipped"], "data_wait": waited}
            telemetry.log(images, values, position)
            waited = 0.0

        # Save in the background, but not during a series of skipped steps; measure and draw what was learned
        due = (step % e.save_every == 0 and not report.bad) or step == last
        if due or stop.agreed:
            with telemetry.excluded():
                if due:
                    task.before_save(telemetry, images, position)
                saves.save(images)
                if due and not stop.agreed:
                    task.after_save(telemetry, images)
    saves.finish()
    stream.close()
    telemetry.close()

    # Stopped by a signal: everything is saved, and a file asks for a new start, since exit codes get lost on the way
    if step < last:
        if here.is_main:
            checkpoint.request_requeue(own.folder, step * global_batch, stop.warned)
        distributed.barrier()
        return False

    # Export
    facts = {"fingerprint": own.key, "sources": own.sources, "images": last * global_batch, "steps": last}
    facts |= {"world_size": here.size, "global_batch": global_batch}
    facts |= {name: progress[name] for name in ("lost", "skipped", "rollbacks")}
    exported = task.export(facts | {"code": code_digest(), "versions": versions()})
    if here.is_main:
        checkpoint.finish_milestone(saves, s.milestone, identity.code())
        print(f"{task.record}: {exported}", flush=True)
    distributed.barrier()
    return True
