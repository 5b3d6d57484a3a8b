"""Progress, throughput, model FLOPs, the JSONL log and wandb."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sdtrain.errors import ConfigError
from sdtrain.io.files import write_text
from sdtrain.io.logs import read_log_line

PEAKS = {  # TFLOP/s of one device: bf16 (fp16 where there is no bf16), TF32, fp32
    "B200": (2250, 1125, 75),
    "GB200": (2500, 1250, 80),
    "H200": (989, 494, 67),
    "H200 NVL": (835, 417, 60),
    "GH200": (989, 494, 67),
    "H100": (989, 494, 67),
    "H100 NVL": (835, 417, 60),
    "H100 PCIE": (756, 378, 51),
    "A100": (312, 156, 19.5),
    "A40": (150, 75, 37.4),
    "A30": (165, 82, 10.3),
    "A10": (125, 62.5, 31.2),
    "A10G": (70, 35, 35),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 5090": (209, 105, 105),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "RTX A6000": (155, 77.4, 38.7),
    "V100": (125, 15.7, 15.7),
    "V100 PCIE": (112, 14, 14),
    "T4": (65, 8.1, 8.1),
}
PLAIN = r"NVIDIA|TESLA|GEFORCE|SXM\d?|PCIE|HBM3E?|\d+GB?"  # words of a name that do not make another device of it


# ---------------------------------------------------------------- model FLOPs
def training_flops(unet: nn.Module, latents_shape: tuple[int, int, int], text_shape: tuple[int, int]) -> int:
    """Return the FLOPs of a forward and backward pass for one image of latents C x h x w and of text tokens x width.

    A multiply-add is 2. Return 0, with a warning, for a UNet that needs more inputs than these. They are counted on a
    copy without memory (device "meta") of a module that is not sharded. What gradient checkpointing or an attention
    kernel computes again is not counted, as in the MFU of PaLM (Chowdhery et al. 2022, arXiv 2204.02311).
    """
    try:
        twin = _without_memory(unet)
        twin.disable_gradient_checkpointing()
        twin.disable_xformers_memory_efficient_attention()
        options: dict[str, Any] = {"device": "meta", "dtype": twin.dtype}
        latents, text = torch.empty(1, *latents_shape, **options), torch.empty(1, *text_shape, **options)
        with FlopCounterMode(display=False) as counter:
            twin(latents, torch.zeros(1, device="meta"), encoder_hidden_states=text).sample.sum().backward()
        return counter.get_total_flops()
    except Exception as error:  # of any kind: the training does not depend on it
        warnings.warn(f"no mfu is logged: the FLOPs of this UNet cannot be counted ({error})", stacklevel=2)
        return 0


def _without_memory(module: nn.Module) -> Any:
    """Return a copy on the device "meta", without copying any tensor."""
    memo = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(module, memo)


def peak_flops(device: torch.device, bf16: bool, override_tflops: float | None = None) -> float | None:
    """Return the dense peak of one device in FLOP/s; None for a CPU and an unknown device without `override_tflops`.

    The precision is bf16, or float32: TF32 where torch may use it for convolutions or products.
    From NVIDIA's data sheets of the data centre GPUs and its white papers on GA102, Ada and Blackwell: products of
    16 bits added up in float32, without sparsity (half of the figure where a sheet has only the one with it).
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    row = _peaks(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if row is None:
        return None
    backends: Any = torch.backends
    tf32 = "tf32" in (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision)
    return row[0 if bf16 else 1 if tf32 else 2] * 1e12


def _peaks(name: str) -> tuple[float, float, float] | None:
    """Return the row of PEAKS whose key has the most words of a device's name.

    Return None if the name has other words, such as that of a part of a GPU, or of a laptop's.
    """
    words = set(re.split(r"[\s-]+", name.upper()))
    for key in sorted(PEAKS, key=len, reverse=True):
        if words.issuperset(key.split()):
            return PEAKS[key] if all(re.fullmatch(PLAIN, word) for word in words.difference(key.split())) else None
    return None


# ---------------------------------------------------------------- the log
class Telemetry:
    """Report a training: a progress bar on a terminal, sparse lines elsewhere, one JSON line an entry, wandb if given.

    `total` and `start` are images; `position` is how far the stream of data was read at the start, in images too: more
    than `start` where a rollback left data out. `flops_per_image` and `peak` (FLOP/s of each of `world_size` devices)
    give the MFU; `device` is the one whose memory is logged.

    The file of a training that was killed and resumed is that of one that was not, but for what was measured. Each line
    has a position (written where it is not `images`), which only grows: a resume drops the lines past its own, since
    they come again. A rollback drops lines of metrics past its images, and leaves those of events.
    """

    def __init__(
        self,
        log: str | Path | None,
        total: int,
        start: int = 0,
        label: str = "train",
        wandb=None,
        quiet: bool = False,
        *,
        position: int | None = None,
        world_size: int = 1,
        flops_per_image: float = 0,
        peak: float | None = None,
        device: torch.device | None = None,
    ):
        self.wandb, self.total, self.label = wandb, total, label
        self.world_size, self.flops_per_image, self.peak, self.device = world_size, flops_per_image, peak, device
        self.log_path = Path(log) if log else None
        position = start if position is None else position
        self._drop_lines(lambda line: line.get("position", line["images"]) > position)
        self.terminal, self.quiet = sys.stderr.isatty() and not quiet, quiet
        self.bar = tqdm(total=total, initial=start, unit="img", desc=label, disable=not self.terminal, smoothing=0.1)
        self._printed = 0.0
        self._begin_window(start)

    def _drop_lines(self, unwanted: Callable[[dict], bool]) -> None:
        """Remove the unwanted lines, and one that a killed process left incomplete, from the file."""
        if self.log_path:
            text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
            kept = [line for line in text.splitlines() if (found := read_log_line(line)) and not unwanted(found)]
            write_text(self.log_path, "".join(f"{line}\n" for line in kept))

    def _begin_window(self, images: int) -> None:
        self._window, self._excluded = (time.perf_counter(), images), 0.0

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the time of saving or sampling inside the context from the throughput."""
        begin = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - begin

    def log(self, images: int, values: dict[str, float], position: int | None = None) -> dict:
        """Record values at `images` images seen and `position` of the stream. Returns the entry.

        Adds, of the time since the last call: images_per_second, of all and per GPU, mfu (0..1) where it is known,
        data_wait as a share (0..1) of that time, of which `values` have the seconds; and memory_gb, the device's peak
        since then, on a CPU the process's so far, in 10^9 bytes. What is not finite is left out: JSON knows no NaN.
        """
        entry = self._measured(images, values)
        self._begin_window(images)
        self._write(images, position, entry)
        self.bar.update(images - self.bar.n)
        self.bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", refresh=False)
        now = self._window[0]
        if not self.terminal and not self.quiet and (now - self._printed > 10 or images >= self.total):
            self._printed = now
            print(f"{self.label}: {self._progress(images, entry)}", flush=True)
        return {"images": images, **entry}

    def _measured(self, images: int, values: dict[str, float]) -> dict[str, float]:
        """Return `values` with what was measured in the window that ends now."""
        then, before = self._window
        seconds = max(1e-9, time.perf_counter() - then - self._excluded)
        rate = (images - before) / seconds
        entry = {**values, "images_per_second": rate, "images_per_second_per_gpu": rate / self.world_size}
        if self.flops_per_image and self.peak:
            entry["mfu"] = rate / self.world_size * self.flops_per_image / self.peak
        if "data_wait" in values:
            entry["data_wait"] = min(1.0, values["data_wait"] / seconds)
        return {**entry, "memory_gb": self._memory() / 1e9}

    def _memory(self) -> int:
        if self.device is None or self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def _progress(self, images: int, entry: dict[str, float]) -> str:
        rate = entry["images_per_second"]
        minutes, seconds = divmod(int((self.total - images) / max(rate, 1e-9)), 60)
        mfu = f", MFU {entry['mfu']:.1%}" if "mfu" in entry else ""
        loss = entry.get("loss", math.nan)
        return (
            f"{images:,} of {self.total:,} images, {rate:.1f} img/s{mfu}, loss {loss:.4f}, {minutes}:{seconds:02d} left"
        )

    def note(self, images: int, event: str, position: int | None = None, **facts) -> None:
        """Record and print an event at `images` images seen and `position` of the stream: a skipped step, a rollback.

        Do not note what a resume does not repeat, such as the resume itself.
        """
        self._write(images, position, {"event": event, **facts})
        if not self.quiet:
            about = "".join(f", {name} {value}" for name, value in facts.items())
            with tqdm.external_write_mode():
                print(f"{self.label}: {images:,} images: {event}{about}", flush=True)

    def _write(self, images: int, position: int | None, entry: dict) -> None:
        """Write one line to the file, and send it to wandb."""
        where = {} if position in (None, images) else {"position": position}
        line = {name: _short(value) for name, value in {"images": images, **where, **entry}.items() if _finite(value)}
        if self.log_path:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.wandb:
            self._send(lambda: self.wandb.log(line))

    def _send(self, call: Callable[[], None]) -> None:
        """Continue without wandb once it fails, for example if the system killed its process to free memory."""
        try:
            call()
        except Exception as error:  # of any kind: the training does not depend on it
            warnings.warn(
                f"wandb stopped ({error or type(error).__name__}); the training continues without it", stacklevel=4
            )
            self.wandb = None

    def rewind(self, images: int) -> None:
        """Remove the metrics past `images` images seen from the file; events stay."""
        self._drop_lines(lambda line: "event" not in line and line["images"] > images)
        self.bar.update(images - self.bar.n)
        self._begin_window(images)

    def log_image(self, images: int, path: str | Path) -> None:
        """Send an image file to wandb, if it is used."""
        if self.wandb:
            import wandb

            image = wandb.Image(str(path))
            self._send(lambda: self.wandb.log({"images": images, "samples": image}))

    def close(self) -> None:
        """Close the progress bar and the wandb run."""
        self.bar.close()
        if self.wandb:
            import wandb

            self._send(self.wandb.finish)
            self._send(wandb.teardown)  # waits for its service process, which writes the file


def _finite(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _short(value):
    """Return a float with six digits, which is enough for a learning rate or a loss."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---------------------------------------------------------------- wandb
def start_wandb(cfg: Any, folder: Path, run_id: str) -> Any:
    """Return a wandb run: online if a key is known, else offline. The key is written to no file and no log.

    `cfg` has the sections `wandb` and `experiment` of a stage. `run_id` names the run, so that a resumed training
    continues it. The key is wandb.api_key, WANDB_API_KEY or that of `wandb login`. Raise ConfigError if the server
    is not reached in WANDB_INIT_TIMEOUT seconds (by default 90) or refuses.
    """
    mode: Any = os.environ.get("WANDB_MODE") or cfg.wandb.mode
    if mode == "disabled":
        return None
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith("wandb.api_key=")]  # wandb records the command line
    import wandb  # here: a second of start-up that only the main rank of a real training pays

    if cfg.wandb.api_key:
        os.environ["WANDB_API_KEY"] = cfg.wandb.api_key
    os.environ.pop("WANDB_SERVICE", None)  # a parent's service process would outlive a kill and hold the run's id
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain.pop("wandb")
    try:
        known = mode != "offline" and _key_is_known()
        if mode == "online" and not known:  # on a terminal wandb would ask, and wait
            raise wandb.Error("no key is known: run wandb login, or set WANDB_API_KEY")
        run = wandb.init(
            project=cfg.experiment.project,
            entity=cfg.wandb.entity,
            name=cfg.experiment.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=mode or ("online" if known else "offline"),
            config=plain,
            # a network that is gone at the end must not hold a finished training: the data are on disk
            settings=wandb.Settings(silent=True, console="off", finish_timeout=600),
        )
    except (wandb.Error, ValueError) as error:
        wandb.teardown()
        reason = " ".join(str(error).split()).replace(os.environ.get("WANDB_API_KEY") or "\n", "the key")
        raise ConfigError(
            f"wandb.mode={mode or 'online'}: {reason}; correct that, or set wandb.mode=offline and upload "
            f"{folder / 'wandb'} later by wandb sync"
        ) from None
    run.define_metric("*", step_metric="images")  # wandb's own steps only grow, a rollback's images do not
    return run


def _key_is_known() -> bool:
    """Return whether the environment, wandb's settings or netrc has a key, without asking the server."""
    import wandb
    from wandb.sdk.lib import wbauth  # wandb.login would ask the server whose key it is

    settings = wandb.setup().settings
    return bool(settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=settings.base_url))
