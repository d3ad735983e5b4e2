"""diffrax on the equations of a path, against the exact flow map, and the moments of a reverse SDE."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import schedules
from diffjax.exact import gaussian
from diffjax.solve import solve_flow, solve_sde

M, V, X = np.array([0.7, -0.4]), np.array([0.3, 2.0]), np.array([0.9, -1.3])


def data(schedule):
    return gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule)


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
def test_the_flow_in_both_directions(path):
    schedule = getattr(schedules, path)()
    run = jax.jit(lambda x, t, s: solve_flow(data(schedule), schedule, x, t, s))
    for t, s in ((1.0, 0.01), (0.01, 1.0)):
        exact = oracles.gaussian_flow(M, V, oracles.alpha_sigma(path, t), oracles.alpha_sigma(path, s), X)
        # the controller's rtol of 1e-5 a step, amplified at most by the growth of scale between the two times
        np.testing.assert_allclose(run(jnp.asarray(X), t, s), exact, rtol=2e-3, atol=1e-3)


def test_the_reverse_sde_ends_in_the_data():
    # 1000 paths: five standard errors of mean and variance, and the solver's error of dt0 = 0.01, which is below
    schedule, n = schedules.linear_vp(), 1000
    xs = np.random.default_rng(0).normal(size=(n, 2))
    with jax.debug_key_reuse(False):  # diffrax's Brownian tree splits one key in two ways
        x0 = np.asarray(
            jax.jit(lambda x: solve_sde(jax.random.key(0), data(schedule), schedule, x, 1.0, 1e-3))(jnp.asarray(xs))
        )
    assert np.all(np.abs(x0.mean(0) - M) < 5 * np.sqrt(V / n) + 0.01)
    assert np.all(np.abs(x0.var(0) / V - 1) < 5 * np.sqrt(2 / n) + 0.02)
