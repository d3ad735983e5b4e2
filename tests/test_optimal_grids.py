"""Grids that are found: tables of costs against closed forms on Gaussian data, their paths against all paths."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import optax
import oracles
import pytest

from diffjax import bind, process, schedules
from diffjax.exact import gaussian
from diffjax.grids import uniform
from diffjax.optimal_grids import (
    cheapest_paths,
    elbo_table,
    fit_grid,
    from_increments,
    increments,
    klub_table,
    learn_grid,
    load_grid,
    save_grid,
    solver_error_table,
)
from diffjax.samplers import ddim, dpm_solver_2, dpm_solver_2m, sample
from diffjax.typing import Estimate

M, V = np.array([0.7, -0.4]), np.array([0.3, 2.0])
N = 20_000
END = 1e-3  # where the grids of linear_vp stop
inf = np.inf


def data(schedule, m=M, v=V):
    return gaussian(jnp.asarray(m), jnp.diag(jnp.asarray(v)), schedule)


def draws(n=N):
    return jnp.asarray(M + np.sqrt(V) * np.random.default_rng(0).normal(size=(n, 2)))


def pairs(path, ts):
    """Alpha and sigma at all times, as two vectors."""
    return np.array([oracles.alpha_sigma(path, float(t)) for t in ts]).T


def time_of(half_log_snr):
    """On linear_vp."""
    return float(oracles.TABLE["linear_vp"][4](mp.mpf(float(half_log_snr))))


def even_in_log_snr(n):
    """A grid of linear_vp from 1 to END, from the closed form."""
    start, end = (np.log(np.divide(*oracles.alpha_sigma("linear_vp", t))) for t in (1.0, END))
    return np.array([1.0, *map(time_of, np.linspace(start, end, n + 1)[1:-1]), END])


def column(a):
    return np.asarray(a)[:, None]


# ---- the cheapest paths ----------------------------------------------------------------------------------------------


search = jax.jit(cheapest_paths, static_argnums=1)


def random_table(n, seed, forbidden=0.0):
    rng = np.random.default_rng(seed)
    table = np.where(np.triu(np.ones((n, n)), 1) > 0, rng.uniform(0.1, 1, (n, n)), inf)
    return np.where(rng.uniform(size=(n, n)) < forbidden, inf, table)


def all_paths(table, steps):
    """The cheapest of all paths of so many steps, looked at one by one."""
    n = len(table)
    choices = [(0, *inner, n - 1) for inner in itertools.combinations(range(1, n - 1), steps - 1)]
    return min((sum(table[i, j] for i, j in itertools.pairwise(path)), path) for path in choices)


@pytest.mark.parametrize("n", [6, 7, 8])
@pytest.mark.parametrize("forbidden", [0.0, 0.4])
def test_no_path_of_any_budget_is_cheaper(n, forbidden):
    possible = 0
    for seed in range(10):
        table = random_table(n, seed, forbidden)
        budgets = search(jnp.asarray(table), n - 1)
        assert budgets.costs.shape == (n - 1,) and budgets.paths.shape == (n - 1, n)
        for k in range(1, n):
            cost, path = all_paths(table, k)
            # the sums are of the same numbers in the same order
            np.testing.assert_allclose(budgets.costs[k - 1], cost, rtol=1e-15)
            if np.isfinite(cost):  # where no path is allowed there is only the infinite cost
                possible += 1
                np.testing.assert_array_equal(budgets.paths[k - 1], [*path, *[n - 1] * (n - 1 - k)])
    assert possible > 10 * (n - 2) if forbidden == 0 else 10 <= possible < 10 * (n - 1)


def test_a_smaller_largest_budget_changes_nothing():
    table = random_table(8, 3)
    whole, part = search(table, 7), search(table, 3)
    np.testing.assert_array_equal(part.costs, whole.costs[:3])
    np.testing.assert_array_equal(part.paths, whole.paths[:3, :4])


def test_the_grid_of_a_budget_is_its_candidates():
    ts = np.array([1.0, 0.8, 0.5, 0.3, 0.2, 0.0])
    table = random_table(6, 4)
    budgets = search(table, 5)
    for k in range(1, 6):
        np.testing.assert_array_equal(budgets.grid(ts, k), ts[list(all_paths(table, k)[1])])


# ---- the evidence lower bound ----------------------------------------------------------------------------------------

# alpha > 0 at the first time, sigma > 0 at the last
SPANS = {"linear_vp": (1.0, END), "ve": (1.0, 1e-5), "gvp": (0.95, 0.01), "edm": (1.0, 1e-4)}


def knowing(schedule, x0, c, x, t):
    """A denoiser that knows the data, and is off by c: its error is not random."""
    alpha, sigma = schedule(t)
    eps = (x - alpha * x0) / sigma - c
    return Estimate((x - sigma * eps) / alpha, eps)


@pytest.mark.parametrize("path", ["linear_vp", "ve", "gvp"])
def test_bound_is_the_kl_of_the_two_posteriors(path):
    # KL(q(x_s | x_t, x0) || q(x_s | x_t, x0_hat)): two Gaussians of one covariance. The denoiser is off by a known c(x0),
    # so x0_hat = x0 + (sigma_t / alpha_t) c, and no expectation is left but the mean over three examples.
    schedule = getattr(schedules, path)()
    ts = np.geomspace(*SPANS[path], 6)
    x0, c = np.random.default_rng(1).normal(size=(2, 3, 2, 2))
    denoise = bind(knowing, schedule, jnp.asarray(x0), jnp.asarray(c))
    table = jax.jit(elbo_table)(jax.random.key(0), denoise, schedule, ts, jnp.asarray(x0))
    alphas, sigmas = pairs(path, ts)
    weights = jax.jit(jax.vmap(jax.vmap(functools.partial(process.posterior, schedule), (None, 0)), (0, None)))(ts, ts)
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
    # E |eps - eps_hat|^2 = sum_d r_d, the posterior variances r = alpha^2 v / (alpha^2 v + sigma^2) of the noise
    schedule, ts = schedules.linear_vp(), np.array([1.0, 0.6, 0.3, 0.1, 0.01])
    table = np.asarray(jax.jit(elbo_table)(jax.random.key(1), data(schedule), schedule, ts, draws()))
    alphas, sigmas = pairs("linear_vp", ts)
    r = column(alphas**2) * V / (column(alphas**2) * V + column(sigmas**2))
    gains = np.expm1(2 * np.log(alphas / sigmas)[None, :] - 2 * np.log(alphas / sigmas)[:, None])
    expected, upper = 0.5 * gains * column(r.sum(1)), np.triu_indices(5, 1)
    # eps - eps_hat is Gaussian, so its square has the variance 2 sum_d r_d^2: five standard errors of N examples
    bounds = 5 * 0.5 * gains * column(np.sqrt(2 * np.sum(r**2, 1) / N))
    assert np.all(np.abs(table - expected)[upper] < bounds[upper])
    assert np.all(bounds[upper] < 0.05 * expected[upper])  # or nothing would be tested
    assert np.all(table[np.tril_indices(5)] == inf)


def test_bound_at_the_data_is_a_gaussian_of_the_estimates_own_noise():
    # -E log N(x0; x0_hat, (sigma / alpha)^2 I) = d/2 log 2 pi + d log(sigma / alpha) + 1/2 sum_d r_d
    schedule, ts = schedules.linear(), np.array([0.9, 0.4, 0.02, 0.0])
    table = np.asarray(jax.jit(elbo_table)(jax.random.key(2), data(schedule), schedule, ts, draws()))
    for i, t in enumerate(ts[:-1]):
        r = (1 - t) ** 2 * V / ((1 - t) ** 2 * V + t**2)
        expected = np.log(2 * np.pi) + 2 * np.log(t / (1 - t)) + 0.5 * r.sum()
        # five standard errors, as above
        assert abs(table[i, -1] - expected) < 5 * 0.5 * np.sqrt(2 * np.sum(r**2) / N)
    np.testing.assert_array_equal(np.isfinite(table), np.triu(np.ones((4, 4)), 1) > 0)
    # at small noise the term is the entropy of the noise itself, sigma / alpha in two dimensions
    assert abs(table[2, -1] - (np.log(2 * np.pi * np.e) + 2 * np.log(0.02 / 0.98))) < 0.05


def test_refining_a_grid_never_raises_the_bound():
    # L(a, c) - L(a, b) - L(b, c) = (SNR_c - SNR_b) (mse_a - mse_b) / 2, and the error of the posterior mean falls with t.
    # Between these candidates it falls by twenty of its standard errors (1% of it) or more, so no tolerance is needed.
    schedule = schedules.linear_vp()
    ts = np.array([0.6, 0.4, 0.25, 0.12, 0.05, 0.02])
    table = np.asarray(jax.jit(elbo_table)(jax.random.key(3), data(schedule), schedule, ts, draws()))
    for a, b, c in itertools.combinations(range(6), 3):
        assert table[a, c] > table[a, b] + table[b, c], (a, b, c)
    costs = search(table, 5).costs
    assert np.all(np.diff(costs) < 0)  # so every further step helps the best grid


# ---- the KL of the discretised SDE -----------------------------------------------------------------------------------


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
    # x0_hat(x_t) = E[x0 | x_t] is a martingale towards the data along a forward path, as x_t is Markov. So the mean squares
    # of its increments are the increments of its variance, alpha^2 v^2 / (alpha^2 v + sigma^2) in every dimension.
    table = np.asarray(jax.jit(klub_table)(jax.random.key(4), data(schedule), schedule, ts, draws()))
    variance = column(alphas**2) * V**2 / (column(alphas**2) * V + column(sigmas**2))
    snr = (alphas / sigmas) ** 2
    for i in range(8):
        grown = variance[i:] - variance[i]
        # The estimates are Gaussian, so a mean square has the variance 2 sum_d grown_d^2 / N. The standard error of a sum is
        # at most the sum of the standard errors: the same trapezoid rule; five of them.
        distance, error = grown.sum(1), np.sqrt(2 * np.sum(grown**2, 1) / N)
        expected, bound = (
            np.cumsum(0.5 * np.diff(snr[i:]) * 0.5 * (values[1:] + values[:-1])) for values in (distance, error)
        )
        assert np.all(np.abs(table[i, i + 1 :] - expected) < 5 * bound) and np.all(bound < 0.02 * expected)
        assert np.all(table[i, : i + 1] == inf)


# ---- the error of a solver -------------------------------------------------------------------------------------------


def flow(path, ts, x):
    """The probability flow of Gaussian data from x at the first time through all of them."""
    ends = [oracles.alpha_sigma(path, float(t)) for t in ts]
    return np.stack([oracles.gaussian_flow(M, V, ends[0], end, x) for end in ends])


def ddim_step(start, end, x):
    """Both posterior means of Gaussian data, and the next x from them."""
    alpha, sigma = start
    white = (x - alpha * M) / (alpha**2 * V + sigma**2)
    return end[0] * (M + alpha * V * white) + end[1] * sigma * white


XS = np.random.default_rng(5).normal(size=(4, 2))


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
def test_solver_errors_of_ddim_in_closed_form(path):
    schedule = getattr(schedules, path)()
    ts = np.array([1.0, 0.7, 0.5, 0.2, 0.05, 0.0])
    xs = flow(path, ts, XS * oracles.alpha_sigma(path, 1.0)[1])
    table = jax.jit(solver_error_table)(ddim(data(schedule), schedule), schedule, ts, jnp.asarray(xs))
    ends = [oracles.alpha_sigma(path, float(t)) for t in ts]
    for i, j in itertools.product(range(6), range(6)):
        if i >= j:
            assert table[i, j] == inf
        else:
            error = np.sqrt(np.mean((ddim_step(ends[i], ends[j], xs[i]) - xs[j]) ** 2)) / np.hypot(*ends[j])
            # errors above 1e-3 of x's of order one, or of order 80 on edm where hypot(alpha, sigma) is 80, too
            np.testing.assert_allclose(table[i, j], error, rtol=1e-10)


@functools.partial(jax.jit, static_argnums=0)
def ends_of(make, grids, x):
    """Where a sampler ends on each of many grids, all of one length."""
    schedule = schedules.linear_vp()
    return jax.vmap(lambda ts: sample(jax.random.key(0), make(data(schedule), schedule), x, ts))(grids)


def end_errors(make, grids, x):
    # one program: the shorter grids stand still at their end, where a step from t to t is the identity
    n = max(map(len, grids))
    reached = ends_of(make, np.stack([np.pad(ts, (0, n - len(ts)), mode="edge") for ts in grids]), jnp.asarray(x))
    span = (oracles.alpha_sigma("linear_vp", float(t)) for t in (grids[0][0], grids[0][-1]))
    return np.sqrt(np.mean((np.asarray(reached) - oracles.gaussian_flow(M, V, *span, x)) ** 2, (1, 2)))


@pytest.mark.parametrize("make", [ddim, dpm_solver_2])
def test_the_cheapest_grid_of_a_solver_ends_closer(make):
    # the sum of the errors of the steps is not the error at the end, but it is enough to beat both uniform grids
    schedule, budgets = schedules.linear_vp(), range(4, 9)
    ts = even_in_log_snr(40)
    xs = flow("linear_vp", ts, XS)
    table = jax.jit(solver_error_table)(make(data(schedule), schedule), schedule, ts, jnp.asarray(xs))
    found = search(table, budgets[-1])
    grids = [np.asarray(found.grid(ts, k)) for k in budgets]
    assert all(ts[0] == grid[0] and ts[-1] == grid[-1] and np.all(np.diff(grid) < 0) for grid in grids)
    grids += [np.linspace(1.0, END, k + 1) for k in budgets]
    grids += [even_in_log_snr(k) for k in budgets]
    cheapest, in_t, in_log_snr = np.split(end_errors(make, grids, XS), 3)
    assert np.all(cheapest < in_t) and np.all(cheapest < in_log_snr), (cheapest, in_t, in_log_snr)


def test_the_cheapest_grid_of_ddim_is_even_in_the_angle():
    # On data N(0, 1) and a circle (alpha, sigma) = (cos, sin) of pi t / 2 the flow stands still, and a step of DDIM over the
    # angle a multiplies x by cos a. The cost 1 - cos a is strictly convex, so the best steps are equal.
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


# ---- grids as unconstrained numbers ----------------------------------------------------------------------------------


def from_increments_in_40_digits(z, start, end):
    sizes = [mp.exp(mp.mpf(float(a))) for a in z]
    start, end, total = mp.mpf(start), mp.mpf(end), mp.fsum(sizes)
    return [end + (start - end) * mp.fsum(sizes[i:]) / total for i in range(len(sizes) + 1)]


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.9, 1e-5)])
@pytest.mark.parametrize("scale", [1, 5, 20])
def test_any_numbers_are_a_grid(scale, start, end):
    grid = jax.jit(from_increments)
    for seed in range(50):
        z = np.random.default_rng(seed).uniform(-scale, scale, 8)
        ts = np.asarray(grid(z, start, end))
        assert ts[0] == start and ts[-1] == end
        # next to the start the smallest of steps, e^-40 of the largest, is below the spacing of floats
        assert np.all(np.diff(ts) < 0) if scale < 20 else np.all(np.diff(ts) <= 0)
        expected = from_increments_in_40_digits(z, start, end)
        # relative precision at every time, however small: the exponentials of -40 ... 40 have 40 roundings, eight are summed
        errors = [abs((mp.mpf(float(t)) - e) / e) for t, e in zip(ts[:-1], expected[:-1], strict=True)]
        assert max(errors) < 2e-14


def test_very_uneven_numbers_are_a_grid_too():
    z = np.random.default_rng(0).uniform(-20, 20, (2000, 8))
    ts = np.asarray(jax.jit(jax.vmap(lambda z: from_increments(z, 1.0, 0.0)))(z))
    assert np.all(np.diff(ts, axis=1) <= 0) and ts.max() == 1


def test_increments_and_back():
    there, back = jax.jit(increments), jax.jit(from_increments)
    for ts in (np.array([1.0, 0.9, 0.5, 0.125, 0.1]), np.array([1.0, 1e-3, 1e-6, 1e-9, 0.0])):
        # times of 1e-9 to relative precision: log and exp of steps of e^-20 have 20 roundings
        np.testing.assert_allclose(back(there(ts), ts[0], ts[-1]), ts, rtol=1e-13)
        np.testing.assert_allclose(np.exp(there(ts)), ts[:-1] - ts[1:], rtol=1e-13)


def test_a_constant_in_the_increments_changes_nothing():
    z, grid = np.random.default_rng(0).uniform(-5, 5, 6), jax.jit(from_increments)
    for constant in (-700.0, 3.0, 700.0):  # beyond the range of exp, too; z + 700 is rounded to 1e-13
        np.testing.assert_allclose(grid(z + constant, 1.0, 0.0), grid(z, 1.0, 0.0), rtol=1e-12)


@pytest.mark.parametrize("scale", [1, 20])
def test_the_gradient_by_the_increments(scale):
    # with p = softmax(z) and S_i = sum_{k >= i} p_k: d S_i / d z_j = p_j ([j >= i] - S_i)
    start, end = 0.9, 1e-3
    z = np.random.default_rng(2).uniform(-scale, scale, 6)
    p = np.exp(z - z.max()) / np.sum(np.exp(z - z.max()))
    tails = np.append(np.cumsum(p[::-1])[::-1], 0.0)
    expected = (start - end) * p * ((np.arange(6) >= column(np.arange(7))) - column(tails))
    by_z, by_start, by_end = jax.jit(jax.jacrev(from_increments, argnums=(0, 1, 2)))(z, start, end)
    # [j >= i] - S_i is a difference of numbers up to one, so the precision is absolute
    np.testing.assert_allclose(by_z, expected, atol=1e-15)
    np.testing.assert_allclose(by_start, tails, atol=1e-15)
    np.testing.assert_allclose(by_end, 1 - tails, atol=1e-15)


# ---- by gradient -----------------------------------------------------------------------------------------------------


def angle(v, t):
    """Of N(0, v) on linear_vp: DDIM from t to s multiplies x_t / std(x_t) by the cosine of the angle between them."""
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    return np.arctan2(sigma, alpha * np.sqrt(v))


def test_the_learned_grid_of_ddim_is_even_in_the_angle():
    # After K steps the product of K cosines is left, of a given sum of angles: closest to 1 if they are equal.
    schedule, v, k = schedules.linear_vp(), 0.25, 4
    sampler = ddim(data(schedule, [0.0], [v]), schedule)
    std_1, std_0 = (np.hypot(alpha * np.sqrt(v), sigma) for alpha, sigma in pairs("linear_vp", [1.0, END]).T)
    x = np.random.default_rng(7).normal(size=(4, 1))

    def loss(ts):
        return jnp.mean((sample(jax.random.key(0), sampler, jnp.asarray(x), ts) - x / std_1 * std_0) ** 2)

    @jax.jit
    def run(ts):
        rate = optax.cosine_decay_schedule(0.2, 150)
        return learn_grid(loss, ts, optax.adam(rate), 150)

    angles = np.linspace(angle(v, 1.0), angle(v, END), k + 1)
    best = [time_of(-np.log(np.sqrt(v) * np.tan(a))) for a in angles]
    scale = np.mean((x / std_1 * std_0) ** 2)
    least = scale * (1 - np.cos(angles[0] - angles[1]) ** k) ** 2
    starts = np.stack([np.linspace(1.0, END, k + 1), even_in_log_snr(k)])
    learned = jax.jit(jax.vmap(run))(starts)
    for i, start in enumerate(starts):
        turns = np.diff([angle(v, t) for t in start])
        first = scale * (1 - np.prod(np.cos(turns))) ** 2
        np.testing.assert_allclose(learned.losses[i, 0], first, rtol=1e-10)
        assert least < 0.35 * first  # there is something to learn
        # the rate falls to 0, so the descent settles to a relative 1e-4 in the steps, and its square in the loss
        np.testing.assert_allclose(learned.losses[i].min(), least, rtol=1e-6)
        np.testing.assert_allclose(learned.ts[i], best, rtol=1e-3)
        assert float(learned.ts[i, 0]) == 1.0 and float(learned.ts[i, -1]) == END and learned.numbers is None
        # alone or with another: 150 steps of a differently vectorised program
        for a, b in zip(jax.tree.leaves(run(start)), jax.tree.leaves(learned), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-8)


def distance(make):
    """The mean squared distance to where the probability flow of the Gaussian takes each x, from the closed form."""
    schedule = schedules.linear_vp()
    goal = oracles.gaussian_flow(M, V, *(oracles.alpha_sigma("linear_vp", t) for t in (1.0, END)), XS)

    def loss(ts, *numbers):
        return jnp.mean(
            (sample(jax.random.key(0), make(data(schedule), schedule, *numbers), jnp.asarray(XS), ts) - goal) ** 2
        )

    return loss


def test_a_learned_grid_of_a_multistep_method_ends_much_closer():
    loss, start = distance(dpm_solver_2m), uniform(5, end=END)
    learned = jax.jit(lambda ts: learn_grid(loss, ts, optax.adam(0.1), 150))(start)
    ts = np.asarray(learned.ts)
    assert ts[0] == 1.0 and ts[-1] == END and np.all(np.diff(ts) < 0)
    errors = end_errors(dpm_solver_2m, [ts, np.asarray(start)], XS)
    assert errors[0] < 0.2 * errors[1], errors
    # the losses are the squares of the errors that another program finds
    np.testing.assert_allclose([learned.losses.min(), learned.losses[0]], errors**2, rtol=1e-8)


@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(max_learning_rate=1e3), optax.lbfgs()], ids=["polyak", "lbfgs"])
def test_an_optimizer_that_wants_the_loss_learns_a_grid(optimizer):
    learned = learn_grid(lambda ts: (ts[1] - 0.3) ** 2, jnp.array([1.0, 0.8, 0.0]), optimizer, 30)
    np.testing.assert_allclose(learned.ts, [1.0, 0.3, 0.0], atol=1e-3)


def test_the_best_iterate_is_returned():
    # a rate at which the descent does not settle, so that neither the first nor the last iterate is the best
    def loss(ts):
        return jnp.sum((jnp.log(ts[1:-1]) - jnp.log(jnp.array([0.3, 0.01]))) ** 2)

    learned = learn_grid(loss, uniform(3, end=1e-3), optax.sgd(0.9), 23)
    best = int(np.argmin(learned.losses))
    assert 0 < best < 22 and learned.losses[-1] > 2 * learned.losses[best]
    # the loss at the grid, by another program: rounding
    np.testing.assert_allclose(loss(learned.ts), learned.losses.min(), rtol=1e-10)


def test_a_descent_that_meets_nan_keeps_what_it_had():
    def loss(ts):  # not a number once the middle is above 0.6
        return jnp.where(ts[1] > 0.6, jnp.nan, 1 - ts[1])

    learned = learn_grid(loss, jnp.array([1.0, 0.5, 0.0]), optax.sgd(0.5), 20)
    assert np.isnan(learned.losses[-1])
    np.testing.assert_allclose(1 - learned.ts[1], np.nanmin(learned.losses), rtol=1e-12)


def test_the_numbers_of_a_sampler_are_learned_with_its_grid():
    loss, start = distance(dpm_solver_2), even_in_log_snr(3)

    @jax.jit
    @jax.vmap
    def run(free):  # 1: r1 is learned, too; 0: it has no influence, and is 1/2
        return learn_grid(
            lambda ts, r: loss(ts, 0.5 + free * (r["r1"] - 0.5)), start, optax.adam(0.03), 60, {"r1": 0.5}
        )

    learned = run(jnp.array([0.0, 1.0]))
    alone, both = np.asarray(learned.losses).min(1)
    assert learned.numbers["r1"][0] == 0.5 and abs(learned.numbers["r1"][1] - 0.5) > 0.02
    assert both < 0.5 * alone < 0.5 * learned.losses[0, 0], (both, alone)
    # the loss at what is returned, by another program: rounding
    np.testing.assert_allclose(jax.jit(loss)(learned.ts[1], learned.numbers["r1"][1]), both, rtol=1e-8)


@pytest.mark.parametrize("units", [1.0, 1e-6])
def test_least_squares_finds_the_grid_and_the_numbers_at_which_the_residuals_are_nil(units):
    inner, number = np.array([0.6, 0.2, 0.03]), -0.7

    def residuals(ts, r):
        return {"grid": units * (jnp.log(ts[1:-1]) - jnp.log(inner)), "number": units * (r["r"] - number + ts[1] - 0.6)}

    start = uniform(4, end=1e-3)
    fitted = jax.jit(lambda ts: fit_grid(residuals, ts, {"r": 0.5}))(start)
    # quadratic convergence: to rounding
    np.testing.assert_allclose(fitted.ts, [1.0, *inner, 1e-3], rtol=1e-12)
    assert float(fitted.numbers["r"]) == pytest.approx(number, rel=1e-12)
    start = np.asarray(start)
    first = np.sum((np.log(start[1:-1]) - np.log(inner)) ** 2) + (0.5 - number + start[1] - 0.6) ** 2
    assert float(fitted.losses[0]) == pytest.approx(units**2 * first, rel=1e-12) and fitted.losses.shape == (41,)
    assert fitted.losses[-1] < 1e-24 * units**2 and np.all(np.diff(fitted.losses) <= 0)


def test_least_squares_through_a_multistep_method_ends_much_closer():
    schedule, start = schedules.linear_vp(), jnp.asarray(even_in_log_snr(5))
    goal = oracles.gaussian_flow(M, V, *(oracles.alpha_sigma("linear_vp", t) for t in (1.0, END)), XS)

    def residuals(ts):
        sampler = dpm_solver_2m(data(schedule), schedule)
        return (sample(jax.random.key(0), sampler, jnp.asarray(XS), ts) - goal) / np.sqrt(goal.size)

    fitted = jax.jit(lambda ts: fit_grid(residuals, ts, steps=15))(start)
    ts = np.asarray(fitted.ts)
    assert ts[0] == 1.0 and ts[-1] == END and np.all(np.diff(ts) < 0)
    errors = end_errors(dpm_solver_2m, [ts, np.asarray(start)], XS)
    assert errors[0] < 0.2 * errors[1], errors
    # the sums of squares are the squares of the errors that another program finds
    np.testing.assert_allclose(fitted.losses[np.array([-1, 0])], errors**2, rtol=1e-6)


def test_least_squares_that_meet_nan_keep_what_they_had():
    def residuals(ts):  # not a number once the middle is above 0.6
        return jnp.where(ts[1] > 0.6, jnp.nan, 1 - ts[1])[None]

    fitted = fit_grid(residuals, jnp.array([1.0, 0.5, 0.0]))
    assert 0.5 < fitted.ts[1] <= 0.6 and fitted.losses[-1] < fitted.losses[0] == 0.25
    # of the first dampings one goes beyond 0.6: the others are not lost with it
    assert fitted.losses[2] < 0.2


# ---- files -----------------------------------------------------------------------------------------------------------


def power(exponent, t):
    return 1 - t**exponent, t**exponent


def closure(exponent):
    return lambda t: power(exponent, t)


SAVED = {
    "linear_vp": schedules.linear_vp,
    "linear": schedules.linear,  # with log-SNRs of -inf and inf at its ends
    "edm": schedules.edm,
    "betas": lambda: schedules.from_betas(np.linspace(1e-4, 0.02, 50)),
    "bound": lambda: bind(power, 1.5),
    "closure": lambda: closure(1.5),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_grid_comes_back(tmp_path, name):
    ts = np.array([1.0, 0.7, 1 / 3, 1e-7, 0.0])
    save_grid(tmp_path / "grid.json", ts, SAVED[name]())
    np.testing.assert_array_equal(load_grid(str(tmp_path / "grid.json"), SAVED[name]()), ts)


OTHERS = {  # (saved for, used with, what the message must say)
    "constructor": (schedules.linear_vp, schedules.sub_vp, r"name \S*_linear_vp, expected \S*_sub_vp"),
    "no numbers": (schedules.linear, schedules.gvp, r"name \S*_linear, expected \S*_gvp"),
    "numbers": (schedules.edm, lambda: schedules.edm(40.0), r"numbers \[80.0\], expected \[40.0\]"),
    "how many": (SAVED["betas"], lambda: schedules.from_betas(np.full(51, 0.01)), r"numbers"),
    "bound": (lambda: bind(power, 1.5), lambda: bind(power, 1.6), r"numbers \[1.5\], expected \[1.6\]"),
    "closure": (lambda: closure(1.5), lambda: closure(1.6), r"half_log_snr \[.*\], expected \["),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_grid_of_another_schedule_is_refused(tmp_path, name):
    saved, used, message = OTHERS[name]
    save_grid(tmp_path / "grid.json", np.array([1.0, 0.5, 0.0]), saved())
    with pytest.raises(ValueError, match=r"schedule: the grid in .*grid.json was found for another one: " + message):
        load_grid(tmp_path / "grid.json", used())


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"ts": [1.0, 0.',
        '{"schedule": {}}',
        '{"ts": [1.0, 0.5]}',
        "[1.0, 0.5]",
        "0.5",
        '{"ts": ["a"]}',
        b"\xff\x00",
        "[" * 10**5,
    ],
)
def test_a_file_without_a_grid_is_named(tmp_path, text):
    path = tmp_path / "grid.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"path: expected a grid of save_grid in .*grid.json"):
        load_grid(path, schedules.linear())


LINEAR_RECORD = {"name": "diffjax.schedules.paths._linear", "numbers": [], "half_log_snr": ["-inf", 0.0]}
RECORDS = {  # (changes to the record of the grid [1, 1/2] of `linear`, what the message must say)
    "no description": ({"schedule": None}, "TypeError"),
    "half a description": ({"schedule": {"name": "diffjax.schedules.paths._linear"}}, "KeyError"),
    "text for numbers": ({"schedule": LINEAR_RECORD | {"numbers": "10"}}, "expected a list of numbers, got '10'"),
    "no numbers": ({"schedule": LINEAR_RECORD | {"numbers": None}}, "expected a list of numbers, got None"),
    "a number": ({"ts": 0.5}, "expected a list of numbers, got 0.5"),
    "a matrix": ({"ts": [[1.0, 0.5]]}, "TypeError"),
    "beyond floats": ({"ts": [10**400, 0.5]}, "OverflowError"),
    "empty": ({"ts": []}, r"ts: expected a vector of at least 2 times, got shape \(0,\)"),
    "one time": ({"ts": [1.0]}, r"ts: expected a vector of at least 2 times, got shape \(1,\)"),
    "ascending": ({"ts": [0.5, 1.0]}, r"ts: expected times that descend .*, got \[0.5 1. *\]"),
    "repeated": ({"ts": [1.0, 1.0]}, r"ts: expected times that descend .*, got \[1. 1.\]"),
    "beyond 1": ({"ts": [1.5, 0.5]}, r"ts: expected times in \[0, 1\], got \[1.5 0.5\]"),
    "not a number": ({"ts": [1.0, float("nan")]}, r"ts: expected times in \[0, 1\], got \[ *1. nan\]"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_with_a_bad_record_is_named(tmp_path, name):
    changes, message = RECORDS[name]
    path = tmp_path / "grid.json"
    good = {"ts": [1.0, 0.5], "schedule": LINEAR_RECORD}
    path.write_text(json.dumps(good))
    assert load_grid(path, schedules.linear()).tolist() == [1.0, 0.5]
    path.write_text(json.dumps(good | changes))
    with pytest.raises(ValueError, match=rf"path: expected a grid of save_grid in .*grid\.json, got {message}"):
        load_grid(path, schedules.linear())


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("ts", [[], [0.5], [0.5, 1.0], [1.5, 0.5], [1.0, np.nan], [[1.0, 0.5]]])
def test_only_a_grid_is_saved(tmp_path, ts):
    with pytest.raises(ValueError, match="ts: expected"):
        save_grid(tmp_path / "grid.json", np.array(ts), schedules.linear())
    with pytest.raises(ValueError, match=r"schedule: expected a log-SNR at every time of the grid, got \[nan"):
        save_grid(tmp_path / "grid.json", np.array([1.0, 0.5]), lambda t: (t * np.nan, t))
    assert not (tmp_path / "grid.json").exists()


def test_a_grid_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_grid(tmp_path / "grid.json", schedules.linear())


def test_infinite_log_snrs_are_strings_in_the_file(tmp_path):
    """JSON has no infinity: RFC 8259, section 6."""

    def no_json(constant):
        raise AssertionError(constant)

    save_grid(tmp_path / "grid.json", np.array([1.0, 0.5, 0.0]), schedules.linear())
    record = json.loads((tmp_path / "grid.json").read_text(), parse_constant=no_json)
    assert record["schedule"]["half_log_snr"] == ["-inf", 0.0, "inf"]


def test_a_saved_grid_is_plain_json(tmp_path):
    save_grid(tmp_path / "grid.json", np.array([1.0, 0.25]), schedules.edm(40.0))
    record = json.loads((tmp_path / "grid.json").read_text())
    assert record["ts"] == [1.0, 0.25] and record["schedule"]["numbers"] == [40.0]
    # lambda = -log(t sigma_max), by hand, to rounding
    np.testing.assert_allclose(record["schedule"]["half_log_snr"], [-np.log(40.0), -np.log(10.0)], rtol=1e-14)


# ---- errors ----------------------------------------------------------------------------------------------------------

KEY = 0  # no key is looked at before the error
LINEAR = schedules.linear()
TABLE = random_table(4, 0)
DOWN = np.array([0.9, 0.5, 0.1])


def swinging(t):
    return jnp.cos(9 * t) ** 2 + 0.1, jnp.sin(9 * t) ** 2 + 0.1


def solver_errors(ts, xs):
    return solver_error_table(ddim(data(LINEAR), LINEAR), LINEAR, ts, xs)


def learn(ts, steps=1):
    return learn_grid(jnp.sum, ts, optax.sgd(0.1), steps)


ERRORS = {  # (call, what the message must say)
    "not square": (lambda: cheapest_paths(TABLE[:3], 1), r"table: expected a square matrix, got shape \(3, 4\)"),
    "integer table": (
        lambda: cheapest_paths(np.ones((3, 3), int), 1),
        r"table: expected a floating-point dtype, got int",
    ),
    "no steps": (lambda: cheapest_paths(TABLE, 0), r"steps: expected from 1 to 3 for 4 candidates, got 0"),
    "n steps": (lambda: cheapest_paths(TABLE, 4), r"steps: expected from 1 to 3 for 4 candidates, got 4"),
    "grid of 0": (lambda: search(TABLE, 2).grid(DOWN, 0), r"steps: expected from 1 to 2, got 0"),
    "grid of 3": (lambda: search(TABLE, 2).grid(DOWN, 3), r"steps: expected from 1 to 2, got 3"),
    "ascending": (lambda: elbo_table(KEY, None, LINEAR, DOWN[::-1], None), r"ts: .*descend, got \[0.1 0.5 0.9\]"),
    "repeated": (lambda: klub_table(KEY, None, LINEAR, np.array([0.5, 0.5]), None), r"ts: .*descend, got \[0.5 0.5\]"),
    "one": (lambda: elbo_table(KEY, None, LINEAR, DOWN[:1], None), r"ts: .*at least 2 candidate.*got shape \(1,\)"),
    "matrix": (lambda: solver_errors(np.eye(2), None), r"ts: expected a vector.*got shape \(2, 2\)"),
    "beyond 1": (lambda: solver_errors(DOWN + 0.2, DOWN), r"ts: expected times in \[0, 1\], got \[1.1"),
    "swinging": (
        lambda: elbo_table(KEY, None, swinging, DOWN, None),
        r"schedule: expected a log-SNR that increases along ts, got half log-SNRs \[.*\]",
    ),
    "xs": (lambda: solver_errors(DOWN, np.zeros((2, 4, 2))), r"xs: expected one batch for each of the 3 times, got 2"),
    "klub at 1": (
        lambda: klub_table(KEY, None, LINEAR, np.array([1.0, 0.5]), None),
        r"ts: expected times of finite log-SNR, got half log-SNRs \[-inf",
    ),
    "klub at 0": (
        lambda: klub_table(KEY, None, LINEAR, np.array([0.5, 0.0]), None),
        r"ts: expected times of finite log-SNR, got half log-SNRs \[ *0. +inf\]",
    ),
    "learn ascending": (lambda: learn(DOWN[::-1]), r"ts: expected times that descend, got \[0.1 0.5 0.9\]"),
    "learn one": (lambda: learn(DOWN[:1]), r"ts: expected a vector of at least 2 times, got shape \(1,\)"),
    "learn nothing": (lambda: learn(DOWN, 0), r"steps: expected at least 1, got 0"),
    "integer numbers": (
        lambda: fit_grid(lambda ts, r: ts, DOWN, {"r": 1}),
        r"numbers: expected a floating-point dtype, got int",
    ),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
