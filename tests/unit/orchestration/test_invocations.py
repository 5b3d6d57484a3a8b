"""Tests of Snakemake invocations in one folder: stale locks, running invocations, copies of configurations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdtrain.io import files
from sdtrain.orchestration import invocations
from sdtrain.orchestration.invocations import keep_configs, register

REGISTER = """
import sys
from sdtrain.orchestration import invocations
print(invocations.register(sys.argv[1]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start_other(tmp_path):
    """Return a function that registers another process in tmp_path and returns it with the result of `register`."""
    started = []

    def start() -> tuple[subprocess.Popen, bool]:
        command = [sys.executable, "-c", REGISTER, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline() == "True\n"

    yield start
    for process in started:
        end(process)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def lock(tmp_path) -> Path:
    """Return a lock of Snakemake."""
    path = tmp_path / "locks/0.input.lock"
    path.parent.mkdir()
    path.write_text("results/x\n")
    return path


def test_locks_of_a_killed_invocation_are_deleted(start_other, lock, tmp_path):
    process, alone = start_other()
    assert alone and not lock.exists()
    lock.write_text("results/x\n")
    end(process)
    assert start_other()[1] and not lock.exists()
    assert len(list(tmp_path.glob("invocations/[!.]*"))) == 1  # the killed process left no file


def test_locks_of_a_running_invocation_remain(start_other, lock):
    first, _ = start_other()
    lock.write_text("results/x\n")
    second, alone = start_other()
    assert not alone and lock.exists()
    end(first)
    assert not start_other()[1] and lock.exists()  # the second process still runs
    end(second)


def test_an_invocation_may_register_twice(tmp_path, start_other):
    assert register(tmp_path) and register(tmp_path)
    assert not start_other()[1]


def test_nothing_is_deleted_on_a_file_system_without_locks(tmp_path, lock, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no locks here")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="no locks"):
        assert not register(tmp_path)
    assert lock.exists()
    invocations._held_locks.clear()


def test_kept_configurations_do_not_change(tmp_path):
    configs = tmp_path / "configs"
    (configs / "data").mkdir(parents=True)
    (configs / "demo.yaml").write_text("a: 1")
    (configs / "data/emoji.yaml").write_text("b: 2")
    (configs / "notes.txt").write_text("not read by jobs")
    first = keep_configs(configs, tmp_path / "kept")
    assert keep_configs(configs, tmp_path / "kept") == first and first.is_absolute()
    (configs / "demo.yaml").write_text("a: 3")
    second = keep_configs(configs, tmp_path / "kept")
    assert second != first
    assert [(folder / "demo.yaml").read_text() for folder in (first, second)] == ["a: 1", "a: 3"]
    assert {str(path.relative_to(first)) for path in first.rglob("*") if path.is_file()} == {
        "demo.yaml",
        "data/emoji.yaml",
    }
    assert {path for path in (tmp_path / "kept").iterdir() if path.is_dir()} == {first, second}
    (configs / "demo.yaml").rename(configs / "other.yaml")
    assert keep_configs(configs, tmp_path / "kept") not in (first, second)


def test_api_key_is_passed_on_in_the_environment_and_an_absent_one_changes_nothing(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "own")
    invocations.pass_on_api_key(None)
    assert os.environ["WANDB_API_KEY"] == "own"
    invocations.pass_on_api_key("of the run")
    assert os.environ["WANDB_API_KEY"] == "of the run"
