"""Use the test cluster: working copies, Snakemake invocations that submit jobs, and tables of these jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from checkout import ROOT
from trainings import environment, kill_all

from sdtrain.orchestration import slurm

FILES = Path("/var/tmp/sd-training-slurm")  # $DIR of cluster.sh
NODES = 16
POLLING = [sys.executable, str(Path(__file__).with_name("fast_snakemake.py"))]
UNCHANGED = ["snakemake"]


def command(*words: str | Path, folder: Path | None = None, check: bool = True) -> str:
    """Run a command and return its output. Assert that it succeeds, unless `check` is false."""
    done = subprocess.run(
        [*map(str, words)], cwd=folder, env=surroundings(), text=True, capture_output=True, timeout=60
    )
    assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def surroundings(first: Path | None = None) -> dict[str, str]:
    """Return the environment of a user, without network: the project's tools come first on the path, after `first`."""
    tools = os.pathsep.join(map(str, [*([first] if first else []), Path(sys.executable).parent, os.environ["PATH"]]))
    return environment(PATH=tools, WANDB_MODE="offline")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120, said: Callable[[], str] = str):
    """Wait until the condition is true and return its value. Fail after `seconds`, with the output `said()`."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}\n{said()}"
        time.sleep(0.2)
    return answer


# ---------------------------------------------------------------- Snakemake invocations
@dataclass
class Call:
    """A Snakemake invocation that runs or has ended."""

    folder: Path
    process: subprocess.Popen
    output: Path

    def said(self) -> str:
        """Return its output so far."""
        return self.output.read_text(errors="replace")

    def succeeds(self, seconds: float = 280) -> str:
        """Wait for its end and assert success; return its output."""
        assert self.ends(seconds) == 0, self.said()
        return self.said()

    def ends(self, seconds: float = 280) -> int:
        """Wait for its end; return its exit code."""
        wait_for(lambda: self.process.poll() is not None, f"the end of {self.process.args}", seconds, self.said)
        return self.process.returncode


@contextmanager
def snakemake(
    folder: Path, *arguments: str, program: list[str] = POLLING, profile: str = "slurm", first: Path | None = None
) -> Iterator[Call]:
    """Run `snakemake --profile slurm ARGUMENTS` in a folder; at the end of the context, kill its processes and jobs."""
    output = folder / f"output-{time.monotonic_ns()}.txt"
    with open(output, "w") as file:
        words = [*program, "--profile", profile, *arguments]
        process = subprocess.Popen(words, cwd=folder, env=surroundings(first), stdout=file, stderr=file)
    try:
        yield Call(folder, process, output)
    finally:
        kill_all(process)
        for job in slurm.jobs(folder) if process.returncode else ():
            command("scancel", job.id, check=False)


# ---------------------------------------------------------------- jobs
@dataclass(frozen=True)
class Ended:
    """A job that has ended, as recorded in the controller's table."""

    id: str
    state: str
    submitted: datetime
    start: datetime
    end: datetime
    nodes: int


def ended(folder: Path, rule: str = "") -> list[Ended]:
    """Return the ended jobs of a folder, or those of one rule, in the order of their numbers."""
    logs = {path.stem for path in folder.glob(f".snakemake/slurm_logs/*_{rule}/**/*.log")} if rule else set()
    rows = []
    for line in (FILES / "log/jobs.txt").read_text().splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if facts["WorkDir"] == str(folder) and (not rule or facts["JobId"] in logs):
            times = [datetime.fromisoformat(facts[name]) for name in ("SubmitTime", "StartTime", "EndTime")]
            rows.append(Ended(facts["JobId"], facts["JobState"], *times, int(facts["NodeCnt"])))
    return sorted(rows, key=lambda row: int(row.id))


def overlap(a: Ended, b: Ended) -> float:
    """Return the seconds in which both jobs ran."""
    return (min(a.end, b.end) - max(a.start, b.start)).total_seconds()


def running(folder: Path, run: str, rule: str = "train") -> list[slurm.Job]:
    """Return the jobs of one rule and run that have not ended."""
    return [job for job in slurm.jobs(folder) if job.rule == rule and f"{run}_" in job.wildcards]


def start_now(job: str) -> None:
    """Let a requeued job start without the two minutes that SLURM holds it."""
    wait_for(lambda: state(job) == "PENDING", f"job {job} back in the queue", 60, lambda: state(job))
    time.sleep(3)  # a node refuses a job that ended on it in the same second
    command("scontrol", "update", f"jobid={job}", "starttime=now")


def state(job: str) -> str:
    """Return the state of a job, or an empty text if SLURM no longer knows it."""
    return command("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}", check=False).strip()


def nodes_of(job: str) -> str:
    """Return the nodes of a running job in SLURM's notation: n[1-2]."""
    return command("squeue", "--noheader", "--format=%N", f"--jobs={job}").strip()


def log_of(folder: Path, rule: str) -> str:
    """Return the joined SLURM logs of the jobs of one rule."""
    logs = sorted(folder.glob(f".snakemake/slurm_logs/*_{rule}/**/*.log"), key=lambda path: int(path.stem))
    return "".join(path.read_text(errors="replace") for path in logs)


def start_node(name: str) -> None:
    """Start a node's slurmd again, and wait until the node can be used."""
    subprocess.Popen([Path(__file__).with_name("cluster.sh"), "node", name.removeprefix("n")]).wait(30)
    wait_for(lambda: command("sinfo", "-h", "-n", name, "-o", "%T").split()[0] == "idle", f"{name} to be up", 90)


@contextmanager
def urgent_job(*options: str) -> Iterator[str]:
    """Run a job of higher priority on whole nodes until the end of the context; yield its number."""
    words = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", *options]
    job = command(*words, "--wrap", "sleep 600", folder=FILES).split()[-1]
    try:
        wait_for(lambda: state(job) == "RUNNING", "nodes for the urgent job", 60)
        yield job
    finally:
        command("scancel", job, check=False)


# ---------------------------------------------------------------- working copies
def executable(path: Path, text: str) -> None:
    """Write an executable file."""
    path.write_text(text)
    path.chmod(0o755)


def own_profile(folder: Path) -> None:
    """Give a working copy its own profile: the shipped one, with resources that fit the test cluster."""
    (folder / "profiles").unlink()
    (folder / "slurm").unlink()
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    (folder / "slurm").symlink_to("profiles/slurm")
    edit_profile(folder, **{"slurm-keep-successful-logs": True, "latency-wait": 10, "max-jobs-per-timespan": "100/1s"})
    few = {"tasks_per_node": 2, "cpus_per_task": 1, "gres": "'gpu:2'", "mem_mb": 4000}
    edit_resources(folder, train={"nodes": 2, **few}, precompute_latents=few, build_shards={"mem_mb": 4000})
    edit_profile(folder, **{"set-threads": {"build_shards": 2}})


def edit_profile(folder: Path, profile: str = "slurm", **values) -> None:
    """Write top-level keys of a working copy's profile."""
    path = folder / profile / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def edit_resources(folder: Path, profile: str = "slurm", **rules: dict) -> None:
    """Write resources of rules in a working copy's profile."""
    resources = yaml.safe_load((folder / profile / "config.yaml").read_text())["set-resources"]
    for rule, values in rules.items():
        resources[rule] = resources.get(rule, {}) | values
    edit_profile(folder, profile, **{"set-resources": resources})


def copy_profile(folder: Path, name: str, of: Path | None = None) -> str:
    """Copy `profiles/slurm`, or the profile `of`, to `profiles/NAME`; return that path."""
    shutil.copytree(of or folder / "profiles/slurm", folder / "profiles" / name)
    return f"profiles/{name}"
