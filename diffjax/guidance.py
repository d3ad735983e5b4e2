"""Guidance: denoisers in, a denoiser out.

Both estimates are guided alike. As guidance is affine in them, `alpha x0 + sigma eps = x` survives, and the score, the
velocity and every sampler of the result are those of the guided density.
"""

import jax
from jaxtyping import Array

from ._bind import bind
from .typing import Denoiser, Estimate

__all__ = ["cfg"]


def cfg(conditional: Denoiser, unconditional: Denoiser, scale: float | Array) -> Denoiser:
    """Classifier-free guidance: `unconditional + scale (conditional - unconditional)` (1.42).

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given none (or, for a negative prompt, the condition to move away from).
        scale: 0 is unconditional, 1 conditional, more is guided. (Where a paper writes `(1 + w) c - w u`, it is 1 + w.)

    Returns:
        The guided denoiser.

    Reference: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6; (1.39), (1.41).

    >>> import jax.numpy as jnp
    >>> towards = lambda mean: gaussian(jnp.array([mean]), 0.1 * jnp.eye(1), linear())
    >>> guided = cfg(towards(1.0), towards(0.0), 2.0)
    >>> guided(jnp.zeros(1), 1.0).x0
    Array([2.], dtype=float32)
    """
    return bind(_cfg, conditional, unconditional, scale)


def _cfg(conditional, unconditional, scale, x, t) -> Estimate:
    return jax.tree.map(lambda c, u: u + scale * (c - u), conditional(x, t), unconditional(x, t))
