"""Gather the manifests of all parts of a dataset's shards into one."""

from __future__ import annotations

import sys

from sdtrain.config.cli import command_line
from sdtrain.data.manifest import gather_manifests, read_part
from sdtrain.data.tars import ShardError


def main(argv: list[str]) -> None:
    """Run the command."""
    _, own = command_line(argv, None, __doc__, folder=None, parts="1", output=None)
    try:
        _, parts = read_part("0", own["parts"])
        paths = [f"{own['folder']}/{part}-of-{parts}.json" for part in range(parts)]
        manifest = gather_manifests(paths, own["output"])
    except ShardError as error:
        raise SystemExit(f"error: {error}") from None
    size = f"{len(manifest['shards']):,} shards, {manifest['samples']:,} samples, {manifest['bytes'] / 1e6:,.1f} MB"
    print(f"{own['output']}: {size}, {sum(manifest['dropped'].values()):,} dropped")


if __name__ == "__main__":
    main(sys.argv)
