"""Run img2dataset, which downloads images into tars: its options, its process, its statistics of a folder."""

from __future__ import annotations

import http
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from sdtrain.errors import ConfigError, SDTrainError, did_you_mean

SAME_NAMES = "image_size resize_mode encode_quality encode_format skip_reencode min_image_size max_aspect_ratio".split()
SAME_NAMES += ["disallowed_header_directives", "timeout", "retries", "user_agent_token"]
KEYS = {  # img2dataset's options, and the keys of `shards:` that set them
    **{name: name for name in SAME_NAMES},
    "number_sample_per_shard": "samples_per_shard",
    "save_additional_columns": "columns",
    "processes_count": "processes",
    "thread_count": "threads",
}
FIXED = {"url_col": "url", "caption_col": "caption", "resize_only_if_bigger": True}
OPTIONS = {  # what shards.options may hold: img2dataset's options that have no key of their own
    *("resize_only_if_bigger", "upscale_interpolation", "downscale_interpolation", "disable_all_reencoding"),
    *("max_image_area", "extract_exif", "compute_hash", "verify_hash", "bbox_col", "oom_shard_count"),
    "max_shard_retry",
}
ELSEWHERE = {  # options that shards.options must not contain, and the key to set instead
    **{option: f"shards.{key}" for option, key in KEYS.items()},
    "url_col": "table.columns.url",
    "caption_col": "table.columns.caption",
    "distributor": "shards.parts",
    "subjob_size": "shards.parts",
}
MAX_PIXELS = 2**27  # of an image that is decoded, into 400 MB
INTERVAL = 1  # seconds between two looks at img2dataset
LINE = 60  # seconds between two lines of progress if there is no terminal for a bar
STANDSTILL = 900  # seconds without a new byte after which img2dataset is taken to have lost a process
REASONS = 20  # kinds of failure that a manifest lists at most
MEANINGS = (  # messages of Python, OpenCV and img2dataset, and what they mean
    (r"would lead to an infinite loop", "redirects without end"),
    (r"IncompleteRead", "body cut off"),
    (r"timed out", "timed out"),
    (r"CV_IO_MAX_IMAGE_", f"more than {MAX_PIXELS:,} pixels"),
    (r"Image decoding error", "not a readable image"),
    (r"!buf.empty\(\)", "empty body"),
    (r"X-Robots-Tag", "disallowed by X-Robots-Tag"),
)
# Runs img2dataset in a process group of its own, and kills the whole group as soon as the pipe at its standard input is
# closed: by this process, or by its end, however it ends. img2dataset alone would leave workers that write on.
LEASH = 'exec 3<&0 </dev/null; (read -r _ <&3; kill -KILL 0) & exec "$@" 3<&-'

Stats = dict[str, dict[str, Any]]  # of each finished shard, by name


# ---------------------------------------------------------------- options
def img2dataset_options(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as options of img2dataset. Raise ConfigError for a wrong name in shards.options."""
    if config.encode_format == "png" and not 0 <= config.encode_quality <= 9:
        raise ConfigError("shards.encode_quality: must be between 0 and 9 for png, which takes it as compression")
    values: Any = OmegaConf.to_container(config)
    more = values["options"]
    for name in set(more) - OPTIONS:
        remedy = f"set {ELSEWHERE[name]} instead" if name in ELSEWHERE else ""
        remedy = remedy or f"not an option to set here{did_you_mean(name, sorted(OPTIONS))}"
        raise ConfigError(f"shards.options.{name}: {remedy}")
    options = FIXED | {option: values[key] for option, key in KEYS.items()} | more
    options["save_additional_columns"] = options["save_additional_columns"] or None
    return {key: value for key, value in options.items() if value is not None or key in more}


def command(config: DictConfig, folder: Path) -> list[str]:
    """Return img2dataset's command line. It reads each value as a Python literal."""
    options = img2dataset_options(config) | {
        "url_list": f"{folder}/rows.parquet",
        "input_format": "parquet",
        "output_folder": f"{folder}/download",
        "output_format": "webdataset",
        "enable_wandb": False,
        "incremental_mode": "incremental",
    }
    return [find_img2dataset(), *(f"--{key}={value!r}" for key, value in options.items())]


def find_img2dataset() -> str:
    """Return the path of img2dataset, which has an environment of its own: $IMG2DATASET, the PATH, or .venv-data."""
    ours = Path(__file__).resolve().parents[3] / ".venv-data/bin/img2dataset"
    found = os.environ.get("IMG2DATASET") or shutil.which("img2dataset") or (str(ours) if ours.exists() else None)
    if not found or not shutil.which(found):
        raise SDTrainError(f"img2dataset is not there ({found or 'PATH, .venv-data'}); install it with: make env")
    return found


# ---------------------------------------------------------------- process
def run_img2dataset(config: DictConfig, folder: Path, rows: int, settle: Callable[[], Stats], lock: int | None) -> None:
    """Download `folder`/rows.parquet until all shards are there; finished shards stay as they are.

    `settle` is called again and again and returns the statistics of finished shards. img2dataset inherits the file
    descriptor `lock`, so the lock is held as long as it lives.
    """
    log = folder / "img2dataset.log"
    settings = {"NO_ALBUMENTATIONS_UPDATE": "1", "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS)}
    with open(log, "wb") as out:
        child = subprocess.Popen(
            ["bash", "-c", LEASH, "img2dataset", *command(config, folder)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,
            pass_fds=[] if lock is None else [lock],
        )
        try:
            watch(child, folder, rows, settle)
        finally:
            if child.stdin:
                child.stdin.close()
            child.wait()
    if child.returncode:
        raise SDTrainError(f"img2dataset failed: {find_error(log)}; its whole output is in {log}")
    settle()


def watch(child: subprocess.Popen, folder: Path, rows: int, settle: Callable[[], Stats]) -> None:
    """Settle finished shards and show progress, as a bar or a line now and then, until img2dataset ends.

    Raise SDTrainError if nothing is written for STANDSTILL seconds: img2dataset waits forever for a worker that was
    killed.
    """
    terminal = sys.stderr.isatty()
    changed = shown = time.monotonic()
    last = None
    with tqdm(total=rows, unit="img", desc="img2dataset", disable=not terminal) as bar:
        while child.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(INTERVAL)
            stats = settle().values()
            images, size, now = sum(s["successes"] for s in stats), count_bytes(folder), time.monotonic()
            bar.n = sum(s["count"] for s in stats)
            bar.set_postfix(ok=images, MB=round(size / 1e6, 1))
            if not terminal and now - shown > LINE:
                shown = now
                print(f"img2dataset: {bar.n:,} of {rows:,} rows, {images:,} images, {size / 1e6:.1f} MB", flush=True)
            if (bar.n, size) != last:
                last, changed = (bar.n, size), now
            if now - changed > STANDSTILL:
                raise SDTrainError(f"img2dataset has stood still for {STANDSTILL} s in {folder}; run the same again")


def count_bytes(folder: Path) -> int:
    """Return the bytes of all tars and of img2dataset's tables, which grow while a shard is written."""
    size = 0
    for path in [*folder.glob("*.tar"), *folder.glob("download/*.tar"), *folder.glob("download/*.parquet")]:
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def find_error(log: Path) -> str:
    """Return the first error in a log, since others often follow from it; else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if re.match(r"[\w.]*error: ", line, re.IGNORECASE)), lines[-1])


# ---------------------------------------------------------------- statistics
def read_stats(folder: Path) -> Stats:
    """Return img2dataset's statistics of each finished shard, by name. A file that is half written is left out."""
    stats = {}
    for path in sorted(folder.glob("download/*_stats.json")):
        with suppress(ValueError):
            stats[path.name.removesuffix("_stats.json")] = json.loads(path.read_text())
    return stats


def count_reasons(stats: Iterable[dict[str, Any]], lost: int) -> dict[str, int]:
    """Return how many of the `lost` images failed for which reason, the most frequent first."""
    reasons: Counter[str] = Counter()
    for s in stats:
        for text, count in s["status_dict"].items():
            if text != "success":
                reasons[explain(text)] += count
    if unwritten := lost - reasons.total():  # img2dataset counts a download as a success before it writes it
        reasons["not written; see img2dataset.log"] = unwritten
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    dropped = dict(ranked[:REASONS])
    if len(ranked) > REASONS:
        dropped["other"] = sum(count for _, count in ranked[REASONS:])
    return dropped


def explain(text: str) -> str:
    """Return a failure in a few words, without addresses, paths and a server's own wording: one text for each kind."""
    for pattern, meaning in MEANINGS:
        if re.search(pattern, text):
            return meaning
    if match := re.match(r"HTTP Error (\d+)", text):
        with suppress(ValueError):
            return f"HTTP Error {match[1]}: {http.HTTPStatus(int(match[1])).phrase}"
        return f"HTTP Error {match[1]}"
    text = re.sub(r"<urlopen error (?:\[Errno -?\d+\] )?(.*)>", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"OpenCV\(\S+\) \S+ error: ", "", text)
    return " ".join(re.sub(r"'[^']*'|\S+://\S+", "…", text).split())[:100] or "unknown"
