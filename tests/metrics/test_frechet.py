"""Fréchet distances and moments against closed forms and the matrix square root."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from jax.sharding import Mesh, PartitionSpec
from point_sets import normal, on_grid

from diffjax.metrics import (
    Moments,
    frechet_distance,
    frechet_infinity,
    gaussian_frechet_distance,
    moments,
)


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
    expected = np.sum((m1 - m2) ** 2) + np.trace(
        cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real
    )
    np.testing.assert_allclose(gaussian_frechet_distance(m1, cov1, m2, cov2), expected, rtol=1e-6)


def test_rank_deficient_covariances():
    """Planes that share no direction but one: only what they share overlaps."""
    m, cov = gaussian(1, 12, 4)
    assert 0 <= gaussian_frechet_distance(m, cov, m, cov) < 1e-6 * np.trace(cov)
    one, other = np.diag([4.0, 9.0, 0.0]), np.diag([0.0, 1.0, 16.0])
    zero = np.zeros(3)
    np.testing.assert_allclose(
        gaussian_frechet_distance(zero, one, zero, other), 4 + (3 - 1) ** 2 + 16, rtol=1e-12
    )


def test_one_dimension_and_scaling():
    np.testing.assert_allclose(gaussian_frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]), 4 + 1)
    a, b = gaussian(2, 5, 5), gaussian(3, 5, 5)
    scaled = gaussian_frechet_distance(3 * a[0], 9 * a[1], 3 * b[0], 9 * b[1])
    np.testing.assert_allclose(scaled, 9 * gaussian_frechet_distance(*a, *b), rtol=1e-10)
    np.testing.assert_allclose(
        gaussian_frechet_distance(*b, *a), gaussian_frechet_distance(*a, *b), rtol=1e-10
    )


def test_samples_use_the_unbiased_covariance_in_float64():
    """Two points +-a have the unbiased variance 2 a^2; an offset of 1e4 would cost float32 all of
    it.
    """
    with jax.enable_x64(False):
        x, y = np.array([[1e4 - 0.5], [1e4 + 0.5]]), np.array([[1e4 - 1.0], [1e4 + 1.0]])
        np.testing.assert_allclose(
            frechet_distance(x, y), (np.sqrt(2) - np.sqrt(0.5)) ** 2, rtol=1e-9
        )
    images = np.random.default_rng(0).normal(size=(30, 4, 4, 2))
    moved = images[::-1] + 1.0
    few = functools.partial(frechet_distance, allow_few=True)
    np.testing.assert_allclose(few(images, moved), 32.0, rtol=1e-9)  # only the mean differs
    np.testing.assert_allclose(
        few(images, moved), few(images.reshape(30, -1), moved.reshape(30, -1))
    )


def test_moments_of_batches_are_those_of_the_whole():
    x, y = 3 + normal(0, 60, 4, 2), normal(1, 50, 4, 2)
    batches = [moments(x[i : i + 25]) for i in (0, 25, 50)]  # the last one is smaller
    together = functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b), batches)
    expected = frechet_distance(x, y)
    for a, b in ((together, y), (x, moments(y)), (together, moments(y))):
        # a difference of sums of squares
        np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)
    on_device = jax.tree.map(
        jnp.add, *map(jax.jit(moments), (jnp.asarray(x[:20]), jnp.asarray(x[20:])))
    )
    np.testing.assert_allclose(frechet_distance(on_device, y), expected, rtol=1e-9)


def test_moments_of_devices_are_those_of_the_whole():
    x, y = 3 + normal(0, 60, 4, 2), normal(1, 50, 4, 2)
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec()
    )
    def summed(x):
        return jax.lax.psum(moments(x), "batch")

    np.testing.assert_allclose(
        frechet_distance(summed(jnp.asarray(x)), y), frechet_distance(x, y), rtol=1e-9
    )


def test_moments_on_the_host_are_float64_and_on_a_device_at_least_float32():
    with jax.enable_x64(False):
        x = 1e4 + normal(0, 50, 3)
        np.testing.assert_allclose(
            frechet_distance(moments(x), moments(x + 2)), 12, rtol=1e-6
        )  # 1e8 roundings are 1e-8
        assert moments(jnp.ones((4, 2), jnp.bfloat16)).outer.dtype == jnp.float32


def test_a_common_shift_saves_float32_sums_with_a_large_mean():
    x, y = 1e4 + on_grid(0, 200, 3), 1e4 + 2 * on_grid(1, 200, 3)
    expected = frechet_distance(x, y)
    shifted = (moments(jnp.asarray(a) - 1e4) for a in (x, y))
    # 200 roundings of 6e-8
    np.testing.assert_allclose(frechet_distance(*shifted), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"x: the covariance is lost .* moments\(x - shift\)"):
        frechet_distance(moments(jnp.asarray(x)), moments(jnp.asarray(y)))


def exact_moments(mean, cov, count=10**6):
    """Of a set of that size with exactly this sample mean and unbiased sample covariance."""
    return Moments(count, count * mean, (count - 1) * cov + count * np.outer(mean, mean))


def test_moments_of_rank_deficient_sets_in_closed_form():
    one, other = np.diag([4.0, 9.0, 0.0]), np.diag([0.0, 1.0, 16.0])
    mean = np.array([1.0, -2.0, 3.0])
    value = frechet_distance(exact_moments(mean, one), exact_moments(0 * mean, other))
    # sqrt of 1e-15 where 0 should be
    np.testing.assert_allclose(value, 14 + 4 + (3 - 1) ** 2 + 16, rtol=1e-6)


def test_infinity_is_nearer_the_truth_by_far():
    """The bias of 0.25 is many times the noise, and goes but for its part of order 1/N^2."""
    d, n = 30, 1000
    scales = np.linspace(0.9, 1.1, d)
    reference, truth = (
        exact_moments(np.full(d, 0.05), np.diag(scales**2)),
        d * 0.05**2 + np.sum((scales - 1) ** 2),
    )
    samples = [normal(seed, n, d) for seed in range(3)]
    plain = np.array([frechet_distance(x, reference) for x in samples]) - truth
    extrapolated = (
        np.array([frechet_infinity(jax.random.key(0), x, reference) for x in samples]) - truth
    )
    assert (
        abs(extrapolated.mean()) < 0.2 * plain.mean()
        and abs(extrapolated).max() < 0.5 * plain.min()
    )


def test_refusals_of_the_frechet_distance():
    x = normal(0, 5, 3)
    with pytest.raises(
        ValueError, match=r"y: expected at least 2 samples, \(n, \.\.\.\), got shape \(1, 3\)"
    ):
        frechet_distance(x, x[:1])
    for bad in (x[0], x[:0]):
        with pytest.raises(ValueError, match=r"x: expected at least 2 samples"):
            frechet_distance(bad, x)
    with pytest.raises(ValueError, match=r"x: expected at least 1 samples, .* got shape \(0, 3\)"):
        moments(x[:0])
    with pytest.raises(
        ValueError, match=r"y: expected samples of the shape of x, \(3,\), got \(2,\)"
    ):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="y: expected as many features as x, 3, got 2"):
        frechet_distance(moments(x), x[:, :2])
    holes = np.where(np.arange(5)[:, None] % 3 == 0, np.nan, x)
    for use in (lambda: frechet_distance(x, holes), lambda: frechet_distance(moments(x), holes)):
        with pytest.raises(
            ValueError, match="y: expected finite features, got 2 of 5 rows that are not"
        ):
            use()
    with pytest.raises(
        ValueError, match="x: expected finite features, got 2 of 5 rows that are not"
    ):
        moments(jnp.asarray(holes))
    with pytest.raises(ValueError, match="x: expected finite moments"):
        frechet_distance(jax.jit(moments)(jnp.asarray(holes)), x)
    with pytest.raises(ValueError, match=r"expected moments of shapes \(\), \(d,\), \(d, d\), got"):
        frechet_distance(jax.vmap(moments)(jnp.ones((2, 5, 3))), x)
    for few in (x[:3], moments(x[:3])):
        with pytest.raises(
            ValueError,
            match=r"y: expected more samples than features, got 3 samples of 3 features.*allow_few",
        ):
            frechet_distance(x, few)
        assert frechet_distance(x, few, allow_few=True) > 0
    frechet_distance(x, x[:4])
    for sizes in ([3, 5], [4, 6], [5, 5]):
        with pytest.raises(
            ValueError,
            match=r"sizes: expected different numbers N, 3 features < N <= 5 samples, got \[",
        ):
            frechet_infinity(jax.random.key(0), x, x, sizes=sizes)


def test_refusals_of_gaussians():
    m, cov = np.zeros(2), np.eye(2)
    with pytest.raises(ValueError, match="expected shapes"):
        gaussian_frechet_distance(m, cov, m, np.eye(3))
    with pytest.raises(ValueError, match="mean1, cov1, mean2, cov2: expected finite numbers"):
        gaussian_frechet_distance(m, cov, m, np.inf * np.ones((2, 2)))
    for bad in (np.diag([1.0, -0.1]), np.array([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(
            ValueError, match="cov2: expected a symmetric, positive semidefinite matrix"
        ):
            gaussian_frechet_distance(m, cov, m, bad)
