"""Check manifests to the last byte: sums and sizes, whole tars, counts of samples, indices, shards that are foreign."""

from __future__ import annotations

import sys

from sdtrain.config.cli import command_line
from sdtrain.data.manifest import find_faults, read_manifest


def main(argv: list[str]) -> None:
    """Run the command: a line a manifest, or every fault and exit 1."""
    _, own = command_line(argv, None, __doc__, manifests=None)
    paths = own["manifests"].split()
    if not paths:
        raise SystemExit("error: manifests=…: name one manifest.json or more, with spaces between them")
    faults = []
    for path in paths:
        found = find_faults(path)
        if not found:
            manifest = read_manifest(path)
            size = f"{len(manifest['shards']):,} shards, {manifest['samples']:,} samples, {manifest['bytes']:,} bytes"
            print(f"{path}: whole; {size}", flush=True)
        faults += found
    if faults:
        raise SystemExit("\n".join(f"error: {fault}" for fault in faults))


if __name__ == "__main__":
    main(sys.argv)
