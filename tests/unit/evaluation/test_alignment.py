"""Tests of the linear alignment on features and texts that depend on the same hidden variables."""

from __future__ import annotations

import pytest
import torch

from sdtrain.evaluation.alignment import LinearAlignment, leave_one_out
from sdtrain.models.feature_networks import FeatureError

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy features N x 40 and text embeddings N x 12 that depend on the same hidden variables."""
    hidden = random(n, 6, seed=seed)
    return (
        hidden @ random(6, 40, seed=100) + 0.5 * random(n, 40, seed=seed + 1) + 3,
        hidden @ random(6, 12, seed=101) + 0.2 * random(n, 12, seed=seed + 2) + 2,
    )


def test_alignment_scores_pairs_above_shuffled_ones():
    model = LinearAlignment.fit(*related(200), "EfficientNet-Lite0", "MiniLM")
    assert model.name == "alignment score (EfficientNet-Lite0 to MiniLM)" and "CLIP" not in model.name
    x, text = related(60, seed=50)
    paired, shuffled = model.score(x, text), model.score(x, text.roll(1, 0))
    assert paired.mean() > 80 and shuffled.mean().abs() < 15
    assert model.retrieval(x, text) > 0.8
    assert model.retrieval(x, text.roll(1, 0)) < 0.1


def test_alignment_of_unrelated_data_scores_about_zero():
    model = LinearAlignment.fit(random(100, 150), random(100, 12, seed=1), "a", "b")
    assert model.score(random(200, 150, seed=2), random(200, 12, seed=3)).mean().abs() < 5


@pytest.mark.parametrize("n, d", [(12, 4), (8, 20)])
def test_closed_form_equals_explicit_leave_one_out(n, d):
    x, y = random(n, d).double() + 1, random(n, 3, seed=1).double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    errors = []
    for i in range(n):
        rest = torch.arange(n) != i
        mean_x, mean_y = x[rest].mean(0), y[rest].mean(0)
        a = x[rest] - mean_x
        w = torch.linalg.solve(a.T @ a + 0.3 * n * torch.eye(d), a.T @ (y[rest] - mean_y))
        errors.append((y[i] - mean_y - (x[i] - mean_x) @ w).square().mean())
    assert leave_one_out(u, s, y - y.mean(0), 0.3) == pytest.approx(torch.stack(errors).mean().item())


def test_alignment_penalty_grows_with_the_noise():
    x, text = related(200)
    clean = LinearAlignment.fit(x, text, "a", "b").penalty
    noisy = LinearAlignment.fit(x, text + 20 * random(200, 12, seed=9), "a", "b").penalty
    assert 1e-4 <= clean < noisy <= 1e4


def test_alignment_ignores_a_constant_feature():
    x, text = related(50)
    with_constant = torch.cat([x, torch.full((50, 1), 7.0)], 1)
    a, b = LinearAlignment.fit(x, text, "a", "b"), LinearAlignment.fit(with_constant, text, "a", "b")
    assert torch.allclose(a.score(x, text), b.score(torch.cat([x, random(50, 1) * 100], 1), text), atol=1e-2)


def test_saved_alignment_loads_unchanged(tmp_path):
    x, text = related(50)
    model = LinearAlignment.fit(x, text, "EfficientNet-Lite0", "MiniLM")
    model.save(tmp_path / "new/alignment.safetensors", {"held_out": "{}"})
    again, about = LinearAlignment.load(tmp_path / "new/alignment.safetensors")
    assert about["held_out"] == "{}"
    assert torch.equal(again.score(x, text), model.score(x, text))
    assert (again.name, again.penalty) == (model.name, model.penalty)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["alignment.safetensors"]


def test_alignment_refuses_invalid_input(tmp_path):
    with pytest.raises(FeatureError, match="expected"):
        LinearAlignment.fit(random(5, 3), random(4, 3), "a", "b")
    model = LinearAlignment.fit(*related(20), "a", "b")
    with pytest.raises(FeatureError, match="expected features of width 40"):
        model.score(random(2, 39), random(2, 12))
    with pytest.raises(FeatureError, match="one caption per image"):
        model.retrieval(random(3, 40), random(2, 12))
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for name in ("a.safetensors", "absent.safetensors"):
        with pytest.raises(FeatureError, match="not a fitted alignment.*fit it again"):
            LinearAlignment.load(tmp_path / name)
