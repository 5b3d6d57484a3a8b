"""Load and check configurations: defaults, then a YAML file, then dot-list overrides."""

from __future__ import annotations

import copy
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
TABLE_DATASETS = ("ParquetDataset", "CSVDataset")

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
        values = _parse_yaml(_read_text(path), where)
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


def _read_text(path: str | Path) -> str:
    """Return the text of a file. Raise ConfigError, with a similar file name, if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).stem, [p.stem for p in Path(path).parent.glob("*.yaml")], 1)
        hint = f"; did you mean {Path(path).parent / (near[0] + '.yaml')}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


@functools.lru_cache(maxsize=64)
def _parse_yaml(text: str, path: str) -> DictConfig:
    """Return the mapping in a YAML text of the file `path`. Equal texts are parsed once; do not change the result."""
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


def _read_source(name: str) -> tuple[str, str]:
    """Return the path and the text of `configs/{name}.yaml`, by which loaded configurations are cached."""
    path = config_folder() / f"{name}.yaml"
    return str(path), _read_text(path)


# ---------------------------------------------------------------- runs and stages
def load_run(run: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return `configs/{run}.yaml` with its overrides. Raise ConfigError if the run or one of its stages is wrong."""
    source = *_read_source(run), tuple(overrides)
    config = _load_run(*source)
    if OmegaConf.is_missing(config, "stages") or not config.stages:
        raise ConfigError(f"{source[0]}: stages: at least one stage is needed, such as stages: {{stage1: {{}}}}")
    for stage in config.stages:
        _load_stage(*source, stage)
    return copy.deepcopy(config)


def load_stage(run: str, stage: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the whole configuration of a training stage: the run's sections, overlaid with the stage's own keys.

    Paths that the workflow decides (log folder, project, name, dataset path, initial weights) are set if the file
    leaves them open.
    """
    return copy.deepcopy(_load_stage(*_read_source(run), tuple(overrides), stage))


@functools.lru_cache(maxsize=16)
def _load_run(path: str, text: str, overrides: tuple[str, ...]) -> DictConfig:
    return load_config(RunConfig, path, overrides, values=_parse_yaml(text, path))


@functools.lru_cache(maxsize=64)
def _load_stage(path: str, text: str, overrides: tuple[str, ...], stage: str) -> DictConfig:
    run, run_config = Path(path).stem, _load_run(path, text, overrides)
    where = f"{path}: stages.{stage}"
    if stage not in run_config.stages:
        raise ConfigError(f"{path}: stages: no stage {stage!r}{did_you_mean(stage, list(run_config.stages))}")
    shared: Any = OmegaConf.to_container(run_config)
    own = shared["stages"][stage] or {}
    if not isinstance(own, dict):
        raise ConfigError(f"{where}: must be a mapping of the keys that differ, got {own!r}")
    config = load_config(StageConfig, where, values=_overlay({key: shared[key] for key in keys_of(StageConfig)}, own))
    facts = {
        "experiment.log_dir": "results/runs",
        "experiment.project": run,
        "experiment.name": stage,
        "dataset.params.path": _dataset_path(run_config, config),
    }
    for key, value in facts.items():
        if value is not None and OmegaConf.select(config, key, throw_on_missing=False) is None:
            OmegaConf.update(config, key, value)
    _set_milestones(config.experiment)
    stages = list(run_config.stages)
    earlier = stages[: stages.index(stage)]
    if config.init in earlier:
        first = _load_stage(path, text, overrides, config.init)
        config.init = f"results/runs/{run}/{config.init}/{first.experiment.milestones[-1]}/pipeline"
    elif config.init and "/" not in config.init:
        raise ConfigError(f"{where}.init: no stage {config.init!r} before {stage}{did_you_mean(config.init, earlier)}")
    return require(config, where)


def _overlay(values: dict[Any, Any], own: dict[Any, Any]) -> dict[Any, Any]:
    """Return nested `values` with those of `own` in their place; lists are replaced whole."""
    both = {
        key: _overlay(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        for key, value in own.items()
    }
    return {**values, **both}


def _set_milestones(experiment: DictConfig) -> None:
    """Sort the milestones and add the end of the stage."""
    if not OmegaConf.is_missing(experiment, "num_examples_to_see"):
        experiment.milestones = sorted({*experiment.milestones, experiment.num_examples_to_see})


def _dataset_path(run: DictConfig, stage: DictConfig) -> str | None:
    """Return the manifest that the workflow makes for a stage; None for tables, whose files the user names."""
    if run.data is None or stage.dataset.type in TABLE_DATASETS:
        return None
    if stage.dataset.type != "LatentDataset":
        return f"results/data/{run.data}/train/shards/manifest.json"
    vae = Path(stage.model.vae.pretrained or stage.model.pretrained or "vae").name
    return f"results/data/{run.data}/train/latents/{vae}-{stage.dataset.params.resolution}px/manifest.json"


def held_out_dataset(dataset: DictConfig, path: str) -> DictConfig:
    """Return a stage's `dataset` section for the held-out images at `path`, with the same filters and resolution."""
    kind = "ClassificationWebDataset" if dataset.params.idx_to_prompt else "WebDataset"
    held_out = OmegaConf.merge(dataset, {"type": kind, "params": {"path": path, "flip": False}})
    assert isinstance(held_out, DictConfig)
    return held_out


def pass_on_key(config: DictConfig) -> None:
    """Pass the wandb API key to the jobs in the environment, so that no file and no command line contains it."""
    if config.wandb.api_key:
        os.environ["WANDB_API_KEY"] = config.wandb.api_key


# ---------------------------------------------------------------- components
def load_components() -> dict[str, DictConfig]:
    """Return the entries of `configs/components.yaml`."""
    path, text = _read_source("components")
    entries: Any = OmegaConf.to_container(_parse_yaml(text, path))
    return {str(name): _load_component(f"{path}: {name}", entry) for name, entry in entries.items()}


def load_component(name: str, entries: dict[str, DictConfig] | None = None) -> DictConfig:
    """Return one of the entries that `load_components` returned, by default of a new call."""
    entries = load_components() if entries is None else entries
    if name not in entries:
        path = config_folder() / "components.yaml"
        raise ConfigError(f"{path}: no component {name!r}{did_you_mean(name, list(entries))}")
    return entries[name]


def _load_component(where: str, entry: Any) -> DictConfig:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be a mapping of keys, such as {{source: folder, path: …}}")
    return require(load_config(ComponentConfig, where, values=entry), where)


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
