"""Load and check configurations: defaults, then a YAML file, then dot-list overrides."""

from __future__ import annotations

import difflib
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtrain.config.checks import check_keys, check_values
from sdtrain.config.keys import keys_of
from sdtrain.config.schema import RunConfig, StageConfig
from sdtrain.config.schema_data import ComponentConfig, DataConfig, ExistingShardsConfig
from sdtrain.errors import ConfigError, did_you_mean

CONFIGS = "SDTRAIN_CONFIGS"  # environment variable: the folder of a job's configurations, a copy that no edit changes
MODEL_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler", "unet")
SHARD_DATASETS = ("WebDataset", "ClassificationWebDataset")  # the forms that read shards which the workflow makes

_structured = functools.cache(OmegaConf.structured)  # slow to build; each merge copies it


# ---------------------------------------------------------------- one file
def load_config(
    schema: type, path: str | Path | None = None, overrides: Sequence[str] = (), values: Any = None
) -> DictConfig:
    """Return the defaults of `schema`, overlaid with the YAML file at `path` and with dot-list `overrides`.

    If `values` are given, they are used instead of the file, and `path` only names them in messages. The result may
    still contain `???`; see `require`. Raise ConfigError, with the source and the nearest valid key, for an unknown
    key, a wrong type and a value that is not allowed.
    """
    where = "configuration" if path is None else str(path)
    if values is None and path is not None:
        values = _read_yaml(path)
    elif not isinstance(values, DictConfig):
        values = OmegaConf.create(values or {})
    try:
        dotlist = OmegaConf.from_dotlist([str(o) for o in overrides])
    except Exception as error:
        raise ConfigError(
            f"command line: {' '.join(overrides)}: must be key=value with a YAML value: {error}"
        ) from error
    config = _structured(schema)
    for source, layer in [(where, values), *([("command line", dotlist)] if overrides else [])]:
        check_keys(schema, OmegaConf.to_container(layer), source)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            raise ConfigError(f"{source}: {key}: {str(error).splitlines()[0]}") from error
    for key in _open_keys(OmegaConf.to_container(values)):  # a merge keeps the default where the file says ???
        if OmegaConf.select(dotlist, key, default="???") == "???":
            OmegaConf.update(config, key, "???")
    check_values(schema, config, where)
    return config


def _read_yaml(path: str | Path) -> DictConfig:
    """Return the mapping in a YAML file. Raise ConfigError, with a similar file name, if there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).stem, [p.stem for p in Path(path).parent.glob("*.yaml")], 1)
        hint = f"; did you mean {Path(path).parent / (near[0] + '.yaml')}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        values = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # the YAML parser's own errors have line and column
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of keys at the top level")
    return values


def require(config: DictConfig, where: str) -> DictConfig:
    """Return the config. Raise ConfigError if a value is still `???` or an interpolation cannot be resolved."""
    missing = sorted(_open_keys(OmegaConf.to_container(config)))
    if missing:
        example = " ".join(f"{key}=…" for key in missing)
        raise ConfigError(
            f"{where}: required and still ???: {', '.join(missing)}. Set them in the file or as {example}"
        )
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    return config


def _open_keys(values: Any, prefix: str = "") -> list[str]:
    """Return the keys whose own value is `???`, without those that refer to one of them by `${…}`."""
    found = []
    for key, value in values.items():
        found += [f"{prefix}{key}"] if value == "???" else []
        found += _open_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return found


def config_folder() -> Path:
    """Return the folder of the configurations: `configs`, or the copy that the workflow invocation made for a job."""
    return Path(os.environ.get(CONFIGS, "configs"))


# ---------------------------------------------------------------- runs and stages
def load_run(run: str, overrides: Sequence[str] = ()) -> tuple[DictConfig, dict[str, DictConfig]]:
    """Return `configs/{run}.yaml` with its overrides, and the whole configuration of each of its training stages.

    A stage has the run's sections, overlaid with its own keys. Paths that the workflow decides (log folder, project,
    name, dataset path, initial weights) are set if the file leaves them open. Raise ConfigError if the run or one of
    its stages is wrong.
    """
    path = config_folder() / f"{run}.yaml"
    config = load_config(RunConfig, path, overrides)
    if OmegaConf.is_missing(config, "stages") or not config.stages:
        raise ConfigError(f"{path}: stages: at least one stage is needed, such as stages: {{stage1: {{}}}}")
    values: Any = OmegaConf.to_container(config)
    shared = {key: values[key] for key in keys_of(StageConfig)}
    stages: dict[str, DictConfig] = {}
    for name, own in values["stages"].items():
        where = f"{path}: stages.{name}"
        if not isinstance(own or {}, dict):
            raise ConfigError(f"{where}: must be a mapping of the keys that differ, got {own!r}")
        stage = load_config(StageConfig, where, values=_overlay(shared, own or {}))
        _complete(stage, run, name, config.data)
        if stage.init in stages:
            last = stages[stage.init].experiment.milestones[-1]
            stage.init = f"results/runs/{run}/{stage.init}/{last}/pipeline"
        elif stage.init and "/" not in stage.init:
            hint = did_you_mean(stage.init, stages)
            raise ConfigError(f"{where}.init: no stage {stage.init!r} before {name}{hint}")
        stages[name] = require(stage, where)
    return config, stages


def _complete(stage: DictConfig, run: str, name: str, data: str | None) -> None:
    """Set the paths that the workflow decides and that are open; sort the milestones and add the end of the stage."""
    facts = {
        "experiment.log_dir": "results/runs",
        "experiment.project": run,
        "experiment.name": name,
        "dataset.params.path": _dataset_path(data, stage),
    }
    for key, value in facts.items():
        if value is not None and OmegaConf.select(stage, key, throw_on_missing=False) is None:
            OmegaConf.update(stage, key, value)
    if not OmegaConf.is_missing(stage.experiment, "num_examples_to_see"):  # else `require` reports it
        milestones = {*stage.experiment.milestones, stage.experiment.num_examples_to_see}
        stage.experiment.milestones = sorted(milestones)


def _overlay(values: dict[Any, Any], own: dict[Any, Any]) -> dict[Any, Any]:
    """Return nested `values` with those of `own` in their place; lists are replaced whole."""
    both = {
        key: _overlay(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        for key, value in own.items()
    }
    return {**values, **both}


def _dataset_path(data: str | None, stage: DictConfig) -> str | None:
    """Return the manifest that the workflow makes for a stage; None for other forms, whose files the user names."""
    if data is None or stage.dataset.type not in (*SHARD_DATASETS, "LatentDataset"):
        return None
    if stage.dataset.type in SHARD_DATASETS:
        return f"results/data/{data}/train/shards/manifest.json"
    vae = Path(stage.model.vae.pretrained or stage.model.pretrained or "vae").name
    return f"results/data/{data}/train/latents/{vae}-{stage.dataset.params.resolution}px/manifest.json"


def held_out_dataset(dataset: DictConfig, path: str) -> DictConfig:
    """Return a stage's `dataset` section for the held-out images at `path`, with the same filters and resolution."""
    kind = "ClassificationWebDataset" if dataset.params.idx_to_prompt else "WebDataset"
    held_out = OmegaConf.merge(dataset, {"type": kind, "params": {"path": path, "flip": False}})
    assert isinstance(held_out, DictConfig)
    return held_out


# ---------------------------------------------------------------- components
def load_components() -> dict[str, DictConfig]:
    """Return the entries of `configs/components.yaml`."""
    path = config_folder() / "components.yaml"
    entries: Any = OmegaConf.to_container(_read_yaml(path))
    found = {}
    for name, entry in entries.items():
        where = f"{path}: {name}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: must be a mapping of keys, such as {{source: folder, path: …}}")
        found[str(name)] = require(load_config(ComponentConfig, where, values=entry), where)
    return found


def component_record(folder: str) -> str:
    """Return the record of a component, resources/components/{name}.json, for any path in its folder."""
    return "/".join(Path(folder).parts[:3]) + ".json"


# ---------------------------------------------------------------- data
DATA_STEPS = {  # rule: the section of a dataset's configuration that it depends on
    "fetch_table": "table",
    "select_samples": "select",
    "build_shards": "shards",
    "precompute_latents": "latents",
}


def load_data(dataset: str) -> DictConfig:
    """Return `configs/data/{dataset}.yaml`."""
    path = config_folder() / "data" / f"{dataset}.yaml"
    return require(load_config(DataConfig, path), str(path))


def data_slice(data: DictConfig, step: str) -> DictConfig:
    """Return the part of a dataset's configuration that one rule depends on."""
    if step in DATA_STEPS:
        return data[DATA_STEPS[step]]
    if step not in ("reshard", "index_shards"):
        raise ConfigError(f"config/{step}.yaml: no rule {step}{did_you_mean(step, [*DATA_STEPS, 'reshard'])}")
    existing = {key: data.shards[key] for key in ("path", "held_out_path", "samples_per_shard")}
    return load_config(ExistingShardsConfig, values={**existing, "select": data.select})


def way_in(data: DictConfig) -> str:
    """Return how a dataset's shards are made, which names the rule and the folder of their parts.

    "built" from a table; from existing shards "resharded" if samples are selected, else "indexed".
    """
    if not data.shards.path:
        return "built"
    return "resharded" if data.select.filters or data.select.held_out.fraction else "indexed"


def check_existing(select: DictConfig) -> None:
    """Raise ConfigError for a selection that is possible for the rows of a table, but not for existing shards."""
    for key in ("deduplicate", "rows"):
        if select[key] is not None:
            raise ConfigError(f"select.{key}: is for tables only; remove it, or set select.filters for shards")
