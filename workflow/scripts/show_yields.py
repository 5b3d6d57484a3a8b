"""Show what a selection keeps: the yield of each filter, the expected download and the number of shards.

yields= is a file that select_samples wrote, or the manifest of existing shards.
"""

import sys

from sdtrain.config.cli import command_line, positive
from sdtrain.data.yields import show_yields
from sdtrain.errors import one_line_errors
from sdtrain.io.files import read_json


def main(argv: list[str]) -> None:
    """Run the command."""
    _, own = command_line(argv, None, __doc__, yields=None, samples_per_shard=None, parts=None)
    with one_line_errors():
        samples_per_shard, parts = (positive(own[key], key) for key in ("samples_per_shard", "parts"))
        print(show_yields(read_json(own["yields"]), samples_per_shard, parts))


if __name__ == "__main__":
    main(sys.argv)
