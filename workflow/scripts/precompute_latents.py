"""Encode a manifest's images into latent shards, one for each shard of images, captions and metadata beside them.

images= is the manifest of the images, vae= a component's folder, resolution= the pixels a side. With text_encoder=,
another component's folder, the states of the captions are kept too. Any number of ranks share the shards: start it by
torchrun, by srun --kill-on-bad-exit, or as it is. A killed job goes on with the shards that are missing.

Each sample gets `latent` (safetensors: latents, or mean and std, scaled, float16; original_size; crop) and `text`.
"""

import io
import itertools
import math
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

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load, save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import fingerprint, record_fingerprint
from sdtrain.config.load import load_config
from sdtrain.data import images, tars
from sdtrain.data.manifest import read_manifest, write_manifest
from sdtrain.errors import ConfigError
from sdtrain.io import storage
from sdtrain.io.files import read_json, sha256_file, write_json
from sdtrain.models.parts import ModelError, TextEncoding, check_length, decode_latents, encode_moments, load_part

CROP, NOISE = 0, 1  # uses of a sample's randomness: each a function of (seed, use, shard, sample) and of nothing else
LOOKED_AT = (8, 128)  # shards, and samples of each, whose mean and deviation are measured
MEAN, DEVIATION, PSNR = 0.5, (0.5, 2.0), 15.0  # beyond these, a VAE's scaling does not fit, or its images are not these


# ---------------------------------------------------------------- images in
@dataclass
class Job:
    """Samples of one shard that are encoded together, each with its number there, and what its shard lacks."""

    shard: int
    samples: list[tuple[int, tars.Sample]]
    dropped: Counter


@dataclass
class Batch:
    """A job's images: pixels, original_size and crop, stacked; key, number and other members of each; those lost."""

    shard: int
    dropped: Counter
    keys: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    members: list[dict[str, bytes]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def jobs(source: dict, numbers: list[int], batch_size: int, captions: bool, cache: Path) -> Iterator[Job]:
    """The samples of some shards in batches, at least one a shard; `captions`: without those that have none."""
    for number in numbers:
        row, kept, dropped = source["shards"][number], [], Counter()
        path = row["path"] if storage.is_local(row["path"]) else storage.fetch(row["path"], cache)
        index = tars.read_index(row["index_path"], path, columns=()) if row["index_path"] else tars.index_tar(path)
        for i, sample in enumerate(index):
            if not any(e in sample.fields for e in images.IMAGE_EXTENSIONS):
                dropped["no image"] += 1
            elif captions and "txt" not in sample.fields:
                if "cls" in sample.fields:
                    remedy = "leave text_encoder= (latents.text_encoder) out"
                    raise tars.ShardError(f"{path}: {sample.key} has a class, cls, and no caption to encode; {remedy}")
                dropped["no caption"] += 1
            else:
                kept.append((i, sample))
        for start in range(0, max(1, len(kept)), batch_size):
            yield Job(number, kept[start : start + batch_size], dropped if start == 0 else Counter())


class Images(Dataset):
    """Item: a job -> its batch, decoded."""

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


# ---------------------------------------------------------------- latents out
class Encoder:
    """The frozen networks on one device: a batch -> the members of its latent samples.

    On the CPU each image is encoded by itself, which costs little there: what surrounds it, and batch_size,
    then do not show in the last bit.
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
        """The key and the members of each sample of a batch."""
        if not batch.keys:
            return
        tensors = {
            **self.latents(batch),
            "original_size": batch.tensors["original_size"],
            "crop": batch.tensors["crop"],
        }
        captions = [m["txt"].decode("utf-8", "replace").strip() for m in batch.members] if self.text else []
        states = self.states(captions) if self.text else None
        for i, (key, members) in enumerate(zip(batch.keys, batch.members, strict=True)):
            members = {"latent": save({name: tensor[i] for name, tensor in tensors.items()}), **members}
            yield key, members if states is None else {**members, "text": save({"text": states[i]})}

    def latents(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What `posterior` asks for, float16 N x C x h x w."""
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
        """States of captions, float16 N x tokens x width, as a training would compute them."""
        parts = [captions[i : i + self.together] for i in range(0, len(captions), self.together)]
        return torch.cat([self.text(part) for part in parts]).half().cpu()


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Where the latents of the source's shard `number` lie, and the record that is written once they are whole."""
    return folder / f"{number:05d}.tar", folder / f"{number:05d}.json"


def is_finished(folder: Path, number: int) -> bool:
    """Whether a shard is finished; one of which no image could be encoded has a record and no tar."""
    tar, record = shard_paths(folder, number)
    return record.exists() and (tar.exists() or not read_json(record)["samples"])


def encode_shards(source: dict, numbers: list[int], folder: Path, dataset: Images, encoder: Encoder, here) -> None:
    """Encode some shards, decoding ahead in `workers` processes; each appears whole, then its record."""
    settings, cache = encoder.settings, folder / f".fetched-{here.rank}"
    work = jobs(source, numbers, settings.batch_size, encoder.text is not None, cache)
    batches = DataLoader(
        dataset,
        sampler=work,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=settings.workers,
        worker_init_fn=_one_thread,
    )
    label = f"latents {dataset.resolution} px" + f", rank 0 of {here.size}" * (here.size > 1)
    total = sum(source["shards"][number]["samples"] for number in numbers)
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="img", desc=label, mininterval=interval, disable=not here.main) as bar:
        for number, group in itertools.groupby(batches, key=attrgetter("shard")):
            path = source["shards"][number]["path"]
            copy = None if storage.is_local(path) else Path(storage.fetch(path, cache))  # which `jobs` has made
            write_shard(folder, number, group, encoder, bar)
            if copy:
                copy.unlink(missing_ok=True)  # after the last shard the main rank tidies up, too
    shutil.rmtree(cache, ignore_errors=True)


def write_shard(folder: Path, number: int, batches: Iterable[Batch], encoder: Encoder, bar: tqdm) -> None:
    """Write the latents of one shard of images, and their record."""
    tar, record = shard_paths(folder, number)
    samples, dropped = 0, Counter()
    with tempfile.TemporaryDirectory(prefix=f".{tar.stem}-", dir=folder) as aside:
        with tars.ShardWriter(aside, samples_per_shard=sys.maxsize) as writer:
            for batch in batches:
                for key, members in encoder.samples(batch):
                    writer.add(key, members)
                for error in batch.lost:
                    print(f"skipped: {error}", file=sys.stderr)
                samples, dropped = samples + len(batch.keys), dropped + batch.dropped
                bar.update(len(batch.keys) + batch.dropped.total())
        if samples:
            os.replace(writer.paths[0], tar)
    write_json(record, {"samples": samples, "dropped": dict(sorted(dropped.items()))})


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------- checks
def measure(made: list[Path]) -> dict[str, float]:
    """Mean and standard deviation of latents of some shards; with moments, of one draw of each."""
    rng, values = torch.Generator().manual_seed(0), []
    count, samples = LOOKED_AT
    for tar in made[:: math.ceil(len(made) / count)]:
        for sample in tars.index_tar(tar)[:samples]:
            values.append(draw(load(sample.read("latent")), rng))
    values = torch.stack(values).double()
    return {"mean": round(values.mean().item(), 4), "std": round(values.std().item(), 4)}


def draw(tensors: dict[str, torch.Tensor], rng: torch.Generator) -> torch.Tensor:
    """The latents of one sample, float32; drawn where it has moments."""
    if "latents" in tensors:
        return tensors["latents"].float()
    mean, std = tensors["mean"].float(), tensors["std"].float()
    return mean + std * torch.randn(mean.shape, generator=rng)


def compare(tar: Path, pixels: torch.Tensor, encoder: Encoder, output: Path) -> float:
    """Decode the first latents of a tar; the image and what came of it go side by side to `output`. PSNR in dB."""
    latents = draw(load(tars.index_tar(tar)[0].read("latent")), torch.Generator().manual_seed(0))
    decoded = decode_latents(encoder.vae, latents[None].to(encoder.device))[0].cpu()
    both = (torch.cat([pixels, decoded], dim=2) + 1) * 127.5
    png = io.BytesIO()
    Image.fromarray(both.round().byte().permute(1, 2, 0).numpy()).save(png, "PNG")
    write_bytes(output, png.getvalue())
    error = torch.nn.functional.mse_loss(decoded, pixels).item()
    return round(10 * math.log10(4 / max(error, 1e-10)), 2)


def warnings_of(checks: dict) -> list[str]:
    """What looks wrong in the checks, and what to do about it."""
    found = []
    if abs(checks["mean"]) > MEAN or not DEVIATION[0] <= checks["std"] <= DEVIATION[1]:
        found.append(
            f"latents have mean {checks['mean']} and standard deviation {checks['std']}, not near 0 and 1: "
            "set scaling_factor (and shift_factor) in the VAE's config.json"
        )
    if checks["psnr"] < PSNR:
        found.append(f"a decoded sample is {checks['psnr']} dB from its image; is the VAE one for such images?")
    return found


# ---------------------------------------------------------------- the command
def precompute(
    settings, vae: str, text_encoder: str | None, resolution: int, manifest: str, output: Path
) -> dict | None:
    """Encode this rank's shards that are not there yet; the main rank then writes the manifest and returns it."""
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
    if not missing and not here.main:
        return None
    encoder = Encoder(vae, text_encoder, settings, distributed.own_device(here))
    dataset = Images(resolution, settings.crop, settings.seed)
    encode_shards(source, missing, folder, dataset, encoder, here)
    if not here.main:
        return None
    wait_for(folder, numbers)
    return finish(source, manifest, folder, dataset, encoder, made_by, output)


def identity(folder: str) -> str:
    """The fingerprint in a component's record; of a folder that has none, one of its files."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return record_fingerprint(f"{folder}.json") or fingerprint(
        [(str(p.relative_to(folder)), sha256_file(p)) for p in files]
    )


def wait_for(folder: Path, numbers: Iterable[int]) -> None:
    """Wait until the other ranks have finished their shards too: for files, as no time-out of a network fits."""
    for number in numbers:
        if not is_finished(folder, number):
            print(f"waiting for {shard_paths(folder, number)[0]} of another rank", file=sys.stderr, flush=True)
        while not is_finished(folder, number):
            time.sleep(0.5)


def finish(source: dict, manifest: str, folder: Path, dataset: Images, encoder: Encoder, made_by, output: Path) -> dict:
    """Check what was made, write the manifest, and take away what killed jobs have left."""
    records = {n: read_json(shard_paths(folder, n)[1]) for n in range(len(source["shards"]))}
    samples = sum(r["samples"] for r in records.values())
    dropped = sum((Counter(r["dropped"]) for r in records.values()), Counter())
    if not samples:
        raise tars.ShardError(f"{manifest}: not one image could be encoded ({dict(dropped)}); see the lines above")
    if samples + dropped.total() != source["samples"]:
        found = f"{samples:,} samples and {dropped.total():,} dropped, {source['samples']:,} expected"
        raise tars.ShardError(f"{manifest}: {found}; its shards are not those it was written for: verify it")
    full = [n for n, record in records.items() if record["samples"]]
    made = [shard_paths(folder, n)[0] for n in full]
    work = jobs(source, full[:1], 1, encoder.text is not None, folder / ".fetched")
    first = next(batch for batch in map(dataset.__getitem__, work) if batch.keys)
    checks = {"samples": samples, "dropped": dropped.total(), **measure(made)}
    picture = output.with_name("check.png")
    checks["psnr"] = compare(made[0], first.tensors["pixels"][0], encoder, picture)
    checks["warnings"] = warnings_of(checks)
    more = {"checks": checks}
    if encoder.text:
        empty = folder / "empty_text.safetensors"
        write_bytes(empty, save({"text": encoder.states([""])[0]}))
        more["empty_text"] = os.path.relpath(empty, output.parent)
    asides = (f.parent.glob(f".{f.name}.*.tmp") for f in (output, picture))
    remove(itertools.chain(folder.glob(".*"), *asides))
    return write_manifest(output, "latents", made, dict(sorted(dropped.items())), made_by, **more)


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, which the ranks that made them may be removing at the same time."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(data)
    os.replace(aside, path)


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = {"vae": None, "text_encoder": "", "resolution": None, "images": None, "output": None}
    settings, own = command_line(argv, schema.LatentsConfig, __doc__, **keys)
    here, output = distributed.world(), Path(own["output"])
    component = f"resources/components/{settings.text_encoder}" if settings.text_encoder else None
    expected = (ConfigError, ModelError, tars.ShardError, storage.StorageError)
    try:
        if not own["resolution"].isdigit():
            raise ConfigError(f"resolution={own['resolution']}: a number of pixels is expected")
        text = own["text_encoder"] or component
        manifest = precompute(settings, own["vae"], text, int(own["resolution"]), own["images"], output)
    except expected as error:
        raise SystemExit(f"error: {error}" if here.main else f"rank {here.rank} ends: {error}") from None
    if manifest:
        checks = manifest["checks"]
        for warning in checks["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        found = f"mean {checks['mean']:.3f}, standard deviation {checks['std']:.3f}, decoded {checks['psnr']:.1f} dB"
        print(f"{output}: {checks['samples']:,} latents, {checks['dropped']:,} dropped, {found} (check.png)")


if __name__ == "__main__":
    main(sys.argv)
