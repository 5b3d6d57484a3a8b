"""Build the shards of one part of a selection: its rows, their download, tars in order, and the manifest."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from sdtrain.config.fingerprint import fingerprint
from sdtrain.data.img2dataset import Stats, count_reasons, img2dataset_options, read_stats, run_img2dataset
from sdtrain.data.manifest import write_manifest
from sdtrain.data.tables import Table
from sdtrain.data.tars import index_tar, write_tar
from sdtrain.errors import ConfigError, DataError, SDTrainError, did_you_mean
from sdtrain.io.files import hold_lock, sha256_file, temporary_path

CONTENT = "image_size resize_mode samples_per_shard encode_quality encode_format skip_reencode min_image_size".split()
CONTENT += ["max_aspect_ratio", "columns", "disallowed_header_directives", "options"]  # keys that decide the bytes
RESERVED = (  # columns that img2dataset writes itself
    "key caption url width height original_width original_height status error_message exif md5 sha256 sha512".split()
)
PATIENCE = 20  # seconds for an earlier build of the same output to end: it may have just been killed


def build_shards(config: DictConfig, selection: str, part: int, parts: int, output: Path) -> dict[str, Any]:
    """Download rows [part * n // parts, (part + 1) * n // parts) of the selection; write and return their manifest.

    The tars lie beside `output`, in a folder named by a fingerprint: a build that was cut short resumes there, and a
    change of the rows or of an option that decides the content starts in another folder. If there are several parts,
    keys begin with the number of the part. Raise SDTrainError if too few images arrive.
    """
    settings: Any = OmegaConf.to_container(config)
    columns = list_columns(config)
    total = count_rows(selection, columns, config.columns)
    begin, end = part * total // parts, (part + 1) * total // parts
    img2dataset_options(config)  # raises for wrong ones before any work
    lock = output.with_name(f".{output.stem}.lock")
    with hold_lock(lock, PATIENCE, f"another build writes {output.name}") as descriptor:
        rows = temporary_path(output.with_name(f"{output.stem}.rows"))
        write_rows(selection, begin, end, columns, rows)
        made_by = {key: settings[key] for key in CONTENT} | {"rows": sha256_file(rows), "part": part, "parts": parts}
        folder = output.parent / fingerprint(made_by)
        (folder / "download").mkdir(parents=True, exist_ok=True)
        os.replace(rows, folder / "rows.parquet")
        prefix = f"{part:03d}-" if parts > 1 else ""
        forget_damaged(folder)
        if len(settle(folder, prefix)) < math.ceil((end - begin) / config.samples_per_shard):
            run_img2dataset(config, folder, end - begin, lambda: settle(folder, prefix), descriptor)
        dropped = check_losses(folder, end - begin, config.min_success_rate)
        return write_manifest(output, "images", list(find_tars(folder).values()), dropped, made_by)


# ---------------------------------------------------------------- rows of the part
def list_columns(config: DictConfig) -> list[str]:
    """Return the columns of the selection that img2dataset reads, each once."""
    more = [config.options.get("bbox_col"), *(config.options.get("verify_hash") or [])[:1]]
    return list(dict.fromkeys(["url", "caption", *config.columns, *(name for name in more if name)]))


def count_rows(selection: str, columns: list[str], saved: list[str]) -> int:
    """Return the number of rows of the selection.

    Raise TableError if it is unreadable, SDTrainError if it is empty, ConfigError for columns that it lacks or that
    cannot be saved.
    """
    table = Table(selection)
    for name in columns:
        if name in saved and name in RESERVED:
            raise ConfigError(f"shards.columns: {name} is written by img2dataset itself; take it off the list")
        if name not in table.schema.names:
            raise ConfigError(
                f"shards.columns: {selection} has no column {name}{did_you_mean(name, table.schema.names)}"
            )
        if "binary" in str(table.schema.field(name).type):
            raise ConfigError(f"shards.columns: {name} holds bytes, which JSON cannot; take it off the list")
    rows = table.count()
    if not rows:
        raise SDTrainError(f"{selection}: no rows; a held-out split needs select.held_out.fraction above 0")
    return rows


def write_rows(selection: str | Path, begin: int, end: int, columns: list[str], path: Path) -> None:
    """Write rows [begin, end) of the selection, by row groups. Times and decimals become texts, as JSON needs."""
    file = pq.ParquetFile(selection)
    fields = [file.schema_arrow.field(name) for name in columns]
    schema = pa.schema([field.with_type(_json_type(field.type)) for field in fields])
    position = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            low, high = max(begin - position, 0), min(end - position, size)
            position += size
            if low < high:
                rows = file.read_row_group(group, columns).select(columns)
                writer.write_table(rows.slice(low, high - low).cast(schema))


def _json_type(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) or pa.types.is_decimal(kind) else kind


# ---------------------------------------------------------------- shards of the part
# img2dataset writes download/{shard}.tar, then download/{shard}_stats.json; {shard}.tar is its tar put in order.
def find_tars(folder: Path) -> dict[str, Path]:
    """Return the tars of finished shards by name. A shard of which no image arrived has none."""
    paths = {name: folder / f"{name}.tar" for name in read_stats(folder)}
    return {name: path for name, path in paths.items() if path.exists()}


def forget(folder: Path, name: str) -> None:
    """Delete a shard, so that img2dataset makes it again."""
    (folder / f"download/{name}_stats.json").unlink(missing_ok=True)
    (folder / f"{name}.tar").unlink(missing_ok=True)


def forget_damaged(folder: Path) -> None:
    """Delete shards with half-written statistics or a damaged tar: img2dataset takes them for finished."""
    stats = read_stats(folder)
    for path in folder.glob("download/*_stats.json"):
        name = path.name.removesuffix("_stats.json")
        fresh = folder / f"download/{name}.tar"
        try:
            if name not in stats:
                raise DataError
            if stats[name]["successes"] or fresh.exists():
                index_tar(fresh if fresh.exists() else folder / f"{name}.tar")
        except DataError:
            forget(folder, name)


def settle(folder: Path, prefix: str) -> Stats:
    """Put the tars of shards that img2dataset has finished in order; return the statistics of these shards."""
    stats = read_stats(folder)
    for name in stats:
        fresh = folder / f"download/{name}.tar"
        if fresh.exists():
            put_in_order(fresh, folder / f"{name}.tar", prefix)
            fresh.unlink()
    return stats


def put_in_order(fresh: Path, target: Path, prefix: str) -> None:
    """Write a tar again, sorted by key and without times, and put a prefix before each key.

    So the same images give the same tar in any order of arrival.
    """
    samples = sorted(index_tar(fresh), key=lambda sample: sample.key)
    if not samples:
        target.unlink(missing_ok=True)
        return
    with write_tar(target) as add:
        for sample in samples:
            fields = {extension: sample.read(extension) for extension in sorted(sample.fields)}
            key = prefix + sample.key
            if prefix:
                fields["json"] = json.dumps(json.loads(fields["json"]) | {"key": key}, indent=4).encode()
            add(key, fields)


def check_losses(folder: Path, rows: int, min_success_rate: float) -> dict[str, int]:
    """Return the lost images by reason: img2dataset reports success even if every download failed.

    Raise SDTrainError for shards that it gave up, and for too few images. In the latter case delete the shards below
    `min_success_rate`, so that the next attempt downloads them again.
    """
    stats = read_stats(folder)
    if unseen := rows - sum(s["count"] for s in stats.values()):
        log = folder / "img2dataset.log"
        raise SDTrainError(f"img2dataset gave up shards of {unseen:,} of {rows:,} rows; see {log}, then run again")
    images = {name: len(index_tar(path)) for name, path in find_tars(folder).items()}
    total = sum(images.values())
    dropped = count_reasons(stats.values(), rows - total)
    if total < min_success_rate * rows:
        for name, s in stats.items():
            if images.get(name, 0) < min_success_rate * s["count"]:
                forget(folder, name)
        table = "\n".join(f"{count:>10,}  {reason}" for reason, count in dropped.items())
        raise SDTrainError(
            f"{total:,} of {rows:,} images arrived, below shards.min_success_rate {min_success_rate}:\n{table}\n"
            "check the network and the URLs and run again, or lower shards.min_success_rate"
        )
    return dropped
