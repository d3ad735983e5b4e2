"""Closed-form denoisers against the gradient of a log density, which is the score of every one of
them (Tweedie).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats

from diffjax import exact, schedules
from diffjax.exact import empirical, gaussian, gaussian_mixture

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[1.0, 0.5], [-1.5, 0.0]])
COVS = np.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]])
XS = np.array([[0.3, -0.8], [1.5, 0.2], [-2.0, 1.0]])


@pytest.mark.parametrize("path", ["linear_vp", "linear", "ve"])
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "empirical"])
def test_eps_is_the_score_and_x0_is_tweedies(kind, path):
    schedule, t = getattr(schedules, path)(), 0.4
    w, m, c = {
        "gaussian": (np.ones(1), MEANS[:1], COVS[:1]),
        "mixture": (WEIGHTS, MEANS, COVS),
        "empirical": (np.full(2, 0.5), MEANS, 0 * COVS),
    }[kind]
    denoise = {
        "gaussian": lambda: gaussian(jnp.asarray(m[0]), jnp.asarray(c[0]), schedule),
        "mixture": lambda: gaussian_mixture(*map(jnp.asarray, (w, m, c)), schedule),
        "empirical": lambda: empirical(jnp.asarray(m), schedule),
    }[kind]()
    alpha, sigma = oracles.alpha_sigma(path, t)
    log_density = jax.grad(lambda x: oracles.mixture_log_density(w, m, c, alpha, sigma, x))
    scores = np.asarray(jax.jit(jax.vmap(log_density))(XS))
    x0, eps = jax.jit(denoise)(jnp.asarray(XS), t)  # a batch
    np.testing.assert_allclose(eps, -sigma * scores, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(x0, (XS + sigma**2 * scores) / alpha, rtol=1e-9, atol=1e-10)
    one = jax.jit(denoise)(jnp.asarray(XS[0]), t)
    np.testing.assert_allclose(one.x0, x0[0], rtol=1e-12)


def test_at_the_ends():
    # at t = 0 the data are known, at t = 1 of the linear path nothing but their mean is
    cov = jnp.asarray(COVS[0])
    denoise = gaussian(jnp.asarray(MEANS[0]), cov, schedules.linear())
    np.testing.assert_allclose(denoise(jnp.asarray(XS), 0.0).x0, XS, rtol=1e-12)
    np.testing.assert_allclose(denoise(jnp.asarray(XS), 1.0).x0, [MEANS[0]] * 3, rtol=1e-12)
    np.testing.assert_allclose(denoise(jnp.asarray(XS), 1.0).eps, XS, rtol=1e-12)
    np.testing.assert_allclose(
        empirical(jnp.asarray(MEANS), schedules.linear())(jnp.asarray(XS), 0.0).x0, MEANS[[0, 0, 1]]
    )


@pytest.mark.parametrize("cov", [2 * np.eye(2), COVS[0]], ids=["equal eigenvalues", "distinct"])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_derivatives_by_the_covariance(cov, t):
    # against the same formula by a linear solve; eigenvectors have no derivative where eigenvalues
    # are equal
    schedule = schedules.linear()
    alpha, sigma = oracles.alpha_sigma("linear", t)

    def by_solve(cov, x):
        cov = (cov + cov.T) / 2
        k = jnp.linalg.solve(alpha**2 * cov + sigma**2 * jnp.eye(2), x - alpha * MEANS[0])
        return jnp.stack([MEANS[0] + alpha * cov @ k, sigma * k])

    def ours(cov, x):
        return jnp.stack(gaussian(jnp.asarray(MEANS[0]), (cov + cov.T) / 2, schedule)(x, t))

    def derivatives(f):
        return [
            derivative(f)(jnp.asarray(cov), jnp.asarray(XS[0]))
            for derivative in (jax.jacrev, jax.jacfwd, jax.hessian)
        ]

    values, expected = jax.jit(lambda: (derivatives(ours), derivatives(by_solve)))()
    chex.assert_trees_all_close(values, expected, rtol=1e-10, atol=1e-12)


def test_the_derivative_by_what_is_bound_is_the_function_s():
    denoise = gaussian(jnp.asarray(MEANS[0]), jnp.asarray(COVS[0]), schedules.linear())
    direction = jax.tree.map(
        lambda leaf: leaf * 0 + jnp.eye(2)[: leaf.ndim].reshape(leaf.shape), denoise
    )

    @jax.jit
    def moved(h):
        return jax.tree.map(lambda leaf, d: leaf + h * d, denoise, direction)(XS[0], 0.4).x0

    h = 1e-5
    difference = (moved(h) - moved(-h)) / (2 * h)
    np.testing.assert_allclose(jax.jvp(moved, (0.0,), (1.0,))[1], difference, rtol=1e-8)


def test_a_mixture_s_derivatives_at_equal_eigenvalues():
    # the responsibilities hold the log determinant; of one component alone, or it would cancel
    @jax.jit
    def x0(covs):
        return gaussian_mixture(jnp.asarray(WEIGHTS), jnp.asarray(MEANS), covs, schedules.linear())(
            XS[0], 0.4
        ).x0

    covs = jnp.stack([jnp.eye(2)] * 2)
    direction = jnp.stack([np.array([[0.3, 0.5], [0.5, -0.2]]), np.zeros((2, 2))])
    _, slope = jax.jvp(x0, (covs,), (direction,))
    h = 1e-5
    difference = (x0(covs + h * direction) - x0(covs - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, difference, rtol=1e-8)


# ---- conditioned on an observation ---------------------------------------------------------------


def joint(mean, cov, matrix, noise_cov):
    """Mean and covariance of (x, y)."""
    cross = cov @ matrix.T
    total = matrix @ cross + noise_cov
    return np.concatenate([mean, matrix @ mean]), np.block([[cov, cross], [cross.T, total]])


OBSERVATION = np.array([[1.0, -0.5, 0.2], [0.0, 0.7, 1.0]]), np.array([0.4, -0.9])
NOISE_COV = np.array([[0.3, 0.1], [0.1, 0.2]])


def components():
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, 3, 3))
    return np.array([0.3, 0.7]), rng.normal(size=(2, 3)), roots @ roots.transpose(0, 2, 1)


def test_a_conditioned_gaussian_is_the_conditional_of_the_joint_one():
    (_, *_), (mean, _), (cov, _) = components()
    matrix, y = OBSERVATION
    (m, c) = joint(mean, cov, matrix, NOISE_COV)
    # by the inverse of the joint covariance: the blocks of the precision
    precision = np.linalg.inv(c)
    block = np.linalg.inv(precision[:3, :3])
    got_mean, got_cov = exact.conditioned_gaussian(mean, cov, matrix, y, NOISE_COV)
    np.testing.assert_allclose(got_cov, block, rtol=1e-9, atol=1e-12)
    expected = mean - block @ precision[:3, 3:] @ (y - m[3:])
    np.testing.assert_allclose(got_mean, expected, rtol=1e-9)


def test_a_conditioned_mixture_has_the_density_of_bayes():
    weights, means, covs = components()
    matrix, y = OBSERVATION
    normal = scipy.stats.multivariate_normal
    evidence = sum(
        w * normal.pdf(y, matrix @ m, matrix @ c @ matrix.T + NOISE_COV)
        for w, m, c in zip(weights, means, covs, strict=True)
    )
    mixture, log_p = exact.conditioned_mixture(weights, means, covs, matrix, y, NOISE_COV)
    np.testing.assert_allclose(log_p, np.log(evidence), rtol=1e-10)
    for x in np.random.default_rng(1).normal(size=(5, 3)):

        def density(w, m, c, x=x):
            return sum(a * normal.pdf(x, b, d) for a, b, d in zip(w, m, c, strict=True))

        expected = density(weights, means, covs) * normal.pdf(y, matrix @ x, NOISE_COV) / evidence
        np.testing.assert_allclose(density(*map(np.asarray, mixture)), expected, rtol=1e-8)


def test_an_observation_without_noise_is_met():
    (_, *_), (mean, _), (cov, _) = components()
    matrix, y = OBSERVATION
    mean, cov = exact.conditioned_gaussian(mean, cov, matrix, y, np.zeros((2, 2)))
    np.testing.assert_allclose(matrix @ mean, y, rtol=1e-10)
    np.testing.assert_allclose(matrix @ cov, 0, atol=1e-10)


@pytest.mark.usefixtures("without_type_checks")
def test_observations_of_wrong_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"matrix, y, noise_cov: expected shapes \(m, 3\), \(m,\)"):
        exact.conditioned_gaussian(np.zeros(3), np.eye(3), np.eye(2), np.zeros(2), np.eye(2))
    observation = np.eye(2), np.ones(2), np.eye(2)
    with pytest.raises(ValueError, match=r"cov: expected shape \(2, 2\)"):
        exact.conditioned_gaussian(np.zeros(2), np.ones(2), *observation)
    with pytest.raises(ValueError, match=r"covs: expected shape \(2, 2, 2\)"):
        exact.conditioned_mixture(np.ones(2) / 2, np.zeros((2, 2)), np.eye(2), *observation)
    covs = np.stack([np.eye(2)] * 2)
    with pytest.raises(ValueError, match="weights: expected positive numbers of sum 1"):
        exact.conditioned_mixture(3 * np.ones(2), np.zeros((2, 2)), covs, *observation)


def test_an_accurate_observation_leaves_a_covariance_in_single_precision():
    cov = np.array([[1.0, 0.8], [0.8, 1.0]], np.float32)
    for noise in (1e-6, 1e-8):
        given = np.eye(2, dtype=np.float32), np.ones(2, np.float32), noise * np.float32(np.eye(2))
        _, posterior = exact.conditioned_gaussian(np.zeros(2, np.float32), cov, *given)
        np.testing.assert_allclose(np.diagonal(posterior), noise, rtol=1e-2)
