"""The manifest of a dataset's shards: written, gathered from partitions, read. It is also an index for `wids`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdtrain.config.fingerprint import code_digest, fingerprint
from sdtrain.data.indices import INDEX, INDEX_VERSION, read_facts, read_metadata, write_index
from sdtrain.data.predicates import add_yields
from sdtrain.data.tars import ShardIndex, index_tar
from sdtrain.errors import DataError
from sdtrain.io import storage
from sdtrain.io.cache import short_digest
from sdtrain.io.files import sha256_file, write_json

THREADS = min(8, len(os.sched_getaffinity(0)))
WIDS = {"__kind__": "wids-shard-index-v1", "wids_version": 1}  # what wids.ShardListDataset requires, and a shardlist


# ---------------------------------------------------------------- writing
def write_manifest(
    path: str | Path, kind: str, shards: Iterable[str | Path], dropped: dict[str, int], made_by: dict, **more: Any
) -> dict[str, Any]:
    """Index `shards` (local paths or addresses), describe them in a manifest at `path` and return it.

    `kind` is "images" or "latents"; `dropped` counts lost samples by reason; `made_by` is what decides the content
    (the fingerprint covers it); `more` is copied into the manifest. Paths are relative to the manifest's folder.
    Indices that an earlier, killed run has finished are used again.
    """
    folder = Path(path).parent
    places = []
    for shard in sorted(map(str, shards)):
        name = os.path.relpath(shard, folder) if storage.is_local(shard) else shard
        places.append((name, shard, _place_index(name, shard, folder, fingerprint(made_by))))
    facts = in_threads(lambda place: describe_shard(place[1], place[2]), places, "index")
    rows = [
        {"name": name, **fact, "index": os.path.relpath(index, folder), "index_sha256": sha256_file(index)}
        for (name, _, index), fact in zip(places, facts, strict=True)
    ]
    if more.get("empty_text"):
        more["empty_text_sha256"] = sha256_file(folder / more["empty_text"])
    return write_rows(path, kind, rows, dropped, made_by, more)


def write_rows(
    path: str | Path, kind: str, rows: list[dict], dropped: dict, made_by: dict, more: dict
) -> dict[str, Any]:
    """Write the manifest of shards that are already described, by rows as `move_rows` returns them; return it."""
    manifest = {
        "kind": kind,
        "fingerprint": fingerprint(made_by, [row["sha256"] for row in rows]),
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "dropped": dropped,
        "made_by": made_by,
        "code": code_digest(),
        **more,
        "shards": rows,
        **WIDS,
        "shardlist": shardlist(rows),
    }
    write_json(path, manifest)
    return manifest


def shardlist(rows: list[dict]) -> list[dict[str, Any]]:
    """Return the shards of a manifest in the form that `wids` reads; it resolves relative URLs as we do."""
    return [{"url": row["name"], "nsamples": row["samples"], "filesize": row["bytes"]} for row in rows]


def gather_manifests(paths: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Write one manifest of the shards of several at `output`, and return it. Raise DataError if kinds differ.

    `made_by` holds what the partitions have in common; dropped samples and yields are added up.
    """
    parts = [read_manifest(path) for path in paths]
    kind, folder = parts[0]["kind"], Path(output).parent
    for path, part in zip(paths, parts, strict=True):
        if part["kind"] != kind:
            raise DataError(f"{path}: holds {part['kind']}, but {paths[0]} {kind}; gather one kind at a time")
    rows = [
        {"part": os.path.relpath(path, folder), **row}
        for path, part in zip(paths, parts, strict=True)
        for row in move_rows(part["shards"], folder)
    ]
    dropped = sum((Counter(part["dropped"]) for part in parts), Counter[str]())
    made_by = {k: v for k, v in parts[0]["made_by"].items() if all(part["made_by"].get(k) == v for part in parts)}
    yields = functools.reduce(add_yields, (part["yields"] for part in parts if part.get("yields")), None)
    if not rows or not any(row["samples"] for row in rows):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "nothing"
        raise DataError(f"{output}: no sample in any of {len(parts)} partitions; dropped: {reasons}; loosen filters")
    return write_rows(output, kind, rows, dict(dropped), made_by, {"yields": yields} if yields else {})


def move_rows(rows: list[dict], folder: Path) -> list[dict]:
    """Return the rows of a manifest that was read for a manifest in another folder."""
    moved = []
    for row in rows:
        names = {"name": row["path"], "index": row["index_path"]}
        names = {k: os.path.relpath(v, folder) if storage.is_local(v) else v for k, v in names.items() if v}
        moved.append({k: v for k, v in row.items() if k not in ("path", "index_path")} | names)
    return moved


# ---------------------------------------------------------------- describing shards
def describe_shard(
    shard: str, index: Path, known: ShardIndex | None = None, sha256: str | None = None
) -> dict[str, Any]:
    """Return the facts of a shard (samples, bytes, sha256) from its index file; make the file unless it is current.

    Pass `known`, the index, and `sha256` of a shard that was just written, to avoid reading it again.
    """
    source = None if storage.is_local(shard) else storage.version(shard)
    facts = read_facts(index)
    if not facts or not _is_current(shard, index, facts, source):
        with storage.local(shard) as path:
            facts = {"source": source}
            with contextlib.suppress(OSError):  # `index_tar` names what is wrong with the file
                facts |= {"bytes": os.path.getsize(path), "sha256": sha256 or sha256_file(path)}
            found = read_metadata(index_tar(path, shard) if known is None else known, path)
        facts["samples"] = len(found)
        write_index(index, found, facts)
    return {key: facts[key] for key in ("samples", "bytes", "sha256")}


def _place_index(name: str, shard: str, folder: Path, key: str) -> Path:
    """Return the place of an index: beside a shard below the manifest's folder, else in a folder by the manifest."""
    if storage.is_local(shard) and not name.startswith(".."):
        return Path(shard.removesuffix(".tar") + INDEX)
    return folder / key / (short_digest(name) + INDEX)


def _is_current(shard: str, index: Path, facts: dict[str, Any], source: str | None) -> bool:
    """Return whether an index is of the shard as it is now; a local shard must not have changed after it."""
    if facts.get("version") != INDEX_VERSION or facts.get("source") != source or "sha256" not in facts:
        return False
    if not storage.is_local(shard):
        return source is not None
    try:
        return os.path.getsize(shard) == facts["bytes"] and not was_touched(shard, index)
    except OSError:
        return False


def was_touched(shard: str, index: str | Path) -> bool:
    """Return whether a local shard changed after its index was written: another of the same size may replace it."""
    now = os.stat(shard)
    return max(now.st_mtime_ns, now.st_ctime_ns) >= os.stat(index).st_mtime_ns


def in_threads(work: Callable, items: Sequence, label: str) -> list:
    """Return the results of `work` on each item, in order, with progress; the first error cancels the rest."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(progress(pool.map(work, items), len(items), label))


def progress(items: Iterable, total: int, label: str) -> Iterable:
    """Return the items with a progress bar if they take long; a log file gets a line now and then."""
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(items, total=total, unit="shard", desc=label, mininterval=every, delay=2)


# ---------------------------------------------------------------- reading
def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read a manifest; add to each shard's row "path", its address, and "index_path" (None: it has no index).

    Raise DataError if a local shard is missing or has another size.
    """
    manifest = load_manifest(path)
    for row in manifest["shards"]:
        if fault := size_fault(row, path):
            raise DataError(fault)
    return manifest


def load_manifest(path: str | Path) -> dict[str, Any]:
    """Read a manifest as `read_manifest` does, without a look at the shards."""
    if not storage.is_local(str(path)):
        raise DataError(f"{path}: a manifest must be a local file; copy it here, its shards may stay where they are")
    try:
        manifest = json.loads(Path(path).read_text())
        rows = manifest["shards"]
        if any({"name", "bytes", "sha256", "samples"} - set(row) for row in rows):
            raise ValueError
    except FileNotFoundError:
        raise DataError(f"{path}: no such manifest; make it with: snakemake {path}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a shard manifest; delete it and make it again") from None
    folder = os.path.dirname(path)
    for row in rows:
        local = storage.is_local(row["name"])
        row["path"] = os.path.normpath(os.path.join(folder, row["name"])) if local else row["name"]
        row["index_path"] = os.path.normpath(os.path.join(folder, row["index"])) if row.get("index") else None
    return manifest


def size_fault(row: dict, manifest: str | Path) -> str | None:
    """Return what is wrong with the size of a local shard, with the remedy."""
    shard = row["path"]
    if not storage.is_local(shard):
        return None
    if not os.path.isfile(shard):
        return f"{shard}: shard is missing, though {manifest} lists it; {remedy(row, manifest)}"
    if (size := os.path.getsize(shard)) != row["bytes"]:
        return f"{shard}: {size} bytes, {row['bytes']} expected by {manifest}; {remedy(row, manifest, shard)}"
    return None


def remedy(row: dict, manifest: str | Path, file: str | Path | None = None) -> str:
    """Return how to repair a shard, its index or a manifest; an adopted shard must not be deleted but restored."""
    part = os.path.normpath(os.path.join(os.path.dirname(manifest), row["part"])) if "part" in row else None
    command = f"snakemake --force {part} {manifest}" if part else f"snakemake --force {manifest}"
    if row and file == row["path"] and row["index_path"] and not has_index_beside(row):
        return f"restore it from its source, or if the new content is right, index it again: {command}"
    return f"delete it, then rebuild it: {command}" if file else f"rebuild it: {command}"


def has_index_beside(row: dict) -> bool:
    """Return whether a shard was written by this system: its index is then the file beside it."""
    return os.path.dirname(row["index_path"]) == os.path.dirname(row["path"])


def find_shards(path: str, part: int, parts: int) -> dict[str, Any]:
    """Return the shards of one partition: a manifest's, or those named by brace notation, globs and addresses.

    For shards without a manifest, rows hold only "path" and "index_path". Raise DataError if a shard is named twice,
    StorageError if there is none.
    """
    if path.endswith(".json") and storage.is_local(path):
        manifest = read_manifest(path)
    else:
        manifest = {"kind": "images", "shards": [{"path": p, "index_path": None} for p in storage.expand(path)]}
    rows = manifest["shards"]
    twice = [name for name, count in Counter(row["path"] for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{path}: names {twice[0]} more than once; its samples would count twice")
    return manifest | {"shards": rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]}


def read_part(part: str, parts: str) -> tuple[int, int]:
    """Return a command's part= and parts= as numbers. Raise DataError unless 0 <= part < parts."""
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise DataError(f"part={part} parts={parts}: expected a part from 0 to parts - 1, such as part=0 parts=4")
    return int(part), int(parts)


def summary(manifest: dict[str, Any]) -> str:
    """Return the size of a manifest's shards in words."""
    return f"{len(manifest['shards']):,} shards, {manifest['samples']:,} samples, {manifest['bytes'] / 1e6:,.1f} MB"
