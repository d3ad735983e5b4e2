"""Grids as unconstrained numbers, and grids learned by gradient and by least squares."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import optax
import oracles
import pytest
from gaussian_data import END, XS, M, V, column, data, end_errors, even_in_log_snr, pairs, time_of

from diffjax import schedules
from diffjax.grids import uniform
from diffjax.optimal_grids import fit_grid, from_increments, increments, learn_grid
from diffjax.samplers import ddim, dpm_solver_2, dpm_solver_2m, sample


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
        # next to the start the smallest of steps, e^-40 of the largest, is below the spacing of
        # floats
        assert np.all(np.diff(ts) < 0) if scale < 20 else np.all(np.diff(ts) <= 0)
        expected = from_increments_in_40_digits(z, start, end)
        # relative precision at every time, however small: the exponentials of -40 ... 40 have 40
        # roundings, eight are summed
        errors = [
            abs((mp.mpf(float(t)) - e) / e) for t, e in zip(ts[:-1], expected[:-1], strict=True)
        ]
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
    # beyond the range of exp, too; z + 700 is rounded to 1e-13
    for constant in (-700.0, 3.0, 700.0):
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


def angle(v, t):
    """Of N(0, v) on linear_vp: DDIM from t to s multiplies x_t / std(x_t) by the cosine of the
    angle between them.
    """
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    return np.arctan2(sigma, alpha * np.sqrt(v))


def test_the_learned_grid_of_ddim_is_even_in_the_angle():
    # After K steps the product of K cosines is left, of a given sum of angles: closest to 1 if they
    # are equal.
    schedule, v, k = schedules.linear_vp(), 0.25, 4
    sampler = ddim(data(schedule, [0.0], [v]), schedule)
    std_1, std_0 = (
        np.hypot(alpha * np.sqrt(v), sigma) for alpha, sigma in pairs("linear_vp", [1.0, END]).T
    )
    x = np.random.default_rng(7).normal(size=(4, 1))

    def loss(ts):
        return jnp.mean(
            (sample(jax.random.key(0), sampler, jnp.asarray(x), ts) - x / std_1 * std_0) ** 2
        )

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
        # the rate falls to 0, so the descent settles to a relative 1e-4 in the steps, and its
        # square in the loss
        np.testing.assert_allclose(learned.losses[i].min(), least, rtol=1e-6)
        np.testing.assert_allclose(learned.ts[i], best, rtol=1e-3)
        assert (
            float(learned.ts[i, 0]) == 1.0
            and float(learned.ts[i, -1]) == END
            and learned.numbers is None
        )
        # alone or with another: 150 steps of a differently vectorised program
        for a, b in zip(jax.tree.leaves(run(start)), jax.tree.leaves(learned), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-8)


def distance(make):
    """The mean squared distance to where the probability flow of the Gaussian takes each x, from
    the closed form.
    """
    schedule = schedules.linear_vp()
    goal = oracles.gaussian_flow(
        M, V, *(oracles.alpha_sigma("linear_vp", t) for t in (1.0, END)), XS
    )

    def loss(ts, *numbers):
        return jnp.mean(
            (
                sample(
                    jax.random.key(0), make(data(schedule), schedule, *numbers), jnp.asarray(XS), ts
                )
                - goal
            )
            ** 2
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


@pytest.mark.parametrize(
    "optimizer", [optax.polyak_sgd(max_learning_rate=1e3), optax.lbfgs()], ids=["polyak", "lbfgs"]
)
def test_an_optimizer_that_wants_the_loss_learns_a_grid(optimizer):
    learned = learn_grid(lambda ts: (ts[1] - 0.3) ** 2, jnp.array([1.0, 0.8, 0.0]), optimizer, 30)
    np.testing.assert_allclose(learned.ts, [1.0, 0.3, 0.0], atol=1e-3)


def test_the_best_iterate_is_returned():
    # a rate at which the descent does not settle, so that neither the first nor the last iterate is
    # the best
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
            lambda ts, r: loss(ts, 0.5 + free * (r["r1"] - 0.5)),
            start,
            optax.adam(0.03),
            60,
            {"r1": 0.5},
        )

    learned = run(jnp.array([0.0, 1.0]))
    alone, both = np.asarray(learned.losses).min(1)
    assert learned.numbers["r1"][0] == 0.5 and abs(learned.numbers["r1"][1] - 0.5) > 0.02
    assert both < 0.5 * alone < 0.5 * learned.losses[0, 0], (both, alone)
    # the loss at what is returned, by another program: rounding
    np.testing.assert_allclose(
        jax.jit(loss)(learned.ts[1], learned.numbers["r1"][1]), both, rtol=1e-8
    )


@pytest.mark.parametrize("units", [1.0, 1e-6])
def test_least_squares_finds_the_grid_and_the_numbers_at_which_the_residuals_are_nil(units):
    inner, number = np.array([0.6, 0.2, 0.03]), -0.7

    def residuals(ts, r):
        return {
            "grid": units * (jnp.log(ts[1:-1]) - jnp.log(inner)),
            "number": units * (r["r"] - number + ts[1] - 0.6),
        }

    start = uniform(4, end=1e-3)
    fitted = jax.jit(lambda ts: fit_grid(residuals, ts, {"r": 0.5}))(start)
    # quadratic convergence: to rounding
    np.testing.assert_allclose(fitted.ts, [1.0, *inner, 1e-3], rtol=1e-12)
    assert float(fitted.numbers["r"]) == pytest.approx(number, rel=1e-12)
    start = np.asarray(start)
    first = (
        np.sum((np.log(start[1:-1]) - np.log(inner)) ** 2) + (0.5 - number + start[1] - 0.6) ** 2
    )
    assert float(fitted.losses[0]) == pytest.approx(
        units**2 * first, rel=1e-12
    ) and fitted.losses.shape == (41,)
    assert fitted.losses[-1] < 1e-24 * units**2 and np.all(np.diff(fitted.losses) <= 0)


def test_least_squares_through_a_multistep_method_ends_much_closer():
    schedule, start = schedules.linear_vp(), jnp.asarray(even_in_log_snr(5))
    goal = oracles.gaussian_flow(
        M, V, *(oracles.alpha_sigma("linear_vp", t) for t in (1.0, END)), XS
    )

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


DOWN = np.array([0.9, 0.5, 0.1])


def learn(ts, steps=1):
    return learn_grid(jnp.sum, ts, optax.sgd(0.1), steps)


ERRORS = {  # (call, what the message must say)
    "learn ascending": (
        lambda: learn(DOWN[::-1]),
        r"ts: expected times that descend, got \[0.1 0.5 0.9\]",
    ),
    "learn one": (
        lambda: learn(DOWN[:1]),
        r"ts: expected a vector of at least 2 times, got shape \(1,\)",
    ),
    "learn nothing": (lambda: learn(DOWN, 0), r"steps: expected at least 1, got 0"),
    "integer numbers": (
        lambda: fit_grid(lambda ts, r: ts, DOWN, {"r": 1}),
        r"numbers: expected a floating-point dtype, got int",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
