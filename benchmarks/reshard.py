"""Measure resharding a gigabyte of shards to half against `cp` of the kept bytes, and its peak memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from webdataset import ShardWriter

from sdtrain.config import schema_data
from sdtrain.config.load import load_config
from sdtrain.data.reshard import reshard
from sdtrain.io.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
SHARDS, SAMPLES, SIZE, ROUNDS = 10, 1000, 100_000, 5  # samples a shard, bytes an image


def write_shards(folder: Path, shards: int, samples: int, size: int) -> str:
    """Write shards of noise with LAION's metadata, half of them at 512 px or more. Return their paths as a glob."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(2 * size)
    folder.mkdir()
    with ShardWriter(f"{folder}/%05d.tar", maxcount=samples, verbose=0, encoder=False) as writer:
        for number in range(shards * samples):
            width = int(rng.choice([300, 700]))
            meta = {"original_width": width, "original_height": 512, "pwatermark": round(rng.random(), 3)}
            meta |= {"caption": f"a caption of a few words {number}", "url": f"https://example.org/{number}.jpg"}
            start = number % size
            sample = {"__key__": f"{number:09d}", "jpg": noise[start : start + size]}
            writer.write(sample | {"txt": meta["caption"].encode(), "json": json.dumps(meta).encode()})
    return f"{folder}/*.tar"


def configure(path: str):
    """Return the rule's configuration: keep 512 px and more."""
    values = {"path": path, "samples_per_shard": SAMPLES // 2, "select": {"filters": {"original_width": ">=512"}}}
    return load_config(schema_data.ExistingShardsConfig, values=values)


def peak_memory(path: str, output: str) -> float:
    """Return the peak memory in MB of a child process that reshards."""
    code = (
        "import sys, resource; sys.path[:0] = ['benchmarks', 'workflow']; import reshard\n"
        f"reshard.reshard(reshard.configure({path!r}), 'train', 0, 1, {output!r})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def seconds(work: Callable[[], object], made: Path | None = None) -> float:
    """Return the wall time of a call, until the tars below `made`, if given, are on the disk."""
    begin = time.perf_counter()
    work()
    for file in made.rglob("*.tar") if made else []:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - begin


def compare(folder: Path, path: str, to_disk: bool) -> list[float]:
    """Reshard, then copy the resharded bytes. Return the throughput relative to cp, and to cp plus SHA-256."""
    made, copied = folder / "made", folder / "copied"
    output = str(made / "manifest.json")
    resharding = seconds(lambda: reshard(configure(path), "train", 0, 1, output), made if to_disk else None)
    tars = list(made.rglob("*.tar"))
    kept = sum(tar.stat().st_size for tar in tars)
    copied.mkdir()
    copy = seconds(lambda: subprocess.run(["cp", *tars, copied], check=True), copied if to_disk else None)
    sums = seconds(lambda: [sha256_file(tar) for tar in tars])
    for left in (made, copied):
        shutil.rmtree(left)
    rates = ", ".join(f"{kept / t / 1e6:,.0f}" for t in (resharding, copy, copy + sums))
    where = "on the disk" if to_disk else "in the cache"
    ratios = [copy / resharding, (copy + sums) / resharding]
    print(f"{where}, MB/s of reshard, cp, cp with sha256: {rates}; ratios {ratios[0]:.2f}, {ratios[1]:.2f}", flush=True)
    return ratios


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_shards(Path(folder, "in"), SHARDS, SAMPLES, SIZE)
        for to_disk in (False, True):
            ratios = [compare(Path(folder), path, to_disk) for _ in range(ROUNDS)]
            plain, summed = np.median(ratios, axis=0)
            print(f"median ratio to cp {plain:.2f}, to cp with sha256 {summed:.2f} ({os.cpu_count()} cores)")
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for shards in (10, 100):
            path = write_shards(Path(folder, f"{shards}"), shards, SAMPLES, 100)
            peaks.append(peak_memory(path, f"{folder}/made-{shards}/manifest.json"))
            print(f"{shards * SAMPLES:,} samples: peak memory {peaks[-1]:,.0f} MB", flush=True)
        print(f"ratio of the peaks: {peaks[1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
