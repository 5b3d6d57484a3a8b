"""What a call of Snakemake finds of others in its folder, and what it keeps for its jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from sdtrain.orchestration.invocations import enter, keep_copy

ANOTHER = """
import sys
sys.path.insert(0, sys.argv[1])
from sdtrain.orchestration import invocations
print(invocations.enter(sys.argv[2]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def another(tmp_path):
    """Starts another call in tmp_path: returns the process, and whether it was alone."""
    started = []

    def start() -> tuple[subprocess.Popen, bool]:
        words = [sys.executable, "-c", ANOTHER, str(ROOT / "workflow"), str(tmp_path)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline() == "True\n"

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def lock(tmp_path) -> Path:
    """A lock as Snakemake leaves it."""
    path = tmp_path / "locks/0.input.lock"
    path.parent.mkdir()
    path.write_text("results/x\n")
    return path


def test_a_killed_call_leaves_no_lock_behind(another, lock):
    process, alone = another()
    assert alone and not lock.exists()
    lock.write_text("results/x\n")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert another()[1] and not lock.exists()


def test_the_lock_of_a_living_call_stays(another, lock):
    first, _ = another()
    lock.write_text("results/x\n")
    second, alone = another()
    assert not alone and lock.exists()
    first.kill()
    first.wait()
    assert not another()[1] and lock.exists()  # the second is still alive
    second.kill()


def test_a_call_may_enter_twice(tmp_path, another):
    assert enter(tmp_path) and enter(tmp_path)
    assert not another()[1]


def test_jobs_read_what_was_there(tmp_path):
    configs = tmp_path / "configs"
    (configs / "data").mkdir(parents=True)
    (configs / "demo.yaml").write_text("a: 1")
    (configs / "data/emoji.yaml").write_text("b: 2")
    (configs / "notes.txt").write_text("not for jobs")
    first = keep_copy(configs, tmp_path / "kept")
    assert keep_copy(configs, tmp_path / "kept") == first and first.is_absolute()
    (configs / "demo.yaml").write_text("a: 3")
    second = keep_copy(configs, tmp_path / "kept")
    assert second != first
    assert [(folder / "demo.yaml").read_text() for folder in (first, second)] == ["a: 1", "a: 3"]
    assert {str(path.relative_to(first)) for path in first.rglob("*.yaml")} == {"demo.yaml", "data/emoji.yaml"}
    assert sorted(os.listdir(tmp_path / "kept")) == sorted({first.name, second.name})
    (configs / "demo.yaml").rename(configs / "other.yaml")
    assert keep_copy(configs, tmp_path / "kept") not in (first, second)
