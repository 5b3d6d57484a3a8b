"""Show how a run stands: data, stages, progress, measurements, SLURM jobs. It reads files and asks squeue, no more.

run= names a configuration: configs/{run}.yaml.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import statistics
import struct
import sys
import textwrap
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

from sdtrain.config.cli import command_line
from sdtrain.errors import ConfigError
from sdtrain.io.logs import read_log_line
from sdtrain.orchestration import slurm
from sdtrain.orchestration.plan import Plan

WIDTH = 100
QUIET = 600.0  # seconds: a log without a new line for longer is worth a look
RECENT = 5  # of a log's last measurements, whose median is the present speed
COLOURS = {"done": 32, "training": 32, "no progress": 31, "stopped": 31}  # by the first words of a state; others 33


def main(argv: list[str]) -> None:
    """Run the command."""
    _, own = command_line(argv, None, __doc__, run=None)
    plan = Plan(own["run"], [], error=ConfigError)
    try:
        plan.load_run(plan.run)  # a mistake in it is told before squeue is waited for
        lines = view(plan, *ask_slurm(), time.time())
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    print("\n".join(lines))


def ask_slurm() -> tuple[list[slurm.Job], str]:
    """The jobs of this folder, and why they are not known; then the files tell the rest."""
    try:
        return slurm.jobs(Path()), ""
    except slurm.SlurmError as error:
        return [], str(error)


def view(plan: Plan, jobs: list[slurm.Job], trouble: str, now: float) -> list[str]:
    """The lines to print: `trouble` is why the jobs are not known, `now` in seconds since 1970.

    Raises ConfigError for a mistaken configuration.
    """
    lines = [f"run {plan.run} · {moment(now)}", "", "data", *show_data(plan), "components", *show_components(plan)]
    for name in plan.load_run(plan.run).stages:
        lines += ["", *show_stage(read_stage(plan, name, jobs), now)]
    known = "unknown" if trouble else len(jobs) or "none"
    indented = {"initial_indent": "  ", "subsequent_indent": "  "}
    return [
        *lines,
        "",
        f"SLURM jobs of this folder: {known}",
        *textwrap.wrap(trouble, WIDTH, **indented),
        *show_jobs(jobs),
    ]


def read(path: str | Path) -> dict | None:
    """The object in a JSON file; None where there is no file, an empty one where it cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- data and components
def show_data(plan: Plan) -> list[str]:
    """A line a manifest that the run needs."""
    rows = []
    for path in plan.manifests():
        manifest, name = read(path), path.removeprefix("results/data/").removesuffix("/manifest.json")
        if manifest is None:
            rows.append([name, f"missing{built(plan, path)}"])
        elif isinstance(manifest.get("shards"), list):
            rows.append([name, f"samples: {count(manifest, 'samples'):,}, shards: {len(manifest['shards']):,}"])
        else:
            rows.append([name, "unreadable"])
    return table(rows, "  ", str.ljust) or ["  none that the workflow makes"]


def built(plan: Plan, path: str) -> str:
    """How much there is of the parts that a manifest is gathered from."""
    split = re.fullmatch(r"results/data/([^/]+)/(train|held_out)/shards/manifest.json", path)
    if not split:
        return ""
    parts = plan.parts(SimpleNamespace(dataset=split[1], split=split[2]))
    return f", {sum(map(os.path.exists, parts)):,} of {len(parts):,} parts there"


def show_components(plan: Plan) -> list[str]:
    """The names of those that are there, and of those that are not."""
    run = plan.load_run(plan.run)
    named = {run.evaluation.features, run.evaluation.alignment} - {None, "fitted"}
    records = {f"resources/components/{name}.json" for name in named}
    for stage in run.stages:
        records |= {*plan.components_of(plan.load_stage(plan.run, stage).model)}
    if run.data and (text := plan.text_record(SimpleNamespace(dataset=run.data))):
        records.add(text)
    names = {True: [], False: []}
    for record in sorted(records):
        names[os.path.exists(record)].append(Path(record).stem)
    rows = [[word, ", ".join(names[there])] for word, there in (("there", True), ("missing", False)) if names[there]]
    return table(rows, "  ", str.ljust)


# ---------------------------------------------------------------- what a stage's files say
@dataclass
class Log:
    """The end of a training's log, and its events."""

    images: int = 0
    measured: list[dict] = field(default_factory=list)  # the last lines with a speed
    events: list[str] = field(default_factory=list)
    written: float | None = None  # seconds since 1970; a training that goes on writes it anew

    @property
    def rate(self) -> float:
        """Images a second."""
        return statistics.median(line["images_per_second"] for line in self.measured) if self.measured else 0.0

    @property
    def patience(self) -> float:
        """Seconds without a line that are nothing unusual."""
        if len(self.measured) < 2:
            return QUIET
        step = self.measured[-1]["images"] - self.measured[-2]["images"]
        return max(QUIET, 3 * step / self.rate)


def read_log(path: Path) -> Log:
    """An empty one where there is no file. A line cut short, by a kill or as it is being written, does not count."""
    try:
        lines, written = path.read_text(encoding="utf-8", errors="replace").splitlines(), path.stat().st_mtime
    except OSError:
        return Log()
    last = [entry for entry in map(read_log_line, lines[-50:]) if entry]
    noted = [entry for line in lines if '"event"' in line and (entry := read_log_line(line))]
    speed = [e for e in last if isinstance(e.get("images_per_second"), int | float) and e["images_per_second"] > 0]
    events = [str(entry.get("event")) for entry in noted]
    return Log(last[-1]["images"] if last else 0, speed[-RECENT:], events, written)


@dataclass
class Trainer:
    """Who last took a stage's folder, and whether they hold it still; None where that cannot be seen from here."""

    about: str = ""
    since: float = 0.0  # seconds since 1970
    holds: bool | None = False


def read_lock(path: Path) -> Trainer:
    """The kernel is asked who holds the lock, which takes nothing from a trainer that wants it now.

    Some shared file systems show a lock to its own host only, so a free one says nothing of a trainer on another.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            about, since = " ".join(file.read().split()), os.fstat(file.fileno()).st_mtime
            question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock, as Linux lays it out
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except FileNotFoundError:
        return Trainer()
    except OSError:  # no right to read it, or a file system without locks
        return Trainer("unknown", 0.0, None)
    if struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK:
        return Trainer(about, since, True)
    return Trainer(about, since, False if f"on {socket.gethostname()}," in about else None)


@dataclass
class Stage:
    """What is known of one stage."""

    name: str
    folder: Path
    milestones: list[int]
    scored: bool
    log: Log
    trainer: Trainer
    checkpoint: tuple[float, int] | None  # when it was written, and its images
    jobs: list[slurm.Job]  # that train it

    def record(self, milestone: int, name: str) -> dict | None:
        """One of the records beside a milestone."""
        return read(self.folder / str(milestone) / f"{name}.json")

    @property
    def trained(self) -> list[dict]:
        """The records of the milestones that are trained, in order."""
        return [record for m in self.milestones if (record := self.record(m, "train")) is not None]

    @property
    def done(self) -> bool:
        """Whether it is trained to its end."""
        return self.record(self.milestones[-1], "train") is not None

    @property
    def images(self) -> int:
        """How many it has seen."""
        if self.done or self.log.written is None:
            return max((count(record, "images") for record in self.trained), default=0)
        return self.log.images


def read_stage(plan: Plan, name: str, jobs: list[slurm.Job]) -> Stage:
    """Look at everything of a stage that is there."""
    folder, own = Path("results/runs", plan.run, name), re.compile(re.escape(f"{plan.run}_{name}_") + r"\d+")
    return Stage(
        name,
        folder,
        plan.milestones(plan.run, name),
        scored=bool(plan.load_run(plan.run).evaluation.alignment),
        log=read_log(folder / "log.jsonl"),
        trainer=read_lock(folder / ".lock"),
        checkpoint=newest_checkpoint(folder / "checkpoints"),
        jobs=[job for job in jobs if job.rule == "train" and own.fullmatch(job.wildcards)],
    )


def newest_checkpoint(folder: Path) -> tuple[float, int] | None:
    """When the newest whole checkpoint was written, in seconds since 1970, and its images."""
    found = []
    for mark in folder.glob("*/*/.metadata"):
        try:
            found.append((mark.stat().st_mtime, int(mark.parent.name)))
        except (OSError, ValueError):  # deleted meanwhile, or not one of ours
            continue
    return max(found, default=None)


def count(record: dict | None, key: str) -> int:
    """A whole number of a record, 0 where it is not there."""
    value = (record or {}).get(key)
    return value if isinstance(value, int) else 0


# ---------------------------------------------------------------- the state of a stage
def state_of(stage: Stage, now: float) -> str:
    """A few words; `training` and nothing more where it gets on."""
    if stage.done:
        return "done"
    running = next((job for job in stage.jobs if job.state == "RUNNING"), None)
    written = stage.log.written or 0.0
    if stage.trainer.holds or running:
        begin = stage.trainer.since if stage.trainer.holds else running.started.timestamp() if running.started else 0.0
        quiet = now - max(written, begin)
        if quiet > stage.log.patience:
            return f"no progress for {span(quiet)} ({f'SLURM job {running.id}' if running else 'its process'} is alive)"
        return "training" if written >= begin else "starting"
    if stage.jobs:
        return f"waiting: SLURM job {stage.jobs[0].id}, {short(stage.jobs[0].reason or stage.jobs[0].state, 50)}"
    if (stage.folder / "requeue").exists():
        return "stopped, asks to be started again"
    if stage.log.written is None and not stage.trained and not stage.checkpoint:
        return "not started"
    if stage.trained and count(stage.trained[-1], "images") == stage.images:
        return "waiting for its next milestone"
    young = now - written <= stage.log.patience
    return "training" if young and stage.trainer.holds is None else "stopped"


def show_stage(stage: Stage, now: float) -> list[str]:
    """Progress, speed, end, what went wrong, and the milestones."""
    state, total, measured = state_of(stage, now), stage.milestones[-1], stage.log.measured
    percent = min(100, 100 * stage.images // max(1, total))
    facts = [state, f"{stage.images:,} of {total:,} images ({percent} %)"]
    if measured:
        each, loss = (measured[-1].get(key) for key in ("images_per_second_per_gpu", "loss"))
        share = each / measured[-1]["images_per_second"] if isinstance(each, int | float) else 1
        facts.append(f"{stage.log.rate:,.1f} img/s ({share * stage.log.rate:,.1f} a GPU)")
        facts += [f"loss {loss:.4g}"] if isinstance(loss, int | float) else []
    if state == "training" and measured:
        left = min(1e10, max(0, total - stage.images) / stage.log.rate)  # a date has four digits for the year
        facts.append(f"expected end {moment(now + left, 'minutes')} (in {span(left)})")
    facts += [f"last line {span(now - stage.log.written)} ago"] if stage.log.written else []
    facts += about_trainer(stage, state, now) if state != "done" else []
    head = f"{stage.name}  "
    first, *others = flow(head, [*facts, *mishaps(stage)])
    return [head + paint(state) + first[len(head + state) :], *others, *show_milestones(stage)]


def paint(state: str) -> str:
    """The state in a colour of its own, on a terminal."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return state
    number = next((number for words, number in COLOURS.items() if state.startswith(words)), 33)
    return f"\033[{number}m{state}\033[0m"


def about_trainer(stage: Stage, state: str, now: float) -> list[str]:
    """Who trains, or where to read why nobody does; and the checkpoint that a new start goes on from."""
    facts = []
    if stage.checkpoint:
        written, images = stage.checkpoint
        facts.append(f"checkpoint at {images:,} images, {span(now - written)} old")
    if stage.trainer.holds:
        facts.append(short(stage.trainer.about, 80) or "an unknown process trains")
    log = Path("logs", *stage.folder.parts[1:], str(next_milestone(stage)), "train.log")
    if state.startswith("stopped") and log.exists():
        facts.append(str(log))
    return facts


def next_milestone(stage: Stage) -> int:
    """The one that is being trained, or that is next."""
    return next((m for m in stage.milestones if stage.record(m, "train") is None), stage.milestones[-1])


def mishaps(stage: Stage) -> list[str]:
    """What is not zero of skipped steps, rollbacks and lost samples; the last is known at milestones only."""
    counts = {
        "steps skipped": sum(event.startswith("skipped") for event in stage.log.events),
        "rollbacks": sum(event.startswith("rolled back") for event in stage.log.events),
        "samples lost": max((count(record, "lost") for record in stage.trained), default=0),
    }
    return [f"{name}: {number:,}" for name, number in counts.items() if number]


def show_milestones(stage: Stage) -> list[str]:
    """A table of them, as far as they are trained and measured."""
    distances = {m: stage.record(m, "frechet_distance") for m in stage.milestones}
    scores = {m: stage.record(m, "clip_score") for m in stage.milestones} if stage.scored else {}
    head = ["images", "trained", "samples", metric(distances, "distance")]
    rows = [head + ([metric(scores, "score")] if stage.scored else [])]
    for m in stage.milestones:
        trained, samples = stage.record(m, "train"), stage.record(m, "samples")
        row = [f"{m:,}", "-" if trained is None else "yes", value_of(samples, "images", ",d")]
        row += [value_of(records[m], "value", ",.1f") for records in (distances, scores) if records]
        rows.append(row)
    return table(rows, "    ", str.rjust)


def metric(records: dict[int, dict | None], otherwise: str) -> str:
    """The name of what was measured, without its network; before anything was, another."""
    names = [record["metric"] for record in records.values() if record and isinstance(record.get("metric"), str)]
    return short(names[-1].partition(" (")[0], 30) if names else otherwise


def value_of(record: dict | None, key: str, form: str) -> str:
    """A number of a record as text: - where there is no record, ? where it has none."""
    try:
        return "-" if record is None else format(record.get(key), form)
    except (TypeError, ValueError):
        return "?"


# ---------------------------------------------------------------- SLURM jobs
def show_jobs(jobs: list[slurm.Job]) -> list[str]:
    """Two lines a job: the second says why it waits, or where it writes."""
    rows = [["", "id", "job", "state", "elapsed / limit", "nodes"]] if jobs else []
    for job in jobs:
        name = " ".join(word for word in (job.rule, job.wildcards) if word) or "(not Snakemake's)"
        rows.append(["", job.id, short(name, 40), job.state, f"{job.elapsed} / {job.limit}", job.nodes])
    lines = table(rows, "", str.ljust)
    shown = lines[:1]
    for line, job in zip(lines[1:], jobs, strict=True):
        waits = job.state == "PENDING"
        start = f"start expected {job.started:%Y-%m-%d %H:%M}" if waits and job.started else ""
        notes = [note for note in (short(job.reason, WIDTH - 6), start, "" if waits else str(job.log or "")) if note]
        shown += [line, *(flow("      ", notes) if notes else [])]
    return shown


# ---------------------------------------------------------------- words
def table(rows: list[list[str]], indent: str, pad) -> list[str]:
    """Columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [(indent + "  ".join(map(pad, row, widths))).rstrip() for row in rows]


def flow(head: str, parts: list[str]) -> list[str]:
    """Parts one after the other on lines of WIDTH; only a part that is longer by itself passes it."""
    lines = [head + parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} · {part}"
        if len(longer) <= WIDTH:
            lines[-1] = longer
        else:
            lines.append(" " * len(head) + part)
    return lines


def short(text: str, width: int) -> str:
    """Cut to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"


def span(seconds: float) -> str:
    """45 s, 25 min, 2 h 10 min, 3 d 4 h."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def moment(seconds: float, precision: str = "seconds") -> str:
    """A time of day, here."""
    return datetime.fromtimestamp(seconds).isoformat(" ", precision)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no mistake
    main(sys.argv)
