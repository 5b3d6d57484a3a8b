"""The metric frechet_distance: every distance of DISTANCES between generated and held-out images."""

from __future__ import annotations

import json
from typing import Any

from sdtrain import distributed
from sdtrain.evaluation.features import load_tensors, remake, sample_features
from sdtrain.evaluation.metrics import DISTANCES, FeatureSet
from sdtrain.models.feature_networks import FeatureError, image_features


def measure(samples: dict[str, Any], given: dict[str, str], config: Any) -> dict[str, Any]:
    """Return the record. Raise FeatureError if samples and reference cannot be compared.

    `given`: `network`, the folder of an image network, and `reference`, the file of the step reference_features.
    """
    tensors, about = load_tensors(given["reference"], "mean", "covariance", "features")
    reference = json.loads(about.get("record", "{}"))
    network = image_features(given["network"], distributed.only_device())
    for key, value in (("network", network.name), ("resolution", samples["resolution"])):
        if reference.get(key) != value:
            raise FeatureError(
                f"{given['reference']}: {key} is {reference.get(key)!r} and the samples' is {value!r}: they cannot be "
                f"compared; {remake(given['reference'])}"
            )
    if missing := [distance.floor for distance in DISTANCES if distance.floor not in reference]:
        raise FeatureError(f"{given['reference']}: lacks {', '.join(missing)}; {remake(given['reference'])}")
    made = FeatureSet(sample_features(network, samples, "generated images"))
    real = FeatureSet(tensors["features"], (tensors["mean"], tensors["covariance"]))
    first, *others = (
        {
            "metric": distance.name(network.name),
            "value": distance.measure(made, real),
            "floor": reference[distance.floor],
        }
        for distance in DISTANCES
    )
    return {
        **first,
        "floor_images": reference["floor_images"],
        "reference_images": reference["images"],
        **{distance.key: figures for distance, figures in zip(DISTANCES[1:], others, strict=True)},
    }
