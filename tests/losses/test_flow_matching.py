"""Flow and bridge matching: the minimiser in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import bind, schedules
from diffjax.losses import bridge_matching, conditional_flow_matching, denoising, flow_matching
from diffjax.parametrizations import VELOCITY
from diffjax.process import brownian_bridge


def affine(params, x, t):
    return params[0] * x + params[1]


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
def test_the_flow_and_score_of_a_mixture_of_bridges(monkeypatch):
    """Gaussian pairs: p_t is N(m_t, V_t), whose score is -(x - m_t) / V_t and whose flow m_t' +
    V_t' / (2 V_t) (x - m_t).

    The loss is quadratic in an affine network: its mean over 5-point Gauss-Hermite nodes is exact,
    and its gradient at the marginal's velocity and score must vanish.
    """
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape)
    )
    (m0, m1), (v0, v1), c, a, t = (0.4, -1.0), (0.5, 1.3), 0.3, 0.8, 0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    z0, z1, eps = (jnp.asarray(n.ravel()) for n in np.meshgrid(nodes, nodes, nodes))
    weights = np.prod(np.meshgrid(*[weights / weights.sum()] * 3), 0).ravel()
    x0 = m0 + np.sqrt(v0) * z0
    x1 = m1 + c / np.sqrt(v0) * z0 + np.sqrt(v1 - c**2 / v0) * z1

    def mean_loss(params):
        def one(x0, x1, eps):
            networks = bind(affine, params[0]), bind(affine, params[1])
            return bridge_matching(eps, *networks, x0[None], x1[None], t, a)

        return weights @ jax.vmap(one)(x0, x1, eps)

    mean = (1 - t) * m0 + t * m1
    variance = (1 - t) ** 2 * v0 + t**2 * v1 + 2 * t * (1 - t) * c + a**2 * t * (1 - t)
    slope = (-2 * (1 - t) * v0 + 2 * t * v1 + (1 - 2 * t) * (2 * c + a**2)) / (2 * variance)
    right = jnp.array([[slope, m1 - m0 - slope * mean], [-1 / variance, mean / variance]])
    gradient, hessian = jax.jit(
        lambda params: (jax.grad(mean_loss)(params), jax.hessian(mean_loss)(params))
    )(right)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    assert np.linalg.eigvalsh(hessian.reshape(4, 4)).min() > 0.01
    # the points have the marginal's mean and variance
    x, *_ = brownian_bridge(x0, x1, eps, t, a)
    np.testing.assert_allclose(
        (weights @ x, weights @ (x - mean) ** 2), (mean, variance), rtol=1e-12
    )
    # and the score's error weighs as that of unit noise: with the velocity right, a score of 0
    # costs E[eps^2] = 1 more
    networks = (lambda x, t: jnp.zeros_like(x)), (lambda x, t: jnp.zeros_like(x))
    point = jnp.ones(1), jnp.ones(1)
    each = [float(bridge_matching(eps, *networks, *point, 0.5, a)) for eps in (0.0, 1.0)]
    # at t = 1/2 the bridge's own velocity is x1 - x0 = 0
    np.testing.assert_allclose(each, [0.0, 1.0], atol=1e-12)
    # and at another time, with that velocity given
    _, velocity_there, _ = brownian_bridge(*point, jnp.ones(1), t, a)
    moving = bridge_matching(1.0, lambda x, t: velocity_there, networks[1], *point, t, a)
    np.testing.assert_allclose(moving, 1.0, rtol=1e-12)


def test_denoising_a_velocity_on_the_linear_path_is_flow_matching():
    network, x0, t = bind(affine, jnp.array([0.3, -0.2])), jnp.array([0.5, -1.0, 2.0]), 0.35
    eps = jax.random.normal(jax.random.key(1), (3,))
    loss = denoising(jax.random.key(1), network, schedules.linear(), VELOCITY, x0, t)
    np.testing.assert_allclose(loss, conditional_flow_matching(network, x0, eps, t), rtol=1e-13)
    # by hand: |a x_t + b - (eps - x0)|^2, a mean over the elements
    x = (1 - t) * np.asarray(x0) + t * np.asarray(eps)
    np.testing.assert_allclose(
        loss, np.mean((0.3 * x - 0.2 - (np.asarray(eps) - np.asarray(x0))) ** 2), rtol=1e-13
    )
    np.testing.assert_allclose(
        flow_matching(network, lambda x, t: -x, jnp.ones(3), t), 1.1**2, rtol=1e-13
    )
