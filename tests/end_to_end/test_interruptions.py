"""Trainings that are killed, signalled, out of disk space or given non-finite losses end with identical results."""

from __future__ import annotations

import json
import os
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
LONG = [  # 24 steps of 4 images; log lines and checkpoints fall on different steps; dropout inside the UNet too
    "experiment.num_examples_to_see=96",
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
    assert [line["images"] for line in log(folder / RUN)] == [20, 40, 60, 80, 96]
    assert part(last_checkpoint(folder / RUN), "progress")["updates"] == 24
    return folder / RUN


# ---------------------------------------------------------------- kill -9
MOMENTS = {  # of a kill, and the path that rank 0 is about to rename or delete; each is later than the one before
    "before the folder is claimed": "*/.about.json.tmp",
    "before the first checkpoint is in place": "*/.0.tmp",
    "with a checkpoint written but for its index": "*/.32.tmp/.metadata.tmp",
    "before a whole checkpoint is in place": "*/.48.tmp",
    "before an old checkpoint is deleted": "*/32/.metadata",
    "with an old checkpoint half deleted": "__0_0.distcp",
    "before the last checkpoint is in place": "*/.96.tmp",
    "before the pipeline is in place": "*/96/.pipeline.tmp",
    "before the newest pipeline is linked": "*/stage1/.pipeline.tmp",
    "before the record is in place": "*/.train.json.tmp",
    "before the milestone is marked as finished": "*/.96.done.tmp",
}


def test_resume_after_a_kill_at_every_stage_gives_identical_results(undisturbed, tmp_path, train, stage_yaml):
    """One training, started again after each kill of all ranks; once in the loop, wherever they are."""
    arguments = (f"config={stage_yaml}", *LONG)
    for moment, path in MOMENTS.items():
        train.start(tmp_path, *arguments, ranks=2, pause_before=path)
        train.await_pause()
        train.kill()
        assert train.wait().codes == [-signal.SIGKILL] * 2, moment
        if path == "*/.0.tmp":
            train.start(tmp_path, *arguments, ranks=2)
            await_images(tmp_path / RUN, 16)
            train.kill()
            train.wait()
    result = train(tmp_path, *arguments, ranks=2)
    assert result.codes == [0, 0] and "finished already" in result.text, result.text
    identical(tmp_path / RUN, undisturbed)


def test_restarted_torchrun_gives_identical_results(undisturbed, tmp_path, stage_yaml):
    """The launcher dies with its ranks; the trainers that it leaves behind are waited for."""
    command = [*TORCHRUN, str(SCRIPTS / "train.py"), f"config={stage_yaml}", *LONG, "experiment.wait_minutes=1"]
    with open(tmp_path / "output", "a") as output:
        options = {"cwd": tmp_path, "env": environment(), "stdout": output, "stderr": output}
        with subprocess.Popen(command, **options) as launcher:
            await_images(tmp_path / RUN, 16)
            launcher.kill()
        assert subprocess.run(command, **options, timeout=200).returncode == 0, (tmp_path / "output").read_text()
    identical(tmp_path / RUN, undisturbed)


def test_orphaned_loader_processes_do_not_disturb_the_resume(undisturbed, tmp_path, train, stage_yaml):
    arguments = (f"config={stage_yaml}", *LONG, "system.workers=2")
    train.start(tmp_path, *arguments, ranks=2)
    await_images(tmp_path / RUN, 16)
    train.kill()
    train.wait()
    result = train(tmp_path, *arguments, ranks=2)
    assert result.codes == [0, 0], result.text
    identical(tmp_path / RUN, undisturbed)


def test_resume_on_four_ranks_is_exact(tmp_path, train, stage_yaml):
    """A sum of two is the same in any order, one of four is not."""
    arguments = (f"config={stage_yaml}", *LONG, "experiment.milestones=[48]", "experiment.save_every=1000")
    (whole := tmp_path / "whole").mkdir()
    assert train(whole, *arguments, ranks=4).codes == [0] * 4
    (halves := tmp_path / "halves").mkdir()
    assert train(halves, *arguments, "experiment.stop_at=48", ranks=4).codes == [0] * 4
    result = train(halves, *arguments, ranks=4)
    assert result.codes == [0] * 4 and "resumed at 48 images" in result.text
    assert same(last_checkpoint(halves / RUN), last_checkpoint(whole / RUN))


# ---------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_to_one_rank_saves_a_checkpoint_and_requests_a_requeue(undisturbed, tmp_path, train, stage_yaml, number):
    arguments = (f"config={stage_yaml}", *LONG)
    train.start(tmp_path, *arguments, ranks=2, pause_before="*/.32.tmp")
    train.await_pause()
    os.kill(train.pids[1], number)
    train.resume()
    stopped = train.wait()
    assert stopped.codes == [75, 75], stopped.text
    marker = json.loads((tmp_path / RUN / "requeue").read_text())
    assert marker["warned"] == (number == signal.SIGUSR1)  # by SLURM, ahead of its limit
    assert 32 < marker["images"] < 96 and f"saved at {marker['images']} images" in stopped.text
    assert not (tmp_path / RUN / "96").exists()
    again = train(tmp_path, *arguments, ranks=2)
    assert again.codes == [0, 0] and f"resumed at {marker['images']} images" in again.text, again.text
    assert not (tmp_path / RUN / "requeue").exists()
    identical(tmp_path / RUN, undisturbed)


# ---------------------------------------------------------------- other numbers of ranks
def test_other_world_size_resumes_with_the_same_global_batch(undisturbed, tmp_path, train, stage_yaml):
    train.start(tmp_path, f"config={stage_yaml}", *LONG, ranks=2, pause_before="*/.16.tmp")
    train.await_pause()
    os.kill(train.pids[0], signal.SIGTERM)
    train.resume()
    assert train.wait().codes == [75, 75]
    alone = train(tmp_path, f"config={stage_yaml}", *LONG)
    refused(alone, "global batch of 4 images, but this launch has 2", "set system.global_batch=4")
    result = train(tmp_path, f"config={stage_yaml}", *LONG, "system.global_batch=4")
    assert result.codes == [0] and "resumed at" in result.text, result.text
    assert losses(tmp_path / RUN) == pytest.approx(losses(undisturbed), rel=0.01)


# ---------------------------------------------------------------- a rank, or the disk, gives up
@pytest.mark.parametrize("dead", [0, 1])
def test_dead_rank_is_named_by_the_others(tmp_path, train, stage_yaml, dead):
    train.start(tmp_path, f"config={stage_yaml}", *LONG, ranks=2, pause_before="*/.16.tmp")
    train.await_pause()
    os.kill(train.pids[dead], signal.SIGKILL)
    train.resume()
    result = train.wait()
    assert result.codes[dead] == -signal.SIGKILL and result.codes[1 - dead] == 1, result.text
    assert f"rank {1 - dead} has lost rank {dead}, which died or hangs" in result.text
    assert "Traceback" not in result.text


def test_hanging_rank_is_named_after_the_timeout(tmp_path, train, stage_yaml):
    train.start(
        tmp_path, f"config={stage_yaml}", *LONG, "distributed.timeout_minutes=0.05", ranks=2, pause_before="*/.16.tmp"
    )
    train.await_pause()
    os.kill(train.pids[1], signal.SIGSTOP)
    train.resume()
    end = time.monotonic() + 60
    while "has lost rank 1, which died or hangs" not in train.log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(train.pids[1], signal.SIGKILL)
    result = train.wait()
    assert "has lost rank 1, which died or hangs" in result.text, result.text
    assert result.codes == [1, -signal.SIGKILL]


def test_full_disk_keeps_the_last_checkpoint(tmp_path, train, stage_yaml):
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


def await_event(run: Path, word: str, deadline: float = 100.0) -> None:
    """Wait until a run's log tells of such an event."""
    end = time.monotonic() + deadline
    while not (run / "log.jsonl").exists() or word not in (run / "log.jsonl").read_text():
        assert time.monotonic() < end, f"nothing {word}"
        time.sleep(0.005)


def test_step_with_a_non_finite_loss_is_skipped(tmp_path, train, stage_yaml, poisoned):
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


def test_rollback_resumes_with_the_following_data(rolled_back):
    run, _ = rolled_back
    record = json.loads((run / "96/train.json").read_text())
    back, progress = events(run, "rolled back"), part(last_checkpoint(run), "progress")
    assert record["rollbacks"] == len(back) > 0 and record["skipped"] == len(events(run, "skipped"))
    assert progress["moved"] > 0 and progress["moved"] % 4 == 0
    assert all(torch.isfinite(w).all() for w in weights(run / "pipeline").values())
    images = [line["images"] for line in log(run) if "lr" in line]
    assert images == [20, 40, 60, 80, 96]  # each once, as if nothing had happened
    positions = [line.get("position", line["images"]) for line in log(run)]
    assert positions == sorted(positions)


def test_kills_during_a_rollback_give_identical_results(rolled_back, tmp_path, train, stage_yaml):
    """Killed soon after a skipped step, soon after a rollback, and before the checkpoint after it is in place."""
    run, options = rolled_back
    arguments = (f"config={stage_yaml}", *options)
    for word in ("skipped", "rolled back"):
        train.start(tmp_path, *arguments, ranks=2)
        await_event(tmp_path / RUN, word)
        train.kill()
        train.wait()
    back = events(run, "rolled back")[0]["images"]
    train.start(tmp_path, *arguments, ranks=2, pause_before=f"*/.{back + 16}.tmp")
    train.await_pause()
    train.kill()
    train.wait()
    result = train(tmp_path, *arguments, ranks=2)
    assert result.codes == [0, 0], result.text
    identical(tmp_path / RUN, run)


def test_training_ends_after_too_many_rollbacks(tmp_path, train, stage_yaml, poisoned):
    options = [*poisoned(range(41)), "experiment.max_nonfinite=5", "experiment.max_rollbacks=2"]  # saves every 4
    result = train(tmp_path, f"config={stage_yaml}", *options)
    refused(result, "non-finite", "2 rollbacks to the checkpoint at 0 images", "optimizer.params.learning_rate")
    assert not list(tmp_path.rglob("train.json"))
