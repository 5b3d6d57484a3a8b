"""SLURM jobs of a folder, read from squeue, and the reasons of failed jobs. Without SLURM there are no jobs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sdtrain.errors import SDTrainError

TIMEOUT = 30  # seconds that squeue may take
SEPARATOR = "\x1f"  # reasons and comments contain commas, spaces and quotes
FORMAT = SEPARATOR.join(("%i", "%T", "%M", "%l", "%D", "%S", "%r", "%Z", "%k"))


class SlurmError(SDTrainError):
    """squeue failed or did not answer; the message contains its output."""


@dataclass(frozen=True)
class Job:
    """A SLURM job that has not ended. Snakemake's plugin writes rule and wildcards into the job's comment."""

    id: str
    state: str  # SLURM's name: PENDING, CONFIGURING, RUNNING, COMPLETING, …
    reason: str  # why the job is pending, or an empty text
    elapsed: str  # [days-][hours:]minutes:seconds
    limit: str  # in the same form
    nodes: str  # number of nodes
    started: datetime | None  # for a pending job, the start that SLURM expects
    rule: str  # or {group}_{rule}; empty for a job that Snakemake did not submit
    wildcards: str  # their values, joined by _
    log: Path | None  # the plugin's log, which exists once the job has started


def jobs(folder: str | Path) -> list[Job]:
    """Return the current user's unfinished jobs whose working folder is `folder`.

    Raise SlurmError if squeue fails, or does not answer within TIMEOUT seconds.
    """
    if not shutil.which("squeue"):
        return []
    # --all includes jobs of hidden partitions; without --states, squeue lists unfinished jobs only
    command = ["squeue", "--me", "--all", "--noheader", f"--format={FORMAT}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
    environment["SLURM_TIME_FORMAT"] = "standard"
    remedy = "check with `scontrol ping` whether the cluster is up"
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"squeue: no answer in {TIMEOUT} s; {remedy}") from None
    except OSError as error:
        raise SlurmError(f"squeue: {error}") from None
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"squeue: {message}; {remedy}")
    return parse(done.stdout, Path(folder))


def parse(text: str, folder: Path) -> list[Job]:
    """Return the jobs of `folder` from squeue's output in FORMAT. Raise SlurmError for output in another format."""
    rows, separators = [], FORMAT.count(SEPARATOR)
    for line in text.removesuffix("\n").split("\n") if text else []:
        cells = line.split(SEPARATOR, separators)
        if len(cells) > separators:
            rows.append(cells)
        elif not rows:  # a later line without separators continues a job's comment
            raise SlurmError(f"squeue: expected the fields of a job, got {line!r}")
    here = os.path.realpath(folder)
    return [_job(cells, folder) for cells in rows if os.path.realpath(cells[-2]) == here]


def _job(cells: list[str], folder: Path) -> Job:
    number, state, elapsed, limit, nodes, start, reason, _, comment = cells
    reason = "" if reason == "None" else reason
    rule, wildcards, log = "", "", None
    if comment.startswith("rule_"):  # rule_{rule}[_wildcards_{wildcards}], for a group too
        rule, _, wildcards = comment.removeprefix("rule_").partition("_wildcards_")
        logs = folder / ".snakemake/slurm_logs"
        kind = "group" if (logs / f"group_{rule}").is_dir() else "rule"  # the folder exists before the job starts
        log = logs / f"{kind}_{rule}" / wildcards / f"{number}.log"
    started = None
    with contextlib.suppress(ValueError):  # N/A
        started = datetime.fromisoformat(start)
    return Job(number, state, reason, elapsed, limit, nodes, started, rule, wildcards, log)


def wait_for_jobs(folder: str | Path, say: Callable[[str], None] = print, seconds: float = 15.0) -> None:
    """Wait for the jobs that a killed Snakemake invocation left in `folder`, polling every `seconds`.

    Snakemake does not know these jobs and would submit their work again. Raise SlurmError as `jobs` does.
    """
    reported = None
    while left := [job for job in jobs(folder) if job.rule]:
        names = ", ".join(f"{job.id} ({job.rule} {job.wildcards}: {job.state})" for job in left)
        if names != reported:
            say(f"waiting for SLURM jobs of an earlier invocation: {names}; `scancel` ends one, its checkpoints stay")
        reported = names
        time.sleep(seconds)


def reasons(snakemake_log: str, most: int = 5) -> list[str]:
    """Return for each failed job in Snakemake's log: rule, job id, log file, and at most `most` lines of SLURM's own.

    Snakemake shows the log of the rule, which lacks SLURM's messages: out of memory, time limit, lost node.
    """
    lines = []
    for path in map(Path, dict.fromkeys(re.findall(r"(\S+/slurm_logs/\S+\.log) \(check log", snakemake_log))):
        if path.exists():
            pattern = r"^(?:slurmstepd|srun|scontrol|error: |rank \d+ ends).*"
            messages = dict.fromkeys(re.findall(pattern, path.read_text(errors="replace"), re.MULTILINE))
            rule = path.parts[path.parts.index("slurm_logs") + 1].replace("_", " ", 1)
            lines.append(f"{rule}, SLURM job {path.stem}, {path}:")
            lines += [f"  {message}" for message in [*messages][:most]]
    return lines
