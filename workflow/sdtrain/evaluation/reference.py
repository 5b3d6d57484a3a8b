"""The step reference_features: features of the held-out images of a stage, and the floor of each distance to them."""

from __future__ import annotations

from typing import Any

import torch

from sdtrain import distributed
from sdtrain.config.fingerprint import code_digest
from sdtrain.config.load import held_out_dataset
from sdtrain.data.datasets import PositionDataset, open_dataset
from sdtrain.evaluation.features import dataset_features
from sdtrain.evaluation.metrics import DISTANCES, FeatureSet
from sdtrain.models.feature_networks import image_features


def measure_reference(
    config: Any, dataset: Any, train_manifest: str, held_out_manifest: str, resolution: int, features: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of the held-out images, and the record with the floor of every distance.

    A floor is the distance of training images to the held-out ones: that of a model that reproduces its training set.
    `dataset` is the section of a stage; its filters apply.
    """
    network = image_features(features, distributed.only_device())
    held_out = _open_images(held_out_manifest, dataset, resolution, config.seed)
    train = _open_images(train_manifest, dataset, resolution, config.seed)
    real = FeatureSet(dataset_features(network, held_out, len(held_out), "held-out images")[0])
    seen = FeatureSet(dataset_features(network, train, config.num_images, "training images")[0])
    record = {
        "network": network.name,
        "metric": DISTANCES[0].name(network.name),
        "resolution": resolution,
        "images": len(real.features),
        **{distance.floor: distance.measure(seen, real) for distance in DISTANCES},
        "floor_images": len(seen.features),
        "dropped": {"held_out": held_out.dropped, "train": train.dropped},
        "code": code_digest(),
    }
    mean, covariance = real.statistics
    return {"mean": mean, "covariance": covariance, "features": real.features}, record


def _open_images(path: str, dataset: Any, resolution: int, seed: int) -> PositionDataset:
    """Open the images that the filters of a `dataset` section accept, centre-cropped and not mirrored."""
    dataset = held_out_dataset(dataset, path)
    dataset.params.update(resolution=resolution, crop="center")
    return open_dataset(dataset, seed)
