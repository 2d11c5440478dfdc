"""The quick layout keeps neighbours as UMAP does, and what it keeps is measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udonlib.lab import quick_layout
from udonlib.lab.projections import pca
from udonlib.lab.quick_layout import laid_out, preserved


def groups(n_groups: int = 12, n_each: int = 25, dim: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around as many directions as there are groups: more than two dimensions of PCA can tell apart."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), n_each)
    vectors = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:n_groups][group] + rng.normal(
        scale=0.1, size=(len(group), dim)
    )
    return vectors.astype(np.float32), group


def purity(xy: np.ndarray, group: np.ndarray, k: int = 10) -> float:
    apart = ((xy[:, None] - xy[None]) ** 2).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    return float((group[np.argsort(apart, axis=1)[:, :k]] == group[:, None]).mean())


def test_groups_that_a_pca_mixes_lie_apart():
    vectors, group = groups()
    start = pca(vectors)[0]
    assert purity(start, group) < 0.7
    assert purity(laid_out(vectors, start), group) > 0.98


def test_more_neighbours_are_kept_than_by_a_pca():
    vectors, _ = groups()
    start = pca(vectors)[0]
    kept, of_pca = preserved(vectors, [laid_out(vectors, start), start])
    assert kept > of_pca + 0.2


def test_a_seed_gives_the_same_layout_and_another_one_another():
    vectors, _ = groups(4)
    start = pca(vectors)[0]
    first = laid_out(vectors, start, seed=3)
    np.testing.assert_array_equal(first, laid_out(vectors, start, seed=3))
    assert not np.allclose(first, laid_out(vectors, start, seed=4))


@pytest.mark.parametrize(("distance", "a", "b"), [(0.0, 1.933, 0.791), (0.1, 1.577, 0.895), (0.5, 0.583, 1.334)])
def test_the_curve_is_umaps(distance, a, b):
    assert quick_layout._curve(distance) == pytest.approx((a, b), abs=2e-3)  # umap.umap_.find_ab_params(1, distance)


def test_memberships_sum_to_the_logarithm_of_their_number():
    distance = np.sort(np.random.default_rng(0).uniform(size=(40, 15)), axis=1).astype(np.float32)
    weight = quick_layout._memberships(quick_layout.torch.from_numpy(distance))
    np.testing.assert_allclose(weight.sum(1), np.log2(15), rtol=1e-3)
    assert (weight[:, 0] == 1).all()


def test_both_directions_of_an_edge_count_once():
    nearest, weight = np.array([[1], [0], [1]]), np.array([[0.5], [0.8], [0.3]], np.float32)
    one, other, joined = quick_layout._edges(nearest, weight)
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == [(0, 1), (1, 2)]
    np.testing.assert_allclose(joined, [1, 0.3 / (0.5 + 0.8 - 0.4)], rtol=1e-6)


def test_blocks_of_similarities_give_the_same_neighbours(monkeypatch):
    unit = quick_layout.torch.nn.functional.normalize(quick_layout.torch.from_numpy(groups()[0]), dim=1)
    whole = quick_layout._nearest(unit, 5)[0]
    monkeypatch.setattr(quick_layout, "BLOCK", 7 * len(unit))
    assert (quick_layout._nearest(unit, 5)[0] == whole).all()
    assert not (whole == np.arange(len(unit))[:, None]).any()


def test_a_layout_that_is_the_space_keeps_everything_and_a_random_one_what_chance_keeps(monkeypatch):
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 400)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    chance = np.random.default_rng(1).normal(size=(400, 2))
    assert preserved(circle, [circle, chance], k=20) == pytest.approx([1, 20 / 399], abs=0.02)
    monkeypatch.setattr(quick_layout, "SAMPLE", 50)
    assert preserved(circle, [circle], k=20) == pytest.approx([1], abs=0.02)


def test_nothing_can_be_kept_of_one_vector():
    assert np.isnan(preserved(np.ones((1, 3)), [np.zeros((1, 2))])).all()


@given(st.integers(2, 40), st.booleans(), st.integers(1, 60))
def test_few_or_equal_vectors_have_places_too(n, equal, k):
    vectors = np.ones((n, 4)) if equal else np.random.default_rng(n).normal(size=(n, 4))
    assert np.isfinite(laid_out(vectors, pca(vectors)[0], n_neighbours=k)).all()
