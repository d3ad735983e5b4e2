"""Numerical pieces that the floors above share."""

import inspect
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec


def is_concrete(*values) -> bool:
    """Whether every value is a number that Python can look at now, not one that jax traces."""
    return not any(isinstance(v, Tracer) for v in jax.tree.leaves(values))


def as_float(x, name: str):
    """X as an array of at least float32; integers and complex numbers are refused.

    A Python number stays weakly typed: it takes the precision of the arrays that it meets.
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: expected a floating-point dtype, got {dtype} of shape {jnp.shape(x)}")
    return jnp.asarray(x) if dtype.itemsize >= 4 else jnp.asarray(x, jnp.float32)


def shown(values) -> str:
    """An array for an error message: its first and last numbers, if there are many."""
    if not is_concrete(values) or np.ndim(values) == 0:
        return str(values)
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3)


def check_that(condition, message: str, *values) -> None:
    """Raises ValueError unless `condition(*values)` holds everywhere; traced values are not checked.

    Each `{}` of the message stands for one of the values, in their order.
    """
    if is_concrete(*values) and not np.all(condition(*map(np.asarray, values))):
        raise ValueError(message.format(*map(shown, values)))


def check_number(value, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises ValueError unless the value, where it is concrete, is finite and in [low, high]."""
    message = f"{name}: expected a finite number in [{low}, {high}], got {{}}"
    check_that(lambda v: np.isfinite(v) & (v >= low) & (v <= high), message, value)


def accepted(fn, keywords: dict) -> dict:
    """Those of the keyword arguments that the function takes."""
    parameters = inspect.signature(fn).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}


def check_alive(tree, name: str) -> None:
    """Raises ValueError if an array of the tree was donated to a jitted function."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and is_concrete(leaf) and leaf.is_deleted():
            raise ValueError(
                f"{name}: expected arrays that are alive, got a deleted one at "
                f"{name}{jax.tree_util.keystr(path)}: a step jitted with donate_argnums=0 consumes its "
                f"state; go on with the state that it returned"
            )


def described(x):
    """What a wrong argument is, for an error message."""
    if inspect.isfunction(x):
        return f"the function {x.__name__}({', '.join(inspect.signature(x).parameters)})"
    if isinstance(x, type) or inspect.isroutine(x):
        return x.__name__
    return repr(x) if isinstance(x, bool | int | float | str | None) else f"an instance of {type(x).__name__}"


def as_scalar(value, name: str):
    """The value, if it is a scalar: a vector of them would be spread over the axes of a sample."""
    if jnp.ndim(value):
        raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(value)}; to try many values, vmap over them")
    return value


def zeros_of(x, *numbers):
    """Zeros of the shape and dtype of x, computed from x and some scalars. A compiler makes a constant of them.

    Under a transformation a loop may not start from a constant if what it computes is no constant. These zeros are mapped
    where `vmap` maps x or one of the numbers, they vary over the same axes of `shard_map`, and are sharded as x is.
    """
    zeros = jnp.equal(x, x) & False
    for number in numbers:
        zeros = zeros | (jnp.equal(number, number) & False)
    return zeros.astype(jnp.result_type(x))


def stack(numbers):
    """`jnp.stack` of scalars. On a mesh with explicit axes all are sharded as one: a constant as a number that is mapped."""
    zero = zeros_of(numbers[0], *numbers)
    return jnp.stack([number + zero for number in numbers])


def on_mesh(x):
    """X, placed on the mesh with explicit axes if there is one: there `vmap` refuses constants and results of callbacks."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return jax.sharding.reshard(x, PartitionSpec()) if explicit and jax.typeof(x).sharding.mesh.empty else x


def varying_carry(step, carry):
    """The first carry of a loop, cast to vary over the axes of `shard_map` over which `step(carry)` varies."""
    carry = jax.tree.map(on_mesh, carry)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    cast, varying = None, jax.tree.map(_varying_axes, carry)
    while cast != varying:
        cast = varying
        carry = jax.tree.map(
            lambda x, axes: jax.lax.pcast(x, tuple(axes - _varying_axes(x)), to="varying"), carry, cast
        )
        varying = jax.tree.map(_varying_axes, jax.eval_shape(step, carry))
    return carry


def vary_alike(*trees):
    """The trees, with each array cast to vary over all axes of `shard_map` over which any of them varies."""
    axes = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(trees)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - _varying_axes(x)), to="varying") if axes else x, trees)


def _varying_axes(x):
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # jax renamed it


def error_if(x, wrong, message: str):
    """Returns x, or raises RuntimeError at run time if `wrong`. Within `shard_map` x becomes NaN instead."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), x)
    return eqx.error_if(x, wrong, message)


@jax.custom_jvp
def safe_sqrt(x):
    """sqrt(x), with a huge finite derivative at x = 0 in place of infinity.

    There 0 * infinity would be NaN in the gradient of anything that does not move x.
    """
    return jnp.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return safe_sqrt(x), dx * 0.5 / jnp.sqrt(jnp.maximum(x, jnp.finfo(jnp.result_type(x)).tiny))


def bisect(increasing, target, steps: int):
    """The t in [0, 1] where a function that increases with t crosses the target, by `steps` halvings.

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
"""The time that stands for t = 0 in a limit. It is far below the resolution of anything smooth in t, and its square is
still a normal float32."""


def from_right(t):
    """The time t, but `SMALLEST_TIME` in place of 0: for what is 0/0 or infinite * 0 at t = 0."""
    return _moved_into(t, SMALLEST_TIME, jnp.inf)


def inside(t):
    """The time t, but the nearest time inside (0, 1) in place of 0 and 1."""
    return _moved_into(t, SMALLEST_TIME, 1 - _rounding(t))


def limit(f, t):
    """`f(t)` for 0 < t < 1, and the limit of f at t = 0 and at t = 1.

    It is infinite where f grows like a power of 1/t or 1/(1 - t).
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
    """The exponential integrators' `phi_k(z) = int_0^1 e^((1 - v) z) v^(k-1) / (k-1)! dv` for k = 1 ... n, a list.

    `phi_1 = (e^z - 1) / z`, `phi_{k+1} = (phi_k - 1/k!) / z`. The recurrence loses a digit or two at |z| = 1 and all of them
    at 0. There the series of the last one, `sum_j z^j / (j + n)!`, whose 18 terms are exact to rounding for |z| <= 1, and
    the recurrence backwards, which loses nothing, serve instead.
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
