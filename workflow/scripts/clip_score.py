"""Score generated images with their own captions, and with those of other images.

The score is CLIPScore if `model` is the folder of a CLIP model, and an alignment score if it is a fitted alignment.
Then `features` and `text` name the folders of the networks that it was fitted with.
"""

import sys

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.alignment import measure_score, open_scorer
from sdtrain.io.files import write_json


def main(argv: list[str]) -> None:
    """Run the command."""
    required = dict.fromkeys(("samples", "model", "output"))
    config, own = command_line(argv, schema.EvaluationConfig, __doc__, **required, features="", text="")
    with one_line_errors():
        scorer = open_scorer(own["model"], own["features"], own["text"])
        record = measure_score(own["samples"], scorer, config.seed)
        write_json(own["output"], record)
    print(f"{own['output']}: {record['metric']} {record['value']:.1f} matched, {record['shuffled']:.1f} shuffled")


if __name__ == "__main__":
    main(sys.argv)
