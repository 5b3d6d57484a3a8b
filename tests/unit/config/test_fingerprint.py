"""Tests of fingerprints: what changes them, and what does not."""

import json
import random
from dataclasses import dataclass

import pytest
from configurations import FILLED, RUN, load_stage, stage
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sdtrain.config import schema
from sdtrain.config.fingerprint import (
    canonical,
    decisive_keys,
    differences,
    fingerprint,
    freeze_stage,
    record_fingerprint,
    slice_text,
    stage_fingerprint,
)
from sdtrain.config.keys import all_keys, key, section
from sdtrain.config.load import load_config
from sdtrain.io.files import write_json


# ---------------------------------------------------------------- frozen slices
def test_frozen_stage_has_no_api_key_and_keeps_interpolations(project):
    project("r.yaml", RUN)
    cfg = load_stage("r", "stage1", ["wandb.api_key=secret-key"])
    text = OmegaConf.to_yaml(freeze_stage(cfg))
    assert "secret-key" not in text and "${system.batch_size}" in text
    again = load_config(schema.StageConfig, values=OmegaConf.create(text))
    assert again.frozen == stage_fingerprint(again) == stage_fingerprint(cfg)
    by_hand = load_config(schema.StageConfig, overrides=["system.batch_size=99"], values=OmegaConf.create(text))
    assert by_hand.dataset.params.batch_size == 99 and by_hand.frozen != stage_fingerprint(by_hand)


def leaves(values, prefix=""):
    """Yield every leaf of the default configuration, with a value that differs from its own, valid or not."""
    other = {"int": 7, "float": 0.123, "str": "other", "list": [3], "dict": {"k": 1}, "NoneType": "other"}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", (not value if isinstance(value, bool) else other[type(value).__name__])


def test_fingerprint_depends_on_exactly_the_deciding_keys():
    base = stage("", "model.vae.pretrained=sd")
    plain = OmegaConf.to_container(base, resolve=True)
    unchanged = set()
    for name, value in leaves(plain):
        changed = OmegaConf.create(plain)
        OmegaConf.update(changed, name, value)
        if decisive_keys(changed) == decisive_keys(base):
            unchanged.add(name)
    volatile = {k.name for k in all_keys(schema.StageConfig) if not k.decides and not k.section}
    assert unchanged == volatile
    assert {"experiment.seed", "optimizer.params.beta2", "model.vae.pretrained"}.isdisjoint(volatile)


@pytest.mark.parametrize("key", ["batch_size", "gradient_accumulation", "global_batch"])
def test_batch_sharing_is_planned_but_does_not_decide_weights(key):
    base, other = stage("", "model.vae.pretrained=sd"), stage("", "model.vae.pretrained=sd", f"system.{key}=3")
    assert stage_fingerprint(base) != stage_fingerprint(other)
    assert differences(decisive_keys(base), decisive_keys(other)) == []


def test_differences_are_full_keys():
    a, b = {"x": {"y": 1, "z": [2]}, "only": 1}, {"x": {"y": 1, "z": [3]}, "other": None}
    assert differences(a, b) == ["only", "x.z"]
    assert differences({"x": {}}, {"x": 3}, "section.") == ["section.x"]


def test_fingerprint_ignores_order_and_comments(tmp_path):
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
    """Return an equal value whose mappings have another order of keys."""
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key], rng) for key in keys}
    return [shuffled(v, rng) for v in value] if isinstance(value, list) else value


@given(json_values, st.integers())
def test_canonical_text_ignores_order(value, seed):
    assert canonical(shuffled(value, random.Random(seed))) == canonical(value)
    assert json.loads(canonical(value)) == value


@given(json_values, json_values)
def test_different_values_have_different_fingerprints(one, two):
    assert (fingerprint(one) == fingerprint(two)) == (canonical(one) == canonical(two))
    assert fingerprint(one, two) != fingerprint([one, two])


def test_record_fingerprint_of_invalid_records(tmp_path):
    for name, text in {"list.json": "[1]", "text.json": "{", "none.json": "{}"}.items():
        (tmp_path / name).write_text(text)
        assert record_fingerprint(tmp_path / name) is None
    assert record_fingerprint(tmp_path / "absent.json") is None
    write_json(tmp_path / "it.json", {"fingerprint": "ab"})
    assert record_fingerprint(tmp_path / "it.json") == "ab"


# ---------------------------------------------------------------- keys that are added later
@dataclass
class Before:
    rate: float = key(0.5, "Rate")


@dataclass
class After(Before):
    gamma: float | None = key(None, "Added later", neutral=None)
    blur: float = key(0.1, "Added later, and its default changed since", neutral=0.0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"blur": 0.0}, "blur: 0.0\nrate: 0.5\n"),
        ({}, "blur: 0.1\nrate: 0.5\n"),
        ({"gamma": 5.0, "rate": 1}, "blur: 0.1\ngamma: 5.0\nrate: 1.0\n"),
    ],
)
def test_slice_has_a_new_key_unless_default_and_value_are_neutral(values, text):
    assert slice_text(load_config(After, values=values)) == text
    assert slice_text(load_config(Before)) == "rate: 0.5\n"


def test_new_key_at_its_neutral_value_keeps_the_fingerprint(monkeypatch):
    @dataclass
    class NewObjective(schema.ObjectiveConfig):
        gamma: float | None = key(None, "Added later", neutral=None)

    @dataclass
    class NewStage(schema.StageConfig):
        objective: NewObjective = section(NewObjective)

    NewStage.__annotations__["objective"] = NewObjective
    monkeypatch.setattr("sdtrain.config.fingerprint.StageConfig", NewStage)
    old = stage_fingerprint(stage("", "model.vae.pretrained=sd"))
    neutral, other = (
        load_config(NewStage, overrides=[*FILLED, "model.vae.pretrained=sd", f"objective.gamma={gamma}"])
        for gamma in ("null", "5")
    )
    assert stage_fingerprint(neutral) == old != stage_fingerprint(other)
