"""Fingerprints of configurations: which keys decide a result, and the digest of the code."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.schema import ExperimentConfig


def canonical(value: Any) -> str:
    """One JSON text for equal values, whatever the order of their keys."""
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=True)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def fingerprint(*values: Any) -> str:
    """16 hex digits of the sha256 of the values' canonical JSON."""
    return hashlib.sha256("\n".join(canonical(v) for v in values).encode()).hexdigest()[:16]


VOLATILE = [
    "wandb",
    "system",
    "distributed",
    "frozen",
    "init",
    "model.compile",
    "model.attention",
    "model.xformers",
    "model.gradient_checkpointing",
    "optimizer.fused",
    *(
        f"dataset.params.{k}"
        for k in ("path", "batch_size", "workers", "num_examples_to_see", "max_lost", "prefetch", "cache")
    ),
    *(
        f"experiment.{f.name}"
        for f in dataclasses.fields(ExperimentConfig)
        if f.name not in ("num_examples_to_see", "seed")
    ),
]


def decisive_keys(config: DictConfig) -> dict:
    """The keys of a stage that decide its weights.

    Where to log, how often to save, how a batch is shared and how fast a step is computed do not; data and initial
    weights count by their own records, not by their paths.
    """
    values = OmegaConf.to_container(config, resolve=True)
    for key in VOLATILE:
        *path, leaf = key.split(".")
        section = values
        for name in path:
            section = section[name]
        section.pop(leaf, None)
    return values


def stage_fingerprint(config: DictConfig) -> str:
    """Fingerprint of a stage as it was planned: of the keys that decide its weights, and of its batch sizes."""
    sizes = {key: config.system[key] for key in ("batch_size", "gradient_accumulation", "global_batch")}
    return fingerprint(decisive_keys(config), sizes)


def freeze_stage(config: DictConfig) -> DictConfig:
    """A stage's configuration as a file may hold it: without the secret, with its fingerprint as planned.

    Milestones are left out: each job gets those up to its own, so that a new one leaves the earlier ones as they are.
    """
    changes = {"frozen": stage_fingerprint(config), "wandb": {"api_key": None}, "experiment": {"milestones": []}}
    return OmegaConf.merge(config, changes)


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """The keys, in dot notation, under which two nested dicts differ."""
    found = []
    for key in sorted({*a, *b}):
        one, two = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += differences(one, two, f"{prefix}{key}.")
        elif one != two:
            found.append(f"{prefix}{key}")
    return found


def record_fingerprint(path: str | Path) -> str | None:
    """The fingerprint that a result's JSON record carries, or None without one."""
    try:
        return json.loads(Path(path).read_text()).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    names = ("torch", "diffusers", "transformers", "numpy", "pillow", "snakemake", "webdataset", "wandb")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest() -> str:
    """16 hex digits over the source of the library and the scripts: recorded in results, never a trigger."""
    root = Path(__file__).resolve().parents[2]
    files = sorted([*root.glob("sdtrain/**/*.py"), *root.glob("scripts/*.py")])
    return hashlib.sha256(b"\0".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()[:16]
