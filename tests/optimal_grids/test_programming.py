"""The cheapest paths of every number of steps against all paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.optimal_grids import cheapest_paths

inf = np.inf
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


TABLE = random_table(4, 0)
DOWN = np.array([0.9, 0.5, 0.1])
ERRORS = {  # (call, what the message must say)
    "not square": (
        lambda: cheapest_paths(TABLE[:3], 1),
        r"table: expected a square matrix, got shape \(3, 4\)",
    ),
    "integer table": (
        lambda: cheapest_paths(np.ones((3, 3), int), 1),
        r"table: expected a floating-point dtype, got int",
    ),
    "no steps": (
        lambda: cheapest_paths(TABLE, 0),
        r"steps: expected from 1 to 3 for 4 candidates, got 0",
    ),
    "n steps": (
        lambda: cheapest_paths(TABLE, 4),
        r"steps: expected from 1 to 3 for 4 candidates, got 4",
    ),
    "grid of 0": (lambda: search(TABLE, 2).grid(DOWN, 0), r"steps: expected from 1 to 2, got 0"),
    "grid of 3": (lambda: search(TABLE, 2).grid(DOWN, 3), r"steps: expected from 1 to 2, got 3"),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
