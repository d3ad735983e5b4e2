"""The equations of a path against the Fokker-Planck equation: on Gaussians, drift and noise move
mean and variance alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import schedules
from diffjax.dynamics import forward_sde, probability_flow, reverse_sde
from diffjax.exact import gaussian

M, V, T = 0.7, 0.3, 0.6


def moments(path, t):
    return oracles.gaussian_marginal(M, V, *oracles.alpha_sigma(path, t))


def rates(path, direction):
    """The derivatives of mean and variance by the time of the equation, from the closed forms."""
    later, earlier = moments(path, T + 1e-6), moments(path, T - 1e-6)
    return [direction * (a - b) / 2e-6 for a, b in zip(later, earlier, strict=True)]


def implied(drift, noise, path):
    """What a linear drift a + b x and a diffusion make of the marginal of t: (mean)' and
    (variance)'.
    """
    mean, variance = moments(path, T)
    a = float(drift(jnp.zeros(1))[0])
    b = float(drift(jnp.ones(1))[0]) - a
    return a + b * mean, 2 * b * variance + noise**2


def twice(schedule, t):
    return 2 * schedules.diffusion(schedule, t)


def nothing(schedule, t):
    return 0.0 * schedules.diffusion(schedule, t)


@pytest.mark.parametrize("path", oracles.TABLE)
def test_every_equation_has_the_marginals_of_the_path(path):
    schedule = getattr(schedules, path)()
    denoise = gaussian(jnp.array([M]), jnp.array([[V]]), schedule)
    kinds = {
        "forward": (forward_sde(schedule), T, 1),
        "g": (reverse_sde(denoise, schedule), 1 - T, -1),
        "2g": (reverse_sde(denoise, schedule, twice), 1 - T, -1),
        "0": (reverse_sde(denoise, schedule, nothing), 1 - T, -1),
    }
    for name, (sde, time, direction) in kinds.items():
        drift = jax.jit(lambda x, sde=sde, time=time: sde.drift(time, x, None))
        noise = float(sde.diffusion(time, jnp.zeros(1), None).mv(jnp.ones(1))[0])
        # central differences of h = 1e-6: 1e-10 relative to the largest of the moments
        scale = max(1.0, *map(abs, rates(path, direction)))
        np.testing.assert_allclose(
            implied(drift, noise, path),
            rates(path, direction),
            rtol=1e-6,
            atol=1e-7 * scale,
            err_msg=name,
        )
    flow = jax.jit(lambda x: probability_flow(denoise, schedule)(T, x, None))
    np.testing.assert_allclose(implied(flow, 0.0, path), rates(path, 1), rtol=1e-6, atol=1e-6)


def test_the_reverse_drift_calls_the_denoiser_once():
    schedule, calls = schedules.linear(), []

    def denoise(x, t):
        calls.append(t)
        return gaussian(jnp.zeros(2), jnp.eye(2), schedule)(x, t)

    reverse_sde(denoise, schedule).drift(0.5, jnp.ones(2), None)
    assert len(calls) == 1
