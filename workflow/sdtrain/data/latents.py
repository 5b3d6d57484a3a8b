"""Latent shards: the images of a manifest, encoded by a VAE, with captions, metadata and text states beside them.

Each latent shard holds the samples of one shard of images. A sample gets the members `latent` (safetensors: latents, or
mean and std, scaled, float16; original_size; crop) and, with a text encoder, `text`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.fingerprint import fingerprint, record_fingerprint
from sdtrain.config.load import load_config
from sdtrain.data import images, tars
from sdtrain.data.indices import read_index
from sdtrain.data.latent_checks import compare, find_warnings, measure
from sdtrain.data.manifest import read_manifest, write_manifest
from sdtrain.data.stream import use_one_thread
from sdtrain.errors import DataError
from sdtrain.io import storage
from sdtrain.io.cache import LocalCache
from sdtrain.io.files import atomic_path, read_json, sha256_file, write_json
from sdtrain.models.parts import TextEncoding, check_length, encode_moments, load_part

CROP, NOISE = 0, 1  # uses of a sample's randomness, each a pure function of (seed, use, shard, sample)


# ---------------------------------------------------------------- decoding
@dataclass
class Job:
    """Samples of one shard that are encoded together, each with its number in the shard."""

    shard: int
    samples: list[tuple[int, tars.Sample]]
    dropped: Counter[str]  # samples of the shard that cannot be encoded, by reason


@dataclass
class Batch:
    """The decoded images of a job: pixels, original_size and crop, stacked; key, number and other members of each."""

    shard: int
    dropped: Counter[str]
    keys: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    members: list[dict[str, bytes]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # messages on undecodable images


def plan_jobs(source: dict, numbers: list[int], batch_size: int, captions: bool, cache: LocalCache) -> Iterator[Job]:
    """Yield the samples of some shards in batches, at least one a shard; `captions` drops those without a caption."""
    for number in numbers:
        row, dropped = source["shards"][number], Counter[str]()
        kept: list[tuple[int, tars.Sample]] = []
        path = row["path"]
        if not storage.is_local(path):
            cache.fetch(path).close()
            path = str(cache.path(path))
        index = read_index(row["index_path"], path, columns=()) if row["index_path"] else tars.index_tar(path)
        for i, sample in enumerate(index):
            if not any(e in sample.fields for e in images.IMAGE_EXTENSIONS):
                dropped["no image"] += 1
            elif captions and "txt" not in sample.fields:
                if "cls" in sample.fields:
                    remedy = "leave out text_encoder= (latents.text_encoder)"
                    raise DataError(f"{path}: {sample.key} has a class, cls, and no caption to encode; {remedy}")
                dropped["no caption"] += 1
            else:
                kept.append((i, sample))
        for start in range(0, max(1, len(kept)), batch_size):
            yield Job(number, kept[start : start + batch_size], dropped if start == 0 else Counter())


class Images(Dataset):
    """Decode a job into its batch: item `job` of this dataset is a Batch."""

    def __init__(self, resolution: int, crop: str, seed: int):
        self.resolution, self.crop, self.seed = resolution, crop, seed

    def __getitem__(self, job: Job) -> Batch:
        batch, prepared = Batch(job.shard, job.dropped.copy()), []
        for number, sample in job.samples:
            extension = next(e for e in images.IMAGE_EXTENSIONS if e in sample.fields)
            rng = np.random.default_rng([self.seed, CROP, job.shard, number])
            try:
                prepared.append(images.prepare(sample.read(extension), self.resolution, self.crop, rng=rng))
            except images.ImageError as error:
                batch.lost.append(f"{sample.shard}: {sample.key}.{extension}: {error}")
                continue
            batch.keys.append(sample.key)
            batch.numbers.append(number)
            batch.members.append({e: sample.read(e) for e in ("txt", "cls", "json") if e in sample.fields})
        if prepared:
            batch.tensors = {name: torch.stack([p[name] for p in prepared]) for name in prepared[0]}
        if batch.lost:
            batch.dropped["undecodable"] += len(batch.lost)
        return batch


# ---------------------------------------------------------------- encoding
class Encoder:
    """The frozen networks on one device, which turn a batch into the members of its latent samples.

    On a CPU each image is encoded alone, at little cost: the last bits then depend neither on batch_size nor on the
    other images of the batch.
    """

    def __init__(self, vae_folder: str, text_folder: str | None, settings: DictConfig, device: torch.device):
        self.settings, self.device = settings, device
        self.together = 1 if device.type == "cpu" else settings.batch_size
        parts = {"vae": vae_folder, "text_encoder": text_folder, "tokenizer": text_folder}
        model = load_config(schema.ModelConfig, values={k: {"pretrained": v} for k, v in parts.items()})
        self.vae = load_part("vae", model).to(device)
        self.text = None
        if text_folder:
            tokenizer, encoder = load_part("tokenizer", model), load_part("text_encoder", model)
            check_length(tokenizer, encoder)
            self.text = TextEncoding(tokenizer, encoder.to(device), device, cache=0)

    def samples(self, batch: Batch) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the key and the members of each sample of a batch."""
        if not batch.keys:
            return
        sizes = {name: batch.tensors[name] for name in ("original_size", "crop")}
        tensors = {**self.latents(batch), **sizes}
        captions = [m["txt"].decode("utf-8", "replace").strip() for m in batch.members] if self.text else []
        states = self.states(captions) if self.text else None
        for i, (key, members) in enumerate(zip(batch.keys, batch.members, strict=True)):
            members = {"latent": save({name: tensor[i] for name, tensor in tensors.items()}), **members}
            yield key, members if states is None else {**members, "text": save({"text": states[i]})}

    def latents(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return what the setting `posterior` names, float16 N x C x h x w."""
        pixels = batch.tensors["pixels"].to(self.device).split(self.together)
        mean, std = (torch.cat(m) for m in zip(*(encode_moments(self.vae, p) for p in pixels), strict=True))
        if self.settings.posterior == "moments":
            return {"mean": mean.half().cpu(), "std": std.half().cpu()}
        if self.settings.posterior == "sample":
            keys = ([self.settings.seed, NOISE, batch.shard, number] for number in batch.numbers)
            noise = [np.random.default_rng(key).standard_normal(mean.shape[1:], np.float32) for key in keys]
            mean = mean + std * torch.from_numpy(np.stack(noise)).to(self.device)
        return {"latents": mean.half().cpu()}

    def states(self, captions: list[str]) -> torch.Tensor:
        """Return the text encoder's states of captions, float16 N x tokens x width, as in training."""
        assert self.text is not None
        parts = [captions[i : i + self.together] for i in range(0, len(captions), self.together)]
        return torch.cat([self.text(part) for part in parts]).half().cpu()


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the places of the latents of source shard `number` and of the record that is written after them."""
    return folder / f"{number:05d}.tar", folder / f"{number:05d}.json"


def is_finished(folder: Path, number: int) -> bool:
    """Return whether a shard is finished. If none of its images could be encoded, it has a record and no tar."""
    tar, record = shard_paths(folder, number)
    return record.exists() and (tar.exists() or not read_json(record)["samples"])


def encode_shards(
    source: dict, numbers: list[int], folder: Path, dataset: Images, encoder: Encoder, here: distributed.World
) -> None:
    """Encode some shards, while `workers` processes decode ahead; each shard appears whole, then its record."""
    settings, cache = encoder.settings, LocalCache(folder / f".fetched-{here.rank}")
    jobs = plan_jobs(source, numbers, settings.batch_size, encoder.text is not None, cache)
    batches = DataLoader(
        dataset,
        sampler=jobs,  # any iterable will do: its items are the dataset's keys
        batch_size=None,
        num_workers=settings.workers,
        worker_init_fn=use_one_thread,
    )
    label = f"latents {dataset.resolution} px" + f", rank 0 of {here.size}" * (here.size > 1)
    total = sum(source["shards"][number]["samples"] for number in numbers)
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="img", desc=label, mininterval=interval, disable=not here.is_main) as bar:
        for number, group in itertools.groupby(batches, key=attrgetter("shard")):
            write_shard(folder, number, group, encoder, bar)
            cache.path(source["shards"][number]["path"]).unlink(missing_ok=True)  # of a remote shard
    shutil.rmtree(cache.folder, ignore_errors=True)


def write_shard(folder: Path, number: int, batches: Iterable[Batch], encoder: Encoder, bar: tqdm) -> None:
    """Write the latents of one shard of images, then their record.

    A folder of its own for the unfinished tar: an earlier job that is still alive may write the same shard.
    """
    tar, record = shard_paths(folder, number)
    samples, dropped = 0, Counter[str]()
    with tempfile.TemporaryDirectory(prefix=f".{tar.stem}-", dir=folder) as temporary:
        fresh = Path(temporary) / tar.name
        with tars.write_tar(fresh) as add:
            for batch in batches:
                for key, members in encoder.samples(batch):
                    add(key, members)
                for error in batch.lost:
                    print(f"skipped: {error}", file=sys.stderr)
                samples, dropped = samples + len(batch.keys), dropped + batch.dropped
                bar.update(len(batch.keys) + batch.dropped.total())
        if samples:
            os.replace(fresh, tar)
    write_json(record, {"samples": samples, "dropped": dict(sorted(dropped.items()))})


# ---------------------------------------------------------------- all shards
def precompute(
    settings: DictConfig, vae: str, text_encoder: str | None, resolution: int, manifest: str, output: Path
) -> dict[str, Any] | None:
    """Encode this rank's missing shards. Rank 0 then waits for all shards, writes the manifest and returns it.

    `manifest` is that of the images; `vae` and `text_encoder` are the folders of components; `resolution` is in pixels.
    """
    here = distributed.world()
    source = read_manifest(manifest)
    made_by = {
        "images": source["fingerprint"],
        "vae": identity(vae),
        "resolution": resolution,
        "crop": settings.crop,
        "posterior": settings.posterior,
        "seed": settings.seed if settings.crop == "random" or settings.posterior == "sample" else None,
        "text_encoder": identity(text_encoder) if text_encoder else None,
    }
    folder = output.parent / fingerprint(made_by)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(len(source["shards"]))
    missing = [n for n in numbers[here.rank :: here.size] if not is_finished(folder, n)]
    if not missing and not here.is_main:
        return None
    encoder = Encoder(vae, text_encoder, settings, distributed.own_device(here))
    dataset = Images(resolution, settings.crop, settings.seed)
    encode_shards(source, missing, folder, dataset, encoder, here)
    if not here.is_main:
        return None
    wait_for(folder, numbers)
    return finish(source, manifest, folder, dataset, encoder, made_by, output)


def identity(folder: str) -> str:
    """Return the fingerprint in a component's record; of a component without one, the fingerprint of its files."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return record_fingerprint(f"{folder}.json") or fingerprint(
        [(str(p.relative_to(folder)), sha256_file(p)) for p in files]
    )


def wait_for(folder: Path, numbers: Iterable[int]) -> None:
    """Wait until the other ranks have finished their shards: for files, as a collective would time out."""
    for number in numbers:
        if not is_finished(folder, number):
            print(f"waiting for {shard_paths(folder, number)[0]} of another rank", file=sys.stderr, flush=True)
        while not is_finished(folder, number):
            time.sleep(0.5)


def finish(
    source: dict, manifest: str, folder: Path, dataset: Images, encoder: Encoder, made_by: dict, output: Path
) -> dict[str, Any]:
    """Check the finished shards, write their manifest, and delete what killed jobs have left. Return the manifest."""
    records = {n: read_json(shard_paths(folder, n)[1]) for n in range(len(source["shards"]))}
    samples = sum(r["samples"] for r in records.values())
    dropped = sum((Counter(r["dropped"]) for r in records.values()), Counter[str]())
    if not samples:
        raise DataError(f"{manifest}: not one image could be encoded ({dict(dropped)}); see the lines above")
    if samples + dropped.total() != source["samples"]:
        found = f"{samples:,} samples and {dropped.total():,} dropped, {source['samples']:,} expected"
        raise DataError(f"{manifest}: {found}; its shards changed after it was written: verify it")
    full = [n for n, record in records.items() if record["samples"]]
    made = [shard_paths(folder, n)[0] for n in full]
    jobs = plan_jobs(source, full[:1], 1, encoder.text is not None, LocalCache(folder / ".fetched"))
    first = next(batch for batch in map(dataset.__getitem__, jobs) if batch.keys)
    checks: dict[str, Any] = {"samples": samples, "dropped": dropped.total(), **measure(made)}
    checks["psnr"] = compare(
        made[0], first.tensors["pixels"][0], encoder.vae, encoder.device, output.with_name("check.png")
    )
    checks["warnings"] = find_warnings(checks)
    more: dict[str, Any] = {"checks": checks}
    if encoder.text:
        empty = folder / "empty_text.safetensors"
        with atomic_path(empty) as temporary:
            temporary.write_bytes(save({"text": encoder.states([""])[0]}))
        more["empty_text"] = os.path.relpath(empty, output.parent)
    delete(folder.glob(".*"))
    return write_manifest(output, "latents", made, dict(sorted(dropped.items())), made_by, **more)


def delete(paths: Iterable[Path]) -> None:
    """Delete files and folders, which other ranks may be deleting at the same time."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()
