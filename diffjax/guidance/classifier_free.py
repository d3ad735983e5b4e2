"""Classifier-free guidance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from .._varying import stack
from ..typing import Denoiser, Estimate

__all__ = ["cfg", "conditional_cfg"]


def cfg(conditional: Denoiser, unconditional: Denoiser, scale: float | Array) -> Denoiser:
    """Classifier-free guidance: `unconditional + scale (conditional - unconditional)` (1.42).

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition (or, for a negative prompt, the condition to
            move away from).
        scale: 0 is unconditional, 1 conditional, above 1 guided. (Where a paper writes
            `(1 + w) c - w u`, it is 1 + w.) A scalar; vmap for many. For one scale per sample of
            a batch, give it as many axes as x has, such as (n, 1, 1, 1).

    Returns:
        The guided denoiser.

    Raises:
        ValueError: when the denoiser is called, if the scale is no scalar and does not fit x.

    Reference: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6; (1.39), (1.41).

    >>> import jax.numpy as jnp
    >>> towards = lambda mean: gaussian(jnp.array([mean]), 0.1 * jnp.eye(1), linear())
    >>> guided = cfg(towards(1.0), towards(0.0), 2.0)
    >>> guided(jnp.zeros(1), 1.0).x0
    Array([2.], dtype=float32)
    """
    return bind(_cfg, conditional, unconditional, scale)


def conditional_cfg(
    denoise: Callable[..., Estimate], cond: Any, null: Any, scale: float | Array
) -> Denoiser:
    """Classifier-free guidance with one conditional denoiser, called once for both conditions.

    `vmap` runs over the two conditions, so a compiled sampler holds the network once. The result is
    that of `cfg` with the denoisers of the two conditions.

    Args:
        denoise: `denoise(x, t, cond=...) -> Estimate`, a denoiser that takes its condition by
            keyword, as networks do.
        cond: the condition, a pytree of arrays or numbers, such as a label.
        null: the null condition, of the structure, shapes and dtypes of cond, such as
            `network.null`; or a condition to move away from.
        scale: as for `cfg`.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if null has another structure or other shapes than cond; see also `cfg`.

    Reference: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6; (1.39), (1.41), (1.42).

    >>> import jax.numpy as jnp
    >>> def denoise(x, t, cond):
    ...     return gaussian(cond[None], 0.1 * jnp.eye(1), linear())(x, t)
    >>> conditional_cfg(denoise, jnp.array(1.0), jnp.array(0.0), 2.0)(jnp.zeros(1), 1.0).x0
    Array([2.], dtype=float32)
    """
    described = [
        (jax.tree.structure(c), [jnp.shape(leaf) for leaf in jax.tree.leaves(c)])
        for c in (cond, null)
    ]
    if described[0] != described[1]:
        raise ValueError(
            f"null: expected the structure and shapes of cond, {described[0]}, got {described[1]}"
        )
    return bind(_conditional_cfg, denoise, cond, null, scale)


def _conditional_cfg(denoise, cond, null, scale, x, t) -> Estimate:
    _check_scale(scale, x)
    conditions = jax.tree.map(lambda c, n: stack([jnp.asarray(c), jnp.asarray(n)]), cond, null)
    both = jax.vmap(lambda c: call_denoiser(bind(denoise, cond=c), x, t))(conditions)
    return jax.tree.map(lambda e: e[1] + scale * (e[0] - e[1]), both)


def _cfg(conditional, unconditional, scale, x, t) -> Estimate:
    _check_scale(scale, x)
    c = call_denoiser(conditional, x, t, "conditional")
    u = call_denoiser(unconditional, x, t, "unconditional")
    return jax.tree.map(lambda c, u: u + scale * (c - u), c, u)


def _check_scale(scale, x):
    shape = jnp.shape(scale)
    fits = shape == () or (len(shape) == x.ndim and jnp.broadcast_shapes(shape, x.shape) == x.shape)
    if not fits:
        raise ValueError(
            "scale: expected a scalar, or one scale per sample with as many axes as x of shape "
            f"{x.shape}, got shape {shape}; to try many scales, vmap over them"
        )
