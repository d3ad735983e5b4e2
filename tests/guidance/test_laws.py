"""Classifier-free guidance is not the tilted density: its three laws in closed form.

Unconditional N(0, 1), conditional N(m, v), on a variance-preserving path with alpha(1) = 0.
"""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
from guided_gaussians import errors

from diffjax import bind
from diffjax.exact import gaussian
from diffjax.guidance import cfg, classifier
from diffjax.samplers import ddim_kernel, ddpm_kernel
from diffjax.schedules import gvp, linear, linear_vp

M, V, W = 1.0, 0.25, 3.0
FLOW = (
    W * M * V ** (W / 2) * scipy.special.hyp2f1(0.5, 1 + W / 2, 1.5, 1 - V),
    V**W,
)
SDE = M * (1 - V**W) / (1 - V), (V - V ** (2 * W)) / ((1 - V) * (2 * W - 1))


def pair(schedule):
    def normal(m, v):
        return gaussian(jnp.array([m]), jnp.array([[v]]), schedule)

    return normal(M, V), normal(0.0, 1.0)


def test_the_closed_forms_are_those_of_the_literature():
    np.testing.assert_allclose(FLOW, (1.5, 0.015625), rtol=1e-12)
    np.testing.assert_allclose(SDE, (1.3125, 0.066602), rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "end"),
    [(bind(ddim_kernel, eta=0.0), FLOW), (ddpm_kernel, SDE)],
    ids=["flow", "sde"],
)
def test_the_flow_and_the_sde_end_in_two_laws(kernel, end):
    schedule, steps = gvp(), [64, 128, 256, 512]
    expected = np.array([end[0]]), np.array([[end[1]]])
    found = errors(
        kernel(cfg(*pair(schedule), W), schedule), expected, steps, np.zeros(1), np.eye(1)
    )
    assert found[-1] < 0.01
    assert abs(oracles.fitted_order(steps, found) - 1) < 0.15, found


@pytest.mark.parametrize("make", [linear, linear_vp, gvp])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.5])
def test_the_exact_classifier_guides_as_classifier_free_guidance(make, scale):
    schedule, x = make(), jnp.array([[0.3], [-1.2]])
    c, u = pair(schedule)
    for t in (0.03, 0.4, 0.97):
        alpha, sigma = oracles.alpha_sigma(make.__name__, t)

        def log_prob(x, t, alpha=alpha, sigma=sigma):
            def log_density(m, v):
                return -0.5 * (x[..., 0] - alpha * m) ** 2 / (alpha**2 * v + sigma**2)

            return log_density(M, V) - log_density(0.0, 1.0)

        by_classifier = classifier(u, log_prob, schedule, scale, event_ndim=1)(x, t)
        for a, b in zip(by_classifier, cfg(c, u, scale)(x, t), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
