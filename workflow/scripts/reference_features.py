"""Measure the held-out images that a stage's generated ones are compared with, and the floor of each distance.

The floor is the distance of training images to the held-out ones; a model that reproduces its training set reaches it.
"""

import json
import sys

from sdtrain.config import schema
from sdtrain.config.cli import command_line, positive
from sdtrain.config.load import load_config, require
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.features import save_tensors
from sdtrain.evaluation.reference import measure_reference


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = ("train_manifest", "held_out_manifest", "resolution", "features", "filters_from", "output")
    config, own = command_line(argv, schema.EvaluationConfig, __doc__, **dict.fromkeys(keys))
    with one_line_errors():
        resolution = positive(own["resolution"], "resolution")
        dataset = require(load_config(schema.StageConfig, own["filters_from"]), own["filters_from"]).dataset
        manifests = own["train_manifest"], own["held_out_manifest"]
        tensors, record = measure_reference(config, dataset, *manifests, resolution, own["features"])
        save_tensors(own["output"], tensors, {"record": json.dumps(record)})
    print(
        f"{own['output']}: {record['images']:,} held-out images at {resolution} px; floor {record['floor']:.1f} "
        f"({record['floor_images']:,} training images)"
    )


if __name__ == "__main__":
    main(sys.argv)
