"""Measure the held-out images that a stage's generated ones are compared with, and the floor of that comparison.

The floor is the distance of training images to the held-out ones: what a perfect memory of the training set would get.
"""

from __future__ import annotations

import json
import sys

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.cli import command_line, positive
from sdtrain.config.fingerprint import code_digest
from sdtrain.config.load import held_out_dataset, load_config, require
from sdtrain.data.datasets import ImageDataset, open_dataset
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.features import dataset_features, kernel_distance, save_tensors
from sdtrain.models import feature_networks


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = ("train_manifest", "held_out_manifest", "resolution", "features", "filters_from", "output")
    config, own = command_line(argv, schema.EvaluationConfig, __doc__, **dict.fromkeys(keys))
    with one_line_errors():
        measure(config, own)


def measure(config, own: dict[str, str]) -> None:
    """Write mean, covariance and features of the held-out images; the floor and the counts are in the metadata."""
    resolution = positive(own["resolution"], "resolution")
    stage = require(load_config(schema.StageConfig, own["filters_from"]), own["filters_from"]).dataset
    network = feature_networks.image_features(own["features"], distributed.only_device())
    held_out = open_images(own["held_out_manifest"], stage, resolution, config.seed)
    train = open_images(own["train_manifest"], stage, resolution, config.seed)
    real, _ = dataset_features(network, held_out, len(held_out), "held-out images")
    seen, _ = dataset_features(network, train, config.num_images, "training images")
    mean, covariance = feature_networks.statistics(real)
    record = {
        "network": network.name,
        "metric": network.metric,
        "resolution": resolution,
        "images": len(real),
        "floor": feature_networks.frechet_distance(*feature_networks.statistics(seen), mean, covariance),
        "kernel_floor": kernel_distance(seen, real),
        "floor_images": len(seen),
        "dropped": {"held_out": held_out.dropped, "train": train.dropped},
        "code": code_digest(),
    }
    tensors = {"mean": mean, "covariance": covariance, "features": real}
    save_tensors(own["output"], tensors, {"record": json.dumps(record)})
    print(
        f"{own['output']}: {len(real):,} held-out images at {resolution} px; floor {record['floor']:.1f} "
        f"({len(seen):,} training images)"
    )


def open_images(path: str, dataset, resolution: int, seed: int) -> ImageDataset:
    """The images that the filters of a stage's `dataset` section let through, cut at the centre, not mirrored."""
    dataset = held_out_dataset(dataset, path)
    dataset.params.update(resolution=resolution, crop="center")
    return open_dataset(dataset, seed)


if __name__ == "__main__":
    main(sys.argv)
