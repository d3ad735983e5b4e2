"""Kernel and energy distances against double loops, closed forms, scipy and scikit-learn."""

import functools
import itertools

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from point_sets import kernel, normal, rbf
from sklearn.metrics.pairwise import polynomial_kernel as sklearn_polynomial_kernel

from diffjax.metrics import _features, energy_distance, kernel_distance, mmd, polynomial_kernel


def brute_force_mmd(kernel, x, y):
    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return np.mean([kernel(a[i], b[j]) for i, j in pairs])

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


# up to two rows at a time and one left over; all at once
@pytest.mark.parametrize("elements", [16, 2**26])
def test_mmd_is_the_double_loop(monkeypatch, elements):
    monkeypatch.setattr(_features, "_ELEMENTS", elements)
    x, y = normal(0, 5, 2), normal(1, 4, 2)
    expected = brute_force_mmd(lambda a, b: np.exp(-np.sum((a - b) ** 2)), x, y)
    np.testing.assert_allclose(jax.jit(functools.partial(mmd, rbf))(x, y), expected, rtol=1e-12)
    expected = brute_force_mmd(lambda a, b: -np.linalg.norm(a - b), x, y)
    np.testing.assert_allclose(
        jax.jit(lambda x, y: energy_distance(x, y))(x, y), expected, rtol=1e-12
    )


def test_mmd_is_unbiased_over_all_subsets():
    """The mean over all pairs of subsets is the estimate of the whole: each pair of samples is met
    equally often.
    """
    x, y = normal(0, 6, 2), 1 + normal(1, 5, 2)
    xs, ys = (
        np.array([a[list(i)] for i in itertools.combinations(range(len(a)), 3)]) for a in (x, y)
    )
    for function in (rbf, polynomial_kernel):
        each = jax.jit(jax.vmap(jax.vmap(functools.partial(mmd, function), (None, 0)), (0, None)))(
            xs, ys
        )
        np.testing.assert_allclose(np.mean(each), mmd(function, x, y), rtol=1e-12)


def test_polynomial_kernel_is_that_of_scikit_learn():
    x, y = normal(0, 7, 3, 2), normal(1, 6, 3, 2)
    gram = functools.partial(sklearn_polynomial_kernel, degree=3, gamma=1 / 6, coef0=1)
    expected = brute_force_mmd(lambda a, b: gram(a.reshape(1, 6), b.reshape(1, 6)).item(), x, y)
    np.testing.assert_allclose(mmd(polynomial_kernel, x, y), expected, rtol=1e-12)


def test_kernel_and_energy_distance_of_two_gaussians_in_closed_form():
    """N(0, 1) and N(1, 1): 1 + 3 xy + 3 (xy)^2 + (xy)^3 compares the first moments, (0, 1, 0) and
    (1, 2, 4); and |x - y| is a folded Gaussian. Over 1000 sets the mean is within 4 standard
    errors, which are 3 percent of the value at most."""
    x, y = normal(0, 1000, 30, 1), 1 + normal(1, 1000, 30, 1)
    folded = 2 / np.pi**0.5 * np.exp(-1 / 4) + scipy.special.erf(1 / 2)
    for distance, truth in (
        (functools.partial(mmd, polynomial_kernel), 3 * 1**2 + 3 * 1**2 + 4**2),
        (energy_distance, 2 * folded - 2 * 2 / np.pi**0.5),
    ):
        values = jax.jit(jax.vmap(distance))(x, y)
        error = np.std(values) / 1000**0.5
        assert abs(np.mean(values) - truth) < 4 * error and error < 0.03 * truth


def test_kernel_distance_of_one_block_is_the_mmd_and_has_no_error():
    x, y = normal(0, 8, 3), normal(1, 6, 3)
    value, error = kernel(x, y, size=8)
    np.testing.assert_allclose(value, mmd(polynomial_kernel, x, y), rtol=1e-12)
    assert np.isnan(error)


def test_kernel_distance_is_unbiased_and_knows_its_error():
    """Over 1000 sets of 4 blocks: the mean within 4 errors of the truth; their variance to 15
    percent.
    """
    x, y = normal(0, 1000, 41, 1), 1 + normal(1, 1000, 30, 1)  # a sample and two are left out
    values, errors = jax.jit(jax.vmap(functools.partial(kernel_distance, size=11)))(
        jax.random.split(jax.random.key(0), 1000), x, y
    )
    assert abs(np.mean(values) - 22) < 4 * np.std(values) / 1000**0.5
    np.testing.assert_allclose(np.mean(errors**2), np.var(values), rtol=0.15)


def test_the_blocks_of_a_kernel_distance_are_shuffled():
    """Sorted samples: blocks cut without a shuffle would be far apart in mean, and so would their
    estimates.
    """
    x, y = np.sort(normal(0, 400, 1), axis=0), np.sort(normal(1, 400, 1), axis=0)
    blocks = np.stack(np.split(x, 4)), np.stack(np.split(y, 4)[::-1])
    in_order = np.std(jax.jit(jax.vmap(functools.partial(mmd, polynomial_kernel)))(*blocks))
    assert kernel(x, y[::-1], size=100).standard_error < 0.1 * in_order


def test_energy_distance_against_scipy():
    """scipy has the root of the biased one, which counts |x - x| = 0 among the pairs."""
    x, y = normal(0, 30), 1 + 2 * normal(1, 20)
    within = (np.abs(a[:, None] - a[None]).sum() / (len(a) - 1) / len(a) ** 2 for a in (x, y))
    biased = energy_distance(x[:, None], y[:, None]) + sum(within)
    np.testing.assert_allclose(biased**0.5, scipy.stats.energy_distance(x, y), rtol=1e-12)
