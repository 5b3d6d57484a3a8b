"""Base classes of datasets' sources: numbered shards of samples, opened when they are needed."""

from __future__ import annotations

import functools
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sdtrain.data import predicates
from sdtrain.data.manifest import THREADS
from sdtrain.errors import DataError
from sdtrain.io.cache import short_digest

PENDING = 64  # shards that are submitted for counting at once: a longer queue would take much memory

Wanted = Mapping[str, Sequence[str]]  # our name of a field -> the names it may have; the first one present counts


class Shard(Sized):
    """The samples of one shard that were kept, by row. `name` is its path or address."""

    name: str

    def key(self, row: int) -> str:
        """Return the name of a sample, unique in the shard."""
        raise NotImplementedError

    def read(self, row: int, names: Sequence[str] = ()) -> dict[str, bytes]:
        """Return the bytes of these fields of a sample, by default of all wanted fields.

        Raise OSError if they cannot be read.
        """
        raise NotImplementedError


class Source:
    """Numbered shards. The samples that have all wanted fields and pass the filters are kept.

    `shards` is the number of shards, `counts` the kept samples of each (-1: not counted yet). `seen` and `dropped` (by
    reason) count the samples of the shards counted so far. `cheap`: all shards can be counted without reading the data.
    `cache` is the folder for cached files, by default one in the machine's temporary folder.
    """

    def __init__(
        self, path: str, shards: int, wanted: Wanted, filters: Mapping[str, Any] | None, cheap: bool, cache: str | None
    ):
        self.path, self.wanted, self.cheap, self.cache = path, wanted, cheap, cache
        try:
            self.predicates = predicates.parse(filters)
        except predicates.PredicateError as error:
            raise DataError(f"dataset.params.{error}") from None
        self.counts = np.full(shards, -1, np.int64)
        self.seen = 0
        self.dropped: Counter[str] = Counter()

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return len(self.counts)

    @property
    def counted(self) -> int:
        """Return how many shards were counted."""
        return int((self.counts >= 0).sum())

    @property
    def kept(self) -> int:
        """Return how many samples of the counted shards were kept."""
        return int(self.counts[self.counts >= 0].sum())

    @functools.cached_property
    def folder(self) -> Path:
        """Return this dataset's folder of cached files. Raise DataError if it belongs to another user."""
        root = Path(self.cache or tempfile.gettempdir())
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.cache or root.stat().st_uid != os.getuid():  # such as /tmp
            root /= f"sdtrain-{os.getuid()}"
            root.mkdir(mode=0o700, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise DataError(f"{root}: belongs to another user; set dataset.params.cache to a folder of yours")
        return root / short_digest(self.path)

    def count(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the number of kept samples of each of these shards, int64."""
        unknown = [int(number) for number in numbers if self.counts[number] < 0]
        with ThreadPoolExecutor(THREADS) as pool:
            for begin in range(0, len(unknown), PENDING):
                some = unknown[begin : begin + PENDING]
                for number, (seen, dropped) in zip(some, pool.map(self._measure, some), strict=True):
                    self.counts[number] = seen - dropped.total()
                    self.seen += seen
                    self.dropped += dropped
        return self.counts[numbers]

    def load(self, number: int) -> Shard:
        """Open a shard: return the samples of it that are kept."""
        raise NotImplementedError

    def _measure(self, number: int) -> tuple[int, Counter[str]]:
        """Return the number of samples of a shard, and of those dropped, by reason."""
        raise NotImplementedError

    def _judge(
        self, has: dict[str, np.ndarray], metadata: pa.Table, readable: np.ndarray
    ) -> tuple[np.ndarray, Counter[str]]:
        """Return which rows are kept, bool, and the number of the others by reason.

        `has` maps a field's name to which rows have it; `readable` says which rows have metadata.
        """
        checks = {f"no {name}": rows for name, rows in has.items()}
        if self.predicates.items:
            try:
                checks |= {"no readable json": readable, "filters": self.predicates.mask(metadata)}
            except predicates.PredicateError as error:
                raise DataError(f"dataset.params.{error}") from None
        kept, dropped = np.ones(len(readable), bool), Counter[str]()
        for reason, passes in checks.items():
            if lost := int(np.count_nonzero(kept & ~passes)):
                dropped[reason] = lost
            kept &= passes
        return kept, dropped
