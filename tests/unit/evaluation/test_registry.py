"""Tests of the registry of metrics: module and setting exist, and one entry suffices for plan and command."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sdtrain.config.schema import EvaluationConfig
from sdtrain.errors import ConfigError
from sdtrain.evaluation import registry
from sdtrain.evaluation.registry import METRICS, metric_of
from sdtrain.orchestration.plan import Plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.record)
def test_module_and_setting_of_each_metric_exist(metric):
    assert callable(importlib.import_module(f"sdtrain.evaluation.{metric.record}").measure)
    assert metric.setting in {field.name for field in dataclasses.fields(EvaluationConfig)}
    assert {"metric", "value"} <= set(metric.needed)


def test_registry_entry_and_module_define_a_metric(monkeypatch):
    module = ModuleType("sdtrain.evaluation.brightness")
    module.measure = lambda samples, given, config: {"metric": "brightness", "value": samples["images"]}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = metric_of("frechet_distance")
    mine = dataclasses.replace(known, record="brightness", key="brightness", with_reference=False)
    monkeypatch.setattr(registry, "METRICS", (*METRICS, mine))
    monkeypatch.chdir(ROOT)
    assert metric_of("brightness").measure({"images": 3}, {}, None) == {"metric": "brightness", "value": 3}
    plan = Plan("demo", [], error=ConfigError)
    assert plan.metrics("demo") == ["frechet_distance", "clip_score", "brightness"]
    wildcards = SimpleNamespace(run="demo", stage="stage1", images="0", metric="brightness")
    assert plan.measured_with(wildcards) == {"network": "resources/components/efficientnet-lite0"}
    assert plan.measured_from(wildcards) == ["resources/components/efficientnet-lite0.json"]


def test_inputs_of_the_metrics_of_the_demo(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = Plan("demo", [], error=ConfigError)
    distance = SimpleNamespace(run="demo", stage="stage1", images="0", metric="frechet_distance")
    reference = "results/runs/demo/stage1/reference.safetensors"
    assert plan.measured_from(distance) == ["resources/components/efficientnet-lite0.json", reference]
    score = SimpleNamespace(run="demo", stage="stage1", images="0", metric="clip_score")
    fitted = "results/data/emoji/alignment/efficientnet-lite0-minilm.safetensors"
    assert plan.measure_arguments(score) == (
        f"network={fitted} features=resources/components/efficientnet-lite0 text=resources/components/minilm"
    )


def test_an_unknown_metric_is_refused():
    with pytest.raises(ConfigError, match=r"metric=fid: unknown"):
        metric_of("fid")
