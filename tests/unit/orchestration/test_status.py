"""Tests of the status of a run in every state, from its files and from squeue, and of reading squeue's output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from checkout import ROOT

from sdtrain.errors import ConfigError
from sdtrain.io.files import hold_lock, write_json, write_text
from sdtrain.orchestration import slurm, status
from sdtrain.orchestration.plan import Plan
from sdtrain.training.telemetry import Telemetry

NOW = time.time() // 1
STAGE2 = Path("results/runs/demo/stage2")
ELSEWHERE = "process 12 on a-node, SLURM job 41, since 2026-11-25 00:00:00"  # on another host


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return the plan of the demo: stage1 of 48,000 images, stage2 of 26,000, each with a milestone at 0."""
    return Plan("demo", [], error=ConfigError)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Change to a folder with the project's configurations and no results."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def view(plan: Plan, *jobs: slurm.Job, trouble: str = "") -> str:
    """Return the status text. Assert that every line without a path fits a terminal."""
    lines = status.describe(plan, list(jobs), trouble, NOW)
    assert all(len(line) <= 100 for line in lines if "/" not in line), lines
    return "\n".join(lines)


def stage2(plan: Plan, *jobs: slurm.Job) -> str:
    """Return the text about stage 2 before its milestones, as one line."""
    text = view(plan, *jobs).partition("\nstage2  ")[2].partition("\n    images ")[0]
    return " · ".join(line.strip() for line in text.splitlines())


def write_log(until: int = 12000, age: float = 5, folder: Path = STAGE2, rate: float = 100.0) -> Path:
    """Write a log with a line per 320 images at `rate` images/s on two GPUs, last written `age` seconds ago."""
    rates = {"images_per_second": rate, "images_per_second_per_gpu": rate / 2}
    lines = [{"images": n, "loss": 0.25, "lr": 1e-3, "skipped": 0, **rates} for n in range(320, until + 1, 320)]
    lines[-1]["images"] = until
    write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "log.jsonl", (NOW - age, NOW - age))
    return folder / "log.jsonl"


def write_lock(about: str = ELSEWHERE, age: float = 3600) -> None:
    write_text(STAGE2 / ".lock", about)
    os.utime(STAGE2 / ".lock", (NOW - age, NOW - age))


def job(number: str, state: str, wildcards: str = "demo_stage2_26000", rule: str = "train", **more) -> slurm.Job:
    facts = {"reason": "", "elapsed": "25:00", "limit": "4-00:00:00", "nodes": "16", "started": None}
    log = Path(f".snakemake/slurm_logs/rule_{rule}/{wildcards}/{number}.log")
    return slurm.Job(number, state, rule=rule, wildcards=wildcards, log=log, **facts | more)


@contextlib.contextmanager
def trainer(since: float = 60):
    """Start a process that has locked stage 2's folder for `since` seconds, as a trainer does; yield its process id."""
    ready, child_ready = os.pipe()
    child = os.fork()
    if not child:
        with hold_lock(STAGE2 / ".lock"):
            os.write(child_ready, b"!")
            signal.pause()
    try:
        assert os.read(ready, 1) == b"!"
        os.utime(STAGE2 / ".lock", (NOW - since, NOW - since))
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        os.close(ready)
        os.close(child_ready)


# ---------------------------------------------------------------- data and components
def test_status_of_a_run_without_results(plan):
    text = view(plan)
    assert re.search(r"emoji/train/shards +missing, 0 of 2 partitions finished", text)
    assert re.search(r"emoji/train/latents/emoji-autoencoder-64px +missing", text)
    assert "missing  efficientnet-lite0, emoji-autoencoder, minilm" in text
    assert "stage1  not started · 0 of 48,000 images (0 %)" in text
    assert "stage2  not started · 0 of 26,000 images (0 %)" in text
    assert text.splitlines()[0] == f"run demo · {datetime.fromtimestamp(NOW):%Y-%m-%d %H:%M:%S}"
    assert text.splitlines()[-1] == "SLURM jobs of this folder: none"


def test_present_data_and_components_are_listed(plan, image_shards):
    shutil.copytree(image_shards, "results/data/emoji/train/shards")
    write_json("results/data/emoji/held_out/built/0-of-1.json", {})
    write_text("results/data/emoji/train/latents/emoji-autoencoder-64px/manifest.json", "{half of")
    write_json("resources/components/minilm.json", {"name": "minilm"})
    text = view(plan)
    assert re.search(r"emoji/train/shards +samples: 41, shards: 3\n", text)
    assert re.search(r"emoji/held_out/shards +missing, 1 of 1 partitions finished", text)
    assert re.search(r"emoji-autoencoder-64px +unreadable", text)
    assert re.search(r"present +minilm\n +missing +efficientnet-lite0, emoji-autoencoder\n", text)


# ---------------------------------------------------------------- the states of a stage
def test_status_of_a_running_training(plan):
    write_log()
    with trainer() as process:
        seen = [stage2(plan), stage2(plan)]  # the status does not take the lock
    assert seen[0] == seen[1]
    said = seen[0].split(" · ")
    assert said[:4] == ["training", "12,000 of 26,000 images (46 %)", "100.0 img/s (50.0 per GPU)", "loss 0.25"]
    assert said[4] == f"expected end {datetime.fromtimestamp(NOW + 140):%Y-%m-%d %H:%M} (in 2 min)"
    assert said[5] == "last line 5 s ago"
    assert said[6].startswith(f"process {process} on ")


def test_speed_is_taken_from_several_log_lines(plan):
    """The rate of the first line after a start includes compilation, so it must not give an end in years."""
    path = write_log()
    with open(path, "a") as file:
        file.write('{"images": 12320, "images_per_second": 0.0001, "images_per_second_per_gpu": 0.0001}\n')
    with trainer():
        said = stage2(plan)
        assert "100.0 img/s (100.0 per GPU)" in said and "12,320 of" in said and "(in 2 min)" in said
        write_log(until=640, rate=1e-9)
        assert "training" in stage2(plan)


def test_log_written_by_the_trainer_is_read(plan, tmp_path):
    log = Telemetry(STAGE2 / "log.jsonl", total=26000, quiet=True)
    for images in (320, 640, 960):
        log.log(images, {"loss": images / 1000, "skipped": 0})
    log.note(976, "skipped step: non-finite loss or gradient norm")
    log.rewind(640)
    log.note(640, "rolled back to the last checkpoint", 976)
    log.close()
    said = stage2(plan)
    assert "640 of 26,000 images (2 %)" in said and "loss 0.64" in said
    assert said.endswith("steps skipped: 1 · rollbacks: 1")


@pytest.mark.parametrize(
    "end", ['{"images": 12320, "lo', '{"images": 12320, "loss": 0.1}\n\x00\x00', "[]\n", '{"a": 1}\n']
)
def test_truncated_and_foreign_log_lines_are_skipped(plan, end):
    with open(write_log(), "a") as file:
        file.write(end)
    said = stage2(plan)
    assert re.search(r"12,(000|320) of 26,000 images", said) and "100.0 img/s" in said


def test_status_of_a_starting_training(plan):
    write_log(age=3600)
    with trainer(since=30):
        assert stage2(plan).startswith("starting · 12,000 of 26,000")


@pytest.mark.parametrize("begun", [1500, 3600])
def test_stalled_training_is_reported(plan, begun):
    write_log(age=1500)
    with trainer(since=begun):
        said = stage2(plan)
    assert said.startswith("no progress for 25 min (its process is alive) · ")
    assert "expected end" not in said


def test_slow_training_is_not_reported_as_stalled(plan):
    write_log(age=1500, rate=0.5)  # one line in 640 s
    with trainer(since=7200):
        assert stage2(plan).startswith("training · ")


def test_training_killed_on_this_host_is_reported_at_once(plan):
    write_log()
    with trainer() as process:
        assert stage2(plan).startswith("training · ")
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        write_text("logs/runs/demo/stage2/0/train.log", "Killed\n")
        said = stage2(plan)
    assert said.startswith("stopped · 12,000 of 26,000")
    assert said.endswith("logs/runs/demo/stage2/0/train.log")


@pytest.mark.parametrize(("age", "state"), [(5, "training"), (1500, "stopped")])
def test_training_on_another_host_counts_as_running_while_its_log_is_recent(plan, age, state):
    write_log(age=age)
    write_lock()
    assert stage2(plan).startswith(f"{state} · ")


def test_status_of_a_training_that_waits_for_a_requeue(plan):
    write_log(age=60)
    write_lock()
    write_json(STAGE2 / "requeue", {"images": 12000})
    for images, age in ((11200, 400), (12000, 60), (9600, 900)):
        mark = STAGE2 / f"checkpoints/0123456789abcdef/{images}/.metadata"
        write_text(mark, "")
        os.utime(mark, (NOW - age, NOW - age))
    (STAGE2 / "checkpoints/0123456789abcdef/.12320.tmp").mkdir()
    said = stage2(plan)
    assert said.startswith("stopped, waiting for a requeue · 12,000 of 26,000")
    assert "checkpoint at 12,000 images, 1 min old" in said


def test_status_between_two_milestones(plan):
    write_json(STAGE2 / "0/train.json", {"images": 0, "lost": 0})
    assert stage2(plan) == "waiting for its next milestone · 0 of 26,000 images (0 %)"


def test_status_of_a_finished_stage(plan):
    write_log(until=26000, age=3 * 3600 + 600)
    write_lock()
    write_json(STAGE2 / "0/train.json", {"images": 0, "lost": 0})
    write_json(STAGE2 / "26000/train.json", {"images": 26000, "lost": 3})
    said = stage2(plan)
    assert said.startswith("done · 26,000 of 26,000 images (100 %) · 100.0 img/s (50.0 per GPU) · loss 0.25")
    assert said.endswith("last line 3 h 10 min ago · samples lost: 3")


def test_table_of_milestones(plan):
    write_json(STAGE2 / "0/train.json", {"images": 0})
    write_json(STAGE2 / "0/samples.json", {"images": 128})
    write_json(STAGE2 / "0/frechet_distance.json", {"metric": "FID", "value": 313.04})
    write_json(STAGE2 / "0/clip_score.json", {"metric": "alignment score (Net to Text)"})  # without a value
    write_text(STAGE2 / "26000/samples.json", "{")
    rows = [re.split("  +", line.strip()) for line in view(plan).partition("stage2")[2].splitlines()[1:4]]
    assert rows == [
        ["images", "trained", "samples", "FID", "alignment score"],
        ["0", "yes", "128", "313.0", "?"],
        ["26,000", "-", "?", "-", "-"],
    ]


def test_colours_are_used_only_in_a_terminal(plan, monkeypatch):
    assert "\033" not in view(plan)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "stage2  \033[33mnot started\033[0m · 0 of" in view(plan)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in view(plan)


# ---------------------------------------------------------------- jobs
def test_status_of_a_pending_job(plan):
    write_log(age=60)
    write_lock()
    write_json(STAGE2 / "requeue", {"images": 12000, "warned": True})
    start = datetime(2026, 11, 25, 14, 30)
    other = job("40", "RUNNING", wildcards="demo_stage22_26000")  # of a stage with a longer name
    waits = job("41", "PENDING", reason="BeginTime", elapsed="0:00", started=start)
    assert stage2(plan, other, waits).startswith("waiting: SLURM job 41, BeginTime · 12,000 of 26,000")
    assert view(plan, waits).splitlines()[-3:] == [
        "  id  job                      state    elapsed / limit    nodes",
        "  41  train demo_stage2_26000  PENDING  0:00 / 4-00:00:00  16",
        "      BeginTime · start expected 2026-11-25 14:30",
    ]


def test_status_of_a_running_job(plan):
    begin = datetime.fromtimestamp(NOW - 1500)
    running = job("41", "RUNNING", started=begin)
    write_log(age=7200)
    assert stage2(plan, running).startswith("no progress for 25 min (SLURM job 41 is alive)")
    assert stage2(plan, job("41", "RUNNING", started=datetime.fromtimestamp(NOW - 20))).startswith("starting · ")
    write_log(age=5)
    assert stage2(plan, running).startswith("training · ")
    assert view(plan, running).splitlines()[-1] == "      .snakemake/slurm_logs/rule_train/demo_stage2_26000/41.log"


def test_long_slurm_texts_fit_a_terminal(plan):
    reason = "Job's account not known, so it can't use this partition (lab allows lab) " * 2
    odd = slurm.Job("7", "COMPLETING", "", "1:00", "UNLIMITED", "1", None, "", "", None)
    text = view(plan, job("1234567", "PENDING", reason=reason), job("8", "RUNNING", wildcards="x" * 200), odd)
    assert "7        (not of Snakemake)" in text and "x" * 30 in text
    assert "SLURM jobs of this folder: 3\n" in text


def test_status_without_squeue_comes_from_the_files(plan):
    text = view(plan, trouble="squeue: Unable to contact slurm controller (connect failure) " * 3)
    assert "stage1  not started" in text
    assert "SLURM jobs of this folder: unknown\n  squeue: Unable to contact" in text


# ---------------------------------------------------------------- squeue
ANSWER = (  # in the format of SLURM 22.05
    "2|PENDING|0:00|UNLIMITED|1|N/A|Nodes required for job are DOWN, DRAINED|{here}|rule_all\n"
    "5|PENDING|0:00|UNLIMITED|1|N/A|JobHeldUser|/elsewhere|rule_all\n"
    "3|PENDING|0:00|4:00:00|2|2026-11-25T04:31:58|JobHeldUser|{here}|two\n"
    "lines\n"
    "1|RUNNING|1-02:00:02|4-00:00:00|16|2026-11-24T00:10:00|None|{here}|"
    "rule_train_wildcards_sd-v2-base_stage2_a|b\n"
    "4|COMPLETING|0:05|UNLIMITED|1|2026-11-25T00:32:00|None|{here}|(null)\n"
)


def answer(here: Path) -> str:
    """Return ANSWER in squeue's format, in which the last field may contain separators."""
    rows = [slurm.SEPARATOR.join(line.split("|", 8)) for line in ANSWER.format(here=here).splitlines()]
    return "\n".join(rows) + "\n"


def test_squeue_output_is_parsed(tmp_path):
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    waits, odd, trains, ends = slurm.parse(answer(tmp_path), link)
    assert (waits.id, waits.rule, waits.wildcards, waits.started) == ("2", "all", "", None)
    assert waits.reason == "Nodes required for job are DOWN, DRAINED"
    assert waits.log == link / ".snakemake/slurm_logs/rule_all/2.log"
    assert (odd.id, odd.rule, odd.log, odd.limit, odd.nodes) == ("3", "", None, "4:00:00", "2")
    assert odd.started == datetime(2026, 11, 25, 4, 31, 58)
    assert (trains.state, trains.reason, trains.elapsed) == ("RUNNING", "", "1-02:00:02")
    assert (trains.rule, trains.wildcards) == ("train", "sd-v2-base_stage2_a|b")
    assert trains.log == link / ".snakemake/slurm_logs/rule_train/sd-v2-base_stage2_a|b/1.log"
    assert trains.started == datetime(2026, 11, 24, 0, 10)
    assert (ends.id, ends.state, ends.rule) == ("4", "COMPLETING", "")


def test_log_of_a_group_of_jobs_is_found(tmp_path):
    (tmp_path / ".snakemake/slurm_logs/group_all").mkdir(parents=True)
    assert slurm.parse(answer(tmp_path), tmp_path)[0].log == tmp_path / ".snakemake/slurm_logs/group_all/2.log"


def test_empty_and_malformed_squeue_output():
    assert slurm.parse("", Path()) == []
    with pytest.raises(slurm.SlurmError, match="expected the fields of a job, got '2 PENDING'"):
        slurm.parse("2 PENDING\n", Path())


def command(folder: Path, script: str) -> None:
    """Write a fake `squeue`."""
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """Return a folder that is the whole search path."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_without_slurm_there_are_no_jobs(path):
    assert slurm.jobs(path) == []


def test_squeue_ignores_variables_of_the_user(path, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "none")  # a user's setting that would hide jobs
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    (path / "answer").write_text(answer(path))
    command(path, f'[ -z "$SQUEUE_PARTITION$SLURM_TIME" ] && while read -r x; do echo "$x"; done <{path}/answer')
    assert [found.id for found in slurm.jobs(path)] == ["2", "3", "1", "4"]


def test_failing_squeue_is_an_error(path):
    command(path, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(slurm.SlurmError, match="^squeue: slurm_load_jobs error: Unable to contact.*`scontrol ping`"):
        slurm.jobs(path)


def test_hanging_squeue_is_an_error(path, monkeypatch):
    monkeypatch.setattr(slurm, "TIMEOUT", 0.3)
    command(path, "exec /bin/sleep 60")
    begin = time.monotonic()
    with pytest.raises(slurm.SlurmError, match="squeue: no answer in 0.3 s"):
        slurm.jobs(path)
    assert time.monotonic() - begin < 20


# ---------------------------------------------------------------- the command
def run(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow"), **more}
    call = [sys.executable, "-X", "importtime", str(ROOT / "workflow/scripts/status.py"), *arguments]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=60)


def test_the_command_needs_no_torch(tmp_path):
    write_log()
    result = run("run=demo", PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "stage2  stopped · 12,000 of 26,000 images (46 %)" in result.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert {"omegaconf", "sdtrain"} <= loaded
    assert not loaded & {"torch", "pyarrow", "snakemake", "diffusers"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=demos"], "error: configs/demos.yaml: no such file; did you mean configs/demo.yaml?"),
        ([], "error: missing run=…"),
        (["runs=demo"], "error: unknown key 'runs'; did you mean run?"),
    ],
)
def test_invalid_arguments_end_with_one_message(tmp_path, arguments, said):
    result = run(*arguments, PATH=str(tmp_path))
    assert result.returncode == 1 and not result.stdout
    assert said in result.stderr and "Traceback" not in result.stderr
