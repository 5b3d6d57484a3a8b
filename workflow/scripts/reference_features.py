"""Measure the held-out images that a stage's generated ones are compared with, and the floor of that comparison.

The floor is the distance of training images to the held-out ones: what a perfect memory of the training set would get.
"""

from __future__ import annotations

import json
import sys

from sdtrain import config as cf
from sdtrain import dist, evaluation, features, loader, predicates, schema, tars


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = ("train_manifest", "held_out_manifest", "resolution", "features", "filters_from", "output")
    config, own = cf.command_line(argv, schema.EvaluationConfig, __doc__, **dict.fromkeys(keys))
    expected = (cf.ConfigError, predicates.PredicateError, tars.ShardError, loader.DataError)
    try:
        measure(config, own)
    except (*expected, features.FeatureError, evaluation.EvaluationError) as error:
        raise SystemExit(f"error: {error}") from None


def measure(config, own: dict[str, str]) -> None:
    """Write mean, covariance and features of the held-out images; the floor and the counts are in the metadata."""
    resolution = evaluation.positive(own["resolution"], "resolution")
    stage = cf.require(cf.load(schema.StageConfig, own["filters_from"]), own["filters_from"]).dataset
    network = features.image_features(own["features"], dist.only_device())
    held_out = open_images(own["held_out_manifest"], stage, resolution, config.seed)
    train = open_images(own["train_manifest"], stage, resolution, config.seed)
    real, _ = evaluation.dataset_features(network, held_out, len(held_out), "held-out images")
    seen, _ = evaluation.dataset_features(network, train, config.num_images, "training images")
    mean, covariance = features.statistics(real)
    record = {
        "network": network.name,
        "metric": network.metric,
        "resolution": resolution,
        "images": len(real),
        "floor": features.frechet_distance(*features.statistics(seen), mean, covariance),
        "kernel_floor": evaluation.kernel_distance(seen, real),
        "floor_images": len(seen),
        "dropped": {"held_out": held_out.dropped, "train": train.dropped},
        "code": cf.code_digest(),
    }
    tensors = {"mean": mean, "covariance": covariance, "features": real}
    evaluation.save_tensors(own["output"], tensors, {"record": json.dumps(record)})
    print(
        f"{own['output']}: {len(real):,} held-out images at {resolution} px; floor {record['floor']:.1f} "
        f"({len(seen):,} training images)"
    )


def open_images(path: str, dataset, resolution: int, seed: int) -> loader.ImageDataset:
    """The images that the filters of a stage's `dataset` section let through, cut at the centre, not mirrored."""
    dataset = cf.held_out_dataset(dataset, path)
    dataset.params.update(resolution=resolution, crop="center")
    return loader.open_dataset(dataset, seed)


if __name__ == "__main__":
    main(sys.argv)
