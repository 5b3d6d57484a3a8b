"""Compute the fingerprints of configurations and of the code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.keys import NOT_NEUTRAL, all_keys
from sdtrain.config.schema import StageConfig


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value: equal values have equal texts, in any order of their keys."""
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=True)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def fingerprint(*values: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the canonical JSON of the values."""
    return hashlib.sha256("\n".join(canonical(v) for v in values).encode()).hexdigest()[:16]


def decisive_keys(config: DictConfig, schema: type | None = None) -> dict[str, Any]:
    """Return the keys of a training that decide its weights, as a nested dict. `schema` is by default a stage's.

    Keys of logging, saving, batch sharing and speed are left out. Data and initial weights are identified by records
    of their content, so their paths are left out too. A section without such keys is left out.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    for entry in reversed(all_keys(schema or StageConfig)):  # a section after its keys, of which none may be left
        value = _value(values, entry.name)
        is_neutral = value == entry.metadata.get("neutral", NOT_NEUTRAL)
        if is_neutral or not entry.decides and not (entry.section and value):
            _remove(values, entry.name)
    return values


def slice_text(config: DictConfig, resolve: bool = True) -> str:
    """Return the YAML text of a frozen slice.

    A key at its neutral value is left out if this is also its default: the file means the same without it, and equals
    the one that was written before the key existed.
    """
    schema: Any = OmegaConf.get_type(config)
    neutral = [entry for entry in all_keys(schema) if entry.default == entry.metadata.get("neutral", NOT_NEUTRAL)]
    if neutral:
        values: Any = OmegaConf.to_container(config, resolve=resolve)
        for entry in neutral:
            if _value(values, entry.name) == entry.default:
                _remove(values, entry.name)
        config = OmegaConf.create(values)
    return OmegaConf.to_yaml(config, resolve=resolve, sort_keys=True)


def _value(values: Any, name: str) -> Any:
    """Return the value of a key in dot notation; None where a section is missing or null."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _remove(values: dict[str, Any], name: str) -> None:
    """Remove a key in dot notation, if it is there."""
    section, _, leaf = name.rpartition(".")
    parent = _value(values, section) if section else values
    if isinstance(parent, dict):
        parent.pop(leaf, None)


def stage_fingerprint(config: DictConfig) -> str:
    """Return the fingerprint of a planned stage: of the keys that decide its weights, and of its batch sizes."""
    sizes = {key: config.system[key] for key in ("batch_size", "gradient_accumulation", "global_batch")}
    return fingerprint(decisive_keys(config), sizes)


def freeze_stage(config: DictConfig) -> DictConfig:
    """Return a stage's configuration to be written to a file: without the API key, with its fingerprint as planned.

    Milestones are left out: each job gets those up to its own, so that adding one does not rerun the earlier ones.
    """
    changes = {"frozen": stage_fingerprint(config), "wandb": {"api_key": None}, "experiment": {"milestones": []}}
    frozen = OmegaConf.merge(config, changes)
    assert isinstance(frozen, DictConfig)
    return frozen


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the keys, in dot notation, in which two nested dicts differ."""
    found = []
    for key in sorted({*a, *b}):
        one, two = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += differences(one, two, f"{prefix}{key}.")
        elif one != two:
            found.append(f"{prefix}{key}")
    return found


def record_fingerprint(path: str | Path) -> str | None:
    """Return the fingerprint in the JSON record of a result, or None if there is none."""
    try:
        return json.loads(Path(path).read_text()).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    names = ("torch", "diffusers", "transformers", "numpy", "pillow", "snakemake", "webdataset", "wandb")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest() -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the source code. Results record it; it triggers no rerun."""
    root = Path(__file__).resolve().parents[2]
    files = sorted([*root.glob("sdtrain/**/*.py"), *root.glob("scripts/*.py")])
    return hashlib.sha256(b"\0".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()[:16]
