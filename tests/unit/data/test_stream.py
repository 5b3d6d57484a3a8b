"""Tests of the stream: batches at any world size, after a resume, with unreadable samples, and prefetched."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from samples import make_sample, write_tar

from sdtrain.data import stream as loader
from sdtrain.data import tar_source
from sdtrain.data.datasets import ImageDataset
from sdtrain.data.manifest import write_manifest
from sdtrain.data.stream import prefetched
from sdtrain.errors import DataError


@pytest.fixture(scope="module")
def manifest(image_shards):
    return str(image_shards / "manifest.json")


@pytest.fixture(scope="module")
def dataset(manifest):
    return ImageDataset(manifest, 32, crop="random", flip=True, seed=7)


def take(stream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def keys(dataset, count: int, **options) -> list[str]:
    return [key for batch in take(loader.batches(dataset, **options), count) for key in batch["key"]]


def key_at(dataset, position: int) -> str:
    shard, row = dataset.locate(position)
    return shard.key(row)


def same(one: dict, two: dict) -> bool:
    """Return whether two batches are equal, bit for bit."""
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one
    )


# ---------------------------------------------------------------- batches
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")
@pytest.mark.parametrize("window", [1, 2, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_ranks_and_workers_share_an_epoch(manifest, window, world_size, workers):
    """Read two epochs of 41 samples in global batches of 6: each sample once per epoch, in the same order."""
    dataset = ImageDataset(manifest, 8, seed=7, window=window)
    size = 6 // world_size
    ranks = [
        keys(dataset, 14, batch_size=size, rank=r, world_size=world_size, workers=workers) for r in range(world_size)
    ]
    stream = [key for batch in range(14) for rank in ranks for key in rank[batch * size : (batch + 1) * size]]
    assert stream == [key_at(dataset, p) for p in range(84)]
    assert sorted(stream[:41]) == sorted(stream[41:82]) and len(set(stream[:41])) == 41


def test_a_resume_at_any_position_continues_with_the_same_images(manifest):
    options = {"crop": "random", "flip": True, "zoom": (1.0, 2.0), "seed": 7, "window": 2}
    whole = take(loader.batches(ImageDataset(manifest, 32, **options), 4), 24)
    for batch in range(0, 24, 5):
        again = loader.batches(ImageDataset(manifest, 32, **options), 4, start=4 * batch)
        assert all(same(one, two) for one, two in zip(whole[batch : batch + 2], again, strict=False))
    assert whole[0]["pixels"].shape == (4, 3, 32, 32) and whole[0]["pixels"].dtype == torch.float32
    assert -1 <= whole[0]["pixels"].min() and whole[0]["pixels"].max() <= 1
    assert whole[0]["original_size"].shape == whole[0]["crop"].shape == (4, 2)
    assert any(batch["crop"].any() for batch in whole)


def many_shards(folder: Path) -> list[Path]:
    return [write_tar(folder / f"{i}.tar", [make_sample(3 * i + n) for n in range(3)]) for i in range(8)]


@pytest.mark.filterwarnings("error:skipped")
def test_a_resume_opens_no_shard_that_was_consumed(tmp_path):
    tars = many_shards(tmp_path)
    write_manifest(tmp_path / "m.json", "images", tars, {}, {})
    whole = take(loader.batches(ImageDataset(str(tmp_path / "m.json"), 16, window=2), 3), 8)
    dataset = ImageDataset(str(tmp_path / "m.json"), 16, window=2)
    early = {Path(dataset.locate(position)[0].name) for position in range(12)}
    assert len(early) == 4
    for tar in early:  # zeros of the same size: reading a sample of them would fail
        size = tar.stat().st_size
        os.truncate(tar, 0)
        os.truncate(tar, size)
    dataset = ImageDataset(str(tmp_path / "m.json"), 16, window=2)
    again = take(loader.batches(dataset, 3, start=12), 4)
    assert all(same(one, two) for one, two in zip(whole[4:], again, strict=True)) and again[-1]["lost"] == {}
    names = [shard.name for shard in dataset._load.results.values()]
    assert not {str(tar) for tar in early} & set(names[1:])  # the first one is read at the opening


def test_a_resume_runs_no_pipe_command_again(tmp_path):
    many_shards(tmp_path)
    path, cache = f"pipe:echo x >> {tmp_path}/log; cat {tmp_path}/{{0..7}}.tar", str(tmp_path / "c")
    whole = keys(ImageDataset(path, 16, window=2, cache=cache), 4, batch_size=3)
    fetched = (tmp_path / "log").read_text().count("x")
    assert fetched == 4  # only shards of the first epoch so far
    dataset = ImageDataset(path, 16, window=2, cache=cache)
    assert "in the first 2 of 8 shards" in dataset.describe()
    assert (
        keys(dataset, 2, batch_size=3, start=6) == whole[6:12] and (tmp_path / "log").read_text().count("x") == fetched
    )
    assert Counter(keys(dataset, 8, batch_size=3)).most_common(1)[0][1] == 1
    assert (tmp_path / "log").read_text().count("x") == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_stream(workers, image_shards, tmp_path, s3, dataset):
    for tar in image_shards.glob("*.tar"):
        s3.put(f"stream/{tar.name}", tar.read_bytes())
    local = take(loader.batches(dataset, 6), 8)
    for path in (s3.url("stream/{00000..00002}.tar"), f"pipe:cat {image_shards}/{{00000..00002}}.tar"):
        remote = ImageDataset(path, 32, crop="random", flip=True, seed=7, cache=str(tmp_path / "c"))
        assert all(same(*pair) for pair in zip(local, loader.batches(remote, 6, workers=workers), strict=False))


# ---------------------------------------------------------------- losses
def spoiled(folder, bad: set[int], count: int = 40) -> ImageDataset:
    """Return a dataset in which these samples are not decodable; position p is dataset.locate(p)."""
    samples = [make_sample(n) for n in range(count)]
    for number in bad:
        samples[number][1]["jpg"] = b"no image"
    return ImageDataset(str(write_tar(folder / "a.tar", samples)), 16, cache=str(folder / "c"))


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_replaces_an_undecodable_one_at_any_world_size(tmp_path, workers):
    dataset = spoiled(tmp_path, {5, 6, 31})
    bad = [p for p in range(40) if int(key_at(dataset, p)) in {5, 6, 31}]
    expected = [key_at(dataset, p) for p in range(41)]
    for p in reversed(bad):
        expected[p] = expected[p + 1]
    assert keys(dataset, 40, batch_size=1, workers=workers) == expected[:40]
    two = [keys(dataset, 10, batch_size=2, rank=rank, world_size=2, workers=workers) for rank in (0, 1)]
    assert [k for i in range(10) for rank in two for k in rank[2 * i : 2 * i + 2]] == expected[:40]


def test_a_skipped_image_is_warned_of(tmp_path):
    dataset = spoiled(tmp_path, {3})
    with pytest.warns(UserWarning, match=r"skipped: .*a.tar: 000000003: undecodable image .unknown format.$"):
        keys(dataset, 10, batch_size=4)


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_many_lost_images_end_the_training(tmp_path):
    dataset = spoiled(tmp_path, set(range(0, 40, 5)))  # one in five
    with pytest.raises(
        DataError, match=r"11 of \d+ samples .*image': 11}\), the last: .*undecodable.*; rebuild or filter"
    ):
        keys(dataset, 100, batch_size=4)
    assert len(keys(spoiled(tmp_path, set(range(0, 40, 5))), 100, batch_size=4, max_lost=0.25)) == 400
    tolerable = spoiled(tmp_path, {7, 9})  # one in twenty never ends the training
    assert len(keys(tolerable, 100, batch_size=4)) == 400
    assert len(keys(tolerable, 10, batch_size=4)) == 40  # another stream has its own count


@pytest.mark.filterwarnings("ignore:skipped")
def test_no_readable_image_is_one_message(tmp_path):
    with pytest.raises(
        DataError, match="not one of 100 consecutive samples can be read, the last: .*; rebuild the shards"
    ):
        keys(spoiled(tmp_path, {0, 1, 2}, count=3), 1, batch_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_ends_the_training(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(tar_source, "WAITS", (0, 0))
    tar = write_tar(tmp_path / "a.tar", [make_sample(n) for n in range(8)])
    for path in (str(tar), f"pipe:echo x >> {tmp_path}/log; cat {tar}"):
        dataset = ImageDataset(path, 16, cache=str(tmp_path / "c"))
        for copy in tmp_path.glob("c/*/passing/*"):
            copy.unlink()
        tar.rename(tmp_path / "away")
        with pytest.raises(DataError, match=r"a\.tar: .*; correct that, then run the command again"):
            keys(dataset, 1, batch_size=1, workers=workers)
        (tmp_path / "away").rename(tar)
    assert (tmp_path / "log").read_text().count("x") >= 1 + 3  # after two more attempts


# ---------------------------------------------------------------- batches ahead
def behind() -> list[str]:
    """Return the running threads and processes of streams."""
    threads = [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]
    return threads + ["worker" for _ in multiprocessing.active_children()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_prefetched_batches_are_the_same(dataset, workers, count):
    plain = take(loader.batches(dataset, 4, start=8), 24)
    with contextlib.closing(prefetched(loader.batches(dataset, 4, start=8, workers=workers), count)) as stream:
        assert all(same(*pair) for pair in zip(plain, stream, strict=False))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ending", ["close", "forget"])
def test_closed_or_deleted_stream_leaves_no_thread_or_process(dataset, workers, ending):
    assert behind() == []
    batches = loader.batches(dataset, 4, workers=workers)
    stream = prefetched(batches, 2)
    next(stream)
    assert behind() == ["prefetch", *["worker"] * workers]
    if ending == "close":
        stream.close()
        assert next(stream, None) is None
    else:
        del stream
    assert behind() == [] and next(batches, None) is None


@pytest.mark.parametrize("count", [0, 3])
def test_a_stream_that_was_not_started_leaves_no_process(dataset, count):
    stream = prefetched(loader.batches(dataset, 4, workers=2), count)
    assert behind() == ["worker"] * 2
    stream.close()
    del stream
    assert behind() == []


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 3])
def test_error_is_raised_in_order_and_leaves_no_thread_or_process(tmp_path, workers, count):
    def until_it_ends(stream) -> tuple[list[str], list[dict], str]:
        seen, lost = [], []
        with pytest.raises(DataError, match="samples are lost") as error:
            for batch in stream:
                seen += batch["key"]
                lost.append(batch["lost"])
        assert behind() == [], "while the error and its traceback are held"
        return seen, lost, str(error.value)

    bad = set(range(0, 40, 5))
    plain = until_it_ends(loader.batches(spoiled(tmp_path, bad), 4))
    ahead = prefetched(loader.batches(spoiled(tmp_path, bad), 4, workers=workers), count)
    assert until_it_ends(ahead) == plain and next(ahead, None) is None
    totals = [sum(lost.values()) for lost in plain[1]]  # each batch has the count up to it
    assert totals[-1] == 10 and totals == sorted(totals) and len(set(totals)) > 5


@pytest.mark.parametrize("count", [1, 4])
def test_no_more_batches_are_made_ahead_than_asked(count):
    made, ready = [], threading.Event()

    def numbers():
        for number in range(100):
            made.append(number)
            if number == count:
                ready.set()
            yield {"number": number}

    stream = prefetched(numbers(), count)
    assert next(stream) == {"number": 0} and ready.wait(60)
    assert [next(stream)["number"] for _ in range(10)] == [*range(1, 11)]
    stream.close()
    assert 11 <= len(made) <= 11 + count


def test_a_finite_stream_ends():
    assert list(prefetched(({"n": n} for n in range(5)), 2)) == [{"n": n} for n in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_does_not_touch_the_global_random_state(dataset, workers):
    before = torch.get_rng_state()
    next(loader.batches(dataset, 4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failing_process_ends_while_a_batch_is_in_progress():
    program = """
import threading
from sdtrain.data import stream as loader
from sdtrain.data import tar_source
def numbers():
    yield {"n": 1}
    threading.Event().wait()
def fail():
    stream = loader.prefetched(numbers(), 2)
    next(stream)
    raise SystemError("on purpose")
fail()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "workflow")}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "SystemError: on purpose"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA has use for page-locked memory")
@pytest.mark.parametrize("count", [0, 2])
def test_batches_are_pinned_if_asked(dataset, count):
    with contextlib.closing(prefetched(loader.batches(dataset, 4), count, pin=True)) as stream:
        batch = next(stream)
    assert batch["pixels"].is_pinned() and batch["caption"]
