"""Tests of training counters: they are restored from checkpoints; rollbacks use other data and are limited."""

from __future__ import annotations

import math

import pytest

from sdtrain.training.checkpoint import CheckpointError, Checkpoints
from sdtrain.training.progress import Progress


@pytest.fixture
def saved(tmp_path):
    """Return progress with two kinds of losses, saved at 80 images after a skipped step, and its checkpoints."""
    progress = Progress(2)
    checkpoints = Checkpoints(tmp_path, progress.state)
    progress.learn([3.0, 1.0], [2.0, 2.0])
    progress.skip()
    checkpoints.save(80)
    return progress, checkpoints


def test_losses_are_means_over_images_since_the_last_log_line():
    progress = Progress(2)
    progress.learn([3.0, 1.0], [3.0, 1.0])
    progress.learn([1.0, 0.0], [1.0, 0.0])
    assert progress.take_losses() == (1.0, [1.0, 1.0])
    progress.learn([6.0, 0.0], [2.0, 0.0])
    mean, kinds = progress.take_losses()
    assert mean == kinds[0] == 3.0 and math.isnan(kinds[1])
    assert math.isnan(progress.take_losses()[0])
    assert progress["updates"] == 3


def test_update_resets_the_count_of_consecutive_skipped_steps():
    progress = Progress()
    for _ in range(3):
        progress.skip()
    assert (progress["in_a_row"], progress["skipped"]) == (3, 3)
    progress.learn([1.0], [1.0])
    assert (progress["in_a_row"], progress["skipped"], progress["updates"]) == (0, 3, 1)


def test_progress_is_restored_from_a_checkpoint(saved, tmp_path):
    saved[1].finish()
    other = Progress(2)
    Checkpoints(tmp_path, other.state).load(80)
    assert (other["updates"], other["skipped"], other["in_a_row"]) == (1, 1, 1)
    assert other.take_losses() == (1.0, [1.5, 0.5])


def test_rollback_continues_with_other_data_and_keeps_the_counts(saved):
    progress, checkpoints = saved
    for _ in range(2):
        progress.learn([9.0, 9.0], [1.0, 1.0])
    progress.skip()
    assert progress.roll_back(checkpoints, 110, limit=2) == 80
    assert (progress["moved"], progress["rollbacks"], progress["tries"]) == (30, 1, 1)
    assert (progress["updates"], progress["skipped"], progress["in_a_row"]) == (1, 2, 0)
    assert progress.take_losses() == (1.0, [1.5, 0.5])  # the losses since the last log line before the checkpoint
    progress.skip()
    assert progress.roll_back(checkpoints, 100, limit=2) == 80
    assert (progress["moved"], progress["rollbacks"], progress["tries"], progress["skipped"]) == (50, 2, 2, 3)
    with pytest.raises(CheckpointError, match="after 2 rollbacks to the checkpoint at 80 .*; lower .*learning_rate"):
        progress.roll_back(checkpoints, 100, limit=2)
    progress.learn([1.0, 1.0], [1.0, 1.0])  # after an update, further rollbacks are allowed
    assert progress.roll_back(checkpoints, 100, limit=2) == 80
    assert (progress["moved"], progress["tries"], progress["rollbacks"]) == (70, 1, 3)
