"""Trainings by the real command, or by processes that share one import of torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from checkout import ROOT

SCRIPTS = ROOT / "workflow/scripts"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# Imports train.py once; each line on its input, {"arguments", "ranks", "folder", "log"}, becomes processes that run it.
FORKS = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import train, diffusers, transformers
diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel, transformers.CLIPTokenizer

def become(job, rank):
    signal.alarm(100)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(job["folder"])
    if job["ranks"] > 1:
        port = str(20000 + os.getppid() % 20000)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    train.main(["train.py", *job["arguments"]])

for line in sys.stdin:
    job, children = json.loads(line), []
    for rank in range(job["ranks"]):
        child = os.fork()
        if not child:
            code = 1
            try:
                become(job, rank)
                code = 0
            except SystemExit as end:
                print(end.code, file=sys.stderr)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@dataclass
class Result:
    """How the processes of one training ended, and all that they said."""

    codes: list[int]
    text: str


def environment(**more: str) -> dict[str, str]:
    """One thread a process, no GPU, no wandb, nothing from the network; the library on the path."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return os.environ | fixed | {"PYTHONPATH": str(ROOT / "workflow")} | more


@contextlib.contextmanager
def trainer(log: Path):
    """A function run(folder, *arguments, ranks=1) that runs train.py in `folder` to its end."""
    command = [sys.executable, "-c", FORKS, str(SCRIPTS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as server:

        def run(folder: Path, *arguments: str, ranks: int = 1) -> Result:
            log.unlink(missing_ok=True)
            job = {"arguments": arguments, "ranks": ranks, "folder": str(folder), "log": str(log)}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            return Result(json.loads(server.stdout.readline()), log.read_text())

        yield run


def kill_all(process: subprocess.Popen) -> None:
    """kill -9 of a launcher and of all that it started."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)
