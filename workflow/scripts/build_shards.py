"""Download one part of a selection's images into WebDataset shards with img2dataset, and write their manifest."""

import signal
import sys
from pathlib import Path

from sdtrain.config import schema_data
from sdtrain.config.cli import command_line
from sdtrain.data.build import build_shards
from sdtrain.data.manifest import read_part, summary
from sdtrain.errors import one_line_errors


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = command_line(
        argv, schema_data.ShardsConfig, __doc__, selection=None, part="0", parts="1", output=None
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that img2dataset is ended too
    with one_line_errors():
        part, parts = read_part(own["part"], own["parts"])
        manifest = build_shards(config, own["selection"], part, parts, Path(own["output"]))
    print(f"{own['output']}: {summary(manifest)}, {sum(manifest['dropped'].values()):,} dropped")


if __name__ == "__main__":
    main(sys.argv)
