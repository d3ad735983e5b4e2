"""Adaptive projected guidance."""

import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._checks import as_scalar
from .._numerics import safe_sqrt
from ..typing import Denoiser, Estimate, Scale, Schedule
from ._moves import event_axes, event_of, with_x0
from ._together import together
from .classifier_free import scale_at

__all__ = ["projected"]


def projected(
    conditional: Denoiser,
    unconditional: Denoiser,
    schedule: Schedule,
    scale: Scale,
    eta: float | Array = 0.0,
    norm: float | Array = jnp.inf,
    *,
    event_ndim: int,
) -> Denoiser:
    """Adaptive projected guidance (APG): less of the guidance that only saturates the sample.

    With `d = c - u` of the estimates of x0, shortened to the length `norm` if it is longer, and
    split into a part parallel to c and a part orthogonal to it:
    `x0 = c + (scale - 1) (d_orthogonal + eta d_parallel)`. The momentum of the paper needs memory:
    `samplers.projected_with_momentum` adds it.

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition.
        schedule: the path.
        scale: as for `cfg`; 1 is conditional.
        eta: the share of the parallel part, 0 in the paper; 1 without shortening is `cfg`.
        norm: the greatest length of d, in units of a sample's Euclidean norm; it depends on the
            model. Infinity does not shorten.
        event_ndim: the number of axes of one sample, such as 3 for (h, w, c).

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if event_ndim is not a number of axes; see also `cfg`.

    Reference: Sadat et al. 2024 (APG, arXiv 2410.02416).

    >>> towards = lambda mean: gaussian(jnp.array(mean), 0.1 * jnp.eye(2), linear())
    >>> guided = projected(towards([2.0, 0.0]), towards([0.0, 1.0]), linear(), 3.0, event_ndim=1)
    >>> guided(jnp.zeros(2), 1.0).x0
    Array([ 2., -2.], dtype=float32)
    """
    return bind(
        _projected,
        together(conditional, unconditional),
        schedule,
        scale,
        eta,
        norm,
        event_of(event_ndim),
    )


def _projected(pair, schedule, scale, eta, norm, event, x, t) -> Estimate:
    c, u = pair(x, t)
    return project(c, c.x0 - u.x0, schedule, scale_at(scale, x, t), eta, norm, event, t)


def project(c, d, schedule, scale, eta, norm, event, t) -> Estimate:
    """The conditional estimate c, guided along d."""
    axes = event_axes(event, d)
    length = safe_sqrt(jnp.sum(d**2, axes, keepdims=True))
    long = length > as_scalar(norm, "norm")
    d = jnp.where(long, norm / jnp.where(long, length, 1.0), 1.0) * d
    square = jnp.sum(c.x0**2, axes, keepdims=True)
    share = jnp.sum(d * c.x0, axes, keepdims=True) / jnp.where(square > 0, square, 1.0)
    parallel = share * c.x0
    rest = d - parallel + as_scalar(eta, "eta") * parallel
    return with_x0(c, c.x0 + (scale - 1) * rest, schedule, t)
