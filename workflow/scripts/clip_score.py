"""How well generated images go with their captions, beside the same images with each other's captions.

CLIPScore where `model` is a CLIP model's folder; an alignment score where it is a fitted alignment (then `features` and
`text` name the folders of the networks it was fitted with).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.features import EvaluationError, caption_scores, load_tensors, read_samples, sample_features
from sdtrain.io.files import write_json
from sdtrain.models import feature_networks

TEXT_BATCH = 64


def main(argv: list[str]) -> None:
    """Run the command."""
    required = dict.fromkeys(("samples", "model", "output"))
    config, own = command_line(argv, schema.EvaluationConfig, __doc__, **required, features="", text="")
    with one_line_errors():
        record = measure(config, own)
    write_json(own["output"], record)
    print(f"{own['output']}: {record['metric']} {record['value']:.1f} matched, {record['shuffled']:.1f} shuffled")


def measure(config, own: dict[str, str]) -> dict:
    """The record of the score with matched and with shuffled captions."""
    samples = read_samples(own["samples"])
    about, network, embed_text, score = open_alignment(own) if own["model"].endswith(".safetensors") else open_clip(own)
    images = sample_features(network, samples, "generated images")
    texts = embed_text(samples["prompts"])
    scores = caption_scores(score, images, texts, samples["prompts"], config.seed)
    return {**about, **scores, "images": len(images), "resolution": samples["resolution"], "code": code_digest()}


def open_clip(own: dict[str, str]):
    """Name, image network, text network and pairwise score of a CLIP model."""
    scorer = feature_networks.ClipScorer(own["model"], distributed.only_device())

    def embed_text(captions: list[str]) -> torch.Tensor:
        batches = [captions[i : i + TEXT_BATCH] for i in range(0, len(captions), TEXT_BATCH)]
        return torch.cat([scorer.text_embeds(batch).cpu() for batch in batches])

    return {"metric": scorer.name}, scorer.image_embeds, embed_text, feature_networks.clip_score


def open_alignment(own: dict[str, str]):
    """The same of a fitted alignment, with its scores on real held-out images."""
    alignment = feature_networks.LinearAlignment.load(own["model"])
    _, about = load_tensors(own["model"])
    if not (own["features"] and own["text"]):
        raise EvaluationError(f"{own['model']}: a fitted alignment needs features=… and text=… folders")
    network = feature_networks.image_features(own["features"], distributed.only_device())
    for key, fitted, given in (
        ("features", alignment.image_network, network.name),
        ("text", alignment.text_encoder, Path(own["text"]).name),
    ):
        if fitted != given:
            raise EvaluationError(f"{own['model']}: fitted with {fitted}, but {key}={own[key]} is {given}")
    facts = {"metric": alignment.name, "real": json.loads(about.get("held_out", "null"))}
    return facts, network, lambda captions: feature_networks.text_embeddings(own["text"], captions), alignment.score


if __name__ == "__main__":
    main(sys.argv)
