"""Run trainings by the command, or in processes that share one import of torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import torch.distributed.checkpoint as dcp
from checkout import ROOT
from safetensors.torch import load_file

SCRIPTS = ROOT / "workflow/scripts"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# Imports a script once; each line on its input, {"arguments", "ranks", "folder", "log"}, becomes processes that run it.
FORKS = """
import fnmatch, gc, importlib, json, os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
script = importlib.import_module(sys.argv[2])
import diffusers, transformers, torch.distributed.checkpoint, torch.distributed.fsdp
diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel, transformers.CLIPTokenizer

def pause_before(pattern):
    paused = []

    def pausing(change):
        def call(*paths, **options):
            if not paused and any(fnmatch.fnmatch(str(path), pattern) for path in paths):
                paused.append(pattern)
                os.kill(os.getpid(), signal.SIGSTOP)
            return change(*paths, **options)
        return call

    for name in ("replace", "rename", "unlink", "rmdir"):
        setattr(os, name, pausing(getattr(os, name)))

def become(job, rank):
    signal.alarm(100)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(job["folder"])
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if job["pause_before"] and not rank:
        pause_before(job["pause_before"])
    if job["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
    script.main([f"{sys.argv[2]}.py", *job["arguments"]])

gc.collect(), gc.freeze()  # else each process copies and searches what was imported
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
                code = end.code if isinstance(end.code, int) else 1
                print(end.code, file=sys.stderr)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@dataclass
class Result:
    """Exit codes and output of the processes of one training."""

    codes: list[int]
    text: str


def environment(**more: str) -> dict[str, str]:
    """Return an environment with one thread per process, no GPU, no wandb, no hub, and the library on the path."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return os.environ | fixed | {"PYTHONPATH": str(ROOT / "workflow")} | more


@dataclass
class Trainer:
    """A server process that has imported a script and forks trainings of it, one at a time."""

    server: subprocess.Popen
    log: Path
    pids: list[int] = field(default_factory=list)

    def __call__(self, folder: Path, *arguments: str, ranks: int = 1, file_limit: int = 0) -> Result:
        """Run a training in `folder` to its end; `file_limit` is the largest size of a file in bytes."""
        self.start(folder, *arguments, ranks=ranks, file_limit=file_limit)
        return self.wait()

    def start(self, folder: Path, *arguments: str, ranks: int = 1, file_limit: int = 0, pause_before: str = "") -> None:
        """Start a training and set `pids`, the process ids of its ranks.

        With `pause_before`, rank 0 stops (SIGSTOP) before it first renames or deletes a path that matches the pattern.
        """
        self.log.unlink(missing_ok=True)
        job = {"arguments": arguments, "ranks": ranks, "folder": str(folder), "log": str(self.log)}
        job |= {"file_limit": file_limit, "pause_before": pause_before}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            job |= {"port": str(free.getsockname()[1])}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pids = json.loads(self.server.stdout.readline())

    def await_pause(self, deadline: float = 100.0) -> None:
        """Wait until rank 0 has stopped at the change named by `pause_before`."""
        end = time.monotonic() + deadline
        while psutil.Process(self.pids[0]).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)

    def resume(self) -> None:
        """Continue rank 0 after a pause."""
        os.kill(self.pids[0], signal.SIGCONT)

    def kill(self) -> None:
        """Kill all ranks that still run with SIGKILL."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> Result:
        """Wait for the end of the training; return its result."""
        codes = json.loads(self.server.stdout.readline())
        self.pids = []  # from now on, other processes may get these ids
        return Result(codes, self.log.read_text())


@contextlib.contextmanager
def trainer(log: Path, script: str = "train") -> Iterator[Trainer]:
    """Start a Trainer of a script; its trainings write their output to `log`."""
    command = [sys.executable, "-c", FORKS, str(SCRIPTS), script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as server:
        run = Trainer(server, log)
        try:
            yield run
        finally:
            run.kill()  # ranks that a failed test left


# ---------------------------------------------------------------- results of a training
MEASURED = ("images_per_second", "images_per_second_per_gpu", "data_wait", "memory_gb")


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    """Return the UNet's weights in a pipeline folder."""
    return load_file(pipeline / "unet/diffusion_pytorch_model.safetensors")


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor in the newest checkpoint by its name, such as unet.conv_in.weight."""
    (folder,) = (run / "checkpoints").iterdir()
    newest = max((path.parent for path in folder.glob("*/.metadata")), key=lambda path: int(path.name))
    index = dcp.FileSystemReader(newest).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.items()}
    dcp.load(state, checkpoint_id=newest, no_dist=True)
    return state


def part(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return one section of a checkpoint: unet, ema, optimizer or progress."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def log(run: Path) -> list[dict]:
    """Return the log without the values that depend on time and memory."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def losses(run: Path) -> list[float]:
    """Return the losses in the log."""
    return [line["loss"] for line in log(run) if "loss" in line]


def same(a: dict, b: dict, **tolerance) -> bool:
    """Return whether two states have the same tensors: bit for bit, or within a tolerance."""
    if not tolerance:
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **tolerance) for k in a)


def await_images(run: Path, images: int, deadline: float = 100.0) -> None:
    """Wait until a checkpoint of at least so many images lies in a training's folder."""
    end = time.monotonic() + deadline
    while not any(int(path.parent.name) >= images for path in run.glob("checkpoints/*/[0-9]*/.metadata")):
        assert time.monotonic() < end, f"no checkpoint of {images} images"
        time.sleep(0.005)


def refused(result: Result, *named: str) -> None:
    """Assert that every process failed, with a single message that contains all of `named`."""
    assert all(code != 0 for code in result.codes), result.text
    assert "Traceback" not in result.text, result.text
    (message,) = [line for line in result.text.splitlines() if line.startswith("error:")]
    assert all(word in message for word in named), message


def kill_all(process: subprocess.Popen) -> None:
    """Kill -9 a launcher and all processes that it started."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)
