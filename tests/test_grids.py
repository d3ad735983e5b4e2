"""Time grids: their ends, and that they are even in what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import exact, samplers, schedules
from diffjax.grids import karras, quadratic, uniform, uniform_log_snr


def log_snrs(path, ts):
    pairs = [oracles.alpha_sigma(path, float(t)) for t in ts]
    return np.array([np.log(alpha / sigma) for alpha, sigma in pairs])


def test_uniform_and_quadratic_are_even():
    np.testing.assert_allclose(uniform(5, 0.9, 0.2), np.linspace(0.9, 0.2, 6), rtol=1e-14)
    np.testing.assert_allclose(np.diff(np.sqrt(quadratic(5, 0.9, 0.2)), 2), 0, atol=1e-14)
    assert uniform(5)[0] == quadratic(5)[0] == 1.0 and uniform(5)[-1] == quadratic(5)[-1] == 0.0


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm", "cosine"])
def test_uniform_log_snr_is_even_in_it(path):
    ts = jax.jit(lambda a, b: uniform_log_snr(getattr(schedules, path)(), 6, a, b))(0.99, 1e-3)
    assert float(ts[0]) == 0.99 and float(ts[-1]) == 1e-3 and np.all(np.diff(ts) < 0)
    np.testing.assert_allclose(np.diff(log_snrs(path, ts), 2), 0, atol=1e-9)


@pytest.mark.parametrize("path", ["linear", "gvp", "cosine", "edm", "ve"])
def test_the_log_snr_grid_reaches_ends_where_the_log_snr_is_infinite(path):
    schedule = getattr(schedules, path)()
    ts = uniform_log_snr(schedule, 6, end=0.0)
    assert ts[0] == 1.0 and ts[-1] == 0.0 and np.all(np.diff(ts) < 0)
    # the first and the last log-SNR are those of the times 1e-3 inside, where they would be
    # infinite
    infinite = [min(a, s) < 1e-12 for a, s in (oracles.alpha_sigma(path, t) for t in (1.0, 0.0))]
    ends = [abs(t - 1e-3) if far else t for t, far in zip((1.0, 0.0), infinite, strict=True)]
    assert infinite[1] == (path != "ve")
    expected = np.linspace(*log_snrs(path, ends), 7)
    np.testing.assert_allclose(log_snrs(path, ts[1:-1]), expected[1:-1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", ["linear", "gvp", "cosine"])
def test_the_log_snr_grid_goes_from_pure_noise_to_gaussian_data(path):
    # the flow of N(m, s^2) maps N(0, 1) to N(m, s^2) affinely: x0 = m + s x1
    schedule, mean, std = getattr(schedules, path)(), 0.7, 0.6
    denoise = exact.gaussian(jnp.array([mean]), jnp.array([[std**2]]), schedule)
    x1 = jnp.array([[-1.5], [0.3], [2.0]])
    x0 = samplers.sample(
        jax.random.key(0),
        samplers.unipc(denoise, schedule),
        x1,
        uniform_log_snr(schedule, 40, end=0.0),
    )
    np.testing.assert_allclose(x0, mean + std * x1, atol=2e-3)


def test_karras_grid_is_that_of_the_paper():
    # eq. 5, in his sigma, with his numbers
    n, rho = 18, 7
    i = np.arange(n)
    sigmas = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    ts = jax.jit(lambda end: karras(schedules.edm(80.0), n, end=end))(0.002 / 80)
    np.testing.assert_allclose(80 * np.asarray(ts), [*sigmas, 0.0], rtol=1e-11)


def test_karras_on_another_path_visits_the_same_noise_levels():
    ts = jax.jit(lambda: karras(schedules.linear(), 8, 0.9, 0.01))()
    ratios = np.exp(-log_snrs("linear", ts[:-1])) ** (1 / 7)
    np.testing.assert_allclose(np.diff(ratios, 2), 0, atol=1e-10)
    assert float(ts[-1]) == 0.0 and jnp.all(ts[1:] < ts[:-1])
