"""The arithmetic of the metrics: distances between sets of features, and scores of images with their captions.

A metric is named after its network: only the Frechet distance of Inception features is FID, and only the score of a
CLIP model is CLIPScore.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sdtrain.models.feature_networks import INCEPTION_NAME, FeatureError, paired_cosine

SHUFFLES = 20
PAIRED = 5000  # images per set of a kernel distance at most, since the kernels of all pairs are in memory


# ---------------------------------------------------------------- distances between sets of features
def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean D and covariance D x D (n - 1 in the denominator), float64, of features N x D, N >= 2."""
    if features.ndim != 2 or len(features) < 2:
        raise FeatureError(f"features are {tuple(features.shape)}: a covariance needs at least 2 rows (N, D)")
    if not torch.isfinite(features).all():
        raise FeatureError("features contain NaN or infinity: check the images, and the weights that made them")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def frechet_distance(mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) >= 0.

    See Dowson and Landau (1982); FID is this distance of Inception features (Heusel et al. 2017). The trace of the root
    is the sum of the root eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), which are real even if the covariances are
    singular because there are fewer images than features.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(t).double() for t in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise FeatureError(f"features {len(mu1)} and {len(mu2)} wide: both sets must come from the same network")
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ sigma2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(0.0, distance.item())


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the unbiased squared MMD of features N x D and M x D with the kernel (a.b / D + 1)^3; it may be negative.

    This is the KID of Binkowski et al. (2018) over all pairs; its expectation does not depend on N and M.
    """
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise FeatureError(f"features {tuple(x.shape)} and {tuple(y.shape)}: same width and at least 2 rows expected")
    x, y = x.double(), y.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: torch.Tensor) -> torch.Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


# ---------------------------------------------------------------- the registry of distances
class FeatureSet:
    """Features N x D of a set of images, with their statistics, which are computed when first used."""

    def __init__(self, features: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor] | None = None):
        self.features = features
        if statistics is not None:
            self.statistics = statistics

    @cached_property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance."""
        return statistics(self.features)


@dataclass(frozen=True)
class FeatureDistance:
    """A distance of generated images to held-out ones in the features of a network. Its floor: that of training images.

    The first one of DISTANCES is the value of frechet_distance.json; each further one is the block `key` beside it.
    """

    key: str
    measure: Callable[[FeatureSet, FeatureSet], float]
    kind: str  # its name without the network
    inception: str  # its name with the Inception network of FID
    about: str  # explanation in the report, a format string over the keys of the record
    scale: int = 1  # factor of the figures in the report
    arrow: str = "↓"  # ↓ if lower is better, else ↑

    def name(self, network: str) -> str:
        """Return the name that reports show, such as `FID` or `Frechet distance (EfficientNet-Lite0)`."""
        return self.inception if network == INCEPTION_NAME else f"{self.kind} ({network})"

    @property
    def floor(self) -> str:
        """The key of its floor in the record of the reference features."""
        return f"{self.key}_floor" if self.key else "floor"


DISTANCES = (
    FeatureDistance(
        key="",
        measure=lambda a, b: frechet_distance(*a.statistics, *b.statistics),
        kind="Frechet distance",
        inception="FID",
        about="How far the features of n generated images lie, in mean and covariance, from those of "
        "{reference_images:,} real images that were held out of training. It shrinks as n grows and differs between "
        "resolutions: compare only rows with the same resolution and the same n.",
    ),
    FeatureDistance(
        key="kernel",
        # it is unbiased, so fewer rows only add noise
        measure=lambda a, b: kernel_distance(a.features[:PAIRED], b.features[:PAIRED]),
        kind="kernel distance",
        inception="KID",
        about="The squared maximum mean discrepancy of the same features; its expectation does not depend on n.",
        scale=1000,
    ),
)


# ---------------------------------------------------------------- scores of images with captions
def clip_score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Return 100 max(cos, 0) of each pair of rows, N x E and N x E -> N.

    See Hessel et al. (2021); the factor 100, usual for text-to-image models, replaces their 2.5.
    """
    return 100 * paired_cosine(image_embeds, text_embeds).clamp(min=0)


def caption_scores(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    texts: torch.Tensor,
    captions: list[str],
    seed: int,
) -> dict[str, float]:
    """Return the mean score of images (N x D) with their own captions, and with captions of other images.

    `score` maps N x D and N x E to N. `shuffled` is the mean over SHUFFLES permutations, `shuffled_standard_error` its
    standard error. `difference` is the mean advantage of an image's own caption; its error is that of N images.
    """
    matched = score(images, texts).double()
    orders = [shuffle(captions, seed + i) for i in range(SHUFFLES)]
    shuffled = torch.stack([score(images, texts[order]).double() for order in orders])
    difference = matched - shuffled.mean(0)
    return {
        "value": matched.mean().item(),
        "shuffled": shuffled.mean().item(),
        "shuffled_standard_error": standard_error(shuffled.mean(1)),
        "difference": difference.mean().item(),
        "difference_standard_error": standard_error(difference),
    }


def shuffle(captions: list[str], seed: int) -> torch.Tensor:
    """Return a random permutation, int64 N, that gives no image a caption equal to its own.

    Images are put in random order, grouped by caption. Each takes the caption k places later, where k is the number of
    images of the most frequent caption. Raise FeatureError if more than half of the images have the same caption.
    """
    counts = Counter(captions)
    most = max(counts.values(), default=0)
    if most * 2 > len(captions):
        raise FeatureError(
            f"{most} of {len(captions)} captions are the same: shuffling cannot give each image a different caption"
        )
    rng = np.random.default_rng(seed)
    place = dict(zip(sorted(counts), rng.permutation(len(counts)), strict=True))
    order = sorted(rng.permutation(len(captions)), key=lambda i: place[captions[i]])
    shuffled = torch.empty(len(captions), dtype=torch.int64)
    shuffled[torch.tensor(order)] = torch.tensor(np.roll(order, -most))
    return shuffled


def standard_error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of N values, N >= 2."""
    return (values.std() / len(values) ** 0.5).item()
