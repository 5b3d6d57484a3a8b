"""Download a part of a selection's images into WebDataset shards with img2dataset, and write their manifest."""

from __future__ import annotations

import difflib
import fcntl
import http
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import fingerprint
from sdtrain.data.manifest import read_part, write_manifest
from sdtrain.data.tars import ShardError, ShardWriter, index_tar
from sdtrain.errors import ConfigError, SDTrainError
from sdtrain.io.files import sha256_file

CONTENT = "image_size resize_mode samples_per_shard encode_quality encode_format skip_reencode min_image_size".split()
CONTENT += ["max_aspect_ratio", "columns", "disallowed_header_directives", "options"]  # what decides the bytes
OPTIONS = {  # what shards.options may hold: img2dataset's options without a key of their own
    *("resize_only_if_bigger", "upscale_interpolation", "downscale_interpolation", "disable_all_reencoding"),
    *("max_image_area", "extract_exif", "compute_hash", "verify_hash", "bbox_col", "oom_shard_count"),
    "max_shard_retry",
}
ELSEWHERE = {  # img2dataset's options, and the keys that set them
    "processes_count": "shards.processes",
    "thread_count": "shards.threads",
    "number_sample_per_shard": "shards.samples_per_shard",
    "save_additional_columns": "shards.columns",
    "url_col": "table.columns.url",
    "caption_col": "table.columns.caption",
    "distributor": "shards.parts",
    "subjob_size": "shards.parts",
}
RESERVED = (
    "key caption url width height original_width original_height status error_message exif md5 sha256 sha512".split()
)
MAX_PIXELS = 2**27  # of an image that is decoded; one of 400 MB
INTERVAL = 1  # seconds between two looks at img2dataset
LINE = 60  # seconds between lines where there is no terminal for a bar
STANDSTILL = 900  # seconds without a new byte after which img2dataset has lost a process
PATIENCE = 20  # seconds for an earlier build of the same output to end
REASONS = 20  # kinds of failure told apart in the manifest
MEANING = (  # what Python, OpenCV and img2dataset say, and what it means
    (r"would lead to an infinite loop", "redirects without end"),
    (r"IncompleteRead", "body cut off"),
    (r"timed out", "timed out"),
    (r"CV_IO_MAX_IMAGE_", f"more than {MAX_PIXELS:,} pixels"),
    (r"Image decoding error", "not a readable image"),
    (r"!buf.empty\(\)", "empty body"),
    (r"X-Robots-Tag", "disallowed by X-Robots-Tag"),
)
# img2dataset in a process group of its own, which is killed whole as soon as the pipe at its input is closed: by us, or
# by our own end, whatever it was. It would leave processes that write on.
LEASH = 'exec 3<&0 </dev/null; (read -r _ <&3; kill -KILL 0) & exec "$@" 3<&-'


class BuildError(SDTrainError, RuntimeError):
    """Shards that cannot be built; the message says what failed, why, and the remedy."""


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = command_line(argv, schema.ShardsConfig, __doc__, selection=None, part="0", parts="1", output=None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `download` ends its child
    try:
        manifest = build(config, own["selection"], *read_part(own["part"], own["parts"]), own["output"])
    except (ConfigError, ShardError, BuildError) as error:
        raise SystemExit(f"error: {error}") from None
    size = f"{len(manifest['shards'])} shards, {manifest['samples']:,} samples, {manifest['bytes'] / 1e6:.1f} MB"
    print(f"{own['output']}: {size}, {sum(manifest['dropped'].values()):,} dropped")


def build(config: DictConfig, selection: str, part: int, parts: int, output: str) -> dict:
    """Download rows [part * n // parts, (part + 1) * n // parts) of the selection, and write their manifest.

    The tars lie beside `output`, in a folder of their own. A build that was cut short goes on where it was; a change of
    the rows or of an option that decides the content starts in another folder. Keys begin with the part's number where
    there are several. Raises BuildError where too few images arrive.
    """
    columns = list_columns(config)
    total = check_selection(selection, columns, config.columns)
    begin, end = part * total // parts, (part + 1) * total // parts
    options = OmegaConf.to_container(config)
    img2dataset_options(config)  # refuses wrong ones before any work
    with locked(Path(output)) as lock:
        rows = Path(output).with_name(f".{Path(output).stem}.rows.tmp")
        write_rows(selection, begin, end, columns, rows)
        made_by = {key: options[key] for key in CONTENT} | {"rows": sha256_file(rows), "part": part, "parts": parts}
        folder = Path(output).parent / fingerprint(made_by)
        (folder / "download").mkdir(parents=True, exist_ok=True)
        os.replace(rows, folder / "rows.parquet")
        prefix = f"{part:03d}-" if parts > 1 else ""
        forget_damaged(folder)
        if len(settle(folder, prefix)) < math.ceil((end - begin) / config.samples_per_shard):
            download(config, folder, end - begin, prefix, lock)
        dropped = judge(folder, end - begin, config.min_success_rate)
        return write_manifest(output, "images", list(tars(folder).values()), dropped, made_by)


# ---------------------------------------------------------------- the part's rows
def list_columns(config: DictConfig) -> list[str]:
    """The columns of the selection that img2dataset reads, each once."""
    more = [config.options.get("bbox_col"), *(config.options.get("verify_hash") or [])[:1]]
    return list(dict.fromkeys(["url", "caption", *config.columns, *(name for name in more if name)]))


def check_selection(selection: str, columns: list[str], saved: list[str]) -> int:
    """The rows of the selection. Raises BuildError for an unreadable or empty one, ConfigError for wrong columns."""
    try:
        file = pq.ParquetFile(selection)
    except (OSError, ValueError) as error:
        raise BuildError(f"{selection}: cannot read the selection: {error}") from None
    if not file.metadata.num_rows:
        raise BuildError(f"{selection}: no rows; a held-out part needs select.held_out.fraction above 0")
    for name in columns:
        if name in saved and name in RESERVED:
            raise ConfigError(f"shards.columns: {name} is written by img2dataset itself; take it off the list")
        if name not in file.schema_arrow.names:
            near = difflib.get_close_matches(name, file.schema_arrow.names, 1)
            hint = f"did you mean {near[0]}?" if near else f"columns here: {', '.join(file.schema_arrow.names)}"
            raise ConfigError(f"shards.columns: {selection} has no column {name}; {hint}")
        if "binary" in str(file.schema_arrow.field(name).type):
            raise ConfigError(f"shards.columns: {name} holds bytes, which JSON cannot; take it off the list")
    return file.metadata.num_rows


def write_rows(selection: str, begin: int, end: int, columns: list[str], path: Path) -> None:
    """Write rows [begin, end) of the selection, batch by batch. Times and decimals become texts, as JSON needs."""
    file = pq.ParquetFile(selection)
    fields = [file.schema_arrow.field(name) for name in columns]
    rows = pa.schema([field.with_type(_json_type(field.type)) for field in fields])
    starts = [0]
    for group in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    groups = [g for g in range(file.num_row_groups) if begin < starts[g + 1] and starts[g] < end]
    position = starts[groups[0]] if groups else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, rows) as writer:
        for batch in file.iter_batches(row_groups=groups, columns=columns) if groups else ():
            low, high = max(begin - position, 0), min(end - position, len(batch))
            if low < high:
                piece = pa.Table.from_batches([batch.slice(low, high - low)]).select(columns)
                writer.write_table(piece.cast(rows))
            position += len(batch)


def _json_type(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) or pa.types.is_decimal(kind) else kind


# ---------------------------------------------------------------- img2dataset
@contextmanager
def locked(output: Path):
    """Hold the output alone, as a file descriptor. An earlier build that was killed may need a moment to end."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_name(f".{output.stem}.lock"), "w") as lock:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise BuildError(f"{output}: another build still writes it; wait for it, or end it") from None
                time.sleep(0.1)
        yield lock.fileno()


def download(config: DictConfig, folder: Path, rows: int, prefix: str, lock: int) -> None:
    """Run img2dataset until all shards are there; those that it has finished before are left as they are."""
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
            pass_fds=[lock],  # held by img2dataset too, as long as it lives
        )
        try:
            watch(child, folder, rows, prefix)
        finally:
            child.stdin.close()
            child.wait()
    if child.returncode:
        raise BuildError(f"img2dataset failed: {find_error(log)}; all it said is in {log}")
    settle(folder, prefix)


def find_error(log: Path) -> str:
    """The first error in a log, which others often follow; else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if re.match(r"[\w.]*error: ", line, re.IGNORECASE)), lines[-1])


def watch(child: subprocess.Popen, folder: Path, rows: int, prefix: str) -> None:
    """Put finished shards in order and show progress until img2dataset ends: as a bar, or a line now and then."""
    terminal = sys.stderr.isatty()
    changed = shown = time.monotonic()
    last = None
    with tqdm(total=rows, unit="img", desc="img2dataset", disable=not terminal) as bar:
        while child.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(INTERVAL)
            stats = settle(folder, prefix).values()
            images, size, now = sum(s["successes"] for s in stats), count_bytes(folder), time.monotonic()
            bar.n = sum(s["count"] for s in stats)
            bar.set_postfix(ok=images, MB=round(size / 1e6, 1))
            if not terminal and now - shown > LINE:
                shown = now
                print(f"img2dataset: {bar.n:,} of {rows:,} rows, {images:,} images, {size / 1e6:.1f} MB", flush=True)
            if (bar.n, size) != last:
                last, changed = (bar.n, size), now
            if now - changed > STANDSTILL:
                raise BuildError(f"img2dataset has stood still for {STANDSTILL} s in {folder}; run the same again")


def count_bytes(folder: Path) -> int:
    """The bytes of all tars and of img2dataset's tables, which grow while a shard is under way."""
    size = 0
    for path in [*folder.glob("*.tar"), *folder.glob("download/*.tar"), *folder.glob("download/*.parquet")]:
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def command(config: DictConfig, folder: Path) -> list[str]:
    """The img2dataset command line; its values are Python literals."""
    options = img2dataset_options(config) | {
        "url_list": f"{folder}/rows.parquet",
        "input_format": "parquet",
        "output_folder": f"{folder}/download",
        "output_format": "webdataset",
        "enable_wandb": False,
        "incremental_mode": "incremental",
    }
    return [find_img2dataset(), *(f"--{key}={value!r}" for key, value in options.items())]


def img2dataset_options(config: DictConfig) -> dict:
    """What the configuration says, in img2dataset's names. Raises ConfigError for a wrong name in shards.options."""
    options = {
        "url_col": "url",
        "caption_col": "caption",
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        "resize_only_if_bigger": True,
        "encode_quality": config.encode_quality,
        "encode_format": config.encode_format,
        "skip_reencode": config.skip_reencode,
        "min_image_size": config.min_image_size,
        "max_aspect_ratio": config.max_aspect_ratio,
        "number_sample_per_shard": config.samples_per_shard,
        "save_additional_columns": list(config.columns) or None,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": config.timeout,
        "retries": config.retries,
        "user_agent_token": config.user_agent_token,
        "disallowed_header_directives": list(config.disallowed_header_directives),
    }
    if config.encode_format == "png" and not 0 <= config.encode_quality <= 9:
        raise ConfigError("shards.encode_quality: of png it is the compression, from 0 to 9")
    more = OmegaConf.to_container(config.options)
    for name in set(more) - OPTIONS:
        raise ConfigError(f"shards.options.{name}: {_remedy(name, options)}")
    options |= more
    return {key: value for key, value in options.items() if value is not None or key in more}


def _remedy(name: str, known: dict) -> str:
    if name in ELSEWHERE or name in known:
        return f"set {ELSEWHERE.get(name, f'shards.{name}')} instead"
    near = difflib.get_close_matches(name, OPTIONS, 1)
    return f"did you mean {near[0]}?" if near else f"not an option to set here; those are {', '.join(sorted(OPTIONS))}"


def find_img2dataset() -> str:
    """img2dataset lives in an environment of its own: $IMG2DATASET, the PATH, or .venv-data."""
    ours = Path(__file__).resolve().parents[2] / ".venv-data/bin/img2dataset"
    found = os.environ.get("IMG2DATASET") or shutil.which("img2dataset") or (str(ours) if ours.exists() else None)
    if not found or not shutil.which(found):
        raise BuildError(f"img2dataset is not there ({found or 'PATH, .venv-data'}); install it with: make env")
    return found


# ---------------------------------------------------------------- from its shards to ours
# img2dataset writes download/{shard}.tar, then download/{shard}_stats.json; the tar put in order is {shard}.tar.
def read_stats(folder: Path) -> dict[str, dict]:
    """img2dataset's statistics of each finished shard, by its name; one it is just writing is left out."""
    stats = {}
    for path in sorted(folder.glob("download/*_stats.json")):
        with suppress(ValueError):
            stats[path.name.removesuffix("_stats.json")] = json.loads(path.read_text())
    return stats


def tars(folder: Path) -> dict[str, Path]:
    """The tars of finished shards, by name; a shard of which no image arrived has none."""
    paths = {name: folder / f"{name}.tar" for name in read_stats(folder)}
    return {name: path for name, path in paths.items() if path.exists()}


def forget(folder: Path, name: str) -> None:
    """Have img2dataset make a shard again."""
    (folder / f"download/{name}_stats.json").unlink(missing_ok=True)
    (folder / f"{name}.tar").unlink(missing_ok=True)


def forget_damaged(folder: Path) -> None:
    """Forget shards whose statistics are half written, or whose tar is not whole: img2dataset takes them for done."""
    stats = read_stats(folder)
    for path in folder.glob("download/*_stats.json"):
        name = path.name.removesuffix("_stats.json")
        fresh = folder / f"download/{name}.tar"
        try:
            if name not in stats:
                raise ShardError
            if stats[name]["successes"] or fresh.exists():
                index_tar(fresh if fresh.exists() else folder / f"{name}.tar")
        except ShardError:
            forget(folder, name)


def settle(folder: Path, prefix: str) -> dict[str, dict]:
    """Put the tars of shards that img2dataset has finished in order. Returns the statistics of these shards."""
    stats = read_stats(folder)
    for name in stats:
        fresh = folder / f"download/{name}.tar"
        if fresh.exists():
            put_in_order(fresh, folder / f"{name}.tar", prefix)
            fresh.unlink()
    return stats


def put_in_order(fresh: Path, target: Path, prefix: str) -> None:
    """Write a tar sorted by key and without times: downloads end in any order, the same images give the same tar."""
    samples = sorted(index_tar(fresh), key=lambda sample: sample.key)
    aside = target.parent / "ordered"
    if not samples:
        target.unlink(missing_ok=True)
        return
    with ShardWriter(aside, len(samples)) as writer:
        for sample in samples:
            fields = {extension: sample.read(extension) for extension in sorted(sample.fields)}
            key = prefix + sample.key
            if prefix:
                fields["json"] = json.dumps(json.loads(fields["json"]) | {"key": key}, indent=4).encode()
            writer.add(key, fields)
    os.replace(writer.paths[0], target)
    shutil.rmtree(aside)


# ---------------------------------------------------------------- what was lost
def judge(folder: Path, rows: int, min_success_rate: float) -> dict[str, int]:
    """Lost images by reason: img2dataset ends well even if every download failed.

    Raises BuildError for shards that it gave up, and for too few images. Shards below `min_success_rate` are then
    forgotten, so that the next attempt asks again.
    """
    stats = read_stats(folder)
    if unseen := rows - sum(s["count"] for s in stats.values()):
        log = folder / "img2dataset.log"
        raise BuildError(f"img2dataset gave up shards of {unseen:,} of {rows:,} rows; {log} says why. Then run again")
    images = {name: len(index_tar(path)) for name, path in tars(folder).items()}
    dropped = count_reasons(stats, rows - sum(images.values()))
    if sum(images.values()) < min_success_rate * rows:
        for name, s in stats.items():
            if images.get(name, 0) < min_success_rate * s["count"]:
                forget(folder, name)
        table = "\n".join(f"{count:>10,}  {reason}" for reason, count in dropped.items())
        raise BuildError(
            f"{sum(images.values()):,} of {rows:,} images arrived, below shards.min_success_rate {min_success_rate}:\n"
            f"{table}\ncheck the network and the URLs and run again, or lower shards.min_success_rate"
        )
    return dropped


def count_reasons(stats: dict[str, dict], lost: int) -> dict[str, int]:
    """How many of the `lost` images failed for which reason, the commonest first."""
    reasons = Counter()
    for s in stats.values():
        for text, count in s["status_dict"].items():
            if text != "success":
                reasons[explain(text)] += count
    if unwritten := lost - reasons.total():  # img2dataset takes for a success what it then fails to write
        reasons["not written; see img2dataset.log"] = unwritten
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))  # in one order, whatever came first
    dropped = dict(ranked[:REASONS])
    if len(ranked) > REASONS:
        dropped["other"] = sum(count for _, count in ranked[REASONS:])
    return dropped


def explain(text: str) -> str:
    """A failure in few words, the same for all of its kind: without addresses, paths and the server's own wording."""
    for pattern, meaning in MEANING:
        if re.search(pattern, text):
            return meaning
    if match := re.match(r"HTTP Error (\d+)", text):
        with suppress(ValueError):
            return f"HTTP Error {match[1]}: {http.HTTPStatus(int(match[1])).phrase}"
        return f"HTTP Error {match[1]}"
    text = re.sub(r"<urlopen error (?:\[Errno -?\d+\] )?(.*)>", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"OpenCV\(\S+\) \S+ error: ", "", text)
    return " ".join(re.sub(r"'[^']*'|\S+://\S+", "…", text).split())[:100] or "unknown"


if __name__ == "__main__":
    main(sys.argv)
