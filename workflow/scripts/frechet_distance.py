"""Distance of a milestone's generated images to the held-out ones: Frechet distance, and kernel distance beside it."""

from __future__ import annotations

import json
import sys

from sdtrain import config as cf
from sdtrain import dist, evaluation, features


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = ("samples", "reference", "features", "output")
    _, own = cf.command_line(argv, None, __doc__, **dict.fromkeys(keys))
    try:
        record = measure(own)
    except (cf.ConfigError, features.FeatureError, evaluation.EvaluationError) as error:
        raise SystemExit(f"error: {error}") from None
    cf.write_json(own["output"], record)
    about = f"{record['metric']} {record['value']:.1f}, floor {record['floor']:.1f}"
    print(f"{own['output']}: {about} ({record['images']:,} images)")


def measure(own: dict[str, str]) -> dict:
    """The record of both distances; raises where samples and reference differ in resolution or network."""
    samples = evaluation.read_samples(own["samples"])
    tensors, about = evaluation.load_tensors(own["reference"], "mean", "covariance", "features")
    reference = json.loads(about.get("record", "{}"))
    network = features.image_features(own["features"], dist.only_device())
    for key, value in (("network", network.name), ("resolution", samples["resolution"])):
        if reference.get(key) != value:
            raise evaluation.EvaluationError(
                f"{own['reference']}: {key} is {reference.get(key)!r} and the samples' is {value!r}: they cannot be "
                f"compared; {evaluation.remake(own['reference'])}"
            )
    made = evaluation.sample_features(network, samples, "generated images")
    value = features.frechet_distance(*features.statistics(made), tensors["mean"], tensors["covariance"])
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
            "value": evaluation.kernel_distance(made, tensors["features"]),
            "floor": reference["kernel_floor"],
        },
        "code": cf.code_digest(),
    }


if __name__ == "__main__":
    main(sys.argv)
