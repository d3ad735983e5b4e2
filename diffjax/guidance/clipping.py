"""Clipping of the estimated data to their range."""

import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from .._checks import check_that
from ..schedules import alpha_sigma
from ..typing import Denoiser, Estimate, Schedule

__all__ = ["clip_x0"]


def clip_x0(
    denoise: Denoiser, schedule: Schedule, low: float | Array = -1.0, high: float | Array = 1.0
) -> Denoiser:
    """A denoiser whose estimate of the data stays in the range of the data.

    `x0 <- min(max(x0, low), high)`, and `eps <- (x - alpha x0) / sigma` with the new x0. Early
    steps of a sampler, and strong guidance, would otherwise leave the range of the data and
    saturate. The clipped denoiser is not that of any density, so take the likelihood without it.

    Args:
        denoise: the denoiser, guided or not.
        schedule: its path.
        low: the minimum of the data, a scalar or an array that broadcasts to x.
        high: the maximum of the data, likewise.

    Returns:
        The clipped denoiser. Where sigma = 0 it returns the noise estimate unchanged.

    Raises:
        ValueError: unless concrete bounds satisfy low < high.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), in their code; Saharia et al. 2022 (Imagen,
    arXiv 2205.11487), section 2.3, as static thresholding.

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
    # A difference of estimates, not (x - alpha x0) / sigma, so that eps is exact where nothing is
    # clipped.
    ratio = jnp.where(sigma > 0, alpha / jnp.where(sigma > 0, sigma, 1.0), 0.0)
    return Estimate(clipped, eps + ratio * (x0 - clipped))
