"""Tests of the arithmetic of the metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.evaluation import metrics
from sdtrain.evaluation.metrics import (
    DISTANCES,
    FeatureSet,
    caption_scores,
    clip_score,
    frechet_distance,
    kernel_distance,
    shuffle,
    statistics,
)
from sdtrain.models.feature_networks import INCEPTION_NAME, FeatureError

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- Frechet distance
def test_statistics_are_unbiased():
    mean, covariance = statistics(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    assert mean.tolist() == [2, 2]
    assert covariance.tolist() == [[4, 3], [3, 3]]
    assert mean.dtype == covariance.dtype == torch.float64
    assert statistics(torch.tensor([[1.0], [3.0]]))[1].tolist() == [[2]]


@pytest.mark.parametrize("bad, word", [(torch.ones(1, 3), "at least 2"), (torch.tensor([[1.0], [math.nan]]), "NaN")])
def test_statistics_refuse_one_row_and_nan(bad, word):
    with pytest.raises(FeatureError, match=word):
        statistics(bad)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 9)] * 2), min_size=1, max_size=6))
def test_frechet_distance_of_diagonal_gaussians(rows):
    m1, m2, v1, v2 = torch.tensor(rows, dtype=torch.float64).T
    expected = (m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()
    got = frechet_distance(m1, v1.diag(), m2, v2.diag())
    assert got == pytest.approx(expected.item(), abs=1e-5)


def test_frechet_distance_is_symmetric_and_rotation_invariant():
    a, b = statistics(random(50, 6)), statistics(random(40, 6, seed=1) * 2 + 1)
    q = torch.linalg.qr(random(6, 6, seed=2).double()).Q
    turned = [(q @ m, q @ s @ q.T) for m, s in (a, b)]
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-9)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*turned[0], *turned[1]), rel=1e-9)


def test_frechet_distance_equals_its_formula_with_the_root_of_the_product():
    (m1, s1), (m2, s2) = statistics(random(50, 5)), statistics(random(50, 5, seed=1) @ random(5, 5, seed=2))
    roots = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    expected = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * roots
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_with_fewer_images_than_features():
    a = statistics(random(20, 300))
    assert frechet_distance(*a, *a) < 1e-4 * a[1].trace()
    shifted = (a[0] + 1, a[1])
    assert frechet_distance(*a, *shifted) == pytest.approx(300, rel=1e-4)


def test_frechet_distance_refuses_features_of_two_networks():
    with pytest.raises(FeatureError, match="3 and 4 wide"):
        frechet_distance(*statistics(random(9, 3)), *statistics(random(9, 4)))


# ---------------------------------------------------------------- kernel distance
def test_kernel_distance_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    # k(a, b) = (ab + 1)^3: within x: k(0,1) = 1; within y: k(1,2) = 27; between x and y: 1, 1, 8, 27
    assert kernel_distance(x, y) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kernel_distance_is_unbiased():
    same = [kernel_distance(random(10, 4, seed=i), random(15, 4, seed=1000 + i)) for i in range(400)]
    mean = sum(same) / len(same)
    error = torch.tensor(same).std().item() / 20
    assert abs(mean) < 4 * error and min(same) < 0
    assert kernel_distance(random(50, 4), random(50, 4, seed=1) + 1) > 10 * error


def test_kernel_distance_refuses_invalid_features():
    with pytest.raises(FeatureError, match="same width"):
        kernel_distance(random(5, 3), random(5, 4))
    with pytest.raises(FeatureError, match="at least 2"):
        kernel_distance(random(1, 3), random(5, 3))


# ---------------------------------------------------------------- scores of captions
def test_clip_score_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[6.0, 8.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    assert clip_score(a, b).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0, 0], abs=1e-4)
    with pytest.raises(FeatureError, match="one caption per image"):
        clip_score(a, b[:2])


def test_distances_are_named_after_their_networks():
    assert [d.name(INCEPTION_NAME) for d in DISTANCES] == ["FID", "KID"]
    assert [d.name("Net") for d in DISTANCES] == ["Frechet distance (Net)", "kernel distance (Net)"]


def test_kernel_distance_of_many_images_uses_the_first_ones(monkeypatch):
    kernel = next(d.measure for d in DISTANCES if d.key == "kernel")
    rows = random(30, 4)
    assert kernel(FeatureSet(rows[:10]), FeatureSet(rows[10:])) == kernel_distance(rows[:10], rows[10:])
    monkeypatch.setattr(metrics, "PAIRED", 10)
    assert kernel(FeatureSet(rows), FeatureSet(rows + 1)) == kernel_distance(rows[:10], rows[:10] + 1)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40), st.integers(0, 2**32))
def test_shuffle_gives_no_image_its_own_caption(captions, seed):
    most = max(captions.count(c) for c in captions)
    if 2 * most > len(captions):
        with pytest.raises(FeatureError, match=f"{most} of {len(captions)} captions are the same"):
            shuffle(captions, seed)
        return
    order = shuffle(captions, seed).tolist()
    assert sorted(order) == list(range(len(captions)))
    assert all(captions[i] != captions[j] for i, j in enumerate(order))
    assert order == shuffle(captions, seed).tolist()


def test_shuffles_give_an_image_every_other_caption():
    given_to_first = {shuffle(list("abcd"), seed)[0].item() for seed in range(50)}
    assert given_to_first == {1, 2, 3}


def test_caption_scores_by_hand():
    rows = torch.eye(4)
    scores = caption_scores(lambda a, b: 10 * (a * b).sum(1), rows, rows, list("abcd"), seed=0)
    assert scores["value"] == scores["difference"] == 10
    assert scores["shuffled"] == scores["shuffled_standard_error"] == scores["difference_standard_error"] == 0
    blind = caption_scores(lambda a, b: b[:, 0], rows, rows, list("abcd"), seed=0)
    assert blind["value"] == pytest.approx(blind["shuffled"]) == 0.25
