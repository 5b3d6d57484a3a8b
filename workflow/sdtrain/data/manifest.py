"""Shards and the manifest of them all: described once, gathered, and checked to the last byte."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import itertools
import json
import os
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdtrain.config.fingerprint import code_digest, fingerprint
from sdtrain.data.predicates import add_yields
from sdtrain.data.tars import (
    INDEX,
    INDEX_VERSION,
    ShardError,
    ShardIndex,
    index_tar,
    read_facts,
    read_index,
    read_metadata,
    write_index,
)
from sdtrain.io import storage
from sdtrain.io.files import write_json

CHUNK = 1 << 20  # bytes summed at once: long enough that other threads' turns at the interpreter do not count
THREADS = min(8, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of shards alone. Raises ShardError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{folder}: another process still writes there; wait for it, or end it") from None
        yield


# ---------------------------------------------------------------- manifests
def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def write_manifest(
    path: str | Path, kind: str, shards: Iterable[str | Path], dropped: dict[str, int], made_by: dict, **more: Any
) -> dict:
    """Index `shards` (local paths or addresses), describe them in a manifest at `path` and return it.

    `kind` is "images" or "latents"; `dropped` counts lost samples by reason; `made_by` is what decides the content
    (its fingerprint names it); `more` stands in the manifest as it is. Names are relative to the manifest's folder.
    Indices that a run before this one has finished are used again.
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


def gather_manifests(paths: Sequence[str | Path], output: str | Path) -> dict:
    """One manifest at `output` of the shards of several, and return it. Raises ShardError unless all are of one kind.

    `made_by` has what the parts have in common; dropped samples and yields are added up.
    """
    parts = [read_manifest(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part["kind"] != parts[0]["kind"]:
            raise ShardError(
                f"{path}: holds {part['kind']}, but {paths[0]} {parts[0]['kind']}; gather one kind at a time"
            )
    rows = [
        {"part": os.path.relpath(path, Path(output).parent), **row}
        for path, part in zip(paths, parts, strict=True)
        for row in move_rows(part["shards"], Path(output).parent)
    ]
    dropped = sum((Counter(part["dropped"]) for part in parts), Counter())
    shared = {
        key: value for key, value in parts[0]["made_by"].items() if all(p["made_by"].get(key) == value for p in parts)
    }
    yields = None
    for part in parts:
        yields = add_yields(yields, part["yields"]) if part.get("yields") else yields
    if not any(part["samples"] for part in parts):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "nothing"
        raise ShardError(f"{output}: no sample in any of {len(parts)} parts; dropped: {reasons}; loosen the filters")
    return write_rows(output, parts[0]["kind"], rows, dict(dropped), shared, {"yields": yields} if yields else {})


def move_rows(rows: list[dict], folder: Path) -> list[dict]:
    """The rows of a manifest that was read, for a manifest in another folder."""
    moved = []
    for row in rows:
        names = {"name": row["path"], "index": row["index_path"]}
        names = {k: os.path.relpath(v, folder) if storage.is_local(v) else v for k, v in names.items() if v}
        moved.append({k: v for k, v in row.items() if k not in ("path", "index_path")} | names)
    return moved


def write_rows(path: str | Path, kind: str, rows: list[dict], dropped: dict, made_by: dict, more: dict) -> dict:
    """Write the manifest of shards that are described already: rows as `read_manifest` or `move_rows` gives them."""
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
    }
    write_json(path, manifest)
    return manifest


def _place_index(name: str, shard: str, folder: Path, key: str) -> Path:
    """Beside a shard below the manifest's folder, for it is ours; else in a neighbour folder of the manifest."""
    if storage.is_local(shard) and not name.startswith(".."):
        return Path(shard.removesuffix(".tar") + INDEX)
    return folder / key / (hashlib.sha256(name.encode()).hexdigest()[:24] + INDEX)


def describe_shard(
    shard: str, index: Path, known: ShardIndex | None = None, sha256: str | None = None
) -> dict[str, Any]:
    """The facts of a shard (samples, bytes, sha256), from its finished index at `index`, which is made where needed.

    Whoever has just written the shard knows where its samples lie, `known`, and its sum: then it is not read for them.
    """
    source = _version(shard)
    facts = read_facts(index)
    if not facts or not _is_current(shard, index, facts, source):
        with storage.local(shard) as path:
            with contextlib.suppress(OSError):  # what is wrong with the file, `index_tar` says
                facts = {"bytes": os.path.getsize(path), "sha256": sha256 or sha256_file(path), "source": source}
            found = read_metadata(index_tar(path, shard) if known is None else known, path)
        facts["samples"] = len(found)
        write_index(index, found, facts)
    return {key: facts[key] for key in ("samples", "bytes", "sha256")}


def _is_current(shard: str, index: Path, facts: dict[str, Any], source: str | None) -> bool:
    """Whether an index is of the shard as it is now: a local one must not have been touched since."""
    if facts.get("version") != INDEX_VERSION or facts.get("source") != source or "sha256" not in facts:
        return False
    if not storage.is_local(shard):
        return source is not None
    try:
        return os.path.getsize(shard) == facts["bytes"] and not was_touched(shard, index)
    except OSError:
        return False


def was_touched(shard: str, index: str | Path) -> bool:
    """Whether a local shard changed after its index was written: another of the same size may be in its place."""
    now = os.stat(shard)
    return max(now.st_mtime_ns, now.st_ctime_ns) >= os.stat(index).st_mtime_ns


def _version(shard: str) -> str | None:
    """What tells one content of an s3:// or http(s):// address from the next; None where nothing does."""
    if shard.startswith(("http://", "https://")):
        with contextlib.suppress(OSError, http.client.HTTPException):  # a server may know no HEAD
            request = urllib.request.Request(shard, method="HEAD")
            with urllib.request.urlopen(request, timeout=storage.TIMEOUT) as answer:
                about = answer.headers
            if about["ETag"] or about["Last-Modified"]:
                return about["ETag"] or f"{about['Last-Modified']} {about['Content-Length']}"
    if shard.startswith("s3://"):
        with contextlib.suppress(Exception):  # botocore's are many; the copy that follows says what is wrong
            filesystem, path = storage.find_filesystem(shard)
            return str(filesystem.info(path)["ETag"])
    return None


def in_threads(work: Callable, items: Sequence, label: str) -> list:
    """The results of `work` on each item, in order, by several threads, with progress; the first error ends all."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            return list(progress(pool.map(work, items), len(items), label))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def progress(items: Iterable, total: int, label: str) -> tqdm:
    """A progress bar over shards where it takes some time; in a log a line now and then."""
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(items, total=total, unit="shard", desc=label, mininterval=every, delay=2)


def read_manifest(path: str | Path, full: bool = False) -> dict:
    """Read a manifest; `shards[i]["path"]` is where shard i lies, and "index_path" its index (None: it has none).

    Local shards must be there with the right size; where `full`, all that `find_faults` looks at must be right.
    Raises ShardError naming the shard at fault.
    """
    manifest = _load_manifest(path)
    for row in manifest["shards"]:
        if fault := next(_shard_faults(row, path) if full else _size_faults(row, path), None):
            raise ShardError(fault)
    return manifest


def _load_manifest(path: str | Path) -> dict:
    if not storage.is_local(str(path)):
        raise ShardError(
            f"{path}: a manifest is read from a local path; copy it here, its shards may stay where they are"
        )
    try:
        manifest = json.loads(Path(path).read_text())
        rows = manifest["shards"]
        if any({"name", "bytes", "sha256", "samples"} - set(row) for row in rows):
            raise ValueError
    except FileNotFoundError:
        raise ShardError(f"{path}: no such manifest; make it with: snakemake {path}") from None
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{path}: not a shard manifest; delete it and make it again") from None
    folder = os.path.dirname(path)
    for row in rows:
        local = storage.is_local(row["name"])
        row["path"] = os.path.normpath(os.path.join(folder, row["name"])) if local else row["name"]
        row["index_path"] = os.path.normpath(os.path.join(folder, row["index"])) if row.get("index") else None
    return manifest


def find_shards(path: str, part: int = 0, parts: int = 1) -> dict:
    """A manifest (read), or one of as much as is known of the shards in brace notation: one part's run of its rows.

    Raises ShardError where a shard is named twice, StorageError where there is none.
    """
    if path.endswith(".json") and storage.is_local(path):
        manifest = read_manifest(path)
    else:
        manifest = {"kind": "images", "shards": [{"path": p, "index_path": None} for p in storage.expand(path)]}
    rows = manifest["shards"]
    twice = [name for name, count in Counter(row["path"] for row in rows).items() if count > 1]
    if twice:
        raise ShardError(f"{path}: names {twice[0]} more than once; its samples would count twice")
    return manifest | {"shards": rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]}


def read_part(part: str, parts: str) -> tuple[int, int]:
    """A command's part= and parts= as numbers. Raises ShardError unless 0 <= part < parts."""
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ShardError(f"part={part} parts={parts}: a part from 0 to parts - 1 is expected, such as part=0 parts=4")
    return int(part), int(parts)


# ---------------------------------------------------------------- checks
def find_faults(path: str | Path) -> list[str]:
    """Everything wrong with a manifest, its shards and their indices, each with the file and the remedy.

    Every byte is read: sha256, whole tars, counts of samples, indices, shards that no row lists.
    """
    try:
        manifest = _load_manifest(path)
    except ShardError as error:
        return [str(error)]
    rows = manifest["shards"]
    faults = list(_empty_text_faults(manifest, path))
    if manifest.get("fingerprint") != fingerprint(manifest.get("made_by"), [row["sha256"] for row in rows]):
        faults.append(f"{path}: its fingerprint does not fit what it says; {_remedy({}, path)}")
    for key in ("samples", "bytes"):
        if manifest.get(key) != (total := sum(row[key] for row in rows)):
            faults.append(f"{path}: {key} is {manifest.get(key)}, but its shards have {total}; {_remedy({}, path)}")
    found = in_threads(lambda row: list(_shard_faults(row, path)), rows, "verify")
    return faults + list(itertools.chain.from_iterable(found)) + list(_foreign_shards(rows, path))


def _empty_text_faults(manifest: dict, path: str | Path) -> Iterator[str]:
    """What is wrong with the states of the empty caption, where latents have some."""
    if not manifest.get("empty_text"):
        return
    file = Path(path).parent / manifest["empty_text"]
    if not file.is_file():
        yield f"{file}: states of the empty caption are missing, though {path} names them; {_remedy({}, path)}"
    elif sha256_file(file) != manifest.get("empty_text_sha256"):
        yield f"{file}: sha256 differs from the one in {path}; {_remedy({}, path, file)}"


def _shard_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    sizes = list(_size_faults(row, manifest))
    yield from sizes or _content_faults(row, manifest)
    index, remedy = row["index_path"], _remedy(row, manifest, row["index_path"])
    if index and not os.path.isfile(index):
        yield f"{index}: index is missing, though {manifest} lists it; {_remedy(row, manifest)}"
    elif index and sha256_file(index) != row.get("index_sha256"):
        yield f"{index}: sha256 of the index differs from the one in {manifest}; {remedy}"


def _size_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    shard = row["path"]
    if not storage.is_local(shard):
        return
    if not os.path.isfile(shard):
        yield f"{shard}: shard is missing, though {manifest} lists it; {_remedy(row, manifest)}"
    elif (size := os.path.getsize(shard)) != row["bytes"]:
        yield f"{shard}: {size} bytes, {row['bytes']} expected by {manifest}; {_remedy(row, manifest, shard)}"


def _content_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    """The first of what is wrong inside a shard: the rest follows from it."""
    shard, remedy = row["path"], _remedy(row, manifest, row["path"])
    try:
        with storage.local(shard) as path:
            if sha256_file(path) != row["sha256"]:
                yield f"{shard}: sha256 differs from the one in {manifest}; {remedy}"
                return
            found = index_tar(path, shard)
        if len(found) != row["samples"]:
            yield f"{shard}: {len(found)} samples, {row['samples']} expected by {manifest}; {remedy}"
        elif row["index_path"] and os.path.isfile(row["index_path"]):
            with contextlib.suppress(ShardError):  # a damaged index is found by its own sum
                if read_index(row["index_path"], shard, ()) != found:
                    remedy = _remedy(row, manifest, row["index_path"])
                    yield f"{row['index_path']}: does not fit the samples of {shard}; {remedy}"
    except (ShardError, storage.StorageError) as error:
        yield str(error)


def _foreign_shards(rows: list[dict], manifest: str | Path) -> Iterator[str]:
    """Tars with samples that lie among shards of ours, which are those with their indices beside them."""
    ours = {os.path.dirname(row["path"]): row for row in rows if row["index_path"] and _is_beside(row)}
    listed = {os.path.abspath(row["path"]) for row in rows}
    for folder, row in ours.items():
        for tar in sorted(Path(folder).glob("*.tar")):
            with contextlib.suppress(ShardError):
                if os.path.abspath(tar) in listed or not index_tar(tar):
                    continue  # img2dataset leaves an empty tar where every download failed
            if os.path.abspath(tar) not in listed:
                yield f"{tar}: foreign shard, not listed in {manifest}; {_remedy(row, manifest, tar)}"


def _is_beside(row: dict) -> bool:
    return os.path.dirname(row["index_path"]) == os.path.dirname(row["path"])


def _remedy(row: dict, manifest: str | Path, file: str | Path | None = None) -> str:
    """How to get right again. What is not ours to delete, shards that were adopted, is to be restored."""
    part = os.path.normpath(os.path.join(os.path.dirname(manifest), row["part"])) if "part" in row else None
    command = f"snakemake --force {part} {manifest}" if part else f"snakemake --force {manifest}"
    if row and file == row["path"] and row["index_path"] and not _is_beside(row):
        return f"restore it from its source, or if it should be so, index it anew: {command}"
    return f"delete it, then rebuild it: {command}" if file else f"rebuild it: {command}"
