"""Check manifests and every byte of their shards: digests, sizes, whole tars, numbers of samples, foreign shards."""

import sys

from sdtrain.config.cli import command_line
from sdtrain.data.manifest import load_manifest
from sdtrain.data.verify import find_faults


def main(argv: list[str]) -> None:
    """Run the command: print a line a manifest, or every fault and exit with 1."""
    _, own = command_line(argv, None, __doc__, manifests=None)
    paths = own["manifests"].split()
    if not paths:
        raise SystemExit("error: manifests=…: name one manifest.json or more, separated by spaces")
    faults = []
    for path in paths:
        if found := find_faults(path):
            faults += found
            continue
        manifest = load_manifest(path)
        size = f"{len(manifest['shards']):,} shards, {manifest['samples']:,} samples, {manifest['bytes']:,} bytes"
        print(f"{path}: whole; {size}", flush=True)
    if faults:
        raise SystemExit("\n".join(f"error: {fault}" for fault in faults))


if __name__ == "__main__":
    main(sys.argv)
