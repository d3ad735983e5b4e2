"""A grid, and numbers of a sampler, by gradient descent through the sampler."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math import as_float, check_that
from ..typing import Time

__all__ = ["LearnedGrid", "from_increments", "increments", "learn_grid"]


def increments(ts: Float[Array, " n+1"]) -> Float[Array, " n"]:
    """A grid as unconstrained numbers: the logarithms of its steps in t. The inverse of `from_increments`.

    Args:
        ts: a grid.

    Returns:
        n numbers.

    >>> from_increments(increments(jnp.array([1.0, 0.5, 0.125])), 1.0, 0.125)
    Array([1.   , 0.5  , 0.125], dtype=float32)
    """
    return jnp.log(-jnp.diff(as_float(ts, "ts")))


def from_increments(z: Float[Array, " n"], start: Time, end: Time) -> Float[Array, " n+1"]:
    """The grid from start to end whose steps are in proportion to `exp(z)`: it ascends for no z.

    Args:
        z: n numbers; a constant added to all of them changes nothing.
        start: the first time.
        end: the last time.

    Returns:
        n + 1 descending times, exactly start and end at the ends.

    >>> from_increments(jnp.zeros(4), 1.0, 0.0)
    Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    # summed from the data's end, where the times are small: accurate to relative precision there
    shares = jax.lax.cummax(jnp.minimum(jnp.cumsum(jax.nn.softmax(z)[::-1]), 1.0))  # no rounding may turn it back
    inner = end + (start - end) * shares[:-1][::-1]
    return jnp.concatenate([jnp.full_like(inner, start, shape=1), inner, jnp.full_like(inner, end, shape=1)])


class LearnedGrid(NamedTuple):
    """The best grid that a descent has met."""

    ts: Float[Array, " n+1"]
    """The grid."""
    numbers: Any
    """The numbers of the sampler that were learned with it."""
    losses: Float[Array, " steps"]
    """The loss at every iterate."""


def learn_grid(
    loss: Callable[..., Float[Array, ""]], ts: Float[Array, " n+1"], optimizer: Any, steps: int, numbers: Any = None
) -> LearnedGrid:
    """Descends a loss over the steps of a grid, its ends fixed, and over numbers of the sampler if there are any.

    For the distance to accurate end points x0 of the same x1:
    `loss = lambda ts: jnp.mean((sample(key, sampler, x1, ts) - x0) ** 2)`; with numbers,
    `loss = lambda ts, r: jnp.mean((sample(key, dpm_solver_2(denoise, schedule, r), x1, ts) - x0) ** 2)`.

    Args:
        loss: `loss(ts)`, or `loss(ts, numbers)`.
        ts: the grid to begin with.
        optimizer: a pair (init, update) of optax, such as `optax.adam(0.03)`.
        steps: how many steps of it, at least 1.
        numbers: a pytree of floating-point numbers to learn, too.

    Returns:
        `LearnedGrid(ts, numbers, losses)`, the iterate of the smallest loss.

    Raises:
        ValueError: if ts does not descend or steps < 1.

    Reference: Watson et al. 2022 (arXiv 2202.05830) descend a sample-quality loss over the coefficients of a sampler;
    Tong et al. 2025 (LD3, arXiv 2405.15506) the distance to the teacher over the time steps.

    >>> import optax
    >>> schedule = linear_vp()
    >>> sampler = ddim(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> def loss(ts):
    ...     return jnp.mean((sample(jax.random.key(0), sampler, jnp.array([1.0]), ts) - 0.5) ** 2)
    >>> learned = learn_grid(loss, uniform(5, end=1e-3), optax.adam(0.1), 50)
    >>> bool(loss(learned.ts) < 0.25 * loss(uniform(5, end=1e-3)))
    True
    """
    ts = as_float(ts, "ts")
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"ts: expected a vector of at least 2 times, got shape {ts.shape}")
    check_that(lambda ts: ts[1:] < ts[:-1], f"ts: expected times that descend, got {ts}", ts)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")

    def objective(params):
        z, numbers = params
        grid = from_increments(z, ts[0], ts[-1])
        value = loss(grid) if numbers is None else loss(grid, numbers)
        return value.astype(ts.dtype)

    def descend(carry, _):
        params, state, best, best_loss = carry
        value, gradient = jax.value_and_grad(objective)(params)
        better = value < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        return (params, state, best, jnp.minimum(value, best_loss)), value

    params = increments(ts), jax.tree.map(lambda n: as_float(n, "numbers"), numbers)
    carry = params, optimizer.init(params), params, jnp.full((), jnp.inf, ts.dtype)
    (_, _, (z, numbers), _), losses = jax.lax.scan(descend, carry, length=steps)
    return LearnedGrid(from_increments(z, ts[0], ts[-1]), numbers, losses)
