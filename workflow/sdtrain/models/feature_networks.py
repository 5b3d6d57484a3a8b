"""Features of images and texts from frozen networks. Images are uint8 tensors N x 3 x H x W in 0..255."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from sdtrain.errors import SDTrainError

INCEPTION = "inception-2015-12-05.pt"  # the name under which NVlabs and clean-fid publish FID's network
EFFICIENTNET = "efficientnet-lite0-*.pth"
INCEPTION_NAME = "Inception (FID)"


class FeatureError(SDTrainError, ValueError):
    """Features that cannot be computed or compared."""


# ---------------------------------------------------------------- image features
@dataclass(frozen=True)
class ImageFeatures:
    """A frozen image network, which maps images to float32 features N x `dim` on the CPU.

    `forward` takes images on the network's device, uint8 or float32 in 0..255.
    """

    name: str
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
    for pattern, load in NETWORKS.items():
        for path in sorted(folder.glob(pattern))[:1]:
            if network := load(path, device):
                return network
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
    return ImageFeatures(INCEPTION_NAME, 2048, lambda x: network(x, return_features=True), device)


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

    return ImageFeatures("EfficientNet-Lite0", 1280, forward, device)


def clip_images(path: Path, device: torch.device) -> ImageFeatures | None:
    """Load the image half of the CLIP model with the configuration `path`; None if it is another model's."""
    if not is_clip(path.parent):
        return None
    model = ClipModel(path.parent, device)
    return ImageFeatures(f"CLIP {path.parent.name}", model.dim, model.embed, device)


# A file or glob that identifies the network of a folder, and the function that loads it; the first match counts.
NETWORKS: dict[str, Callable[[Path, torch.device], ImageFeatures | None]] = {
    INCEPTION: inception,
    EFFICIENTNET: efficientnet_lite0,
    "config.json": clip_images,
}


def checked(images: torch.Tensor) -> torch.Tensor:
    """Return the images. Raise FeatureError if they are not uint8 N x 3 x H x W."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise FeatureError(f"images are {images.dtype} {tuple(images.shape)}, expected torch.uint8 (N, 3, H, W)")
    return images


# ---------------------------------------------------------------- texts, CLIP
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


def paired_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosine of row i of `a` with row i of `b`, N x E and N x E -> N."""
    if a.shape != b.shape:
        raise FeatureError(f"embeddings {tuple(a.shape)} and {tuple(b.shape)}: one caption per image is expected")
    return F.cosine_similarity(a, b, dim=-1)


def is_clip(folder: Path) -> bool:
    """Return whether a folder contains a CLIP model."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "clip"
    except (OSError, ValueError, AttributeError):
        return False


class ClipModel:
    """The CLIP model of a folder: embeddings of images and of captions."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        """Load model and tokenizer. Raise FeatureError if the folder does not contain them."""
        from transformers import AutoTokenizer, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        folder = Path(folder)
        if not is_clip(folder):
            raise FeatureError(f"{folder}: no CLIP model here (config.json with model_type clip); make that component")
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
