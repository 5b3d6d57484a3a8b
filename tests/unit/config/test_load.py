"""Tests of loading: merging, errors, runs and stages, components, datasets."""

from __future__ import annotations

import pytest
from configurations import FILLED, RUN, load_stage, stage
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from samples import ROOT

from sdtrain.config import schema, schema_data
from sdtrain.config.keys import all_keys
from sdtrain.config.load import (
    SHARD_DATASETS,
    component_record,
    data_slice,
    load_components,
    load_config,
    load_run,
    require,
    way_in,
)
from sdtrain.errors import ConfigError

TEMPLATES = ROOT / "tests/templates"
PARTS = [f"model.{part}.pretrained=sd" for part in ("vae", "text_encoder", "tokenizer", "scheduler")]


# ---------------------------------------------------------------- merging
def test_command_line_overrides_file_overrides_defaults(tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text("system: {batch_size: 8, workers: 2}\noptimizer: {params: {learning_rate: 1e-3}}\n")
    cfg = load_config(schema.StageConfig, file, ["system.workers=3", "dataset.params.filters.width='>=512'"])
    assert (cfg.system.gradient_accumulation, cfg.system.batch_size, cfg.system.workers) == (1, 8, 3)
    assert cfg.dataset.params.filters == {"width": ">=512"}
    assert cfg.lr_scheduler.params.learning_rate == cfg.optimizer.params.learning_rate == 0.001


def test_interpolations_have_the_value_of_their_key():
    cfg = stage("system: {batch_size: 5}", "distributed.dist_backend=gloo", "optimizer.params.learning_rate=3e-4")
    assert cfg.dataset.params.batch_size == 5
    assert cfg.dataset.params.num_examples_to_see == 100
    assert cfg.system.dist_backend == "gloo"
    assert cfg.lr_scheduler.params.learning_rate == 3e-4


def test_missing_values_are_listed_with_a_remedy():
    cfg = load_config(schema.StageConfig, values={"experiment": {"name": "n"}})
    with pytest.raises(ConfigError) as error:
        require(cfg, "run.yaml")
    message = str(error.value)
    assert message.startswith(
        "run.yaml: required and still ???: dataset.params.path, experiment.log_dir, experiment.num"
    )
    assert "experiment.num_examples_to_see=…" in message and "experiment.name" not in message


def test_broken_interpolation_names_the_key():
    cfg = stage("model: {mixed_precision: '${nowhere.at_all}'}")
    with pytest.raises(ConfigError, match=r"x\.yaml: Interpolation key 'nowhere.at_all' not found"):
        require(cfg, "x.yaml")


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {}", "unknown key optimiser; did you mean optimizer?"),
        ("system: {batchsize: 3}", "unknown key system.batchsize; did you mean system.batch_size?"),
        (
            "optimizer: {params: {learning-rate: 1}}",
            "unknown key optimizer.params.learning-rate; did you mean optimizer.params.learning_rate?",
        ),
        ("model: {unet: {parms: {}}}", "unknown key model.unet.parms; did you mean model.unet.params?"),
        ("wandb: {zzzzzzzz: 1}", "unknown key wandb.zzzzzzzz; known here: api_key, entity, mode"),
        (
            "system: {batch_size: many}",
            "system.batch_size: must be a positive whole number or auto, got 'many'",
        ),
        ("experiment: {milestones: 5}", "experiment.milestones"),
        ("optimizer: adamw", "optimizer: must be a mapping of keys, got 'adamw'"),
        ("model: {vae: {params: [1]}}", "model.vae.params: must be a mapping of keys, got [1]"),
        ("model: {gradient_checkpointing: sometimes}", "model.gradient_checkpointing"),
        (
            "model: {mixed_precision: fp16}",
            "model.mixed_precision: must be one of bf16, got 'fp16'; did you mean bf16?",
        ),
        ("dataset: {type: Webdataset}", "dataset.type: must be one of WebDataset, Classi"),
        ("experiment: {save_every: 0}", "experiment.save_every: must be at least 1, got 0"),
        ("experiment: {keep_checkpoints: 0}", "experiment.keep_checkpoints: must be at least 1, got 0"),
        ("system: {gradient_accumulation: 0}", "system.gradient_accumulation: must be at least 1, got 0"),
        ("model: {lora: {rank: 0}}", "model.lora.rank: must be at least 1, got 0"),
        ("objective: {caption_dropout: 2}", "objective.caption_dropout: must be at least 0 and at most 1, got 2.0"),
        ("dataset: {params: {batch_size: 5}}", "dataset.params.batch_size: must equal system.batch_size=32, got 5"),
        (
            "experiment: {num_examples_to_see: 8, stop_at: 9}",
            "experiment.stop_at: must be between 0 and num_examples_to_see=8, got 9",
        ),
        (
            "experiment: {num_examples_to_see: 8, milestones: [4, 9]}",
            "experiment.milestones: must be between 0 and num_examples_to_see=8, got [4, 9]",
        ),
        (
            "experiment: {wait_minutes: 30}",
            "experiment.wait_minutes: must be less than distributed.timeout_minutes=30.0",
        ),
        (
            "system: {batch_size: auto}\ndistributed: {strategy: fsdp}",
            "system.batch_size: auto needs distributed.strateg",
        ),
        ("[a, b]", "must be a mapping of keys at the top level"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_errors_name_file_and_key(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(schema.StageConfig, file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


CHOICES = {key.name: key.choices for key in all_keys(schema.StageConfig) if key.choices}


@pytest.mark.parametrize("key", CHOICES)
def test_unknown_choice_is_an_error_that_lists_the_choices(key):
    allowed = CHOICES[key]
    for value in allowed:
        assert OmegaConf.select(stage("", f"{key}={value}"), key) == value
    with pytest.raises(ConfigError) as error:
        stage("", f"{key}=none-of-them")
    assert f"{key}: must be one of {', '.join(allowed)}, got 'none-of-them'" in str(error.value)


BOUNDS = [
    (kind, key.name, name, bound)
    for kind in (schema.RunConfig, schema_data.DataConfig, schema_data.AutoencoderConfig)
    for key in all_keys(kind)
    for name, bound in key.bounds.items()
]


@pytest.mark.parametrize(("kind", "key", "name", "bound"), BOUNDS)
def test_value_out_of_bounds_is_an_error(kind, key, name, bound):
    value = bound + {"ge": -1, "le": 1}.get(name, 0)
    with pytest.raises(ConfigError, match=rf": {key}: must be .*(at least|than|at most) {bound}"):
        load_config(kind, overrides=[f"{key}={value}"])


def test_errors_of_the_command_line_name_it():
    with pytest.raises(
        ConfigError, match="^command line: unknown key system.batch_sise; did you mean system.batch_size"
    ):
        stage("", "system.batch_sise=3")
    with pytest.raises(ConfigError, match="^command line: system.workers: Value 'x'"):
        stage("", "system.workers=x")
    with pytest.raises(
        ConfigError, match="^command line: experiment.milestones=.1: must be key=value with a YAML value"
    ):
        load_config(schema.StageConfig, overrides=["experiment.milestones=[1"])


def test_missing_file_names_a_similar_one(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"dmeo.yaml: no such file; did you mean .*/demo.yaml\?"):
        load_config(schema.StageConfig, tmp_path / "dmeo.yaml")


@settings(max_examples=25, deadline=None)
@given(depth=st.lists(st.sampled_from(["optimizer", "params"]), max_size=2, unique=True), key=st.text(min_size=1))
def test_any_unknown_key_is_an_error(depth, key):
    path = [name for name in ("optimizer", "params") if name in depth] if "optimizer" in depth else []
    root = {(): schema.StageConfig, ("optimizer",): schema.OptimizerConfig}.get(tuple(path), schema.OptimizerParams)
    values = {key: 1}
    for name in reversed(path):
        values = {name: values}
    if key in root.__dataclass_fields__:
        return
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(schema.StageConfig, values=values)


# ---------------------------------------------------------------- runs and stages


def test_stage_keys_override_the_run(project):
    project("r.yaml", RUN)
    first, second = load_stage("r", "stage1"), load_stage("r", "stage2")
    assert (first.system.batch_size, second.system.batch_size) == (16, 4)
    assert second.dataset.params.batch_size == 4
    assert second.dataset.params.filters == {"group": "in [a]", "width": ">=128"}
    assert (first.experiment.log_dir, first.experiment.project, first.experiment.name) == (
        "results/runs",
        "r",
        "stage1",
    )
    assert list(first.experiment.milestones) == [0, 50, 100] and list(second.experiment.milestones) == [40]
    assert first.init is None and second.init == "results/runs/r/stage1/100/pipeline"
    assert first.dataset.params.path == "results/data/emoji/train/latents/little-vae-64px/manifest.json"
    assert second.dataset.params.path == "results/data/emoji/train/latents/little-vae-128px/manifest.json"


def test_overrides_apply_to_all_stages_or_to_one(project):
    project("r.yaml", RUN)
    overrides = [
        "optimizer.params.beta2=0.5",
        "stages.stage2.experiment.num_examples_to_see=80",
        "dataset.type=WebDataset",
    ]
    assert load_stage("r", "stage1", overrides).optimizer.params.beta2 == 0.5
    second = load_stage("r", "stage2", overrides)
    assert second.experiment.num_examples_to_see == 80 and second.optimizer.params.beta2 == 0.5
    assert second.dataset.params.path == "results/data/emoji/train/shards/manifest.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: emoji", "configs/r.yaml: stages: at least one stage is needed"),
        ("stages: {}", "configs/r.yaml: stages: at least one stage is needed"),
        ("stages: [one, two]", "configs/r.yaml: stages: must be a mapping of keys, got ['one', 'two']"),
        ("stages: {one: 3}", "configs/r.yaml: stages.one: must be a mapping of the keys that differ, got 3"),
        (
            RUN.replace("system: {batch_size: 4}", "sistem: {batch_size: 4}"),
            "configs/r.yaml: stages.stage2: unknown key sistem; did you mean system?",
        ),
        (
            RUN.replace("{batch_size: 4}", "{batch_size: x}"),
            "configs/r.yaml: stages.stage2: system.batch_size: must be a positive whole number or auto, got 'x'",
        ),
        (
            RUN.replace("init: stage1", "init: stege1"),
            "stages.stage2.init: no stage 'stege1' before stage2; did you mean stage1?",
        ),
        (RUN.replace("init: stage1", "init: stage2"), "stages.stage2.init: no stage 'stage2' before stage2"),
        (
            RUN.replace("  stage1:\n", "  stage1:\n    init: stage2\n"),
            "stages.stage1.init: no stage 'stage2' before stage1; known here: none",
        ),
        (
            RUN.replace("[50, 0, 50]", "[500]"),
            "stages.stage1: experiment.milestones: must be between 0 and num_examples_to_see=100, got [500]",
        ),
        (
            RUN.replace("num_examples_to_see: 40", "save_every: 4"),
            "configs/r.yaml: stages.stage2: required and still ???",
        ),
    ],
)
def test_wrong_run_is_an_error(project, text, message):
    project("r.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_run("r")
    assert message in str(error.value)


def test_unknown_run_names_a_similar_one(project):
    project("real.yaml", RUN)
    with pytest.raises(ConfigError, match=r"configs/reel.yaml: no such file; did you mean configs/real.yaml\?"):
        load_run("reel")


def test_initial_weights_can_come_from_another_run(project):
    project("r.yaml", RUN.replace("init: stage1", "init: results/runs/other/stage1/5/pipeline"))
    assert load_stage("r", "stage2").init == "results/runs/other/stage1/5/pipeline"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vae: {source: folder, pth: x}", "configs/components.yaml: vae: unknown key pth; did you mean path?"),
        ("vae: {source: ftp}", "configs/components.yaml: vae: source: must be one of package"),
        ("vae: {path: x}", "configs/components.yaml: vae: required and still ???: source"),
        ("vae: 3", "configs/components.yaml: vae: must be a mapping of keys"),
        ("- vae", "configs/components.yaml: must be a mapping of keys"),
        ("a: [", "configs/components.yaml: not valid YAML"),
    ],
)
def test_wrong_components_are_errors(project, text, message):
    with pytest.raises(ConfigError, match="configs/components.yaml: no such file"):
        load_components()
    project("components.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_components()
    assert str(error.value).startswith(message)


def test_components_have_records(project):
    project("components.yaml", "vae: {source: folder, path: x}")
    assert load_components()["vae"].path == "x"
    assert component_record("resources/components/vae/sub/folder") == "resources/components/vae.json"


# ---------------------------------------------------------------- files of open-diffusion
@pytest.mark.parametrize("name", ["open_diffusion_template", "open_diffusion_finetuning"])
def test_open_diffusion_files_load_unchanged(name):
    filled = [*FILLED, *PARTS, "model.pretrained=sd", "experiment.eval_caption_file=c.txt"]
    cfg = require(load_config(schema.StageConfig, TEMPLATES / f"{name}.yaml", filled), name)
    assert (cfg.model.mixed_precision, cfg.model.gradient_checkpointing, cfg.model.xformers) == ("bf16", True, True)
    assert (cfg.system.dist_backend, cfg.dataset.params.num_examples_to_see) == ("nccl", 100)
    assert cfg.optimizer.params.epsilon == 1e-8 and cfg.lr_scheduler.params.learning_rate == 1e-4


def test_open_diffusion_template_keeps_values_and_missing_ones():
    cfg = load_config(schema.StageConfig, TEMPLATES / "open_diffusion_template.yaml")
    assert cfg.dataset.params.filters == {"pwatermark": "<=0.5"}
    assert cfg.model.unet.target == "UNet2DConditionModel" and cfg.model.unet.params.norm_eps == 1e-05
    open_places = (
        "dataset.params.path experiment.log_dir experiment.name experiment.num_examples_to_see experiment.project "
    )
    open_places += (
        "model.scheduler.pretrained model.text_encoder.pretrained model.tokenizer.pretrained model.vae.pretrained "
    )
    with pytest.raises(ConfigError) as error:
        require(cfg, "template")
    listed = str(error.value).removeprefix("template: required and still ???: ").partition(". Set")[0]
    assert listed.split(", ") == [*open_places.split(), "wandb.api_key"]


def test_command_line_sets_missing_values():
    text = "wandb: {api_key: '???'}\nmodel: {vae: {pretrained: '???'}}"
    cfg = stage(text, "wandb.api_key=null", "model.vae.pretrained=sd")
    assert require(cfg, "x").wandb.api_key is None and cfg.model.vae.pretrained == "sd"


def test_open_diffusion_unet_block_is_a_component():
    cfg = load_config(schema.ModelConfig, TEMPLATES / "open_diffusion_unet.yaml")
    assert cfg.unet.target == "diffusers.UNet2DConditionModel" and cfg.unet.params.block_out_channels == [
        320,
        640,
        1280,
        1280,
    ]


# ---------------------------------------------------------------- data
def test_way_in_depends_on_the_dataset():
    def way(**values):
        return way_in(load_config(schema_data.DataConfig, values=values))

    existing = {"path": "shards/{0..3}.tar"}
    assert way(table={"path": "table.csv"}, select={"filters": {"width": ">=9"}}) == "built"
    assert way(shards=existing) == "indexed"
    assert way(shards=existing, select={"filters": {"width": ">=9"}}) == "resharded"
    assert way(shards=existing, select={"held_out": {"fraction": 0.1}}) == "resharded"


def test_slice_of_a_rule_has_only_its_keys():
    data = load_config(
        schema_data.DataConfig, values={"shards": {"path": "a.tar", "timeout": 3}, "table": {"path": "b"}}
    )
    assert data_slice(data, "fetch_table").path == "b" and data_slice(data, "build_shards").timeout == 3
    sliced = data_slice(data, "reshard")
    assert sliced.path == "a.tar" and "timeout" not in sliced and sliced.select.filters == {}
    with pytest.raises(ConfigError, match="no rule reshart; did you mean reshard"):
        data_slice(data, "reshart")


def test_forms_that_the_workflow_does_not_make_need_an_explicit_path(project):
    project("r.yaml", RUN)
    made = {kind: load_stage("r", "stage1", [f"dataset.type={kind}"]) for kind in (*SHARD_DATASETS, "LatentDataset")}
    assert all(stage.dataset.params.path.startswith("results/data/emoji/train/") for stage in made.values())
    with pytest.raises(ConfigError, match=r"dataset\.params\.path"):
        load_stage("r", "stage1", ["dataset.type=CSVDataset"])
    own = load_stage("r", "stage1", ["dataset.type=CSVDataset", "dataset.params.path=own.csv"])
    assert own.dataset.params.path == "own.csv"
