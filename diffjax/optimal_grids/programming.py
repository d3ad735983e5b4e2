"""The best grid for every number of steps, by dynamic programming over a table of costs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from .._checks import as_float
from .._once import once
from .._varying import varying_carry, zeros_of

__all__ = ["Budgets", "cheapest_paths"]


class Budgets(NamedTuple):
    """For each number of steps from 1 to K, the cheapest path through a table of costs."""

    costs: Float[Array, " K"]
    """The cost of the cheapest path of k + 1 steps; infinite if there is no such path."""
    paths: Int[Array, "K K+1"]
    """The indices of its k + 2 candidates, padded with the last; invalid for an infinite cost."""

    def grid(self, ts: Float[ArrayLike, " n"], steps: int) -> Float[Array, " {steps}+1"]:
        """The times of the cheapest path.

        Args:
            ts: the n candidates of the table.
            steps: the number of steps, from 1 to K.

        Returns:
            The steps + 1 times.

        Raises:
            ValueError: if steps is not in [1, K].
        """
        if not 1 <= steps <= len(self.costs):
            raise ValueError(f"steps: expected from 1 to {len(self.costs)}, got {steps}")
        return jnp.asarray(ts)[self.paths[steps - 1, : steps + 1]]


def cheapest_paths(table: Float[ArrayLike, "n n"], steps: int) -> Budgets:
    """Finds the cheapest path from the first to the last candidate for each number of steps to K.

    `C[k, j] = min_i C[k-1, i] + L[i, j]`: O(K n^2), a scan of (min, +) products.

    Args:
        table: the cost of going from candidate i straight to candidate j; infinite where that is
            not allowed (j <= i).
        steps: K, from 1 to n - 1.

    Returns:
        `Budgets(costs, paths)`; `budgets.grid(ts, k)` is the grid of k steps.

    Raises:
        ValueError: if the table is not square, or steps is not in [1, n - 1].

    Reference: Watson et al. 2021 (arXiv 2106.03802), algorithm 1; (1.57).

    >>> inf = jnp.inf
    >>> table = jnp.array([[inf, 1.0, 9.0], [inf, inf, 2.0], [inf, inf, inf]])
    >>> budgets = cheapest_paths(table, 2)
    >>> budgets.costs, budgets.grid(jnp.array([1.0, 0.4, 0.0]), 2)
    (Array([9., 3.], dtype=float32), Array([1. , 0.4, 0. ], dtype=float32))
    """
    table = as_float(table, "table")
    n = len(table) if table.ndim else 0
    if table.shape != (n, n):
        raise ValueError(f"table: expected a square matrix, got shape {table.shape}")
    if not 1 <= steps < n:
        raise ValueError(f"steps: expected from 1 to {n - 1} for {n} candidates, got {steps}")
    return _cheapest(table, n, steps)


@once
def _cheapest(table, n, steps):
    def extend(costs, _):
        through = costs[:, None] + table
        best = jnp.argmin(through, axis=0)
        costs = jnp.min(through, axis=0)
        return costs, (costs[-1], best)

    start = jnp.where(jnp.arange(n) == 0, 0.0, jnp.inf).astype(table.dtype)
    start = varying_carry(lambda costs: extend(costs, None)[0], start)
    _, (costs, best) = jax.lax.scan(extend, start, length=steps)

    def walk_back(k):
        def back(j, level):
            before = jnp.where(level <= k, best[level, j], j)
            return before, before

        last = varying_carry(lambda j: back(j, steps - 1)[0], jnp.array(n - 1))
        _, path = jax.lax.scan(back, last, jnp.arange(steps)[::-1])
        # a path of fewer steps repeats its last candidate
        return jnp.concatenate([path[::-1], zeros_of(path[:1]) + n - 1])

    return Budgets(costs, jax.vmap(walk_back)(jnp.arange(steps)))
