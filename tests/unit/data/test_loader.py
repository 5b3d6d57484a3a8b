"""The stream of a training: which sample stands where at any world size, and what is lost on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from samples import draw, jpeg, make_sample, write_tar

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.data import images, sources
from sdtrain.data import stream as loader
from sdtrain.data.manifest import write_manifest
from sdtrain.data.stream import DataError, ImageDataset, LatentDataset, Order, open_dataset, prefetched


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


def same(one: dict, two: dict) -> bool:
    """Whether two batches are equal, to the last bit."""
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one
    )


# ---------------------------------------------------------------- order
def order(counts: list[int], window: int, seed: int = 0) -> Order:
    counts = np.array(counts, np.int64)
    return Order(lambda numbers: counts[numbers], len(counts), window, seed)


def places(counts: list[int], stream: Order, epoch: int) -> list[tuple[int, int]]:
    total = sum(counts)
    return [stream.locate(position) for position in range(epoch * total, (epoch + 1) * total)]


SHARD_COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(counts=SHARD_COUNTS, window=st.integers(1, 14), seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_is_a_permutation(counts, window, seed, epoch):
    everything = sorted((shard, row) for shard, count in enumerate(counts) for row in range(count))
    assert sorted(places(counts, order(counts, window, seed), epoch)) == everything


@given(counts=SHARD_COUNTS, window=st.integers(1, 14), data=st.data())
@settings(deadline=None)
def test_a_position_is_the_same_whatever_was_asked_before(counts, window, data):
    asked = data.draw(st.lists(st.integers(0, 3 * sum(counts)), min_size=1, max_size=20))
    stream = order(counts, window)
    assert [stream.locate(p) for p in asked] == [order(counts, window).locate(p) for p in asked]
    assert len(stream) == sum(counts)


@given(counts=SHARD_COUNTS, window=st.integers(1, 14))
@settings(deadline=None)
def test_a_window_of_shards_comes_before_the_next(counts, window):
    """The shards of each run of places are at most `window`, and none comes back later in the epoch."""
    found = [shard for shard, _ in places(counts, order(counts, window), 0)]
    first, last = {}, {}
    for place, shard in enumerate(found):
        first.setdefault(shard, place)
        last[shard] = place
    for place in range(len(found)):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= window


def test_epochs_and_seeds_and_windows_differ():
    counts = [10] * 6
    base = places(counts, order(counts, 2), 0)
    assert base != places(counts, order(counts, 2), 1) and base != places(counts, order(counts, 2, seed=1), 0)
    rows = [[row for _, row in base[i : i + 20]] for i in (0, 20, 40)]
    assert rows[0] != rows[1] != rows[2]  # not one permutation again and again
    assert len({shard for shard, _ in places(counts, order(counts, 6), 0)[:10]}) > 2  # samples of all are mixed


def test_shards_are_counted_no_earlier_than_needed():
    counted = []

    def count(numbers):
        counted.extend(int(n) for n in numbers)
        return np.full(len(numbers), 10)

    stream = Order(count, 100, 5, 0)
    stream.locate(0)
    assert len(set(counted)) == 5
    stream.locate(149)
    assert len(set(counted)) == 15 and stream.total is None
    stream.locate(1000)  # the second epoch needs the total
    assert len(set(counted)) == 100 and stream.total == 1000


def test_nothing_at_all_ends_plainly(manifest):
    assert order([0, 0], 1).locate(5) is None
    with pytest.raises(DataError, match=r"no sample is left of 41: .'filters': 41.; loosen dataset.params.filters"):
        ImageDataset(manifest, 32, filters={"original_width": ">=512"})


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")
@pytest.mark.parametrize("window", [1, 2, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_ranks_and_workers_share_the_epoch_out(manifest, window, world_size, workers):
    """Two epochs of 41 samples, in global batches of 6: each sample once an epoch, in one order at any world size."""
    dataset = ImageDataset(manifest, 8, seed=7, window=window)
    size = 6 // world_size
    ranks = [
        keys(dataset, 14, batch_size=size, rank=r, world_size=world_size, workers=workers) for r in range(world_size)
    ]
    stream = [key for batch in range(14) for rank in ranks for key in rank[batch * size : (batch + 1) * size]]
    assert stream == [dataset.locate(p).key for p in range(84)]
    assert sorted(stream[:41]) == sorted(stream[41:82]) and len(set(stream[:41])) == 41


def test_a_resume_at_any_position_goes_on_with_the_same_images(manifest):
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
    early = {Path(s.shard.name) for s in map(ImageDataset(str(tmp_path / "m.json"), 16, window=2).locate, range(12))}
    assert len(early) == 4
    for tar in early:  # zeros, of the same size: whoever reads them fails
        size = tar.stat().st_size
        os.truncate(tar, 0)
        os.truncate(tar, size)
    dataset = ImageDataset(str(tmp_path / "m.json"), 16, window=2)
    again = take(loader.batches(dataset, 3, start=12), 4)
    assert all(same(one, two) for one, two in zip(whole[4:], again, strict=True)) and again[-1]["lost"] == {}
    names = [shard.name for shard in dataset._load.results.values()]
    assert not {str(tar) for tar in early} & set(names[1:])  # but the very first, looked at when it was opened


def test_a_resume_fetches_nothing_behind_commands_again(tmp_path):
    many_shards(tmp_path)
    path, cache = f"pipe:echo x >> {tmp_path}/log; cat {tmp_path}/{{0..7}}.tar", str(tmp_path / "c")
    whole = keys(ImageDataset(path, 16, window=2, cache=cache), 4, batch_size=3)
    fetched = (tmp_path / "log").read_text().count("x")
    assert fetched == 4  # the first epoch so far, and no more
    dataset = ImageDataset(path, 16, window=2, cache=cache)
    assert "in the first 2 of 8 shards" in dataset.describe()
    assert (
        keys(dataset, 2, batch_size=3, start=6) == whole[6:12] and (tmp_path / "log").read_text().count("x") == fetched
    )
    assert Counter(keys(dataset, 8, batch_size=3)).most_common(1)[0][1] == 1
    assert (tmp_path / "log").read_text().count("x") == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_from_afar(workers, image_shards, tmp_path, s3, dataset):
    for tar in image_shards.glob("*.tar"):
        s3.put(f"stream/{tar.name}", tar.read_bytes())
    local = take(loader.batches(dataset, 6), 8)
    for path in (s3.url("stream/{00000..00002}.tar"), f"pipe:cat {image_shards}/{{00000..00002}}.tar"):
        remote = ImageDataset(path, 32, crop="random", flip=True, seed=7, cache=str(tmp_path / "c"))
        assert all(same(*pair) for pair in zip(local, loader.batches(remote, 6, workers=workers), strict=False))


def test_a_dataset_can_be_sent_to_a_process_that_starts_anew(manifest):
    dataset = ImageDataset(manifest, 16, window=2)
    there = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(dataset[p]["pixels"], there[p]["pixels"]) for p in (0, 50))


def test_a_window_of_nothing_is_refused(manifest):
    cfg = load_config(schema.DatasetConfig, values={"params": {"path": manifest, "window": 0}})
    with pytest.raises(DataError, match=r"dataset\.params\.window=0: at least one"):
        open_dataset(cfg, 0)


# ---------------------------------------------------------------- what is said of it
def test_the_yield_is_said_and_a_low_one_advises_to_reshard(manifest):
    assert ImageDataset(manifest, 16).describe() == "41 of 41 samples (none dropped)"
    about = ImageDataset(manifest, 16, filters={"pwatermark": "<=0.6"}).describe()
    assert about == "29 of 41 samples ({'filters': 12} dropped)"
    about = ImageDataset(manifest, 16, filters={"pwatermark": "<=0.1"}).describe()
    assert about.startswith("9 of 41 samples ({'filters': 32} dropped); re-shard: only 22.0% are kept")


# ---------------------------------------------------------------- losses
def spoiled(folder, bad: set[int], count: int = 40) -> ImageDataset:
    """Images whose files at these numbers are no images; stream position p is dataset.locate(p)."""
    samples = [make_sample(n) for n in range(count)]
    for number in bad:
        samples[number][1]["jpg"] = b"no image"
    return ImageDataset(str(write_tar(folder / "a.tar", samples)), 16, cache=str(folder / "c"))


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_gives_its_place_to_the_next_at_any_world_size(tmp_path, workers):
    dataset = spoiled(tmp_path, {5, 6, 31})
    bad = [p for p in range(40) if int(dataset.locate(p).key) in {5, 6, 31}]
    expected = [dataset.locate(p).key for p in range(41)]
    for p in reversed(bad):
        expected[p] = expected[p + 1]
    assert keys(dataset, 40, batch_size=1, workers=workers) == expected[:40]
    two = [keys(dataset, 10, batch_size=2, rank=rank, world_size=2, workers=workers) for rank in (0, 1)]
    assert [k for i in range(10) for rank in two for k in rank[2 * i : 2 * i + 2]] == expected[:40]


def test_a_skipped_image_is_said(tmp_path):
    dataset = spoiled(tmp_path, {3})
    with pytest.warns(UserWarning, match=r"skipped: .*a.tar: 000000003: undecodable image .of no kind that is known.$"):
        keys(dataset, 10, batch_size=4)


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_many_lost_images_end_the_training(tmp_path):
    dataset = spoiled(tmp_path, set(range(0, 40, 5)))  # one in five
    with pytest.raises(
        DataError, match=r"11 of \d+ samples .*image': 11}\), the last: .*undecodable.*; rebuild or filter"
    ):
        keys(dataset, 100, batch_size=4)
    assert len(keys(spoiled(tmp_path, set(range(0, 40, 5))), 100, batch_size=4, max_lost=0.25)) == 400
    tolerable = spoiled(tmp_path, {7, 9})  # one in twenty, for as long as it takes
    assert len(keys(tolerable, 100, batch_size=4)) == 400
    assert len(keys(tolerable, 10, batch_size=4)) == 40  # another stream of it counts its own


@pytest.mark.filterwarnings("ignore:skipped")
def test_not_one_image_is_one_message(tmp_path):
    with pytest.raises(
        DataError, match="not one of 100 samples in a row can be read, the last: .*; rebuild the shards"
    ):
        keys(spoiled(tmp_path, {0, 1, 2}, count=3), 1, batch_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_ends_the_training(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(sources, "WAITS", (0, 0))
    tar = write_tar(tmp_path / "a.tar", [make_sample(n) for n in range(8)])
    for path in (str(tar), f"pipe:echo x >> {tmp_path}/log; cat {tar}"):
        dataset = ImageDataset(path, 16, cache=str(tmp_path / "c"))
        for copy in tmp_path.glob("c/*/passing/*"):
            copy.unlink()
        tar.rename(tmp_path / "away")
        with pytest.raises(DataError, match=r"a\.tar: .*; once that is right, start again"):
            keys(dataset, 1, batch_size=1, workers=workers)
        (tmp_path / "away").rename(tar)
    assert (tmp_path / "log").read_text().count("x") >= 1 + 3  # with two more tries


def test_incomplete_samples_above_the_threshold_are_refused(tmp_path):
    samples = [make_sample(n) for n in range(40)]
    for _, fields in samples[:12]:
        del fields["txt"]
    path = str(write_tar(tmp_path / "a.tar", samples))
    dataset = ImageDataset(path, 16, cache=str(tmp_path / "c"))
    with pytest.raises(DataError, match=r"12 of 40 samples are incomplete .*'no txt': 12.*dataset\.params\.max_lost"):
        dataset.require_complete(0.1)
    dataset.require_complete(0.3)
    whole = str(write_tar(tmp_path / "b.tar", [make_sample(n) for n in range(40)]))
    filtered = ImageDataset(whole, 16, filters={"pwatermark": "<=0.1"}, cache=str(tmp_path / "c"))
    filtered.require_complete(0.1)  # what filters drop is no loss


# ---------------------------------------------------------------- batches ahead
def behind() -> list[str]:
    """The threads and processes of streams that are alive."""
    threads = [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]
    return threads + ["worker" for _ in multiprocessing.active_children()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_made_ahead_are_the_same(dataset, workers, count):
    plain = take(loader.batches(dataset, 4, start=8), 24)
    with contextlib.closing(prefetched(loader.batches(dataset, 4, start=8, workers=workers), count)) as stream:
        assert all(same(*pair) for pair in zip(plain, stream, strict=False))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ending", ["close", "forget"])
def test_a_stream_that_is_left_leaves_nothing(dataset, workers, ending):
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
def test_a_stream_never_begun_leaves_nothing(dataset, count):
    stream = prefetched(loader.batches(dataset, 4, workers=2), count)
    assert behind() == ["worker"] * 2
    stream.close()
    del stream
    assert behind() == []


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 3])
def test_an_error_comes_in_its_place_and_leaves_nothing(tmp_path, workers, count):
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
    totals = [sum(lost.values()) for lost in plain[1]]  # of each batch, whatever was made since
    assert totals[-1] == 10 and totals == sorted(totals) and len(set(totals)) > 5


@pytest.mark.parametrize("count", [1, 4])
def test_so_many_batches_are_made_ahead_and_no_more(count):
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


def test_a_stream_that_ends_ends():
    assert list(prefetched(({"n": n} for n in range(5)), 2)) == [{"n": n} for n in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_takes_nothing_from_global_randomness(dataset, workers):
    before = torch.get_rng_state()
    next(loader.batches(dataset, 4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_process_that_fails_ends_while_a_batch_is_made():
    program = """
import threading
from sdtrain.data import stream as loader
def numbers():
    yield {"n": 1}
    threading.Event().wait()
def fail():
    stream = loader.prefetched(numbers(), 2)
    next(stream)
    raise SystemError("on purpose")
fail()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "SystemError: on purpose"


def test_less_than_no_batches_ahead_are_refused(dataset):
    with pytest.raises(DataError, match=r"dataset\.params\.prefetch=-1: a number of batches is expected"):
        next(prefetched(loader.batches(dataset, 4), -1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA has use for page-locked memory")
@pytest.mark.parametrize("count", [0, 2])
def test_batches_are_pinned_where_asked(dataset, count):
    with contextlib.closing(prefetched(loader.batches(dataset, 4), count, pin=True)) as stream:
        batch = next(stream)
    assert batch["pixels"].is_pinned() and batch["caption"]


# ---------------------------------------------------------------- classes
def classes(folder, prompts, workers=0):
    samples = [(f"{n}", {"jpg": jpeg(draw(n)[0]), "cls": str(n % 3).encode()}) for n in range(6)]
    (folder / "prompts.json").write_text(prompts if isinstance(prompts, str) else json.dumps(prompts))
    params = {
        "path": str(write_tar(folder / "a.tar", samples)),
        "resolution": 16,
        "idx_to_prompt": str(folder / "prompts.json"),
        "cache": str(folder / "c"),
    }
    cfg = load_config(
        schema.DatasetConfig, values={"type": "ClassificationWebDataset", "params": {**params, "batch_size": 1}}
    )
    return open_dataset(cfg, 0)


@pytest.mark.parametrize("prompts", [["cat", "dog", "fox"], {"0": "cat", "1": "dog", "2": "fox"}])
def test_a_class_becomes_its_prompt(tmp_path, prompts):
    (batch,) = take(loader.batches(classes(tmp_path, prompts), 6), 1)
    assert batch["caption"] == [("cat", "dog", "fox")[int(key) % 3] for key in batch["key"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_a_prompt_is_one_plain_message(tmp_path, workers):
    stream = loader.batches(classes(tmp_path, ["cat", "dog"]), 6, workers=workers)
    with pytest.raises(DataError) as error:
        next(stream)
    assert str(error.value).startswith(str(tmp_path / "a.tar")) and "\n" not in str(error.value)
    assert "no prompt for class '2' in dataset.params.idx_to_prompt" in str(error.value)


def test_prompts_that_cannot_be_read_are_named(tmp_path):
    for text, reason in (
        ("{", "not a readable JSON file"),
        ("3", "a list or a mapping of class -> prompt is expected"),
    ):
        with pytest.raises(DataError, match=f"dataset.params.idx_to_prompt: .*prompts.json: {reason}"):
            classes(tmp_path, text)
    cfg = load_config(schema.DatasetConfig, values={"type": "ClassificationWebDataset", "params": {"path": "x"}})
    with pytest.raises(DataError, match="idx_to_prompt: ClassificationWebDataset needs a JSON file"):
        open_dataset(cfg, 0)


# ---------------------------------------------------------------- latents
@pytest.mark.filterwarnings("ignore:skipped")
def test_latents_are_read_and_broken_ones_skipped(tmp_path):
    fields = [
        {"latent": save({"latents": torch.full((4, 8, 8), float(n)).half()}), "txt": f"caption {n}".encode()}
        for n in range(30)
    ]
    fields[3]["latent"] = b"nothing"
    fields[4]["latent"] = save({"other": torch.zeros(1)})
    path = write_tar(tmp_path / "a.tar", [(str(n), f) for n, f in enumerate(fields)])
    dataset = LatentDataset(str(path), cache=str(tmp_path / "c"))
    (batch,) = take(loader.batches(dataset, 30), 1)
    assert batch["latents"].shape == (30, 4, 8, 8) and batch["latents"].dtype == torch.float32
    assert batch["latents"][:, 0, 0, 0].tolist() == [float(key) for key in batch["key"]]
    assert batch["caption"] == [f"caption {key}" for key in batch["key"]] and not {"3", "4"} & set(batch["key"])
    assert batch["lost"] == {"unreadable latent": 2} and dataset.empty_text is None


def test_latents_of_classes_have_prompts(tmp_path):
    (tmp_path / "prompts.json").write_text('["cat", "dog"]')
    latent = save({"latents": torch.zeros(4, 8, 8)})
    tar = write_tar(tmp_path / "a.tar", [(f"{n}", {"latent": latent, "cls": str(n).encode()}) for n in range(2)])
    params = {"path": str(tar), "idx_to_prompt": str(tmp_path / "prompts.json"), "cache": str(tmp_path / "c")}
    cfg = load_config(schema.DatasetConfig, values={"type": "LatentDataset", "params": params})
    batch = next(loader.batches(open_dataset(cfg, 0), 2))
    assert batch["caption"] == [["cat", "dog"][int(key)] for key in batch["key"]]


def test_latents_of_moments_are_drawn_anew_at_each_position(tmp_path):
    mean, std = torch.randn(4, 8, 8), torch.rand(4, 8, 8)
    tar = write_tar(tmp_path / "a.tar", [("0", {"latent": save({"mean": mean, "std": std}), "txt": b"one"})])
    dataset = LatentDataset(str(tar), seed=3, cache=str(tmp_path / "c"))
    drawn = torch.cat([batch["latents"] for batch in take(loader.batches(dataset, 16), 16)])
    assert torch.equal(drawn[32:48], next(loader.batches(dataset, 16, start=32))["latents"])
    noise = (drawn - mean) / std
    assert len(drawn.unique(dim=0)) == 256 and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_states_of_captions_come_with_the_latents(tmp_path):
    latent = {"latents": torch.zeros(4, 8, 8), "original_size": torch.tensor([30, 40]), "crop": torch.tensor([0, 5])}
    states = [torch.full((7, 5), float(n)).half() for n in range(6)]
    samples = [(f"{n}", {"latent": save(latent), "txt": b"t", "text": save({"text": s})}) for n, s in enumerate(states)]
    tar = write_tar(tmp_path / "a.tar", samples)
    save_file({"text": torch.ones(7, 5).half()}, tmp_path / "empty.safetensors")
    write_manifest(tmp_path / "m.json", "latents", [tar], {}, {}, empty_text="empty.safetensors")
    dataset = LatentDataset(str(tmp_path / "m.json"))
    batch = next(loader.batches(dataset, 6))
    assert batch["text"].shape == (6, 7, 5) and batch["text"].dtype == torch.float32
    assert batch["text"][:, 0, 0].tolist() == [float(key) for key in batch["key"]]
    assert batch["original_size"].tolist() == [[30, 40]] * 6 and batch["crop"].tolist() == [[0, 5]] * 6
    assert torch.equal(dataset.empty_text, torch.ones(7, 5))
    (tmp_path / "empty.safetensors").unlink()
    with pytest.raises(DataError, match=r"empty.safetensors: not the states of the empty caption .*; make them again"):
        LatentDataset(str(tmp_path / "m.json"))


# ---------------------------------------------------------------- the types of the configuration
@pytest.mark.parametrize("kind", ["WebDataset", "ParquetDataset", "CSVDataset"])
def test_every_type_gives_the_same_batches(kind, tmp_path):
    samples = [make_sample(n) for n in range(10)]
    data = [fields["jpg"] for _, fields in samples]
    table = {"photo": data, "words": [fields["txt"].decode() for _, fields in samples], "n": range(10)}
    params = {"resolution": 16, "batch_size": 1, "filters": {"n": "<8"}, "cache": str(tmp_path / "c")}
    if kind == "WebDataset":
        samples = [(k, {**f, "json": json.dumps({"n": n}).encode()}) for n, (k, f) in enumerate(samples)]
        path = write_tar(tmp_path / "a.tar", samples)
    else:
        params["columns"] = {"image": "photo", "caption": "words"}
        path = tmp_path / ("a.parquet" if kind == "ParquetDataset" else "a.csv")
    if kind == "ParquetDataset":
        pq.write_table(pa.table(table), path)
    if kind == "CSVDataset":
        for n, image in enumerate(data):
            (tmp_path / f"{n}.jpg").write_bytes(image)
        pa.table({**table, "photo": [f"{n}.jpg" for n in range(10)]}).to_pandas().to_csv(path, index=False)
    cfg = load_config(schema.DatasetConfig, values={"type": kind, "params": {"path": str(path), **params}})
    dataset = open_dataset(cfg, 0)
    assert len(dataset) == 8 and dataset.dropped == {"filters": 2}
    (batch,) = take(loader.batches(dataset, 8, workers=1), 1)
    found = {(text, pixels.numpy().tobytes()) for text, pixels in zip(batch["caption"], batch["pixels"], strict=True)}
    expected = [images.prepare(image, 16)["pixels"].numpy().tobytes() for image in data[:8]]
    assert found == set(zip(table["words"], expected, strict=False))
