"""Helpers that change one estimate consistently with the other, and the axes of one sample."""

import jax.numpy as jnp

from .._checks import check_that
from ..schedules import alpha_sigma
from ..typing import Estimate


def with_x0(estimate: Estimate, x0, schedule, t) -> Estimate:
    """The estimate with another x0, and the eps that keeps `alpha x0 + sigma eps`.

    eps moves by a difference of estimates, not to (x - alpha x0) / sigma, so that it is exact where
    x0 does not move. Where sigma = 0 it stays.
    """
    alpha, sigma = alpha_sigma(schedule, t)
    ratio = jnp.where(sigma > 0, alpha / jnp.where(sigma > 0, sigma, 1.0), 0.0)
    return Estimate(x0, estimate.eps + ratio * (estimate.x0 - x0))


def tweedie_gain(alpha, sigma):
    """`sigma^2 / alpha`, by which Tweedie's formula multiplies dx0/dx, and 0 where alpha = 0."""
    return jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)


def along_score(estimate: Estimate, gradient, schedule, t) -> Estimate:
    """The estimate whose score is larger by `gradient`, by Tweedie's formula.

    `x0 + sigma^2 / alpha gradient` and `eps - sigma gradient`. Where alpha = 0 the gradient says
    nothing about x0: an error at a concrete time, otherwise NaN.
    """
    alpha, sigma = alpha_sigma(schedule, t)
    check_that(
        lambda alpha, t: alpha > 0,
        "t: expected a time with alpha > 0, got t={1}, where alpha = 0 and the gradient of a log "
        "probability says nothing about x0. Start the grid below, as uniform(20, start=0.999) does",
        alpha,
        t,
    )
    x0 = estimate.x0 + tweedie_gain(alpha, sigma) * gradient
    return Estimate(jnp.where(alpha > 0, x0, jnp.nan), estimate.eps - sigma * gradient)


def event_of(event_ndim, name: str = "event_ndim"):
    """An array with as many axes as one sample: a shape is static, while a number is traced."""
    if isinstance(event_ndim, bool) or not isinstance(event_ndim, int) or event_ndim < 0:
        raise ValueError(
            f"{name}: expected the number of axes of one sample, such as 3 for an image of shape "
            f"(h, w, c), got {event_ndim!r}"
        )
    return jnp.zeros((1,) * event_ndim)


def event_axes(event, x) -> tuple[int, ...]:
    """The axes of one sample, counted from the last."""
    if event.ndim > x.ndim:
        raise ValueError(
            f"event_ndim: expected at most the {x.ndim} axes of x of shape {x.shape}, "
            f"got {event.ndim}"
        )
    return tuple(range(-event.ndim, 0))
