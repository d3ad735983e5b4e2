"""Classifier-free guidance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from ..typing import Denoiser, Estimate

__all__ = ["cfg"]


def cfg(conditional: Denoiser, unconditional: Denoiser, scale: float | Array) -> Denoiser:
    """Classifier-free guidance: `unconditional + scale (conditional - unconditional)` (1.42).

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given none (or, for a negative prompt, the condition to move away from).
        scale: 0 is unconditional, 1 conditional, more is guided. (Where a paper writes
            `(1 + w) c - w u`, it is 1 + w.) A scalar; vmap over it for many. For one scale a
            sample of a batch, give it as many axes as x has, such as (n, 1, 1, 1).

    Returns:
        The guided denoiser.

    Raises:
        ValueError: when the denoiser is called, if the scale does not fit x as said.

    Reference: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6; (1.39), (1.41).

    >>> import jax.numpy as jnp
    >>> towards = lambda mean: gaussian(jnp.array([mean]), 0.1 * jnp.eye(1), linear())
    >>> guided = cfg(towards(1.0), towards(0.0), 2.0)
    >>> guided(jnp.zeros(1), 1.0).x0
    Array([2.], dtype=float32)
    """
    return bind(_cfg, conditional, unconditional, scale)


def _cfg(conditional, unconditional, scale, x, t) -> Estimate:
    shape = jnp.shape(scale)
    fits = shape == () or (len(shape) == x.ndim and jnp.broadcast_shapes(shape, x.shape) == x.shape)
    if not fits:
        raise ValueError(
            f"scale: expected a scalar, or one scale a sample with as many axes as x of shape "
            f"{x.shape}, got shape {shape}; to try many scales, vmap over them"
        )
    c, u = call_denoiser(conditional, x, t, "conditional"), call_denoiser(unconditional, x, t, "unconditional")
    return jax.tree.map(lambda c, u: u + scale * (c - u), c, u)
