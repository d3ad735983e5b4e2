"""DPM-Solver, singlestep: order, limit, and its published formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
import pytest
from log_snr_grids import (
    X1,
    M,
    V,
    check_limit_on_a_mixture,
    check_limit_on_the_whole_path,
    check_order_and_limit,
    check_that_runs_are_one_run_rescaled,
)
from on_gaussians import check_finite_gradients
from polynomials import check_exact_step, vp_step

from diffjax.exact import gaussian
from diffjax.samplers import dpm_solver_2, dpm_solver_2s, dpm_solver_3
from diffjax.schedules import linear, linear_vp

ORDERS = {dpm_solver_2: 2, dpm_solver_2s: 2, dpm_solver_3: 3}
EACH = pytest.mark.parametrize("make", ORDERS)


@EACH
def test_order_and_limit_on_a_gaussian(make):
    check_order_and_limit(make, ORDERS[make])


@EACH
def test_limit_on_a_mixture(make):
    check_limit_on_a_mixture(make, ORDERS[make])


@EACH
def test_runs_on_all_paths_are_one_run_rescaled(make):
    check_that_runs_are_one_run_rescaled(make)


@EACH
def test_limit_on_the_whole_path(make):
    check_limit_on_the_whole_path(make)


def test_a_step_is_exact_on_a_polynomial():
    check_exact_step(dpm_solver_3, "eps", 2)


def vp_estimate(alpha, sigma, x):
    eps = -sigma * oracles.gaussian_score(M, V, alpha, sigma, x)
    return (x - sigma * eps) / alpha, eps


def one_step_of(make, t, s):
    schedule = linear_vp()
    sampler = make(gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule), schedule)
    return jax.jit(sampler.step)(None, sampler.init(jnp.asarray(X1), t), t, s).x


@pytest.mark.parametrize("r1", [0.5, 0.7])
def test_singlestep_solvers_are_their_algorithms(r1):
    t, s = 0.6, 0.45
    start, end = (vp_step(u)[2][0] for u in (t, s))
    inner = float(oracles.TABLE["linear_vp"][4](mp.mpf(start + r1 * (end - start))))
    alpha, sigma, value = vp_step(t, inner, s)
    h = value[2] - value[0]
    x0, eps = vp_estimate(alpha[0], sigma[0], X1)
    # DPM-Solver, algorithm 4 (arXiv 2206.00927)
    u = alpha[1] / alpha[0] * X1 - sigma[1] * np.expm1(r1 * h) * eps
    eps_u = vp_estimate(alpha[1], sigma[1], u)[1]
    x = (
        alpha[2] / alpha[0] * X1
        - sigma[2] * np.expm1(h) * eps
        - sigma[2] / (2 * r1) * np.expm1(h) * (eps_u - eps)
    )
    np.testing.assert_allclose(one_step_of(partial(dpm_solver_2, r1=r1), t, s), x, rtol=1e-11)
    # DPM-Solver++(2S), algorithm 1 (arXiv 2211.01095)
    u = sigma[1] / sigma[0] * X1 - alpha[1] * np.expm1(-r1 * h) * x0
    x0_u = vp_estimate(alpha[1], sigma[1], u)[0]
    d = (1 - 1 / (2 * r1)) * x0 + 1 / (2 * r1) * x0_u
    x = sigma[2] / sigma[0] * X1 - alpha[2] * np.expm1(-h) * d
    np.testing.assert_allclose(one_step_of(partial(dpm_solver_2s, r1=r1), t, s), x, rtol=1e-11)


def test_dpm_solver_3_is_its_algorithm():
    # DPM-Solver, algorithm 5 (arXiv 2206.00927)
    r1, r2, t, s = 0.25, 0.7, 0.6, 0.45
    start, end = (vp_step(u)[2][0] for u in (t, s))
    inner = [
        float(oracles.TABLE["linear_vp"][4](mp.mpf(start + r * (end - start)))) for r in (r1, r2)
    ]
    alpha, sigma, value = vp_step(t, *inner, s)
    h = value[3] - value[0]
    eps = vp_estimate(alpha[0], sigma[0], X1)[1]
    u1 = alpha[1] / alpha[0] * X1 - sigma[1] * np.expm1(r1 * h) * eps
    d1 = vp_estimate(alpha[1], sigma[1], u1)[1] - eps
    u2 = alpha[2] / alpha[0] * X1 - sigma[2] * np.expm1(r2 * h) * eps
    u2 = u2 - sigma[2] * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = vp_estimate(alpha[2], sigma[2], u2)[1] - eps
    x = (
        alpha[3] / alpha[0] * X1
        - sigma[3] * np.expm1(h) * eps
        - sigma[3] / r2 * (np.expm1(h) / h - 1) * d2
    )
    np.testing.assert_allclose(
        one_step_of(partial(dpm_solver_3, r1=r1, r2=r2), t, s), x, rtol=1e-11
    )


def test_finite_with_finite_gradients_on_the_whole_path():
    check_finite_gradients(dpm_solver_2, ["linear_vp", "linear"])


ERRORS = {
    "r1 of 0": (
        lambda: dpm_solver_2(None, linear(), 0.0),
        r"r1: expected a number in \(0, 1\], got 0.0",
    ),
    "r1 of 2s": (lambda: dpm_solver_2s(None, linear(), 1.5), r"r1: .* got 1.5"),
    "r2": (lambda: dpm_solver_3(None, linear(), 0.3, 1.5), r"r2: .* got 1.5"),
    "r2 <= r1": (lambda: dpm_solver_3(None, linear(), 0.5, 0.5), r"r1 < r2, got r1=0.5, r2=0.5"),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
