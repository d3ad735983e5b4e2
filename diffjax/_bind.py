"""`bind`: a function with its data bound, as a pytree."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

__all__ = ["bind"]


def bind(fn: Callable, /, *args: Any, **kwargs: Any) -> Partial:
    """Binds arguments to a function. The result is a callable pytree of what was bound.

    `bind(f, a, k=b)(x) = f(a, x, k=b)`. The bound arrays and numbers are the leaves of the result,
    so a configured schedule, denoiser or sampler crosses `jit`, `vmap`, `grad`, `scan`, `pmap` and
    `shard_map` as an ordinary argument.

    `jax.tree_util.Partial` hides some data from jax, so that their gradients silently vanish.
    `bind` does not: it merges binds of binds, and it keeps as data a function that is itself a
    pytree (a Flax NNX or Equinox module), the object of a bound method, and functions among the
    arguments.

    Args:
        fn: a function, a bound function, or a callable pytree such as a network. What it holds in a
            closure stays static. Only what is bound is data.
        *args: its first positional arguments: pytrees of arrays, numbers and functions.
        **kwargs: its keyword arguments, likewise.

    Returns:
        A callable pytree.

    Raises:
        ValueError: if `fn` is not callable.

    >>> import jax
    >>> def line(slope, offset, x):
    ...     return slope * x + offset
    >>> f = bind(line, 2.0, 1.0)
    >>> f(3.0)
    7.0
    >>> jax.grad(lambda f: f(3.0))(f).args  # the gradient with respect to a function is a function
    (Array(3., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
    """
    if not callable(fn):
        raise ValueError(f"fn: expected a function or a callable module, got {fn!r}")
    if isinstance(fn, functools.partial):  # also jax's Partial
        args, kwargs, fn = (*fn.args, *args), {**fn.keywords, **kwargs}, fn.func
        return bind(fn, *args, **kwargs)
    owner, function = getattr(fn, "__self__", None), getattr(fn, "__func__", None)
    # a method of a module
    if owner is not None and function is not None and not _is_leaf(owner):
        fn, args = function, (owner, *args)
    elif not _is_leaf(fn):  # a module
        fn, args = _call, (fn, *args)
    args, kwargs = jax.tree.map(
        lambda leaf: Partial(leaf) if callable(leaf) else leaf, (args, kwargs)
    )
    return Partial(fn, *args, **kwargs)


def _call(fn, /, *args, **kwargs):
    return fn(*args, **kwargs)


def _is_leaf(x) -> bool:
    return jax.tree_util.all_leaves([x])
