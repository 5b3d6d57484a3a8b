"""Features of images and texts from frozen networks, and metrics of them: Frechet and kernel distance, CLIPScore.

Images are uint8 tensors N x 3 x H x W in 0..255. A metric is named after its network: only the Frechet distance of
Inception features is FID, and only the score of a CLIP model is CLIPScore.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdtrain.errors import SDTrainError

INCEPTION = "inception-2015-12-05.pt"  # the name under which NVlabs and clean-fid publish FID's network
EFFICIENTNET = "efficientnet-lite0-*.pth"


class FeatureError(SDTrainError, ValueError):
    """Features that cannot be computed or compared."""


# ---------------------------------------------------------------- image features
@dataclass(frozen=True)
class ImageFeatures:
    """A frozen image network, which maps images to float32 features N x `dim` on the CPU.

    `name` is the name of the network, `metric` that of the Frechet distance of its features. `forward` takes images on
    the network's device, uint8 or float32 in 0..255.
    """

    name: str
    metric: str
    dim: int
    forward: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of uint8 images N x 3 x H x W. Raise FeatureError for another shape or type."""
        features = self.forward(checked(images).to(self.device)).float().cpu()
        if features.shape != (len(images), self.dim):
            raise FeatureError(f"{self.name}: features are {tuple(features.shape)}, expected {(len(images), self.dim)}")
        return features


def image_features(
    folder: str | Path, device: str | torch.device = "cpu", key: str = "evaluation.features"
) -> ImageFeatures:
    """Load the image network of a component folder: the Inception of FID, EfficientNet-Lite0 or a CLIP model.

    Raise FeatureError if the folder contains none of them; the message names `key` and the expected files.
    """
    folder, device = Path(folder), torch.device(device)
    if (folder / INCEPTION).is_file():
        return inception(folder / INCEPTION, device)
    weights = sorted(folder.glob(EFFICIENTNET))
    if weights:
        return efficientnet_lite0(weights[0], device)
    if is_clip(folder):
        scorer = ClipScorer(folder, device)
        name = f"CLIP {folder.name}"
        return ImageFeatures(name, f"Frechet distance ({name})", scorer.dim, scorer.embed, device)
    raise FeatureError(
        f"{folder}: no image network here; a folder with {INCEPTION}, {EFFICIENTNET} or a CLIP model's config.json "
        f"is expected: make the component named in {key}"
    )


def perceptual_distance(folder: str | Path, device: str | torch.device = "cpu") -> Callable[..., torch.Tensor]:
    """Return a function of two float32 batches N x 3 x H x W in 0..255: 1 - cos of their features, N in [0, 2].

    It is half the squared distance of unit features, as Zhang et al. 2018 (arXiv 1801.03924) compare those of single
    layers. The network is frozen, and gradients flow to the images. Raise FeatureError if the network has no gradient.
    """
    network = image_features(folder, device, "loss.perceptual_network")
    probe = torch.linspace(0, 255, 3 * 64 * 64, device=device).view(1, 3, 64, 64).requires_grad_()
    try:
        network.forward(probe).square().sum().backward()
    except RuntimeError:
        probe.grad = None
    if probe.grad is None or not probe.grad.any():
        raise FeatureError(
            f"loss.perceptual_network: {folder}: no gradient passes through {network.name} to its images; name another "
            "network, such as efficientnet-lite0 or a CLIP model, or set loss.perceptual=0"
        )
    return lambda a, b: 1 - paired_cosine(network.forward(a).float(), network.forward(b).float())


def inception(path: Path, device: torch.device) -> ImageFeatures:
    """Load the network of FID (Heusel et al. 2017) from NVlabs' TorchScript file, which resizes and scales images."""
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise FeatureError(f"{path}: not a TorchScript file ({str(error).splitlines()[0]}); fetch it again") from None
    for weight in network.parameters():
        weight.requires_grad_(False)
    return ImageFeatures("Inception (FID)", "FID", 2048, lambda x: network(x, return_features=True), device)


def efficientnet_lite0(path: Path, device: torch.device) -> ImageFeatures:
    """Load EfficientNet-Lite0 without its classifier: 224 x 224, (x - 127) / 128, mean over the last 7 x 7 map."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # channels last: its depthwise convolutions then take two thirds of the time on a CPU
    network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def forward(images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        return network.extract_features((x - 127) / 128).mean((2, 3))

    name = "EfficientNet-Lite0"
    return ImageFeatures(name, f"Frechet distance ({name})", 1280, forward, device)


def checked(images: torch.Tensor) -> torch.Tensor:
    """Return the images. Raise FeatureError if they are not uint8 N x 3 x H x W."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise FeatureError(f"images are {images.dtype} {tuple(images.shape)}, expected torch.uint8 (N, 3, H, W)")
    return images


# ---------------------------------------------------------------- distances between sets of features
def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean D and covariance D x D (n - 1 in the denominator), float64, of features N x D, N >= 2."""
    if features.ndim != 2 or len(features) < 2:
        raise FeatureError(f"features are {tuple(features.shape)}: a covariance needs at least 2 rows (N, D)")
    if not torch.isfinite(features).all():
        raise FeatureError("features hold NaN or infinity: look at the images, or at the weights that made them")
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


# ---------------------------------------------------------------- text, CLIPScore
@torch.inference_mode()
def text_embeddings(folder: str | Path, captions: list[str], batch_size: int = 64) -> torch.Tensor:
    """Return unit float32 embeddings N x E of captions: the mean of the text encoder's states over the real tokens.

    This is the pooling of Sentence-BERT (Reimers and Gurevych 2019). Encoder and tokenizer are in one folder.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise FeatureError(
            f"{folder}: no text encoder with its tokenizer here ({str(error).splitlines()[0]})"
        ) from None
    parts = []
    for start in range(0, len(captions), batch_size):
        tokens = tokenizer(captions[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
        parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts).float() if parts else torch.empty(0, model.config.hidden_size)


def clip_score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Return 100 max(cos, 0) of each pair of rows, N x E and N x E -> N.

    See Hessel et al. (2021); the factor 100, usual for text-to-image models, replaces their 2.5.
    """
    return 100 * paired_cosine(image_embeds, text_embeds).clamp(min=0)


def paired_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosine of row i of `a` with row i of `b`, N x E and N x E -> N."""
    if a.shape != b.shape:
        raise FeatureError(f"embeddings {tuple(a.shape)} and {tuple(b.shape)}: one caption an image is expected")
    return F.cosine_similarity(a, b, dim=-1)


def is_clip(folder: Path) -> bool:
    """Return whether a folder contains a CLIP model."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "clip"
    except (OSError, ValueError, AttributeError):
        return False


class ClipScorer:
    """CLIPScore with the CLIP model of a folder: `scorer(images, captions)` returns N scores in 0..100."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        """Load model and tokenizer. Raise FeatureError if the folder does not contain them."""
        from transformers import AutoTokenizer, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        folder = Path(folder)
        if not is_clip(folder):
            raise FeatureError(f"{folder}: no CLIP model here (config.json with model_type clip); make that component")
        self.name = f"CLIPScore ({folder.name})"
        self.device = torch.device(device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = CLIPModel.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise FeatureError(f"{folder}: not a whole CLIP model ({str(error).splitlines()[0]})") from None
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.dim = self.model.config.projection_dim
        self.size = self.model.config.vision_config.image_size
        self.length = self.model.config.text_config.max_position_embeddings
        self.mean = torch.tensor(OPENAI_CLIP_MEAN, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(OPENAI_CLIP_STD, device=self.device).view(3, 1, 1)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Apply CLIP's preprocessing: bicubic resize of the shorter side, center crop, normalization.

        uint8 images are rounded to integers after the resize, like image files; float images in 0..255 keep gradients.
        """
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        shape = [max(self.size, round(side * scale)) for side in (height, width)]
        x = F.interpolate(images.float(), shape, mode="bicubic", antialias=True).clamp(0, 255)
        x = (x.round() if images.dtype == torch.uint8 else x) / 255
        top, left = ((side - self.size) // 2 for side in shape)
        return (x[..., top : top + self.size, left : left + self.size] - self.mean) / self.std

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return projected embeddings N x E, not normalized, of images in 0..255 on the model's device."""
        return self.model.get_image_features(self.pixels(images)).pooler_output

    @torch.inference_mode()
    def image_embeds(self, images: torch.Tensor) -> torch.Tensor:
        """Return projected image embeddings N x E of uint8 images, not normalized."""
        return self.embed(checked(images).to(self.device)).float()

    @torch.inference_mode()
    def text_embeds(self, captions: list[str]) -> torch.Tensor:
        """Return projected text embeddings N x E, not normalized; captions are truncated to the model's length."""
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        tokens = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
        return self.model.get_text_features(**tokens).pooler_output.float()

    def __call__(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Return the CLIPScore of each image with its caption, N on the CPU."""
        return clip_score(self.image_embeds(images), self.text_embeds(captions)).cpu()


# ---------------------------------------------------------------- alignment without a CLIP model
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
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)  # a constant feature tells nothing
        u, s, vh = torch.linalg.svd((features - mean) / scale, full_matrices=False)
        penalty = min(torch.logspace(-4, 4, 33).tolist(), key=lambda p: leave_one_out(u, s, text - text_mean, p))
        shrink = s / (s**2 + penalty * len(features))
        weight = vh.T @ (shrink[:, None] * (u.T @ (text - text_mean)))
        tensors = (t.float() for t in (weight, mean, scale, text_mean))
        return cls(image_network, text_encoder, *tensors, penalty=penalty)

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Return the predicted caption embeddings minus their mean, N x D -> N x E."""
        if features.shape[1:] != self.mean.shape:
            raise FeatureError(f"features {tuple(features.shape)}: this alignment was fitted on {len(self.mean)} wide")
        return ((features.float() - self.mean) / self.scale) @ self.weight

    def score(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return 100 cos of each image's prediction with its caption, N in -100..100, about 0 for unrelated pairs."""
        return 100 * paired_cosine(self.predict(features), self.centred(text))

    def retrieval(self, features: torch.Tensor, text: torch.Tensor) -> float:
        """Return R@1: the fraction of images whose own caption is the nearest of all N (chance: 1 / N)."""
        if len(features) != len(text):
            raise FeatureError(f"{len(features)} images and {len(text)} captions: one caption an image is expected")
        image, text = (F.normalize(t, dim=-1) for t in (self.predict(features), self.centred(text)))
        similarity = image @ text.T
        return (similarity.diagonal() >= similarity.max(1).values).float().mean().item()

    def centred(self, text: torch.Tensor) -> torch.Tensor:
        """Return unit caption embeddings minus their mean over the images of the fit."""
        return F.normalize(text.float(), dim=-1) - self.text_mean

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        tensors = {key: getattr(self, key).contiguous() for key in ("weight", "mean", "scale", "text_mean")}
        about = {"image_network": self.image_network, "text_encoder": self.text_encoder, "penalty": repr(self.penalty)}
        save_file(tensors, aside, metadata=about)
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | Path) -> LinearAlignment:
        """Read a file that `save` wrote. Raise FeatureError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in ("weight", "mean", "scale", "text_mean")}
            return cls(about["image_network"], about["text_encoder"], **tensors, penalty=float(about["penalty"]))
        except (OSError, SafetensorError, KeyError) as error:
            raise FeatureError(f"{path}: not a fitted alignment ({error}); fit it again") from None


def leave_one_out(u: torch.Tensor, s: torch.Tensor, target: torch.Tensor, penalty: float) -> float:
    """Return the mean squared leave-one-out error of a ridge with a free intercept, from the SVD of its centred inputs.

    `u` is N x K, `s` K, the centred `target` N x E; the penalty is per row.
    """
    gain = s**2 / (s**2 + penalty * len(u))
    residual = target - u @ (gain[:, None] * (u.T @ target))
    leverage = 1 / len(u) + (u**2) @ gain
    return (residual / (1 - leverage).clamp(min=1e-12)[:, None]).square().mean().item()
