"""Adopt shards that exist, where they are: index one part of them and write its manifest."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.load import check_existing
from sdtrain.data.manifest import find_shards, move_rows, read_part, write_manifest, write_rows
from sdtrain.data.tars import ShardError
from sdtrain.errors import ConfigError


def main(argv: list[str]) -> None:
    """Run the command."""
    defaults = {"split": "train", "part": "0", "parts": "1", "output": None}
    config, own = command_line(argv, schema.ExistingShardsConfig, __doc__, **defaults)
    try:
        manifest = index(config, own["split"], *read_part(own["part"], own["parts"]), own["output"])
    except (ConfigError, ShardError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    size = f"{len(manifest['shards']):,} shards, {manifest['samples']:,} samples, {manifest['bytes'] / 1e6:,.1f} MB"
    print(f"{own['output']}: {size}")


def index(config: DictConfig, split: str, part: int, parts: int, output: str) -> dict:
    """Write the manifest of one part's run of the shards. Those that a manifest describes are not read again.

    Raises ConfigError for what cannot be chosen of shards, ShardError for a split without shards and for a shard that
    is not whole.
    """
    check_existing(config.select)
    path = config.path if split == "train" else config.held_out_path
    if not path:
        raise ShardError(
            "shards.held_out_path: name the shards that the metrics compare with, such as a validation set"
        )
    found = find_shards(path, part, parts)
    made_by = {"path": path}  # without the part: the indices of all parts lie together
    if all(row["index_path"] for row in found["shards"]):
        return write_rows(output, found["kind"], move_rows(found["shards"], Path(output).parent), {}, made_by, {})
    return write_manifest(output, found["kind"], [row["path"] for row in found["shards"]], {}, made_by)


if __name__ == "__main__":
    main(sys.argv)
