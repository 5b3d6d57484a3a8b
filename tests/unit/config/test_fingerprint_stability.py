"""Fingerprints of trainings and frozen slices of the repository's configurations stay those of finished work.

`fingerprints.json` was recorded by commit e514e5f. A change here invalidates running checkpoints and finished results:
record it anew only if a value in `configs/` changed on purpose.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from configurations import load_stage
from samples import ROOT

from sdtrain.config.fingerprint import decisive_keys, fingerprint, stage_fingerprint
from sdtrain.config.load import load_components
from sdtrain.config.schema_data import AutoencoderConfig
from sdtrain.orchestration.plan import Plan

RECORDED = json.loads(Path(__file__).with_name("fingerprints.json").read_text())


@pytest.fixture
def repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("stage", RECORDED["stage_fingerprints"])
def test_stage_fingerprint_is_unchanged(stage, repository):
    run, name = stage.split("/")
    assert stage_fingerprint(load_stage(run, name)) == RECORDED["stage_fingerprints"][stage]


@pytest.mark.parametrize("component", RECORDED["autoencoders"])
def test_what_decides_an_autoencoder_is_unchanged(component, repository):
    train = load_components()[component].train
    assert fingerprint(decisive_keys(train, AutoencoderConfig)) == RECORDED["autoencoders"][component]


def test_frozen_slices_are_unchanged(repository):
    plan, found = Plan("demo", [], ValueError), {}
    for path in RECORDED["slices"]:
        where, _, name = path.rpartition("/config/")
        text = plan.slice_of(SimpleNamespace(where=where, step=name.removesuffix(".yaml")))
        found[path] = hashlib.sha256(text.encode()).hexdigest()
    assert found == RECORDED["slices"]
