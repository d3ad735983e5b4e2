"""Tables of costs against closed forms on Gaussian data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from gaussian_data import END, XS, M, V, column, data, end_errors, even_in_log_snr, pairs

from diffjax import bind, process, schedules
from diffjax.optimal_grids import cheapest_paths, elbo_table, klub_table, solver_error_table
from diffjax.samplers import ddim, dpm_solver_2
from diffjax.typing import Estimate

N = 20_000
inf = np.inf
search = jax.jit(cheapest_paths, static_argnums=1)


def draws(n=N):
    return jnp.asarray(M + np.sqrt(V) * np.random.default_rng(0).normal(size=(n, 2)))


# alpha > 0 at the first time, sigma > 0 at the last
SPANS = {"linear_vp": (1.0, END), "ve": (1.0, 1e-5), "gvp": (0.95, 0.01), "edm": (1.0, 1e-4)}


def knowing(schedule, x0, c, x, t):
    """A denoiser that knows the data, and is off by c: its error is not random."""
    alpha, sigma = schedule(t)
    eps = (x - alpha * x0) / sigma - c
    return Estimate((x - sigma * eps) / alpha, eps)


@pytest.mark.parametrize("path", ["linear_vp", "ve", "gvp"])
def test_bound_is_the_kl_of_the_two_posteriors(path):
    # KL(q(x_s | x_t, x0) || q(x_s | x_t, x0_hat)): two Gaussians of one covariance. The denoiser is
    # off by a known c(x0), so x0_hat = x0 + (sigma_t / alpha_t) c, and no expectation is left but
    # the mean over three examples.
    schedule = getattr(schedules, path)()
    ts = np.geomspace(*SPANS[path], 6)
    x0, c = np.random.default_rng(1).normal(size=(2, 3, 2, 2))
    denoise = bind(knowing, schedule, jnp.asarray(x0), jnp.asarray(c))
    table = jax.jit(elbo_table)(jax.random.key(0), denoise, schedule, ts, jnp.asarray(x0))
    alphas, sigmas = pairs(path, ts)
    weights = jax.jit(
        jax.vmap(jax.vmap(functools.partial(process.posterior, schedule), (None, 0)), (0, None))
    )(ts, ts)
    for i, j in itertools.product(range(6), range(6)):
        if i >= j:
            assert table[i, j] == inf
            continue
        x0_hat = x0 + sigmas[i] / alphas[i] * c
        shift = weights.x0_weight[j, i] * (x0_hat - x0)
        kl = np.sum(shift**2) / (2 * float(weights.std[j, i]) ** 2) / 3
        # a dozen roundings, and 1 - SNR_t / SNR_s, which loses a digit where the two are close
        np.testing.assert_allclose(table[i, j], kl, rtol=1e-10)


def test_bound_of_gaussian_data():
    # E |eps - eps_hat|^2 = sum_d r_d, the posterior variances r = alpha^2 v / (alpha^2 v + sigma^2)
    # of the noise
    schedule, ts = schedules.linear_vp(), np.array([1.0, 0.6, 0.3, 0.1, 0.01])
    table = np.asarray(
        jax.jit(elbo_table)(jax.random.key(1), data(schedule), schedule, ts, draws())
    )
    alphas, sigmas = pairs("linear_vp", ts)
    r = column(alphas**2) * V / (column(alphas**2) * V + column(sigmas**2))
    gains = np.expm1(2 * np.log(alphas / sigmas)[None, :] - 2 * np.log(alphas / sigmas)[:, None])
    expected, upper = 0.5 * gains * column(r.sum(1)), np.triu_indices(5, 1)
    # eps - eps_hat is Gaussian, so its square has the variance 2 sum_d r_d^2: five standard errors
    # of N examples
    bounds = 5 * 0.5 * gains * column(np.sqrt(2 * np.sum(r**2, 1) / N))
    assert np.all(np.abs(table - expected)[upper] < bounds[upper])
    assert np.all(bounds[upper] < 0.05 * expected[upper])  # or nothing would be tested
    assert np.all(table[np.tril_indices(5)] == inf)


def test_bound_at_the_data_is_a_gaussian_of_the_estimates_own_noise():
    # -E log N(x0; x0_hat, (sigma / alpha)^2 I) = d/2 log 2 pi + d log(sigma / alpha) + 1/2 sum_d
    # r_d
    schedule, ts = schedules.linear(), np.array([0.9, 0.4, 0.02, 0.0])
    table = np.asarray(
        jax.jit(elbo_table)(jax.random.key(2), data(schedule), schedule, ts, draws())
    )
    for i, t in enumerate(ts[:-1]):
        r = (1 - t) ** 2 * V / ((1 - t) ** 2 * V + t**2)
        expected = np.log(2 * np.pi) + 2 * np.log(t / (1 - t)) + 0.5 * r.sum()
        # five standard errors, as above
        assert abs(table[i, -1] - expected) < 5 * 0.5 * np.sqrt(2 * np.sum(r**2) / N)
    np.testing.assert_array_equal(np.isfinite(table), np.triu(np.ones((4, 4)), 1) > 0)
    # at small noise the term is the entropy of the noise itself, sigma / alpha in two dimensions
    assert abs(table[2, -1] - (np.log(2 * np.pi * np.e) + 2 * np.log(0.02 / 0.98))) < 0.05


def test_refining_a_grid_never_raises_the_bound():
    # L(a, c) - L(a, b) - L(b, c) = (SNR_c - SNR_b) (mse_a - mse_b) / 2, and the error of the
    # posterior mean falls with t. Between these candidates it falls by twenty of its standard
    # errors (1% of it) or more, so no tolerance is needed.
    schedule = schedules.linear_vp()
    ts = np.array([0.6, 0.4, 0.25, 0.12, 0.05, 0.02])
    table = np.asarray(
        jax.jit(elbo_table)(jax.random.key(3), data(schedule), schedule, ts, draws())
    )
    for a, b, c in itertools.combinations(range(6), 3):
        assert table[a, c] > table[a, b] + table[b, c], (a, b, c)
    costs = search(table, 5).costs
    assert np.all(np.diff(costs) < 0)  # so every further step helps the best grid


def klub_candidates(path):
    """A schedule, candidates, and their alpha and sigma."""
    if path == "ve of much noise":  # sigma(0) = 1/2: data are not the same as x at t = 0
        ts = np.linspace(1.0, 0.0, 8)
        return schedules.ve(0.5, 4.0), ts, np.ones(8), 0.5 ** (1 - ts) * 4.0**ts
    start, end = SPANS[path]
    ts = np.geomspace(start, end, 8)
    return getattr(schedules, path)(), ts, *pairs(path, ts)


@pytest.mark.parametrize("path", ["linear_vp", "edm", "gvp"])
def test_klub_of_gaussian_data(path):
    check_klub(*klub_candidates(path))


def test_klub_of_gaussian_data_where_noise_is_left_at_the_end():
    check_klub(*klub_candidates("ve of much noise"))


def check_klub(schedule, ts, alphas, sigmas):
    # x0_hat(x_t) = E[x0 | x_t] is a martingale towards the data along a forward path, as x_t is
    # Markov. So the mean squares of its increments are the increments of its variance, alpha^2 v^2
    # / (alpha^2 v + sigma^2) in every dimension.
    table = np.asarray(
        jax.jit(klub_table)(jax.random.key(4), data(schedule), schedule, ts, draws())
    )
    variance = column(alphas**2) * V**2 / (column(alphas**2) * V + column(sigmas**2))
    snr = (alphas / sigmas) ** 2
    for i in range(8):
        grown = variance[i:] - variance[i]
        # The estimates are Gaussian, so a mean square has the variance 2 sum_d grown_d^2 / N. The
        # standard error of a sum is at most the sum of the standard errors: the same trapezoid
        # rule; five of them.
        distance, error = grown.sum(1), np.sqrt(2 * np.sum(grown**2, 1) / N)
        expected, bound = (
            np.cumsum(0.5 * np.diff(snr[i:]) * 0.5 * (values[1:] + values[:-1]))
            for values in (distance, error)
        )
        assert np.all(np.abs(table[i, i + 1 :] - expected) < 5 * bound) and np.all(
            bound < 0.02 * expected
        )
        assert np.all(table[i, : i + 1] == inf)


def flow(path, ts, x):
    """The probability flow of Gaussian data from x at the first time through all of them."""
    ends = [oracles.alpha_sigma(path, float(t)) for t in ts]
    return np.stack([oracles.gaussian_flow(M, V, ends[0], end, x) for end in ends])


def ddim_step(start, end, x):
    """Both posterior means of Gaussian data, and the next x from them."""
    alpha, sigma = start
    white = (x - alpha * M) / (alpha**2 * V + sigma**2)
    return end[0] * (M + alpha * V * white) + end[1] * sigma * white


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
def test_solver_errors_of_ddim_in_closed_form(path):
    schedule = getattr(schedules, path)()
    ts = np.array([1.0, 0.7, 0.5, 0.2, 0.05, 0.0])
    xs = flow(path, ts, XS * oracles.alpha_sigma(path, 1.0)[1])
    table = jax.jit(solver_error_table)(
        ddim(data(schedule), schedule), schedule, ts, jnp.asarray(xs)
    )
    ends = [oracles.alpha_sigma(path, float(t)) for t in ts]
    for i, j in itertools.product(range(6), range(6)):
        if i >= j:
            assert table[i, j] == inf
        else:
            error = np.sqrt(np.mean((ddim_step(ends[i], ends[j], xs[i]) - xs[j]) ** 2)) / np.hypot(
                *ends[j]
            )
            # errors above 1e-3 of x's of order one, or of order 80 on edm where hypot(alpha, sigma)
            # is 80, too
            np.testing.assert_allclose(table[i, j], error, rtol=1e-10)


@pytest.mark.parametrize("make", [ddim, dpm_solver_2])
def test_the_cheapest_grid_of_a_solver_ends_closer(make):
    # the sum of the errors of the steps is not the error at the end, but it is enough to beat both
    # uniform grids
    schedule, budgets = schedules.linear_vp(), range(4, 9)
    ts = even_in_log_snr(40)
    xs = flow("linear_vp", ts, XS)
    table = jax.jit(solver_error_table)(
        make(data(schedule), schedule), schedule, ts, jnp.asarray(xs)
    )
    found = search(table, budgets[-1])
    grids = [np.asarray(found.grid(ts, k)) for k in budgets]
    assert all(
        ts[0] == grid[0] and ts[-1] == grid[-1] and np.all(np.diff(grid) < 0) for grid in grids
    )
    grids += [np.linspace(1.0, END, k + 1) for k in budgets]
    grids += [even_in_log_snr(k) for k in budgets]
    cheapest, in_t, in_log_snr = np.split(end_errors(make, grids, XS), 3)
    assert np.all(cheapest < in_t) and np.all(cheapest < in_log_snr), (cheapest, in_t, in_log_snr)


def test_the_cheapest_grid_of_ddim_is_even_in_the_angle():
    # On data N(0, 1) and a circle (alpha, sigma) = (cos, sin) of pi t / 2 the flow stands still,
    # and a step of DDIM over the angle a multiplies x by cos a. The cost 1 - cos a is strictly
    # convex, so the best steps are equal.
    schedule, ts = schedules.gvp(), np.linspace(1.0, 0.0, 25)
    x = np.random.default_rng(6).normal(size=(3, 1))
    sampler = ddim(data(schedule, [0.0], [1.0]), schedule)
    table = jax.jit(solver_error_table)(sampler, schedule, ts, jnp.asarray(np.tile(x, (25, 1, 1))))
    found = search(table, 12)
    for k in (1, 2, 3, 4, 6, 8, 12):
        np.testing.assert_array_equal(found.grid(ts, k), ts[:: 24 // k])
        # 1 - cos loses two digits at the smallest angle, pi / 24
        cost = k * (1 - np.cos(np.pi / 2 / k)) * np.sqrt(np.mean(x**2))
        np.testing.assert_allclose(found.costs[k - 1], cost, rtol=1e-12)


KEY = 0  # no key is looked at before the error
LINEAR = schedules.linear()
DOWN = np.array([0.9, 0.5, 0.1])


def swinging(t):
    return jnp.cos(9 * t) ** 2 + 0.1, jnp.sin(9 * t) ** 2 + 0.1


def solver_errors(ts, xs):
    return solver_error_table(ddim(data(LINEAR), LINEAR), LINEAR, ts, xs)


ERRORS = {  # (call, what the message must say)
    "ascending": (
        lambda: elbo_table(KEY, None, LINEAR, DOWN[::-1], None),
        r"ts: .*descend, got \[0.1 0.5 0.9\]",
    ),
    "repeated": (
        lambda: klub_table(KEY, None, LINEAR, np.array([0.5, 0.5]), None),
        r"ts: .*descend, got \[0.5 0.5\]",
    ),
    "one": (
        lambda: elbo_table(KEY, None, LINEAR, DOWN[:1], None),
        r"ts: .*at least 2 candidate.*got shape \(1,\)",
    ),
    "matrix": (
        lambda: solver_errors(np.eye(2), None),
        r"ts: expected a vector.*got shape \(2, 2\)",
    ),
    "beyond 1": (
        lambda: solver_errors(DOWN + 0.2, DOWN),
        r"ts: expected times in \[0, 1\], got \[1.1",
    ),
    "swinging": (
        lambda: elbo_table(KEY, None, swinging, DOWN, None),
        r"schedule: expected a log-SNR that increases along ts, got half log-SNRs \[.*\]",
    ),
    "xs": (
        lambda: solver_errors(DOWN, np.zeros((2, 4, 2))),
        r"xs: expected one batch for each of the 3 times, got 2",
    ),
    "klub at 1": (
        lambda: klub_table(KEY, None, LINEAR, np.array([1.0, 0.5]), None),
        r"ts: expected times of finite log-SNR, got half log-SNRs \[-inf",
    ),
    "klub at 0": (
        lambda: klub_table(KEY, None, LINEAR, np.array([0.5, 0.0]), None),
        r"ts: expected times of finite log-SNR, got half log-SNRs \[ *0. +inf\]",
    ),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
