"""The multistep methods and their stochastic kin: order and limit, exact steps, published formulas,
mean and variance.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from log_snr_grids import (
    MIXTURE,
    PATHS,
    SPANS,
    X1,
    M,
    V,
    any_path,
    check_limit_on_a_mixture,
    check_limit_on_the_whole_path,
    check_order_and_limit,
    check_that_runs_are_one_run_rescaled,
    errors_on_the_whole_path,
    on_matched_grids,
    pair,
    primed_grids,
    slope,
)
from on_gaussians import check_finite_gradients
from polynomials import (
    POLYNOMIAL,
    TIMES,
    check_exact_step,
    exact_step,
    horner,
    polynomial_denoiser,
    vp_step,
    warm,
)

from diffjax import bind
from diffjax.exact import gaussian, gaussian_mixture
from diffjax.grids import uniform_log_snr
from diffjax.samplers import (
    bh1,
    data_adams,
    ddim,
    ddpm,
    deis,
    dpm_solver_2m,
    dpm_solver_3m,
    noise_adams,
    sa_solver,
    sample,
    sde_dpm_solver_2m,
    trajectory,
    unipc,
    velocity_adams,
)
from diffjax.schedules import linear, linear_vp
from diffjax.typing import Estimate, State

# ---- order and limit -----------------------------------------------------------------------------

# The order of the error, on steps uniform in log-SNR. A corrector adds one.
ORDERS = {
    "dpm_solver_2m": (dpm_solver_2m, 2),
    "dpm_solver_3m": (dpm_solver_3m, 3),
    "unipc(1)": (partial(unipc, order=1), 2),
    "unipc(2)": (partial(unipc, order=2), 3),
    "unipc(3)": (unipc, 4),
    "deis(2)": (partial(deis, order=2), 2),
    "deis(3)": (deis, 3),
    "data_adams(2)": (partial(data_adams, order=2), 2),
    "noise_adams(2)": (partial(noise_adams, order=2), 2),
    "noise_adams(3)": (noise_adams, 3),
    "velocity_adams(2)": (partial(velocity_adams, order=2), 2),
    "velocity_adams(3)": (velocity_adams, 3),
    "sa_solver(2, tau=0)": (partial(sa_solver, order=2, tau=0.0), 3),
}


@pytest.mark.parametrize("method", ORDERS)
def test_order_and_limit_on_a_gaussian(method):
    # Where the next term has the other sign, the slope of dpm_solver_3m comes down to 3 from 3.6.
    # The leading term of noise_adams(3) changes sign near these steps: the slope is anything from 1
    # to 4.
    above = 0.6 if method == "dpm_solver_3m" else 0.15
    skipped = PATHS.keys() - {"edm"} if method == "noise_adams(3)" else ()
    check_order_and_limit(*ORDERS[method], above, skipped)


@pytest.mark.parametrize("method", ORDERS)
def test_limit_on_a_mixture(method):
    check_limit_on_a_mixture(*ORDERS[method])


@pytest.mark.parametrize("method", ORDERS)
def test_runs_on_all_paths_are_one_run_rescaled(method):
    if method.startswith("deis"):  # only DEIS looks at the time itself
        xs = on_matched_grids(ORDERS[method][0])
        assert np.abs(xs[1:] / xs[0] - 1).max() > 1e-4
    else:
        check_that_runs_are_one_run_rescaled(ORDERS[method][0])


@pytest.mark.parametrize("method", [m for m in ORDERS if "tau" not in m])
def test_limit_on_the_whole_path(method):
    make, _ = ORDERS[method]
    if not method.startswith("velocity"):
        return check_limit_on_the_whole_path(make)
    for path, e in errors_on_the_whole_path(make).items():
        # regular at both ends: only its first step, an Euler step of 1/n, keeps the order at 2. On
        # linear_vp the last step, of length n^-1/2 in sigma / (alpha + sigma), is too long for the
        # third order.
        order = 1.5 if (path, method) == ("linear_vp", "velocity_adams(3)") else 2
        assert slope(e) > order - 0.1 and e[-1] < 2e-4, (path, e)


# ---- exact steps ---------------------------------------------------------------------------------

EXACT = {
    "dpm_solver_3m": (dpm_solver_3m, "x0", 3),
    "data_adams(2)": (partial(data_adams, order=2), "x0", 2),
    "data_adams(3)": (data_adams, "x0", 3),
    "noise_adams(2)": (partial(noise_adams, order=2), "eps", 2),
    "noise_adams(3)": (noise_adams, "eps", 3),
    "velocity_adams(2)": (partial(velocity_adams, order=2), "velocity", 2),
    "velocity_adams(3)": (velocity_adams, "velocity", 3),
    "deis(2)": (partial(deis, order=2), "eps in t", 2),
    "deis(3)": (deis, "eps in t", 3),
}


@pytest.mark.parametrize("method", EXACT)
def test_a_step_is_exact_on_a_polynomial(method):
    check_exact_step(*EXACT[method])


CORRECTED = {
    "unipc(2)": (partial(unipc, order=2), dpm_solver_2m, 2),
    "unipc(3)": (unipc, dpm_solver_3m, 3),
    "sa_solver(1)": (partial(sa_solver, order=1, tau=0.0), ddim, 1),
    "sa_solver(2)": (partial(sa_solver, order=2, tau=0.0), partial(data_adams, order=2), 2),
    "sa_solver(3)": (partial(sa_solver, tau=0.0), data_adams, 3),
}


@pytest.mark.parametrize("method", CORRECTED)
def test_a_corrector_is_exact_on_a_polynomial(method):
    # Through the predictor's nodes and the new one goes a polynomial of one degree more. So
    # whatever weights the last step added to DDIM's from the exact x, its x is put right, and what
    # follows is the predictor's step from the exact x.
    make, predictor, degree = CORRECTED[method]
    schedule, (before, t, s) = linear_vp(), TIMES[-3:]
    denoise = polynomial_denoiser("x0", degree, schedule)
    x = jnp.asarray(exact_step("x0", degree, "linear_vp", X1, before, t))
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    estimate = denoise(jnp.asarray(X1), before)
    with jax.debug_key_reuse(False):  # an amplitude of 0 multiplies the noise
        sampler = make(denoise, schedule)
        step, key = jax.jit(sampler.step), jax.random.key(0)
        memory = warm(step, sampler, TIMES[:-1], key).memory
        n, count = len(memory.values), memory.steps
        wrong = np.random.default_rng(0).normal(size=n - 1)
        newest_first = memory.values[(count - 1 - np.arange(n - 1)) % n]
        memory = memory._replace(last_step=(memory.last_step[0], np.append(0.0, wrong)))
        predicted = alpha * estimate.x0 + sigma * estimate.eps + wrong @ newest_first
        corrected = step(key, State(predicted, memory), t, s).x
        assert np.abs(predicted - x).max() > 0.1
    plain = predictor(denoise, schedule)
    step = jax.jit(plain.step)
    expected = step(None, warm(step, plain, TIMES[:-1])._replace(x=x), t, s).x
    # rounding, times 100 for nodes 0.1 apart
    np.testing.assert_allclose(corrected, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_correction_goes_the_way_of_the_noise(order):
    # x0 does not depend on x here, so two states that are corrected to the same x, under the same
    # noise, go to the same x
    schedule, (t, s), key = linear_vp(), TIMES[-2:], jax.random.key(0)
    sampler = sa_solver(polynomial_denoiser("x0", 3, schedule), schedule, order, tau=0.7)
    step = jax.jit(sampler.step)
    with jax.debug_key_reuse(False):  # the same noise
        state = warm(step, sampler, TIMES[:-1], key)
        n, count = len(state.memory.values), state.memory.steps
        newest_first = state.memory.values[(count - 1 - np.arange(n - 1)) % n]
        before, added = state.memory.last_step[0], np.random.default_rng(0).normal(size=n - 1)
        ends = [
            step(
                key,
                State(x, state.memory._replace(last_step=(before, jnp.append(0.0, weights)))),
                t,
                s,
            ).x
            for x, weights in ((state.x, 0 * added), (state.x + added @ newest_first, added))
        ]
    np.testing.assert_allclose(*ends, rtol=1e-12)


def test_the_noise_kept_over_a_long_step_is_accurate_in_single_precision():
    # data that are 0: x0 = 0, and of x what is kept is sigma_s / sigma_t e^(-tau^2 h)
    schedule = linear_vp(jnp.float32(0.1), jnp.float32(20.0))
    sampler = sde_dpm_solver_2m(
        gaussian(jnp.zeros(1, "f4"), jnp.zeros((1, 1), "f4"), schedule), schedule
    )
    t, s = jnp.float32(1.0), jnp.float32(1e-3)
    ends = [
        sampler.step(jax.random.key(1), sampler.init(jnp.full(1, x, "f4"), t), t, s).x[0]
        for x in (1e7, -1e7)
    ]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        oracles.alpha_sigma("linear_vp", float(u)) for u in (t, s)
    )
    ratio = alpha_t * sigma_s / (alpha_s * sigma_t)  # e^-h, 2e-4
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e7, ratio * sigma_s / sigma_t, rtol=1e-4)


@pytest.mark.parametrize("make", [data_adams, velocity_adams, unipc, sa_solver])
@pytest.mark.parametrize("order", [1, 2])
def test_multistep_methods_keep_the_precision_of_x(make, order):
    # single-precision x beside double-precision defaults, and a network that computes in half
    # precision
    schedule = linear_vp(jnp.float32(0.1), jnp.float32(20.0))

    def half(x, t):
        return Estimate((0.1 * x).astype(jnp.bfloat16), x)

    x = sample(
        jax.random.key(0),
        make(half, schedule, order),
        jnp.ones(2, "f4"),
        jnp.array([0.9, 0.6, 0.4, 0.2], "f4"),
    )
    assert x.dtype == jnp.float32 and np.isfinite(x).all()


# ---- the published formulas ----------------------------------------------------------------------


def test_two_step_solvers_are_their_algorithms():
    # DPM-Solver++(2M), algorithm 2 (arXiv 2211.01095); UniPC-2 with B1 = h in place of B2 = 1 -
    # e^-h (arXiv 2302.04867)
    schedule, (before, t, s) = linear_vp(), TIMES[-3:]
    alpha, sigma, value = vp_step(before, t, s)
    h, r = value[2] - value[1], (value[1] - value[0]) / (value[2] - value[1])
    denoise = polynomial_denoiser("x0", 1, schedule)
    older, x0 = (horner(POLYNOMIAL[:2], value[i]) for i in (0, 1))
    for b, make in ((-np.expm1(-h), dpm_solver_2m), (h, partial(unipc, order=2, b=bh1))):
        sampler = make(denoise, schedule)
        step = jax.jit(sampler.step)
        state = step(None, sampler.init(jnp.asarray(X1), before), before, t)
        # the first step is DDIM, which UniC-1 corrects by B1(h) / 2 times the difference of x0
        x = sigma[1] / sigma[0] * X1 - alpha[1] * np.expm1(value[0] - value[1]) * older
        np.testing.assert_allclose(state.x, x, rtol=1e-12)
        if make is not dpm_solver_2m:
            x = x + alpha[1] * (value[1] - value[0]) / 2 * (x0 - older)
        ours = step(None, state, t, s).x
        expected = (
            sigma[2] / sigma[1] * x
            - alpha[2] * np.expm1(-h) * x0
            + alpha[2] * b / (2 * r) * (x0 - older)
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-11)


def test_order_one_is_ddim():
    schedule, ts = linear_vp(), np.linspace(0.9, 0.1, 5)
    denoise = gaussian_mixture(*MIXTURE, schedule)
    expected = trajectory(jax.random.key(0), ddim(denoise, schedule), jnp.asarray(X1), ts)
    for make in (data_adams, noise_adams, velocity_adams, deis):
        ours = trajectory(jax.random.key(0), make(denoise, schedule, 1), jnp.asarray(X1), ts)
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_the_stochastic_solver_without_noise_is_dpm_solver_2m():
    schedule = linear_vp()
    ts = uniform_log_snr(schedule, 6, 0.9, 0.1)  # even: the order falls sooner with noise
    denoise = gaussian_mixture(*MIXTURE, schedule)

    @jax.jit
    def run(tau):
        return trajectory(
            jax.random.key(0), sde_dpm_solver_2m(denoise, schedule, tau), jnp.asarray(X1), ts
        )

    plain = trajectory(jax.random.key(0), dpm_solver_2m(denoise, schedule), jnp.asarray(X1), ts)
    np.testing.assert_allclose(run(0.0), plain, rtol=1e-12)
    # and its first step, at tau = 1, is that of DDPM with the same draw
    first = trajectory(jax.random.key(0), ddpm(denoise, schedule), jnp.asarray(X1), ts)[1]
    np.testing.assert_allclose(run(1.0)[1], first, rtol=1e-12)


@pytest.mark.parametrize("make", [data_adams, noise_adams, velocity_adams, deis, unipc])
def test_with_fewer_steps_than_its_order_a_method_is_that_of_lower_order(make):
    schedule = linear_vp()
    denoise = gaussian_mixture(*MIXTURE, schedule)
    one, two = jnp.array([0.9, 0.1]), jnp.array([0.9, 0.5, 0.1])

    def run(make, ts):
        return jax.jit(sample)(jax.random.key(0), make(denoise, schedule), X1, ts)

    np.testing.assert_allclose(run(make, one), run(ddim, one), rtol=1e-12)
    np.testing.assert_allclose(run(make, two), run(partial(make, order=2), two), rtol=1e-12)


def test_a_grid_as_long_as_the_order_is_enough():
    for make, steps in ((dpm_solver_2m, 2), (data_adams, 3), (unipc, 3)):
        schedule = linear()
        sampler = make(gaussian(jnp.zeros(2), jnp.eye(2), schedule), schedule)
        jax.eval_shape(
            sample, jax.random.key(0), sampler, jnp.asarray(X1), np.linspace(0.9, 0.1, steps + 1)
        )


def test_gains_of_one_are_the_method_and_of_nought_are_ddim():
    schedule, ts = linear(), np.linspace(1.0, 0.0, 6)
    denoise = gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule)
    run = jax.jit(sample)
    for gain, make in ((1.0, velocity_adams), (0.0, ddim)):
        scaled = velocity_adams(denoise, schedule, gains=jnp.full((5, 2), gain))
        expected = run(jax.random.key(0), make(denoise, schedule), jnp.asarray(X1), ts)
        with jax.debug_key_reuse(False):
            np.testing.assert_allclose(
                run(jax.random.key(0), scaled, jnp.asarray(X1), ts), expected, rtol=1e-12
            )


def test_each_step_has_gains_of_its_own():
    # the weights are linear in the gains, and the step after uses the next row: only the last row
    # moves the last step
    schedule, ts = linear(), np.linspace(1.0, 0.0, 6)
    denoise = gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule)

    def path(gains):
        sampler = velocity_adams(denoise, schedule, gains=gains)
        return trajectory(jax.random.key(0), sampler, jnp.asarray(X1), ts)

    moved = jax.jacfwd(path)(jnp.ones((5, 2)))  # (times, x, steps, columns)
    reaches = np.asarray(jnp.abs(moved).sum((1, 3)) > 0)
    # row i acts on the step from time i to i + 1 and on what follows; the first step has no earlier
    # velocity
    np.testing.assert_array_equal(reaches, [[0 < i < time for i in range(5)] for time in range(6)])


# ---- the whole path ------------------------------------------------------------------------------

ENDS = {
    "unipc(2)": partial(unipc, order=2),
    "noise_adams(2)": partial(noise_adams, order=2),
    "velocity_adams(2)": partial(velocity_adams, order=2),
    "deis(2)": partial(deis, order=2),
    "sde_dpm_solver_2m": sde_dpm_solver_2m,
}


@pytest.mark.parametrize("method", ENDS)
def test_finite_with_finite_gradients_on_the_whole_path(method):
    check_finite_gradients(ENDS[method], ["linear_vp", "linear"])


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_stochastic_solvers_reach_both_ends(tau):
    # at t = 0 an exact sample of the data, whatever the noise; of data of one point, the point
    schedule, ts = linear(), np.linspace(1.0, 0.0, 6)
    denoise = gaussian(jnp.asarray(M), jnp.zeros((2, 2)), schedule)
    for make in (sde_dpm_solver_2m, sa_solver):
        x = jax.jit(sample)(
            jax.random.key(0), make(denoise, schedule, tau=tau), jnp.asarray(X1), ts
        )
        np.testing.assert_allclose(x, M, rtol=1e-12)


# ---- stochastic solvers: mean and variance, exactly ----------------------------------------------

STOCHASTIC = {
    "sde_dpm_solver_2m": sde_dpm_solver_2m,
    "sa_solver(1)": partial(sa_solver, order=1),
    "sa_solver(2)": partial(sa_solver, order=2),
    "sa_solver(3)": sa_solver,
}


@pytest.mark.parametrize("method", STOCHASTIC)
def test_mean_and_variance_converge_to_the_datas(monkeypatch, method):
    # on a Gaussian the last x is affine in the first one and in the noise of every step: its
    # gradient is all there is
    m, v = np.array([0.7]), np.array([[0.3]])
    halves = np.array([0.5, 0.5]), np.array([m, m]), np.array([v, v])

    def last(x, zs, which, tau, ts):
        schedule = bind(any_path, which)
        sampler = STOCHASTIC[method](gaussian_mixture(*halves, schedule), schedule, tau=tau)
        state = sampler.init(x, ts[0])

        def body(state, step):
            z, t, s = step
            return sampler.step(z, state, t, s), None

        return jax.lax.scan(body, state, (zs, ts[:-1], ts[1:]))[0].x[0]

    @jax.jit
    @jax.vmap
    def affine(which, tau, ts):
        value, (scale, noise) = jax.value_and_grad(last, (0, 1))(
            jnp.zeros(1), jnp.zeros(ts.size - 1), which, tau, ts
        )
        return value, scale[0], jnp.sum(noise**2)

    paths, n, size = primed_grids(False).shape
    which, tau = np.repeat(np.arange(paths), 2 * n), np.tile(np.repeat([0.5, 1.0], n), paths)
    ts = np.repeat(primed_grids(False)[:, None], 2, axis=1).reshape(-1, size)
    with monkeypatch.context() as patch:  # the noise in place of its key
        patch.setattr(
            jax.random, "normal", lambda z, shape, dtype=float: jnp.broadcast_to(z, shape)
        )
        value, scale, noise = (np.asarray(a) for a in affine(which, tau, ts))
    starts, ends = (
        np.array(
            [np.ravel(oracles.gaussian_marginal(0.7, 0.3, *pair(p, SPANS[p][i]))) for p in PATHS]
        )
        for i in (0, 1)
    )
    mean, variance = starts[which].T
    errors = np.abs(
        np.stack([scale * mean + value, scale**2 * variance + noise], -1) - ends[which]
    ).sum(-1)
    for e in errors.reshape(-1, n):
        # Weak order 1 is sure; here, where x0 is linear in x, it is 2 or, with the last digits of a
        # fall from order 3, a little more. sa_solver(1) errs most, 3e-4.
        assert slope(e) > 1.8 and e[-1] < 5e-4, errors


# ---- bad input -----------------------------------------------------------------------------------

ERRORS = {
    "data_adams": (lambda: data_adams(None, linear(), 4), r"order: expected 1, 2 or 3, got 4"),
    "noise_adams": (lambda: noise_adams(None, linear(), 0), r"order: .* got 0"),
    "velocity_adams": (lambda: velocity_adams(None, linear(), 4), r"order: .* got 4"),
    "deis": (lambda: deis(None, linear(), 4), r"order: .* got 4"),
    "unipc": (lambda: unipc(None, linear(), 4), r"order: .* got 4"),
    "sa_solver": (lambda: sa_solver(None, linear(), 4), r"order: .* got 4"),
    "sa tau": (lambda: sa_solver(None, linear(), tau=-0.5), r"tau: .* got -0.5"),
    "sde tau": (lambda: sde_dpm_solver_2m(None, linear(), np.inf), r"tau: .*finite.* got inf"),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
