"""Show what a selection keeps: the yield of each filter, the expected download and the number of shards.

yields= is what select_samples wrote, or the manifest of shards that existed.
"""

from __future__ import annotations

import sys

from sdtrain.config.cli import command_line
from sdtrain.data.tables import show, show_shards
from sdtrain.errors import ConfigError
from sdtrain.io.files import read_json


def main(argv: list[str]) -> None:
    """Run the command."""
    _, own = command_line(argv, None, __doc__, yields=None, samples_per_shard=None, parts=None)
    try:
        size, parts = (positive(own, key) for key in ("samples_per_shard", "parts"))
        result = read_json(own["yields"])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    if "shards" in result:  # a manifest: what is kept is there already
        print(f"{show_shards(result)}\nshards: {len(result['shards']):,}")
        return
    train, held_out = count_shards(result["train"], size, parts), count_shards(result["held_out"], size, 1)
    print(show(result))
    several = f" in {parts} parts" if parts > 1 else ""
    print(f"shards of {size:,}{several}: train {train:,}, held out {held_out:,}")


def positive(own: dict[str, str], key: str) -> int:
    """The argument as a whole number above 0. Raises ConfigError for anything else."""
    if not own[key].isdecimal() or not int(own[key]):
        raise ConfigError(f"{key}: {own[key]!r} is not a whole number above 0")
    return int(own[key])


def count_shards(rows: int, size: int, parts: int) -> int:
    """Shards of `size` rows when each of `parts` equal parts ends with a shard of its own."""
    edges = [part * rows // parts for part in range(parts + 1)]
    return sum(-((begin - end) // size) for begin, end in zip(edges, edges[1:], strict=False))


if __name__ == "__main__":
    main(sys.argv)
