"""Tests of a training's identity: which trainings may resume in a folder, and messages for the others."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from sdtrain.training.checkpoint import CheckpointError
from sdtrain.training.identity import Identity, claim

DECISIVE = {"system": {"global_batch": 64}, "optimizer": {"params": {"learning_rate": 0.1}}, "objective": {"gamma": 5}}


@pytest.fixture
def own(tmp_path) -> Identity:
    """Return the identity of a training by hand that has claimed its folder."""
    identity = Identity(tmp_path, {"dataset": "aa", "vae": "bb"}, DECISIVE, frozen=False)
    claim(identity, anew=False)
    return identity


def changed(identity: Identity, **values) -> Identity:
    return dataclasses.replace(identity, **values)


def with_batch(identity: Identity, size: int) -> Identity:
    return changed(identity, decisive={**DECISIVE, "system": {"global_batch": size}})


def with_rate(identity: Identity, rate: float) -> Identity:
    return changed(identity, decisive={**DECISIVE, "optimizer": {"params": {"learning_rate": rate}}})


def test_key_depends_on_everything_that_decides_the_weights(own):
    assert own.saves == own.folder / "checkpoints" / own.key and len(own.key) == 16
    assert json.loads((own.saves / "about.json").read_text()) == own.about
    keys = {i.key for i in (own, with_batch(own, 32), with_rate(own, 0.2), changed(own, sources={"dataset": "cc"}))}
    assert len(keys) == 4 and changed(own, frozen=True, folder=Path("elsewhere")).key == own.key


def test_same_training_can_resume(own):
    claim(own, anew=False)
    claim(changed(own, frozen=True), anew=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_other_global_batch_is_refused_with_the_key_to_set(own, frozen):
    with pytest.raises(
        CheckpointError, match="global batch of 64 images, but this launch has 32 images; set system.global_batch=64"
    ):
        claim(changed(with_batch(own, 32), frozen=frozen), anew=False)
    assert not with_batch(own, 32).saves.exists()
    claim(with_batch(own, 32), anew=True)


def test_other_training_by_hand_is_refused_with_the_keys_that_differ(own):
    other = changed(with_rate(own, 0.2), sources={"dataset": "aa", "vae": "cc"})
    named = "optimizer.params.learning_rate, the fingerprint of vae differ.*experiment.requeue=false.*experiment.name"
    with pytest.raises(CheckpointError, match=named):
        claim(other, anew=False)
    claim(other, anew=True)


def test_planned_training_starts_beside_the_old_one(own):
    planned = changed(with_rate(own, 0.2), frozen=True)
    claim(planned, anew=False)
    assert sorted(os.listdir(own.folder / "checkpoints")) == sorted([own.key, planned.key])
    with pytest.raises(CheckpointError, match="global batch of 64 images, but this launch has 16"):  # of either of them
        claim(changed(with_batch(own, 16), frozen=True), anew=False)


def test_if_the_number_of_ranks_is_known_as_many_ranks_with_another_batch_are_an_edit(own):
    remedies = "set batch_size for {} images", "delete it"
    ranks = changed(own, folder=own.folder / "ranks", frozen=True, world_size=2, remedies=remedies)
    claim(ranks, anew=False)
    assert json.loads((ranks.saves / "about.json").read_text())["world_size"] == 2 and ranks.key == own.key
    refusal = r"64 images \(world size 2\), .* 32 images \(world size 1\); set batch_size for 64 images, or delete it"
    with pytest.raises(CheckpointError, match=refusal):
        claim(changed(with_batch(ranks, 32), world_size=1), anew=False)
    claim(with_batch(ranks, 32), anew=False)
    assert with_batch(ranks, 32).saves.exists()
