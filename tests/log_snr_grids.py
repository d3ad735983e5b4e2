"""How the exponential integrators converge: a program for every method, which serves all paths,
data and grids.

The path is a `switch`, a Gaussian is a mixture of two equal ones, and a shorter grid stands still
at its beginning, where a step from t to t changes nothing.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles

from diffjax import bind
from diffjax.exact import gaussian_mixture
from diffjax.samplers import sample
from diffjax.schedules import edm, gvp, half_log_snr, half_log_snr_inverse, linear, linear_vp
from diffjax.solve import solve_flow

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


STEPS = np.array([64, 128, 256])
GROWTH = 1.18
SIZE = STEPS[-1] + 80  # the times of the longest grid: its even steps, and 79 that grow
SPANS = {"linear_vp": (1.0, 0.05), "linear": (0.95, 0.05), "gvp": (0.95, 0.05), "edm": (1.0, 0.05)}


@functools.cache
def program(make):
    """`(which, x, ts, data) -> x`, of many paths, starts and grids at once."""

    def run(which, x, ts, data):
        schedule = bind(any_path, which)
        return sample(jax.random.key(0), make(gaussian_mixture(*data, schedule), schedule), x, ts)

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


def run_all(make, grids, data, x=X1):
    """x at the end for grids of shape (paths, grids, times)."""
    paths, n, size = grids.shape
    x = np.broadcast_to(x, (paths, n, 2)).reshape(-1, 2)
    xs = program(make)(np.repeat(np.arange(paths), n), x, grids.reshape(-1, size), data)
    return np.asarray(xs).reshape(paths, n, 2)


@functools.cache
def exact_ends():
    return np.array(
        [oracles.gaussian_flow(M, V, pair(p, SPANS[p][0]), pair(p, SPANS[p][1]), X1) for p in PATHS]
    )


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


def slope(errors):
    return oracles.fitted_order(STEPS, errors)


# For the error at 256 steps: two to three times the largest of the methods of that order, on any
# path.
LIMITS = {1: 3e-2, 2: 5e-4, 3: 1e-5, 4: 1e-7}


def errors_on_a_gaussian(make):
    """Of shape (paths, grids), on steps that are even in log-SNR."""
    return np.linalg.norm(run_all(make, primed_grids(), GAUSSIAN) - exact_ends()[:, None], axis=-1)


def check_order_and_limit(make, order, above=0.15, skipped=()):
    """The slope on a Gaussian, but on the paths that are skipped, may be higher than the order by
    `above`.
    """
    for path, e in zip(PATHS, errors_on_a_gaussian(make), strict=True):
        assert e[-1] < LIMITS[order], (path, e)
        assert path in skipped or -0.15 < slope(e) - order < above, (path, e)


def check_limit_on_a_mixture(make, order):
    errors = np.linalg.norm(
        run_all(make, primed_grids(), MIXTURE) - mixture_ends()[:, None], axis=-1
    )
    for path, e in zip(PATHS, errors, strict=True):
        # an error that falls 4-fold per halving of the step, say, falls 16-fold from 64 to 256; the
        # cancellations of noise_adams(3) leave 26-fold of its 64-fold
        assert e[-1] < LIMITS[order] and e[-1] < e[0] / (0.35 * 4**order), (path, e)


def on_matched_grids(make):
    """x / alpha at the end, of shape (paths, grids, 2), for grids of equal log-SNR and the same x /
    alpha at the start.
    """
    grids, alphas = matched_grids()
    return run_all(make, grids, MIXTURE, X1 * alphas[..., :1]) / alphas[..., 1:]


def check_that_runs_are_one_run_rescaled(make):
    # at equal log-SNR the noisy data of two paths differ by the factor alpha alone
    xs = on_matched_grids(make)
    # rounding alone, of about 20 steps, times 1e-10 that bisection and log lose of a time
    np.testing.assert_allclose(xs, np.broadcast_to(xs[0], xs.shape), rtol=1e-9)


def errors_on_the_whole_path(make):
    """By path, from t = 1 to t = 0 in uniform steps, where the log-SNR is infinite and steps are
    DDIM.
    """
    grids = np.stack([padded([np.linspace(1, 0, n + 1) for n in STEPS], SIZE)] * len(PATHS))
    exact = [oracles.gaussian_flow(M, V, pair(p, 1.0), pair(p, 0.0), X1) for p in PATHS]
    errors = np.linalg.norm(run_all(make, grids, GAUSSIAN) - np.array(exact)[:, None], axis=-1)
    return dict(zip(PATHS, errors, strict=True))


def check_limit_on_the_whole_path(make):
    for path, e in errors_on_the_whole_path(make).items():
        # the last steps, long in log-SNR, keep the order at 1; their error and that of the others
        # have opposite signs and cancel at some n, so no slope is sure: the errors are a tenth of
        # DDIM's, and shrink
        assert e[-1] < 1.5e-3 and e[-1] < e[0] / 2, (path, e)
