"""build_shards with a faulty server, and killed at any point: no image is lost, counted twice or downloaded twice."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import downloads
import pytest
from downloads import Work, content, wait
from samples import ROOT, load_script, write_tar

from sdtrain.data.img2dataset import read_stats
from sdtrain.data.tars import index_tar

MANNERS = {
    "404": "HTTP Error 404: Not Found",
    "500": "HTTP Error 500: Internal Server Error",
    "hang": "timed out",
    "short": "body cut off",
    "html": "not a readable image",
    "empty": "empty body",
    "bomb": "more than 134,217,728 pixels",
    "loop": "redirects without end",
    "noai": "disallowed by X-Robots-Tag",
    "strip": "aspect ratio too large",
}


pytestmark = pytest.mark.usefixtures("reset")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, server):
    """Build 16 images, three of which fail, in four shards without interruption; return the build and its seconds."""
    downloads.reset(server)
    work = Work(tmp_path_factory.mktemp("whole"), server)
    work.select([f"{'404/' * (i == 3) + 'html/' * (i == 9) + 'short/' * (i == 14)}{i}.png" for i in range(16)])
    begin = time.monotonic()
    manifest, said = work.run(processes=2)
    assert manifest["samples"] == 13, said
    return work, time.monotonic() - begin


def test_hostile_answers_are_dropped_and_counted_by_reason(work, server):
    good = ["redirect/0.png", "once/1.png", *(f"{i}.png" for i in range(2, 12))]
    work.select(good + [f"{manner}/{20 + i}.png" for i, manner in enumerate(MANNERS)])
    manifest, said = work.run(timeout=3, retries=1, max_aspect_ratio=5, samples_per_shard=8, threads=8)
    assert manifest["dropped"] == {reason: 1 for reason in sorted(MANNERS.values())}, said
    assert manifest["samples"] == len(good), "a redirect is followed, and a temporary error is tried again"
    assert manifest["samples"] + sum(manifest["dropped"].values()) == len(good) + len(MANNERS)
    assert server.asked["/once/1.png"] > 1


def test_killed_builds_give_identical_shards(whole, work, server):
    """Kill build_shards, img2dataset, or both at random times; run the same command again at once."""
    expected, duration = whole
    chance = random.Random(0)
    shutil.copy(expected.folder / "selected.parquet", work.folder)
    server.slow, done = 0.1, {}
    for number, victim in enumerate(["parent", "group", "img2dataset", "parent"]):
        process = work.start(processes=2)
        if number:
            time.sleep(chance.uniform(0.1, 1) * duration)
        else:  # at least once with a finished shard and others in progress
            wait(lambda: finished(work))
        kill(process, victim)
        if number % 2 == 0:
            wait(lambda: not others(work))
            done = {shard: count_asked(server, shard) for shard in finished(work)} | done
    manifest, said = work.run(processes=2)
    assert manifest, said
    assert done and {shard: count_asked(server, shard) for shard in done} == done, "a finished shard was made again"
    assert content(work.output) == content(expected.output)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_build_ends_its_img2dataset(work, server, signal_number):
    """SIGTERM ends it, and so does a standstill: a killed worker, as by the kernel when memory is short, stops it."""
    driver = (
        "import signal, sys; from samples import load_script; from sdtrain.data import img2dataset;"
        "signal.signal(signal.SIGUSR1, lambda *_: setattr(img2dataset, 'STANDSTILL', 1));"
        "load_script('build_shards').main(sys.argv)"
    )
    work.select(8)
    server.slow = 2
    environment = {"PYTHONPATH": f"{ROOT}/workflow:{ROOT}/tests"}
    process = work.start(environment, program=["-c", driver], threads=1)
    wait(lambda: server.asked)
    assert len(others(work)) > 3
    if signal_number == signal.SIGUSR1:
        kill_workers(process.pid)
    process.send_signal(signal_number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode and not work.output.exists()
    assert ("has stood still" in said) == (signal_number == signal.SIGUSR1) and "Traceback" not in said
    wait(lambda: not others(work))


def kill_workers(pid: int) -> None:
    """Kill the workers of img2dataset, as the kernel does when memory is short."""
    (child,) = children(pid)
    for worker in children(child):
        if b"spawn_main" in Path(f"/proc/{worker}/cmdline").read_bytes():
            os.kill(worker, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_build_resumes_after_a_kill_between_any_two_changes(whole, tmp_path):
    """After img2dataset is done: kill it before each replace and each unlink, then run it again."""
    shutil.copytree(whole[0].folder, tmp_path / "start")
    output = tmp_path / "start/shards/manifest.json"
    for tar in output.parent.glob("*/*.tar"):  # as img2dataset leaves them: in another order, and not indexed
        fields = [(s.key, {e: s.read(e) for e in s.fields}) for s in reversed(index_tar(tar))]
        write_tar(tar.parent / "download" / tar.name, fields)
    for path in [output, *output.parent.glob("*/*.parquet"), *output.parent.glob("*/*.tar")]:
        path.unlink()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        survived = pool.apply(kill_everywhere, (tmp_path, content(whole[0].output)))
    assert survived >= 14, "changes: the rows, and for each of four shards the tar, its move and its index"


def kill_everywhere(folder: Path, expected: dict[str, bytes]) -> int:
    """Kill a build of a copy of `start` before its first change, then the second, and so on; return their number."""
    import pandas  # noqa: F401 (else pyarrow imports it in each fork)
    import pyarrow.compute  # noqa: F401
    import webdataset  # noqa: F401 (else each fork that writes a tar imports it, and torch)

    build_shards = load_script("build_shards")  # nothing has run yet in this process, so that it may fork
    for number in range(1000):
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(folder / "start", folder / "copy")
        survived = fork_build(build_shards, folder / "copy", number)
        if not survived:
            fork_build(build_shards, folder / "copy", None)
        assert content(folder / "copy/shards/manifest.json") == expected, f"killed before change {number}"
        if survived:
            return number
    raise AssertionError("the build makes more than 1000 changes")


def fork_build(build_shards, folder: Path, number: int | None) -> bool:
    """Run a build in a process that kills itself before change `number`; return whether it reached its end."""
    pid = os.fork()
    if not pid:
        if number is not None:
            kill_self_before(number)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        arguments = {"config": "shards.yaml", "selection": "selected.parquet", "output": "shards/manifest.json"}
        build_shards.main(["build_shards", *(f"{k}={folder}/{v}" for k, v in arguments.items())])
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), "the build failed"
    return status == 0


def kill_self_before(number: int) -> None:
    """Make the process kill itself before the change of a file name that has this number."""
    left = [number]

    def counted(change):
        def run(*arguments, **options):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return change(*arguments, **options)

        return run

    for name in ("replace", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def finished(work: Work) -> list[str]:
    """Return the shards whose statistics are complete."""
    return [name for folder in work.output.parent.glob("*/") for name in read_stats(folder)]


def count_asked(server, shard: str) -> int:
    """Return how many requests there were for the images of a shard."""
    numbers = range(4 * int(shard), 4 * int(shard) + 4)
    return sum(n for path, n in list(server.asked.items()) if int(Path(path).stem) in numbers)


def kill(process, victim: str) -> None:
    """Kill build_shards, its process group, or only img2dataset; wait until build_shards has ended."""
    with contextlib.suppress(OSError):
        if victim == "parent":
            process.kill()
        elif victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert "Traceback" not in said, said


def others(work: Work) -> list[str]:
    """Return the processes of a build: its folder is in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if f"BUILD={work.folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found
