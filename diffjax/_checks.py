"""Checks of arguments, whose errors all say "name: expected ..., got ...".

Values that jax traces are not checked.
"""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_concrete(*values) -> bool:
    """Whether Python knows every value now, because jax traces none of them."""
    return not any(isinstance(v, Tracer) for v in jax.tree.leaves(values))


def as_float(x, name: str) -> jax.Array:
    """Converts x to an array of at least float32; integers and complex numbers are refused.

    A Python number stays weakly typed: it takes the precision of the arrays it is combined with.
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected a floating-point dtype, got {dtype} of shape {jnp.shape(x)}"
        )
    return jnp.asarray(x) if dtype.itemsize >= 4 else jnp.asarray(x, jnp.float32)


def shown(values) -> str:
    """An array as text for an error message: its first and last numbers if there are many."""
    if not is_concrete(values) or np.ndim(values) == 0:
        return str(values)
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3)


def check_that(condition, message: str, *values) -> None:
    """Raises ValueError unless `condition(*values)` holds everywhere; ignores traced values.

    Each `{}` in the message stands for one of the values, in order.
    """
    if is_concrete(*values) and not np.all(condition(*map(np.asarray, values))):
        raise ValueError(message.format(*map(shown, values)))


def check_number(value, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises ValueError if the value is concrete but not finite or not in [low, high]."""
    message = f"{name}: expected a finite number in [{low}, {high}], got {{}}"
    check_that(lambda v: np.isfinite(v) & (v >= low) & (v <= high), message, value)


def accepted(fn, keywords: dict) -> dict:
    """The keyword arguments that the function accepts."""
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
                f"{name}{jax.tree_util.keystr(path)}: a step jitted with donate_argnums=0 "
                "consumes its state; continue with the state that it returned"
            )


def described(x):
    """A description of a wrong argument, for an error message."""
    if inspect.isfunction(x):
        return f"the function {x.__name__}({', '.join(inspect.signature(x).parameters)})"
    if isinstance(x, type) or inspect.isroutine(x):
        return x.__name__
    if isinstance(x, bool | int | float | str | None):
        return repr(x)
    return f"an instance of {type(x).__name__}"


def as_scalar(value, name: str):
    """Returns a scalar; refuses a vector, which would broadcast over the axes of a sample."""
    if jnp.ndim(value):
        raise ValueError(
            f"{name}: expected a scalar, got shape {jnp.shape(value)}; "
            "to try many values, vmap over them"
        )
    return value


def as_static(n, name: str) -> jax.Array:
    """N zeros, for an integer n >= 1 that is bound: a shape is static, while a number is traced."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {n!r}")
    return jnp.zeros(n)


def broadcasts_to(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the whole shape."""
    matched = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(size in (1, other) for size, other in matched)
