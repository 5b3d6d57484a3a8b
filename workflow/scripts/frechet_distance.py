"""Distance of a milestone's generated images to the held-out ones: Frechet distance, and kernel distance beside it."""

from __future__ import annotations

import json
import sys

from sdtrain import distributed
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.features import (
    EvaluationError,
    kernel_distance,
    load_tensors,
    read_samples,
    remake,
    sample_features,
)
from sdtrain.io.files import write_json
from sdtrain.models import feature_networks


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = ("samples", "reference", "features", "output")
    _, own = command_line(argv, None, __doc__, **dict.fromkeys(keys))
    with one_line_errors():
        record = measure(own)
    write_json(own["output"], record)
    about = f"{record['metric']} {record['value']:.1f}, floor {record['floor']:.1f}"
    print(f"{own['output']}: {about} ({record['images']:,} images)")


def measure(own: dict[str, str]) -> dict:
    """The record of both distances; raises where samples and reference differ in resolution or network."""
    samples = read_samples(own["samples"])
    tensors, about = load_tensors(own["reference"], "mean", "covariance", "features")
    reference = json.loads(about.get("record", "{}"))
    network = feature_networks.image_features(own["features"], distributed.only_device())
    for key, value in (("network", network.name), ("resolution", samples["resolution"])):
        if reference.get(key) != value:
            raise EvaluationError(
                f"{own['reference']}: {key} is {reference.get(key)!r} and the samples' is {value!r}: they cannot be "
                f"compared; {remake(own['reference'])}"
            )
    made = sample_features(network, samples, "generated images")
    value = feature_networks.frechet_distance(
        *feature_networks.statistics(made), tensors["mean"], tensors["covariance"]
    )
    kernel = "KID" if network.metric == "FID" else network.metric.replace("Frechet", "kernel")
    return {
        "metric": network.metric,
        "value": value,
        "floor": reference["floor"],
        "images": len(made),
        "floor_images": reference["floor_images"],
        "reference_images": reference["images"],
        "resolution": samples["resolution"],
        "kernel": {
            "metric": kernel,
            "value": kernel_distance(made, tensors["features"]),
            "floor": reference["kernel_floor"],
        },
        "code": code_digest(),
    }


if __name__ == "__main__":
    main(sys.argv)
