"""Checkpoints appear whole or not at all, milestones are trained again by other code only, pipelines can be moved."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.models.parts import PARTS, load_parts
from sdtrain.models.pipeline import generate, load_pipeline
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
    """A state of live tensors of several types."""
    weights = {"conv.weight": torch.full((4, 3, 3, 3), value).to(memory_format=torch.channels_last)}
    weights |= {"half": torch.full((5,), value, dtype=torch.bfloat16)}
    progress = {"updates": torch.tensor(int(value)), "empty": torch.zeros(0)}
    return {"unet": weights, "progress": progress}


def checkpoints(folder, value: float = 0.0, **options) -> Checkpoints:
    return Checkpoints(folder, state(value), **options)


def fill(saves: Checkpoints, *images: int) -> None:
    """Save the numbers of images as the state."""
    for number in images:
        saves.state["progress"]["updates"].fill_(number)
        saves.save(number)
        saves.finish()


def test_a_state_comes_back_into_the_live_tensors(tmp_path):
    checkpoints_of_seven = checkpoints(tmp_path, 7.0)
    fill(checkpoints_of_seven, 16)
    other = checkpoints(tmp_path)
    weight = other.state["unet"]["conv.weight"]
    other.load(16)
    assert other.state["unet"]["conv.weight"] is weight and (weight == 7).all()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert other.state["unet"]["half"].dtype == torch.bfloat16 and (other.state["unet"]["half"] == 7).all()
    assert int(other.state["progress"]["updates"]) == 16 and other.newest == 16


def test_what_changes_while_it_is_written_is_not_written(tmp_path):
    saves = checkpoints(tmp_path, 1.0)
    big = saves.state["unet"]["big"] = torch.ones(3_000_000)
    saves.save(8)
    big.fill_(2.0)
    saves.finish()
    saves.load(8)
    assert (big == 1).all()


def test_older_ones_go_when_the_new_one_is_there(tmp_path):
    saves = checkpoints(tmp_path, keep=2, always={8})
    fill(saves, 8, 16, 24, 100, 32)
    assert saves.saved() == [8, 24, 32, 100]  # a later one is left alone
    saves.keep = None
    fill(saves, 40)
    assert saves.saved() == [8, 24, 32, 40, 100]
    assert checkpoints(tmp_path / "absent").saved() == []


def test_until_a_save_has_ended_it_is_no_checkpoint(tmp_path):
    saves = checkpoints(tmp_path)
    fill(saves, 8)
    saves.save(16)
    assert saves.saved() == [8]
    while not saves.settled():
        time.sleep(0.01)
    assert saves.saved() == [8] and saves.newest == 8
    saves.finish()
    assert saves.saved() == [16] and saves.newest == 16 and not saves.settled()


def test_what_killed_saves_left_goes_at_the_next_start(tmp_path):
    saves = checkpoints(tmp_path)
    (tmp_path / ".7.tmp").mkdir()
    checkpoint.start_milestone(saves, 100, 0, "code")
    assert os.listdir(tmp_path) == []


def test_traces_of_killed_saves_are_in_nobodys_way(tmp_path):
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
    """Touches a file when it is unpickled."""

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
    found = pickle.loads(kept)  # an index that calls a tensor a pickled object, which torch would unpickle
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


def test_no_function_has_a_place_in_an_index(tmp_path):
    saves = checkpoints(tmp_path)
    fill(saves, 8)
    module = "torch.distributed.checkpoint.metadata"
    for name in ("dataclass", "field", "os", "Any"):
        trap = f"c{module}\n{name}\n.".encode()
        (tmp_path / "8/.metadata").write_bytes(trap)
        with pytest.raises(CheckpointError, match=f"{module}.{name} has no place in a checkpoint"):
            saves.load(8)


def test_a_cut_checkpoint_is_named(tmp_path):
    saves = checkpoints(tmp_path)
    fill(saves, 5)
    (data,) = (tmp_path / "5").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="5: unreadable checkpoint, .*; delete it to go on from the one before"):
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


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    fill(checkpoints(tmp_path, 1.0), 8)
    output = python(FULL_DISK, tmp_path).communicate(timeout=120)[0]
    assert "16: could not be saved (" in output and "the checkpoint before it is untouched" in output
    assert os.listdir(tmp_path) == ["8"]
    checkpoints(tmp_path).load(8)


def save_by_rank(rank: int, folder: Path, full: int | None) -> str:
    """Save from two ranks, of which `full` cannot write; returns what the rank was told."""
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
def test_a_rank_that_cannot_write_is_named_to_all(tmp_path, full):
    for said in run_ranks(save_by_rank, 2, tmp_path, full):
        assert f"16: could not be saved (rank {full}: " in said
    assert os.listdir(tmp_path) == ["8"]


def test_two_ranks_share_the_writing(tmp_path):
    assert run_ranks(save_by_rank, 2, tmp_path, None) == ["saved", "saved"]
    assert sorted(f.name for f in (tmp_path / "16").iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    alone = checkpoints(tmp_path)
    alone.state["unet"] |= {f"{i}": torch.zeros(20_000) for i in range(8)}
    alone.load(16)
    assert all((alone.state["unet"][f"{i}"] == i).all() for i in range(8))


# ---------------------------------------------------------------- milestones
def test_a_killed_job_goes_on_from_its_last_checkpoint(tmp_path):
    saves = checkpoints(tmp_path, keep=None)
    fill(saves, 64, 96)
    checkpoint.finish_milestone(saves, 50, "code")
    checkpoint.start_milestone(saves, 100, 64, "code")
    assert saves.saved() == [64, 96]


def test_with_other_code_a_finished_milestone_is_trained_again_from_the_one_before(tmp_path):
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
    checkpoint.start_milestone(saves, 100, 64, "other code")  # killed and started again: this time it goes on
    assert saves.saved() == [64, 96]


def test_the_first_milestone_starts_from_nothing(tmp_path):
    checkpoint.start_milestone(checkpoints(tmp_path / "absent"), 10, 0, "code")
    saves = checkpoints(tmp_path, keep=None)
    fill(saves, 0, 16)
    checkpoint.finish_milestone(saves, 10, "code")
    checkpoint.start_milestone(saves, 10, 0, "other code")
    assert saves.saved() == [0]


# ---------------------------------------------------------------- lock
HOLD = """
import sys, time
from sdtrain.training import checkpoint
with checkpoint.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(300)
"""


def test_the_lock_keeps_a_second_trainer_out_until_the_first_is_gone(tmp_path):
    holder = python(HOLD, tmp_path / "run")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            CheckpointError,
            match=rf"run: another process is training here \(process {holder.pid} on .*\); wait for it or end it",
        ):
            with checkpoint.lock(tmp_path / "run"):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=60)
    for _ in range(2):
        with checkpoint.lock(tmp_path / "run"):
            pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoint.fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=r"\.lock: this file system has no locks .*start one trainer only"):
        with checkpoint.lock(tmp_path):
            pass


def test_a_second_trainer_may_wait_for_the_end_of_the_first(tmp_path, capsys):
    holder = python(HOLD, tmp_path / "run")
    assert holder.stdout.readline() == "held\n"
    end = threading.Timer(1.0, holder.kill)
    end.start()
    with checkpoint.lock(tmp_path / "run", wait_minutes=1.0):
        assert holder.wait(timeout=60) != 0
    assert "waiting for its end" in capsys.readouterr().out
    holder.communicate()


# ---------------------------------------------------------------- folders and links
def test_a_link_moves_in_one_step_and_with_its_folder(tmp_path):
    for name in ("1", "2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "which").write_text(name)
        checkpoint.point_link(tmp_path / "run/latest", tmp_path / "run" / name)
    assert (tmp_path / "run/latest/which").read_text() == "2"
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert Path(moved, "latest/which").read_text() == "2" and sorted(os.listdir(moved)) == ["1", "2", "latest"]


def test_a_folder_in_the_way_of_a_link_is_not_touched(tmp_path):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest/precious").touch()
    with pytest.raises(CheckpointError, match="latest: a folder is in the way of a link; move it away"):
        checkpoint.point_link(tmp_path / "latest", tmp_path / "1")
    assert os.listdir(tmp_path) == ["latest"] and os.listdir(tmp_path / "latest") == ["precious"]


def test_a_folder_takes_the_place_of_an_old_one(tmp_path):
    for text in ("old", "new"):
        (tmp_path / "aside").mkdir()
        (tmp_path / "aside" / text).touch()
        checkpoint.replace_folder(tmp_path / "aside", tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["new"]


@pytest.fixture
def parts(tiny_parts, tiny_unet_params, tmp_path):
    """The tiny parts, from a project's own components."""
    shutil.copytree(tiny_parts, tmp_path / "project/components")
    values = {part: {"pretrained": str(tmp_path / "project/components")} for part in PARTS}
    unet = {"target": "UNet2DConditionModel", "params": tiny_unet_params}
    torch.manual_seed(0)
    return load_parts(load_config(schema.ModelConfig, values={**values, "unet": unet}))


def image(folder: Path):
    pipe = load_pipeline(folder)
    return list(generate(pipe, ["a red square"], 32, guidance_scale=2.0, steps=2, seed=0, batch_size=1))[0]


def test_an_exported_pipeline_loads_and_can_be_moved_with_its_project(parts, tmp_path):
    folder = checkpoint.export_pipeline(
        tmp_path / "project/runs/1/pipeline", parts, parts.unet, {"unet_raw": parts.unet.save_pretrained}
    )
    links = {name: os.readlink(folder / name) for name in ("vae", "text_encoder", "tokenizer")}
    assert links == {name: f"../../../components/{name}" for name in links}
    assert (folder / "unet_raw/diffusion_pytorch_model.safetensors").is_file() and not list(folder.rglob("*.bin"))
    before = image(folder)
    again = checkpoint.export_pipeline(folder, parts, parts.unet)  # over the old one
    assert os.listdir(again.parent) == ["pipeline"] and not (again / "unet_raw").exists()
    moved = shutil.move(tmp_path / "project", tmp_path / "moved")
    assert image(Path(moved, "runs/1/pipeline")).tobytes() == before.tobytes()


def test_results_may_lie_behind_a_link(parts, tmp_path):
    (tmp_path / "scratch/deep/down").mkdir(parents=True)
    (tmp_path / "project/runs").symlink_to(tmp_path / "scratch/deep/down")
    folder = checkpoint.export_pipeline(tmp_path / "project/runs/1/pipeline", parts, parts.unet)
    assert (folder / "vae/config.json").is_file() and (folder / "tokenizer/tokenizer_config.json").is_file()


def test_parts_that_came_from_no_folder_are_written(parts, tmp_path):
    parts.folders = {}
    folder = checkpoint.export_pipeline(tmp_path / "pipeline", parts, parts.unet)
    assert not any((folder / name).is_symlink() for name in ("vae", "text_encoder", "tokenizer"))
    assert image(folder).size == (32, 32)
