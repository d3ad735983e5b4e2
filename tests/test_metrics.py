"""The sample metrics against closed forms, brute force, scipy and scikit-learn."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from jax.sharding import Mesh, PartitionSpec
from sklearn.dummy import DummyClassifier
from sklearn.metrics.pairwise import polynomial_kernel as sklearn_polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from diffjax import couplings
from diffjax.metrics import (
    Moments,
    _features,
    classifier_accuracy_score,
    curvature,
    density_coverage,
    energy_distance,
    frechet_distance,
    frechet_infinity,
    gaussian_frechet_distance,
    inception_score,
    kernel_distance,
    mmd,
    moments,
    path_energy,
    path_length,
    polynomial_kernel,
    precision_recall,
    sliced_wasserstein,
    wasserstein,
)


def sliced(x, y, **options):
    return sliced_wasserstein(jax.random.key(0), x, y, **options)


def kernel(x, y, **options):
    return kernel_distance(jax.random.key(0), x, y, **options)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def on_grid(seed, *shape):
    """Multiples of 2^-9 that float32 still holds exactly beside an offset of 10,000."""
    return np.round(normal(seed, *shape) * 2**9).astype(np.float32) / np.float32(2**9)


# ---- Fréchet distance ------------------------------------------------------------------------------------------------


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
    few = functools.partial(frechet_distance, allow_few=True)
    np.testing.assert_allclose(few(images, moved), 32.0, rtol=1e-9)  # only the mean differs
    np.testing.assert_allclose(few(images, moved), few(images.reshape(30, -1), moved.reshape(30, -1)))


def test_moments_of_batches_are_those_of_the_whole():
    x, y = 3 + normal(0, 60, 4, 2), normal(1, 50, 4, 2)
    batches = [moments(x[i : i + 25]) for i in (0, 25, 50)]  # the last one is smaller
    together = functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b), batches)
    expected = frechet_distance(x, y)
    for a, b in ((together, y), (x, moments(y)), (together, moments(y))):
        np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)  # a difference of sums of squares
    on_device = jax.tree.map(jnp.add, *map(jax.jit(moments), (jnp.asarray(x[:20]), jnp.asarray(x[20:]))))
    np.testing.assert_allclose(frechet_distance(on_device, y), expected, rtol=1e-9)


def test_moments_of_devices_are_those_of_the_whole():
    x, y = 3 + normal(0, 60, 4, 2), normal(1, 50, 4, 2)
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec())
    def summed(x):
        return jax.lax.psum(moments(x), "batch")

    np.testing.assert_allclose(frechet_distance(summed(jnp.asarray(x)), y), frechet_distance(x, y), rtol=1e-9)


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
    np.testing.assert_allclose(frechet_distance(*shifted), expected, rtol=1e-5)  # 200 roundings of 6e-8
    with pytest.raises(ValueError, match=r"x: the covariance is lost .* moments\(x - shift\)"):
        frechet_distance(moments(jnp.asarray(x)), moments(jnp.asarray(y)))


def exact_moments(mean, cov, count=10**6):
    """Of a set of that size with exactly this sample mean and unbiased sample covariance."""
    return Moments(count, count * mean, (count - 1) * cov + count * np.outer(mean, mean))


def test_moments_of_rank_deficient_sets_in_closed_form():
    one, other = np.diag([4.0, 9.0, 0.0]), np.diag([0.0, 1.0, 16.0])
    mean = np.array([1.0, -2.0, 3.0])
    value = frechet_distance(exact_moments(mean, one), exact_moments(0 * mean, other))
    np.testing.assert_allclose(value, 14 + 4 + (3 - 1) ** 2 + 16, rtol=1e-6)  # sqrt of 1e-15 where 0 should be


def test_infinity_is_nearer_the_truth_by_far():
    """The bias of 0.25 is many times the noise, and goes but for its part of order 1/N^2."""
    d, n = 30, 1000
    scales = np.linspace(0.9, 1.1, d)
    reference, truth = exact_moments(np.full(d, 0.05), np.diag(scales**2)), d * 0.05**2 + np.sum((scales - 1) ** 2)
    samples = [normal(seed, n, d) for seed in range(3)]
    plain = np.array([frechet_distance(x, reference) for x in samples]) - truth
    extrapolated = np.array([frechet_infinity(jax.random.key(0), x, reference) for x in samples]) - truth
    assert abs(extrapolated.mean()) < 0.2 * plain.mean() and abs(extrapolated).max() < 0.5 * plain.min()


def test_refusals_of_the_frechet_distance():
    x = normal(0, 5, 3)
    with pytest.raises(ValueError, match=r"y: expected at least 2 samples, \(n, \.\.\.\), got shape \(1, 3\)"):
        frechet_distance(x, x[:1])
    for bad in (x[0], x[:0]):
        with pytest.raises(ValueError, match=r"x: expected at least 2 samples"):
            frechet_distance(bad, x)
    with pytest.raises(ValueError, match=r"x: expected at least 1 samples, .* got shape \(0, 3\)"):
        moments(x[:0])
    with pytest.raises(ValueError, match=r"y: expected samples of the shape of x, \(3,\), got \(2,\)"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="y: expected as many features as x, 3, got 2"):
        frechet_distance(moments(x), x[:, :2])
    holes = np.where(np.arange(5)[:, None] % 3 == 0, np.nan, x)
    for use in (lambda: frechet_distance(x, holes), lambda: frechet_distance(moments(x), holes)):
        with pytest.raises(ValueError, match="y: expected finite features, got 2 of 5 rows that are not"):
            use()
    with pytest.raises(ValueError, match="x: expected finite features, got 2 of 5 rows that are not"):
        moments(jnp.asarray(holes))
    with pytest.raises(ValueError, match="x: expected finite moments"):
        frechet_distance(jax.jit(moments)(jnp.asarray(holes)), x)
    with pytest.raises(ValueError, match=r"expected moments of shapes \(\), \(d,\), \(d, d\), got"):
        frechet_distance(jax.vmap(moments)(jnp.ones((2, 5, 3))), x)
    for few in (x[:3], moments(x[:3])):
        with pytest.raises(
            ValueError, match=r"y: expected more samples than features, got 3 samples of 3 features.*allow_few"
        ):
            frechet_distance(x, few)
        assert frechet_distance(x, few, allow_few=True) > 0
    frechet_distance(x, x[:4])
    for sizes in ([3, 5], [4, 6], [5, 5]):
        with pytest.raises(
            ValueError, match=r"sizes: expected different numbers N, 3 features < N <= 5 samples, got \["
        ):
            frechet_infinity(jax.random.key(0), x, x, sizes=sizes)


def test_refusals_of_gaussians():
    m, cov = np.zeros(2), np.eye(2)
    with pytest.raises(ValueError, match="expected shapes"):
        gaussian_frechet_distance(m, cov, m, np.eye(3))
    with pytest.raises(ValueError, match="mean1, cov1, mean2, cov2: expected finite numbers"):
        gaussian_frechet_distance(m, cov, m, np.inf * np.ones((2, 2)))
    for bad in (np.diag([1.0, -0.1]), np.array([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="cov2: expected a symmetric, positive semidefinite matrix"):
            gaussian_frechet_distance(m, cov, m, bad)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def rbf(x, y):
    return jnp.exp(-jnp.sum((x - y) ** 2))


def brute_force_mmd(kernel, x, y):
    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return np.mean([kernel(a[i], b[j]) for i, j in pairs])

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@pytest.mark.parametrize("elements", [16, 2**26])  # up to two rows at a time and one left over; all at once
def test_mmd_is_the_double_loop(monkeypatch, elements):
    monkeypatch.setattr(_features, "_ELEMENTS", elements)
    x, y = normal(0, 5, 2), normal(1, 4, 2)
    expected = brute_force_mmd(lambda a, b: np.exp(-np.sum((a - b) ** 2)), x, y)
    np.testing.assert_allclose(jax.jit(functools.partial(mmd, rbf))(x, y), expected, rtol=1e-12)
    expected = brute_force_mmd(lambda a, b: -np.linalg.norm(a - b), x, y)
    np.testing.assert_allclose(jax.jit(lambda x, y: energy_distance(x, y))(x, y), expected, rtol=1e-12)


def test_mmd_is_unbiased_over_all_subsets():
    """The mean over all pairs of subsets is the estimate of the whole: each pair of samples is met equally often."""
    x, y = normal(0, 6, 2), 1 + normal(1, 5, 2)
    xs, ys = (np.array([a[list(i)] for i in itertools.combinations(range(len(a)), 3)]) for a in (x, y))
    for kernel in (rbf, polynomial_kernel):
        each = jax.jit(jax.vmap(jax.vmap(functools.partial(mmd, kernel), (None, 0)), (0, None)))(xs, ys)
        np.testing.assert_allclose(np.mean(each), mmd(kernel, x, y), rtol=1e-12)


def test_polynomial_kernel_is_that_of_scikit_learn():
    x, y = normal(0, 7, 3, 2), normal(1, 6, 3, 2)
    gram = functools.partial(sklearn_polynomial_kernel, degree=3, gamma=1 / 6, coef0=1)
    expected = brute_force_mmd(lambda a, b: gram(a.reshape(1, 6), b.reshape(1, 6)).item(), x, y)
    np.testing.assert_allclose(mmd(polynomial_kernel, x, y), expected, rtol=1e-12)


def test_kernel_and_energy_distance_of_two_gaussians_in_closed_form():
    """N(0, 1) and N(1, 1): 1 + 3 xy + 3 (xy)^2 + (xy)^3 compares the first moments, (0, 1, 0) and (1, 2, 4); and |x - y| is
    a folded Gaussian. Over 1000 sets the mean is within 4 standard errors, which are 3 percent of the value at most."""
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
    """Over 1000 sets of 4 blocks: the mean within 4 errors of the truth; their variance to 15 percent."""
    x, y = normal(0, 1000, 41, 1), 1 + normal(1, 1000, 30, 1)  # a sample and two are left out
    values, errors = jax.jit(jax.vmap(functools.partial(kernel_distance, size=11)))(
        jax.random.split(jax.random.key(0), 1000), x, y
    )
    assert abs(np.mean(values) - 22) < 4 * np.std(values) / 1000**0.5
    np.testing.assert_allclose(np.mean(errors**2), np.var(values), rtol=0.15)


def test_the_blocks_of_a_kernel_distance_are_shuffled():
    """Sorted samples: blocks cut without a shuffle would be far apart in mean, and so would their estimates."""
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


# ---- Transport -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_wasserstein_is_the_best_of_all_permutations(p):
    x, y = normal(0, 5, 2), normal(1, 5, 2)
    costs = [np.mean(np.linalg.norm(x - y[list(order)], axis=1) ** p) for order in itertools.permutations(range(5))]
    np.testing.assert_allclose(wasserstein(x, y, p), min(costs) ** (1 / p), rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_sliced_wasserstein_of_unequal_sets_in_one_dimension(p):
    """Repeated until both have 12 samples, they can be assigned."""
    x, y = normal(0, 4, 1), normal(1, 6, 1)
    expected = wasserstein(np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0), p)
    np.testing.assert_allclose(jax.jit(functools.partial(sliced, projections=3))(x, y, p=p), expected, rtol=1e-12)


def test_wasserstein_distances_against_scipy():
    x, y = normal(0, 30), 1 + 2 * normal(1, 17)
    value = jax.jit(functools.partial(sliced, p=1))(x[:, None], y[:, None])
    np.testing.assert_allclose(value, scipy.stats.wasserstein_distance(x, y), rtol=1e-12)
    np.testing.assert_allclose(
        wasserstein(x[:17, None], y[:, None], p=1), scipy.stats.wasserstein_distance(x[:17], y), rtol=1e-12
    )


def test_sliced_wasserstein_of_translations():
    """By v it is the root of mean (theta.v)^2, of any samples. Over a basis the squares add up to mean |theta|^2 = 1."""
    x = normal(0, 20, 3)
    distance = jax.jit(functools.partial(sliced, projections=50))
    values = np.array([distance(x, x + v) for v in np.eye(3)])
    np.testing.assert_allclose(np.sum(values**2), 1, rtol=1e-12)
    np.testing.assert_allclose(values, [distance(5 * x[:7], 5 * x[:7] + v) for v in np.eye(3)], rtol=1e-12)
    # each (theta.v)^2 has mean 1/3 and variance 4/45 on the sphere
    np.testing.assert_allclose(values**2, 1 / 3, atol=4 * (4 / 45 / 50) ** 0.5)


def test_sliced_wasserstein_is_below_wasserstein():
    """A projection shortens every distance; and the root of the mean square is least where p is."""
    x, y = normal(0, 12, 3), 1 + normal(1, 12, 3)
    one, two = (jax.jit(sliced)(x, y, p=p) for p in (1, 2))
    assert one < two < wasserstein(x, y) and one < wasserstein(x, y, p=1)


# ---- Neighbours ------------------------------------------------------------------------------------------------------


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
    assert (precision, recall) == pytest.approx((in_real.any(0).mean(), in_generated.any(1).mean()), rel=1e-12)
    assert (density, coverage) == pytest.approx((in_real.sum() / (k * m), in_real.any(1).mean()), rel=1e-12)


@pytest.mark.parametrize("d", [1, 16, 17, 40])
def test_neighbours_of_any_number_of_features_and_of_two_precisions(d):
    """Integers, so that both precisions are exact; more features than are added up at a time, and fewer."""
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
    assert both(real, generated) == ((0.5, 1), (0.5, pytest.approx(1 / 3)))  # 3 is at 1 from 2; 3 reaches to -1
    (precision, recall), (_, coverage) = both(real, real)
    assert precision == recall == coverage == 1


def test_coverage_and_density_of_equal_distributions():
    """Naeem et al., lemmas 1 and 2: of exchangeable samples, on average, 1 and 1 - prod_i (n - i) / (n + m - i)."""
    n, m, k, sets = 12, 9, 3, 400
    values = jax.jit(jax.vmap(functools.partial(density_coverage, k=k)))(normal(0, sets, n, 2), normal(1, sets, m, 2))
    expected = 1, 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    for got, want in zip(values, expected, strict=True):
        assert abs(np.mean(got) - want) < 4 * np.std(got) / sets**0.5 < 0.1


# ---- Classifiers -----------------------------------------------------------------------------------------------------


def test_inception_score_in_closed_form():
    score = jax.jit(inception_score)
    np.testing.assert_allclose(score(np.eye(4)), 4, rtol=1e-12)
    np.testing.assert_allclose(score(np.tile([0.5, 0.2, 0.3, 0.0], (4, 1))), 1, rtol=1e-12)
    a = 0.9  # a marginal of (1/2, 1/2): log 2 less the entropy of one row
    np.testing.assert_allclose(score(np.array([[a, 1 - a], [1 - a, a]])), 2 * a**a * (1 - a) ** (1 - a), rtol=1e-12)


def test_the_inception_score_of_traced_nan_is_nan():
    assert np.isnan(jax.jit(inception_score)(jnp.full((2, 3), jnp.nan)))


def test_inception_score_of_splits():
    p = np.random.default_rng(0).dirichlet(np.ones(5), (3, 4))
    np.testing.assert_allclose(jax.jit(jax.vmap(inception_score))(p), [inception_score(rows) for rows in p], rtol=1e-12)


def test_the_gradient_of_the_inception_score_is_finite_where_a_probability_is_zero():
    logits = jnp.array([[0.0, -1e4, 0.5], [1.0, -1e4, 0.0]])  # exp(-1e4) = 0
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda z: inception_score(jax.nn.softmax(z))))(logits)))


class Nearest:
    """A classifier that keeps what it was given."""

    def fit(self, x, labels):
        self.x, self.labels = x, labels

    def predict(self, x):
        return self.labels[np.argmin(np.linalg.norm(x[:, None] - self.x[None], axis=-1), axis=1)]


def test_classifier_accuracy_score():
    generated, real = np.array([[[0.0]], [[10.0]]]), np.array([[[1.0]], [[2.0]], [[9.0]], [[4.0]]])
    assert classifier_accuracy_score(Nearest(), generated, ["a", "b"], real, ["a", "b", "b", "a"]) == 0.75
    classifier, labels = DummyClassifier(strategy="most_frequent"), np.array([1, 1, 0])
    assert classifier_accuracy_score(classifier, normal(0, 3, 2), labels, normal(1, 4, 2), [1, 0, 0, 0]) == 0.25


# ---- What they have in common ----------------------------------------------------------------------------------------

PAIRS = {
    "mmd": functools.partial(mmd, rbf),
    "energy_distance": energy_distance,
    "sliced_wasserstein": functools.partial(sliced, projections=4),
    "kernel_distance": functools.partial(kernel, size=3),
    "precision_recall": functools.partial(precision_recall, k=2),
    "density_coverage": functools.partial(density_coverage, k=2),
}
JITTED = {name: jax.jit(function) for name, function in PAIRS.items()}
LOSSES = ["mmd", "energy_distance", "sliced_wasserstein"]


@pytest.mark.parametrize("name", PAIRS)
def test_jit_and_vmap_are_the_loop(name):
    x, y = normal(0, 2, 7, 2), 0.5 + normal(1, 2, 6, 2)
    eager = [PAIRS[name](a, b) for a, b in zip(x, y, strict=True)]
    expected = jax.tree.map(lambda *values: np.stack(values), *eager)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10), jax.jit(jax.vmap(PAIRS[name]))(x, y), expected
    )


@pytest.mark.parametrize("name", PAIRS)
def test_traced_nan_comes_out_as_nan(name):
    x, y = normal(0, 7, 2), normal(1, 6, 2)
    for pair in (
        (x, np.where(np.arange(6)[:, None] == 2, np.nan, y)),
        (np.where(np.arange(7)[:, None] == 2, np.nan, x), y),
    ):
        result = jax.tree.leaves(JITTED[name](*pair))
        assert np.isnan(result[0]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(monkeypatch, name):
    x, y, step = normal(0, 5, 2), 0.5 + normal(1, 4, 2), 1e-5
    direction = normal(2, 5, 2), normal(3, 4, 2)
    ahead, behind = (JITTED[name](x + s * direction[0], y + s * direction[1]) for s in (step, -step))
    for elements in (_features._ELEMENTS, 16):  # at once; up to two rows at a time and one left over
        monkeypatch.setattr(_features, "_ELEMENTS", elements)
        gradient = jax.jit(jax.grad(lambda xy: PAIRS[name](*xy)))((x, y))
        slope = sum(np.vdot(g, v) for g, v in zip(gradient, direction, strict=True))
        # central differences: step^2 = 1e-10, and 1e-16 / step = 1e-11 of rounding
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_at_equal_samples(name):
    x = jnp.asarray(normal(0, 3, 2), jnp.float32)[jnp.array([0, 0, 1, 2])]
    value, gradients = jax.jit(jax.value_and_grad(PAIRS[name], (0, 1)))(x, x)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("mmd", "kernel_distance")])
def test_a_large_common_offset_costs_nothing(name):
    """Differences of float32 numbers so close are exact; |x|^2 + |y|^2 - 2 x.y would have an error of 6e-8 * 1e8 = 6."""
    x, y = jnp.asarray(on_grid(0, 40, 3)), jnp.asarray(2 * on_grid(1, 30, 3))
    near, far = JITTED[name](x, y), JITTED[name](x + 10000, y + 10000)
    # the projections' origin is rounded: 1e-3 of units of a standard deviation, alike for x and y
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), far, near)


@pytest.mark.parametrize("name", PAIRS)
def test_order_does_not_matter_and_half_precision_is_raised(name):
    one_block = {"kernel_distance": jax.jit(functools.partial(kernel, size=9))}  # which samples share a block is random
    function = (JITTED | one_block)[name]
    x, y = jnp.asarray(on_grid(0, 9, 2), jnp.bfloat16), jnp.asarray(on_grid(1, 9, 2), jnp.bfloat16)
    value = function(x, y)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(value))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), function(x[::-1], y[::-1]), value)


@pytest.mark.parametrize("name", PAIRS)
def test_no_array_of_all_differences_is_built(name):
    """Of 10,000 x 2048 features, 80 MB, all differences would be 800 GB. Compiled, not run."""
    features = jax.ShapeDtypeStruct((10_000, 2048), jnp.float32)
    function = jax.grad(PAIRS[name], (0, 1)) if name in LOSSES else PAIRS[name]
    assert jax.jit(function).lower(features, features).compile().memory_analysis().temp_size_in_bytes < 1.5e9


X = normal(0, 6, 3)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("use", "message"),
    [
        *[
            (lambda f=f: f(X, X[:, :2]), r"expected samples of the shape of \w+, \(3,\), got \(2,\)")
            for f in PAIRS.values()
        ],
        *[(lambda f=f: f(X[:0], X), r"expected at least . samples, .* got shape \(0, 3\)") for f in PAIRS.values()],
        *[(lambda f=f: f(X, X[:, :0]), r"expected at least . samples, .* got shape \(6, 0\)") for f in PAIRS.values()],
        *[(lambda f=f: f(X, X / (X > X.min())), "finite features, got 1 of 6 rows") for f in PAIRS.values()],
        *[(lambda f=f: f(X.astype(int), X), "expected a floating-point dtype, got int64") for f in PAIRS.values()],
        (lambda: energy_distance(X[:1], X), r"x: expected at least 2 samples"),
        (lambda: precision_recall(X, X[:3], k=3), "k: expected 0 < k < 3, the number of generated samples, got 3"),
        (lambda: precision_recall(X, X, k=0), "k: expected 0 < k < 6, the number of real samples, got 0"),
        (lambda: density_coverage(X[:4], X, k=5), "k: expected 0 < k < 4, the number of real samples, got 5"),
        (lambda: kernel(X, X, size=1), "size: expected blocks of at least 2 samples of each set, got 1"),
        (lambda: kernel(X, X[:3], size=3), "got 3 for 6 and 3 samples"),
        (lambda: sliced(X, X, projections=0), "projections: expected at least 1, got 0"),
        (lambda: sliced(X, X, p=0.5), r"p: expected a finite number in \[1, inf\], got 0.5"),
        (lambda: wasserstein(X, X, p=0.5), r"p: expected a finite number in \[1, inf\], got 0.5"),
        (lambda: wasserstein(X, X[:4]), "y: expected as many samples as x, 6, got 4"),
        (lambda: wasserstein(X, X[:, :2]), "y: expected samples of the shape of x"),
        (lambda: wasserstein(X, np.nan * X), "y: expected finite features, got 6 of 6 rows that are not"),
        (lambda: inception_score(np.ones(3)), r"probabilities: expected shape \(n, classes\), got \(3,\)"),
        (lambda: inception_score(np.ones((0, 3))), "probabilities: expected at least 1 samples"),
        (lambda: inception_score(X), r"probabilities: expected numbers in \[0, 1\] .* give the softmax"),
        (lambda: inception_score(np.nan * X), "probabilities: expected finite"),
        (
            lambda: classifier_accuracy_score(Nearest(), X, X[0], X, np.ones(6)),
            r"generated_labels: expected shape \(6,\)",
        ),
        (
            lambda: classifier_accuracy_score(Nearest(), X, np.ones(6), X, np.ones((6, 1))),
            r"real_labels: .* got \(6, 1\)",
        ),
        (
            lambda: classifier_accuracy_score(Nearest(), X, np.ones(6), X[:, :2], np.ones(6)),
            "real: expected samples of the",
        ),
    ],
)
def test_refusals(use, message):
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(ValueError, match=message):
        use()


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_a_circle_and_a_straight_line():
    """A quarter circle at constant speed: length and speed pi/2, energy (pi/2)^2, chord sqrt(2). Chords: O(1/n^2) below."""
    ts = jnp.linspace(1, 0, 401)
    circle = jnp.stack([jnp.cos(jnp.pi / 2 * ts), jnp.sin(jnp.pi / 2 * ts)], 1)
    np.testing.assert_allclose(path_length(circle), np.pi / 2, rtol=1e-5)
    np.testing.assert_allclose(path_energy(ts, circle), np.pi**2 / 4, rtol=1e-5)
    np.testing.assert_allclose(curvature(ts, circle), np.pi**2 / 4 - 2, rtol=1e-4)
    line = jnp.array([[1.0, 2.0]]) + ts[:, None] * jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose([path_length(line), path_energy(ts, line), curvature(ts, line)], [5, 25, 0], atol=1e-12)
    uneven = line[jnp.array([0, 1, 7, 100, 400])]  # constant speed: no matter where it is looked at
    np.testing.assert_allclose(curvature(ts[jnp.array([0, 1, 7, 100, 400])], uneven), 0, atol=1e-12)


def test_a_path_that_rests_has_a_finite_gradient():
    still = jnp.array([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(jax.grad(path_length)(still)[2], [1.0, 0.0], atol=1e-12)
    assert np.isfinite(jax.grad(path_length)(still)).all()


@pytest.mark.usefixtures("without_type_checks")
def test_paths_refuse():
    with pytest.raises(ValueError, match=r"xs: expected at least two points \(times, \*x\), got shape \(1, 2\)"):
        path_length(jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"ts: expected a time for each of the 3 points, got shape \(2,\)"):
        path_energy(jnp.ones(2), jnp.ones((3, 2)))


@pytest.mark.parametrize("k", [1, 3, 16, 17, 40])
def test_radii_reach_to_the_kth_neighbour_for_small_and_large_k(k):
    """Balls in scikit-learn's words; integer points, so that there are many ties and no roundings."""
    real, generated = (np.random.default_rng(seed).integers(-3, 4, (60, 3)).astype(float) for seed in (0, 1))
    distances = np.sum((real[:, None] - generated[None]) ** 2, 2)
    radii = NearestNeighbors(n_neighbors=k).fit(real).kneighbors()[0][:, -1] ** 2
    inside = distances <= radii[:, None] + 0.5
    found = density_coverage(real, generated, k=k)
    np.testing.assert_allclose(found, (inside.sum() / (k * 60), inside.any(1).mean()), rtol=1e-12)
    np.testing.assert_allclose(precision_recall(real, generated, k=k).precision, inside.any(0).mean(), rtol=1e-12)


def test_a_second_call_of_the_same_shapes_compiles_nothing(caplog):
    x, y = (jnp.asarray(normal(seed, 30, 3)) for seed in (0, 1))
    calls = (
        lambda: precision_recall(x, y),
        lambda: density_coverage(x, y),
        lambda: sliced(x, y),
        lambda: inception_score(jax.nn.softmax(x)),
        lambda: curvature(jnp.arange(30.0), x),
        lambda: mmd(rbf, x, y),
        lambda: energy_distance(x, y),
        lambda: kernel(x, y, size=10),
        lambda: couplings.optimal(None, x, y),
        lambda: couplings.optimal(jax.random.key(0), x[:15], y),
        lambda: couplings.optimal(None, x, y, labels=jnp.arange(30) % 2),
        lambda: couplings.sinkhorn(couplings.squared_distances(x, y), 1.0),
        lambda: couplings.entropic(1.0)(jax.random.key(0), x, y),
    )
    for call in calls:
        call()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for call in calls:
            call()
    assert [m for m in caplog.messages if m.startswith("Compiling")] == []
