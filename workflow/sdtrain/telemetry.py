"""Progress, images a second, a JSONL log that survives, and wandb: one small object."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm


class Telemetry:
    """Report a training: a progress bar on a terminal, sparse lines elsewhere, one JSON line an entry, wandb if given.

    `total` and `start` are images. A resumed run drops log lines past its start: the file holds each image once.
    """

    def __init__(
        self, log: str | Path | None, total: int, start: int = 0, label: str = "train", wandb=None, quiet=False
    ):
        self.wandb, self.total, self.label = wandb, total, label
        self.log_file = self._open_log(log, start) if log else None
        self.terminal, self.quiet = sys.stderr.isatty() and not quiet, quiet
        self.bar = tqdm(total=total, initial=start, unit="img", desc=label, disable=not self.terminal, smoothing=0.1)
        self._window = (time.perf_counter(), start)
        self._printed, self._excluded = 0.0, 0.0

    @staticmethod
    def _open_log(path: str | Path, start: int):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _images(line) <= start]
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(aside, path)
        return open(path, "a", buffering=1)

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave what is done inside, saving or sampling, out of the current throughput window."""
        begin = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - begin

    def log(self, images: int, values: dict[str, float]) -> dict:
        """Record values at `images` images seen; adds images a second since the last call. Returns the entry."""
        now, (then, before) = time.perf_counter(), self._window
        rate = (images - before) / max(1e-9, now - then - self._excluded)
        self._window, self._excluded = (now, images), 0.0
        entry = {"images": images, **values, "images_per_second": rate}
        if self.log_file:
            self.log_file.write(
                json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}) + "\n"
            )
        if self.wandb:
            self.wandb.log(entry, step=images)
        self.bar.update(images - self.bar.n)
        loss = values.get("loss", float("nan"))
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if not self.terminal and not self.quiet and (now - self._printed > 10 or images >= self.total):
            self._printed = now
            minutes, seconds = divmod(int((self.total - images) / max(rate, 1e-9)), 60)
            progress = f"{images:,} of {self.total:,} images, {rate:.1f} img/s"
            print(f"{self.label}: {progress}, loss {loss:.4f}, {minutes}:{seconds:02d} left", flush=True)
        return entry

    def close(self) -> None:
        """End the bar, the file and the wandb run."""
        self.bar.close()
        if self.log_file:
            self.log_file.close()
        if self.wandb:
            import wandb

            self.wandb.finish()
            wandb.teardown()  # waits for its service process, which writes the file


def start_wandb(cfg, folder: Path, run_id: str):
    """A wandb run for a stage: online where a key is known, else offline. The key reaches no file and no log.

    `run_id` names the run, so that a resumed training goes on in it.
    """
    key = cfg.wandb.api_key or os.environ.get("WANDB_API_KEY")
    mode = os.environ.get("WANDB_MODE") or cfg.wandb.mode or ("online" if key else "offline")
    if mode == "disabled":
        return None
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith("wandb.api_key=")]  # wandb records the command line
    import wandb  # here: a second of start-up that only the main rank of a real training pays

    if cfg.wandb.api_key:
        os.environ["WANDB_API_KEY"] = cfg.wandb.api_key
    os.environ.pop("WANDB_SERVICE", None)  # a parent's service process would outlive a kill and hold the run's id
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain.pop("wandb")
    return wandb.init(
        project=cfg.experiment.project,
        entity=cfg.wandb.entity,
        name=cfg.experiment.name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        mode=mode,
        config=plain,
        settings=wandb.Settings(silent=True, console="off"),
    )


def _images(line: str) -> int:
    try:
        return json.loads(line)["images"]
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut by a kill
