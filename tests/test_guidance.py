"""Classifier-free guidance of Gaussians: the guided score is that of a Gaussian again (1.39)."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import schedules
from diffjax.exact import gaussian
from diffjax.guidance import cfg
from diffjax.parametrizations import score


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guided_score_is_the_sum_of_1_42(scale):
    schedule, t, x = schedules.linear_vp(), 0.4, np.array([0.3, -0.8])
    (mc, vc), (mu, vu) = (np.array([1.0, 0.5]), np.array([0.5, 0.2])), (np.zeros(2), np.ones(2))
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    guided = cfg(
        *(gaussian(jnp.asarray(m), jnp.diag(jnp.asarray(v)), schedule) for m, v in ((mc, vc), (mu, vu))), scale
    )
    c, u = oracles.gaussian_score(mc, vc, alpha, sigma, x), oracles.gaussian_score(mu, vu, alpha, sigma, x)
    np.testing.assert_allclose(score(guided, schedule, jnp.asarray(x), t), (1 - scale) * u + scale * c, rtol=1e-10)
    x0, eps = guided(jnp.asarray(x), t)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x, rtol=1e-12)
