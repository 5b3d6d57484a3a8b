"""Tar shards and their manifest: written whole, indexed without decoding, checked before use."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config import code_digest, fingerprint, write_json


class ShardError(ValueError):
    """Shards or a manifest that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Sample:
    """Where one sample's fields lie: `fields` maps an extension to (offset, bytes) in the tar at `shard`."""

    shard: str
    key: str
    fields: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        """The bytes of one field."""
        offset, size = self.fields[extension]
        with open(self.shard, "rb") as file:
            file.seek(offset)
            return file.read(size)


def index_tar(path: str | Path) -> list[Sample]:
    """The samples of a tar in order, members grouped by the name before its first dot (the WebDataset format).

    Raises ShardError for a missing, truncated or foreign file.
    """
    samples: list[Sample] = []
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(Sample(str(path), key, {}))
                samples[-1].fields[extension.lower()] = (member.offset_data, member.size)
            # tarfile takes a cut between two members, or a damaged header, for the end: the end mark must be there
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end-of-archive mark after {tar.offset} bytes")
    except FileNotFoundError:
        raise ShardError(f"{path}: shard is missing; rebuild it, or correct the path") from None
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path}: not a whole tar ({error}); delete it and rebuild the shards") from None
    return samples


class ShardWriter:
    """Write samples to numbered tars of equal length; the same samples give the same bytes. Use as a context."""

    def __init__(self, folder: str | Path, samples_per_shard: int):
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []
        self._tar: tarfile.TarFile | None = None
        self._count = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._aside().unlink()

    def add(self, key: str, fields: dict[str, bytes]) -> None:
        """Append one sample; a full shard is closed and renamed to its final name."""
        if self._tar is None:
            self._tar = tarfile.open(self._aside(), "w", format=tarfile.USTAR_FORMAT)
        for extension, data in fields.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self._count += 1
        if self._count == self.samples_per_shard:
            self._finish()

    def _aside(self) -> Path:
        return self.folder / f".{len(self.paths):05d}.tar.tmp"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self.folder / f"{len(self.paths):05d}.tar"
        os.replace(self._aside(), path)
        self.paths.append(path)
        self._tar, self._count = None, 0


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path: str | Path, kind: str, shards: list[Path], dropped: dict[str, int], made_by: dict) -> dict:
    """Describe `shards` in a manifest at `path` and return it.

    `kind` is "images" or "latents"; `dropped` counts lost samples by reason; `made_by` is what decides the content
    (its fingerprint names it). Shard names are relative to the manifest's folder.
    """
    folder = Path(path).parent
    rows = []
    for shard in sorted(shards):
        rows.append(
            {
                "name": os.path.relpath(shard, folder),
                "samples": len(index_tar(shard)),
                "bytes": os.path.getsize(shard),
                "sha256": sha256_file(shard),
            }
        )
    manifest = {
        "kind": kind,
        "fingerprint": fingerprint(made_by, [row["sha256"] for row in rows]),
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "dropped": dropped,
        "made_by": made_by,
        "code": code_digest(),
        "shards": rows,
    }
    write_json(path, manifest)
    return manifest


def read_manifest(path: str | Path, full: bool = False) -> dict:
    """Read a manifest; `shards[i]["path"]` is where shard i lies.

    Sizes are compared with the files, sha256 sums too where `full`. Raises ShardError naming the shard at fault.
    """
    try:
        manifest = json.loads(Path(path).read_text())
        rows = manifest["shards"]
        if any({"name", "bytes", "sha256", "samples"} - set(row) for row in rows):
            raise ValueError
    except FileNotFoundError:
        raise ShardError(f"{path}: no such manifest; make it with: snakemake {path}") from None
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{path}: not a shard manifest; delete it and make it again") from None
    for row in rows:
        shard = Path(path).parent / row["name"]
        row["path"] = str(shard)
        remedy = f"rebuild it: snakemake --force {path}"
        if not shard.is_file():
            raise ShardError(f"{shard}: shard is missing, though {path} lists it; {remedy}")
        if os.path.getsize(shard) != row["bytes"]:
            raise ShardError(f"{shard}: {os.path.getsize(shard)} bytes, {row['bytes']} expected by {path}; {remedy}")
        if full and sha256_file(shard) != row["sha256"]:
            raise ShardError(f"{shard}: sha256 differs from the one in {path}; {remedy}")
    return manifest
