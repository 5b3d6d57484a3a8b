"""Measure a metric of a milestone's generated images, such as metric=frechet_distance or metric=clip_score.

`network` is the folder of its network, or a fitted alignment; then `features` and `text` are the folders of the
networks that it was fitted with. `reference` is the file of reference features, for a metric that compares with them.
"""

import sys

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.features import read_samples
from sdtrain.evaluation.registry import metric_of
from sdtrain.io.files import write_json


def main(argv: list[str]) -> None:
    """Run the command."""
    required = dict.fromkeys(("metric", "samples", "network", "output"))
    optional = dict.fromkeys(("reference", "features", "text"), "")
    config, own = command_line(argv, schema.EvaluationConfig, __doc__, **required, **optional)
    with one_line_errors():
        metric = metric_of(own["metric"])
        samples = read_samples(own["samples"])
        record = metric.measure(samples, own, config)
        record |= {"images": samples["images"], "resolution": samples["resolution"], "code": code_digest()}
        write_json(own["output"], record)
    print(f"{own['output']}: {record['metric']} {record['value']:.1f} {metric.note.format(**record)}")


if __name__ == "__main__":
    main(sys.argv)
