"""Each weighting against what its paper weights."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import schedules
from diffjax.losses import denoising
from diffjax.parametrizations import EPS, SCORE, VELOCITY, X0, V, edm_preconditioning
from diffjax.weightings import (
    edm_weighting,
    inverse_variance,
    likelihood,
    min_snr,
    p2,
    snr,
    unweighted,
)

KINDS = {
    "X0": X0,
    "EPS": EPS,
    "SCORE": SCORE,
    "V": V,
    "VELOCITY": VELOCITY,
    "edm": edm_preconditioning(0.5),
}


def test_weightings_on_the_error_that_they_speak_of():
    for path in ("linear_vp", "linear", "gvp"):
        schedule = getattr(schedules, path)()
        for t in (0.05, 0.3, 0.9):
            alpha, sigma = oracles.alpha_sigma(path, t)
            g2 = float(oracles.TABLE[path][3](oracles.mp.mpf(t)))
            s, sd, ratio = sigma / alpha, 0.5, (alpha / sigma) ** 2
            for weighting, kind, value in (
                (unweighted, V, 1.0),
                (inverse_variance, SCORE, 1.0),
                (inverse_variance, EPS, sigma**-2),
                (likelihood, SCORE, g2),
                (min_snr(5.0), X0, min(ratio, 5.0)),
                (min_snr(5.0), EPS, min(ratio, 5.0) / ratio),
                (snr, X0, ratio),
                (snr, EPS, 1.0),
                (p2(0.5, 2.0), EPS, (2 + ratio) ** -0.5),
                (p2(1.0), X0, ratio / (1 + ratio)),
                (edm_weighting(sd), X0, (s**2 + sd**2) / (s * sd) ** 2),
                (edm_weighting(sd), edm_preconditioning(sd), 1.0),
            ):
                np.testing.assert_allclose(weighting(schedule, kind, t), value, rtol=1e-9)


@pytest.mark.parametrize(
    "weighting", [inverse_variance, likelihood, snr, min_snr(5.0), p2(1.0), edm_weighting(0.5)]
)
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
    values = [
        denoising(jax.random.key(0), n, schedule, KINDS[k], x0, t, weighting)
        for k, n in networks.items()
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
