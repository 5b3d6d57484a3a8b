"""Measure the distances of a milestone's generated images to the held-out ones: Frechet distance, kernel distance."""

import sys

from sdtrain.config.cli import command_line
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.distances import measure_distances
from sdtrain.io.files import write_json


def main(argv: list[str]) -> None:
    """Run the command."""
    _, own = command_line(argv, None, __doc__, **dict.fromkeys(("samples", "reference", "features", "output")))
    with one_line_errors():
        record = measure_distances(own["samples"], own["reference"], own["features"])
        write_json(own["output"], record)
    about = f"{record['metric']} {record['value']:.1f}, floor {record['floor']:.1f}"
    print(f"{own['output']}: {about} ({record['images']:,} images)")


if __name__ == "__main__":
    main(sys.argv)
