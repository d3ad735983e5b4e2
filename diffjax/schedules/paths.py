"""The paths of Table 1.1, in closed form."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._bind import bind
from .._checks import check_number, check_that
from .._numerics import safe_sqrt
from .._varying import zeros_of
from ..typing import Schedule

__all__ = ["cosine", "edm", "gvp", "linear", "linear_vp", "sub_vp", "ve"]


def linear_vp(beta_min: float | Array = 0.1, beta_max: float | Array = 20.0) -> Schedule:
    """The variance-preserving path of linear beta, the limit of DDPM (1.26, 1.27, 1.35).

    `beta(t) = beta_min + t (beta_max - beta_min)`, `alpha = exp(-1/2 int_0^t beta)`,
    `alpha^2 + sigma^2 = 1`.

    Args:
        beta_min: beta(0) >= 0.
        beta_max: beta(1) >= beta_min, above 0.

    Returns:
        The schedule.

    Raises:
        ValueError: unless concrete betas are finite with 0 <= beta_min <= beta_max, 0 < beta_max.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 32-33; Table 1.1.

    >>> alpha, sigma = linear_vp()(1.0)
    >>> float(alpha), float(sigma)
    (0.0065..., 0.9999...)
    """
    _check_betas(beta_min, beta_max)
    return bind(_linear_vp, beta_min, beta_max)


def _linear_vp(beta_min, beta_max, t):
    log_alpha = _linear_vp_log_alpha(beta_min, beta_max, t)
    return jnp.exp(log_alpha), safe_sqrt(-jnp.expm1(2 * log_alpha))


def _linear_vp_log_alpha(beta_min, beta_max, t):
    return -0.5 * t * (beta_min + 0.5 * t * (beta_max - beta_min))


def sub_vp(beta_min: float | Array = 0.1, beta_max: float | Array = 20.0) -> Schedule:
    """The sub-VP path: alpha of `linear_vp` and `sigma = 1 - alpha^2`, at all times less than VP's.

    Args:
        beta_min: beta(0) >= 0.
        beta_max: beta(1) >= beta_min, above 0.

    Returns:
        The schedule.

    Raises:
        ValueError: see `linear_vp`.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 28-29; Table 1.1.

    >>> float(sub_vp()(1.0)[1])
    0.9999...
    """
    _check_betas(beta_min, beta_max)
    return bind(_sub_vp, beta_min, beta_max)


def _sub_vp(beta_min, beta_max, t):
    log_alpha = _linear_vp_log_alpha(beta_min, beta_max, t)
    return jnp.exp(log_alpha), -jnp.expm1(2 * log_alpha)


def ve(sigma_min: float | Array = 0.01, sigma_max: float | Array = 50.0) -> Schedule:
    """The variance-exploding path: `alpha = 1`, `sigma = sigma_min (sigma_max / sigma_min)^t`.

    Its prior is N(0, sigma_max^2 I), not N(0, I), and a little noise, sigma_min, remains at t = 0.

    Args:
        sigma_min: sigma(0) > 0, in units of the data.
        sigma_max: sigma(1) > sigma_min.

    Returns:
        The schedule.

    Raises:
        ValueError: unless concrete values satisfy 0 < sigma_min < sigma_max < infinity.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 30; Table 1.1.

    >>> float(ve(0.01, 50.0)(1.0)[1])
    50.0
    """
    check_number(sigma_min, "sigma_min", low=0)
    check_number(sigma_max, "sigma_max", low=0)
    check_that(
        lambda a, b: (0 < a) & (a < b),
        "sigma_min: expected 0 < sigma_min < sigma_max, got sigma_min={}, sigma_max={}",
        sigma_min,
        sigma_max,
    )
    return bind(_ve, sigma_min, sigma_max)


def _ve(sigma_min, sigma_max, t):
    return 1 + zeros_of(t), sigma_min ** (1 - t) * sigma_max**t


def edm(sigma_max: float | Array = 80.0) -> Schedule:
    """EDM's path: `alpha = 1`, `sigma = t sigma_max`.

    The time is Karras' sigma in units of its maximum.

    Args:
        sigma_max: sigma(1) > 0, in units of the data.

    Returns:
        The schedule; its prior is N(0, sigma_max^2 I).

    Raises:
        ValueError: if a concrete sigma_max is not positive and finite.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), Table 1; Table 1.1.

    >>> float(edm(80.0)(0.5)[1])
    40.0
    """
    check_number(sigma_max, "sigma_max", low=float(np.finfo(np.float32).tiny))
    return bind(_edm, sigma_max)


def _edm(sigma_max, t):
    return 1 + zeros_of(t), t * sigma_max


def linear() -> Schedule:
    """The linear path of flow matching and rectified flow: `alpha = 1 - t`, `sigma = t` (1.17).

    Returns:
        The schedule. Its velocity `eps - x0` is regular at both ends, but f and g^2 are infinite
        at t = 1.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 20 with sigma_min = 0; Liu et al. 2023
    (arXiv 2209.03003); Table 1.1. In both papers time runs the other way: their t is 1 - t here.

    >>> [float(c) for c in linear()(0.25)]
    [0.75, 0.25]
    """
    return bind(_linear)


def _linear(t):
    return 1 - t, t


def gvp() -> Schedule:
    """The generalised variance-preserving (GVP) or trigonometric path.

    `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`.

    Returns:
        The schedule. `f = -(pi/2) tan(pi t/2)` and `g^2 = pi tan(pi t/2)` are infinite at t = 1.

    Reference: Albergo and Vanden-Eijnden 2023 (arXiv 2209.15571), eq. 5; Table 1.1.

    >>> [round(float(c), 4) for c in gvp()(1.0)]
    [0.0, 1.0]
    """
    return bind(_gvp)


def _gvp(t):
    # Each half of the path has its own angle, small at its end. So alpha(1) is exactly 0, and the
    # derivatives are accurate near both ends.
    first = t < 0.5
    angle = 0.5 * jnp.pi * jnp.where(first, t, 1 - t)
    near, far = jnp.cos(angle), jnp.sin(angle)
    return jnp.where(first, near, far), jnp.where(first, far, near)


def cosine(s: float | Array = 0.008) -> Schedule:
    """The cosine path of improved DDPM, which is variance-preserving.

    `alpha = cos(b + (pi/2 - b) t) / cos(b)` with `b = (pi/2) s / (1 + s)`.

    Args:
        s: the offset at t = 0, at least 0; s = 0 gives `gvp`.

    Returns:
        The schedule.

    Raises:
        ValueError: if a concrete s is negative or not finite.

    Reference: Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17.

    >>> [round(float(c), 4) for c in cosine()(1.0)]
    [0.0, 1.0]
    """
    check_number(s, "s", low=0)
    return bind(_cosine, s)


def _cosine(s, t):
    b = 0.5 * jnp.pi * s / (1 + s)
    length = 0.5 * jnp.pi - b
    a = length * t
    # Each half of the path has its own formulas, which are accurate, as are their derivatives.
    # sigma^2 = 1 - cos^2(a + b) / cos^2(b) = sin(a) sin(a + 2 b) / cos^2(b)
    first = t < 0.5
    alpha = jnp.where(first, jnp.cos(a + b), jnp.sin(length * (1 - t))) / jnp.cos(b)
    near_data = jnp.sin(a) * jnp.sin(a + 2 * b) / jnp.cos(b) ** 2
    return alpha, safe_sqrt(jnp.where(first, near_data, 1 - alpha**2))


def _check_betas(beta_min, beta_max):
    check_number(beta_min, "beta_min", low=0)
    check_number(beta_max, "beta_max", low=0)
    check_that(
        lambda a, b: (a <= b) & (b > 0),
        "beta_min: expected 0 <= beta_min <= beta_max, beta_max > 0; got beta_min={}, beta_max={}",
        beta_min,
        beta_max,
    )
