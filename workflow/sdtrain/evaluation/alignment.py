"""The step fit_alignment: a linear map from image features to caption embeddings, for runs without a CLIP model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sdtrain import distributed
from sdtrain.data.datasets import ImageDataset
from sdtrain.evaluation.features import dataset_features, load_tensors, save_tensors
from sdtrain.evaluation.metrics import caption_scores
from sdtrain.models import feature_networks
from sdtrain.models.feature_networks import FeatureError, paired_cosine

TENSORS = ("weight", "mean", "scale", "text_mean")


@dataclass(frozen=True)
class LinearAlignment:
    """A linear map from image features to text embeddings, a substitute for a CLIP model; its score is not CLIPScore.

    It is a ridge regression of centred unit text embeddings on standardized features. The mean caption is subtracted
    from both prediction and caption, so that an unspecific or a shuffled caption scores about 0.
    """

    image_network: str  # such as EfficientNet-Lite0
    text_encoder: str  # such as MiniLM
    weight: torch.Tensor  # D x E
    mean: torch.Tensor  # D, of the features
    scale: torch.Tensor  # D
    text_mean: torch.Tensor  # E
    penalty: float  # of the ridge, per image

    @property
    def name(self) -> str:
        """Return the name of the score in reports."""
        return f"alignment score ({self.image_network} to {self.text_encoder})"

    @classmethod
    def fit(cls, features: torch.Tensor, text: torch.Tensor, image_network: str, text_encoder: str) -> LinearAlignment:
        """Fit on features N x D and embeddings N x E, with the penalty of the least leave-one-out error (closed form).

        See Hoerl and Kennard (1970); for the residuals r_i / (1 - h_ii) see Hastie et al., The Elements of
        Statistical Learning, section 7.10.
        """
        if features.ndim != 2 or text.ndim != 2 or len(features) != len(text) or len(features) < 3:
            raise FeatureError(
                f"features {tuple(features.shape)}, text {tuple(text.shape)}: (N, D), (N, E) and N >= 3 expected"
            )
        features, text = features.double(), F.normalize(text.double(), dim=-1)
        mean, text_mean = features.mean(0), text.mean(0)
        scale = features.std(0)
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)  # a constant feature carries no information
        u, s, vh = torch.linalg.svd((features - mean) / scale, full_matrices=False)
        penalty = min(torch.logspace(-4, 4, 33).tolist(), key=lambda p: leave_one_out(u, s, text - text_mean, p))
        shrink = s / (s**2 + penalty * len(features))
        weight = vh.T @ (shrink[:, None] * (u.T @ (text - text_mean)))
        weight, mean, scale, text_mean = (t.float() for t in (weight, mean, scale, text_mean))
        return cls(image_network, text_encoder, weight, mean, scale, text_mean, penalty)

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Return the predicted caption embeddings minus their mean, N x D -> N x E."""
        if features.shape[1:] != self.mean.shape:
            raise FeatureError(f"features {tuple(features.shape)}: expected features of width {len(self.mean)}")
        return ((features.float() - self.mean) / self.scale) @ self.weight

    def score(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return 100 cos of each image's prediction with its caption, N in -100..100, about 0 for unrelated pairs."""
        return 100 * paired_cosine(self.predict(features), self.centred(text))

    def retrieval(self, features: torch.Tensor, text: torch.Tensor) -> float:
        """Return R@1: the fraction of images whose own caption is the nearest of all N (chance: 1 / N)."""
        if len(features) != len(text):
            raise FeatureError(f"{len(features)} images and {len(text)} captions: one caption per image is expected")
        image, text = (F.normalize(t, dim=-1) for t in (self.predict(features), self.centred(text)))
        similarity = image @ text.T
        return (similarity.diagonal() >= similarity.max(1).values).float().mean().item()

    def centred(self, text: torch.Tensor) -> torch.Tensor:
        """Return unit caption embeddings minus their mean over the images of the fit."""
        return F.normalize(text.float(), dim=-1) - self.text_mean

    def save(self, path: str | Path, about: dict[str, str]) -> None:
        """Write a safetensors file atomically, with `about` as further metadata."""
        tensors = {key: getattr(self, key) for key in TENSORS}
        own = {"image_network": self.image_network, "text_encoder": self.text_encoder, "penalty": repr(self.penalty)}
        save_tensors(path, tensors, own | about)

    @classmethod
    def load(cls, path: str | Path) -> tuple[LinearAlignment, dict[str, str]]:
        """Return what `save` wrote, and the metadata. Raise FeatureError if the file is something else."""
        try:
            tensors, about = load_tensors(path, *TENSORS)
            networks, penalty = (about["image_network"], about["text_encoder"]), float(about["penalty"])
            weight, mean, scale, text_mean = tensors.values()
        except (FeatureError, KeyError) as error:
            raise FeatureError(f"{path}: not a fitted alignment ({error}); fit it again") from None
        return cls(*networks, weight, mean, scale, text_mean, penalty), about


def leave_one_out(u: torch.Tensor, s: torch.Tensor, target: torch.Tensor, penalty: float) -> float:
    """Return the mean squared leave-one-out error of a ridge with a free intercept, from the SVD of its centred inputs.

    `u` is N x K, `s` K, the centred `target` N x E; the penalty is per row.
    """
    gain = s**2 / (s**2 + penalty * len(u))
    residual = target - u @ (gain[:, None] * (u.T @ target))
    leverage = 1 / len(u) + (u**2) @ gain
    return (residual / (1 - leverage).clamp(min=1e-12)[:, None]).square().mean().item()


# ---------------------------------------------------------------- the step fit_alignment
def fit_alignment(
    features: str, text: str, manifest: str, held_out: str, resolution: int
) -> tuple[LinearAlignment, int, dict[str, Any]]:
    """Fit an alignment on the training images. Return it, their number, and its record on the held-out images."""
    network = feature_networks.image_features(features, distributed.only_device())

    def embed(path: str, label: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        dataset = ImageDataset(path, resolution)
        images, captions = dataset_features(network, dataset, len(dataset), label)
        return images, feature_networks.text_embeddings(text, captions), captions

    images, texts, _ = embed(manifest, "training images")
    unseen = embed(held_out, "held-out images")
    alignment = LinearAlignment.fit(images, texts, network.name, Path(text).name)
    record: dict[str, Any] = caption_scores(alignment.score, *unseen, seed=0)
    record |= {"images": len(unseen[0]), "retrieval": alignment.retrieval(*unseen[:2]), "resolution": resolution}
    return alignment, len(images), record
