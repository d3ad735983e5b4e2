"""Rescaled classifier-free guidance."""

import math

import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._checks import as_scalar, check_number
from ..parametrizations import Parametrization, check_parametrization, solve, target
from ..typing import Denoiser, Estimate, Scale, Schedule
from ._moves import event_axes, event_of
from ._together import together
from .classifier_free import scale_at

__all__ = ["rescaled"]


def rescaled(
    conditional: Denoiser,
    unconditional: Denoiser,
    schedule: Schedule,
    parametrization: Parametrization,
    scale: Scale,
    phi: float | Array = 0.7,
    *,
    event_ndim: int,
) -> Denoiser:
    """Classifier-free guidance with the standard deviation of the conditional output restored.

    In the space of the network's output, with `y = u + scale (c - u)`:
    `(phi std(c) / std(y) + 1 - phi) y`, where std is that of the numbers of one sample. Strong
    guidance makes the output too large, which over-exposes images.

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition.
        schedule: the path.
        parametrization: what the network predicts; the paper's is V.
        scale: as for `cfg`.
        phi: how much of the deviation to restore, from 0 (none: `cfg`) to 1 (all).
        event_ndim: the number of axes of one sample, such as 3 for (h, w, c).

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if phi is not in [0, 1] or event_ndim is not a number of axes; when it is
            called, if one sample is one number; see also `cfg`.

    Reference: Lin et al. 2023 (arXiv 2305.08891), eq. 14-16.

    >>> towards = lambda mean: gaussian(mean, 0.1 * jnp.eye(2), linear())
    >>> conditional, unconditional = towards(jnp.array([1.0, -1.0])), towards(jnp.zeros(2))
    >>> guided = rescaled(conditional, unconditional, linear(), X0, 3.0, 1.0, event_ndim=1)
    >>> guided(jnp.zeros(2), 0.9).x0.round(3) == conditional(jnp.zeros(2), 0.9).x0.round(3)
    Array([ True,  True], dtype=bool)
    """
    check_number(phi, "phi", 0, 1)
    check_parametrization(parametrization)
    return bind(
        _rescaled,
        together(conditional, unconditional),
        schedule,
        parametrization,
        scale,
        phi,
        event_of(event_ndim),
    )


def _rescaled(pair, schedule, parametrization, scale, phi, event, x, t) -> Estimate:
    axes, scale = event_axes(event, x), scale_at(scale, x, t)
    c, u = (target(schedule, parametrization, e.x0, e.eps, t) for e in pair(x, t))
    y = u + scale * (c - u)
    if math.prod(x.shape[axis] for axis in axes) < 2:
        raise ValueError(
            f"event_ndim: expected samples of several numbers, got {len(axes)} axes of x of shape "
            f"{x.shape}: one number has no deviation"
        )
    deviation = jnp.std(y, axes, keepdims=True)
    spread = deviation > 0
    kept = jnp.where(
        spread, jnp.std(c, axes, keepdims=True) / jnp.where(spread, deviation, 1.0), 1.0
    )
    y = (as_scalar(phi, "phi") * (kept - 1) + 1) * y
    return Estimate(
        *(p * x + q * y for p, q in zip(*solve(schedule, parametrization, t), strict=True))
    )
