"""Index one partition of existing shards where they are, and write their manifest."""

import sys

from sdtrain.config import schema_data
from sdtrain.config.cli import command_line
from sdtrain.data.manifest import read_part, summary
from sdtrain.data.reshard import index_shards
from sdtrain.errors import one_line_errors


def main(argv: list[str]) -> None:
    """Run the command."""
    defaults = {"split": "train", "part": "0", "parts": "1", "output": None}
    config, own = command_line(argv, schema_data.ExistingShardsConfig, __doc__, **defaults)
    with one_line_errors():
        part, parts = read_part(own["part"], own["parts"])
        manifest = index_shards(config, own["split"], part, parts, own["output"])
        print(f"{own['output']}: {summary(manifest)}")


if __name__ == "__main__":
    main(sys.argv)
