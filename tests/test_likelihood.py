"""Likelihoods against closed-form densities: the model's density is known wherever its flow map is."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats

from diffjax import bind
from diffjax.divergence import divergence, exact_probes, gaussian_probes, rademacher_probes
from diffjax.exact import gaussian, gaussian_mixture
from diffjax.likelihood import (
    bits_per_dim,
    dequantize,
    importance_weighted_bound,
    log_likelihood,
    quantize,
    standard_errors,
    variational_dequantize,
)
from diffjax.schedules import cosine, edm, gvp, linear, linear_vp, sub_vp, ve
from diffjax.solve import solve_flow

# A Gaussian, N(0.7, 0.3) x N(-0.4, 2.0) turned so that its Jacobian is not diagonal and a probe is not its trace; written
# as the mixture of two that coincide, it shares the compiled program of the other mixture.
M, V = np.array([0.7, -0.4]), np.array([0.3, 2.0])
TURN = np.array([[0.8, -0.6], [0.6, 0.8]])
COV = TURN @ np.diag(V) @ TURN.T
GAUSSIAN = np.array([0.3, 0.7]), np.stack([TURN @ M] * 2), np.stack([COV] * 2)
MIXTURE = (
    np.array([0.3, 0.7]),
    np.array([[1.0, 0.5], [-1.5, 0.0]]),
    np.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]),
)
XS = np.array([[0.9, -1.3], [-0.2, 0.5]])
START = 1e-4
PATHS = {"linear_vp": linear_vp, "sub_vp": sub_vp, "ve": ve, "linear": linear, "gvp": gvp, "cosine": cosine, "edm": edm}
PRECISE = diffrax.PIDController(rtol=1e-9, atol=1e-9)
TOLERANCE = 1e-7  # the controller's 1e-9 a step, times about a hundred steps


def switch(index, t):
    """All paths as one schedule, so that one compilation serves them."""
    return jax.lax.switch(
        index, [lambda t, make=make: tuple(map(jnp.asarray, make()(t))) for make in PATHS.values()], t
    )


@jax.jit
def models(index, seeds):
    """Of both data sets at each x: the end of the flow, the log density by the exact trace, and by one probe a seed."""

    def one(weights, means, covs, x):
        schedule = bind(switch, index)
        denoise = gaussian_mixture(weights, means, covs, schedule)

        def log_density(probes, key):
            return log_likelihood(key, denoise, schedule, x, probes=probes, start=START, stepsize_controller=PRECISE)

        alpha = schedule(jnp.asarray(START))[0]
        end = solve_flow(denoise, schedule, alpha * x, START, 1.0, stepsize_controller=PRECISE)
        hutchinson = jax.vmap(lambda seed: log_density(rademacher_probes, jax.random.key(seed)))(seeds)
        return end, log_density(exact_probes, None), hutchinson

    each_x = jax.vmap(one, in_axes=(None, None, None, 0))
    return jax.vmap(each_x, in_axes=(0, 0, 0, None))(*map(jnp.stack, zip(GAUSSIAN, MIXTURE, strict=True)), XS)


def seeds_of_all_signs():
    """Four seeds whose keys draw the four sign vectors, and those."""
    signs = jax.vmap(lambda seed: rademacher_probes(jax.random.key(seed), jnp.zeros(2))[0])(jnp.arange(64))
    signs, seeds = np.unique(signs, axis=0, return_index=True)
    assert len(seeds) == 4
    return seeds, signs


@pytest.mark.parametrize("path", PATHS)
def test_log_density_on_every_path(path):
    # The model is the prior N(0, sigma(1)^2) pushed through the flow, not the data: where the flow takes
    # y = alpha(start) x to x1, log p(x) = d log alpha + log p_start(y) - log p_1(x1) + log N(x1; 0, sigma(1)^2),
    # and only the integrator's error is left. alpha(1e-4) is 0.9999 on the linear path.
    seeds, signs = seeds_of_all_signs()
    ends, exact, hutchinson = map(np.asarray, models(list(PATHS).index(path), seeds))
    start, end = oracles.alpha_sigma(path, START), oracles.alpha_sigma(path, 1.0)
    for data, x1s, values, probed in zip((GAUSSIAN, MIXTURE), ends, exact, hutchinson, strict=True):
        for x, x1, value, of_signs in zip(XS, x1s, values, probed, strict=True):
            prior = oracles.gaussian_log_density(np.zeros(2), np.zeros(2), 0.0, end[1], x1)
            density = 2 * np.log(start[0]) + oracles.mixture_log_density(*data, *start, start[0] * x)
            bias = prior - oracles.mixture_log_density(*data, *end, x1)
            np.testing.assert_allclose(value, density + bias, atol=TOLERANCE)
            np.testing.assert_allclose(of_signs.mean(), value, atol=TOLERANCE)  # Hutchinson over all signs is the trace
            # sigma(1) = 1 and alpha(1) = 0 make the prior the marginal; elsewhere it is off by at most
            # |x1| |alpha m| / sigma^2, 2 / 50 on VE, and a small second order
            assert abs(bias) < (0.06 if path in ("ve", "edm", "linear_vp", "sub_vp") else 1e-9)
    # The Gaussian's flow and each single probe are known: J = sum_i u_i u_i^T d log(std_i) / dt.
    before, after = (oracles.gaussian_marginal(M, V, *at)[1] for at in (start, end))
    for x, x1, of_signs in zip(XS, ends[0], hutchinson[0], strict=True):
        expected = TURN @ oracles.gaussian_flow(M, V, start, end, TURN.T @ (start[0] * x))
        np.testing.assert_allclose(x1, expected, rtol=TOLERANCE, atol=TOLERANCE)
        prior = oracles.gaussian_log_density(np.zeros(2), np.zeros(2), 0.0, end[1], expected)
        integrals = (signs @ TURN) ** 2 @ (0.5 * np.log(after / before))
        np.testing.assert_allclose(of_signs, 2 * np.log(start[0]) + prior + integrals, atol=TOLERANCE)
        assert np.ptp(integrals) > 0.5  # a single probe is not the trace


def test_data_of_a_path_that_starts_late():
    # The network starts at t = 0.4, where alpha = 0.6. The data of which the flow's start is alpha times have the
    # density of N(m, v + (sigma / alpha)^2), because the linear path ends at the prior exactly.
    x, start = np.array([0.3, -0.8]), 0.4
    denoise = gaussian(jnp.array(M), jnp.diag(jnp.array(V)), linear())
    options = {"probes": exact_probes, "start": start, "stepsize_controller": PRECISE}
    value = log_likelihood(None, denoise, linear(), jnp.array(x), **options)
    expected = scipy.stats.norm.logpdf(x, M, np.sqrt(V + (0.4 / 0.6) ** 2)).sum()
    np.testing.assert_allclose(value, expected, atol=TOLERANCE)
    with pytest.raises(ValueError, match="start: expected a time where alpha > 0, got alpha = 0"):
        log_likelihood(None, denoise, linear(), jnp.array(x), probes=exact_probes, start=1.0)


ADJOINTS = [diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint(), diffrax.DirectAdjoint()]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_the_derivative_by_the_model_whatever_the_adjoint(adjoint):
    # on the linear path between 0 and 1 the model of N(0, v I) is N(0, v I)
    x, v = jnp.array([0.4, -1.1]), 0.7

    def log_density(v):
        denoise = gaussian(jnp.zeros(2), v * jnp.eye(2), linear())
        options = {"start": 0.0, "adjoint": adjoint, "stepsize_controller": PRECISE}
        return log_likelihood(None, denoise, linear(), x, probes=exact_probes, **options)

    forward = isinstance(adjoint, diffrax.DirectAdjoint)
    value, slope = jax.jvp(log_density, (v,), (1.0,)) if forward else jax.value_and_grad(log_density)(v)
    np.testing.assert_allclose(value, -np.log(2 * np.pi * v) - x @ x / (2 * v), atol=TOLERANCE)
    np.testing.assert_allclose(slope, -1 / v + x @ x / (2 * v**2), atol=TOLERANCE)


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
    np.testing.assert_array_equal(quantize(x, levels), values)
    u = (np.asarray(x) + 1) / 2 * levels - np.asarray(values)
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size) and 0 <= u.min() and u.max() < 1


@pytest.mark.parametrize("levels", [17, 256, 65536])
def test_float32_does_not_leave_the_bins(levels):
    # value + u rounds up into the next bin for 1 - u < 2^-17 at 8 bits, 8 of a million draws; a saturated sigmoid is 0 or 1
    inside = jnp.tile(jnp.arange(levels, dtype=jnp.int32), 10**6 // levels)
    with jax.enable_x64(False):
        uniform = dequantize(jax.random.key(0), inside, levels)
        assert np.array_equal(quantize(uniform, levels), inside)
        ends = jnp.arange(levels, dtype=jnp.int32)
        low, high = (variational_dequantize(jax.random.key(0), ends, levels, m, 1.0)[0] for m in (-200.0, 200.0))
        assert uniform.dtype == low.dtype == jnp.float32
    for values, x in ((inside, uniform), (ends, low), (ends, high)):
        np.testing.assert_array_equal(np.floor((np.asarray(x, float) + 1) / 2 * levels), values)


# ---- discrete data ---------------------------------------------------------------------------------------------------

W, MODES, STDS = np.array([0.4, 0.6]), np.array([-0.5, 0.3]), np.array([0.2, 0.35])


def density(x):
    return W @ scipy.stats.norm.pdf(np.asarray(x)[None], MODES[:, None], STDS[:, None])


@pytest.mark.parametrize("value", [0, 1, 2])
def test_uniform_and_importance_weighted_bounds_of_a_known_bin(value):
    # K-fold Gauss-Legendre quadrature in place of the draws: 12 nodes are exact to about 1e-9 on these densities
    levels, edges = 3, -1 + 2 / 3 * np.array([value, value + 1])
    exact = W @ np.diff(scipy.stats.norm.cdf(edges[None], MODES[:, None], STDS[:, None]))[:, 0]
    nodes, weights = np.polynomial.legendre.leggauss(12)
    log_densities = np.log(density(2 * (value + (nodes + 1) / 2) / levels - 1))
    bits = []
    for k in (1, 2, 4):
        draws = np.stack([axis.ravel() for axis in np.meshgrid(*[log_densities] * k)])
        probabilities = np.prod([axis.ravel() for axis in np.meshgrid(*[weights / 2] * k)], axis=0)
        bounds = np.asarray(bits_per_dim(importance_weighted_bound(draws), 1, levels))
        # the mean of K weights is unbiased, whatever K
        np.testing.assert_allclose(probabilities @ 2.0**-bounds, exact, rtol=1e-8)
        bits.append(probabilities @ bounds)
    gaps = np.array(bits) + np.log2(exact)
    assert (gaps > 0).all() and (np.diff(gaps) < 0).all()
    # to first order in 1/K the gap is that of the delta method, var(w) / (2 K mean(w)^2): twice as many, half of it
    assert 0.4 < gaps[2] / gaps[1] < 0.6


PROBABILITY, LEVELS, VALUES = 0.2, 5, np.array([0, 3])
MEAN, SCALE = np.array([-0.8, 1.5]), np.array([0.6, 1.4])


def model_log_density(x):
    """Of a model whose dequantization noise is logit-normal: the derivative by x of a distribution function on one bin."""

    def distribution(x, value, mean, scale):
        u = (x + 1) * LEVELS / 2 - value
        return jax.scipy.stats.norm.cdf((jnp.log(u) - jnp.log1p(-u)) / scale - mean / scale)

    slopes = jax.vmap(jax.grad(distribution))(x, VALUES, MEAN, SCALE)
    return jnp.log(PROBABILITY) + jnp.sum(jnp.log(slopes))


def log_weights(mean, scale):
    def one(key):
        x, log_q = variational_dequantize(key, VALUES, LEVELS, mean, scale)
        return model_log_density(x) - log_q

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20000))


def test_the_variational_bound_is_exact_with_the_right_noise():
    # log p - log q is the log probability for every single draw; rounding of u next to 0 and 1 costs some digits
    bits = bits_per_dim(log_weights(MEAN, SCALE), 2, LEVELS)
    np.testing.assert_allclose(bits, -np.log2(PROBABILITY) / 2, rtol=1e-8)


def test_the_variational_bound_is_off_by_the_divergence_of_the_noise():
    # sigmoid keeps the Kullback-Leibler divergence, so it is that of two normals
    mean, scale = np.array([-0.5, 1.0]), np.array([0.8, 1.1])
    gap = np.sum(np.log(SCALE / scale) + (scale**2 + (mean - MEAN) ** 2) / (2 * SCALE**2) - 0.5)
    exact = np.log(PROBABILITY / (2 / LEVELS) ** 2)
    values = np.asarray(log_weights(mean, scale))
    error = values.std() / np.sqrt(values.size)
    assert abs(values.mean() - (exact - gap)) < 5 * error < gap / 4
    assert abs(importance_weighted_bound(values.reshape(100, 200)).mean() - exact) < 0.1 * gap  # of 100 draws each


def test_saturated_noise_has_finite_gradients():
    def f(mean, scale):
        x, log_q = variational_dequantize(jax.random.key(0), jnp.array([0, 255]), 256, mean, scale)
        return jnp.sum(x) - log_q

    with jax.enable_x64(False):
        compiled = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
        for mean in (-1e4, -200.0, 200.0, 1e4):
            value, gradients = compiled(mean, 1.0)
            assert np.isfinite([value, *gradients]).all()
            # log q = -log u (1 - u) + ... there, whose slope by the logit is 1 or -1
            np.testing.assert_allclose(gradients[0], -2 * np.sign(mean), atol=1e-6)


# ---- standard errors -------------------------------------------------------------------------------------------------


def test_standard_errors_are_unbiased_over_all_sign_probes():
    # z^T A z of three matrices with two sign probes each, all 4^6 tables of draws
    matrices = np.array([[[1.0, 0.5], [0.3, 2.0]], [[-4.0, 1.0], [0.0, 1.5]], [[3.0, 0.2], [-0.6, 3.0]]])
    signs = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    forms = np.einsum("si,nij,sj->ns", signs, matrices, signs)
    draws = np.stack([axis.ravel() for axis in np.meshgrid(*[np.arange(4)] * 6)], -1).reshape(-1, 3, 2)
    errors = jax.vmap(standard_errors)(jnp.asarray(forms[np.arange(3)[:, None], draws]))
    traces = np.trace(matrices, axis1=1, axis2=2)
    np.testing.assert_allclose(np.mean(errors.mean), traces.mean(), rtol=1e-12)
    np.testing.assert_allclose(np.mean(errors.of_probes**2), np.var(errors.mean), rtol=1e-12)
    np.testing.assert_allclose(np.mean(errors.of_data**2), scipy.stats.sem(traces) ** 2, rtol=1e-12)


def test_standard_errors_of_one_example_and_of_equal_ones():
    one = standard_errors(jnp.array([[1.0, 3.0]]))
    assert np.isnan(one.of_data) and one.of_probes == 1.0
    assert standard_errors(jnp.array([[1.0, 3.0], [3.0, 1.0]])).of_data == 0.0  # not the root of a negative number
