"""Flax NNX modules as a function and a plain dict of arrays."""

from typing import Any

from flax import nnx
from jax.tree_util import Partial

from .._bind import bind
from .._checks import check_alive, described

__all__ = ["functional", "merge"]


def functional(module: nnx.Module) -> tuple[Partial, dict]:
    """Splits a Flax NNX module into a pure function and its parameters.

    `apply(params, *args) = module(*args)`.

    Args:
        module: a module whose arrays are all `nnx.Param`.

    Returns:
        `apply`, and `params`, a nested dict of arrays. `bind(apply, params)` is a network like the
        module.

    Raises:
        ValueError: if it is not an NNX module, or if it holds other variables, which a pure
            function cannot update: batch statistics, or the keys of a dropout layer that was made
            with `rngs`. `nnx.Dropout(rate)`, made without them, takes its key at each call.

    >>> module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> apply, params = functional(module)
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (3,), 'kernel': (2, 3)}
    >>> x = jnp.ones(2)
    >>> bool((apply(params, x) == module(x)).all())
    True
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"module: expected an nnx.Module, got {described(module)}; for Equinox use "
            f"eqx.partition(module, eqx.is_inexact_array), for linen module.apply and module.init"
        )
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    if rest:
        names = [
            f"{'.'.join(map(str, path))}: {type(leaf).__name__}"
            for path, leaf in nnx.to_flat_state(rest)
        ]
        raise ValueError(
            f"module: expected every variable to be an nnx.Param, got {', '.join(names)}; "
            f"construct dropout layers without rngs, and give the key at the call"
        )
    return bind(_apply, graph), nnx.to_pure_dict(state)


def merge(apply: Partial, params: Any) -> nnx.Module:
    """The inverse of `functional`: the module with these parameters.

    Args:
        apply: the function that `functional(module)` returned.
        params: parameters of that module, such as `state.ema` of a train state.

    Returns:
        A new module.

    Raises:
        ValueError: if `apply` is not from `functional`, or `params` are not the module's
            parameters.

    >>> apply, params = functional(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> merge(apply, jax.tree.map(jnp.zeros_like, params))(jnp.ones(2))
    Array([0., 0., 0.], dtype=float32)
    """
    if not (isinstance(apply, Partial) and apply.func is _apply and len(apply.args) == 1):
        raise ValueError(
            f"apply: expected the function that functional(module) returned, got {described(apply)}"
        )
    check_alive(params, "params")
    try:
        return nnx.merge(apply.args[0], params)
    except ValueError as error:
        raise ValueError(
            f"params: expected the parameters of the module, such as state.ema, "
            f"got {described(params)}"
        ) from error


def _apply(graph, params, *args, **kwargs):
    return nnx.merge(graph, params)(*args, **kwargs)
