"""Functions of any schedule: its derivatives, its SDE's coefficients, its log-SNR and inverse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from .._checks import as_float
from .._numerics import bisect, from_right, safe_sqrt
from .._once import once
from .._varying import zeros_of
from ..typing import Schedule, Time

__all__ = [
    "Coefficients",
    "alpha_sigma",
    "coefficients",
    "diffusion",
    "diffusion_squared",
    "drift",
    "half_log_snr",
    "half_log_snr_inverse",
]


class Coefficients(NamedTuple):
    """alpha and sigma at one time, and their derivatives with respect to t."""

    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    dalpha: Float[Array, ""]
    """d alpha / dt."""
    dsigma: Float[Array, ""]
    """d sigma / dt."""


def coefficients(schedule: Schedule, t: Time) -> Coefficients:
    """alpha, sigma and their time derivatives, by one `jax.jvp`.

    Args:
        schedule: any schedule.
        t: a scalar time in [0, 1].

    Returns:
        `Coefficients(alpha, sigma, dalpha, dsigma)`, scalars of at least float32.

    Raises:
        ValueError: if t is not a scalar, or the schedule returns anything but two scalars.

    >>> coefficients(linear(), 0.25)
    Coefficients(alpha=Array(0.75, dtype=float32...), ..., dalpha=Array(-1., dtype=float32...), ...)
    """
    t = _time(t)
    (alpha, sigma), (dalpha, dsigma) = jax.jvp(
        lambda t: alpha_sigma(schedule, t), (t,), (jnp.ones_like(t),)
    )
    return Coefficients(alpha, sigma, dalpha, dsigma)


def drift(schedule: Schedule, t: Time) -> Float[Array, ""]:
    """The linear drift f of the forward SDE `dx = f x dt + g dw`: `f = alpha' / alpha` (1.25).

    It is -infinity where alpha = 0 (t = 1 on the linear, GVP and cosine paths).

    Args:
        schedule: any schedule.
        t: a scalar time.

    Returns:
        f(t), in units of 1/time.

    >>> float(drift(linear_vp(0.1, 20.0), 0.0))  # -beta(0) / 2  (1.26)
    -0.05...
    """
    alpha, _, dalpha, _ = coefficients(schedule, t)
    return dalpha / alpha


def diffusion_squared(schedule: Schedule, t: Time) -> Float[Array, ""]:
    """The squared diffusion of the forward SDE: `g^2 = 2 sigma sigma' - 2 f sigma^2` (1.25).

    At t = 0 it is the limit from the right, which is finite even where sigma' is infinite (the VP
    paths). It is infinite where alpha = 0.

    Args:
        schedule: any schedule.
        t: a scalar time.

    Returns:
        g^2(t), in units of variance/time.

    >>> float(diffusion_squared(linear_vp(0.1, 20.0), 0.0))  # beta(0), though sigma' is infinite
    0.1...
    """
    alpha, sigma, dalpha, dsigma = coefficients(schedule, from_right(t))
    return 2 * sigma * (dsigma - dalpha / alpha * sigma)


def diffusion(schedule: Schedule, t: Time) -> Float[Array, ""]:
    """The diffusion coefficient g of the forward SDE, the root of `diffusion_squared` (1.25).

    Args:
        schedule: any schedule.
        t: a scalar time.

    Returns:
        g(t), in units of the data per square root of time.

    >>> round(float(diffusion(linear_vp(0.1, 20.0), 1.0)) ** 2, 3)  # beta(1)  (1.26)
    20.0
    """
    return safe_sqrt(jnp.maximum(diffusion_squared(schedule, t), 0.0))


def half_log_snr(schedule: Schedule, t: Time) -> Float[Array, ""]:
    """Half the log signal-to-noise ratio, `lambda(t) = log(alpha / sigma)`.

    It is +inf where sigma = 0, and -inf where alpha = 0.

    Args:
        schedule: any schedule.
        t: a scalar time.

    Returns:
        lambda(t), in nats. (The log-SNR of many papers is twice this.)

    >>> float(half_log_snr(linear(), 0.5))
    0.0
    """
    return log_ratio(*alpha_sigma(schedule, t))


def half_log_snr_inverse(schedule: Schedule, value: Float[Array, ""] | float) -> Float[Array, ""]:
    """The time in [0, 1] at which the half log-SNR has the given value: `t(lambda)` of Table 1.1.

    Bisection finds it for every schedule whose half log-SNR decreases. A value that the schedule
    does not reach gives the nearer end. The derivatives with respect to the value and to the
    schedule's numbers are those of the implicit function: `dt = (dvalue - d lambda) / lambda'(t)`.

    Args:
        schedule: any schedule.
        value: the half log-SNR, a scalar; vmap for many.

    Returns:
        t.

    Raises:
        ValueError: if the value is not a scalar.

    >>> float(half_log_snr_inverse(linear(), 0.0))
    0.5
    """
    value = as_float(value, "value")
    if value.ndim:
        raise ValueError(f"value: expected a scalar (vmap for many), got shape {value.shape}")
    return _inverse(schedule, value)


@once
def _inverse(schedule, value):
    steps = 3 * jnp.finfo(value.dtype).nmant
    finite = jnp.isfinite(value)
    target = jnp.where(finite, value, 0.0)

    def residual(t):
        return (half_log_snr(schedule, t) - target).astype(target.dtype)

    def solve(residual, zero):
        return bisect(lambda t: -residual(t), zero, steps)

    def tangent_solve(linear, y):
        slope = linear(jnp.ones_like(y))
        regular = jnp.isfinite(slope) & (slope != 0)  # false where alpha or sigma is 0
        return jnp.where(regular, y / jnp.where(regular, slope, 1.0), 0.0)

    zero = zeros_of(target, *alpha_sigma(schedule, 0.5))
    t = jax.lax.custom_root(residual, zero, solve, tangent_solve)
    return jnp.where(finite, t, jnp.where(value > 0, 0.0, 1.0).astype(t.dtype))


def alpha_sigma(schedule: Schedule, t: Time) -> tuple[Array, Array]:
    """Evaluates a schedule without derivatives: `schedule(t)`, with a check of what it returns.

    Args:
        schedule: any schedule.
        t: a scalar time in [0, 1].

    Returns:
        A pair of scalars of at least float32.

    Raises:
        ValueError: if t is not a scalar, or the schedule returns anything but two scalars.

    >>> [float(value) for value in alpha_sigma(linear(), 0.25)]
    [0.75, 0.25]
    """
    t = _time(t)
    maker = _maker(schedule)
    if maker:
        raise ValueError(
            f"schedule: expected a schedule, got {maker}, the function that makes one; "
            f"call it, as in {maker}()"
        )
    out = schedule(t)
    if not (isinstance(out, tuple) and len(out) == 2 and all(jnp.shape(o) == () for o in out)):
        raise ValueError(
            "schedule: expected it to return two scalars (alpha, sigma), "
            f"got {jax.tree.map(jnp.shape, out)}"
        )
    alpha, sigma = out
    return as_float(alpha + 0 * t, "alpha"), as_float(sigma + 0 * t, "sigma")


def _maker(schedule) -> str | None:
    """The name of the constructor that was given in place of a schedule, or None."""
    fn = schedule.func if isinstance(schedule, Partial) and not schedule.args else schedule
    name, module = getattr(fn, "__name__", "_"), getattr(fn, "__module__", None) or ""
    return name if module.startswith("diffjax.schedules") and not name.startswith("_") else None


def log_ratio(alpha: Array, sigma: Array) -> Array:
    """log(alpha / sigma), with gradient 0 where it is infinite."""
    # the logarithm's infinite slope times a gradient of 0 would be NaN
    finite = (alpha != 0) & (sigma != 0)
    value = jnp.log(jnp.where(finite, alpha, 1.0)) - jnp.log(jnp.where(finite, sigma, 1.0))
    return jnp.where(finite, value, jnp.where(sigma == 0, jnp.inf, -jnp.inf))


def _time(t):
    t = as_float(t, "t")
    if t.ndim:
        raise ValueError(f"t: expected a scalar (vmap for many times), got shape {t.shape}")
    return t
