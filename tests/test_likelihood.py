"""Likelihoods against closed-form densities: the model's density is known wherever its flow map is."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind
from diffjax.exact import gaussian, gaussian_mixture
from diffjax.likelihood import (
    bits_per_dim,
    dequantize,
    divergence,
    exact_probes,
    gaussian_probes,
    log_likelihood,
    rademacher_probes,
)
from diffjax.schedules import cosine, edm, gvp, linear, linear_vp, sub_vp, ve
from diffjax.solve import solve_flow

M, V = np.array([0.7, -0.4]), np.array([0.3, 2.0])
WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[1.0, 0.5], [-1.5, 0.0]])
COVS = np.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]])
START = 1e-4
PATHS = {"linear_vp": linear_vp, "sub_vp": sub_vp, "ve": ve, "linear": linear, "gvp": gvp, "cosine": cosine, "edm": edm}
PRECISE = diffrax.PIDController(rtol=1e-9, atol=1e-9)


def switch(index, t):
    """All paths as one schedule, so that one compilation serves them."""
    return jax.lax.switch(
        index, [lambda t, make=make: tuple(map(jnp.asarray, make()(t))) for make in PATHS.values()], t
    )


@jax.jit
def gaussian_log_likelihood(index, x):
    schedule = bind(switch, index)
    denoise = gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule)
    return log_likelihood(
        jax.random.key(0), denoise, schedule, x, probes=exact_probes, start=START, stepsize_controller=PRECISE
    )


@pytest.mark.parametrize("path", PATHS)
def test_gaussian_log_density_on_every_path(path):
    # The model's prior is N(0, sigma(1)^2), not the marginal of t = 1. As the flow is known, so is the model's density:
    # log p(x_start) + log N(x_1; 0, sigma(1)^2) - log p(x_1), all Gaussian.
    start, end = oracles.alpha_sigma(path, START), oracles.alpha_sigma(path, 1.0)
    for x in (np.array([0.9, -1.3]), np.array([-0.2, 0.5])):
        x1 = oracles.gaussian_flow(M, V, start, end, x)
        prior = oracles.gaussian_log_density(np.zeros(2), np.zeros(2), 0.0, end[1], x1)
        data = oracles.gaussian_log_density(M, V, *start, x)
        expected = data + prior - oracles.gaussian_log_density(M, V, *end, x1)
        # the controller's tolerance of 1e-9 a step, times some hundreds of steps and log densities of a few nats
        np.testing.assert_allclose(gaussian_log_likelihood(list(PATHS).index(path), x), expected, atol=2e-6)
        # the prior's own bias: first order in m (x1 - m) / (std sigma^2), 3 / 50 at most
        assert abs(expected - data) < (0.06 if path in ("ve", "edm", "linear_vp", "sub_vp") else 1e-9)
        if path in ("ve", "edm"):  # the standard normal as a prior would be thousands of nats away, or at least one
            wrong = oracles.gaussian_log_density(np.zeros(2), np.zeros(2), 0.0, 1.0, x1)
            assert abs(wrong - prior) > 1.0


@jax.jit
def mixture_log_likelihood(index, x):
    schedule = bind(switch, index)
    denoise = gaussian_mixture(*map(jnp.asarray, (WEIGHTS, MEANS, COVS)), schedule)
    return log_likelihood(jax.random.key(0), denoise, schedule, x, probes=exact_probes, start=START)


@jax.jit
def mixture_end(index, x):
    schedule = bind(switch, index)
    denoise = gaussian_mixture(*map(jnp.asarray, (WEIGHTS, MEANS, COVS)), schedule)
    return solve_flow(denoise, schedule, x, START, 1.0, stepsize_controller=PRECISE)


@pytest.mark.parametrize("path", PATHS)
def test_mixture_log_density_on_every_path(path):
    # The model's prior is N(0, s^2), not the marginal of t = 1, so its density differs from the data's by
    # log N(x1; 0, s^2) - log p_1(x1), where the flow takes x to x1.
    start, end = oracles.alpha_sigma(path, START), oracles.alpha_sigma(path, 1.0)
    for x in (np.array([0.5, 0.2]), np.array([-1.0, 0.8])):
        x1 = np.asarray(mixture_end(list(PATHS).index(path), x))
        prior = oracles.gaussian_log_density(np.zeros(2), np.zeros(2), 0.0, end[1], x1)
        bias = prior - oracles.mixture_log_density(WEIGHTS, MEANS, COVS, *end, x1)
        expected = oracles.mixture_log_density(WEIGHTS, MEANS, COVS, *start, x) + bias
        # the default tolerances, 1e-5 a step over some dozens of steps
        np.testing.assert_allclose(mixture_log_likelihood(list(PATHS).index(path), x), expected, atol=1e-3)


def field(x):
    return jnp.stack([jnp.sin(x[0]) * x[1], x[0] ** 2 * x[1] + jnp.cos(x[1])])


def test_hutchinson_over_all_signs_is_the_trace():
    x = jnp.array([0.3, -1.2])
    trace = np.cos(0.3) * -1.2 + 0.3**2 - np.sin(-1.2)  # by hand
    signs = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    for probes in (signs, exact_probes(None, x), jnp.sqrt(2) * jnp.eye(2)):
        value, estimate = divergence(field, x, probes)
        np.testing.assert_allclose(estimate, trace, rtol=1e-13)
        np.testing.assert_allclose(value, field(x))
    # one probe alone is off by the antisymmetric rest: z^T J z = trace + z_0 z_1 (J_01 + J_10)
    off = np.sin(0.3) + 2 * 0.3 * -1.2
    np.testing.assert_allclose(divergence(field, x, signs[:1])[1], trace + off, rtol=1e-13)


def test_divergence_of_a_linear_map_of_any_shape():
    a = np.random.default_rng(0).normal(size=(2, 3, 2, 3))
    x = jnp.ones((2, 3))
    estimate = divergence(lambda x: jnp.einsum("ijkl,kl->ij", a, x), x, exact_probes(None, x))[1]
    np.testing.assert_allclose(estimate, np.einsum("ijij", a), rtol=1e-12)


def test_probes_are_unit_and_as_many_as_asked():
    x = jnp.zeros((2, 2))
    signs = rademacher_probes(jax.random.key(0), x, n=64)
    assert signs.shape == (64, 2, 2) and set(np.unique(signs)) == {-1.0, 1.0}
    # the mean square of 4 * 4096 normals is 1 within five standard errors, sqrt(2 / 16384) each
    assert abs(float(jnp.mean(gaussian_probes(jax.random.key(0), x, n=4096) ** 2)) - 1) < 5 * np.sqrt(2 / 16384)


def test_the_probes_are_drawn_once_for_the_whole_trajectory():
    # with one and the same probe z all along, z^T (A t) z integrates in closed form; and the probes are asked for once
    calls = []

    def probes(key, x):
        calls.append(1)
        return jnp.array([[1.0, -1.0]])

    schedule = linear()
    cov = np.array([[1.0, 0.6], [0.6, 2.0]])
    denoise = gaussian(jnp.zeros(2), jnp.asarray(cov), schedule)
    x = np.array([0.4, -0.7])
    value = log_likelihood(
        jax.random.key(0), denoise, schedule, jnp.asarray(x), probes=probes, start=0.0, stepsize_controller=PRECISE
    )
    assert len(calls) == 1
    # v = sum_i c_i(t) u_i u_i^T x with int c_i = log of the eigenvalue's growth of std: log(1 / sqrt(lambda_i))
    values, vectors = np.linalg.eigh(cov)
    expected = np.sum((vectors.T @ np.array([1.0, -1.0])) ** 2 * -0.5 * np.log(values))
    prior = oracles.gaussian_log_density(
        np.zeros(2), np.zeros(2), 0.0, 1.0, vectors @ (vectors.T @ x / np.sqrt(values))
    )
    np.testing.assert_allclose(value, prior + expected, atol=1e-6)
    assert abs(expected - -0.5 * np.log(np.linalg.det(cov))) > 0.1  # a single probe is not the trace


def test_bits_per_dim_of_uniform_data_is_the_number_of_bits():
    for levels in (2, 17, 256):
        log_density = -5 * np.log(2.0)  # uniform on [-1, 1]^5
        np.testing.assert_allclose(bits_per_dim(log_density, 5, levels), np.log2(levels), rtol=1e-14)
    np.testing.assert_allclose(bits_per_dim(jnp.array([-3 * np.log(2.0), 0.0]), 3), [1.0, 0.0])


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantized_values_stay_in_their_bins(levels):
    values = jnp.tile(jnp.arange(levels), 50)
    x = dequantize(jax.random.key(0), values, levels)
    np.testing.assert_array_equal(np.floor((np.asarray(x) + 1) / 2 * levels), values)
    u = (np.asarray(x) + 1) / 2 * levels - np.asarray(values)
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size) and 0 <= u.min() and u.max() < 1
