"""The exponential integrators: DPM-Solver, its multistep and stochastic kin, UniPC, DEIS, Adams.

A program is compiled once for every method, and serves all paths, data and grids: the path is a
`switch`, a Gaussian is a mixture of two equal ones, and a shorter grid stands still at its
beginning, where a step from t to t changes nothing.
"""

import functools
import itertools
import math

import diffrax
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
import pytest

from diffjax import bind
from diffjax._numerics import phis
from diffjax.exact import gaussian, gaussian_mixture
from diffjax.grids import uniform_log_snr
from diffjax.parametrizations import X0, as_denoiser
from diffjax.samplers import (
    bh1,
    data_adams,
    ddim,
    ddpm,
    deis,
    dpm_solver_2,
    dpm_solver_2m,
    dpm_solver_2s,
    dpm_solver_3,
    dpm_solver_3m,
    noise_adams,
    sa_solver,
    sample,
    sde_dpm_solver_2m,
    trajectory,
    unipc,
    velocity_adams,
)
from diffjax.samplers._interpolation import lagrange_weights
from diffjax.schedules import edm, gvp, half_log_snr, half_log_snr_inverse, linear, linear_vp
from diffjax.solve import (
    DPM_SOLVER_12,
    DPM_SOLVER_23,
    dpm_solver_adaptive,
    dpm_solver_fast,
    solve_flow,
)
from diffjax.typing import Estimate, State

partial = functools.partial
X1 = np.array([0.9, -1.3])
PATHS = {"linear_vp": linear_vp, "linear": linear, "gvp": gvp, "edm": partial(edm, 4.0)}
# one Gaussian, of known flow, as two equal halves; and two unlike ones
M, V = np.array([0.7, -0.4]), np.array([0.3, 2.0])
GAUSSIAN = np.array([0.5, 0.5]), np.array([M, M]), np.array([np.diag(V)] * 2)
MIXTURE = (
    np.array([0.3, 0.7]),
    np.array([[-1.0, 0.5], [1.2, -0.3]]),
    np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.5]]]),
)


def any_path(which, t):
    """The path of that number."""
    branches = [
        lambda t, make=make: jnp.stack(make()(t)).astype(t.dtype) for make in PATHS.values()
    ]
    alpha, sigma = jax.lax.switch(which, branches, jnp.asarray(t))
    return alpha, sigma


def pair(path, t):
    """alpha and sigma, not by the library."""
    return (1.0, 4 * t) if path == "edm" else oracles.alpha_sigma(path, t)


# ---- order and limit -----------------------------------------------------------------------------

# The order of the error, on steps uniform in log-SNR. A corrector adds one.
ORDERS = {
    "ddim": (ddim, 1),
    "dpm_solver_2": (dpm_solver_2, 2),
    "dpm_solver_2s": (dpm_solver_2s, 2),
    "dpm_solver_3": (dpm_solver_3, 3),
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
STEPS = np.array([64, 128, 256])
GROWTH = 1.18
SIZE = STEPS[-1] + 80  # the times of the longest grid: its even steps, and 79 that grow
SPANS = {"linear_vp": (1.0, 0.05), "linear": (0.95, 0.05), "gvp": (0.95, 0.05), "edm": (1.0, 0.05)}


@functools.cache
def program(method):
    """`(which, x, ts, data) -> x`, of many paths, starts and grids at once."""

    def run(which, x, ts, data):
        schedule = bind(any_path, which)
        return sample(
            jax.random.key(0), ORDERS[method][0](gaussian_mixture(*data, schedule), schedule), x, ts
        )

    return jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None)))


def padded(grids, size):
    return np.stack([np.pad(ts, (size - len(ts), 0), mode="edge") for ts in grids])


@functools.cache
def primed_grids(primed=True):
    """Uniform in log-SNR, after steps that grow from n^-3 of the span: the lower orders of a
    multistep method's first steps shall not matter, and even the first-order one, the first, adds
    but O(n^-6).

    They grow by GROWTH a step, so slowly that every step keeps its order. Together they are as long
    as 1 / (GROWTH - 1) even steps, which there are fewer of.
    """

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0, None))
    def times(which, start, end, fractions):
        schedule = bind(any_path, which)
        first, last = half_log_snr(schedule, start), half_log_snr(schedule, end)
        return jax.vmap(lambda f: half_log_snr_inverse(schedule, first + f * (last - first)))(
            fractions
        )

    starts, ends = np.array(list(SPANS.values())).T
    grids = []
    for n in STEPS:
        growing = GROWTH ** -np.arange(1.0, np.log(n**2) / np.log(GROWTH))[::-1]
        even = n - round(1 / (GROWTH - 1))
        steps = np.concatenate([growing, np.ones(even)]) if primed else np.ones(n)
        fractions = np.concatenate([np.zeros(SIZE - len(steps)), np.cumsum(steps) / np.sum(steps)])
        ts = np.array(times(np.arange(len(PATHS)), starts, ends, fractions))
        ts[:, fractions == 0], ts[:, -1] = starts[:, None], ends
        grids.append(ts)
    return np.stack(grids, axis=1)


def run_all(method, grids, data, x=X1):
    """x at the end for grids of shape (paths, grids, times)."""
    paths, n, size = grids.shape
    x = np.broadcast_to(x, (paths, n, 2)).reshape(-1, 2)
    xs = program(method)(np.repeat(np.arange(paths), n), x, grids.reshape(-1, size), data)
    return np.asarray(xs).reshape(paths, n, 2)


@functools.cache
def exact_ends():
    return np.array(
        [oracles.gaussian_flow(M, V, pair(p, SPANS[p][0]), pair(p, SPANS[p][1]), X1) for p in PATHS]
    )


def slope(errors):
    return oracles.fitted_order(STEPS, errors)


# For the error at 256 steps: two to three times the largest of the methods of that order, on any
# path.
LIMITS = {1: 3e-2, 2: 5e-4, 3: 1e-5, 4: 1e-7}


@pytest.mark.parametrize("method", ORDERS)
def test_order_and_limit_on_a_gaussian(method):
    order = ORDERS[method][1]
    errors = np.linalg.norm(
        run_all(method, primed_grids(), GAUSSIAN) - exact_ends()[:, None], axis=-1
    )
    for path, e in zip(PATHS, errors, strict=True):
        assert e[-1] < LIMITS[order], (path, e)
        if method == "noise_adams(3)" and path != "edm":
            # its leading term changes sign near these steps: the slope is anything from 1 to 4
            continue
        # the leading term shows the order within 0.15; where the next one has the other sign, the
        # slope comes down to 3 from 3.6
        above = 0.6 if method == "dpm_solver_3m" else 0.15
        assert -0.15 < slope(e) - order < above, (path, e)


@functools.cache
def mixture_ends():
    """The exact flow by another integrator, accurate to 1e-9."""

    @jax.jit
    @jax.vmap
    def solve(which, t, s):
        schedule = bind(any_path, which)
        controller = diffrax.PIDController(rtol=1e-10, atol=1e-10)
        return solve_flow(
            gaussian_mixture(*MIXTURE, schedule),
            schedule,
            jnp.asarray(X1),
            t,
            s,
            stepsize_controller=controller,
        )

    starts, ends = np.array(list(SPANS.values())).T
    return np.asarray(solve(np.arange(len(PATHS)), starts, ends))


@pytest.mark.parametrize("method", ORDERS)
def test_limit_on_a_mixture(method):
    order = ORDERS[method][1]
    errors = np.linalg.norm(
        run_all(method, primed_grids(), MIXTURE) - mixture_ends()[:, None], axis=-1
    )
    for path, e in zip(PATHS, errors, strict=True):
        # an error that falls 4-fold per halving of the step, say, falls 16-fold from 64 to 256; the
        # cancellations of noise_adams(3) leave 26-fold of its 64-fold
        assert e[-1] < LIMITS[order] and e[-1] < e[0] / (0.35 * 4**order), (path, e)


@pytest.mark.parametrize("method", ORDERS)
def test_runs_on_all_paths_are_one_run_rescaled(method):
    # at equal log-SNR the noisy data of two paths differ by the factor alpha alone; only DEIS looks
    # at the time itself
    grids, alphas = matched_grids()
    xs = run_all(method, grids, MIXTURE, X1 * alphas[..., :1]) / alphas[..., 1:]
    if method.startswith("deis"):
        assert np.abs(xs[1:] / xs[0] - 1).max() > 1e-4
    else:
        # rounding alone, of about 20 steps, times 1e-10 that bisection and log lose of a time
        np.testing.assert_allclose(xs, np.broadcast_to(xs[0], xs.shape), rtol=1e-9)


@functools.cache
def matched_grids():
    """Grids of 6, 12 and 20 steps of equal log-SNR on every path, and alpha at their ends."""
    base = padded([np.linspace(0.5, 0.05, n + 1) for n in (6, 12, 20)], SIZE)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def match(which, ts):
        path = bind(any_path, which)
        same = lambda t: half_log_snr_inverse(path, half_log_snr(linear_vp(), t))  # noqa: E731
        return jax.vmap(jax.vmap(same))(ts)

    # a path stands still as exactly as linear_vp does
    grids = np.asarray(match(np.arange(len(PATHS)), base))
    alphas = [
        [[pair(p, ts[0])[0], pair(p, ts[-1])[0]] for ts in g]
        for p, g in zip(PATHS, grids, strict=True)
    ]
    return grids, np.array(alphas)


@pytest.mark.parametrize("method", [m for m in ORDERS if "tau" not in m])
def test_limit_on_the_whole_path(method):
    # from t = 1 to t = 0 in uniform steps, where the log-SNR is infinite and steps are DDIM
    grids = np.stack([padded([np.linspace(1, 0, n + 1) for n in STEPS], SIZE)] * len(PATHS))
    exact = [oracles.gaussian_flow(M, V, pair(p, 1.0), pair(p, 0.0), X1) for p in PATHS]
    errors = np.linalg.norm(run_all(method, grids, GAUSSIAN) - np.array(exact)[:, None], axis=-1)
    for path, e in zip(PATHS, errors, strict=True):
        if method == "ddim":
            assert slope(e) > 0.95 and e[-1] < 2e-2, (path, e)
        elif method.startswith("velocity"):
            # regular at both ends: only its first step, an Euler step of 1/n, keeps the order at 2.
            # On linear_vp the last step, of length n^-1/2 in sigma / (alpha + sigma), is too long
            # for the third order.
            order = 1.5 if (path, method) == ("linear_vp", "velocity_adams(3)") else 2
            assert slope(e) > order - 0.1 and e[-1] < 2e-4, (path, e)
        else:
            # the last steps, long in log-SNR, keep the order at 1; their error and that of the
            # others have opposite signs and cancel at some n, so no slope is sure: the errors are a
            # tenth of DDIM's, and shrink
            assert e[-1] < 1.5e-3 and e[-1] < e[0] / 2, (path, e)


# ---- phi and the weights -------------------------------------------------------------------------

NEAR_ONE = [1 - 1e-7, 1.0, 1 + 1e-7]
ZS = np.array(
    [-100.0, -31.4, -5.0, -2.0, -0.5, -1e-3, -1e-8, 0.0, 1e-8, 1e-3, 0.7, 1.5, 4.0, 20.0, 100.0]
)
ZS = np.sort(np.concatenate([ZS, NEAR_ONE, np.negative(NEAR_ONE)]))


def exact_phi(k, z):
    """Its definition as an integral, in 20 digits."""
    with mp.workdps(20):
        z = mp.mpf(float(z))
        return mp.quad(
            lambda v: mp.exp((1 - v) * z) * v ** (k - 1) / mp.factorial(k - 1),
            np.linspace(0, 1, 6).tolist(),
        )


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k):
    for dtype in (np.float64, np.float32):
        # without e^100, which float32 does not hold
        zs = ZS.astype(dtype)[: -1 if dtype == np.float32 else None]
        exact = np.array([float(exact_phi(k, z)) for z in zs])
        # first and last of several
        ours = np.array(jax.jit(lambda z: [phis(n, z)[k - 1] for n in range(k, 5)])(zs))
        assert ours.dtype == dtype
        error = np.abs(ours / exact - 1).max(0) / np.finfo(dtype).eps
        # the series has terms of one sign or falls fast: a few roundings; the recurrence loses a
        # digit or two per subtraction near |z| = 1, where phi_4 = 0.03 comes from differences of
        # numbers of order one
        assert error[np.abs(zs) < 1].max() < 4, (zs, error)
        assert error.max() < 100, (zs, error)


def test_phi_has_its_derivatives():
    # at 0 the integral of (1 - v) v^(k-1) / (k-1)!, which is 1/(k+1)!
    for k in (1, 2, 3, 4):
        gradient = jax.jit(jax.vmap(jax.grad(lambda z, k=k: phis(k, z)[-1])))(
            jnp.array([0.0, -0.3, 2.0, -30.0])
        )
        assert gradient[0] == pytest.approx(1 / math.factorial(k + 1), rel=1e-15)
        for z, ours in zip((-0.3, 2.0, -30.0), gradient[1:], strict=True):
            with mp.workdps(30):
                # Kummer's function
                exact = mp.diff(lambda z, k=k: mp.hyp1f1(1, k + 1, z) / mp.factorial(k), z)
            # two digits lost to the recurrence
            assert float(ours) == pytest.approx(float(exact), rel=1e-13)


def vandermonde(nodes):
    return np.array([np.asarray(nodes) ** k for k in range(1, len(nodes) + 1)])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_lagrange_weights_have_their_moments(n):
    random = np.random.default_rng(n)
    for _ in range(5):
        nodes = random.permutation(
            np.arange(1, n + 1) * random.choice([-1, 1], n)
        ) * 0.7 + random.uniform(-0.2, 0.2, n)
        moments = random.normal(size=n)
        weights = lagrange_weights(jnp.asarray(nodes), list(moments), 5.0 if n > 1 else None)
        # nodes at least 0.3 apart: the conditioning is below 1e3
        np.testing.assert_allclose(vandermonde(nodes) @ weights, moments, rtol=1e-12, atol=1e-12)


def test_lagrange_weights_leave_out_what_is_not_a_node():
    a, b, inf, nan = -0.7, 1.1, np.inf, np.nan
    moments = [0.3, -0.8, 2.0]
    two = np.linalg.solve(vandermonde([a, b]), moments[:2])
    for other in (inf, -inf, nan, 0.0):
        for place in (0, 1, 2):
            nodes = np.insert([a, b], place, other)
            weights = lagrange_weights(jnp.asarray(nodes), moments, 5.0)
            np.testing.assert_allclose(weights, np.insert(two, place, 0.0), rtol=1e-14)
    for repeated, expected in (
        ([a, a, b], [two[0], 0, two[1]]),
        ([a, b, a], [*two, 0]),
        ([a, b, b], [*two, 0]),
    ):
        np.testing.assert_allclose(
            lagrange_weights(jnp.array(repeated), moments, 5.0), expected, rtol=1e-14
        )
    for nodes in ([inf, b, inf], [b, 0.0, inf], [b, b, b], [nan, b, 0.0]):
        weights = np.asarray(lagrange_weights(jnp.array(nodes), moments))
        assert (
            weights[nodes.index(b)] == pytest.approx(moments[0] / b, rel=1e-15)
            and np.sum(weights != 0) == 1
        )
        weights = np.asarray(lagrange_weights(jnp.array(nodes), moments, 5.0))
        assert (
            weights[nodes.index(b)] == pytest.approx(5.0 / b, rel=1e-15)
            and np.sum(weights != 0) == 1
        )
    for nodes in ([inf, -inf], [0.0, inf], [nan, nan]):
        np.testing.assert_array_equal(lagrange_weights(jnp.array(nodes), moments[:2], 5.0), 0.0)
        jacobian = jax.jacobian(lambda nodes: lagrange_weights(nodes, moments[:2], 5.0))(
            jnp.array(nodes)
        )
        np.testing.assert_array_equal(jacobian, 0.0)


# ---- exact steps ---------------------------------------------------------------------------------

# Four times before the step and its end: uneven, but even enough for every order. The prediction p
# is a polynomial of u alone, whatever x is.
TIMES = [0.8, 0.67, 0.56, 0.43, 0.34]
VARIABLES = {
    "x0": lambda alpha, sigma, t, log: log(alpha / sigma),
    "eps": lambda alpha, sigma, t, log: log(alpha / sigma),
    "eps in t": lambda alpha, sigma, t, log: t,
    "velocity": lambda alpha, sigma, t, log: sigma / (alpha + sigma),
}
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
    "dpm_solver_3": (dpm_solver_3, "eps", 2),
}
# of u^0 ... u^3, for both coordinates
POLYNOMIAL = np.array([[0.7, -0.4], [0.9, 0.3], [-0.5, 0.8], [0.6, -0.7]])


def horner(coefficients, u):
    total = 0
    for c in reversed(coefficients):
        total = total * u + c
    return total


def _polynomial(kind, degree, schedule, x, t):
    alpha, sigma = schedule(t)
    p = horner(jnp.asarray(POLYNOMIAL[: degree + 1]), VARIABLES[kind](alpha, sigma, t, jnp.log))
    if kind == "x0":
        return Estimate(p, (x - alpha * p) / sigma)
    if kind == "velocity":
        return Estimate((x - sigma * p) / (alpha + sigma), (x + alpha * p) / (alpha + sigma))
    return Estimate((x - sigma * p) / alpha, p)


def exact_step(kind, degree, path, x, t, s):
    """x / sigma, x / alpha or x / (alpha + sigma) changes by the integral of p over the other
    ratio.
    """
    alpha, sigma = oracles.TABLE[path][:2]
    t, s = mp.mpf(t), mp.mpf(s)
    scale, ratio, u = {
        "x0": (sigma, lambda t: alpha(t) / sigma(t), mp.log),
        "eps": (alpha, lambda t: sigma(t) / alpha(t), lambda ratio: -mp.log(ratio)),
        "velocity": (
            lambda t: alpha(t) + sigma(t),
            lambda t: sigma(t) / (alpha(t) + sigma(t)),
            lambda ratio: ratio,
        ),
        "eps in t": (alpha, lambda t: sigma(t) / alpha(t), None),
    }[kind]
    result = []
    with mp.workdps(25):
        for value, c in zip(x, POLYNOMIAL[: degree + 1].T.tolist(), strict=True):
            if kind == "eps in t":
                change = mp.quad(lambda v, c=c: horner(c, v) * mp.diff(ratio, v), [t, s])
            else:
                change = mp.quad(lambda v, c=c: horner(c, u(v)), [ratio(t), ratio(s)])
            result.append(float(scale(s) * (mp.mpf(float(value)) / scale(t) + change)))
    return np.array(result)


def warm(step, sampler, times, key=None):
    """The state at the last time, after a run from the first one."""
    state = sampler.init(jnp.asarray(X1), times[0])
    for t, s in itertools.pairwise(times):
        state = step(key, state, t, s)
    return state


@pytest.mark.parametrize("method", EXACT)
def test_a_step_is_exact_on_a_polynomial(method):
    make, kind, points = EXACT[method]
    path, schedule, (t, s) = "linear_vp", linear_vp(), TIMES[-2:]
    for degree in (points - 1, points):
        sampler = make(polynomial_denoiser(kind, degree, schedule), schedule)
        step = jax.jit(sampler.step)
        x = step(None, warm(step, sampler, TIMES[:-1])._replace(x=jnp.asarray(X1)), t, s).x
        error = np.abs(x - exact_step(kind, degree, path, X1, t, s)).max()
        # exact but for rounding, which divided differences of nodes 0.1 apart multiply by 100; one
        # degree more is not
        assert error < 1e-12 if degree < points else error > 1e-6, (degree, error)


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
        n, count = len(memory.values), memory.count
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
        n, count = len(state.memory.values), state.memory.count
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


def polynomial_denoiser(kind, degree, schedule):
    return bind(partial(_polynomial, kind, degree), schedule)


# ---- the published formulas ----------------------------------------------------------------------


def vp_step(*times):
    """alpha and sigma of linear_vp at the times, and lambda."""
    alphas, sigmas = np.array([oracles.alpha_sigma("linear_vp", t) for t in times]).T
    return alphas, sigmas, np.log(alphas / sigmas)


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


# ---- programs and gradients ----------------------------------------------------------------------

STOCHASTIC = {
    "sde_dpm_solver_2m": sde_dpm_solver_2m,
    "sa_solver(1)": partial(sa_solver, order=1),
    "sa_solver(2)": partial(sa_solver, order=2),
    "sa_solver(3)": sa_solver,
}


def network(w, x, t):
    return w @ x


def network_denoiser(schedule):
    return as_denoiser(bind(network, jnp.eye(2)), schedule, X0)


def check_program(sampler, ts, draws):
    check_holds_the_network_once(
        jax.make_jaxpr(sample)(jax.random.key(0), sampler, jnp.asarray(X1), ts), draws
    )


def check_holds_the_network_once(jaxpr, draws):
    program = str(jaxpr)
    assert program.count("dot_general") == 1 and program.count("random_bits") == draws
    assert " cond[" not in program


def test_a_program_holds_the_network_once_and_draws_noise_only_if_stochastic():
    # and no step has a branch: under vmap one would run both sides
    schedule, ts = linear(), np.linspace(0.9, 0.1, 21)
    # the others differ by numbers alone
    for make in (dpm_solver_3, dpm_solver_2m, unipc, deis, velocity_adams):
        check_program(make(network_denoiser(schedule), schedule), ts, draws=0)
    for make in (sde_dpm_solver_2m, sa_solver):
        check_program(make(network_denoiser(schedule), schedule), ts, draws=1)
    run = partial(
        dpm_solver_fast, network_denoiser(schedule), schedule, evaluations=9, start=0.9, end=0.1
    )
    check_holds_the_network_once(jax.make_jaxpr(run)(jnp.asarray(X1)), draws=0)


ENDS = {
    "dpm_solver_2": dpm_solver_2,
    "unipc(2)": partial(unipc, order=2),
    "noise_adams(2)": partial(noise_adams, order=2),
    "velocity_adams(2)": partial(velocity_adams, order=2),
    "deis(2)": partial(deis, order=2),
    "sde_dpm_solver_2m": sde_dpm_solver_2m,
}


@pytest.mark.parametrize("path", ["linear_vp", "linear"])
@pytest.mark.parametrize("method", ENDS)
def test_finite_with_finite_gradients_on_the_whole_path(method, path):
    # in float32, from t = 1, where alpha may be 0, to t = 0, where sigma is 0: by the path, x and
    # the times between
    dtype = np.float32

    def loss(schedule, x, inner):
        ts = jnp.concatenate([jnp.ones(1, dtype), inner, jnp.zeros(1, dtype)])
        denoise = gaussian(jnp.asarray(M, dtype), jnp.diag(jnp.asarray(V, dtype)), schedule)
        return jnp.sum(sample(jax.random.key(0), ENDS[method](denoise, schedule), x, ts))

    schedule = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PATHS[path]())
    arguments = schedule, jnp.asarray(X1, dtype), jnp.array([0.7, 0.3], dtype)
    values = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)
    assert all(
        leaf.dtype == dtype and np.isfinite(leaf).all() for leaf in jax.tree.leaves(values)
    ), values


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


# ---- stochastic solvers: mean and variance, exactly ----------------------------------------------


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


# ---- exactly K evaluations -----------------------------------------------------------------------

RULE = dict(enumerate("1 2 21 31 32 321 331 332 3321 3331 3332 33321".split(), 1))


def test_dpm_solver_fast_follows_its_rule():
    # on the linear path, whose log-SNR is log((1 - t) / t): each step in its parts of equal log-SNR
    start, end, times = 0.95, 0.05, []

    def recorded(x, t):
        jax.debug.callback(times.append, t, ordered=True)
        return Estimate(x, x)

    jax.jit(
        lambda: [dpm_solver_fast(recorded, linear(), jnp.ones(2), k, start, end) for k in RULE]
    )()
    jax.effects_barrier()
    assert len(times) == sum(RULE)
    for k, orders in RULE.items():
        ts = np.array([*times[:k], end])
        del times[:k]
        places = np.concatenate(
            [i + np.arange(int(o)) / int(o) for i, o in enumerate(orders)] + [[len(orders)]]
        )
        values = np.log((1 - ts) / ts)
        # bisection finds a time to the last digit
        np.testing.assert_allclose((values / values[-1] + 1) / 2 * len(orders), places, atol=1e-13)
        assert ts[0] == start


def test_dpm_solver_fast_is_the_steps_that_it_names():
    schedule, start, end = linear_vp(), 0.8, 0.1
    denoise = gaussian_mixture(*MIXTURE, schedule)

    @jax.jit
    def run():
        outer = uniform_log_snr(schedule, 4, start, end)
        third = sample(
            jax.random.key(0), dpm_solver_3(denoise, schedule), jnp.asarray(X1), outer[:3]
        )
        second = sample(jax.random.key(0), dpm_solver_2(denoise, schedule), third, outer[2:4])
        first = sample(jax.random.key(0), ddim(denoise, schedule), second, outer[3:])
        return dpm_solver_fast(denoise, schedule, jnp.asarray(X1), 9, start, end), first

    with jax.debug_key_reuse(False):
        np.testing.assert_allclose(*run(), rtol=1e-12)


def test_dpm_solver_fast_converges():
    # its one step of first order has an error of n^-2, so 4 times as many evaluations divide it by
    # nearly 16
    schedule = linear_vp()
    exact = oracles.gaussian_flow(M, V, pair("linear_vp", 0.8), pair("linear_vp", 0.1), X1)
    denoise = gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule)
    errors = []
    for k in (12, 48):
        x = jax.jit(lambda k=k: dpm_solver_fast(denoise, schedule, jnp.asarray(X1), k, 0.8, 0.1))()
        errors.append(np.linalg.norm(x - exact))
    assert errors[1] < errors[0] / 8 and errors[1] < 1e-2, errors


# ---- adaptive steps ------------------------------------------------------------------------------

TOLERANCES = 10.0 ** -np.arange(2, 7)
STARTS = np.array([X1, -2 * X1, [0.1, 3.0]])


ADAPTIVE = [partial(dpm_solver_adaptive, pair=pair) for pair in (DPM_SOLVER_12, DPM_SOLVER_23)]


@pytest.mark.parametrize(("solve", "order"), [(ADAPTIVE[0], 2), (ADAPTIVE[1], 3)])
def test_adaptive_steps_keep_their_tolerance(solve, order):
    schedule, start, end = linear_vp(), 1.0, 0.05
    denoise = gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule)

    def run(x, tolerance):
        return solve(
            denoise, schedule, x, start, end, rtol=tolerance, atol=tolerance, max_steps=20_000
        )

    together = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(None, 0)))
    xs, evaluations = map(np.asarray, together(jnp.asarray(STARTS), jnp.asarray(TOLERANCES)))
    exact = [
        oracles.gaussian_flow(M, V, pair("linear_vp", start), pair("linear_vp", end), x)
        for x in STARTS
    ]
    errors = np.linalg.norm(xs - np.array(exact), axis=-1)
    # The tolerance bounds what the lower of two orders p errs in a step of log-SNR, h^p; so h is
    # tolerance^(1/p), and the error of the higher one, h^p in all, is proportional to the
    # tolerance. Not yet quite so at 1e-2, and errors of a few steps cancel by chance.
    assert np.all(errors < 15 * TOLERANCES[:, None]) and np.all(errors[1:] < errors[:-1]), errors
    fitted = [oracles.fitted_order(1 / TOLERANCES, e) for e in errors.T]
    assert min(fitted) > 0.65 and max(fitted) < 1.1, fitted
    growth = evaluations[-1] / evaluations[-2]
    assert np.all(growth > 1.4) and np.all(growth < 1.1 * 10 ** (1 / order)), evaluations
    assert np.all(evaluations[1:] > evaluations[:-1]) and np.all(evaluations % order == 0)
    assert len(set(evaluations[-1].tolist())) > 1  # every sample has its own steps
    # among others a sample takes the steps that it takes alone
    same, counts = together(jnp.asarray(STARTS[[1, 1, 1]]), jnp.asarray(TOLERANCES))
    np.testing.assert_array_equal(counts, evaluations[:, [1, 1, 1]])
    np.testing.assert_allclose(same, xs[:, [1, 1, 1]], rtol=1e-12)


@pytest.mark.parametrize("solve", ADAPTIVE)
def test_adaptive_steps_give_up(solve):
    schedule = linear_vp()
    denoise = gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(V)), schedule)
    run = jax.jit(lambda x: solve(denoise, schedule, x, rtol=1e-4, atol=1e-4, max_steps=3).x)
    for x, message in (
        (X1, "max_steps: expected enough steps to go from t to s, got 3"),
        (np.nan * X1, "x: expected finite values of x and the denoiser"),
    ):
        with pytest.raises(RuntimeError, match=message):
            jax.block_until_ready(run(jnp.asarray(x)))


# ---- bad input -----------------------------------------------------------------------------------


def rising(t):
    return 1.0 + t, 0.5 + 0.0 * t


def adaptive(**changes):
    denoise = gaussian(jnp.zeros(2), jnp.eye(2), linear())
    return dpm_solver_adaptive(
        denoise, linear(), jnp.asarray(X1), **({"t": 0.9, "s": 0.1} | changes)
    )


@pytest.mark.parametrize("make", [data_adams, noise_adams, velocity_adams, deis, unipc])
def test_with_fewer_steps_than_its_order_a_method_is_that_of_lower_order(make):
    schedule = linear_vp()
    denoise = gaussian_mixture(*MIXTURE, schedule)
    run = jax.jit(
        lambda order, ts: sample(jax.random.key(0), make(denoise, schedule, order), X1, ts),
        static_argnums=0,
    )
    for n in (1, 2):
        ts = jnp.linspace(0.9, 0.1, n + 1)
        np.testing.assert_allclose(run(3, ts), run(n, ts), rtol=1e-12)


ERRORS = {
    "data_adams": (lambda: data_adams(None, linear(), 4), r"order: expected 1, 2 or 3, got 4"),
    "noise_adams": (lambda: noise_adams(None, linear(), 0), r"order: .* got 0"),
    "velocity_adams": (lambda: velocity_adams(None, linear(), 4), r"order: .* got 4"),
    "deis": (lambda: deis(None, linear(), 4), r"order: .* got 4"),
    "unipc": (lambda: unipc(None, linear(), 4), r"order: .* got 4"),
    "sa_solver": (lambda: sa_solver(None, linear(), 4), r"order: .* got 4"),
    "sa tau": (lambda: sa_solver(None, linear(), tau=-0.5), r"tau: .* got -0.5"),
    "sde tau": (lambda: sde_dpm_solver_2m(None, linear(), np.inf), r"tau: .*finite.* got inf"),
    "r1 of 0": (
        lambda: dpm_solver_2(None, linear(), 0.0),
        r"r1: expected a number in \(0, 1\], got 0.0",
    ),
    "r1 of 2s": (lambda: dpm_solver_2s(None, linear(), 1.5), r"r1: .* got 1.5"),
    "r2": (lambda: dpm_solver_3(None, linear(), 0.3, 1.5), r"r2: .* got 1.5"),
    "r2 <= r1": (lambda: dpm_solver_3(None, linear(), 0.5, 0.5), r"r1 < r2, got r1=0.5, r2=0.5"),
    "no evaluations": (
        lambda: dpm_solver_fast(None, linear(), X1, 0),
        r"evaluations: expected at least 1, got 0",
    ),
    "fast, no path": (
        lambda: dpm_solver_fast(None, rising, X1, 5),
        r"schedule: expected a log-SNR that decreases",
    ),
    "rising": (lambda: uniform_log_snr(rising, 5), r"schedule: expected a log-SNR that decreases"),
    "adaptive from 1": (
        lambda: adaptive(t=1.0),
        r"t: expected a time of finite log-SNR, got t=1.0 with -inf",
    ),
    "adaptive to 0": (
        lambda: adaptive(s=0.0),
        r"s: expected a time of finite log-SNR, got s=0.0 with inf",
    ),
    "adaptive backwards": (lambda: adaptive(t=0.1, s=0.9), r"0 <= s < t <= 1, got t=0.1, s=0.9"),
    "rtol": (lambda: adaptive(rtol=0.0), r"rtol: expected a positive number, got 0.0"),
    "atol": (lambda: adaptive(atol=-1.0), r"atol: .* got -1.0"),
    "first step": (lambda: adaptive(first_step=0.0), r"first_step: .* got 0.0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_grid_as_long_as_the_order_is_enough():
    for make, steps in ((dpm_solver_2m, 2), (data_adams, 3), (unipc, 3)):
        schedule = linear()
        sampler = make(gaussian(jnp.zeros(2), jnp.eye(2), schedule), schedule)
        jax.eval_shape(
            sample, jax.random.key(0), sampler, jnp.asarray(X1), np.linspace(0.9, 0.1, steps + 1)
        )
