"""build_shards against a hostile server, and killed at any point: nothing is lost, counted twice or asked again."""

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
    """An uninterrupted build of 16 images in four shards, three of which fail; and how long it took."""
    downloads.reset(server)
    work = Work(tmp_path_factory.mktemp("whole"), server)
    work.select([f"{'404/' * (i == 3) + 'html/' * (i == 9) + 'short/' * (i == 14)}{i}.png" for i in range(16)])
    begin = time.monotonic()
    manifest, said = work.run(processes=2)
    assert manifest["samples"] == 13, said
    return work, time.monotonic() - begin


def test_every_hostile_answer_is_dropped_under_its_reason(work, server):
    good = ["redirect/0.png", "once/1.png", *(f"{i}.png" for i in range(2, 12))]
    work.select(good + [f"{manner}/{20 + i}.png" for i, manner in enumerate(MANNERS)])
    manifest, said = work.run(timeout=3, retries=1, max_aspect_ratio=5, samples_per_shard=8, threads=8)
    assert manifest["dropped"] == {reason: 1 for reason in sorted(MANNERS.values())}, said
    assert manifest["samples"] == len(good), "a redirect is followed, and an error of the moment asked again"
    assert manifest["samples"] + sum(manifest["dropped"].values()) == len(good) + len(MANNERS)
    assert server.asked["/once/1.png"] > 1


def test_killed_builds_end_as_an_uninterrupted_one(whole, work, server):
    """build_shards alone, img2dataset alone, or both are killed at random moments; the same command follows at once."""
    expected, duration = whole
    chance = random.Random(0)
    shutil.copy(expected.folder / "selected.parquet", work.folder)
    server.slow, done = 0.1, {}
    for number, victim in enumerate(["parent", "group", "img2dataset", "parent"]):
        process = work.start(processes=2)
        if number:
            time.sleep(chance.uniform(0.1, 1) * duration)
        else:  # once for certain with a shard finished and others under way
            wait(lambda: finished(work))
        kill(process, victim)
        if number % 2 == 0:
            wait(lambda: not others(work), 10)
            done = {shard: count_asked(server, shard) for shard in finished(work)} | done
    manifest, said = work.run(processes=2)
    assert manifest, said
    assert done and {shard: count_asked(server, shard) for shard in done} == done, "a finished shard was asked again"
    assert content(work.output) == content(expected.output)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_build_ends_its_img2dataset(work, server, signal_number):
    """Where it is told to end, and where img2dataset stands still: one of its processes was killed, as for memory."""
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
    wait(lambda: not others(work), 10)


def kill_workers(pid: int) -> None:
    """Kill the processes that img2dataset has started, as the kernel does where memory ends."""
    (child,) = children(pid)
    for worker in children(child):
        if b"spawn_main" in Path(f"/proc/{worker}/cmdline").read_bytes():
            os.kill(worker, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_kill_between_any_two_changes_of_the_folder_is_made_good(whole, tmp_path):
    """From the moment at which img2dataset is done: killed before each replace and each unlink, then run again."""
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
    assert survived >= 14, "rows, and of each of four shards the tar, its new place and its index"


def kill_everywhere(folder: Path, expected: dict[str, bytes]) -> int:
    """Kill a build of a copy of `start` before its first change, the second …; returns how many kills it survived."""
    import pandas  # noqa: F401 (pyarrow would import it once a fork)
    import pyarrow.compute  # noqa: F401

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
    raise AssertionError("it never ends")


def fork_build(build_shards, folder: Path, number: int | None) -> bool:
    """Run a build in a process of its own, which kills itself before change `number`; False where it did."""
    pid = os.fork()
    if not pid:
        if number is not None:
            kill_self_before(number)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        arguments = {"config": "shards.yaml", "selection": "selected.parquet", "output": "shards/manifest.json"}
        build_shards.main(["build_shards", *(f"{k}={folder}/{v}" for k, v in arguments.items())])
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), "it ended by itself, in failure"
    return status == 0


def kill_self_before(number: int) -> None:
    """Make the change of a name that has this number the end of the process."""
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
    """The shards whose statistics are whole."""
    return [name for folder in work.output.parent.glob("*/") for name in read_stats(folder)]


def count_asked(server, shard: str) -> int:
    """How often the images of a shard were asked for."""
    numbers = range(4 * int(shard), 4 * int(shard) + 4)
    return sum(n for path, n in list(server.asked.items()) if int(Path(path).stem) in numbers)


def kill(process, victim: str) -> None:
    """Kill build_shards, its process group, or its img2dataset alone; wait until build_shards is gone."""
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
    """The processes of a build: they carry its folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if f"BUILD={work.folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found
