"""Classifier guidance, from the gradient of any log probability of x_t, or of an energy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from ..typing import Denoiser, Estimate, Scale, Schedule, Time
from ._moves import along_score
from .classifier_free import scale_at

__all__ = ["classifier", "energy"]


def classifier(
    denoise: Denoiser,
    log_prob: Callable[[Array, Time], Array],
    schedule: Schedule,
    scale: Scale = 1.0,
) -> Denoiser:
    """Classifier guidance: the score plus `scale grad_x log p(c | x_t)` (1.40).

    `x0 + scale sigma^2 / alpha g` and `eps - scale sigma g`, where g is the gradient. With the
    exact log probability and scale 1 it is the conditional denoiser; at any scale it is `cfg` of
    the conditional and the unconditional one.

    Args:
        denoise: the unconditional denoiser.
        log_prob: `log_prob(x, t) -> log p(c | x_t = x)`, one number for each sample: a scalar for
            one sample, shape (n,) for a batch of n. The classifier must know noisy data
            (`losses.noisy_classification` trains one). A constant may be missing.
        schedule: the path.
        scale: 0 is unconditional, 1 conditional; a scalar, a function of time, or one number for
            each sample, as for `cfg`.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: when it is called, if log_prob returns another shape, the scale does not fit x,
            or alpha = 0 at a concrete time.

    Reference: Dhariwal and Nichol 2021 (ADM, arXiv 2105.05233), algorithm 2; (1.37), (1.40).

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear())
    >>> log_prob = lambda x, t: jax.nn.log_sigmoid(x[..., 0])
    >>> guided = classifier(denoise, log_prob, linear(), 2.0)
    >>> guided(jnp.zeros(1), 0.5).x0  # the gradient is 1/2, sigma^2 / alpha is 1/2
    Array([0.5], dtype=float32)
    """
    return bind(_classifier, denoise, log_prob, schedule, scale)


def _classifier(denoise, log_prob, schedule, scale, x, t) -> Estimate:
    gradient = jax.grad(lambda x: jnp.sum(_checked(log_prob(x, t), x)))(x)
    estimate = call_denoiser(denoise, x, t)
    return along_score(estimate, scale_at(scale, x, t) * gradient, schedule, t)


def _checked(log_prob, x):
    """One number for each sample: a scalar, or the leading axes of a batch."""
    shape, rank = jnp.shape(log_prob), jnp.ndim(log_prob)
    if shape != x.shape[:rank] or rank == x.ndim > 0:
        raise ValueError(
            f"log_prob: expected one number for each sample of x of shape {x.shape}, such as "
            f"shape () or {x.shape[:1]}, got shape {shape}; "
            "take the class, as jax.nn.log_softmax(logits)[..., label] does"
        )
    return log_prob


def energy(
    denoise: Denoiser,
    energy: Callable[[Array, Time], Array],
    schedule: Schedule,
    scale: Scale = 1.0,
) -> Denoiser:
    """Energy guidance: the score minus `scale grad_x E(x_t, t)` (1.39).

    It is `classifier` with `log_prob = -E`.

    Args:
        denoise: the denoiser.
        energy: `energy(x, t) -> E`, one number for each sample.
        schedule: the path.
        scale: as for `classifier`.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: as `classifier`.

    Reference: Zhao et al. 2022 (EGSDE, arXiv 2207.06635); (1.39).

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear())
    >>> guided = energy(denoise, lambda x, t: -0.5 * x[..., 0], linear(), 2.0)
    >>> guided(jnp.zeros(1), 0.5).x0
    Array([0.5], dtype=float32)
    """
    return classifier(denoise, bind(_negative, energy), schedule, scale)


def _negative(energy, x, t):
    return -energy(x, t)
