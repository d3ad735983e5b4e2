"""DDIM and DDPM on Gaussian data: order, limit, equivalent formulas, and noise."""

import functools

import jax
import jax.numpy as jnp
import log_snr_grids
import numpy as np
import oracles
import pytest
from on_gaussians import (
    PATHS,
    X1,
    M,
    V,
    check_finite_gradients,
    check_order_and_limit,
    check_that_moments_converge,
    data,
    errors_by_path,
    errors_of,
)

from diffjax.grids import uniform
from diffjax.guidance import cfg
from diffjax.samplers import ddim, ddpm, edm_sampler, euler, sample, trajectory
from diffjax.schedules import edm, gvp, half_log_snr, half_log_snr_inverse, linear, linear_vp
from diffjax.typing import State


@pytest.mark.parametrize("path", PATHS)
def test_order_and_limit(path):
    check_order_and_limit(errors_by_path(ddim)[path], 1)


def test_order_and_limit_in_log_snr():
    log_snr_grids.check_order_and_limit(ddim, 1)


def test_limit_on_a_mixture():
    log_snr_grids.check_limit_on_a_mixture(ddim, 1)


def test_runs_on_all_paths_are_one_run_rescaled():
    log_snr_grids.check_that_runs_are_one_run_rescaled(ddim)


def test_limit_on_the_whole_path():
    for path, e in log_snr_grids.errors_on_the_whole_path(ddim).items():
        assert log_snr_grids.slope(e) > 0.95 and e[-1] < 2e-2, (path, e)


def test_on_a_single_point_ddim_is_exact_in_one_step():
    # a point stays a point: its flow is a straight line in (alpha, sigma)
    for make in (linear_vp, linear, gvp, functools.partial(edm, 80.0)):
        schedule = make()
        x = sample(
            jax.random.key(0),
            ddim(data(schedule, v=np.zeros(2)), schedule),
            jnp.asarray(X1),
            jnp.array([1.0, 0.0]),
        )
        np.testing.assert_allclose(x, M, rtol=1e-12)


def test_ddim_on_the_linear_path_is_euler():
    schedule, ts = linear(), uniform(5)
    by_ddim, by_euler = (
        trajectory(jax.random.key(0), make(data(schedule), schedule), jnp.asarray(X1), ts)
        for make in (ddim, euler)
    )
    np.testing.assert_allclose(by_ddim, by_euler, rtol=1e-12)


def test_ddim_is_dpm_solver_1():
    # (1.56) in its own variables: (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps
    schedule, t, s = linear_vp(), 0.7, 0.4
    denoise = data(schedule)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        oracles.alpha_sigma("linear_vp", t),
        oracles.alpha_sigma("linear_vp", s),
    )
    h = np.log(alpha_s / sigma_s) - np.log(alpha_t / sigma_t)
    eps = -sigma_t * oracles.gaussian_score(M, V, alpha_t, sigma_t, X1)
    expected = alpha_s / alpha_t * X1 - sigma_s * np.expm1(h) * eps
    sampler = ddim(denoise, schedule)
    np.testing.assert_allclose(
        sampler.step(None, sampler.init(jnp.asarray(X1), t), t, s).x, expected, rtol=1e-11
    )


@pytest.mark.parametrize("make", [ddim, edm_sampler])
def test_vp_and_ve_runs_are_one_run_rescaled(make):
    # at equal log-SNR the noisy data of two paths differ by the factor alpha alone
    vp, other = linear_vp(), edm(200.0)
    ts = uniform(6, end=0.01)
    match = jax.jit(jax.vmap(lambda t: half_log_snr_inverse(other, half_log_snr(vp, t))))(ts)
    alphas = np.asarray(jax.vmap(vp)(ts)[0])[:, None]
    on_vp = trajectory(jax.random.key(0), make(data(vp), vp), jnp.asarray(X1), ts)
    on_edm = trajectory(
        jax.random.key(0), make(data(other), other), jnp.asarray(X1 / alphas[0]), match
    )
    np.testing.assert_allclose(np.asarray(on_vp) / alphas, on_edm, rtol=1e-9)


def test_guidance_of_scale_one_is_conditional_and_zero_unconditional():
    schedule, ts = linear(), uniform(4)
    conditional, unconditional = data(schedule), data(schedule, m=-M)

    def run(denoise):
        return sample(jax.random.key(0), ddim(denoise, schedule), jnp.asarray(X1), ts)

    np.testing.assert_allclose(
        run(cfg(conditional, unconditional, 1.0)), run(conditional), rtol=1e-13
    )
    np.testing.assert_allclose(
        run(cfg(conditional, unconditional, 0.0)), run(unconditional), rtol=1e-13
    )


STOCHASTIC = {
    "ddpm": ddpm,
    "ddim(1)": functools.partial(ddim, eta=1.0),
    "ddim(0.4)": functools.partial(ddim, eta=0.4),
}


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
@pytest.mark.parametrize("method", STOCHASTIC)
def test_mean_and_variance_converge_to_the_datas(monkeypatch, method, path):
    check_that_moments_converge(monkeypatch, STOCHASTIC[method], path)


def test_ddim_of_eta_one_is_ddpm():
    schedule = linear_vp()
    for t, s in ((1.0, 0.6), (0.3, 0.1), (0.1, 0.0)):
        a, b = (
            sampler.step(jax.random.key(7), sampler.init(jnp.asarray(X1), t), t, s).x
            for sampler in (ddim(data(schedule), schedule, eta=1.0), ddpm(data(schedule), schedule))
        )
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_ddim_of_a_traced_zero_is_the_deterministic_one():
    schedule = linear_vp()
    step = ddim(data(schedule), schedule).step(None, State(jnp.asarray(X1)), 0.5, 0.3).x
    for eta in (jnp.zeros(()), 0.0):
        traced = jax.jit(
            lambda e: (
                ddim(data(schedule), schedule, e)
                .step(jax.random.key(0), State(jnp.asarray(X1)), 0.5, 0.3)
                .x
            )
        )(eta)
        np.testing.assert_allclose(traced, step, rtol=1e-12)


def test_eta_shrinks_the_deterministic_noise(monkeypatch):
    # the total noise at s is sigma_s for every eta: on data of one point m, x_s ~ N(alpha_s m,
    # sigma_s^2) exactly
    schedule, m = linear_vp(), 0.7
    for eta in (0.0, 0.3, 1.0):
        sampler = (
            ddim(data(schedule, [m], [0.0]), schedule, jnp.asarray(eta))
            if eta
            else ddim(data(schedule, [m], [0.0]), schedule)
        )
        assert (
            errors_of(monkeypatch, sampler, schedule, [np.array([0.9, 0.6, 0.2])], m, 0.0)[0]
            < 1e-12
        )


ENDS = {"ddim": ddim, "ddim(0.5)": functools.partial(ddim, eta=0.5), "ddpm": ddpm}


@pytest.mark.parametrize("method", ENDS)
def test_finite_with_finite_gradients_on_the_whole_path(method):
    check_finite_gradients(ENDS[method], ["linear_vp", "linear", "gvp", "edm"])
