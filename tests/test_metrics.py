"""The Fréchet distance against closed forms and against scipy."""

import jax
import numpy as np
import pytest
import scipy.linalg

from diffjax.metrics import frechet_distance, gaussian_frechet_distance


def gaussian(seed, d, rank):
    random = np.random.default_rng(seed)
    root = random.normal(size=(d, rank)) * 10.0 ** random.uniform(-1, 1, rank)
    return random.normal(size=d), root @ root.T


def test_commuting_covariances_in_closed_form():
    """In a common eigenbasis it is |m1 - m2|^2 + sum (s1 - s2)^2 over the standard deviations."""
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    s1, s2 = np.array([[3.0, 1e-4, 0.5, 0.0, 0.0, 7.0], [1.0, 2e-4, 0.5, 0.0, 2.0, 0.0]])
    m1, m2 = random.normal(size=(2, 6))
    cov1, cov2 = ((rotation * s**2) @ rotation.T for s in (s1, s2))
    expected = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    np.testing.assert_allclose(gaussian_frechet_distance(m1, cov1, m2, cov2), expected, rtol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_general_covariances_against_the_matrix_square_root(seed):
    (m1, cov1), (m2, cov2) = gaussian(seed, 20, 20), gaussian(seed + 10, 20, 20)
    expected = np.sum((m1 - m2) ** 2) + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    np.testing.assert_allclose(gaussian_frechet_distance(m1, cov1, m2, cov2), expected, rtol=1e-6)


def test_rank_deficient_covariances():
    """Planes that share no direction but one: only what they share overlaps."""
    m, cov = gaussian(1, 12, 4)
    assert 0 <= gaussian_frechet_distance(m, cov, m, cov) < 1e-6 * np.trace(cov)
    one, other = np.diag([4.0, 9.0, 0.0]), np.diag([0.0, 1.0, 16.0])
    zero = np.zeros(3)
    np.testing.assert_allclose(gaussian_frechet_distance(zero, one, zero, other), 4 + (3 - 1) ** 2 + 16, rtol=1e-12)


def test_one_dimension_and_scaling():
    np.testing.assert_allclose(gaussian_frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]), 4 + 1)
    a, b = gaussian(2, 5, 5), gaussian(3, 5, 5)
    scaled = gaussian_frechet_distance(3 * a[0], 9 * a[1], 3 * b[0], 9 * b[1])
    np.testing.assert_allclose(scaled, 9 * gaussian_frechet_distance(*a, *b), rtol=1e-10)
    np.testing.assert_allclose(gaussian_frechet_distance(*b, *a), gaussian_frechet_distance(*a, *b), rtol=1e-10)


def test_samples_use_the_unbiased_covariance_in_float64():
    """Two points +-a have the unbiased variance 2 a^2; an offset of 1e4 would cost float32 all of it."""
    with jax.enable_x64(False):
        x, y = np.array([[1e4 - 0.5], [1e4 + 0.5]]), np.array([[1e4 - 1.0], [1e4 + 1.0]])
        np.testing.assert_allclose(frechet_distance(x, y), (np.sqrt(2) - np.sqrt(0.5)) ** 2, rtol=1e-9)
    images = np.random.default_rng(0).normal(size=(30, 4, 4, 2))
    moved = images[::-1] + 1.0
    np.testing.assert_allclose(frechet_distance(images, moved), 32.0, rtol=1e-9)  # only the mean differs
    np.testing.assert_allclose(
        frechet_distance(images, moved), frechet_distance(images.reshape(30, -1), moved.reshape(30, -1))
    )


def test_refusals():
    x = np.ones((5, 3))
    with pytest.raises(ValueError, match=r"y must hold at least two samples \(n, \.\.\.\), got shape \(1, 3\)"):
        frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match=r"x must hold at least two samples"):
        frechet_distance(x[0], x)
    with pytest.raises(ValueError, match=r"samples of one shape, got \(3,\) and \(2,\)"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="y must be finite"):
        frechet_distance(x, np.where(x > 0, np.nan, x))
    m, cov = np.zeros(2), np.eye(2)
    with pytest.raises(ValueError, match="expected shapes"):
        gaussian_frechet_distance(m, cov, m, np.eye(3))
    with pytest.raises(ValueError, match="must be finite"):
        gaussian_frechet_distance(m, cov, m, np.inf * np.ones((2, 2)))
    for bad in (np.diag([1.0, -0.1]), np.array([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="cov2 must be symmetric and positive semidefinite"):
            gaussian_frechet_distance(m, cov, m, bad)
