"""Roots, limits, and numerically stable functions."""

import math

import jax
import jax.numpy as jnp

from ._varying import zeros_of


@jax.custom_jvp
def safe_sqrt(x):
    """sqrt(x), with a huge finite derivative at x = 0 in place of infinity.

    An infinite derivative times a tangent of 0 would be NaN.
    """
    return jnp.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return safe_sqrt(x), dx * 0.5 / jnp.sqrt(jnp.maximum(x, jnp.finfo(jnp.result_type(x)).tiny))


def bisect(increasing, target, steps: int):
    """The t in [0, 1] where an increasing function crosses the target, by `steps` halvings.

    The midpoints 2^-k are exact floats, so t is accurate to relative precision near 0.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        below = increasing(middle) < target
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low = zeros_of(target)
    low, high = jax.lax.fori_loop(0, steps, halve, (low, low + 1))
    return 0.5 * (low + high)


SMALLEST_TIME = 1e-18
"""The time that stands for t = 0 in a limit.

It is far below the resolution of anything smooth in t, and its square is still a normal float32.
"""


def from_right(t):
    """Replaces t = 0 by `SMALLEST_TIME`, for what is 0/0 or infinity * 0 at t = 0."""
    return _moved_into(t, SMALLEST_TIME, jnp.inf)


def inside(t):
    """Replaces t = 0 and t = 1 by times just inside (0, 1)."""
    return _moved_into(t, SMALLEST_TIME, 1 - _rounding(t))


def limit(f, t):
    """`f(t)` for 0 < t < 1, and the limit of f at t = 0 and at t = 1.

    The limit is infinite where f grows like a power of 1/t or 1/(1 - t).
    """
    near = inside(t)
    farther = _moved_into(near, 1e6 * SMALLEST_TIME, 1 - 1e3 * _rounding(t))
    value, before = jax.vmap(f)(jnp.stack([near, farther]))
    return jnp.where(jnp.abs(value) > 10 * jnp.abs(before), jnp.inf * jnp.sign(value), value)


def _moved_into(t, low, high):
    t = jnp.asarray(t, dtype=jnp.promote_types(jnp.result_type(t), jnp.float32))
    return t + jax.lax.stop_gradient(jnp.clip(t, low, high) - t)


def _rounding(t):
    return jnp.finfo(jnp.promote_types(jnp.result_type(t), jnp.float32)).epsneg


def phis(n: int, z):
    """A list of the `phi_k(z) = int_0^1 e^((1 - v) z) v^(k-1) / (k-1)! dv` for k = 1 ... n.

    They are the functions of exponential integrators: `phi_1 = (e^z - 1) / z`,
    `phi_{k+1} = (phi_k - 1/k!) / z`. This recurrence loses a digit or two at |z| = 1 and all of
    them at 0. For |z| < 1 phi_n is therefore the series `sum_j z^j / (j + n)!`, whose 18 terms are
    exact to rounding, and the others follow by the recurrence backwards, which loses nothing.
    """
    small = jnp.abs(z) < 1
    far, near = jnp.where(small, 1.0, z), jnp.where(small, z, 0.0)
    series = jnp.zeros_like(z)
    for j in reversed(range(18)):
        series = series * near + 1 / math.factorial(j + n)
    down, up = [series], [jnp.expm1(far) / far]
    for k in range(1, n):
        down.insert(0, down[0] * near + 1 / math.factorial(n - k))
        up.append((up[-1] - 1 / math.factorial(k)) / far)
    return [jnp.where(small, below, above) for below, above in zip(down, up, strict=True)]
