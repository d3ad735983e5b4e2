"""Guidance: denoisers in, a denoiser out.

`alpha x0 + sigma eps = x` survives: classifier-free guidance is affine in both estimates, and
clipping changes both together. So every sampler and every likelihood takes the result.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._bind import bind
from ._calls import call_denoiser
from ._math import check_that
from .schedules.coefficients import alpha_sigma
from .typing import Denoiser, Estimate, Schedule

__all__ = ["cfg", "clip_x0"]


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


def clip_x0(denoise: Denoiser, schedule: Schedule, low: float | Array = -1.0, high: float | Array = 1.0) -> Denoiser:
    """A denoiser whose estimate of the data stays in the range of the data.

    `x0 <- min(max(x0, low), high)`, and `eps <- (x - alpha x0) / sigma` with the new x0. Early steps
    of a sampler, and strong guidance, would otherwise leave the range of the data and saturate.
    The clipped denoiser is not that of any density, so take the likelihood without it.

    Args:
        denoise: the denoiser, guided or not.
        schedule: its path.
        low: the least value of the data, a scalar or of a shape that broadcasts to x.
        high: the largest one, likewise.

    Returns:
        The clipped denoiser. Where sigma = 0 it returns the noise estimate as it was.

    Raises:
        ValueError: for concrete bounds unless low < high.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239) clip so in their code; Saharia et al. 2022
    (Imagen, arXiv 2205.11487), section 2.3, call it static thresholding.

    >>> denoise = clip_x0(gaussian(jnp.zeros(1), 4 * jnp.eye(1), linear()), linear())
    >>> denoise(jnp.array([2.0]), 0.5)  # without clipping, x0 = 3.2 and eps = 0.8
    Estimate(x0=Array([1.], dtype=float32), eps=Array([3.], dtype=float32))
    """
    message = "low, high: expected low < high, got low={}, high={}"
    check_that(lambda low, high: low < high, message, low, high)
    return bind(_clip_x0, denoise, schedule, low, high)


def _clip_x0(denoise, schedule, low, high, x, t) -> Estimate:
    alpha, sigma = alpha_sigma(schedule, t)
    x0, eps = call_denoiser(denoise, x, t)
    clipped = jnp.clip(x0, low, high)
    # A difference of estimates, not (x - alpha x0) / sigma: eps keeps its digits where nothing is
    # clipped.
    ratio = jnp.where(sigma > 0, alpha / jnp.where(sigma > 0, sigma, 1.0), 0.0)
    return Estimate(clipped, eps + ratio * (x0 - clipped))
