"""diffrax on the equations of a path, against the exact flow map, and the moments of a reverse SDE."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax import exact, likelihood, parametrizations, schedules, solve
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
        exact = oracles.gaussian_flow(
            M, V, oracles.alpha_sigma(path, t), oracles.alpha_sigma(path, s), X
        )
        # the controller's rtol of 1e-5 a step, amplified at most by the growth of scale between the
        # two times
        np.testing.assert_allclose(run(jnp.asarray(X), t, s), exact, rtol=2e-3, atol=1e-3)


@jax.jit
def reverse(x, key, dt0, end=0.05):
    schedule = schedules.linear_vp()
    return solve_sde(key, data(schedule), schedule, x, 1.0, end, dt0=dt0)


@pytest.fixture(autouse=True)
def _rightful_reuse():
    with jax.debug_key_reuse(False):  # diffrax's Brownian tree splits one key in two ways
        yield


def test_the_reverse_sde_regresses_as_the_path_does():
    # The reverse SDE has the joint law of (x_s, x_1) under the path, so for one and the same
    # Brownian path x_s depends on x_1 with the slope Cov(x_s, x_1) / Var(x_1) = (alpha_1 / alpha_s)
    # Var(x_s) / Var(x_1): no Monte Carlo.
    (alpha_1, sigma_1), (alpha_s, sigma_s) = (
        oracles.alpha_sigma("linear_vp", t) for t in (1.0, 0.05)
    )
    slope = alpha_1 / alpha_s * (alpha_s**2 * V + sigma_s**2) / (alpha_1**2 * V + sigma_1**2)
    steps = np.array([64, 128, 256])
    key = jax.random.key(0)
    moved = np.stack([reverse(X + 1.0, key, 0.95 / n) - reverse(X, key, 0.95 / n) for n in steps])
    errors = np.abs(moved / slope - 1).max(axis=1)
    # without noise in it the slope is a deterministic ODE's, of which ShARK is a second-order
    # solver
    assert errors[-1] < 2e-3 and abs(oracles.fitted_order(steps, errors) - 2) < 0.2, errors


def test_the_reverse_sde_converges_strongly():
    # ShARK has strong order 1.5 for additive noise (Foster et al. 2023); all runs see the same
    # Brownian path
    steps = np.array([16, 32, 64, 128])
    keys = jax.random.split(jax.random.key(0), 8)
    fine, *runs = (np.stack([reverse(X, key, 0.95 / n) for key in keys]) for n in (2048, *steps))
    errors = np.sqrt(np.mean((np.stack(runs) - fine) ** 2, axis=(1, 2)))
    assert oracles.fitted_order(steps, errors) > 1.3, errors


def test_the_reverse_sde_ends_in_the_data():
    # the size of the noise: 1000 paths, five standard errors of mean and variance, and the solver's
    # error, which is below
    n = 1000
    xs = np.random.default_rng(0).normal(size=(n, 2))
    x0 = np.asarray(reverse(xs, jax.random.key(0), 0.01, 1e-3))
    assert np.all(np.abs(x0.mean(0) - M) < 5 * np.sqrt(V / n) + 0.01)
    assert np.all(np.abs(x0.var(0) / V - 1) < 5 * np.sqrt(2 / n) + 0.02)


def half_nan(x, t):
    return x * jnp.where(t < 0.5, jnp.nan, 1.0)


@pytest.mark.parametrize("run", ["solve_flow", "log_likelihood"])
def test_a_velocity_that_is_nan_is_named_and_not_max_steps(run):
    schedule = schedules.linear_vp()
    denoise = parametrizations.as_denoiser(half_nan, schedule, parametrizations.EPS)
    with pytest.raises(
        ValueError, match=r"velocity: expected finite values, got others at t=0\.[45]"
    ):
        if run == "solve_flow":
            solve.solve_flow(denoise, schedule, jnp.ones(2), 1.0, 1e-3)
        else:
            likelihood.log_likelihood(jax.random.key(0), denoise, schedule, jnp.ones(2), start=0.4)


def test_too_few_steps_are_named():
    schedule = schedules.linear_vp()
    denoise = exact.gaussian(jnp.zeros(2), 4 * jnp.eye(2), schedule)
    with pytest.raises(
        RuntimeError, match="max_steps: expected enough steps to go from t to s, got 3"
    ):
        solve.solve_flow(denoise, schedule, jnp.ones(2), 1.0, 1e-3, max_steps=3)


@pytest.mark.parametrize("name", ["shard_map", "explicit axes"])
def test_what_diffrax_refuses_of_a_mesh_names_the_way_out(name):
    kind = AxisType.Explicit if name == "explicit axes" else AxisType.Auto
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    run = jax.vmap(lambda x: solve.integrate(lambda t, y, args: -y, x, 0.0, 1.0))
    if name == "shard_map":
        run = jax.shard_map(
            run, mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec("batch")
        )
    with (
        jax.set_mesh(mesh),
        pytest.raises((TypeError, ValueError), match=r"check_vma=False, .*AxisType\.Auto"),
    ):
        jax.jit(run)(jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, PartitionSpec("batch"))))
