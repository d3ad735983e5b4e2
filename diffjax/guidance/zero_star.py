"""CFG-Zero*: classifier-free guidance of a flow with an optimized scale of the unconditional
velocity.
"""

import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from ..parametrizations import VELOCITY, solve, target
from ..typing import Denoiser, Estimate, Scale, Schedule
from ._moves import event_axes, event_of
from ._together import together
from .classifier_free import scale_at

__all__ = ["zero_star"]


def zero_star(
    conditional: Denoiser,
    unconditional: Denoiser,
    schedule: Schedule,
    scale: Scale,
    still_from: float | Array = 1.0,
    *,
    event_ndim: int,
) -> Denoiser:
    """CFG-Zero*: guidance of velocities, the unconditional one scaled to fit the conditional one.

    `s v_u + scale (v_c - s v_u)` with the projection `s = <v_c, v_u> / |v_u|^2` of one sample. At
    times from `still_from` on the velocity is 0, because a velocity learned near the prior is worse
    than none. A deterministic sampler on `linear()` then does not move; `euler` does not on any
    path.

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition.
        schedule: the path; the paper's is `linear()`.
        scale: as for `cfg`.
        still_from: the time from which on the velocity is 0: 1 stops the first step of a grid that
            begins there, as the paper does; a value above 1 disables this.
        event_ndim: the number of axes of one sample, such as 3 for (h, w, c).

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if event_ndim is not a number of axes; see also `cfg`.

    Reference: Fan et al. 2025 (CFG-Zero*, arXiv 2503.18886).

    >>> towards = lambda mean: gaussian(mean * jnp.ones(2), 0.1 * jnp.eye(2), linear())
    >>> guided = zero_star(towards(2.0), towards(1.0), linear(), 7.0, 2.0, event_ndim=1)
    >>> guided(jnp.zeros(2), 1.0).x0  # parallel velocities: s makes them equal
    Array([2., 2.], dtype=float32)
    """
    return bind(
        _zero_star,
        together(conditional, unconditional),
        schedule,
        scale,
        still_from,
        event_of(event_ndim),
    )


def _zero_star(pair, schedule, scale, still_from, event, x, t) -> Estimate:
    axes, scale = event_axes(event, x), scale_at(scale, x, t)
    c, u = (target(schedule, VELOCITY, e.x0, e.eps, t) for e in pair(x, t))
    square = jnp.sum(u**2, axes, keepdims=True)
    fitted = jnp.sum(c * u, axes, keepdims=True) / jnp.where(square > 0, square, 1.0) * u
    velocity = jnp.where(jnp.asarray(t) < still_from, fitted + scale * (c - fitted), 0.0)
    return Estimate(
        *(p * x + q * velocity for p, q in zip(*solve(schedule, VELOCITY, t), strict=True))
    )
