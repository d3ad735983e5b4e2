"""Clipping of the estimated data to their range, fixed or dynamic."""

import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from .._checks import check_number, check_that
from ..typing import Denoiser, Estimate, Schedule
from ._moves import event_axes, event_of, with_x0

__all__ = ["clip_x0", "dynamic_threshold"]


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
    estimate = call_denoiser(denoise, x, t)
    return with_x0(estimate, jnp.clip(estimate.x0, low, high), schedule, t)


def dynamic_threshold(
    denoise: Denoiser,
    schedule: Schedule,
    percentile: float | Array = 99.5,
    bound: float | Array = 1.0,
    *,
    event_ndim: int,
) -> Denoiser:
    """A denoiser whose estimate of the data is clipped to a percentile, and scaled to their range.

    `x0 <- min(max(x0, -q), q) bound / q`, where q is the percentile of |x0| within one sample, and
    at least `bound`. Strong guidance saturates fewer pixels than with `clip_x0`. Use it for pixels,
    not for latents. eps follows as for `clip_x0`.

    Args:
        denoise: the denoiser, guided or not.
        schedule: its path.
        percentile: from 0 to 100; 99.5 in the paper.
        bound: the data lie in [-bound, bound].
        event_ndim: the number of axes of one sample, such as 3 for (h, w, c).

    Returns:
        The clipped denoiser.

    Raises:
        ValueError: if a concrete percentile is not in [0, 100], a concrete bound is not positive,
            or event_ndim is not a number of axes.

    Reference: Saharia et al. 2022 (Imagen, arXiv 2205.11487), section 2.3.

    >>> raw = gaussian(jnp.array([4.0, 0.5]), jnp.zeros((2, 2)), linear())
    >>> dynamic_threshold(raw, linear(), 100.0, event_ndim=1)(jnp.zeros(2), 0.5).x0
    Array([1.   , 0.125], dtype=float32)
    """
    check_number(percentile, "percentile", 0, 100)
    check_number(bound, "bound", low=1e-38)
    return bind(_dynamic_threshold, denoise, schedule, percentile, bound, event_of(event_ndim))


def _dynamic_threshold(denoise, schedule, percentile, bound, event, x, t) -> Estimate:
    estimate = call_denoiser(denoise, x, t)
    x0 = estimate.x0
    q = jnp.percentile(jnp.abs(x0), percentile, event_axes(event, x), keepdims=True)
    q = jnp.maximum(q, bound)
    return with_x0(estimate, jnp.clip(x0, -q, q) * (bound / q), schedule, t)
