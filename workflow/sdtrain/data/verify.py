"""Verification of shards: everything that is wrong with a manifest, its shards and their indices."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from sdtrain.config.fingerprint import fingerprint
from sdtrain.data.indices import read_index
from sdtrain.data.manifest import has_index_beside, in_threads, load_manifest, remedy, shardlist, size_fault
from sdtrain.data.tars import index_tar
from sdtrain.errors import DataError
from sdtrain.io import storage
from sdtrain.io.files import sha256_file


def find_faults(path: str | Path) -> list[str]:
    """Return everything wrong with a manifest, its shards and their indices, each with the file and the remedy.

    Every byte is read: digests, whole tars, numbers of samples, indices, shards that no row lists.
    """
    try:
        manifest = load_manifest(path)
    except DataError as error:
        return [str(error)]
    rows = manifest["shards"]
    found = in_threads(lambda row: list(_shard_faults(row, path)), rows, "verify")
    return [*_manifest_faults(manifest, path), *itertools.chain.from_iterable(found), *_foreign_shards(rows, path)]


def _manifest_faults(manifest: dict, path: str | Path) -> Iterator[str]:
    rows = manifest["shards"]
    yield from _empty_text_faults(manifest, path)
    if manifest.get("fingerprint") != fingerprint(manifest.get("made_by"), [row["sha256"] for row in rows]):
        yield f"{path}: its fingerprint does not fit its content; {remedy({}, path)}"
    for key in ("samples", "bytes"):
        if manifest.get(key) != (total := sum(row[key] for row in rows)):
            yield f"{path}: {key} is {manifest.get(key)}, but its shards have {total}; {remedy({}, path)}"
    if manifest.get("shardlist", shards := shardlist(rows)) != shards:  # manifests of before have none
        yield f"{path}: its shardlist, for wids, does not fit its shards; {remedy({}, path)}"


def _empty_text_faults(manifest: dict, path: str | Path) -> Iterator[str]:
    """Yield what is wrong with the text encoder's states of the empty caption, where latents have some."""
    if not manifest.get("empty_text"):
        return
    file = Path(path).parent / manifest["empty_text"]
    if not file.is_file():
        yield f"{file}: states of the empty caption are missing, though {path} names them; {remedy({}, path)}"
    elif sha256_file(file) != manifest.get("empty_text_sha256"):
        yield f"{file}: sha256 differs from the one in {path}; {remedy({}, path, file)}"


def _shard_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    size, index = size_fault(row, manifest), row["index_path"]
    yield from [size] if size else _content_faults(row, manifest)
    if index and not os.path.isfile(index):
        yield f"{index}: index is missing, though {manifest} lists it; {remedy(row, manifest)}"
    elif index and sha256_file(index) != row.get("index_sha256"):
        yield f"{index}: sha256 of the index differs from the one in {manifest}; {remedy(row, manifest, index)}"


def _content_faults(row: dict, manifest: str | Path) -> Iterator[str]:
    """Yield the first fault inside a shard, as others follow from it."""
    shard, index = row["path"], row["index_path"]
    try:
        with storage.local(shard) as path:
            if sha256_file(path) != row["sha256"]:
                yield f"{shard}: sha256 differs from the one in {manifest}; {remedy(row, manifest, shard)}"
                return
            found = index_tar(path, shard)
        if len(found) != row["samples"]:
            count = f"{len(found)} samples, {row['samples']} expected by {manifest}"
            yield f"{shard}: {count}; {remedy(row, manifest, shard)}"
        elif index and os.path.isfile(index):
            with contextlib.suppress(DataError):  # a damaged index is found by its own digest
                if read_index(index, shard, ()) != found:
                    yield f"{index}: does not fit the samples of {shard}; {remedy(row, manifest, index)}"
    except (DataError, storage.StorageError) as error:
        yield str(error)


def _foreign_shards(rows: list[dict], manifest: str | Path) -> Iterator[str]:
    """Yield the tars with samples that lie among our shards and that no row lists."""
    ours = {os.path.dirname(row["path"]): row for row in rows if row["index_path"] and has_index_beside(row)}
    listed = {os.path.abspath(row["path"]) for row in rows}
    for folder, row in ours.items():
        for tar in sorted(Path(folder).glob("*.tar")):
            if os.path.abspath(tar) in listed:
                continue
            with contextlib.suppress(DataError):
                if not index_tar(tar):
                    continue  # img2dataset leaves an empty tar where every download failed
            yield f"{tar}: foreign shard, not listed in {manifest}; {remedy(row, manifest, tar)}"
