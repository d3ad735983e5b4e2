"""Losses: their minimisers in closed form, and each weighting against what its paper weights."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind, schedules
from diffjax.losses import conditional_flow_matching, denoising, flow_matching
from diffjax.parametrizations import EPS, SCORE, VELOCITY, X0, V, as_denoiser, edm_preconditioning
from diffjax.times import log_normal_times, stratified_times, uniform_times
from diffjax.weightings import edm_weighting, inverse_variance, likelihood, min_snr, unweighted

KINDS = {"X0": X0, "EPS": EPS, "SCORE": SCORE, "V": V, "VELOCITY": VELOCITY, "edm": edm_preconditioning(0.5)}


def affine(params, x, t):
    return params[0] * x + params[1]


def test_denoising_a_velocity_on_the_linear_path_is_flow_matching():
    network, x0, t = bind(affine, jnp.array([0.3, -0.2])), jnp.array([0.5, -1.0, 2.0]), 0.35
    eps = jax.random.normal(jax.random.key(1), (3,))
    loss = denoising(jax.random.key(1), network, schedules.linear(), VELOCITY, x0, t)
    np.testing.assert_allclose(loss, conditional_flow_matching(network, x0, eps, t), rtol=1e-13)
    # by hand: |a x_t + b - (eps - x0)|^2, a mean over the elements
    x = (1 - t) * np.asarray(x0) + t * np.asarray(eps)
    np.testing.assert_allclose(loss, np.mean((0.3 * x - 0.2 - (np.asarray(eps) - np.asarray(x0))) ** 2), rtol=1e-13)
    np.testing.assert_allclose(flow_matching(network, lambda x, t: -x, jnp.ones(3), t), 1.1**2, rtol=1e-13)


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
@pytest.mark.parametrize("name", KINDS)
def test_the_exact_denoiser_minimises_the_expected_loss(monkeypatch, name, path):
    # Data N(m, v) in 1-D and an affine network: the expectation over (x0, eps) of a quadratic is exact with 5-point
    # Gauss-Hermite rules. Its Newton minimiser must be the exact posterior mean.
    schedule, t, m, v = getattr(schedules, path)(), 0.4, 0.7, 0.3
    points, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape))

    def expected(params):
        def at(z, eps):
            return denoising(eps, bind(affine, params), schedule, KINDS[name], (m + np.sqrt(v) * z)[None], t)

        values = jax.vmap(jax.vmap(at, (None, 0)), (0, None))(jnp.asarray(points), jnp.asarray(points))
        return weights @ values @ weights

    zero = jnp.zeros(2)
    gradient, hessian = jax.jit(lambda p: (jax.grad(expected)(p), jax.hessian(expected)(p)))(zero)
    best = np.linalg.solve(hessian, -gradient)
    x = np.array([1.1])
    alpha, sigma = oracles.alpha_sigma(path, t)
    denoised = as_denoiser(bind(affine, jnp.asarray(best)), schedule, KINDS[name])(jnp.asarray(x), t)
    exact = oracles.gaussian_score(m, v, alpha, sigma, x)
    np.testing.assert_allclose(denoised.eps, -sigma * exact, rtol=1e-7)
    np.testing.assert_allclose(denoised.x0, (x + sigma**2 * exact) / alpha, rtol=1e-7)  # Tweedie


def test_weightings_on_the_error_that_they_speak_of():
    for path in ("linear_vp", "linear", "gvp"):
        schedule = getattr(schedules, path)()
        for t in (0.05, 0.3, 0.9):
            alpha, sigma = oracles.alpha_sigma(path, t)
            g2, snr = float(oracles.TABLE[path][3](oracles.mp.mpf(t))), (alpha / sigma) ** 2
            s, sd = sigma / alpha, 0.5
            for weighting, kind, value in (
                (unweighted, V, 1.0),
                (inverse_variance, SCORE, 1.0),
                (inverse_variance, EPS, sigma**-2),
                (likelihood, SCORE, g2),
                (min_snr(5.0), X0, min(snr, 5.0)),
                (min_snr(5.0), EPS, min(snr, 5.0) / snr),
                (edm_weighting(sd), X0, (s**2 + sd**2) / (s * sd) ** 2),
                (edm_weighting(sd), edm_preconditioning(sd), 1.0),
            ):
                np.testing.assert_allclose(weighting(schedule, kind, t), value, rtol=1e-9)


@pytest.mark.parametrize("weighting", [inverse_variance, likelihood, min_snr(5.0), edm_weighting(0.5)])
def test_a_weighted_loss_does_not_depend_on_the_parametrization(weighting):
    # one denoiser, wrong in a known way, as a network of each parametrization: the same loss
    schedule, x0, t = schedules.linear_vp(), jnp.array([0.5, -1.0]), 0.35
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    f, g2 = (float(oracles.TABLE["linear_vp"][k](oracles.mp.mpf(t))) for k in (2, 3))

    def wrong(x):
        return jnp.tanh(x)  # its estimate of eps

    def x0_of(x):
        return (x - sigma * wrong(x)) / alpha

    networks = {
        "X0": lambda x, t: x0_of(x),
        "EPS": lambda x, t: wrong(x),
        "SCORE": lambda x, t: -wrong(x) / sigma,
        "V": lambda x, t: alpha * wrong(x) - sigma * x0_of(x),
        "VELOCITY": lambda x, t: f * x + g2 / (2 * sigma) * wrong(x),
    }
    values = [denoising(jax.random.key(0), n, schedule, KINDS[k], x0, t, weighting) for k, n in networks.items()]
    np.testing.assert_allclose(values, values[0], rtol=1e-9)


def test_time_samplers():
    n, low, high = 4000, 0.2, 0.9
    for ts in (uniform_times(jax.random.key(0), n, low, high), stratified_times(jax.random.key(0), n, low, high)):
        assert low <= float(ts.min()) and float(ts.max()) < high
        # mean and second moment of U[low, high) within five standard errors
        assert abs(float(ts.mean()) - 0.55) < 5 * 0.7 / np.sqrt(12 * n)
    part = np.floor((np.asarray(stratified_times(jax.random.key(1), 7, low, high)) - low) / (high - low) * 7)
    np.testing.assert_array_equal(part, np.arange(7))


@pytest.mark.parametrize("path", ["edm", "linear_vp"])
def test_log_normal_times_through_their_quantiles(monkeypatch, path):
    # with z in place of the normal draw, log(sigma / alpha) must be mean + std z
    z = np.array([-1.3, 0.0, 0.7])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(z))
    ts = log_normal_times(jax.random.key(0), 3, getattr(schedules, path)(), mean=-0.5, std=0.8)
    alpha, sigma = np.array([oracles.alpha_sigma(path, float(t)) for t in ts]).T
    np.testing.assert_allclose(np.log(sigma / alpha), -0.5 + 0.8 * z, rtol=1e-9, atol=1e-12)
