"""The metric clip_score: CLIPScore, or the score of a fitted linear alignment if there is no CLIP model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdtrain import distributed
from sdtrain.evaluation.alignment import LinearAlignment
from sdtrain.evaluation.features import sample_features
from sdtrain.evaluation.metrics import caption_scores, clip_score
from sdtrain.models.feature_networks import ClipModel, FeatureError, image_features, text_embeddings

TEXT_BATCH = 64


@dataclass(frozen=True)
class Scorer:
    """Two networks that embed images and captions, and the function that scores each pair of embeddings."""

    metric: str  # the name that reports show
    embed_images: Callable[[torch.Tensor], torch.Tensor]
    embed_texts: Callable[[list[str]], torch.Tensor]
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)  # further keys of the record


def measure(samples: dict[str, Any], given: dict[str, str], config: Any) -> dict[str, Any]:
    """Return the record: the score of generated images with their own captions, and with shuffled ones.

    `given`: `network`, the folder of a CLIP model; or the file of a fitted alignment, with `features` and `text`, the
    folders of the networks that it was fitted with.
    """
    scorer = open_scorer(given["network"], given["features"], given["text"])
    images = sample_features(scorer.embed_images, samples, "generated images")
    texts = scorer.embed_texts(samples["prompts"])
    scores = caption_scores(scorer.score, images, texts, samples["prompts"], config.seed)
    return {"metric": scorer.metric, **scorer.facts, **scores}


def open_scorer(network: str, features: str = "", text: str = "") -> Scorer:
    """Load a CLIP model's folder, or a fitted alignment with the folders of the networks that it was fitted with."""
    if network.endswith(".safetensors"):
        return _open_alignment(network, features, text)
    clip = ClipModel(network, distributed.only_device())

    def embed_texts(captions: list[str]) -> torch.Tensor:
        batches = [captions[i : i + TEXT_BATCH] for i in range(0, len(captions), TEXT_BATCH)]
        return torch.cat([clip.text_embeds(batch).cpu() for batch in batches])

    return Scorer(f"CLIPScore ({Path(network).name})", clip.image_embeds, embed_texts, clip_score)


def _open_alignment(path: str, features: str, text: str) -> Scorer:
    alignment, about = LinearAlignment.load(path)
    if not (features and text):
        raise FeatureError(f"{path}: a fitted alignment needs features=… and text=… folders")
    network = image_features(features, distributed.only_device())
    for key, value, fitted, given in (
        ("features", features, alignment.image_network, network.name),
        ("text", text, alignment.text_encoder, Path(text).name),
    ):
        if fitted != given:
            raise FeatureError(f"{path}: fitted with {fitted}, but {key}={value} is {given}")
    facts = {"real": json.loads(about.get("held_out", "null"))}
    return Scorer(alignment.name, network, functools.partial(text_embeddings, text), alignment.score, facts)
