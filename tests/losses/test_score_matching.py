"""Score matching losses against each other, up to their constants."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind, schedules
from diffjax.divergence import exact_probes
from diffjax.exact import gaussian_mixture
from diffjax.losses import (
    denoising,
    explicit_score_matching,
    implicit_score_matching,
    sliced_score_matching,
)
from diffjax.parametrizations import SCORE, score


def bent(params, x, t):
    return params[0] * jnp.tanh(params[1] * x + t) + params[2] * x


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
def test_score_matching_losses_differ_by_their_constants():
    # Data of two Gaussians in 1-D, t = 0.4 on linear VP, a network that is no score. Expectations
    # by trapezoids over x, and over x0 and eps, in steps of a tenth of a deviation or less: exact
    # to rounding for such functions.
    weights, means, stds, t = np.array([0.3, 0.7]), np.array([-1.0, 1.5]), np.array([0.5, 0.8]), 0.4
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    schedule = schedules.linear_vp()
    denoise = gaussian_mixture(weights, means[:, None], stds[:, None, None] ** 2, schedule)

    def density(x, mean, std):
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))

    x = np.linspace(-9, 9, 601)
    std_t = np.sqrt(alpha**2 * stds**2 + sigma**2)
    parts = weights * density(x[:, None], alpha * means, std_t)
    p = parts.sum(1) * (x[1] - x[0])
    score_t = (parts * -(x[:, None] - alpha * means) / std_t**2).sum(1) / parts.sum(1)
    xs = jnp.asarray(x)[:, None]

    def explicit(network):
        exact = bind(score, denoise, schedule)
        return p @ jax.vmap(lambda x: explicit_score_matching(network, exact, x, t))(xs)

    def implicit(network):
        return p @ jax.vmap(
            lambda x: implicit_score_matching(network, x, t, exact_probes(None, x))
        )(xs)

    def sliced(network):
        return p @ jax.vmap(lambda x: sliced_score_matching(network, x, t, exact_probes(None, x)))(
            xs
        )

    # the mean over eps and x0, by the weight 1 on the score error, with normal() = its key
    def by_denoising(network):
        eps = np.linspace(-9, 9, 301)
        weight = density(eps, 0, 1) * (eps[1] - eps[0])
        x0 = np.linspace(-6, 7, 301)
        prior = (weights * density(x0[:, None], means, stds)).sum(1) * (x0[1] - x0[0])

        def one(x0, eps):
            return denoising(eps, network, schedule, SCORE, x0[None], t)

        return (
            prior
            @ jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.asarray(x0), jnp.asarray(eps))
            @ weight
        )

    values, gradients = {}, {}
    params = jnp.array([0.7, -1.3, -0.4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape)
        )
        for loss in (explicit, implicit, sliced, by_denoising):
            value = jax.jit(jax.value_and_grad(lambda params, loss=loss: loss(bind(bent, params))))
            values[loss], gradients[loss] = value(params)
    information = p @ score_t**2
    assert information > 0.3
    np.testing.assert_allclose(values[implicit], values[explicit] - information, rtol=1e-10)
    np.testing.assert_allclose(values[sliced], values[implicit], rtol=1e-12)
    np.testing.assert_allclose(
        values[by_denoising], values[explicit] - information + 1 / sigma**2, rtol=1e-10
    )
    for loss in (implicit, sliced, by_denoising):
        np.testing.assert_allclose(gradients[loss], gradients[explicit], rtol=1e-9)


def test_slices_over_all_signs_are_the_trace():
    x, t = jnp.array([0.3, -1.2, 0.8]), 0.5
    weights = jnp.array([[1.0, 2.0, -1.0], [0.5, -0.3, 0.2], [-0.7, 0.1, 1.1]])

    def network(x, t):
        return jnp.tanh(weights @ x)

    # the mean of z z^T is 1 exactly
    signs = jnp.asarray(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(-1, 3))
    by_trace = implicit_score_matching(network, x, t, exact_probes(None, x))
    s, jacobian = network(x, t), jax.jacfwd(network)(x, t)
    np.testing.assert_allclose(by_trace, (s @ s + 2 * jnp.trace(jacobian)) / 3, rtol=1e-12)
    np.testing.assert_allclose(implicit_score_matching(network, x, t, signs), by_trace, rtol=1e-12)
    np.testing.assert_allclose(sliced_score_matching(network, x, t, signs), by_trace, rtol=1e-12)
    one = signs[:1]
    expected = ((one[0] @ s) ** 2 + 2 * one[0] @ jacobian @ one[0]) / 3
    np.testing.assert_allclose(sliced_score_matching(network, x, t, one), expected, rtol=1e-12)
