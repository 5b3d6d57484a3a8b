"""Turn a selection into WebDataset shards with img2dataset, or take shards that exist, and write their manifest."""

from __future__ import annotations

import difflib
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from sdtrain import config as cf
from sdtrain import schema
from sdtrain.shards import ShardError, ShardWriter, index_tar, sha256_file, write_manifest

CONTENT = ("image_size", "resize_mode", "samples_per_shard", "encode_quality", "columns")  # what decides the bytes
RESERVED = (
    "key caption url width height original_width original_height status error_message exif md5 sha256 sha512".split()
)
INTERVAL = 1  # seconds between updates of the progress bar; ten times that in a log
GRACE = 10  # seconds for img2dataset to end by itself
REASONS = 20  # kinds of failure told apart in the manifest


class BuildError(RuntimeError):
    """Shards that cannot be built; the message says what failed, why, and the remedy."""


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = cf.command_line(argv, schema.ShardsConfig, __doc__, split="train", selection="", output=None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `download` ends its child
    try:
        manifest = adopt(config, own) if config.path else build(config, own["selection"], own["output"])
    except (cf.ConfigError, ShardError, BuildError) as error:
        raise SystemExit(f"error: {error}") from None
    size = f"{len(manifest['shards'])} shards, {manifest['samples']:,} samples, {manifest['bytes'] / 1e6:.1f} MB"
    print(f"{own['output']}: {size}, {sum(manifest['dropped'].values()):,} dropped")


def adopt(config: DictConfig, own: dict[str, str]) -> dict:
    """Write the manifest of shards that exist, where they are; their paths are in brace notation."""
    from webdataset.shardlists import expand_urls  # here, because it imports torch

    path = config.path if own["split"] == "train" else config.held_out_path
    if not path:
        raise BuildError(
            "shards.held_out_path: name the shards that the metrics compare with, such as a validation set"
        )
    return write_manifest(own["output"], "images", [Path(p) for p in expand_urls(path)], {}, {"path": path})


def build(config: DictConfig, selection: str, output: str) -> dict:
    """Download the selection's images into tars beside `output`, in a folder of their own, and write the manifest.

    A build that was cut short goes on where it was; a change of the selection or of an option that decides the
    content starts in another folder. Raises BuildError where too few images arrive.
    """
    if not selection:
        raise cf.ConfigError("selection=…: missing; name a selected.parquet, or set shards.path to shards that exist")
    rows = check_selection(selection, list(config.columns))
    options = OmegaConf.to_container(config)
    made_by = {key: options[key] for key in CONTENT} | {"selection": sha256_file(selection)}
    folder = Path(output).parent / cf.fingerprint(made_by)
    with locked(folder):
        forget_damaged(folder)
        download(config, selection, folder, rows)
        dropped = judge(folder, rows, config.min_success_rate)
        shards = [shard for shard in sorted(folder.glob("*.tar")) if index_tar(shard)]
        for shard in shards:
            put_in_order(shard)
        return write_manifest(output, "images", shards, dropped, made_by)


def check_selection(selection: str, columns: list[str]) -> int:
    """The rows of the selection. Raises BuildError for an unreadable or empty one, ConfigError for wrong columns."""
    try:
        file = pq.ParquetFile(selection)
    except (OSError, ValueError) as error:
        raise BuildError(f"{selection}: cannot read the selection: {error}") from None
    if not file.metadata.num_rows:
        raise BuildError(f"{selection}: no rows; a held-out part needs select.held_out.fraction above 0")
    for column in columns:
        if column in RESERVED:
            raise cf.ConfigError(f"shards.columns: {column} is written by img2dataset itself; take it off the list")
        if column not in file.schema_arrow.names:
            near = difflib.get_close_matches(column, file.schema_arrow.names, 1)
            hint = f"did you mean {near[0]}?" if near else f"columns here: {', '.join(file.schema_arrow.names)}"
            raise cf.ConfigError(f"shards.columns: {selection} has no column {column}; {hint}")
    return file.metadata.num_rows


# ---------------------------------------------------------------- img2dataset
@contextmanager
def locked(folder: Path):
    """Hold the folder alone: a killed build may have left an img2dataset that still writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)  # img2dataset holds it too, as long as it lives
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"{folder}: another build still writes there; wait for it, or end it") from None
        yield


def download(config: DictConfig, selection: str, folder: Path, rows: int) -> None:
    """Run img2dataset into `folder`, showing progress; shards it has finished before are left as they are."""
    log = folder / "img2dataset.log"
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    with open(log, "wb") as out, tqdm(total=rows, unit="img", desc="img2dataset") as bar:
        child = subprocess.Popen(
            command(config, selection, folder), stdout=out, stderr=subprocess.STDOUT, env=environment, close_fds=False
        )
        try:
            while child.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(INTERVAL if sys.stderr.isatty() else 10 * INTERVAL)
                show_progress(bar, folder)
        finally:
            end(child)
    if child.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
        raise BuildError(f"img2dataset failed: {lines[-1].strip()}; all it said is in {log}")


def end(child: subprocess.Popen) -> None:
    """End img2dataset, if it still runs, as Ctrl-C does: only then does it end the processes it started."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def command(config: DictConfig, selection: str, folder: Path) -> list[str]:
    """The img2dataset command line."""
    options = {
        "url_list": selection,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": folder,
        "output_format": "webdataset",
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        "resize_only_if_bigger": True,
        "encode_quality": config.encode_quality,
        "number_sample_per_shard": config.samples_per_shard,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": config.timeout,
        "retries": config.retries,
        "enable_wandb": False,
        "incremental_mode": "incremental",
    }
    if config.columns:
        options["save_additional_columns"] = json.dumps(list(config.columns))
    return [find_img2dataset(), *(f"--{key}={value}" for key, value in options.items())]


def find_img2dataset() -> str:
    """img2dataset lives in an environment of its own: $IMG2DATASET, the PATH, or .venv-data."""
    ours = Path(__file__).resolve().parents[2] / ".venv-data/bin/img2dataset"
    found = os.environ.get("IMG2DATASET") or shutil.which("img2dataset") or (str(ours) if ours.exists() else None)
    if not found or not shutil.which(found):
        raise BuildError(f"img2dataset is not there ({found or 'PATH, .venv-data'}); install it with: make env")
    return found


def read_stats(folder: Path) -> dict[Path, dict]:
    """img2dataset's statistics of each finished shard, by file; one it is just writing is left out."""
    stats = {}
    for path in sorted(folder.glob("*_stats.json")):
        try:
            stats[path] = json.loads(path.read_text())
        except ValueError:
            continue
    return stats


def forget_damaged(folder: Path) -> None:
    """Drop the statistics of shards that are not whole any more: img2dataset makes them again."""
    for path, stats in read_stats(folder).items():
        shard = Path(str(path).replace("_stats.json", ".tar"))
        try:
            whole = len(index_tar(shard)) == stats["successes"]
        except ShardError:
            whole = False
        if not whole:
            path.unlink()


def show_progress(bar: tqdm, folder: Path) -> None:
    """Rows of finished shards; bytes of all tars, which grow in between."""
    stats = read_stats(folder).values()
    size = sum(os.path.getsize(tar) for tar in glob.glob(f"{folder}/*.tar"))
    bar.set_postfix(ok=sum(s["successes"] for s in stats), MB=round(size / 1e6, 1), refresh=False)
    bar.n = sum(s["count"] for s in stats)
    bar.refresh()


def judge(folder: Path, rows: int, min_success_rate: float) -> dict[str, int]:
    """Lost images by reason, from the statistics: img2dataset ends well even if every download failed.

    Raises BuildError below `min_success_rate`; shards below it are forgotten, so that the next attempt asks again.
    """
    stats = read_stats(folder)
    successes = sum(s["successes"] for s in stats.values())
    reasons = Counter()
    for s in stats.values():
        for reason, count in s["status_dict"].items():
            if reason != "success":  # paths and addresses would make every failure a kind of its own
                reasons[re.sub(r"'[^']*'|\S+://\S+", "…", reason)] += count
    unseen = rows - sum(s["count"] for s in stats.values())
    if unseen:
        reasons["shard not finished"] += unseen
    dropped = dict(reasons.most_common(REASONS))
    if len(reasons) > REASONS:
        dropped["other"] = reasons.total() - sum(dropped.values())
    if not successes or successes < min_success_rate * rows:
        for path, s in stats.items():
            if not s["successes"] or s["successes"] < min_success_rate * s["count"]:
                path.unlink()
        table = "\n".join(f"{count:>10,}  {reason}" for reason, count in dropped.items())
        raise BuildError(
            f"{successes:,} of {rows:,} images arrived, below shards.min_success_rate {min_success_rate}:\n"
            f"{table}\ncheck the network and the URLs and run again, or lower shards.min_success_rate"
        )
    return dropped


def put_in_order(shard: Path) -> None:
    """Sort a tar by key and drop its times: downloads end in any order, the same images should give the same tar."""
    samples = sorted(index_tar(shard), key=lambda sample: sample.key)
    with TemporaryDirectory(dir=shard.parent) as aside, ShardWriter(aside, len(samples)) as writer:
        for sample in samples:
            writer.add(sample.key, {extension: sample.read(extension) for extension in sorted(sample.fields)})
        os.replace(writer.paths[0], shard)


if __name__ == "__main__":
    main(sys.argv)
