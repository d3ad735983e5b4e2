"""Wasserstein distances against all permutations and scipy."""

import functools
import itertools

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from point_sets import normal, sliced

from diffjax.metrics import wasserstein


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_wasserstein_is_the_best_of_all_permutations(p):
    x, y = normal(0, 5, 2), normal(1, 5, 2)
    costs = [
        np.mean(np.linalg.norm(x - y[list(order)], axis=1) ** p)
        for order in itertools.permutations(range(5))
    ]
    np.testing.assert_allclose(wasserstein(x, y, p), min(costs) ** (1 / p), rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_sliced_wasserstein_of_unequal_sets_in_one_dimension(p):
    """Repeated until both have 12 samples, they can be assigned."""
    x, y = normal(0, 4, 1), normal(1, 6, 1)
    expected = wasserstein(np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0), p)
    np.testing.assert_allclose(
        jax.jit(functools.partial(sliced, projections=3))(x, y, p=p), expected, rtol=1e-12
    )


def test_wasserstein_distances_against_scipy():
    x, y = normal(0, 30), 1 + 2 * normal(1, 17)
    value = jax.jit(functools.partial(sliced, p=1))(x[:, None], y[:, None])
    np.testing.assert_allclose(value, scipy.stats.wasserstein_distance(x, y), rtol=1e-12)
    np.testing.assert_allclose(
        wasserstein(x[:17, None], y[:, None], p=1),
        scipy.stats.wasserstein_distance(x[:17], y),
        rtol=1e-12,
    )


def test_sliced_wasserstein_of_translations():
    """By v it is the root of mean (theta.v)^2, of any samples. Over a basis the squares add up to
    mean |theta|^2 = 1.
    """
    x = normal(0, 20, 3)
    distance = jax.jit(functools.partial(sliced, projections=50))
    values = np.array([distance(x, x + v) for v in np.eye(3)])
    np.testing.assert_allclose(np.sum(values**2), 1, rtol=1e-12)
    np.testing.assert_allclose(
        values, [distance(5 * x[:7], 5 * x[:7] + v) for v in np.eye(3)], rtol=1e-12
    )
    # each (theta.v)^2 has mean 1/3 and variance 4/45 on the sphere
    np.testing.assert_allclose(values**2, 1 / 3, atol=4 * (4 / 45 / 50) ** 0.5)


def test_sliced_wasserstein_is_below_wasserstein():
    """A projection shortens every distance; and the root of the mean square is least where p is."""
    x, y = normal(0, 12, 3), 1 + normal(1, 12, 3)
    one, two = (jax.jit(sliced)(x, y, p=p) for p in (1, 2))
    assert one < two < wasserstein(x, y) and one < wasserstein(x, y, p=1)
