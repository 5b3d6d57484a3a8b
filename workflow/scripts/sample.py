"""Generate the images of a milestone for the metrics and the report: one seed per prompt, PNGs and grids."""

import sys
from pathlib import Path

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.load import load_config, require
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.sampling import sample
from sdtrain.io.files import read_json, write_json


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = dict.fromkeys(("stage", "trained", "held_out", "output"))
    settings, own = command_line(argv, schema.EvaluationConfig, __doc__, **keys)
    with one_line_errors():
        stage = require(load_config(schema.StageConfig, own["stage"]), own["stage"])
        record = sample(settings, stage, read_json(own["trained"]), own["held_out"], Path(own["output"]))
        write_json(own["output"], record)
    print(f"{own['output']}: {record['images']} images, grids {', '.join(g['image'] for g in record['grids'])}")


if __name__ == "__main__":
    main(sys.argv)
