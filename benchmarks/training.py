"""Compare the training step with its alternatives, on this machine's CPU, and on its GPU if it has one.

DDP and FSDP2 on two ranks; a background save and torch.save; the EMA and that of diffusers; the whole step and a plain
loop of diffusers' components. On a GPU: the UNet of configs/sd-v1.yaml at 256 px with each setting on and off, from
prepared latents and text states, so that only the step is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from torch import nn

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.load import load_config, load_run
from sdtrain.training import checkpoint, objective, parallel, telemetry
from sdtrain.training.diffusion_task import QUARTILES, DiffusionTask
from sdtrain.training.ema import Ema, trainable
from sdtrain.training.optimizer import build_optimizer, state_by_name
from sdtrain.training.step import Gradient, Sizes, all_reduce_report, apply_gradient, compute_gradient

M_MMAP_THRESHOLD = -3  # option of mallopt
CPU, ALONE = torch.device("cpu"), distributed.World(0, 1, 0, "single")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of Stable Diffusion 1
ROUNDS, BATCH, SIDE, TOKENS = 5, 4, 16, 16
SMALL = {  # 35 M weights
    "sample_size": SIDE,
    "block_out_channels": [128, 256, 384],
    "layers_per_block": 1,
    "cross_attention_dim": 256,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
LATENTS_256, STATES_77, SWEEP = 32, 77, (16, 32, 64, 128, 256)  # side of the latents, tokens, images per micro-batch
SWITCHES = {"bf16": True, "channels_last": True, "fused": True, "compile": "blocks", "checkpointing": False}
CHANGES = (
    {"compile": None},
    {"compile": "model"},
    {"channels_last": False},
    {"fused": False},
    {"checkpointing": True},
    {"bf16": False},
)


# ---------------------------------------------------------------- the two loops
def inputs(unet: nn.Module, images: int, side: int, tokens: int, device: torch.device, seed: int) -> dict:
    """Return random latents and text states, like those of a LatentDataset with cached text."""
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(images, unet.config.in_channels, side, side, generator=random)
    text = torch.randn(images, tokens, unet.config.cross_attention_dim, generator=random)
    return {"latents": latents.to(device), "text": text.to(device)}


class Ours(DiffusionTask):
    """The step of the training loop, on one batch."""

    def __init__(self, params: dict, images: int, side: int, tokens: int, device=CPU, here=ALONE, strategy="ddp", **on):
        torch.manual_seed(0)
        self.sizes, self.number = Sizes(here.rank, here.size, images, here.size * images), 0
        unet, bf16 = UNet2DConditionModel(**params).to(device).train(), on.get("bf16", False)
        self.batch = inputs(unet, images, side, tokens, device, seed=here.rank) | {"lost": {}}
        self.dataset = SimpleNamespace(empty_text=torch.zeros(1, tokens, unet.config.cross_attention_dim))
        optimizer = load_config(schema.OptimizerConfig, values={"fused": on.get("fused", True)})
        self.settings = SimpleNamespace(objective=load_config(schema.ObjectiveConfig), optimizer=optimizer)
        self.settings.experiment = SimpleNamespace(seed=0)
        self.losses = [f"q{i + 1}" for i in range(QUARTILES)]
        if on.get("checkpointing"):
            unet.enable_gradient_checkpointing()
        if on.get("channels_last"):
            unet.to(memory_format=torch.channels_last)
        parallel.compile_model(unet, on.get("compile"))
        model = parallel.spread(unet, strategy, here.size, device, bf16)
        self.optimizer = build_optimizer(unet, optimizer)
        self.module, self.model, self.ema = unet, model, Ema(unet, 0.9999)
        self.process = objective.process_of(DDPMScheduler(**SCHEDULE)).to(device)
        self.latents_shape, self.device = self.batch["latents"].shape[1:], device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.layout = torch.channels_last if on.get("channels_last") else torch.contiguous_format

    def step(self) -> float:
        """Take one optimizer step of one micro-batch; return the loss of all ranks."""
        loss = self.backward()
        self.update()
        return loss

    def backward(self) -> float:
        """Compute the gradient and the report of all ranks; return the loss of all ranks."""
        n = self.sizes.global_batch
        gradient = compute_gradient(self, lambda: self.batch, self.number * n, self.sizes)
        return sum(all_reduce_report(gradient, [0.0] * 4).losses) / n

    def update(self) -> None:
        """Update weights and moving average."""
        self.number += 1
        apply_gradient(self, self.optimizer, self.number)
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict:
        """Return the state that a checkpoint contains."""
        moments = state_by_name(self.optimizer, self.module)
        return {"unet": trainable(self.module), "optimizer": moments, "ema": self.ema.weights}

    def bytes(self) -> int:
        """Return the bytes of this rank's weights, gradients, optimizer state and EMA."""
        weights = list(self.module.parameters())
        moments = [t for w in weights for t in self.optimizer.state[w].values()]
        held = [*weights, *(w.grad for w in weights), *moments, *self.ema.weights.values()]
        return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held)


class Plain:
    """The loop of diffusers' examples: one process, noise of its scheduler, torch's AdamW, its EMAModel."""

    def __init__(self, params: dict, images: int, side: int, tokens: int, device=CPU, bf16=False):
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(**params).to(device).train()
        self.batch = inputs(self.unet, images, side, tokens, device, seed=0)
        self.scheduler = DDPMScheduler(**SCHEDULE)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, betas=(0.9, 0.98))
        self.ema = EMAModel(self.unet.parameters(), decay=0.9999)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def step(self) -> float:
        """Take one optimizer step of one micro-batch; return its loss."""
        latents, text = self.batch["latents"], self.batch["text"]
        noise = torch.randn_like(latents)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        with self.autocast:
            output = self.unet(self.scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=text).sample
        loss = nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return loss.item()


# ---------------------------------------------------------------- two ranks
def memory(key: str) -> int:
    """Return this process's memory in bytes: VmRSS, the present one, or VmHWM, the peak."""
    return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def rank(number: int, strategy: str, meeting: str, threshold: int | None, parent) -> None:
    """Run one of two ranks: take a step at each request of the parent, then send the measurements.

    Blocks of more than `threshold` bytes go back to the system when they are freed; None leaves it to glibc.
    """
    if threshold is not None:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, threshold)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    here, device = distributed.start("gloo", f"file://{meeting}")
    before, held = memory("VmRSS"), 0
    training = Ours(SMALL, BATCH, SIDE, TOKENS, device, here, strategy)
    while parent.recv():
        distributed.barrier()
        begin = time.perf_counter()
        loss = training.backward()
        held = held or training.bytes()  # while gradients exist
        training.update()
        parent.send((loss, time.perf_counter() - begin))
    peak, zeros = memory("VmHWM") - before, torch.zeros(QUARTILES, dtype=torch.float64)
    empty = Gradient(zeros, zeros, zeros.sum(), 0.0, 0)
    reports = [seconds(lambda: all_reduce_report(empty, [0.0] * 4)) for _ in range(50)]
    parent.send({"held": held, "peak": peak, "report": statistics.median(reports)})
    distributed.stop()


def pair(strategy: str, folder: str, threshold: int | None) -> list:
    """Start two ranks in separate processes; return the pipes to them."""
    context, pipes = multiprocessing.get_context("fork"), []
    for number in range(2):
        here, there = context.Pipe()
        arguments = (number, strategy, f"{folder}/{strategy}", threshold, there)
        context.Process(target=rank, args=arguments, daemon=True).start()
        there.close()  # so that the pipe ends when the rank ends
        pipes.append(here)
    return pipes


def ask(pipes: list, more: bool) -> list:
    """Let both ranks take a step, or end; return their answers."""
    for pipe in pipes:
        pipe.send(more)
    return [pipe.recv() for pipe in pipes]


def run_pairs(steps: int, threshold: int | None = None) -> tuple[dict, dict]:
    """Run steps of FSDP2 and DDP on two ranks alternately; return loss and seconds of each, and the measurements."""
    found = {"fsdp": [], "ddp": []}
    with tempfile.TemporaryDirectory() as folder:
        pairs = {name: pair(name, folder, threshold) for name in found}
        for _ in range(steps):
            for name, pipes in pairs.items():
                found[name].append(ask(pipes, True)[0])
        return found, {name: ask(pipes, False) for name, pipes in pairs.items()}


def compare_strategies() -> None:
    """Compare FSDP2 and DDP, with and without returning freed memory to the system, since glibc keeps much of it."""
    found, ends = run_pairs(ROUNDS + 1)
    returned = run_pairs(3, threshold=65536)[1]
    for what, key, measured in (
        ("weights, gradients, optimizer, EMA: MB a rank", "held", ends),
        ("peak memory, MB a rank", "peak", ends),
        ("  where what is freed is given back", "peak", returned),
    ):
        row(what, *(([max(e[key] for e in measured[name]) / 1e6], name.upper()) for name in found))
    (losses, times), (others, other_times) = (zip(*found[name], strict=True) for name in found)
    row("step of two ranks, s", (times[1:], "FSDP"), (other_times[1:], "DDP"))
    apart = max(abs(a - b) / b for a, b in zip(losses, others, strict=True))
    print(f"{'  whose losses differ by at most':48} {apart:10.0e} of them, in {len(losses)} steps")
    print(f"{'report of a step between two ranks, ms':48} {1000 * ends['ddp'][0]['report']:10.2f}", flush=True)


# ---------------------------------------------------------------- one process
def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turn(*works: Callable[[], object]) -> list[list[float]]:
    """Return wall times of alternating calls, so that a slower machine slows all; the first round is a warm-up."""
    rounds = [[seconds(work) for work in works] for _ in range(ROUNDS + 1)]
    return [list(times) for times in zip(*rounds[1:], strict=True)]


def row(what: str, ours: tuple[list[float], str], others: tuple[list[float], str]) -> None:
    """Print a line of the table: labelled medians, and the median of the ratios per round."""
    ratio = statistics.median(a / b for a, b in zip(ours[0], others[0], strict=True))
    sides = (f"{statistics.median(numbers):10.4g} {name:17}" for numbers, name in (ours, others))
    print(f"{what:48}", *sides, f"{ratio:5.2f}", flush=True)


def compare_loops() -> Ours:
    """Compare the whole step and the EMA with the plain loop; return our training."""
    ours, plain = Ours(SMALL, BATCH, SIDE, TOKENS), Plain(SMALL, BATCH, SIDE, TOKENS)
    rates = [[BATCH / taken for taken in times] for times in in_turn(ours.step, plain.step)]
    row("images a second of one process", (rates[0], "our step"), (rates[1], "plain loop"))
    unet, weights = ours.module, list(ours.module.parameters())
    foreach = EMAModel(weights, decay=0.9999, foreach=True)
    updates = (lambda: ours.ema.update(unet, 100), lambda: plain.ema.step(weights), lambda: foreach.step(weights))
    times = [[1000 * taken for taken in found] for found in in_turn(*updates)]
    row("moving average, ms", (times[0], "Ema"), (times[1], "EMAModel"))
    row("moving average, ms", (times[0], "Ema"), (times[2], "EMAModel, foreach"))
    return ours


def compare_saves(training: Ours) -> None:
    """Compare a background save, which reaches the disk, and torch.save, which leaves that to the system.

    Measure how long the loop is blocked, and the processor time of all threads (lost to the loop if no core is idle).
    """

    def background() -> float:
        begin = seconds(lambda: saves.save(next(numbers)))
        while not saves.settled():
            time.sleep(0.01)  # here the loop would continue
        return begin + seconds(saves.finish)

    with tempfile.TemporaryDirectory() as folder:
        saves, numbers = checkpoint.Checkpoints(f"{folder}/saves", training.state(), keep=1), iter(range(ROUNDS))
        stalls, plain, work, plain_work = [], [], [], []
        for _ in range(ROUNDS):
            begin = time.process_time()
            stalls.append(background())
            middle = time.process_time()
            plain.append(seconds(lambda: torch.save(training.state(), f"{folder}/plain")))
            work.append(middle - begin)
            plain_work.append(time.process_time() - middle)
    row("loop stands still for a save, s", (stalls, "Checkpoints"), (plain, "torch.save"))
    row("processor time of a save, s", (work, "Checkpoints"), (plain_work, "torch.save"))


# ---------------------------------------------------------------- the GPU
def sd_v1_unet() -> dict:
    """Return the arguments of the UNet of sd-v1."""
    return OmegaConf.to_container(load_run("sd-v1")[0].model.unet.params)


def speed(pipe, kind: type, images: int, steps: int, switches: dict) -> None:
    """Send images/s, MFU and peak bytes of sd-v1's UNet at 256 px to the pipe, or None if the batch is too large."""
    device, params = distributed.only_device(), sd_v1_unet()
    try:
        training = kind(params, images, LATENTS_256, STATES_77, device, **switches)
        for _ in range(5):  # the first step compiles
            training.step()
        torch.cuda.synchronize()
        taken = seconds(lambda: ([training.step() for _ in range(steps)], torch.cuda.synchronize()))
    except torch.OutOfMemoryError:
        return pipe.send(None)
    rate, peak = images * steps / taken, telemetry.peak_flops(device, switches["bf16"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**params)
    flops = telemetry.training_flops(unet, training.batch["latents"].shape[1:], training.batch["text"].shape[1:])
    pipe.send((rate, rate * flops / peak if peak else float("nan"), torch.cuda.max_memory_allocated()))


def gpu_row(kind: type, images: int, steps: int, name: str, switches: dict, plain: float | None) -> float | None:
    """Print a line of the GPU's table, measured in a separate process; return images/s."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=speed, args=(there, kind, images, steps, switches), daemon=True).start()
    there.close()
    found = here.recv()
    if found is None:
        print(f"{name:28} {images:6} out of memory", flush=True)
        return None
    rate, mfu, used = found
    print(f"{name:28} {images:6} {rate:8.1f} {mfu:7.1%} {used / 1e9:10.1f} {rate / (plain or rate):8.2f}", flush=True)
    return rate


def compare_on_gpu(steps: int) -> None:
    """Compare on the UNet of sd-v1: the plain loop, each setting reversed, then micro-batch sizes."""
    print(
        f"\n{torch.cuda.get_device_name()}, UNet of sd-v1, 256 px, {steps} steps; all on: bf16, channels_last, fused,"
    )
    print("compiled by blocks, no gradient checkpointing")
    print(f"{'switches':28} {'images':>6} {'img/s':>8} {'MFU':>7} {'memory GB':>10} {'/ plain':>8}")
    plain = gpu_row(Plain, 64, steps, "plain loop, bf16", {"bf16": True}, None)
    for change in CHANGES:
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        gpu_row(Ours, 64, steps, name, SWITCHES | change, plain)
    for images in SWEEP:
        gpu_row(Ours, images, steps, "all on", SWITCHES, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-steps", type=int, default=100, help="steps of each line of the GPU's table")
    steps = parser.parse_args().gpu_steps
    torch.set_num_threads(1)
    weights = sum(p.numel() for p in UNet2DConditionModel(**SMALL).parameters())
    print(f"UNet of {weights / 1e6:.0f} M weights, {BATCH} images a micro-batch and rank; medians of {ROUNDS} rounds")
    print(f"{'':48} {'this':>10} {'':17} {'against':>10} {'':17} ratio")
    compare_strategies()
    compare_saves(compare_loops())
    if torch.cuda.is_available():
        compare_on_gpu(steps)


if __name__ == "__main__":
    main()
