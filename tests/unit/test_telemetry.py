"""The log holds each image once whatever interrupted it, and the wandb key reaches no file."""

from __future__ import annotations

import json
import os
import time

import pytest

from sdtrain import config, schema
from sdtrain.telemetry import Telemetry, start_wandb


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_entries_are_written_as_they_come(tmp_path):
    log = tmp_path / "run/log.jsonl"
    telemetry = Telemetry(log, total=40)
    entry = telemetry.log(10, {"loss": 0.123456789, "lr": 1.0})
    assert entry["loss"] == 0.123456789 and entry["images_per_second"] > 0
    assert lines(log)[0]["loss"] == 0.123457  # before close
    telemetry.log(20, {"loss": 0.5})
    telemetry.close()
    assert [line["images"] for line in lines(log)] == [10, 20]


@pytest.mark.parametrize(("start", "kept"), [(0, []), (10, [10]), (25, [10, 20]), (40, [10, 20, 30, 40])])
def test_a_resume_drops_what_lies_past_its_start(tmp_path, start, kept):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"images": i, "loss": 1.0}) + "\n" for i in (10, 20, 30, 40)))
    telemetry = Telemetry(log, total=100, start=start)
    telemetry.log(50, {"loss": 2.0})
    telemetry.close()
    assert [line["images"] for line in lines(log)] == [*kept, 50] and os.listdir(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize("cut", ['{"images": 2', '{"images', "7", '{"loss": 1.0}'])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    log = tmp_path / "log.jsonl"
    log.write_text('{"images": 10}\n' + cut)
    Telemetry(log, total=100, start=90).close()
    assert lines(log) == [{"images": 10}]


def test_saving_is_left_out_of_the_rate():
    telemetry = Telemetry(None, total=100)
    time.sleep(0.05)
    with telemetry.excluded():
        time.sleep(1.0)
    assert telemetry.log(10, {"loss": 1.0})["images_per_second"] > 15  # 10 in 1.05 s would be 9.5
    time.sleep(0.5)
    assert telemetry.log(20, {"loss": 1.0})["images_per_second"] < 20.1
    telemetry.close()


def test_progress_is_said_in_words_where_there_is_no_terminal(capfd):
    telemetry = Telemetry(None, total=2000, start=1000, label="demo/stage1")
    time.sleep(0.01)
    telemetry.log(1500, {"loss": 0.25})
    telemetry.log(1600, {"loss": 0.25})  # not again within ten seconds
    telemetry.log(2000, {"loss": 0.2})
    telemetry.close()
    said = capfd.readouterr().out.splitlines()
    assert (
        len(said) == 2
        and said[0].startswith("demo/stage1: 1,500 of 2,000 images, ")
        and "loss 0.2500, 0:00 left" in said[0]
    )
    quiet = Telemetry(None, total=10, quiet=True)
    quiet.log(10, {"loss": 1.0})
    quiet.close()
    assert capfd.readouterr().out == ""


SECRET = "0123456789abcdef0123456789abcdef01234567"


def stage(folder, **wandb):
    experiment = {"log_dir": str(folder), "project": "p", "name": "n", "num_examples_to_see": 10}
    return config.load(
        schema.StageConfig, values={"wandb": wandb, "experiment": experiment, "dataset": {"params": {"path": "x"}}}
    )


def test_an_offline_run_is_written_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)  # restored afterwards: the code under test sets it
    run = start_wandb(stage(tmp_path, api_key=SECRET), tmp_path, "abc123")
    telemetry = Telemetry(tmp_path / "log.jsonl", total=10, wandb=run)
    telemetry.log(5, {"loss": 0.5})
    telemetry.close()
    (binary,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert "abc123" in binary.name and b"num_examples_to_see" in binary.read_bytes()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_without_a_key_it_is_offline_and_disabled_is_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert start_wandb(stage(tmp_path, mode="disabled"), tmp_path, "x") is None
    run = start_wandb(stage(tmp_path), tmp_path, "y")
    assert run.settings.mode == "offline"
    run.finish()
