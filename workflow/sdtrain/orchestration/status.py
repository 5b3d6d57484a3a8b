"""The status of a run as text: data, components, progress and metrics of its stages, SLURM jobs."""

from __future__ import annotations

import os
import re
import socket
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sdtrain.errors import ConfigError
from sdtrain.io.files import FileError, is_locked, lock_owner, read_json
from sdtrain.io.logs import read_log
from sdtrain.orchestration import slurm
from sdtrain.orchestration.plan import Plan

WIDTH = 100  # characters of a line
QUIET = 600.0  # seconds; at least this long without a new log line before a training counts as stalled
RECENT = 5  # log entries whose median is the current speed
COLOURS = {"done": 32, "training": 32, "no progress": 31, "stopped": 31}  # by the first words of a state; else 33


def show(run: str) -> list[str]:
    """Return the lines that describe the run in the current folder. Raise ConfigError for a mistaken configuration."""
    plan = Plan(run, [], error=ConfigError)
    plan.load_run(run)  # report a mistake in it before waiting for squeue
    try:
        return describe(plan, slurm.jobs(Path()), "", time.time())
    except slurm.SlurmError as error:
        return describe(plan, [], str(error), time.time())


def describe(plan: Plan, jobs: list[slurm.Job], problem: str, now: float) -> list[str]:
    """Return the lines. `problem` says why the jobs are unknown; `now` is in seconds since 1970."""
    lines = [f"run {plan.run} · {date(now)}", ""]
    lines += ["data", *describe_data(plan), "components", *describe_components(plan)]
    for name in plan.load_run(plan.run).stages:
        lines += ["", *describe_stage(read_stage(plan, name, jobs), now)]
    lines += ["", f"SLURM jobs of this folder: {'unknown' if problem else len(jobs) or 'none'}"]
    lines += [f"  {line}" for line in textwrap.wrap(problem, WIDTH - 2)]
    return lines + describe_jobs(jobs)


# ---------------------------------------------------------------- data and components
def describe_data(plan: Plan) -> list[str]:
    """Return one line per manifest that the run needs."""
    rows = []
    for path in plan.manifests():
        manifest, name = read_record(Path(path)), path.removeprefix("results/data/").removesuffix("/manifest.json")
        if manifest is None:
            rows.append([name, f"missing{built_partitions(plan, path)}"])
        elif isinstance(manifest.get("shards"), list):
            rows.append([name, f"samples: {number_in(manifest, 'samples'):,}, shards: {len(manifest['shards']):,}"])
        else:
            rows.append([name, "unreadable"])
    return table(rows, "  ") or ["  none that the workflow makes"]


def built_partitions(plan: Plan, path: str) -> str:
    """Return how many shard partitions of a manifest are finished, as the end of a sentence."""
    split = re.fullmatch(r"results/data/([^/]+)/(train|held_out)/shards/manifest.json", path)
    if not split:
        return ""
    partitions = plan.parts(SimpleNamespace(dataset=split[1], split=split[2]))
    return f", {sum(map(os.path.exists, partitions)):,} of {len(partitions):,} partitions finished"


def describe_components(plan: Plan) -> list[str]:
    """Return the names of the components that are present, and of those that are missing."""
    found: dict[str, list[str]] = {"present": [], "missing": []}
    for name in plan.components():
        found["present" if os.path.exists(f"resources/components/{name}.json") else "missing"].append(name)
    return table([[word, ", ".join(names)] for word, names in found.items() if names], "  ")


# ---------------------------------------------------------------- the files of a stage
@dataclass
class Stage:
    """The files of a stage and its SLURM jobs. Times are in seconds since 1970."""

    name: str
    folder: Path
    milestones: list[int]
    metrics: list[str]  # names of their records
    log: list[dict[str, Any]]  # its entries
    log_time: float | None  # of its last line
    owner: str  # of the folder's lock
    locked: bool | None  # whether a trainer holds it; None: unknown from this host
    lock_time: float  # when it was acquired
    checkpoint: tuple[float, int] | None  # the newest: its time and its number of images
    jobs: list[slurm.Job]  # that train this stage

    def records(self, name: str) -> dict[int, dict[str, Any] | None]:
        """Return the records of one name by milestone."""
        return {m: read_record(self.folder / str(m) / f"{name}.json") for m in self.milestones}

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The records of the trained milestones, in order."""
        return [record for record in self.records("train").values() if record is not None]

    @property
    def done(self) -> bool:
        """Whether the last milestone is trained."""
        return self.records("train")[self.milestones[-1]] is not None

    @property
    def images(self) -> int:
        """The number of images seen."""
        if self.log and not self.done:
            return self.log[-1]["images"]
        return max((number_in(record, "images") for record in self.trained), default=0)

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The last log entries with a speed."""
        return [entry for entry in self.log if entry.get("images_per_second", 0) > 0][-RECENT:]

    @property
    def speed(self) -> float:
        """The current speed in images per second; 0 if unknown."""
        return statistics.median([entry["images_per_second"] for entry in self.measured] or [0.0])

    @property
    def patience(self) -> float:
        """The seconds without a new log line after which the training counts as stalled."""
        if len(self.measured) < 2:
            return QUIET
        return max(QUIET, 3 * (self.measured[-1]["images"] - self.measured[-2]["images"]) / self.speed)


def read_stage(plan: Plan, name: str, jobs: list[slurm.Job]) -> Stage:
    """Read the files of a stage; a missing file is no error."""
    folder, wildcards = Path("results/runs", plan.run, name), re.compile(re.escape(f"{plan.run}_{name}_") + r"\d+")
    lock, log = folder / ".lock", folder / "log.jsonl"
    owner, locked, log_time = lock_owner(lock), is_locked(lock), modified(log)
    if locked is False and owner and f"on {socket.gethostname()}," not in owner:
        locked = None  # some shared file systems show a lock to the host that holds it only
    return Stage(
        name,
        folder,
        plan.milestones(plan.run, name),
        plan.metrics(plan.run),
        read_log(log) if log_time else [],
        log_time,
        owner,
        locked,
        modified(lock) or 0.0,
        newest_checkpoint(folder / "checkpoints"),
        [job for job in jobs if job.rule == "train" and wildcards.fullmatch(job.wildcards)],
    )


def newest_checkpoint(folder: Path) -> tuple[float, int] | None:
    """Return the time and the number of images of the newest complete checkpoint."""
    marks = [mark for mark in folder.glob("*/*/.metadata") if mark.parent.name.isdecimal()]
    return max(((modified(mark) or 0.0, int(mark.parent.name)) for mark in marks), default=None)


def modified(path: Path) -> float | None:
    """Return when a file was last written, None if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a JSON object: None if the file does not exist, an empty one if it is unreadable."""
    try:
        found = read_json(path) if path.exists() else None
    except FileError:
        return {}
    return found if isinstance(found, dict | None) else {}


def number_in(record: dict[str, Any] | None, key: str) -> int:
    """Return a whole number of a record, 0 if it is missing."""
    value = (record or {}).get(key)
    return value if isinstance(value, int) else 0


# ---------------------------------------------------------------- the state of a stage
def state_of(stage: Stage, now: float) -> str:
    """Return the state in a few words; exactly `training` if the training makes progress."""
    if stage.done:
        return "done"
    running = next((job for job in stage.jobs if job.state == "RUNNING"), None)
    if stage.locked or running:
        return _running_state(stage, running, now)
    if stage.jobs:
        return f"waiting: SLURM job {stage.jobs[0].id}, {cut(stage.jobs[0].reason or stage.jobs[0].state, 50)}"
    if (stage.folder / "requeue").exists():
        return "stopped, waiting for a requeue"
    if not stage.log_time and not stage.trained and not stage.checkpoint:
        return "not started"
    if stage.trained and number_in(stage.trained[-1], "images") == stage.images:
        return "waiting for its next milestone"
    recent = now - (stage.log_time or 0.0) <= stage.patience
    return "training" if recent and stage.locked is None else "stopped"


def _running_state(stage: Stage, job: slurm.Job | None, now: float) -> str:
    begin = stage.lock_time if stage.locked else job.started.timestamp() if job and job.started else 0.0
    quiet = now - max(stage.log_time or 0.0, begin)
    if quiet > stage.patience:
        return f"no progress for {duration(quiet)} ({f'SLURM job {job.id}' if job else 'its process'} is alive)"
    return "training" if (stage.log_time or 0.0) >= begin else "starting"


def describe_stage(stage: Stage, now: float) -> list[str]:
    """Return progress, speed, expected end, problems, and the table of milestones."""
    state, total, measured = state_of(stage, now), stage.milestones[-1], stage.measured
    facts = [state, f"{stage.images:,} of {total:,} images ({min(100, 100 * stage.images // max(1, total))} %)"]
    if measured:
        each, loss = (measured[-1].get(key) for key in ("images_per_second_per_gpu", "loss"))
        share = each / measured[-1]["images_per_second"] if isinstance(each, int | float) else 1
        facts.append(f"{stage.speed:,.1f} img/s ({share * stage.speed:,.1f} per GPU)")
        facts += [f"loss {loss:.4g}"] if isinstance(loss, int | float) else []
    if state == "training" and measured:
        left = min(1e10, max(0, total - stage.images) / stage.speed)  # datetime supports years of four digits
        facts.append(f"expected end {date(now + left, 'minutes')} (in {duration(left)})")
    facts += [f"last line {duration(now - stage.log_time)} ago"] if stage.log_time else []
    facts += _trainer_facts(stage, state, now) if state != "done" else []
    head = f"{stage.name}  "
    first, *others = wrap(head, [*facts, *_problems(stage)])
    return [head + coloured(state) + first[len(head + state) :], *others, *describe_milestones(stage)]


def _trainer_facts(stage: Stage, state: str, now: float) -> list[str]:
    """Return the last checkpoint, and who trains or where the log of a stopped training is."""
    facts = []
    if stage.checkpoint:
        facts.append(f"checkpoint at {stage.checkpoint[1]:,} images, {duration(now - stage.checkpoint[0])} old")
    if stage.locked:
        facts.append(cut(stage.owner, 80) or "trained by an unknown process")
    milestone = next(m for m, record in stage.records("train").items() if record is None)
    log = Path("logs", *stage.folder.parts[1:], str(milestone), "train.log")
    return [*facts, str(log)] if state.startswith("stopped") and log.exists() else facts


def _problems(stage: Stage) -> list[str]:
    """Return the counts, where not 0, of skipped steps, rollbacks and lost samples (known at milestones only)."""
    events = [str(entry.get("event")) for entry in stage.log]
    counts = {
        "steps skipped": sum(event.startswith("skipped") for event in events),
        "rollbacks": sum(event.startswith("rolled back") for event in events),
        "samples lost": max((number_in(record, "lost") for record in stage.trained), default=0),
    }
    return [f"{name}: {number:,}" for name, number in counts.items() if number]


def describe_milestones(stage: Stage) -> list[str]:
    """Return the table of milestones: whether each is trained, its samples, its metrics."""
    trained, samples = stage.records("train"), stage.records("samples")
    columns = [
        ["images", *(f"{m:,}" for m in stage.milestones)],
        ["trained", *("-" if trained[m] is None else "yes" for m in stage.milestones)],
        ["samples", *(value_text(samples[m], "images", ",d") for m in stage.milestones)],
    ]
    for name in stage.metrics:
        records = stage.records(name)
        titles = [str(record["metric"]) for record in records.values() if record and "metric" in record]
        title = cut(titles[-1].partition(" (")[0], 30) if titles else name.replace("_", " ")  # without its network
        columns.append([title, *(value_text(records[m], "value", ",.1f") for m in stage.milestones)])
    return table([list(row) for row in zip(*columns, strict=True)], "    ", str.rjust)


def value_text(record: dict[str, Any] | None, key: str, form: str) -> str:
    """Return a number of a record as text: `-` without a record, `?` if the record lacks it."""
    try:
        return "-" if record is None else format(record.get(key), form)
    except (TypeError, ValueError):
        return "?"


# ---------------------------------------------------------------- SLURM jobs
def describe_jobs(jobs: list[slurm.Job]) -> list[str]:
    """Return two lines per job; the second says why the job waits, or where its log is."""
    rows = [["", "id", "job", "state", "elapsed / limit", "nodes"]] if jobs else []
    for job in jobs:
        name = " ".join(word for word in (job.rule, job.wildcards) if word) or "(not of Snakemake)"
        rows.append(["", job.id, cut(name, 40), job.state, f"{job.elapsed} / {job.limit}", job.nodes])
    lines = table(rows, "")
    shown = lines[:1]
    for line, job in zip(lines[1:], jobs, strict=True):
        waits = job.state == "PENDING"
        start = f"start expected {job.started:%Y-%m-%d %H:%M}" if waits and job.started else ""
        notes = [note for note in (cut(job.reason, WIDTH - 6), start, "" if waits else str(job.log or "")) if note]
        shown += [line, *(wrap("      ", notes) if notes else [])]
    return shown


# ---------------------------------------------------------------- text
def table(rows: list[list[str]], indent: str, pad: Callable[[str, int], str] = str.ljust) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [(indent + "  ".join(map(pad, row, widths))).rstrip() for row in rows]


def wrap(head: str, parts: list[str]) -> list[str]:
    """Join parts by ` · ` to lines of at most WIDTH characters; a longer part is a line of its own."""
    lines = [head + parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} · {part}"
        lines[-1:] = [longer] if len(longer) <= WIDTH else [lines[-1], " " * len(head) + part]
    return lines


def cut(text: str, width: int) -> str:
    """Shorten a text to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"


def duration(seconds: float) -> str:
    """Return a duration such as 45 s, 25 min, 2 h 10 min, 3 d 4 h."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def date(seconds: float, precision: str = "seconds") -> str:
    """Return a local date and time."""
    return datetime.fromtimestamp(seconds).isoformat(" ", precision)


def coloured(state: str) -> str:
    """Return the state in its colour if the output is a terminal."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return state
    number = next((number for words, number in COLOURS.items() if state.startswith(words)), 33)
    return f"\033[{number}m{state}\033[0m"
