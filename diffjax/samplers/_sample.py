"""The engine: a scan of a sampler's step over a time grid."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._checks import as_float, check_that, is_concrete, shown
from .._once import once
from .._varying import varying_scan
from ..typing import Sampler, State, Time

__all__ = [
    "checkpointed_scan",
    "final_state",
    "one_step",
    "sample",
    "trajectory",
    "truncated_scan",
]


def sample(
    key: PRNGKeyArray,
    sampler: Sampler,
    x: Float[ArrayLike, "*x"],
    ts: Float[ArrayLike, " times"],
    scan: Callable = jax.lax.scan,
) -> Float[Array, "*x"]:
    """Runs a sampler over a time grid, and returns the last x.

    Step i of n goes from `ts[i]` to `ts[i + 1]` with the key `fold_in(key, i)`. For many samples,
    either give a batch as x, or vmap over keys and x. With vmap, each sample is the same for any
    batch size and any number of devices.

    Outside `jit`, the loop is compiled once for all calls with the same functions, shapes and
    Python numbers. It is compiled again if what a function reads from its closure or globals has
    changed.

    Args:
        key: a PRNG key; a deterministic sampler does not use it.
        sampler: `ddim(denoise, schedule)`, ...
        x: the start, at time ts[0]: one sample, or a batch that shares the times.
        ts: descending times in [0, 1], at least two.
        scan: the loop, which decides which states reverse mode keeps. `jax.lax.scan` keeps all,
            `checkpointed_scan` about 2 sqrt(n), `truncated_scan(k)` only the last k.

    Returns:
        x at time ts[-1], of the shape of x.

    Raises:
        ValueError: if ts is not a vector of at least two times, x is not floating-point, concrete
            times do not descend or leave [0, 1], or a concrete result is not finite. The message
            then names the step.

    >>> schedule = linear()
    >>> sampler = ddim(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([0.5]), uniform(10))  # all data are 3
    Array([3.], dtype=float32)
    """
    return _run(key, sampler, as_float(x, "x"), ts, scan, _last_x)


def final_state(
    key: PRNGKeyArray,
    sampler: Sampler,
    x: Float[ArrayLike, "*x"],
    ts: Float[ArrayLike, " times"],
    scan: Callable = jax.lax.scan,
) -> State:
    """Runs a sampler over a time grid, and returns its last state: x, and what it remembers.

    A sampler of particles remembers their weights.

    Args:
        key: as for `sample`.
        sampler: as for `sample`.
        x: as for `sample`.
        ts: as for `sample`.
        scan: as for `sample`.

    Returns:
        The state at time ts[-1]; its x is that of `sample`.

    Raises:
        ValueError: as for `sample`.

    >>> schedule = linear()
    >>> sampler = ddim(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), schedule), schedule)
    >>> final_state(jax.random.key(0), sampler, jnp.array([0.5]), uniform(10))
    State(x=Array([3.], dtype=float32), memory=())
    """
    return _run(key, sampler, as_float(x, "x"), ts, scan, _last_state)


def trajectory(
    key: PRNGKeyArray,
    sampler: Sampler,
    x: Float[ArrayLike, "*x"],
    ts: Float[ArrayLike, " times"],
    scan: Callable = jax.lax.scan,
) -> Float[Array, "times *x"]:
    """Runs a sampler over a time grid, and returns x at every time of the grid.

    Args:
        key: as for `sample`.
        sampler: as for `sample`.
        x: as for `sample`.
        ts: as for `sample`.
        scan: as for `sample`.

    Returns:
        x at every time of the grid, of shape (n + 1, *x.shape); the first is x itself.

    Raises:
        ValueError: as for `sample`.

    >>> schedule = linear()
    >>> sampler = ddim(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), schedule), schedule)
    >>> trajectory(jax.random.key(0), sampler, jnp.array([1.0]), uniform(2))[:, 0]
    Array([1., 2., 3.], dtype=float32)
    """
    x = as_float(x, "x")
    return jnp.concatenate([x[None], _run(key, sampler, x, ts, scan, _every_x)])


def _last_x(state, xs):
    return state.x


def _last_state(state, xs):
    return state


def _every_x(state, xs):
    return xs


def _run(key, sampler, x, ts, scan, output):
    """`output(state, xs)` of the last state and every x after the first."""
    ts = _check_grid(ts)
    if not (hasattr(sampler, "init") and hasattr(sampler, "step")):
        raise ValueError(
            "sampler: expected a Sampler(init, step), such as the result of "
            f"ddim(denoise, schedule), got {getattr(sampler, '__name__', repr(sampler))}"
        )
    state = sampler.init(x, ts[0])
    out = _scan_steps(key, sampler.step, state, ts, scan, output)
    _check_finite(key, sampler, x, ts, out.x if output is _last_state else out)
    return out


@once
def _scan_steps(key, step, state, ts, scan, output):
    def body(state, inputs):
        i, t, s = inputs
        state = step(jax.random.fold_in(key, i), state, t, s)
        return state, state.x if output is _every_x else None

    return output(*varying_scan(body, state, (jnp.arange(ts.size - 1), ts[:-1], ts[1:]), scan))


def _check_finite(key, sampler, x, ts, result):
    if not is_concrete(key, sampler, x, ts, result) or jnp.all(jnp.isfinite(result)):
        return
    check_that(np.isfinite, "x: expected finite values, got {}", x)
    # Repeats the steps one by one without compilation, so that every check sees concrete numbers.
    with jax.disable_jit(), jax.debug_key_reuse(False):
        state = sampler.init(x, ts[0])
        for i, (t, s) in enumerate(itertools.pairwise(ts)):
            state = sampler.step(jax.random.fold_in(key, i), state, t, s)
            check_that(
                lambda x, t, s: np.isfinite(x),
                "x: expected finite values after the step from t={1} to s={2}, got {0}. "
                "If alpha = 0 at t, start the grid at a smaller t, as uniform(20, start=0.999) "
                "does. Otherwise look at what the denoiser returns at t",
                state.x,
                t,
                s,
            )
    raise ValueError(f"x: expected finite values at the end of the grid, got {shown(result)}")


def _check_grid(ts):
    ts = as_float(ts, "ts")
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"ts: expected a vector of at least 2 times, got shape {ts.shape}")
    check_that(lambda ts: (ts >= 0) & (ts <= 1), "ts: expected times in [0, 1], got {}", ts)
    check_that(
        lambda ts: ts[1:] < ts[:-1],
        "ts: expected times that descend from prior (1) to data (0), got {}",
        ts,
    )
    return ts


def one_step(update: Callable[[PRNGKeyArray, Array, Time, Time], Array]) -> Sampler:
    """A sampler without memory, from the update of one step.

    Args:
        update: `(key, x, t, s) -> x` from time t to s < t.

    Returns:
        The sampler.

    >>> def shrink(key, x, t, s):
    ...     return x * s / t
    >>> sample(jax.random.key(0), one_step(shrink), jnp.array([8.0]), jnp.array([1.0, 0.5, 0.25]))
    Array([2.], dtype=float32)
    """
    return Sampler(Partial(_init), bind(_one_step, update))


def _init(x, t):
    return State(x)


def _one_step(update, key, state, t, s):
    return State(update(key, state.x, t, s))


# ---- what reverse mode keeps ---------------------------------------------------------------------


def checkpointed_scan(body: Callable, init, xs):
    """`jax.lax.scan`, but its reverse mode keeps about 2 sqrt(n) states instead of n.

    It scans over sqrt(n) segments of sqrt(n) steps. Reverse mode computes the states of a segment
    again, and then each step again: two more forward passes.

    Args:
        body: as for `jax.lax.scan`.
        init: as for `jax.lax.scan`.
        xs: as for `jax.lax.scan`; not None.

    Returns:
        As for `jax.lax.scan`.

    Reference: Chen et al. 2016 (arXiv 1604.06174), section 4.3.

    >>> cumulative = lambda total, x: (total + x, total + x)
    >>> checkpointed_scan(cumulative, 0.0, jnp.arange(5.0))[1]
    Array([ 0.,  1.,  3.,  6., 10.], dtype=float32)
    """
    n = jax.tree.leaves(xs)[0].shape[0]
    length = math.isqrt(n)
    whole = n // length * length

    @jax.checkpoint
    def segment(carry, xs):
        return jax.lax.scan(jax.checkpoint(body), carry, xs)

    folded = jax.tree.map(lambda x: x[:whole].reshape(-1, length, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(segment, init, folded)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole == n:
        return carry, ys
    carry, rest = segment(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)


@functools.cache  # equal numbers give one function, which is compiled once
def truncated_scan(last: int) -> Callable:
    """A scan whose reverse mode covers only the last steps; the earlier ones need no memory.

    Args:
        last: the number of steps to differentiate, at least 0.

    Returns:
        A function with the signature of `jax.lax.scan`.

    Raises:
        ValueError: if last is negative.

    Reference: Clark et al. 2024 (DRaFT-K, arXiv 2309.17400), section 4.2.

    >>> product = lambda total, x: (total * x, None)
    >>> jax.grad(lambda x: truncated_scan(1)(product, 1.0, x)[0])(jnp.array([2.0, 3.0]))
    Array([0., 2.], dtype=float32)
    """
    if last < 0:
        raise ValueError(f"last: expected a number of steps, at least 0, got {last}")

    def scan(body, init, xs):
        n = jax.tree.leaves(xs)[0].shape[0]
        if last >= n:
            return jax.lax.scan(body, init, xs)
        first = n - last
        # The first steps have no gradient at all: with respect to neither the carry, nor xs, nor
        # what the body closes over.
        carry, head = jax.lax.stop_gradient(
            jax.lax.scan(body, init, jax.tree.map(lambda x: x[:first], xs))
        )
        carry, tail = jax.lax.scan(body, carry, jax.tree.map(lambda x: x[first:], xs))
        return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), head, tail)

    return scan
