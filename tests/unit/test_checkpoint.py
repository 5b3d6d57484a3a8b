"""Checkpoints appear whole or not at all, milestones are trained again only on purpose, pipelines can be moved."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sdtrain import checkpoint, config, models, sampling, schema
from sdtrain.checkpoint import CheckpointError

LIBRARY = Path(__file__).resolve().parents[2] / "workflow"


def python(code: str, *arguments, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(LIBRARY)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE, **options
    )


# ---------------------------------------------------------------- files
def test_a_state_comes_back_and_older_ones_go(tmp_path):
    state = {"unet": {"w": torch.arange(4.0)}, "ema": None, "step": 3}
    for images in (8, 16, 100, 24):
        path = checkpoint.save(tmp_path / "saves", images, state | {"images": images}, keep={8})
        assert path.name == f"{images}.pt"
    assert checkpoint.saved(tmp_path / "saves") == [8, 24, 100]  # ordered by number; a later one is left alone
    again = checkpoint.load(tmp_path / "saves", 24)
    assert torch.equal(again["unet"]["w"], torch.arange(4.0)) and (again["ema"], again["images"]) == (None, 24)
    checkpoint.save(tmp_path / "saves", 32, state, only_most_recent=False)
    assert checkpoint.saved(tmp_path / "saves") == [8, 24, 32, 100]
    assert checkpoint.saved(tmp_path / "absent") == []


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(Trap(), tmp_path / "5.pt")
    with pytest.raises(CheckpointError, match="5.pt: unreadable checkpoint"):
        checkpoint.load(tmp_path, 5)
    assert not (tmp_path / "sprung").exists()


def test_a_cut_checkpoint_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 5, {"w": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="5.pt: unreadable checkpoint .*; delete it to go on from the one before"):
        checkpoint.load(tmp_path, 5)


FULL_DISK = """
import resource, signal, sys, torch
from sdtrain import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(sys.argv[1], 16, {"w": torch.zeros(1_000_000)})
except checkpoint.CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    checkpoint.save(tmp_path, 8, {"w": torch.ones(3)})
    output = python(FULL_DISK, tmp_path).communicate(timeout=120)[0]
    assert "16.pt: could not be saved" in output and "the checkpoint before it is untouched" in output
    assert os.listdir(tmp_path) == ["8.pt"] and checkpoint.load(tmp_path, 8)["w"].tolist() == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------- milestones
def fill(folder: Path, *images: int) -> None:
    for number in images:
        checkpoint.save(folder, number, {"images": number}, only_most_recent=False)


def test_a_killed_job_goes_on_from_its_last_checkpoint(tmp_path):
    fill(tmp_path, 64, 96)
    checkpoint.finish_milestone(tmp_path, 50)
    checkpoint.start_milestone(tmp_path, 100, 64)
    assert checkpoint.saved(tmp_path) == [64, 96]


def test_a_forced_milestone_is_trained_again_from_the_one_before(tmp_path):
    """Batches of 32: the milestones 50, 100 and 200 end at 64, 128 and 224 images."""
    fill(tmp_path, 64, 128, 224)
    for milestone in (50, 100, 200):
        checkpoint.finish_milestone(tmp_path, milestone)
    checkpoint.start_milestone(tmp_path, 100, 64)
    assert checkpoint.saved(tmp_path) == [64]
    assert [p.name for p in tmp_path.glob("*.done")] == ["50.done"]
    fill(tmp_path, 96)
    checkpoint.start_milestone(tmp_path, 100, 64)  # killed and started again: this time it goes on
    assert checkpoint.saved(tmp_path) == [64, 96]


def test_the_first_milestone_starts_from_nothing(tmp_path):
    checkpoint.start_milestone(tmp_path / "absent", 10, 0)
    fill(tmp_path, 16)
    checkpoint.finish_milestone(tmp_path, 10)
    checkpoint.start_milestone(tmp_path, 10, 0)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- lock
HOLD = """
import sys, time
from sdtrain import checkpoint
with checkpoint.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(300)
"""


def test_the_lock_keeps_a_second_trainer_out_until_the_first_is_gone(tmp_path):
    holder = python(HOLD, tmp_path / "run")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="run: another process is training here; wait for it or end it"):
            with checkpoint.lock(tmp_path / "run"):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=60)
    for _ in range(2):
        with checkpoint.lock(tmp_path / "run"):
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
    values = {part: {"pretrained": str(tmp_path / "project/components")} for part in models.PARTS}
    unet = {"target": "UNet2DConditionModel", "params": tiny_unet_params}
    torch.manual_seed(0)
    return models.load_parts(config.load(schema.ModelConfig, values={**values, "unet": unet}))


def image(folder: Path):
    pipe = sampling.load_pipeline(folder)
    return list(sampling.generate(pipe, ["a red square"], 32, guidance_scale=2.0, steps=2, seed=0, batch_size=1))[0]


def test_an_exported_pipeline_loads_and_can_be_moved_with_its_project(parts, tmp_path):
    folder = checkpoint.export_pipeline(
        tmp_path / "project/runs/1/pipeline", parts, parts.unet, {"unet_raw": parts.unet}
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
