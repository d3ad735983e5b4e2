"""Training times: their distribution, their weights, and their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import schedules
from diffjax.parametrizations import EPS
from diffjax.times import (
    antithetic_times,
    log_normal_times,
    log_snr_times,
    stratified_times,
    uniform_times,
)
from diffjax.weightings import likelihood


def test_time_samplers():
    n, low, high = 4000, 0.2, 0.9
    for times in (uniform_times, stratified_times, antithetic_times):
        ts, weights = times(jax.random.key(0), n, low, high)
        assert np.all(weights == 1) and weights.shape == (n,)
        assert low <= float(ts.min()) and float(ts.max()) < high
        # mean and second moment of U[low, high) within five standard errors of independent times
        assert abs(float(ts.mean()) - 0.55) < 5 * 0.7 / np.sqrt(12 * n)
        second, fourth = ((high**k - low**k) / (k * (high - low)) for k in (3, 5))
        assert abs(float((ts**2).mean()) - second) < 5 * np.sqrt((fourth - second**2) / n)
    part = np.floor(
        (np.asarray(stratified_times(jax.random.key(1), 7, low, high)[0]) - low) / (high - low) * 7
    )
    np.testing.assert_array_equal(part, np.arange(7))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])  # the ends of float32's uniform numbers
@pytest.mark.parametrize("times", [uniform_times, stratified_times, antithetic_times])
def test_rounding_does_not_leave_the_interval(monkeypatch, times, u):
    """(n - 1 + u) / n rounds to 1 for n = 4096, where many a weighting is infinite."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u, jnp.float32))
    with jax.enable_x64(False):
        ts = np.asarray(times(jax.random.key(0), 4096, 1e-5, 1.0)[0])
    assert ts.dtype == np.float32 and ts.min() >= np.float32(1e-5) and ts.max() < 1


def test_antithetic_times_cancel_what_is_odd():
    for n in (6, 7):
        ts = np.asarray(antithetic_times(jax.random.key(0), n, 0.2, 0.9)[0])
        assert len(ts) == n
        np.testing.assert_allclose(ts[: n // 2] + ts[n - n // 2 :], 1.1, rtol=1e-12)


@pytest.mark.parametrize("path", ["linear_vp", "edm", "linear"])
def test_log_snr_times_have_a_uniform_log_snr_and_weigh_as_uniform_times(path):
    schedule, n, low, high = getattr(schedules, path)(), 1000, 0.02, 0.97
    ts, weights = log_snr_times(jax.random.key(0), n, schedule, low, high)
    alpha, sigma = np.array([oracles.alpha_sigma(path, float(t)) for t in ts]).T
    a, b = (np.log(np.divide(*oracles.alpha_sigma(path, t))) for t in (low, high))
    np.testing.assert_array_equal(np.floor((np.log(alpha / sigma) - b) / (a - b) * n), np.arange(n))
    # a stratified mean of n times has an error of order n^(-3/2): the mean of 1, t, t^2 over
    # uniform times
    for power in range(3):
        exact = (high ** (power + 1) - low ** (power + 1)) / ((power + 1) * (high - low))
        np.testing.assert_allclose(np.mean(weights * ts**power), exact, rtol=2e-3)
    # and with the likelihood weighting on the noise's error every time weighs the same
    weighed = weights * jax.vmap(lambda t: likelihood(schedule, EPS, t))(ts)
    np.testing.assert_allclose(weighed, 2 * (a - b) / (high - low), rtol=1e-9)


@pytest.mark.parametrize("path", ["edm", "linear_vp"])
def test_log_normal_times_through_their_quantiles(monkeypatch, path):
    # with z in place of the normal draw, log(sigma / alpha) must be mean + std z
    z = np.array([-1.3, 0.0, 0.7])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(z))
    ts, weights = log_normal_times(
        jax.random.key(0), 3, getattr(schedules, path)(), mean=-0.5, std=0.8
    )
    assert np.all(weights == 1)
    alpha, sigma = np.array([oracles.alpha_sigma(path, float(t)) for t in ts]).T
    np.testing.assert_allclose(np.log(sigma / alpha), -0.5 + 0.8 * z, rtol=1e-9, atol=1e-12)
