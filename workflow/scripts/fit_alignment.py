"""Fit a linear map from image features to caption embeddings on the training images; test it on the held-out ones.

It stands in for a CLIP model where there is none; what it gives is called an alignment score, never CLIPScore.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sdtrain import distributed
from sdtrain.config.cli import command_line, positive
from sdtrain.config.fingerprint import code_digest
from sdtrain.data.datasets import ImageDataset
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.features import (
    caption_scores,
    dataset_features,
    load_tensors,
    save_tensors,
)
from sdtrain.models import feature_networks


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = ("features", "text", "manifest", "held_out", "output")
    _, own = command_line(argv, None, __doc__, **dict.fromkeys(keys), resolution="128")
    with one_line_errors():
        fit(own)


def fit(own: dict[str, str]) -> None:
    """Write the alignment; the metadata tell how well it does on the held-out images."""
    network, output = feature_networks.image_features(own["features"], distributed.only_device()), Path(own["output"])
    resolution = positive(own["resolution"], "resolution")

    def embed(manifest: str, label: str):
        dataset = ImageDataset(manifest, resolution)
        images, captions = dataset_features(network, dataset, len(dataset), label)
        return images, feature_networks.text_embeddings(own["text"], captions), captions

    images, texts, _ = embed(own["manifest"], "training images")
    held_out = embed(own["held_out"], "held-out images")
    alignment = feature_networks.LinearAlignment.fit(images, texts, network.name, Path(own["text"]).name)
    record = caption_scores(alignment.score, *held_out, seed=0)
    record |= {"images": len(held_out[0]), "retrieval": alignment.retrieval(*held_out[:2]), "resolution": resolution}
    alignment.save(output)
    tensors, about = load_tensors(output)
    save_tensors(output, tensors, about | {"held_out": json.dumps(record), "code": code_digest()})
    print(
        f"{output}: {alignment.name}, fitted on {len(images):,} images; on {record['images']:,} held-out ones R@1 "
        f"{record['retrieval']:.2f}, score {record['value']:.1f} matched, {record['shuffled']:.1f} shuffled"
    )


if __name__ == "__main__":
    main(sys.argv)
