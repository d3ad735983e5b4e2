"""Transition kernels: their samplers, their densities, and the marginals of their chains."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats

from diffjax import exact, schedules
from diffjax.samplers import (
    ddim,
    ddim_kernel,
    ddpm_kernel,
    edm_sampler,
    euler_maruyama_kernel,
    kernel_sampler,
    log_transition,
    sde_dpm_solver_2m,
    sde_dpm_solver_kernel,
    trajectory,
)

X, T, S = np.array([0.3, -0.8]), 0.7, 0.4
PATHS = ["linear_vp", "linear", "edm", "gvp"]
KERNELS = {
    "ddim(0.4)": partial(ddim_kernel, eta=0.4),
    "ddpm": ddpm_kernel,
    "euler_maruyama": euler_maruyama_kernel,
    "sde_dpm_solver(0.6)": partial(sde_dpm_solver_kernel, tau=0.6),
}


def gaussian(schedule, mean=0.7, variance=0.3):
    return exact.gaussian(mean * jnp.ones(2), variance * jnp.eye(2), schedule)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", KERNELS)
def test_the_sampler_of_a_kernel_draws_from_it(name):
    kernel = KERNELS[name](gaussian(schedules.linear_vp()), schedules.linear_vp())
    sampler = kernel_sampler(kernel)
    mean, std = kernel(X, T, S)
    drawn = sampler.step(jax.random.key(0), sampler.init(X, T), T, S).x
    np.testing.assert_array_equal(drawn, mean + std * jax.random.normal(jax.random.key(0), X.shape))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_the_ddim_kernel_by_equation_12_and_16_of_its_paper(eta, path):
    schedule = getattr(schedules, path)()
    (alpha, sigma), (alpha_s, sigma_s) = oracles.alpha_sigma(path, T), oracles.alpha_sigma(path, S)
    eps = -sigma * oracles.gaussian_score(np.full(2, 0.7), np.full(2, 0.3), alpha, sigma, X)
    std = eta * sigma_s * np.sqrt(1 - (alpha * sigma_s / (alpha_s * sigma)) ** 2)
    expected = alpha_s * (X - sigma * eps) / alpha + np.sqrt(sigma_s**2 - std**2) * eps
    mean, got = ddim_kernel(gaussian(schedule), schedule, eta)(X, T, S)
    np.testing.assert_allclose(mean, expected, rtol=1e-8)
    np.testing.assert_allclose(got, std, rtol=1e-9)


@pytest.mark.usefixtures("without_type_checks")
def test_the_amplitude_of_euler_maruyama_by_hand():
    # on the linear path with data N(0, 1): variance v = (1 - t)^2 + t^2, velocity (2 t - 1) x / v,
    # score -x / v
    schedule, a = schedules.linear(), 0.5
    kernel = euler_maruyama_kernel(
        gaussian(schedule, 0.0, 1.0), schedule, lambda schedule, t: jnp.asarray(a)
    )
    mean, std = kernel(X, T, S)
    v = (1 - T) ** 2 + T**2
    np.testing.assert_allclose(mean, X + (S - T) * ((2 * T - 1) + 0.5 * a**2) * X / v, rtol=1e-9)
    np.testing.assert_allclose(std, a * np.sqrt(T - S), rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_kernels_agree_where_their_methods_do(path):
    schedule = getattr(schedules, path)()
    denoise = gaussian(schedule)
    ancestral = ddpm_kernel(denoise, schedule)(X, T, S)
    for same in (
        ddim_kernel(denoise, schedule, 1.0),
        sde_dpm_solver_kernel(denoise, schedule, 1.0),
    ):
        np.testing.assert_allclose(np.hstack(same(X, T, S)), np.hstack(ancestral), rtol=1e-9)
    deterministic = ddim(denoise, schedule)
    for none in (
        ddim_kernel(denoise, schedule, 0.0),
        sde_dpm_solver_kernel(denoise, schedule, 0.0),
    ):
        mean, std = none(X, T, S)
        np.testing.assert_allclose(
            mean, deterministic.step(None, deterministic.init(X, T), T, S).x, rtol=1e-9
        )
        assert std == 0
    # the first step of the multistep method is of first order
    multistep = sde_dpm_solver_2m(denoise, schedule, 0.6)
    mean, std = sde_dpm_solver_kernel(denoise, schedule, 0.6)(X, T, S)
    first = multistep.step(
        jax.random.key(0), multistep.init(jnp.asarray(X), T), jnp.asarray(T), jnp.asarray(S)
    ).x
    np.testing.assert_allclose(
        mean + std * jax.random.normal(jax.random.key(0), X.shape), first, rtol=1e-9
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "euler_maruyama"])
def test_the_chain_has_the_marginals_of_the_path_if_the_data_are_one_point(name, path):
    """Then x_t is N(alpha m, sigma^2) at every time of any grid, the ends of the path included."""
    schedule = getattr(schedules, path)()
    kernel = KERNELS[name](gaussian(schedule, 0.7, 0.0), schedule)
    ts = (1.0, 0.8, 0.35, 0.3, 0.0)
    alpha, sigma = oracles.alpha_sigma(path, ts[0])
    mean, variance = alpha * 0.7, sigma**2
    for t, s in itertools.pairwise(ts):
        (at_0, std), (at_1, _) = (kernel(x * jnp.ones(2), t, s) for x in (0.0, 1.0))
        slope = float(at_1[0] - at_0[0])  # the mean is affine in x
        mean, variance = slope * mean + float(at_0[0]), slope**2 * variance + float(std) ** 2
        alpha, sigma = oracles.alpha_sigma(path, s)
        np.testing.assert_allclose((mean, variance), (alpha * 0.7, sigma**2), rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("without_type_checks")
def test_euler_maruyama_by_hand():
    # VP with beta(t) = 0.1 + 19.9 t and data N(0, 1): dx = (-beta x / 2 - beta score) dt +
    # sqrt(beta) dw, score = -x
    schedule = schedules.linear_vp()
    mean, std = euler_maruyama_kernel(gaussian(schedule, 0.0, 1.0), schedule)(X, T, S)
    beta = 0.1 + 19.9 * T
    np.testing.assert_allclose(mean, X + (S - T) * 0.5 * beta * X, rtol=1e-9)
    np.testing.assert_allclose(std, np.sqrt(beta * (T - S)), rtol=1e-9)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", KERNELS)
def test_the_log_density_is_the_normal_distributions(name):
    kernel = KERNELS[name](gaussian(schedules.linear()), schedules.linear())
    y = jnp.array([0.1, 0.9])
    mean, std = kernel(X, T, S)
    value = jax.jit(log_transition)(kernel, X, T, y, S)
    np.testing.assert_allclose(value, scipy.stats.norm.logpdf(y, mean, std).sum(), rtol=1e-12)


def test_importance_weights_turn_one_chain_into_another():
    """E_p[q / p] = 1 and E_p[q / p x_end] = E_q[x_end], with E_q in closed form, because its means
    are affine in x.
    """
    schedule, ts, n = schedules.linear(), jnp.array([0.9, 0.6, 0.3, 0.1]), 20_000
    drawn = ddpm_kernel(gaussian(schedule, 0.5, 1.0), schedule)
    other = sde_dpm_solver_kernel(gaussian(schedule, 0.7, 1.0), schedule, 1.1)

    def log_chain(kernel, xs):
        return jax.vmap(partial(log_transition, kernel))(xs[:-1], ts[:-1], xs[1:], ts[1:]).sum()

    @jax.jit
    @jax.vmap
    def run(key):
        xs = trajectory(key, kernel_sampler(drawn), jnp.asarray(X), ts)
        return jnp.exp(log_chain(other, xs) - log_chain(drawn, xs)), xs[-1]

    weights, ends = run(jax.random.split(jax.random.key(0), n))
    mean = jnp.asarray(X)
    for t, s in itertools.pairwise(ts):
        mean, _ = other(mean, t, s)
    error = 5 / np.sqrt(n)
    assert abs(weights.mean() - 1) < error * weights.std() and weights.std() > 0.1
    products = np.asarray(weights[:, None] * ends)
    assert np.all(abs(products.mean(0) - mean) < error * products.std(0))
    assert np.any(
        abs(np.asarray(ends).mean(0) - mean) > 2 * error * np.asarray(ends).std(0)
    )  # unweighted, it is another


@pytest.mark.parametrize("make", [ddim, edm_sampler])
def test_the_program_does_not_depend_on_the_value_of_a_number(make):
    schedule = schedules.linear_vp()
    structures = {
        jax.tree.structure(make(gaussian(schedule), schedule, number))
        for number in (0.0, 0.4, jnp.array(0.0))
    }
    assert len(structures) == 1


@pytest.mark.usefixtures("without_type_checks")
def test_what_kernels_refuse():
    schedule = schedules.linear()
    denoise = gaussian(schedule)
    with pytest.raises(ValueError, match=r"eta: expected a finite number in \[0, 1\], got 1.5"):
        ddim_kernel(denoise, schedule, 1.5)
    with pytest.raises(ValueError, match=r"tau: expected a finite number in \[0, inf\], got -1"):
        sde_dpm_solver_kernel(denoise, schedule, -1.0)
    kernel = ddpm_kernel(denoise, schedule)
    with pytest.raises(ValueError, match=r"y: expected the shape of x, \(2,\), got \(3,\)"):
        log_transition(kernel, X, T, jnp.zeros(3), S)
    with pytest.raises(
        ValueError, match=r"kernel: expected a positive std, got 0.0 from t=0.7 to s=0.0"
    ):
        log_transition(kernel, X, T, X, 0.0)
