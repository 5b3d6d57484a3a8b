"""One typed loader: what it accepts, what it refuses and in which words, and what changes a fingerprint."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sdtrain.config import schema, schema_data
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import (
    canonical,
    decisive_keys,
    differences,
    fingerprint,
    freeze_stage,
    record_fingerprint,
    stage_fingerprint,
)
from sdtrain.config.keys import all_keys
from sdtrain.config.load import (
    component_record,
    data_slice,
    load_component,
    load_components,
    load_config,
    load_run,
    load_stage,
    require,
    way_in,
)
from sdtrain.errors import ConfigError
from sdtrain.io.files import FileError, read_json, write_json, write_text

DATA = Path(__file__).resolve().parents[2] / "templates"
ROOT = Path(__file__).resolve().parents[3]
FILLED = ["wandb.api_key=null", "experiment.log_dir=logs", "experiment.name=n", "experiment.project=p"]
FILLED += ["experiment.num_examples_to_see=100", "dataset.params.path=shards/{00000..00009}.tar"]
PARTS = [f"model.{part}.pretrained=sd" for part in ("vae", "text_encoder", "tokenizer", "scheduler")]


def stage(text: str = "", *overrides: str):
    return load_config(schema.StageConfig, overrides=[*FILLED, *overrides], values=OmegaConf.create(text))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with configs/; call it with a name and a YAML text to write one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/data").mkdir(parents=True)

    def write(name: str, text: str) -> Path:
        path = Path("configs", name)
        path.write_text(text)
        return path

    return write


# ---------------------------------------------------------------- merging
def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text("system: {batch_size: 8, workers: 2}\noptimizer: {params: {learning_rate: 1e-3}}\n")
    cfg = load_config(schema.StageConfig, file, ["system.workers=3", "dataset.params.filters.width='>=512'"])
    assert (cfg.system.gradient_accumulation, cfg.system.batch_size, cfg.system.workers) == (1, 8, 3)
    assert cfg.dataset.params.filters == {"width": ">=512"}
    assert cfg.lr_scheduler.params.learning_rate == cfg.optimizer.params.learning_rate == 0.001


def test_interpolations_follow_what_they_name():
    cfg = stage("system: {batch_size: 5}", "distributed.dist_backend=gloo", "optimizer.params.learning_rate=3e-4")
    assert cfg.dataset.params.batch_size == 5
    assert cfg.dataset.params.num_examples_to_see == 100
    assert cfg.system.dist_backend == "gloo"
    assert cfg.lr_scheduler.params.learning_rate == 3e-4


def test_open_values_are_listed_with_a_remedy():
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
        ("[a, b]", "must be a mapping of keys at the top level"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_refusals_name_file_and_key(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(schema.StageConfig, file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


CHOICES = {key.name: key.choices for key in all_keys(schema.StageConfig) if key.choices}


@pytest.mark.parametrize("key", CHOICES)
def test_what_is_not_a_choice_is_refused_with_those_that_are(key):
    allowed = CHOICES[key]
    for value in allowed:
        assert OmegaConf.select(stage("", f"{key}={value}"), key) == value
    with pytest.raises(ConfigError) as error:
        stage("", f"{key}=none-of-them")
    assert f"{key}: must be one of {', '.join(allowed)}, got 'none-of-them'" in str(error.value)


def test_refusals_of_the_command_line_say_so():
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


def test_absent_file_names_its_neighbour(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"dmeo.yaml: no such file; did you mean .*/demo.yaml\?"):
        load_config(schema.StageConfig, tmp_path / "dmeo.yaml")


@settings(max_examples=25, deadline=None)
@given(depth=st.lists(st.sampled_from(["optimizer", "params"]), max_size=2, unique=True), key=st.text(min_size=1))
def test_any_unknown_key_is_refused(depth, key):
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
RUN = """
data: emoji
system: {batch_size: 16}
model: {vae: {pretrained: resources/components/little-vae}}
dataset: {type: LatentDataset, params: {filters: {group: 'in [a]', width: '>=64'}}}
stages:
  stage1:
    experiment: {num_examples_to_see: 100, milestones: [50, 0, 50]}
    dataset: {params: {resolution: 64}}
  stage2:
    init: stage1
    system: {batch_size: 4}
    experiment: {num_examples_to_see: 40}
    dataset: {params: {resolution: 128, filters: {width: '>=128'}}}
"""


def test_a_stage_is_the_run_with_its_own_keys_over_it(project):
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


def test_overrides_reach_the_stages_and_a_stage_alone(project):
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
def test_a_run_that_cannot_be_planned(project, text, message):
    project("r.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_run("r")
    assert message in str(error.value)


def test_unknown_stage_and_run_name_their_neighbours(project):
    project("real.yaml", RUN)
    with pytest.raises(ConfigError, match=r"configs/real.yaml: stages: no stage 'stage'; did you mean stage"):
        load_stage("real", "stage")
    with pytest.raises(ConfigError, match=r"configs/reel.yaml: no such file; did you mean configs/real.yaml\?"):
        load_run("reel")


def test_initial_weights_may_be_any_finished_pipeline(project):
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
def test_components_are_checked(project, text, message):
    with pytest.raises(ConfigError, match="configs/components.yaml: no such file"):
        load_components()
    project("components.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_components()
    assert str(error.value).startswith(message)


def test_a_component_by_name(project):
    project("components.yaml", "vae: {source: folder, path: x}")
    assert load_component("vae").path == "x"
    with pytest.raises(ConfigError, match="no component 'vea'; did you mean vae"):
        load_component("vea")
    assert component_record("resources/components/vae/sub/folder") == "resources/components/vae.json"


# ---------------------------------------------------------------- files written for the seed
@pytest.mark.parametrize("name", ["seed_template", "seed_finetuning"])
def test_the_seeds_files_load_unchanged(name):
    filled = [*FILLED, *PARTS, "model.pretrained=sd", "experiment.eval_caption_file=c.txt"]
    cfg = require(load_config(schema.StageConfig, DATA / f"{name}.yaml", filled), name)
    assert (cfg.model.mixed_precision, cfg.model.gradient_checkpointing, cfg.model.xformers) == ("bf16", True, True)
    assert (cfg.system.dist_backend, cfg.dataset.params.num_examples_to_see) == ("nccl", 100)
    assert cfg.optimizer.params.epsilon == 1e-8 and cfg.lr_scheduler.params.learning_rate == 1e-4


def test_the_seeds_template_keeps_its_values_and_its_open_places():
    cfg = load_config(schema.StageConfig, DATA / "seed_template.yaml")
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


def test_open_places_are_closed_by_the_command_line_alone():
    text = "wandb: {api_key: '???'}\nmodel: {vae: {pretrained: '???'}}"
    cfg = stage(text, "wandb.api_key=null", "model.vae.pretrained=sd")
    assert require(cfg, "x").wandb.api_key is None and cfg.model.vae.pretrained == "sd"


def test_the_seeds_unet_block_is_a_part():
    cfg = load_config(schema.ModelConfig, DATA / "seed_unet.yaml")
    assert cfg.unet.target == "diffusers.UNet2DConditionModel" and cfg.unet.params.block_out_channels == [
        320,
        640,
        1280,
        1280,
    ]


# ---------------------------------------------------------------- frozen slices
def test_freezing_drops_the_key_and_keeps_interpolations(project):
    project("r.yaml", RUN)
    cfg = load_stage("r", "stage1", ["wandb.api_key=secret-key"])
    text = OmegaConf.to_yaml(freeze_stage(cfg))
    assert "secret-key" not in text and "${system.batch_size}" in text
    again = load_config(schema.StageConfig, values=OmegaConf.create(text))
    assert again.frozen == stage_fingerprint(again) == stage_fingerprint(cfg)
    by_hand = load_config(schema.StageConfig, overrides=["system.batch_size=99"], values=OmegaConf.create(text))
    assert by_hand.dataset.params.batch_size == 99 and by_hand.frozen != stage_fingerprint(by_hand)


def leaves(values, prefix=""):
    """Every leaf of the default configuration with a value that differs from its own."""
    other = {"bool": True, "int": 7, "float": 0.123, "str": "other", "list": [3], "dict": {"k": 1}, "NoneType": None}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", (not value if isinstance(value, bool) else other[type(value).__name__])


CHANGES = {
    "wandb.mode": "offline",
    "model.mixed_precision": "bf16",
    "objective.timesteps": "stratified",
    "dataset.type": "LatentDataset",
    "dataset.params.crop": "random",
    "lr_scheduler.scheduler": "CosineWithWarmup",
    "objective.snr_gamma": 5.0,
    "optimizer.max_grad_norm": 3.0,
    "dataset.params.filters": {"a": ">1"},
    "dataset.params.idx_to_prompt": "p.json",
}


def test_volatile_keys_leave_the_fingerprint_and_all_others_change_it():
    base = stage("", "model.vae.pretrained=sd")
    plain = OmegaConf.to_container(base, resolve=True)
    unchanged = set()
    for key, value in leaves(plain):
        value = CHANGES.get(key, "other" if value is None else value)
        if key in ("optimizer.name", "system.threads", "experiment.stop_at"):  # one choice; integers
            value = {"optimizer.name": "adamw"}.get(key, 3)
        changed = OmegaConf.create(plain)
        OmegaConf.update(changed, key, value)
        if decisive_keys(changed) == decisive_keys(base):
            unchanged.add(key)
    volatile = {key.name for key in all_keys(schema.StageConfig) if not key.decides and not key.section}
    assert unchanged - {"optimizer.name"} == volatile
    assert {"experiment.seed", "optimizer.params.beta2", "model.vae.pretrained"}.isdisjoint(volatile)


@pytest.mark.parametrize("key", ["batch_size", "gradient_accumulation", "global_batch"])
def test_how_a_batch_is_shared_is_planned_and_decides_no_weights(key):
    base, other = stage("", "model.vae.pretrained=sd"), stage("", "model.vae.pretrained=sd", f"system.{key}=3")
    assert stage_fingerprint(base) != stage_fingerprint(other)
    assert differences(decisive_keys(base), decisive_keys(other)) == []


def test_differences_are_named_by_their_whole_keys():
    a, b = {"x": {"y": 1, "z": [2]}, "only": 1}, {"x": {"y": 1, "z": [3]}, "other": None}
    assert differences(a, b) == ["only", "x.z"]
    assert differences({"x": {}}, {"x": 3}, "section.") == ["section.x"]


def test_order_and_comments_leave_the_fingerprint(tmp_path):
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("system: {batch_size: 3}\noptimizer: {params: {beta1: 0.5, beta2: 0.7}}\n")
    two.write_text("# why\noptimizer:\n  params:\n    beta2: 7.0e-1 # late\n    beta1: .5\nsystem:\n  batch_size: 3\n")
    marks = {stage_fingerprint(load_config(schema.StageConfig, file, FILLED)) for file in (one, two)}
    assert len(marks) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value, rng):
    """An equal value whose mappings were built in another order."""
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key], rng) for key in keys}
    return [shuffled(v, rng) for v in value] if isinstance(value, list) else value


@given(json_values, st.integers())
def test_canonical_text_knows_values_not_their_order(value, seed):
    assert canonical(shuffled(value, random.Random(seed))) == canonical(value)
    assert json.loads(canonical(value)) == value


@given(json_values, json_values)
def test_different_values_have_different_fingerprints(one, two):
    assert (fingerprint(one) == fingerprint(two)) == (canonical(one) == canonical(two))
    assert fingerprint(one, two) != fingerprint([one, two])


def test_record_fingerprint_of_what_is_no_record(tmp_path):
    for name, text in {"list.json": "[1]", "text.json": "{", "none.json": "{}"}.items():
        (tmp_path / name).write_text(text)
        assert record_fingerprint(tmp_path / name) is None
    assert record_fingerprint(tmp_path / "absent.json") is None
    write_json(tmp_path / "it.json", {"fingerprint": "ab"})
    assert record_fingerprint(tmp_path / "it.json") == "ab"


# ---------------------------------------------------------------- files
def test_text_appears_whole_and_leaves_nothing_beside(tmp_path):
    file = tmp_path / "new/folder/a.txt"
    write_text(file, "é\n")
    write_text(file, "two")
    assert file.read_text() == "two" and os.listdir(file.parent) == ["a.txt"]


def test_a_full_disk_leaves_the_old_text(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    code = (
        "import resource, signal, sys\n"
        "from sdtrain.io.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(sys.argv[1], 'x' * 100_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT / "workflow", capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_json_that_cannot_be_read_names_the_file(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1]})
    assert read_json(tmp_path / "a.json") == {"é": [1]}
    (tmp_path / "b.json").write_text("{")
    for name in ("b.json", "absent.json"):
        with pytest.raises(FileError, match=rf"{name}: not a readable JSON file .*make it again: snakemake --force"):
            read_json(tmp_path / name)


# ---------------------------------------------------------------- commands
@dataclass
class Settings:
    size: int = 3
    names: list[str] = field(default_factory=list)


def command(*arguments, schema=Settings, **own):
    return command_line(["scripts/do.py", *map(str, arguments)], schema, "Do it.", **own)


def test_command_line_reads_config_overrides_and_own_keys(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("names: [a]")
    cfg, own = command(f"config={file}", "size=5", "output=x=y", output=None, extra="1")
    assert (cfg.size, list(cfg.names), own["output"], own["extra"]) == (5, ["a"], "x=y", "1")
    assert command("a=2", schema=None, a=None) == (None, {"a": "2"})


def test_help_prints_usage(capsys):
    with pytest.raises(SystemExit) as end:
        command("--help", output=None, extra="1")
    assert end.value.code == 0
    assert (
        capsys.readouterr().out == "Do it.\n\nusage: do.py output=… [extra=1] config=FILE.yaml [section.key=value …]\n"
    )


def test_command_line_errors_say_what_to_do(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sizes: 4")
    for arguments, message in [
        (["config"], "error: 'config' must be key=value\nusage: do.py output=…"),
        (["output=x"], "error: missing config=…\nusage"),
        ([f"config={file}"], "error: missing output=…\nusage"),
        ([f"config={file}", "output=x"], f"error: {file}: unknown key sizes; did you mean size?"),
        ([f"config={tmp_path / 'absent.yaml'}", "output=x"], "no such file"),
    ]:
        with pytest.raises(SystemExit) as end:
            command(*arguments, output=None)
        assert message in str(end.value.code)
    with pytest.raises(SystemExit, match="error: unknown key 'outputs'; did you mean output"):
        command("outputs=x", schema=None, output=None)


# ---------------------------------------------------------------- data
def test_the_way_in_follows_from_the_dataset():
    def way(**values):
        return way_in(load_config(schema_data.DataConfig, values=values))

    existing = {"path": "shards/{0..3}.tar"}
    assert way(table={"path": "table.csv"}, select={"filters": {"width": ">=9"}}) == "built"
    assert way(shards=existing) == "indexed"
    assert way(shards=existing, select={"filters": {"width": ">=9"}}) == "resharded"
    assert way(shards=existing, select={"held_out": {"fraction": 0.1}}) == "resharded"


def test_a_rule_reads_only_what_it_depends_on():
    data = load_config(
        schema_data.DataConfig, values={"shards": {"path": "a.tar", "timeout": 3}, "table": {"path": "b"}}
    )
    assert data_slice(data, "fetch_table").path == "b" and data_slice(data, "build_shards").timeout == 3
    sliced = data_slice(data, "reshard")
    assert sliced.path == "a.tar" and "timeout" not in sliced and sliced.select.filters == {}
    with pytest.raises(ConfigError, match="no rule reshart; did you mean reshard"):
        data_slice(data, "reshart")


def test_a_table_of_files_is_named_by_hand(project):
    project("r.yaml", RUN)
    with pytest.raises(ConfigError, match=r"dataset\.params\.path"):
        load_stage("r", "stage1", ["dataset.type=CSVDataset"])
    own = load_stage("r", "stage1", ["dataset.type=CSVDataset", "dataset.params.path=own.csv"])
    assert own.dataset.params.path == "own.csv"
