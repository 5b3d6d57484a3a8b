"""Check the keys and values of a configuration against its schema."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from sdtrain.config.keys import BOUNDS, all_keys, keys_of
from sdtrain.config.schema import StageConfig
from sdtrain.errors import ConfigError, did_you_mean

Find = Callable[[str], Any]  # returns the value of a key
REPEATED_KEYS = {  # open-diffusion's dataset section repeats these
    "dataset.params.batch_size": "system.batch_size",
    "dataset.params.num_examples_to_see": "experiment.num_examples_to_see",
}


def check_keys(schema: type, values: Any, source: str, prefix: str = "") -> None:
    """Raise ConfigError for an unknown key, for a section that is not a mapping, and for a value that is no choice."""
    known = keys_of(schema)
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{source}: unknown key {prefix}{name}{did_you_mean(str(name), list(known), prefix)}")
        key, where = known[name], f"{source}: {prefix}{name}"
        if value is None or value == "???" or "${" in str(value) and not isinstance(value, dict):
            continue
        if isinstance(value, dict) and key.section:
            check_keys(key.section, value, source, f"{prefix}{name}.")
        elif key.is_mapping and not isinstance(value, dict):
            raise ConfigError(f"{where}: must be a mapping of keys, got {value!r}")
        elif key.choices and value not in key.choices:
            hint = did_you_mean(str(value), list(key.choices))
            raise ConfigError(f"{where}: must be one of {', '.join(key.choices)}, got {value!r}{hint}")


def check_values(schema: type, config: DictConfig, where: str) -> None:
    """Raise ConfigError for a value out of its bounds, or in conflict with another key."""
    # None for a key that is open, or that cannot be resolved: `require` reports it
    find = functools.partial(OmegaConf.select, config, throw_on_resolution_failure=False)
    for key in all_keys(schema):
        value = find(key.name) if key.bounds else None
        if value is not None and not all(BOUNDS[name][0](value, bound) for name, bound in key.bounds.items()):
            raise ConfigError(f"{where}: {key.name}: must be {key.limits}, got {value!r}")
    if issubclass(schema, StageConfig):
        for check in (_check_batch_size, _check_repeated_keys, _check_wait, _check_images):
            if problem := check(find):
                raise ConfigError(f"{where}: {problem}")


def _check_batch_size(find: Find) -> str | None:
    size = find("system.batch_size")
    if size == "auto" and find("distributed.strategy") == "fsdp":
        return "system.batch_size: auto needs distributed.strategy=ddp; set a number"
    if size in (None, "auto") or (isinstance(size, int) and size > 0):
        return None
    return f"system.batch_size: must be a positive whole number or auto, got {size!r}"


def _check_repeated_keys(find: Find) -> str | None:
    for key, original in REPEATED_KEYS.items():
        if find(key) != find(original):
            return f"{key}: must equal {original}={find(original)!r}, got {find(key)!r}; set that one"
    return None


def _check_wait(find: Find) -> str | None:
    """The other ranks wait in a collective for rank 0, which waits for the training folder."""
    wait, timeout = find("experiment.wait_minutes"), find("distributed.timeout_minutes")
    if wait and timeout is not None and wait >= timeout:
        return f"experiment.wait_minutes: must be less than distributed.timeout_minutes={timeout}, got {wait}"
    return None


def _check_images(find: Find) -> str | None:
    end = find("experiment.num_examples_to_see")
    for key in ("experiment.stop_at", "experiment.milestones"):
        value = find(key)
        images = value if isinstance(value, ListConfig) else [value]
        if end is not None and any(count is not None and not 0 <= count <= end for count in images):
            return f"{key}: must be between 0 and num_examples_to_see={end}, got {value!r}"
    return None
