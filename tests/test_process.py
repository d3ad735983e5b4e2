"""The forward process: Bayes' rule and the composition of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import schedules
from diffjax.process import perturb, posterior, transition

PATHS = pytest.mark.parametrize("path", oracles.TABLE)
S, T = 0.3, 0.7


@PATHS
def test_steps_compose(path):
    # x_s then x_t has the marginal of x_t: scale alpha_s = alpha_t, and variances add up
    schedule = getattr(schedules, path)()
    scale, std = (float(c) for c in jax.jit(lambda: transition(schedule, S, T))())
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (
        oracles.alpha_sigma(path, S),
        oracles.alpha_sigma(path, T),
    )
    np.testing.assert_allclose(scale * alpha_s, alpha_t, rtol=1e-11)
    np.testing.assert_allclose(std**2 + scale**2 * sigma_s**2, sigma_t**2, rtol=1e-11)


@PATHS
def test_posterior_is_bayes_rule(path):
    # given x0, (x_s, x_t) is Gaussian with covariance k sigma_s^2, k the scale of the step:
    # condition x_s on x_t
    schedule = getattr(schedules, path)()
    x_weight, x0_weight, std = (float(c) for c in jax.jit(lambda: posterior(schedule, S, T))())
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (
        oracles.alpha_sigma(path, S),
        oracles.alpha_sigma(path, T),
    )
    cross = alpha_t / alpha_s * sigma_s**2
    gain = cross / sigma_t**2
    np.testing.assert_allclose(x_weight, gain, rtol=1e-10)
    np.testing.assert_allclose(x0_weight, alpha_s - gain * alpha_t, rtol=1e-10)
    np.testing.assert_allclose(std**2, sigma_s**2 - gain * cross, rtol=1e-10)


def test_posterior_is_ddpms_beta_tilde():
    # Ho et al., eq. 7, from the betas of the chain themselves
    betas = np.linspace(1e-4, 0.02, 10)
    bar = np.cumprod(1 - betas)
    schedule = schedules.from_betas(jnp.asarray(betas))
    for i in (2, 9):
        x_weight, x0_weight, std = posterior(schedule, i / 10, (i + 1) / 10)
        np.testing.assert_allclose(std**2, (1 - bar[i - 1]) / (1 - bar[i]) * betas[i], rtol=1e-10)
        np.testing.assert_allclose(
            x0_weight, np.sqrt(bar[i - 1]) * betas[i] / (1 - bar[i]), rtol=1e-10
        )
        np.testing.assert_allclose(
            x_weight, np.sqrt(1 - betas[i]) * (1 - bar[i - 1]) / (1 - bar[i]), rtol=1e-10
        )


@pytest.mark.parametrize("path", ["linear", "gvp", "linear_vp", "edm"])
def test_ends(path):
    schedule = getattr(schedules, path)()
    np.testing.assert_allclose(
        [float(c) for c in posterior(schedule, 0.0, 1.0)], [0.0, 1.0, 0.0], atol=1e-12
    )
    # sqrt(1e-16)
    np.testing.assert_allclose(
        [float(c) for c in posterior(schedule, T, T)], [1.0, 0.0, 0.0], atol=1e-7
    )


def test_perturb():
    x0, eps = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    alpha, sigma = oracles.alpha_sigma("linear_vp", T)
    np.testing.assert_allclose(
        perturb(schedules.linear_vp(), x0, eps, T), alpha * x0 + sigma * eps, rtol=1e-13
    )
