"""Learns a grid, and numbers of a sampler, by gradient descent or least squares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import accepted, as_float, check_that
from .._once import once
from .._varying import varying_carry, zeros_of
from ..typing import Time

__all__ = ["LearnedGrid", "fit_grid", "from_increments", "increments", "learn_grid"]


def increments(ts: Float[ArrayLike, " n"]) -> Float[Array, " n-1"]:
    """A grid as unconstrained numbers: the logarithms of its steps in t.

    `from_increments` is the inverse.

    Args:
        ts: a grid of n times.

    Returns:
        n - 1 numbers.

    Raises:
        ValueError: if ts is not floating-point.

    >>> from_increments(increments(jnp.array([1.0, 0.5, 0.125])), 1.0, 0.125)
    Array([1.   , 0.5  , 0.125], dtype=float32)
    """
    return jnp.log(-jnp.diff(as_float(ts, "ts")))


def from_increments(z: Float[Array, " n"], start: Time, end: Time) -> Float[Array, " n+1"]:
    """The grid from start to end whose steps are proportional to `exp(z)`; it descends for any z.

    Args:
        z: n numbers. A constant added to all of them changes nothing.
        start: the first time.
        end: the last time.

    Returns:
        n + 1 descending times; the first is exactly start, the last exactly end.

    >>> from_increments(jnp.zeros(4), 1.0, 0.0)
    Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    # Summed from the end of the data, where the times are small, for relative precision there.
    # cummax and minimum undo rounding that would break the order.
    shares = jax.lax.cummax(jnp.minimum(jnp.cumsum(jax.nn.softmax(z)[::-1]), 1.0))
    inner = end + (start - end) * shares[:-1][::-1]
    first, last = (jnp.full_like(inner, t, shape=1) for t in (start, end))
    return jnp.concatenate([first, inner, last])


class LearnedGrid(NamedTuple):
    """The best grid found."""

    ts: Float[ArrayLike, " times"]
    """The grid."""
    numbers: Any
    """The numbers of the sampler that were learned with the grid."""
    losses: Float[Array, " n"]
    """The loss at every iterate; for `fit_grid` the sum of squares, also at the last iterate."""


def learn_grid(
    loss: Callable[..., Float[Array, ""]],
    ts: Float[ArrayLike, " times"],
    optimizer: Any,
    steps: int,
    numbers: Any = None,
) -> LearnedGrid:
    """Minimizes a loss over the steps of a grid with fixed ends, and over numbers of the sampler.

    A loss for the distance to accurate end points x0 of the same x1, without and with numbers:

        loss = lambda ts: jnp.mean((sample(key, sampler, x1, ts) - x0) ** 2)
        loss = lambda ts, r: jnp.mean((sample(key, method(r), x1, ts) - x0) ** 2)

    with `method = lambda r: dpm_solver_2(denoise, schedule, r)`. For such a distance, `fit_grid` is
    faster and goes further.

    Args:
        loss: `loss(ts)`, or `loss(ts, numbers)`.
        ts: the grid to begin with.
        optimizer: a pair (init, update) of optax, such as `optax.adam(0.03)`. The update receives
            those of optax's extra arguments `value`, `grad` and `value_fn` that it accepts.
        steps: the number of steps of the optimizer, at least 1.
        numbers: a pytree of floating-point numbers to learn with the grid; None: there are none.

    Returns:
        `LearnedGrid(ts, numbers, losses)` with the iterate of smallest loss.

    Raises:
        ValueError: if ts does not descend or steps < 1.

    Reference: Watson et al. 2022 (DDSS, arXiv 2202.05830), a sample-quality loss over the
    coefficients of a sampler; Tong et al. 2025 (LD3, arXiv 2405.15506), the distance to the teacher
    over the time steps.

    >>> import optax
    >>> schedule = linear_vp()
    >>> sampler = ddim(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> def loss(ts):
    ...     return jnp.mean((sample(jax.random.key(0), sampler, jnp.array([1.0]), ts) - 0.5) ** 2)
    >>> learned = learn_grid(loss, uniform(5, end=1e-3), optax.adam(0.1), 50)
    >>> bool(loss(learned.ts) < 0.25 * loss(uniform(5, end=1e-3)))
    True
    """
    return _learn(loss, _checked(ts, steps), optimizer, steps, numbers)


@once
def _learn(loss, ts, optimizer, steps, numbers):
    params, unpack = _parameters(ts, numbers)

    def objective(params):
        return loss(*unpack(params)).astype(params[0].dtype)

    def descend(carry, _):
        params, state, best, best_loss = carry
        value, gradient = jax.value_and_grad(objective)(params)
        better = value < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        extra = {"value": value, "grad": gradient, "value_fn": objective}
        updates, state = optimizer.update(
            gradient, state, params, **accepted(optimizer.update, extra)
        )
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        return (params, state, best, jnp.minimum(value, best_loss)), value

    carry = params, optimizer.init(params), params, jnp.full((), jnp.inf, params[0].dtype)
    carry = varying_carry(lambda carry: descend(carry, None)[0], carry)
    (_, _, best, _), losses = jax.lax.scan(descend, carry, length=steps)
    return _learned(unpack, best, losses)


def fit_grid(
    residuals: Callable[..., Any],
    ts: Float[ArrayLike, " times"],
    numbers: Any = None,
    steps: int = 40,
) -> LearnedGrid:
    """Least squares over the steps of a grid with fixed ends, and over numbers of the sampler.

    For the distance to accurate end points x0 of the same x1:
    `residuals = lambda ts: sample(key, sampler, x1, ts) - x0`. A grid has few numbers and there are
    many residuals, so Levenberg-Marquardt needs tens of steps where gradient descent needs
    hundreds. A step costs about one run of the sampler for each number. A sample with a very
    different end point outweighs all others. To prevent this, bound the residuals of each sample:
    `r / sqrt(1 + |r|^2 / c^2)`.

    Args:
        residuals: `residuals(ts)`, or `residuals(ts, numbers)`: a pytree of arrays, whose sum of
            squares is minimized.
        ts: the grid to begin with.
        numbers: a pytree of floating-point numbers to fit with the grid; None: there are none.
        steps: the number of steps, at least 1. A step that would not reduce the sum of squares is
            rejected.

    Returns:
        `LearnedGrid(ts, numbers, losses)` with steps + 1 sums of squares.

    Raises:
        ValueError: if ts does not descend or steps < 1.

    Reference: Marquardt 1963 (J. SIAM 11, 431), here with three dampings tried at once; Tong et al.
    2025 (LD3, arXiv 2405.15506) for the distance to the teacher.

    >>> schedule = linear_vp()
    >>> sampler = ddim(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> def residuals(ts):
    ...     return sample(jax.random.key(0), sampler, jnp.array([1.0]), ts) - 0.5
    >>> losses = fit_grid(residuals, uniform(5, end=1e-3)).losses
    >>> bool(losses[-1] < 0.25 * losses[0])
    True
    """
    return _fit(residuals, _checked(ts, steps), numbers, steps)


@once
def _fit(residuals, ts, numbers, steps):
    params, unpack = _parameters(ts, numbers)
    flat, unravel = ravel_pytree(params)

    def errors(flat):
        return ravel_pytree(residuals(*unpack(unravel(flat))))[0].astype(flat.dtype)

    def loss(flat):
        return jnp.sum(jnp.square(errors(flat)))

    def step(carry, _):
        flat, least, damping = carry
        jacobian, r = jax.jacfwd(lambda flat: (errors(flat),) * 2, has_aux=True)(flat)
        square, slope = jacobian.T @ jacobian, jacobian.T @ r
        # (J'J + damping D) change = J'r, where D is the diagonal of J'J plus a thousandth of its
        # mean. In the units of D, the damping is a multiple of the identity.
        diagonal = jnp.diagonal(square)
        unit = 1 / jnp.sqrt(diagonal + 1e-3 * jnp.mean(diagonal) + jnp.finfo(flat.dtype).tiny)
        values, vectors = jnp.linalg.eigh(unit[:, None] * square * unit[None])
        turned = vectors.T @ (unit * slope)
        dampings = damping * jnp.array([0.1, 1.0, 10.0], flat.dtype)
        values = jnp.maximum(values, 0)
        changes = jax.vmap(lambda d: unit * (vectors @ (turned / (values + d))))(dampings)
        losses = jax.vmap(lambda change: loss(flat - change))(changes)
        losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
        best = jnp.argmin(losses)
        better = losses[best] < least
        flat = jnp.where(better, flat - changes[best], flat)
        least = jnp.where(better, losses[best], least)
        damping = jnp.where(better, dampings[best], 100 * damping)
        return (flat, least, jnp.clip(damping, epsilon, 1 / epsilon)), least

    first, epsilon = loss(flat), jnp.finfo(flat.dtype).eps
    carry = varying_carry(lambda carry: step(carry, None)[0], (flat, first, zeros_of(first) + 1e-2))
    (flat, *_), losses = jax.lax.scan(step, carry, length=steps)
    return _learned(unpack, unravel(flat), jnp.concatenate([first[None], losses]))


def _checked(ts, steps):
    ts = as_float(ts, "ts")
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"ts: expected a vector of at least 2 times, got shape {ts.shape}")
    check_that(lambda ts: ts[1:] < ts[:-1], "ts: expected times that descend, got {}", ts)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return ts


def _parameters(ts, numbers):
    """The parameters to learn, and the function from them to the arguments of the loss."""

    def unpack(params):
        z, numbers = params
        grid = from_increments(z, ts[0], ts[-1])
        return (grid,) if numbers is None else (grid, numbers)

    return (increments(ts), jax.tree.map(lambda n: as_float(n, "numbers"), numbers)), unpack


def _learned(unpack, params, losses):
    ts, *numbers = unpack(params)
    return LearnedGrid(ts, numbers[0] if numbers else None, losses)
