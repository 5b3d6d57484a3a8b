"""Typed configuration: defaults <- YAML <- dot-list; frozen slices and fingerprints of it.

The Snakefile and the commands share this loader, so it imports OmegaConf only: planning needs no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtrain.config.schema import (
    ComponentConfig,
    DataConfig,
    ExistingShardsConfig,
    RunConfig,
    StageConfig,
)
from sdtrain.errors import ConfigError, did_you_mean

# ---------------------------------------------------------------- loading
CONFIGS = "SDTRAIN_CONFIGS"  # names the folder of the configurations to jobs: a copy that no edit reaches
MODEL_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler", "unet")
TABLE_DATASETS = ("ParquetDataset", "CSVDataset")
DATASET_TYPES = ("WebDataset", "ClassificationWebDataset", *TABLE_DATASETS, "LatentDataset")
CHOICES = {
    "wandb.mode": ("online", "offline", "disabled"),
    "model.mixed_precision": ("bf16",),
    "model.attention": ("flash", "efficient", "cudnn", "math"),
    "model.compile": ("model", "blocks"),
    "distributed.strategy": ("ddp", "fsdp"),
    "objective.timesteps": ("uniform", "stratified", "logit_normal"),
    "init_weights": ("ema", "raw"),
    "dataset.type": DATASET_TYPES,
    "dataset.params.crop": ("center", "random"),
    "latents.crop": ("center", "random"),
    "latents.posterior": ("mean", "sample", "moments"),
    "crop": ("center", "random"),  # of that section by itself, as precompute_latents reads it
    "posterior": ("mean", "sample", "moments"),
    "shards.encode_format": ("jpg", "png", "webp"),
    "lr_scheduler.scheduler": ("ConstantWithWarmup", "CosineWithWarmup"),
    "optimizer.name": ("adamw",),
    "table.kind": ("files", "hub", "emoji"),
    "source": ("package", "folder", "url", "hub", "train"),
}
TIMEOUT = "distributed.timeout_minutes"
LEAST = {  # the smallest value of keys that count something
    **dict.fromkeys(("system.gradient_accumulation", "system.global_batch", "system.threads"), 1),
    **dict.fromkeys(("experiment.save_every", "experiment.log_every", "experiment.keep_checkpoints"), 1),
    **dict.fromkeys(("experiment.max_nonfinite", "experiment.num_eval_images", "experiment.eval_steps"), 1),
    **dict.fromkeys(
        ("dataset.params.window", "dataset.params.resolution", "model.lora.rank", "model.ema.half_life"), 1
    ),
    **dict.fromkeys(("system.workers", "dataset.params.workers", "dataset.params.prefetch"), 0),
    **dict.fromkeys(("experiment.num_examples_to_see", "experiment.max_rollbacks", "experiment.wait_minutes"), 0),
    **dict.fromkeys(("lr_scheduler.params.warmup_length", "objective.offset_noise", "objective.logit_std"), 0),
    **dict.fromkeys(("optimizer.params.epsilon", "optimizer.params.weight_decay", "optimizer.params.learning_rate"), 0),
    **dict.fromkeys(("experiment.seed", "objective.snr_gamma"), 0),
    **dict.fromkeys(("optimizer.max_grad_norm", TIMEOUT), 1e-6),
}
BELOW_ONE = ("optimizer.params.beta1", "optimizer.params.beta2")
SHARES = (
    *("objective.caption_dropout", "dataset.params.max_lost", "model.ema.decay", "model.lora.dropout"),
    *("lr_scheduler.params.decay_from", "lr_scheduler.params.final", *BELOW_ONE),
)
REPEATS = {  # the seed's dataset section says these again
    "dataset.params.batch_size": "system.batch_size",
    "dataset.params.num_examples_to_see": "experiment.num_examples_to_see",
}


def load_config(
    schema: type, path: str | Path | None = None, overrides: list[str] = (), values: Any = None
) -> DictConfig:
    """Merge the defaults of `schema`, the YAML at `path` and dot-list `overrides`; check every key.

    Where `values` are given, they are merged instead, and `path` only says where they stand. Returns a DictConfig that
    may still hold `???`: `require` says which. Raises ConfigError for an unknown key, a wrong type or value, naming
    the source and the nearest valid key.
    """
    where = "configuration" if path is None else str(path)
    values = _read_yaml(path) if values is None and path is not None else OmegaConf.create(values or {})
    try:
        dotlist = OmegaConf.from_dotlist([str(o) for o in overrides])
    except Exception as error:
        raise ConfigError(f"command line: {' '.join(overrides)}: not key=value in YAML's notation: {error}") from error
    config = OmegaConf.structured(schema)
    for source, layer in ((where, values), ("command line", dotlist)):
        _check_keys(schema, OmegaConf.to_container(layer), source)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            raise ConfigError(f"{source}: {key}: {str(error).splitlines()[0]}") from error
    for key in _open_keys(OmegaConf.to_container(values)):  # a merge would keep the default under ???
        if OmegaConf.select(dotlist, key, default="???") == "???":
            OmegaConf.update(config, key, "???")
    _check_values(config, where)
    return config


def _read_yaml(path: str | Path) -> DictConfig:
    """The mapping in a YAML file. Raises ConfigError, naming it and a file of nearly that name."""
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).stem, [p.stem for p in Path(path).parent.glob("*.yaml")], 1)
        hint = f"; did you mean {Path(path).parent / (near[0] + '.yaml')}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except Exception as error:  # the YAML parser's own errors carry line and column
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: a mapping of keys is expected at the top level")
    return values


def require(config: DictConfig, where: str) -> DictConfig:
    """The same config, or a ConfigError that lists every `???` left open and every broken interpolation."""
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


def _open_keys(values: dict, prefix: str = "") -> list[str]:
    """The keys whose own value is `???`; those that only repeat one of them, `${…}`, are not named."""
    found = []
    for key, value in values.items():
        found += [f"{prefix}{key}"] if value == "???" else []
        found += _open_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return found


def config_folder() -> Path:
    """Where the configurations lie: `configs`, or for a job the copy that its call of Snakemake has kept."""
    return Path(os.environ.get(CONFIGS, "configs"))


def load_run(run: str, overrides: list[str] = ()) -> DictConfig:
    """`configs/{run}.yaml` with its overrides; every stage is checked too."""
    path = config_folder() / f"{run}.yaml"
    config = load_config(RunConfig, path, overrides)
    if OmegaConf.is_missing(config, "stages") or not config.stages:
        raise ConfigError(f"{path}: stages: at least one stage is needed, such as stages: {{stage1: {{}}}}")
    for stage in config.stages:
        load_stage(run, stage, overrides)
    return config


def load_data(dataset: str) -> DictConfig:
    """`configs/data/{dataset}.yaml`."""
    path = config_folder() / "data" / f"{dataset}.yaml"
    return require(load_config(DataConfig, path), str(path))


def load_components() -> dict[str, DictConfig]:
    """`configs/components.yaml`, each entry typed."""
    path = config_folder() / "components.yaml"
    entries = OmegaConf.to_container(_read_yaml(path))
    return {name: _load_component(f"{path}: {name}", entry) for name, entry in entries.items()}


def load_component(name: str) -> DictConfig:
    """One entry of `configs/components.yaml`."""
    entries = load_components()
    if name not in entries:
        raise ConfigError(
            f"{config_folder() / 'components.yaml'}: no component {name!r}{did_you_mean(name, list(entries))}"
        )
    return entries[name]


DATA_STEPS = {  # the section of a dataset's configuration that each rule depends on
    "fetch_table": "table",
    "select_samples": "select",
    "build_shards": "shards",
    "precompute_latents": "latents",
}


def data_slice(data: DictConfig, step: str) -> DictConfig:
    """What one rule of the data path depends on, of a dataset's configuration."""
    if step in DATA_STEPS:
        return data[DATA_STEPS[step]]
    if step not in ("reshard", "index_shards"):
        raise ConfigError(f"config/{step}.yaml: no rule {step}{did_you_mean(step, [*DATA_STEPS, 'reshard'])}")
    existing = {key: data.shards[key] for key in ("path", "held_out_path", "samples_per_shard")}
    return load_config(ExistingShardsConfig, values={**existing, "select": data.select})


def way_in(data: DictConfig) -> str:
    """How a dataset's shards come about: built from a table; of shards that exist, resharded, or indexed as they are.

    It names the folder of their parts, and the rule.
    """
    if not data.shards.path:
        return "built"
    return "resharded" if data.select.filters or data.select.held_out.fraction else "indexed"


def check_existing(select: DictConfig) -> None:
    """Raise ConfigError for a choice that can be made of a table's rows, and not of shards that exist."""
    for key in ("deduplicate", "rows"):
        if select[key] is not None:
            raise ConfigError(f"select.{key}: is for tables only; take it away, or set select.filters for shards")


def component_record(folder: str) -> str:
    """The record beside a component's folder, for any path inside it: resources/components/{name}.json."""
    return "/".join(Path(folder).parts[:3]) + ".json"


def _load_component(where: str, entry: Any) -> DictConfig:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: a mapping of keys is expected, such as {{source: folder, path: …}}")
    return require(load_config(ComponentConfig, where, values=entry), where)


def load_stage(run: str, stage: str, overrides: list[str] = ()) -> DictConfig:
    """The whole configuration of one training stage: the run's sections, the stage's own keys over them.

    Paths that the workflow decides (log folder, project, name, dataset path, initial weights) are filled in
    where the file leaves them open.
    """
    path = config_folder() / f"{run}.yaml"
    run_config = load_config(RunConfig, path, overrides)
    where = f"{path}: stages.{stage}"
    if stage not in run_config.stages:
        raise ConfigError(f"{path}: stages: no stage {stage!r}{did_you_mean(stage, list(run_config.stages))}")
    sections = [f.name for f in dataclasses.fields(StageConfig)]
    shared = OmegaConf.to_container(run_config)
    own = shared["stages"][stage] or {}
    if not isinstance(own, dict):
        raise ConfigError(f"{where}: a mapping of the keys that differ is expected, not {own!r}")
    load_config(StageConfig, where, values=own)  # its keys and types, before they are laid over the run's
    config = load_config(StageConfig, where, values=OmegaConf.merge({k: shared[k] for k in sections}, own))
    facts = {
        "experiment.log_dir": "results/runs",
        "experiment.project": run,
        "experiment.name": stage,
        "dataset.params.path": _dataset_path(run_config, config),
    }
    _set_milestones(config.experiment)
    for key, value in facts.items():
        if value is not None and OmegaConf.select(config, key, throw_on_missing=False) is None:
            OmegaConf.update(config, key, value)
    earlier = list(run_config.stages)[: list(run_config.stages).index(stage)]
    if config.init in earlier:
        first = load_stage(run, config.init, overrides)
        config.init = f"results/runs/{run}/{config.init}/{first.experiment.milestones[-1]}/pipeline"
    elif config.init and "/" not in config.init:
        raise ConfigError(f"{where}.init: no stage {config.init!r} before {stage}{did_you_mean(config.init, earlier)}")
    return require(config, where)


def _set_milestones(experiment: DictConfig) -> None:
    """Sort the milestones and end them with the whole stage."""
    if OmegaConf.is_missing(experiment, "num_examples_to_see"):
        return
    experiment.milestones = sorted({*experiment.milestones, experiment.num_examples_to_see})


def _dataset_path(run: DictConfig, stage: DictConfig) -> str | None:
    """The manifest that the workflow will have made for this stage; tables of files are named by hand."""
    if run.data is None or stage.dataset.type in TABLE_DATASETS:
        return None
    if stage.dataset.type != "LatentDataset":
        return f"results/data/{run.data}/train/shards/manifest.json"
    vae = Path(stage.model.vae.pretrained or stage.model.pretrained or "vae").name
    return f"results/data/{run.data}/train/latents/{vae}-{stage.dataset.params.resolution}px/manifest.json"


# ---------------------------------------------------------------- slices and fingerprints


def pass_on_key(config: DictConfig) -> None:
    """Hand a wandb key of the configuration to the jobs by the environment: no file and no command line shows it."""
    if config.wandb.api_key:
        os.environ["WANDB_API_KEY"] = config.wandb.api_key


def held_out_dataset(dataset: DictConfig, path: str) -> DictConfig:
    """The `dataset` section of a stage, turned to the held-out images at `path`: same filters and resolution."""
    kind = "ClassificationWebDataset" if dataset.params.idx_to_prompt else "WebDataset"
    return OmegaConf.merge(dataset, {"type": kind, "params": {"path": path, "flip": False}})


# ---------------------------------------------------------------- checks
def _schema_of(hint: Any) -> type | None:
    """The dataclass behind a type hint (through Optional), or None."""
    for candidate in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _is_mapping(hint: Any) -> bool:
    """Whether a type hint asks for a section or a dict (through Optional)."""
    return any(dataclasses.is_dataclass(h) or typing.get_origin(h) is dict for h in (hint, *typing.get_args(hint)))


def _check_keys(schema: type, values: Any, source: str, prefix: str = "") -> None:
    """Refuse keys that the schema does not have, naming the nearest one, and a plain value for a section."""
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{source}: unknown key {prefix}{key}{did_you_mean(str(key), list(hints), prefix)}")
        inner = _schema_of(hints[key])
        if isinstance(value, dict):
            if inner is not None:
                _check_keys(inner, value, source, f"{prefix}{key}.")
        elif _is_mapping(hints[key]) and not (value is None or "$" in str(value) or value == "???"):
            raise ConfigError(f"{source}: {prefix}{key}: a mapping of keys is expected, not {value!r}")


def _check_values(config: DictConfig, where: str) -> None:
    """Refuse values that are no choice, out of range, or at odds with another key."""

    def value_of(key: str) -> Any:
        with contextlib.suppress(OmegaConfBaseException):  # an interpolation that leads nowhere: `require` names it
            return OmegaConf.select(config, key, throw_on_missing=False)

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{where}: {key}: {value_of(key)!r} {why}")

    for key, allowed in CHOICES.items():
        if (value := value_of(key)) is not None and value not in allowed:
            refuse(key, f"is not one of {', '.join(allowed)}{did_you_mean(str(value), list(allowed))}")
    size = value_of("system.batch_size")
    if size not in (None, "auto") and not (isinstance(size, int) and size > 0):
        refuse("system.batch_size", "is neither a positive whole number nor auto")
    for key, least in LEAST.items():
        if (value := value_of(key)) is not None and value < least:
            refuse(key, f"is less than {least}")
    for key in SHARES:
        if (value := value_of(key)) is not None and not 0 <= value <= 1:
            refuse(key, "is no share between 0 and 1")
    for key in BELOW_ONE:
        if value_of(key) == 1:
            refuse(key, "must be less than 1")
    wait = value_of("experiment.wait_minutes")
    if wait and wait >= value_of(TIMEOUT):
        refuse(
            "experiment.wait_minutes", f"must be less than {TIMEOUT}={value_of(TIMEOUT)}, in which ranks wait for it"
        )
    if size == "auto" and value_of("distributed.strategy") == "fsdp":
        refuse("system.batch_size", "is for distributed.strategy=ddp; set a number")
    for key, followed in REPEATS.items():
        if value_of(key) != value_of(followed):
            refuse(key, f"repeats {followed}, which is {value_of(followed)!r}; set that one")
    end = value_of("experiment.num_examples_to_see")
    for key in ("experiment.stop_at", "experiment.milestones"):
        if end is not None and any(not 0 <= images <= end for images in _as_list(value_of(key))):
            refuse(key, f"must lie between 0 and num_examples_to_see={end}")


def _as_list(value: Any) -> list:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
