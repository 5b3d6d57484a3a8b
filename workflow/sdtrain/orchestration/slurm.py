"""The SLURM jobs of a folder, as squeue tells them; nothing, at once, where there is no SLURM."""

from __future__ import annotations

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
SEPARATOR = "\x1f"  # reasons and comments hold commas, spaces and quotes
FORMAT = SEPARATOR.join(("%i", "%T", "%M", "%l", "%D", "%V", "%S", "%r", "%Z", "%k"))


class SlurmError(SDTrainError):
    """squeue is there and does not answer; the message says what it said."""


@dataclass(frozen=True)
class Job:
    """A job that has not ended. Of one that Snakemake's plugin submitted, its comment tells rule and wildcards."""

    id: str
    state: str  # as SLURM calls it: PENDING, CONFIGURING, RUNNING, COMPLETING, …
    reason: str  # why it waits; empty where it does not
    elapsed: str  # [days-][hours:]minutes:seconds, as is its limit
    limit: str
    nodes: str  # how many
    submitted: datetime | None
    started: datetime | None  # of one that waits, when SLURM expects it to start
    rule: str  # or {group}_{rule}; empty for a job that Snakemake did not submit
    wildcards: str  # their values, joined by _
    log: Path | None  # the plugin's; it comes with the start


def jobs(folder: str | Path) -> list[Job]:
    """The present user's jobs whose working folder is `folder` and that have not ended.

    Raises SlurmError where squeue fails, or has not answered in TIMEOUT seconds.
    """
    if not shutil.which("squeue"):
        return []
    # without --all, jobs in a hidden partition are left out; without --states, those that have ended
    command = ["squeue", "--me", "--all", "--noheader", f"--format={FORMAT}"]
    own = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")} | {"SLURM_TIME_FORMAT": "standard"}
    options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": TIMEOUT, "env": own}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"squeue: no answer in {TIMEOUT} s; `scontrol ping` tells whether the cluster is up") from None
    except OSError as error:
        raise SlurmError(f"squeue: {error}") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"squeue: {said}; `scontrol ping` tells whether the cluster is up")
    return parse(done.stdout, Path(folder))


def wait_for_jobs(folder: str | Path, say: Callable[[str], None] = print, seconds: float = 15.0) -> None:
    """Wait for the jobs that a killed call of Snakemake left in `folder`, asking every so many seconds.

    Snakemake does not know them: it would submit their work a second time. Raises SlurmError as `jobs` does.
    """
    told = None
    while left := [job for job in jobs(folder) if job.rule]:
        names = ", ".join(f"{job.id} ({job.rule} {job.wildcards}: {job.state})" for job in left)
        if names != told:
            say(f"waiting for SLURM jobs of an earlier call: {names}; `scancel` ends one, what it has saved is kept")
        told = names
        time.sleep(seconds)


def reasons(said: str, most: int = 5) -> list[str]:
    """What SLURM wrote of the jobs that failed, by what Snakemake said of them: rule, job id and log, then its words.

    Snakemake shows the log of the rule, where SLURM's own lines are not: out of memory, out of time, a lost node.
    """
    lines = []
    for path in dict.fromkeys(re.findall(r"(\S+/slurm_logs/\S+\.log) \(check log", said)):
        if Path(path).exists():
            text = Path(path).read_text(errors="replace")
            words = dict.fromkeys(
                re.findall(r"^(?:slurmstepd|srun|scontrol|error: |rank \d+ ends).*", text, re.MULTILINE)
            )
            job, rule = Path(path).stem, Path(path).parts[Path(path).parts.index("slurm_logs") + 1]
            lines += [
                f"{rule.replace('_', ' ', 1)}, SLURM job {job}, {path}:",
                *[f"  {word}" for word in [*words][:most]],
            ]
    return lines


def parse(text: str, folder: Path) -> list[Job]:
    """The jobs of `folder` in squeue's answer to FORMAT. Raises SlurmError for an answer in another format."""
    rows, wide = [], FORMAT.count(SEPARATOR)
    for line in text.removesuffix("\n").split("\n") if text else []:
        cells = line.split(SEPARATOR, wide)
        if len(cells) > wide:
            rows.append(cells)
        elif not rows:  # else the next line of a comment
            raise SlurmError(f"squeue: a line that describes no job: {line!r}")
    here = os.path.realpath(folder)
    return [_job(cells, folder) for cells in rows if os.path.realpath(cells[-2]) == here]


def _job(cells: list[str], folder: Path) -> Job:
    number, state, elapsed, limit, nodes, submitted, started, reason, _, comment = cells
    reason = "" if reason == "None" else reason
    rule, wildcards, log = "", "", None
    if comment.startswith("rule_"):  # rule_{rule}[_wildcards_{wildcards}], of a group too
        rule, _, wildcards = comment.removeprefix("rule_").partition("_wildcards_")
        logs = folder / ".snakemake/slurm_logs"
        kind = "group" if (logs / f"group_{rule}").is_dir() else "rule"  # made ahead of the job
        log = logs / f"{kind}_{rule}" / wildcards / f"{number}.log"
    times = _time(submitted), _time(started)
    return Job(number, state, reason, elapsed, limit, nodes, *times, rule, wildcards, log)


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:  # N/A
        return None
