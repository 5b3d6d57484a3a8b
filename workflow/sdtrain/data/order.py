"""The order of a training's samples: a pure function of the seed and of the position in the stream.

In each epoch the shards are permuted, and the samples of each `window` of consecutive shards are permuted together, so
that the order needs little memory at any scale.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np


class Recent:
    """Cache the results of a function of one argument for the `size` most recent arguments."""

    def __init__(self, function: Callable, size: int):
        self.function, self.size = function, size
        self.results: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, argument: Any) -> Any:
        if argument not in self.results:
            self.results[argument] = self.function(argument)
            if len(self.results) > self.size:
                self.results.popitem(last=False)
        self.results.move_to_end(argument)
        return self.results[argument]

    def __getstate__(self) -> dict:  # a spawned process opens its own shards
        return {**self.__dict__, "results": OrderedDict()}


class Order:
    """Map a position of the stream to a sample: a pure function of (seed, position) and of the shards' sizes.

    `count` maps shard numbers to their numbers of samples. It is called no earlier than needed: in the first epoch for
    the windows up to the position. Memory: the permutations of two windows, and one number a shard.
    """

    def __init__(self, count: Callable[[np.ndarray], np.ndarray], shards: int, window: int, seed: int):
        self.count, self.shards, self.window, self.seed = count, shards, window, seed
        self.windows = -(-shards // window)
        self.total: int | None = None  # samples an epoch, once all shards were counted
        self._epoch, self._permutation = Recent(self._start_epoch, 2), Recent(self._permute, 2)

    def __len__(self) -> int:
        if self.total is None:
            self.total = int(self.count(np.arange(self.shards)).sum())
        return self.total

    def locate(self, position: int) -> tuple[int, int] | None:
        """Return the shard and the number of the sample in it; None if there are no samples at all."""
        if self.total == 0:
            return None
        epoch, offset = divmod(position, self.total) if self.total else (0, position)
        shards, ends = self._epoch(epoch)
        while ends[-1] <= offset and len(ends) <= self.windows:
            ends.append(ends[-1] + int(self.count(self._members(shards, len(ends) - 1)).sum()))
        if ends[-1] <= offset:  # the first epoch is over
            self.total = ends[-1]
            return self.locate(position)
        window = bisect_right(ends, offset) - 1
        permutation, members, starts = self._permutation((epoch, window))
        place = int(permutation[offset - ends[window]])
        member = bisect_right(starts, place) - 1
        return members[member], place - starts[member]

    def _members(self, shards: np.ndarray, window: int) -> np.ndarray:
        return shards[window * self.window : (window + 1) * self.window]

    def _start_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Return the order of the shards, and the ends of the windows counted so far, to which `locate` appends."""
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.shards), [0]

    def _permute(self, at: tuple[int, int]) -> tuple[np.ndarray, list[int], list[int]]:
        """Return the permutation of a window's samples, its shards, and the number of each one's first sample."""
        epoch, window = at
        members = self._members(self._epoch(epoch)[0], window)
        counts = self.count(members).tolist()
        permutation = np.random.default_rng([self.seed, 2, epoch, window]).permutation(sum(counts))
        return permutation, members.tolist(), list(accumulate(counts, initial=0))[:-1]
