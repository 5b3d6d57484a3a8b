"""Tests of the order of samples: a permutation per epoch, and a pure function of seed and position."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data.order import Order


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
def test_a_position_does_not_depend_on_earlier_lookups(counts, window, data):
    asked = data.draw(st.lists(st.integers(0, 3 * sum(counts)), min_size=1, max_size=20))
    stream = order(counts, window)
    assert [stream.locate(p) for p in asked] == [order(counts, window).locate(p) for p in asked]
    assert len(stream) == sum(counts)


@given(counts=SHARD_COUNTS, window=st.integers(1, 14))
@settings(deadline=None)
def test_samples_of_at_most_window_shards_are_mixed(counts, window):
    """At any place of an epoch, at most `window` shards are between their first and their last sample."""
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
    assert rows[0] != rows[1] != rows[2]  # not the same permutation in every epoch
    assert len({shard for shard, _ in places(counts, order(counts, 6), 0)[:10]}) > 2  # samples of all are mixed


def test_shards_are_counted_only_when_needed():
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


def test_a_stream_without_samples_has_no_position():
    assert order([0, 0], 1).locate(5) is None
