"""Gather the manifests of all partitions of a dataset's shards into one."""

import sys

from sdtrain.config.cli import command_line, positive
from sdtrain.data.manifest import gather_manifests, summary
from sdtrain.errors import one_line_errors


def main(argv: list[str]) -> None:
    """Run the command."""
    _, own = command_line(argv, None, __doc__, folder=None, parts="1", output=None)
    with one_line_errors():
        parts = positive(own["parts"], "parts")
        paths = [f"{own['folder']}/{part}-of-{parts}.json" for part in range(parts)]
        manifest = gather_manifests(paths, own["output"])
        print(f"{own['output']}: {summary(manifest)}, {sum(manifest['dropped'].values()):,} dropped")


if __name__ == "__main__":
    main(sys.argv)
