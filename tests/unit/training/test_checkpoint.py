"""Tests of checkpoints: atomic writes, refused files, and milestones that other code trains again."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from sdtrain.training import checkpoint
from sdtrain.training.checkpoint import CheckpointError, Checkpoints

LIBRARY = Path(__file__).resolve().parents[3] / "workflow"


def python(code: str, *arguments, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(LIBRARY)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE, **options
    )


# ---------------------------------------------------------------- checkpoints
def state(value: float = 0.0) -> dict:
    """Return a state of tensors of several types."""
    weights = {"conv.weight": torch.full((4, 3, 3, 3), value).to(memory_format=torch.channels_last)}
    weights |= {"half": torch.full((5,), value, dtype=torch.bfloat16)}
    progress = {"updates": torch.tensor(int(value)), "empty": torch.zeros(0)}
    return {"unet": weights, "progress": progress}


def checkpoints(folder, value: float = 0.0, **options) -> Checkpoints:
    return Checkpoints(folder, state(value), **options)


def fill(saves: Checkpoints, *images: int) -> None:
    """Write a checkpoint for each number of images, with that number as state."""
    for number in images:
        saves.state["progress"]["updates"].fill_(number)
        saves.save(number)
        saves.finish()


def test_checkpoint_is_loaded_into_the_existing_tensors(tmp_path):
    checkpoints_of_seven = checkpoints(tmp_path, 7.0)
    fill(checkpoints_of_seven, 16)
    other = checkpoints(tmp_path)
    weight = other.state["unet"]["conv.weight"]
    other.load(16)
    assert other.state["unet"]["conv.weight"] is weight and (weight == 7).all()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert other.state["unet"]["half"].dtype == torch.bfloat16 and (other.state["unet"]["half"] == 7).all()
    assert int(other.state["progress"]["updates"]) == 16 and other.newest == 16


def test_changes_during_a_background_save_are_not_saved(tmp_path):
    saves = checkpoints(tmp_path, 1.0)
    big = saves.state["unet"]["big"] = torch.ones(3_000_000)
    saves.save(8)
    big.fill_(2.0)
    saves.finish()
    saves.load(8)
    assert (big == 1).all()


def test_older_checkpoints_are_deleted_after_the_new_one_is_complete(tmp_path):
    saves = checkpoints(tmp_path, keep=2, always={8})
    fill(saves, 8, 16, 24, 100, 32)
    assert saves.saved() == [8, 24, 32, 100]  # a later checkpoint is not deleted
    saves.keep = None
    fill(saves, 40)
    assert saves.saved() == [8, 24, 32, 40, 100]
    assert checkpoints(tmp_path / "absent").saved() == []


def test_incomplete_save_is_not_a_checkpoint(tmp_path):
    saves = checkpoints(tmp_path)
    fill(saves, 8)
    saves.save(16)
    assert saves.saved() == [8]
    while not saves.settled():
        time.sleep(0.01)
    assert saves.saved() == [8] and saves.newest == 8
    saves.finish()
    assert saves.saved() == [16] and saves.newest == 16 and not saves.settled()


def test_files_of_killed_saves_are_deleted_at_the_next_start(tmp_path):
    saves = checkpoints(tmp_path)
    (tmp_path / ".7.tmp").mkdir()
    checkpoint.start_milestone(saves, 100, 0, "code")
    assert os.listdir(tmp_path) == []


def test_files_of_killed_saves_do_not_disturb_the_next_save(tmp_path):
    saves = checkpoints(tmp_path)
    (tmp_path / ".8.tmp").mkdir(parents=True)
    (tmp_path / ".8.tmp/.metadata").write_text("half")
    (tmp_path / "8").mkdir()
    (tmp_path / "8/__0_0.distcp").write_text("half deleted")
    assert saves.saved() == []
    fill(saves, 8)
    assert saves.saved() == [8] and os.listdir(tmp_path) == ["8"]
    checkpoints(tmp_path).load(8)


class Trap:
    """An object that touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    saves, sprung = checkpoints(tmp_path / "saves"), tmp_path / "sprung"
    fill(saves, 8)
    index = tmp_path / "saves/8/.metadata"
    (data,) = (tmp_path / "saves/8").glob("*.distcp")
    kept = index.read_bytes()
    index.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match="saves/8: unreadable checkpoint, .*pathlib.Path.touch|has no place"):
        saves.load(8)
    found = pickle.loads(kept)  # an index that declares a tensor as bytes, which torch would unpickle
    name = next(iter(found.state_dict_metadata))
    found.state_dict_metadata[name] = BytesStorageMetadata()
    index.write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="saves/8: unreadable checkpoint, .*not a tensor"):
        saves.load(8)
    index.write_bytes(kept)
    torch.save(Trap(sprung), data)
    with pytest.raises(CheckpointError, match="saves/8: unreadable checkpoint"):
        saves.load(8)
    assert not sprung.exists()


def test_index_with_a_function_is_refused(tmp_path):
    saves = checkpoints(tmp_path)
    fill(saves, 8)
    module = "torch.distributed.checkpoint.metadata"
    for name in ("dataclass", "field", "os", "Any"):
        trap = f"c{module}\n{name}\n.".encode()
        (tmp_path / "8/.metadata").write_bytes(trap)
        with pytest.raises(CheckpointError, match=f"{module}.{name} has no place in a checkpoint"):
            saves.load(8)


def test_truncated_checkpoint_is_named(tmp_path):
    saves = checkpoints(tmp_path)
    fill(saves, 5)
    (data,) = (tmp_path / "5").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="5: unreadable checkpoint, .*; delete it to resume from the one before"):
        saves.load(5)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    fill(checkpoints(tmp_path), 5)
    for change in ({"conv.weight": torch.zeros(8, 3, 3, 3)}, {"more": torch.zeros(3)}):
        other = checkpoints(tmp_path)
        other.state["unet"].update(change)
        with pytest.raises(CheckpointError, match=f"5: .*of another architecture .*{next(iter(change))}"):
            other.load(5)


FULL_DISK = """
import resource, sys, torch
from sdtrain.training import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
saves = checkpoint.Checkpoints(sys.argv[1], {"a": {"w": torch.zeros(1_000_000)}})
saves.save(16)
try:
    saves.finish()
except checkpoint.CheckpointError as error:
    print(error)
"""


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    fill(checkpoints(tmp_path, 1.0), 8)
    output = python(FULL_DISK, tmp_path).communicate(timeout=120)[0]
    assert "16: could not be saved (" in output and "the checkpoint before it is untouched" in output
    assert os.listdir(tmp_path) == ["8"]
    checkpoints(tmp_path).load(8)


def save_by_rank(rank: int, folder: Path, full: int | None) -> str:
    """Save from two ranks, of which the rank `full` cannot write; return the error message of this rank, or "saved"."""
    import resource

    from sdtrain import distributed

    saves = Checkpoints(folder, state(3.0), main=rank == 0, group=distributed.cpu_group())
    saves.state["unet"] |= {f"{i}": torch.full((20_000,), float(i)) for i in range(8)}
    fill(saves, 8)
    if rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        fill(saves, 16)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "saved"


@pytest.mark.parametrize("full", [0, 1])
def test_all_ranks_name_the_rank_that_cannot_write(tmp_path, full):
    for said in run_ranks(save_by_rank, 2, tmp_path, full):
        assert f"16: could not be saved (rank {full}: " in said
    assert os.listdir(tmp_path) == ["8"]


def test_each_of_two_ranks_writes_its_share(tmp_path):
    assert run_ranks(save_by_rank, 2, tmp_path, None) == ["saved", "saved"]
    assert sorted(f.name for f in (tmp_path / "16").iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    alone = checkpoints(tmp_path)
    alone.state["unet"] |= {f"{i}": torch.zeros(20_000) for i in range(8)}
    alone.load(16)
    assert all((alone.state["unet"][f"{i}"] == i).all() for i in range(8))


# ---------------------------------------------------------------- milestones
def test_killed_job_keeps_its_checkpoints_for_the_resume(tmp_path):
    saves = checkpoints(tmp_path, keep=None)
    fill(saves, 64, 96)
    checkpoint.finish_milestone(saves, 50, "code")
    checkpoint.start_milestone(saves, 100, 64, "code")
    assert saves.saved() == [64, 96]


def test_other_code_retrains_a_milestone_from_the_previous_one(tmp_path):
    """Batches of 32: the milestones 50, 100 and 200 end at 64, 128 and 224 images."""
    saves = checkpoints(tmp_path, keep=None)
    fill(saves, 64, 128, 224)
    for milestone in (50, 100, 200):
        checkpoint.finish_milestone(saves, milestone, "code")
    checkpoint.start_milestone(saves, 100, 64, "code")
    assert saves.saved() == [64, 128, 224]  # the same code would give the same weights
    checkpoint.start_milestone(saves, 100, 64, "other code")
    assert saves.saved() == [64]
    assert [p.name for p in tmp_path.glob("*.done")] == ["50.done"]
    fill(saves, 96)
    checkpoint.start_milestone(saves, 100, 64, "other code")  # after a kill and a restart, it resumes
    assert saves.saved() == [64, 96]


def test_first_milestone_is_retrained_from_the_initial_weights(tmp_path):
    checkpoint.start_milestone(checkpoints(tmp_path / "absent"), 10, 0, "code")
    saves = checkpoints(tmp_path, keep=None)
    fill(saves, 0, 16)
    checkpoint.finish_milestone(saves, 10, "code")
    checkpoint.start_milestone(saves, 10, 0, "other code")
    assert saves.saved() == [0]
