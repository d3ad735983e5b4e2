"""Precision, recall, density and coverage against the balls of scikit-learn."""

import functools

import jax
import numpy as np
import pytest
from point_sets import normal
from sklearn.neighbors import NearestNeighbors

from diffjax.metrics import density_coverage, precision_recall


@pytest.mark.parametrize(("n", "m", "k"), [(40, 30, 3), (25, 60, 5), (8, 9, 1)])
def test_neighbours_are_those_of_scikit_learn(n, m, k):
    real, generated = normal(0, n, 2, 2), 0.7 * normal(1, m, 2, 2)
    a, b = real.reshape(n, 4), generated.reshape(m, 4)

    def radii(x):  # without arguments, kneighbors leaves each point out of its own neighbours
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors()[0][:, -1]

    distances = np.array([[np.linalg.norm(r - g) for g in b] for r in a])
    in_real, in_generated = distances <= radii(a)[:, None], distances <= radii(b)[None]
    both = jax.jit(lambda r, g: (precision_recall(r, g, k), density_coverage(r, g, k)))
    (precision, recall), (density, coverage) = both(real, generated)
    assert (precision, recall) == pytest.approx(
        (in_real.any(0).mean(), in_generated.any(1).mean()), rel=1e-12
    )
    assert (density, coverage) == pytest.approx(
        (in_real.sum() / (k * m), in_real.any(1).mean()), rel=1e-12
    )


@pytest.mark.parametrize("d", [1, 16, 17, 40])
def test_neighbours_of_any_number_of_features_and_of_two_precisions(d):
    """Integers, so that both precisions are exact; more features than are added up at a time, and
    fewer.
    """
    real = np.random.default_rng(0).integers(-3, 4, (30, d)).astype(np.float32)
    generated = np.random.default_rng(1).integers(-3, 4, (20, d)).astype(np.float64)
    across = np.sum((real[:, None] - generated[None]) ** 2, 2)
    within = [np.sum((a[:, None] - a[None]) ** 2, 2) for a in (real, generated)]
    radii = [np.sort(distances, 1)[:, 2] for distances in within]  # the first is the sample's own
    expected = (across <= radii[0][:, None]).any(0).mean(), (across <= radii[1][None]).any(1).mean()
    np.testing.assert_allclose(precision_recall(real, generated, k=2), expected, rtol=1e-6)


def test_balls_are_closed():
    real, generated = np.array([[0.0], [1.0], [2.0]]), np.array([[3.0], [7.0]])  # radii 1; 4
    both = jax.jit(lambda r, g: (precision_recall(r, g, 1), density_coverage(r, g, 1)))
    # 3 is at 1 from 2; 3 reaches to -1
    assert both(real, generated) == ((0.5, 1), (0.5, pytest.approx(1 / 3)))
    (precision, recall), (_, coverage) = both(real, real)
    assert precision == recall == coverage == 1


def test_coverage_and_density_of_equal_distributions():
    """Naeem et al., lemmas 1 and 2: of exchangeable samples, on average, 1 and 1 - prod_i (n - i) /
    (n + m - i).
    """
    n, m, k, sets = 12, 9, 3, 400
    values = jax.jit(jax.vmap(functools.partial(density_coverage, k=k)))(
        normal(0, sets, n, 2), normal(1, sets, m, 2)
    )
    expected = 1, 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    for got, want in zip(values, expected, strict=True):
        assert abs(np.mean(got) - want) < 4 * np.std(got) / sets**0.5 < 0.1


@pytest.mark.parametrize("k", [1, 3, 16, 17, 40])
def test_radii_reach_to_the_kth_neighbour_for_small_and_large_k(k):
    """Balls in scikit-learn's words; integer points, so that there are many ties and no roundings."""
    real, generated = (
        np.random.default_rng(seed).integers(-3, 4, (60, 3)).astype(float) for seed in (0, 1)
    )
    distances = np.sum((real[:, None] - generated[None]) ** 2, 2)
    radii = NearestNeighbors(n_neighbors=k).fit(real).kneighbors()[0][:, -1] ** 2
    inside = distances <= radii[:, None] + 0.5
    found = density_coverage(real, generated, k=k)
    np.testing.assert_allclose(found, (inside.sum() / (k * 60), inside.any(1).mean()), rtol=1e-12)
    np.testing.assert_allclose(
        precision_recall(real, generated, k=k).precision, inside.any(0).mean(), rtol=1e-12
    )
