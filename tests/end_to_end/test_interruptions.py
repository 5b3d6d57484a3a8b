"""A training that is killed, signalled, starved of disk or fed bad numbers ends as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from samples import write_tar
from trainings import (
    SCRIPTS,
    TORCHRUN,
    await_images,
    environment,
    last_checkpoint,
    log,
    losses,
    part,
    refused,
    same,
    weights,
)

from sdtrain.data import tars

RUN = Path("logs/tiny/stage1")
pytestmark = pytest.mark.timeout(600)  # the first test of a group waits for its trainings, on a busy machine too
LONG = [  # 60 steps of 4 images; log lines and checkpoints fall on different steps; dropout inside the UNet too
    "experiment.num_examples_to_see=240",
    "experiment.milestones=[]",
    "experiment.save_every=4",
    "experiment.log_every=5",
    "model.unet.params.dropout=0.1",
]


def identical(run: Path, expected: Path) -> None:
    """Bit for bit the same weights, average, moments and counts, and the same log."""
    assert log(run) == log(expected)
    assert same(last_checkpoint(run), last_checkpoint(expected))
    assert same(weights(run / "pipeline"), weights(expected / "pipeline"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, train, stage_yaml) -> Path:
    """The run of a training on two ranks that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train(folder, f"config={stage_yaml}", *LONG, ranks=2)
    assert result.codes == [0, 0] and "resumed" not in result.text, result.text
    assert [line["images"] for line in log(folder / RUN)] == list(range(20, 241, 20))
    assert part(last_checkpoint(folder / RUN), "progress")["updates"] == 60
    return folder / RUN


# ---------------------------------------------------------------- kill -9
def test_killed_at_20_random_moments_it_ends_the_same(undisturbed, tmp_path, train, stage_yaml):
    kills, number, moments = 0, 0, random.Random(time.time_ns())
    while kills < 20:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        train.start(folder, f"config={stage_yaml}", *LONG, ranks=2)
        time.sleep(moments.uniform(0.1, 1.5))
        train.kill()
        killed = train.wait().codes != [0, 0]
        kills += killed
        if not killed:  # it had ended before
            identical(folder / RUN, undisturbed)
            number += 1
    folder = tmp_path / str(number)
    folder.mkdir(exist_ok=True)
    result = train(folder, f"config={stage_yaml}", *LONG, ranks=2)
    assert result.codes == [0, 0], result.text
    identical(folder / RUN, undisturbed)


def test_torchrun_killed_and_started_again_ends_the_same(undisturbed, tmp_path, stage_yaml):
    """The launcher dies with its ranks; the trainers that it leaves behind are waited for."""
    command = [*TORCHRUN, str(SCRIPTS / "train.py"), f"config={stage_yaml}", *LONG, "experiment.wait_minutes=1"]
    with open(tmp_path / "output", "a") as output:
        options = {"cwd": tmp_path, "env": environment(), "stdout": output, "stderr": output}
        with subprocess.Popen(command, **options) as launcher:
            await_images(tmp_path / RUN, 16)
            launcher.kill()
        assert subprocess.run(command, **options, timeout=200).returncode == 0, (tmp_path / "output").read_text()
    identical(tmp_path / RUN, undisturbed)


def test_loader_processes_that_outlive_a_kill_are_in_nobodys_way(undisturbed, tmp_path, train, stage_yaml):
    arguments = (f"config={stage_yaml}", *LONG, "system.workers=2")
    train.start(tmp_path, *arguments, ranks=2)
    await_images(tmp_path / RUN, 16)
    train.kill()
    train.wait()
    result = train(tmp_path, *arguments, ranks=2)
    assert result.codes == [0, 0], result.text
    identical(tmp_path / RUN, undisturbed)


def test_a_sum_over_four_ranks_does_not_depend_on_when_it_was_resumed(tmp_path, train, stage_yaml):
    """A sum of two is the same in any order, one of four is not."""
    arguments = (f"config={stage_yaml}", *LONG[:1], *LONG[2:], "experiment.milestones=[120]")
    (whole := tmp_path / "whole").mkdir()
    assert train(whole, *arguments, ranks=4).codes == [0] * 4
    (halves := tmp_path / "halves").mkdir()
    assert train(halves, *arguments, "experiment.stop_at=120", ranks=4).codes == [0] * 4
    result = train(halves, *arguments, ranks=4)
    assert result.codes == [0] * 4 and "resumed at 120 images" in result.text
    assert same(last_checkpoint(halves / RUN), last_checkpoint(whole / RUN))


# ---------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_all_and_asks_for_a_requeue(undisturbed, tmp_path, train, stage_yaml, number):
    arguments = (f"config={stage_yaml}", *LONG, "experiment.save_every=1000")
    train.start(tmp_path, *arguments, ranks=2)
    while "steps 0 to 60" not in train.log.read_text():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(train.pids[1], number)
    stopped = train.wait()
    assert stopped.codes == [75, 75], stopped.text
    marker = json.loads((tmp_path / RUN / "requeue").read_text())
    assert marker["warned"] == (number == signal.SIGUSR1)  # by SLURM, ahead of its limit
    assert 0 < marker["images"] < 240 and f"saved at {marker['images']} images" in stopped.text
    assert not (tmp_path / RUN / "240").exists()
    again = train(tmp_path, *arguments, ranks=2)
    assert again.codes == [0, 0] and f"resumed at {marker['images']} images" in again.text, again.text
    assert not (tmp_path / RUN / "requeue").exists()
    identical(tmp_path / RUN, undisturbed)


# ---------------------------------------------------------------- other numbers of ranks
def test_another_world_size_goes_on_with_the_same_global_batch(undisturbed, tmp_path, train, stage_yaml):
    train.start(tmp_path, f"config={stage_yaml}", *LONG, ranks=2)
    await_images(tmp_path / RUN, 16)
    os.kill(train.pids[0], signal.SIGTERM)
    assert train.wait().codes == [75, 75]
    alone = train(tmp_path, f"config={stage_yaml}", *LONG)
    refused(alone, "global batch of 4 images, but this launch has 2", "set system.global_batch=4")
    result = train(tmp_path, f"config={stage_yaml}", *LONG, "system.global_batch=4")
    assert result.codes == [0] and "resumed at" in result.text, result.text
    assert losses(tmp_path / RUN) == pytest.approx(losses(undisturbed), rel=0.01)


# ---------------------------------------------------------------- a rank, or the disk, gives up
@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_is_named_by_the_others(tmp_path, train, stage_yaml, dead):
    train.start(tmp_path, f"config={stage_yaml}", *LONG, ranks=2)
    await_images(tmp_path / RUN, 0)
    os.kill(train.pids[dead], signal.SIGKILL)
    result = train.wait()
    assert result.codes[dead] == -signal.SIGKILL and result.codes[1 - dead] == 1, result.text
    assert f"rank {1 - dead} has lost rank {dead}, which died or hangs" in result.text
    assert "Traceback" not in result.text


def test_a_rank_that_hangs_is_named_after_the_time_out(tmp_path, train, stage_yaml):
    train.start(tmp_path, f"config={stage_yaml}", *LONG, "distributed.timeout_minutes=0.05", ranks=2)
    await_images(tmp_path / RUN, 8)
    os.kill(train.pids[1], signal.SIGSTOP)
    end = time.monotonic() + 60
    while "has lost rank 1, which died or hangs" not in train.log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(train.pids[1], signal.SIGKILL)
    result = train.wait()
    assert "has lost rank 1, which died or hangs" in result.text, result.text
    assert result.codes == [1, -signal.SIGKILL]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, train, stage_yaml):
    arguments = (f"config={stage_yaml}", "experiment.milestones=[]")
    assert train(tmp_path, *arguments, "experiment.stop_at=4", ranks=2).codes == [0, 0]
    before = last_checkpoint(tmp_path / RUN)
    result = train(tmp_path, *arguments, ranks=2, file_limit=200_000)
    assert result.codes == [1, 1] and "Traceback" not in result.text, result.text
    assert "could not be saved" in result.text and "the checkpoint before it is untouched" in result.text
    assert same(last_checkpoint(tmp_path / RUN), before)
    result = train(tmp_path, *arguments, ranks=2)
    assert result.codes == [0, 0] and "resumed at 4 images" in result.text, result.text


# ---------------------------------------------------------------- numbers that are none
@pytest.fixture(scope="module")
def poisoned(latents, text_parts, tmp_path_factory):
    """poisoned(wanted): shards of latents in which those samples, of 41 in three shards, hold NaN; and what to set."""

    def make(wanted) -> list[str]:
        folder, number = tmp_path_factory.mktemp("poisoned"), 0
        for path in sorted(latents["online"].parent.rglob("*.tar")):
            samples = []
            for sample in tars.index_tar(path):
                fields = {name: sample.read(name) for name in sample.fields}
                if number in wanted:
                    kept = load(fields["latent"])
                    fields["latent"] = save(
                        {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in kept.items()}
                    )
                samples.append((sample.key, fields))
                number += 1
            write_tar(folder / path.name, samples)
        assert number == 41
        options = [f"dataset.params.path={folder}/{{00000..00002}}.tar", "dataset.type=LatentDataset"]
        options += [f"model.{part}.pretrained={text_parts}" for part in ("vae", "text_encoder", "tokenizer")]
        return [*options, "dataset.params.window=1", *LONG[:-1]]

    return make


def events(run: Path, word: str) -> list[dict]:
    return [line for line in log(run) if word in line.get("event", "")]


def test_a_step_without_a_number_is_skipped(tmp_path, train, stage_yaml, poisoned):
    result = train(tmp_path, f"config={stage_yaml}", *poisoned({20}), "experiment.num_examples_to_see=40", ranks=2)
    assert result.codes == [0, 0], result.text
    record = json.loads((tmp_path / RUN / "40/train.json").read_text())
    assert (record["skipped"], record["rollbacks"]) == (1, 0)
    assert len(events(tmp_path / RUN, "skipped")) == 1 and "skipped step: non-finite" in result.text
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / RUN / "pipeline").values())
    assert part(last_checkpoint(tmp_path / RUN), "progress")["updates"] == 9
    assert [line["images"] for line in log(tmp_path / RUN) if "loss" in line] == [20, 40]


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory, train, stage_yaml, poisoned) -> tuple[Path, list[str]]:
    """A run over 41 samples an epoch of which five in one shard, read together, hold NaN; and its options."""
    folder = tmp_path_factory.mktemp("rolled_back")
    options = [*poisoned(range(17, 22)), "experiment.max_nonfinite=2"]
    result = train(folder, f"config={stage_yaml}", *options, ranks=2)
    assert result.codes == [0, 0], result.text
    return folder / RUN, options


def test_after_too_many_it_goes_back_and_on_with_other_data(rolled_back):
    run, _ = rolled_back
    record = json.loads((run / "240/train.json").read_text())
    back, progress = events(run, "rolled back"), part(last_checkpoint(run), "progress")
    assert record["rollbacks"] == len(back) > 0 and record["skipped"] == len(events(run, "skipped"))
    assert progress["moved"] > 0 and progress["moved"] % 4 == 0
    assert all(torch.isfinite(w).all() for w in weights(run / "pipeline").values())
    images = [line["images"] for line in log(run) if "lr" in line]
    assert images == list(range(20, 241, 20))  # each once, as if nothing had happened
    positions = [line.get("position", line["images"]) for line in log(run)]
    assert positions == sorted(positions)


def test_a_rollback_interrupted_by_kills_ends_the_same(rolled_back, tmp_path, train, stage_yaml):
    run, options = rolled_back
    moments = random.Random(time.time_ns())
    for _ in range(6):
        train.start(tmp_path, f"config={stage_yaml}", *options, ranks=2)
        time.sleep(moments.uniform(0.3, 1.5))
        train.kill()
        train.wait()
    result = train(tmp_path, f"config={stage_yaml}", *options, ranks=2)
    assert result.codes == [0, 0], result.text
    identical(tmp_path / RUN, run)


def test_what_never_gets_better_ends(tmp_path, train, stage_yaml, poisoned):
    options = [*poisoned(range(41)), "experiment.max_nonfinite=5", "experiment.max_rollbacks=2"]  # saves every 4
    result = train(tmp_path, f"config={stage_yaml}", *options)
    refused(result, "non-finite", "2 rollbacks to the checkpoint at 0 images", "optimizer.params.learning_rate")
    assert not list(tmp_path.rglob("train.json"))
