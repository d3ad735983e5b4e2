"""Likelihoods against closed-form densities: the model's density is known wherever its flow map is."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats

from diffjax import bind
from diffjax.divergence import exact_probes, rademacher_probes
from diffjax.exact import gaussian, gaussian_mixture
from diffjax.likelihood import log_likelihood, standard_errors
from diffjax.schedules import cosine, edm, gvp, linear, linear_vp, sub_vp, ve
from diffjax.solve import solve_flow

# A Gaussian, N(0.7, 0.3) x N(-0.4, 2.0) turned so that its Jacobian is not diagonal and a probe is
# not its trace; written as the mixture of two that coincide, it shares the compiled program of the
# other mixture.
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
PATHS = {
    "linear_vp": linear_vp,
    "sub_vp": sub_vp,
    "ve": ve,
    "linear": linear,
    "gvp": gvp,
    "cosine": cosine,
    "edm": edm,
}
PRECISE = diffrax.PIDController(rtol=1e-9, atol=1e-9)
TOLERANCE = 1e-7  # the controller's 1e-9 a step, times about a hundred steps


def switch(index, t):
    """All paths as one schedule, so that one compilation serves them."""
    return jax.lax.switch(
        index,
        [lambda t, make=make: tuple(map(jnp.asarray, make()(t))) for make in PATHS.values()],
        t,
    )


@jax.jit
def models(index, seeds):
    """Of both data sets at each x: the end of the flow, the log density by the exact trace, and by
    one probe a seed.
    """

    def one(weights, means, covs, x):
        schedule = bind(switch, index)
        denoise = gaussian_mixture(weights, means, covs, schedule)

        def log_density(probes, key):
            return log_likelihood(
                key, denoise, schedule, x, probes=probes, start=START, stepsize_controller=PRECISE
            )

        alpha = schedule(jnp.asarray(START))[0]
        end = solve_flow(denoise, schedule, alpha * x, START, 1.0, stepsize_controller=PRECISE)
        hutchinson = jax.vmap(lambda seed: log_density(rademacher_probes, jax.random.key(seed)))(
            seeds
        )
        return end, log_density(exact_probes, None), hutchinson

    each_x = jax.vmap(one, in_axes=(None, None, None, 0))
    return jax.vmap(each_x, in_axes=(0, 0, 0, None))(
        *map(jnp.stack, zip(GAUSSIAN, MIXTURE, strict=True)), XS
    )


def seeds_of_all_signs():
    """Four seeds whose keys draw the four sign vectors, and those."""
    signs = jax.vmap(lambda seed: rademacher_probes(jax.random.key(seed), jnp.zeros(2))[0])(
        jnp.arange(64)
    )
    signs, seeds = np.unique(signs, axis=0, return_index=True)
    assert len(seeds) == 4
    return seeds, signs


@pytest.mark.parametrize("path", PATHS)
def test_log_density_on_every_path(path):
    # The model is the prior N(0, sigma(1)^2) pushed through the flow, not the data: where the flow
    # takes y = alpha(start) x to x1, log p(x) = d log alpha + log p_start(y) - log p_1(x1) + log
    # N(x1; 0, sigma(1)^2), and only the integrator's error is left. alpha(1e-4) is 0.9999 on the
    # linear path.
    seeds, signs = seeds_of_all_signs()
    ends, exact, hutchinson = map(np.asarray, models(list(PATHS).index(path), seeds))
    start, end = oracles.alpha_sigma(path, START), oracles.alpha_sigma(path, 1.0)
    for data, x1s, values, probed in zip((GAUSSIAN, MIXTURE), ends, exact, hutchinson, strict=True):
        for x, x1, value, of_signs in zip(XS, x1s, values, probed, strict=True):
            prior = oracles.gaussian_log_density(np.zeros(2), np.zeros(2), 0.0, end[1], x1)
            density = 2 * np.log(start[0]) + oracles.mixture_log_density(
                *data, *start, start[0] * x
            )
            bias = prior - oracles.mixture_log_density(*data, *end, x1)
            np.testing.assert_allclose(value, density + bias, atol=TOLERANCE)
            # Hutchinson over all signs is the trace
            np.testing.assert_allclose(of_signs.mean(), value, atol=TOLERANCE)
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
        np.testing.assert_allclose(
            of_signs, 2 * np.log(start[0]) + prior + integrals, atol=TOLERANCE
        )
        assert np.ptp(integrals) > 0.5  # a single probe is not the trace


def test_data_of_a_path_that_starts_late():
    # The network starts at t = 0.4, where alpha = 0.6. The data of which the flow's start is alpha
    # times have the density of N(m, v + (sigma / alpha)^2), because the linear path ends at the
    # prior exactly.
    x, start = np.array([0.3, -0.8]), 0.4
    denoise = gaussian(jnp.array(M), jnp.diag(jnp.array(V)), linear())
    options = {"probes": exact_probes, "start": start, "stepsize_controller": PRECISE}
    value = log_likelihood(None, denoise, linear(), jnp.array(x), **options)
    expected = scipy.stats.norm.logpdf(x, M, np.sqrt(V + (0.4 / 0.6) ** 2)).sum()
    np.testing.assert_allclose(value, expected, atol=TOLERANCE)
    with pytest.raises(ValueError, match="start: expected a time where alpha > 0, got alpha = 0"):
        log_likelihood(None, denoise, linear(), jnp.array(x), probes=exact_probes, start=1.0)


ADJOINTS = [
    diffrax.RecursiveCheckpointAdjoint(),
    diffrax.BacksolveAdjoint(),
    diffrax.DirectAdjoint(),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_the_derivative_by_the_model_whatever_the_adjoint(adjoint):
    # on the linear path between 0 and 1 the model of N(0, v I) is N(0, v I)
    x, v = jnp.array([0.4, -1.1]), 0.7

    def log_density(v):
        denoise = gaussian(jnp.zeros(2), v * jnp.eye(2), linear())
        options = {"start": 0.0, "adjoint": adjoint, "stepsize_controller": PRECISE}
        return log_likelihood(None, denoise, linear(), x, probes=exact_probes, **options)

    forward = isinstance(adjoint, diffrax.DirectAdjoint)
    value, slope = (
        jax.jvp(log_density, (v,), (1.0,)) if forward else jax.value_and_grad(log_density)(v)
    )
    np.testing.assert_allclose(value, -np.log(2 * np.pi * v) - x @ x / (2 * v), atol=TOLERANCE)
    np.testing.assert_allclose(slope, -1 / v + x @ x / (2 * v**2), atol=TOLERANCE)


def test_standard_errors_are_unbiased_over_all_sign_probes():
    # z^T A z of three matrices with two sign probes each, all 4^6 tables of draws
    matrices = np.array(
        [[[1.0, 0.5], [0.3, 2.0]], [[-4.0, 1.0], [0.0, 1.5]], [[3.0, 0.2], [-0.6, 3.0]]]
    )
    signs = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    forms = np.einsum("si,nij,sj->ns", signs, matrices, signs)
    draws = np.stack([axis.ravel() for axis in np.meshgrid(*[np.arange(4)] * 6)], -1).reshape(
        -1, 3, 2
    )
    errors = jax.vmap(standard_errors)(jnp.asarray(forms[np.arange(3)[:, None], draws]))
    traces = np.trace(matrices, axis1=1, axis2=2)
    np.testing.assert_allclose(np.mean(errors.mean), traces.mean(), rtol=1e-12)
    np.testing.assert_allclose(np.mean(errors.of_probes**2), np.var(errors.mean), rtol=1e-12)
    np.testing.assert_allclose(np.mean(errors.of_data**2), scipy.stats.sem(traces) ** 2, rtol=1e-12)


def test_standard_errors_of_one_example_and_of_equal_ones():
    one = standard_errors(jnp.array([[1.0, 3.0]]))
    assert np.isnan(one.of_data) and one.of_probes == 1.0
    # not the root of a negative number
    assert standard_errors(jnp.array([[1.0, 3.0], [3.0, 1.0]])).of_data == 0.0
