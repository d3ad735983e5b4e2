"""The forward process: a step from any time to any later one, and the step back given the data.

Every coefficient is a formula in alpha and sigma that is regular at both ends of a path (sigma = 0,
alpha = 0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import check_that
from ._numerics import safe_sqrt
from .schedules import coefficients
from .typing import Schedule, Time

__all__ = [
    "Bridge",
    "Posterior",
    "Transition",
    "brownian_bridge",
    "log_prior",
    "perturb",
    "posterior",
    "sample_prior",
    "transition",
]


class Transition(NamedTuple):
    """`q(x_t | x_s) = N(scale x_s, std^2 I)` for s <= t."""

    scale: Float[Array, ""]
    std: Float[Array, ""]


class Posterior(NamedTuple):
    """`q(x_s | x_t, x_0) = N(x_weight x_t + x0_weight x_0, std^2 I)` for s <= t."""

    x_weight: Float[Array, ""]
    x0_weight: Float[Array, ""]
    std: Float[Array, ""]


class Bridge(NamedTuple):
    """A point of a Brownian bridge, with the velocity and score of its distribution there."""

    x: Array
    """The point."""
    velocity: Array
    score: Array


def perturb(schedule: Schedule, x0: Array, eps: Array, t: Time) -> Array:
    """Noisy data `x_t = alpha x0 + sigma eps` (1.3), (1.32).

    Args:
        schedule: any schedule.
        x0: data, of any shape.
        eps: standard normal noise (or, on the linear path, a draw of any prior), of the shape of
            x0.
        t: a scalar time.

    Returns:
        x_t, of the shape of x0.

    Raises:
        ValueError: if the shapes of x0 and eps differ, or t is not a scalar.

    >>> perturb(linear(), jnp.array([4.0]), jnp.array([8.0]), 0.25)
    Array([5.], dtype=float32)
    """
    if jnp.shape(x0) != jnp.shape(eps):
        raise ValueError(f"eps: expected the shape of x0, {jnp.shape(x0)}, got {jnp.shape(eps)}")
    alpha, sigma, *_ = coefficients(schedule, t)
    return alpha * x0 + sigma * eps


def transition(schedule: Schedule, s: Time, t: Time) -> Transition:
    """The forward step `q(x_t | x_s)` from a time s to a later time t, as in the chain (1.31).

    `scale = alpha_t / alpha_s`, `std^2 = sigma_t^2 - scale^2 sigma_s^2`.

    Args:
        schedule: any schedule.
        s: a scalar time with alpha_s > 0.
        t: a scalar time, s <= t.

    Returns:
        `Transition(scale, std)`.

    Raises:
        ValueError: unless alpha_s > 0 at a concrete s.

    Reference: Kingma et al. 2021 (VDM, arXiv 2107.00630), eq. 20-22.

    >>> transition(linear_vp(), 0.0, 0.5) == linear_vp()(0.5)  # q(x_t | x_0): alpha and sigma
    True
    """
    alpha_s, sigma_s, *_ = coefficients(schedule, s)
    alpha_t, sigma_t, *_ = coefficients(schedule, t)
    _check_positive("s", s, "alpha", alpha_s)
    return Transition(
        alpha_t / alpha_s,
        sigma_t * safe_sqrt(_one_minus_snr_ratio(alpha_s, sigma_s, alpha_t, sigma_t)),
    )


def posterior(schedule: Schedule, s: Time, t: Time) -> Posterior:
    """The step back `q(x_s | x_t, x_0)` from a time t to an earlier time s, given the data x_0.

    With `r = SNR_t / SNR_s`, its mean is
    `(alpha_t sigma_s^2 / (alpha_s sigma_t^2)) x_t + alpha_s (1 - r) x_0` and its variance
    `sigma_s^2 (1 - r)`.

    Args:
        schedule: any schedule.
        s: a scalar time with alpha_s > 0.
        t: a scalar time with sigma_t > 0, s <= t.

    Returns:
        `Posterior(x_weight, x0_weight, std)`.

    Raises:
        ValueError: unless alpha_s > 0 and sigma_t > 0 at concrete times.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 6-7; between any two times Kingma et al.
    2021 (VDM, arXiv 2107.00630), eq. 23-25.

    >>> [float(w) for w in posterior(linear(), 0.0, 0.5)]  # at s = 0 the posterior is x_0 itself
    [0.0, 1.0, 0.0]
    """
    alpha_s, sigma_s, *_ = coefficients(schedule, s)
    alpha_t, sigma_t, *_ = coefficients(schedule, t)
    _check_positive("s", s, "alpha", alpha_s)
    _check_positive("t", t, "sigma", sigma_t)
    rest = _one_minus_snr_ratio(alpha_s, sigma_s, alpha_t, sigma_t)
    return Posterior(
        x_weight=alpha_t / alpha_s * (sigma_s / sigma_t) ** 2,
        x0_weight=alpha_s * rest,
        std=sigma_s * safe_sqrt(rest),
    )


def brownian_bridge(x0: Array, x1: Array, eps: Array, t: Time, amplitude: float | Array) -> Bridge:
    """A point of the Brownian bridge of amplitude a from x0 to x1.

    `p(x_t | x0, x1) = N((1-t) x0 + t x1, a^2 t (1-t) I)`. The velocity of the flow with these
    marginals is `x1 - x0 + (1 - 2t) / (2 t (1-t)) (x_t - mean)`. The score is
    `-(x_t - mean) / (a^2 t (1-t))`.

    Args:
        x0: where it starts, of any shape.
        x1: where it ends, of the shape of x0.
        eps: standard normal noise, of the shape of x0.
        t: a scalar time in (0, 1): velocity and score are infinite at the ends.
        amplitude: a, above 0, in units of x per square root of time.

    Returns:
        `Bridge(x, velocity, score)`.

    Raises:
        ValueError: if the shapes of x0, x1 and eps differ, or t is not a scalar.

    Reference: Tong et al. 2024 ([SF]2M, arXiv 2307.03672), eq. 8.

    >>> brownian_bridge(jnp.array([1.0]), jnp.array([3.0]), jnp.array([1.0]), 0.5, 2.0)
    Bridge(x=Array([3.], dtype=float32), velocity=Array([2.], dtype=float32),
           score=Array([-1.], dtype=float32))
    """
    shapes = [jnp.shape(a) for a in (x0, x1, eps)]
    if len(set(shapes)) > 1 or jnp.ndim(t):
        raise ValueError(
            "x0, x1, eps, t: expected three arrays of one shape and a scalar, "
            f"got {shapes} and {jnp.shape(t)}"
        )
    root = jnp.sqrt(t * (1 - t))
    return Bridge(
        x=(1 - t) * x0 + t * x1 + amplitude * root * eps,
        velocity=x1 - x0 + amplitude * (0.5 - t) / root * eps,
        score=-eps / (amplitude * root),
    )


def sample_prior(
    key: PRNGKeyArray, schedule: Schedule, shape: tuple[int, ...], t: Time = 1.0
) -> Array:
    """A draw of the prior N(0, sigma(t)^2 I).

    At t = 1 it is standard normal on VP paths, but not on variance-exploding ones.

    Args:
        key: a PRNG key.
        schedule: any schedule.
        shape: the shape of the draw.
        t: the first time of the grid, where alpha is 0 or much smaller than sigma.

    Returns:
        x_t of that shape.

    >>> x1 = sample_prior(jax.random.key(0), edm(80.0), (1000,))
    >>> 70 < float(x1.std()) < 90
    True
    """
    return coefficients(schedule, t).sigma * jax.random.normal(key, shape)


def log_prior(schedule: Schedule, x: Array, t: Time = 1.0) -> Float[Array, ""]:
    """The log density of the prior N(0, sigma(t)^2 I) at one x, the first term of (1.23).

    Args:
        schedule: any schedule.
        x: one sample, of any shape.
        t: the time at which the path ends.

    Returns:
        The log density in nats, a scalar.

    >>> float(log_prior(linear(), jnp.zeros(2)))  # -log(2 pi)
    -1.8378...
    """
    sigma = coefficients(schedule, t).sigma
    return jnp.sum(jax.scipy.stats.norm.logpdf(x, scale=sigma))


def _check_positive(name, time, coefficient, value):
    message = (
        f"{name}: expected a time with {coefficient} > 0, got {name}={{1}} with {coefficient}={{0}}"
    )
    check_that(lambda value, time: value > 0, message, value, time)


def _one_minus_snr_ratio(alpha_s, sigma_s, alpha_t, sigma_t):
    """1 - SNR_t / SNR_s, as (1 - r)(1 + r): regular where sigma_s or alpha_t is 0, and >= 0."""
    r = (alpha_t * sigma_s) / (sigma_t * alpha_s)
    return jnp.maximum((1 - r) * (1 + r), 0.0)
