"""Classifier guidance, from the gradient of any log probability of x_t, or of an energy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from ..typing import Denoiser, Estimate, Scale, Schedule, Time
from ._moves import along_score, event_axes, event_of
from .classifier_free import scale_at

__all__ = ["classifier", "energy"]


def classifier(
    denoise: Denoiser,
    log_prob: Callable[[Array, Time], Array],
    schedule: Schedule,
    scale: Scale = 1.0,
    *,
    event_ndim: int,
) -> Denoiser:
    """Classifier guidance: the score plus `scale grad_x log p(c | x_t)` (1.40).

    `x0 + scale sigma^2 / alpha g` and `eps - scale sigma g`, where g is the gradient. With the
    exact log probability and scale 1 it is the conditional denoiser; at any scale it is `cfg` of
    the conditional and the unconditional one.

    Args:
        denoise: the unconditional denoiser.
        log_prob: `log_prob(x, t) -> log p(c | x_t = x)`, one number for each sample: a scalar for
            one sample, shape (n,) for a batch of n. The classifier must know noisy data
            (`losses.noisy_classification` trains one). It may omit an additive constant.
        schedule: the path.
        scale: 0 is unconditional, 1 conditional; a scalar, a function of time, or one number for
            each sample, as for `cfg`.
        event_ndim: the number of axes of one sample, such as 3 for (h, w, c).

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if event_ndim is not a number of axes; when it is called, if log_prob returns
            another shape, the scale does not fit x, or alpha = 0 at a concrete time.

    Reference: Dhariwal and Nichol 2021 (ADM, arXiv 2105.05233), algorithm 2; (1.37), (1.40).

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear())
    >>> log_prob = lambda x, t: jax.nn.log_sigmoid(x[..., 0])
    >>> guided = classifier(denoise, log_prob, linear(), 2.0, event_ndim=1)
    >>> guided(jnp.zeros(1), 0.5).x0  # the gradient is 1/2, sigma^2 / alpha is 1/2
    Array([0.5], dtype=float32)
    """
    return bind(_classifier, denoise, log_prob, schedule, scale, event_of(event_ndim))


def _classifier(denoise, log_prob, schedule, scale, event, x, t) -> Estimate:
    def total(x):
        return jnp.sum(_checked(log_prob(x, t), event, x, "log_prob", _TAKE_THE_CLASS))

    gradient = jax.grad(total)(x)
    estimate = call_denoiser(denoise, x, t)
    return along_score(estimate, scale_at(scale, x, t) * gradient, schedule, t)


_TAKE_THE_CLASS = "take the class, as jax.nn.log_softmax(logits)[..., label] does"


def _checked(values, event, x, name, way_out):
    """The values, which must be one number for each sample."""
    expected = x.shape[: x.ndim - len(event_axes(event, x))]
    if jnp.shape(values) != expected:
        raise ValueError(
            f"{name}: expected one number for each sample, shape {expected} for x of shape "
            f"{x.shape}, got shape {jnp.shape(values)}; {way_out}"
        )
    return values


def energy(
    denoise: Denoiser,
    energy: Callable[[Array, Time], Array],
    schedule: Schedule,
    scale: Scale = 1.0,
    *,
    event_ndim: int,
) -> Denoiser:
    """Energy guidance: the score minus `scale grad_x E(x_t, t)` (1.39).

    It is `classifier` with `log_prob = -E`.

    Args:
        denoise: the denoiser.
        energy: `energy(x, t) -> E`, one number for each sample.
        schedule: the path.
        scale: as for `classifier`.
        event_ndim: as for `classifier`.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: as `classifier`.

    Reference: Zhao et al. 2022 (EGSDE, arXiv 2207.06635); (1.39).

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear())
    >>> guided = energy(denoise, lambda x, t: -0.5 * x[..., 0], linear(), 2.0, event_ndim=1)
    >>> guided(jnp.zeros(1), 0.5).x0
    Array([0.5], dtype=float32)
    """
    event = event_of(event_ndim)
    log_prob = bind(_negative, energy, event)
    return classifier(denoise, log_prob, schedule, scale, event_ndim=event_ndim)


def _negative(energy, event, x, t):
    return -_checked(energy(x, t), event, x, "energy", "sum over the axes of a sample")
