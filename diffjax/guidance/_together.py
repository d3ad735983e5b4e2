"""Several denoisers evaluated together, in one call if they differ in their condition alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._bind import bind
from .._calls import call_denoiser
from .._varying import stack
from ..typing import Denoiser, Estimate


def together(*denoisers: Denoiser):
    """`(x, t) -> (Estimate, ...)`, for several denoisers of which the last is unconditional.

    If they are one function and differ only in what is bound as `cond`, `vmap` runs over the
    conditions and not over x. So a compiled sampler holds the network once, and the layers before
    the first one that sees the condition are computed once. Otherwise they are called in turn.
    """
    bound = [bind(denoise) for denoise in denoisers]
    if not _differ_in_the_condition(bound):
        return bind(_in_turn, bound)
    conds, rest = zip(*(eqx.partition(d, _conditions_of(d)) for d in bound), strict=True)
    return bind(_at_once, conds, rest[0])


def _in_turn(denoisers, x, t):
    n = len(denoisers) - 1
    names = ["conditional"] if n == 1 else [f"conditionals[{i}]" for i in range(n)]
    return tuple(
        call_denoiser(denoise, x, t, name)
        for denoise, name in zip(denoisers, [*names, "unconditional"], strict=True)
    )


def _at_once(conds, rest, x, t):
    stacked = jax.tree.map(lambda *leaves: stack([jnp.asarray(leaf) for leaf in leaves]), *conds)
    estimates = jax.vmap(lambda c: call_denoiser(eqx.combine(c, rest), x, t))(stacked)
    return tuple(Estimate(*(e[i] for e in estimates)) for i in range(len(conds)))


def _conditions_of(denoise):
    """For each leaf, whether it was bound as `cond`."""
    return jax.tree.map_with_path(
        lambda path, leaf: any(getattr(key, "key", None) == "cond" for key in path), denoise
    )


def _differ_in_the_condition(denoisers) -> bool:
    trees = [jax.tree.flatten(denoise) for denoise in denoisers]
    (first, structure), others = trees[0], trees[1:]
    conditions = jax.tree.leaves(_conditions_of(denoisers[0]))
    return any(conditions) and all(
        other == structure
        and all(
            _is_alike(a, b) if condition else _is_same(a, b)
            for a, b, condition in zip(first, leaves, conditions, strict=True)
        )
        for leaves, other in others
    )


def _is_alike(a, b) -> bool:
    """Whether two conditions have one shape and dtype, so that they can be stacked."""
    if any(isinstance(value, str) for value in (a, b)):
        return False
    kinds = {np.dtype(jnp.result_type(value)).kind for value in (a, b)}
    dtypes = {value.dtype for value in (a, b) if hasattr(value, "dtype")}
    return jnp.shape(a) == jnp.shape(b) and len(kinds) == 1 and len(dtypes) < 2


def _is_same(a, b) -> bool:
    return a is b or (isinstance(a, bool | int | float) and type(a) is type(b) and a == b)
