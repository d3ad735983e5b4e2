"""The denoising loss of every parametrization is least at the exact denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind, schedules
from diffjax.losses import denoising
from diffjax.parametrizations import EPS, SCORE, VELOCITY, X0, V, as_denoiser, edm_preconditioning

KINDS = {
    "X0": X0,
    "EPS": EPS,
    "SCORE": SCORE,
    "V": V,
    "VELOCITY": VELOCITY,
    "edm": edm_preconditioning(0.5),
}


def affine(params, x, t):
    return params[0] * x + params[1]


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
@pytest.mark.parametrize("name", KINDS)
def test_the_exact_denoiser_minimises_the_expected_loss(monkeypatch, name, path):
    # Data N(m, v) in 1-D and an affine network: the expectation over (x0, eps) of a quadratic is
    # exact with 5-point Gauss-Hermite rules. Its Newton minimiser must be the exact posterior mean.
    schedule, t, m, v = getattr(schedules, path)(), 0.4, 0.7, 0.3
    points, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape)
    )

    def expected(params):
        def at(z, eps):
            return denoising(
                eps, bind(affine, params), schedule, KINDS[name], (m + np.sqrt(v) * z)[None], t
            )

        values = jax.vmap(jax.vmap(at, (None, 0)), (0, None))(
            jnp.asarray(points), jnp.asarray(points)
        )
        return weights @ values @ weights

    zero = jnp.zeros(2)
    gradient, hessian = jax.jit(lambda p: (jax.grad(expected)(p), jax.hessian(expected)(p)))(zero)
    best = np.linalg.solve(hessian, -gradient)
    x = np.array([1.1])
    alpha, sigma = oracles.alpha_sigma(path, t)
    denoised = as_denoiser(bind(affine, jnp.asarray(best)), schedule, KINDS[name])(
        jnp.asarray(x), t
    )
    exact = oracles.gaussian_score(m, v, alpha, sigma, x)
    np.testing.assert_allclose(denoised.eps, -sigma * exact, rtol=1e-7)
    np.testing.assert_allclose(denoised.x0, (x + sigma**2 * exact) / alpha, rtol=1e-7)  # Tweedie
