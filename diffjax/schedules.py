r"""Noise schedules: the path `x_t = alpha(t) x0 + sigma(t) eps` from data (t = 0) to the prior (t = 1).

A schedule is any function `t -> (alpha, sigma)` of a scalar time. With it come, for every schedule alike,

    p(x_t | x_0) = N(alpha x_0, sigma^2 I)                                   (1.3), (1.24)
    dx = f x dt + g dw,  f = alpha'/alpha,  g^2 = (sigma^2)' - 2 f sigma^2    (1.2), (1.25)
    half log-SNR  lambda = log(alpha / sigma), decreasing in t

by one forward-mode derivative: nothing is to be derived by hand. The constructors are Table 1.1. Their alpha and sigma
are accurate to *relative* precision at both ends: `sqrt(-expm1(2 log alpha))` and not `sqrt(1 - alpha^2)`, which in
float32 is 9% off at t = 1e-6.

A schedule of your own is a function; bind its numbers to make them visible to jax:

    def power(exponent, t):
        return 1 - t**exponent, t**exponent

    schedule = bind(power, 2.0)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._bind import bind
from ._math import as_float, bisect, check_number, check_that, from_right, safe_sqrt
from .typing import Schedule, Time

__all__ = [
    "Coefficients",
    "coefficients",
    "cosine",
    "diffusion_squared",
    "drift",
    "edm",
    "from_betas",
    "from_sde",
    "gvp",
    "half_log_snr",
    "half_log_snr_inverse",
    "linear",
    "linear_vp",
    "sub_vp",
    "to_betas",
    "ve",
]


# ---- what any schedule has -------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """alpha and sigma at one time, and their derivatives with respect to t."""

    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    dalpha: Float[Array, ""]
    dsigma: Float[Array, ""]


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
    (alpha, sigma), (dalpha, dsigma) = jax.jvp(lambda t: _pair(schedule, t), (t,), (jnp.ones_like(t),))
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
    """The squared diffusion coefficient g^2 of the forward SDE: `g^2 = 2 sigma sigma' - 2 f sigma^2` (1.25).

    At t = 0 it is the limit from the right, finite where sigma' is not (the VP paths). It is infinite where alpha = 0.

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


def half_log_snr(schedule: Schedule, t: Time) -> Float[Array, ""]:
    """`lambda(t) = log(alpha / sigma)`, half the log signal-to-noise ratio: +inf where sigma = 0, -inf where alpha = 0.

    Args:
        schedule: any schedule.
        t: a scalar time.

    Returns:
        lambda(t), in nats. (The log-SNR of many papers is twice this.)

    >>> float(half_log_snr(linear(), 0.5))
    0.0
    """
    alpha, sigma = _pair(schedule, _time(t))
    return jnp.log(alpha) - jnp.log(sigma)


def half_log_snr_inverse(schedule: Schedule, value: Float[Array, ""] | float) -> Float[Array, ""]:
    """The time in [0, 1] at which the half log-SNR has the given value: `t(lambda)` of Table 1.1, for any schedule.

    By bisection, hence for every schedule whose half log-SNR decreases. A value that the schedule does not reach gives
    the nearer end. Its derivatives, with respect to the value and to the schedule's numbers, are those of the implicit
    function: `dt = (dvalue - d lambda) / lambda'(t)`.

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
    fixed, target = jax.lax.stop_gradient((schedule, value))
    steps = 3 * jnp.finfo(value.dtype).nmant
    t = bisect(lambda t: -half_log_snr(fixed, t), -target, steps)
    # One Newton step whose value is nil and whose derivative is the implicit function's. At the ends the slope may be
    # infinite or the residual undefined: no correction there.
    slope = jax.jvp(lambda t: half_log_snr(fixed, t), (t,), (jnp.ones_like(t),))[1]
    inside = jnp.isfinite(target) & jnp.isfinite(slope) & (slope != 0)
    residual = half_log_snr(schedule, jnp.where(inside, t, 0.5)) - jnp.where(inside, value, 0.0)
    residual = residual - jax.lax.stop_gradient(residual)
    t = t - jnp.where(inside, residual / jnp.where(inside, slope, 1.0), 0.0)
    return jnp.where(jnp.isfinite(target), t, jnp.where(target > 0, 0.0, 1.0).astype(t.dtype))


def _time(t):
    t = as_float(t, "t")
    if t.ndim:
        raise ValueError(f"t: expected a scalar (vmap for many times), got shape {t.shape}")
    return t


def _pair(schedule, t):
    out = schedule(t)
    if not (isinstance(out, tuple) and len(out) == 2 and all(jnp.shape(o) == () for o in out)):
        raise ValueError(
            f"schedule: expected it to return two scalars (alpha, sigma), got {jax.tree.map(jnp.shape, out)}"
        )
    alpha, sigma = out
    return as_float(alpha + 0 * t, "alpha"), as_float(sigma + 0 * t, "sigma")


# ---- Table 1.1 -------------------------------------------------------------------------------------------------------


def linear_vp(beta_min: float | Array = 0.1, beta_max: float | Array = 20.0) -> Schedule:
    """Variance-preserving path with linear beta, the continuous limit of DDPM (1.26, 1.27, 1.35).

    `beta(t) = beta_min + t (beta_max - beta_min)`, `alpha = exp(-1/2 int_0^t beta)`, `alpha^2 + sigma^2 = 1`.

    Args:
        beta_min: beta(0) >= 0.
        beta_max: beta(1) >= beta_min, above 0.

    Returns:
        The schedule.

    Raises:
        ValueError: for a concrete beta that is not finite, negative, or descending.

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
    """Sub-VP path: alpha of `linear_vp`, and `sigma = 1 - alpha^2`, everywhere less noise than VP.

    Args:
        beta_min: beta(0) >= 0.
        beta_max: beta(1) >= beta_min, above 0.

    Returns:
        The schedule.

    Raises:
        ValueError: as `linear_vp`.

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
    """Variance-exploding path: `alpha = 1`, `sigma = sigma_min (sigma_max / sigma_min)^t`.

    Its prior is N(0, sigma_max^2 I), not N(0, I), and a little noise, sigma_min, stays at t = 0.

    Args:
        sigma_min: sigma(0) > 0, in units of the data.
        sigma_max: sigma(1) > sigma_min.

    Returns:
        The schedule.

    Raises:
        ValueError: for concrete values unless 0 < sigma_min < sigma_max < infinity.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 30; Table 1.1.

    >>> float(ve(0.01, 50.0)(1.0)[1])
    50.0
    """
    check_number(sigma_min, "sigma_min", low=0)
    check_number(sigma_max, "sigma_max", low=0)
    check_that(
        lambda a, b: (0 < a) & (a < b),
        f"sigma_min: expected 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}",
        sigma_min,
        sigma_max,
    )
    return bind(_ve, sigma_min, sigma_max)


def _ve(sigma_min, sigma_max, t):
    return jnp.ones_like(t), sigma_min ** (1 - t) * sigma_max**t


def edm(sigma_max: float | Array = 80.0) -> Schedule:
    """EDM's path: `alpha = 1`, `sigma = t sigma_max`: Karras' sigma, in units of its largest value, is the time.

    Args:
        sigma_max: sigma(1) > 0, in units of the data.

    Returns:
        The schedule; its prior is N(0, sigma_max^2 I).

    Raises:
        ValueError: for a concrete sigma_max that is not positive and finite.

    Reference: Karras et al. 2022 (arXiv 2206.00364), Table 1; Table 1.1.

    >>> float(edm(80.0)(0.5)[1])
    40.0
    """
    check_number(sigma_max, "sigma_max", low=float(np.finfo(np.float32).tiny))
    return bind(_edm, sigma_max)


def _edm(sigma_max, t):
    return jnp.ones_like(t), t * sigma_max


def linear() -> Schedule:
    """The linear path of flow matching and rectified flow: `alpha = 1 - t`, `sigma = t` (1.17).

    Returns:
        The schedule. Its velocity `eps - x0` is regular at both ends; f and g^2 are infinite at t = 1.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 20 with sigma_min = 0; Liu et al. 2023 (arXiv 2209.03003);
    Table 1.1. Both papers run time the other way: their t is 1 - t here.

    >>> [float(c) for c in linear()(0.25)]
    [0.75, 0.25]
    """
    return bind(_linear)


def _linear(t):
    return 1 - t, t


def gvp() -> Schedule:
    """The generalised variance-preserving (trigonometric) path: `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`.

    Returns:
        The schedule. `f = -(pi/2) tan(pi t/2)` and `g^2 = pi tan(pi t/2)`, infinite at t = 1.

    Reference: Albergo and Vanden-Eijnden 2023 (arXiv 2209.15571), eq. 5; Table 1.1.

    >>> [round(float(c), 4) for c in gvp()(1.0)]
    [0.0, 1.0]
    """
    return bind(_gvp)


def _gvp(t):
    return jnp.sin(0.5 * jnp.pi * (1 - t)), jnp.sin(0.5 * jnp.pi * t)  # cos(pi/2) is not 0 in floats; sin(0) is


def cosine(s: float | Array = 0.008) -> Schedule:
    """The cosine path of improved DDPM: `alpha = cos(b + (pi/2 - b) t) / cos(b)`, `b = (pi/2) s / (1 + s)`, VP.

    Args:
        s: the offset at t = 0, at least 0; at s = 0 it is `gvp`.

    Returns:
        The schedule.

    Raises:
        ValueError: for a concrete s that is negative or not finite.

    Reference: Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17.

    >>> [round(float(c), 4) for c in cosine()(1.0)]
    [0.0, 1.0]
    """
    check_number(s, "s", low=0)
    return bind(_cosine, s)


def _cosine(s, t):
    b = 0.5 * jnp.pi * s / (1 + s)
    a = (0.5 * jnp.pi - b) * t
    alpha = jnp.sin((0.5 * jnp.pi - b) * (1 - t)) / jnp.cos(b)
    # 1 - cos^2(a + b) / cos^2(b) = sin(a) sin(a + 2 b) / cos^2(b), without the cancellation
    return alpha, safe_sqrt(jnp.sin(a) * jnp.sin(a + 2 * b)) / jnp.cos(b)


# ---- from and to other descriptions ----------------------------------------------------------------------------------


def from_betas(betas: Float[Array, " n"]) -> Schedule:
    """DDPM's discrete chain as a path in continuous time, exact at its n points t = i / n (1.31-1.33).

    `log alpha` is linear between the points `1/2 log prod_{j<=i} (1 - beta_j)` at t = i / n, and 0 at t = 0; VP. So
    `uniform(n)` visits the chain's own steps, and beta(t) of (1.26) is constant on each of them.

    Args:
        betas: beta_1 ... beta_n, each in [0, 1).

    Returns:
        The schedule.

    Raises:
        ValueError: if betas is not a non-empty vector, or a concrete value is outside [0, 1) or not finite.

    Reference: Ho et al. 2020 (arXiv 2006.11239), eq. 4; Lu et al. 2022 (arXiv 2206.00927), appendix D.1.

    >>> import jax.numpy as jnp
    >>> schedule = from_betas(jnp.linspace(1e-4, 0.02, 1000))  # DDPM
    >>> float(schedule(1.0)[0])
    0.0063...
    """
    betas = as_float(betas, "betas")
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas: expected a non-empty vector, got shape {betas.shape}")
    check_that(
        lambda b: (b >= 0) & (b < 1),
        f"betas: expected finite values in [0, 1), got {betas}",
        betas,
    )
    log_alphas = jnp.concatenate([jnp.zeros_like(betas[:1]), 0.5 * jnp.cumsum(jnp.log1p(-betas))])
    return bind(_from_betas, log_alphas)


def _from_betas(log_alphas, t):
    log_alpha = jnp.interp(t, jnp.linspace(0.0, 1.0, log_alphas.size), log_alphas)
    return jnp.exp(log_alpha), safe_sqrt(-jnp.expm1(2 * log_alpha))


def to_betas(schedule: Schedule, n: int) -> Float[Array, " n"]:
    """The n steps of the discrete chain that a variance-preserving path is at t = i / n: the inverse of `from_betas`.

    `beta_i = 1 - (alpha(t_i) / alpha(t_{i-1}))^2` (1.31).

    Args:
        schedule: a schedule with alpha^2 + sigma^2 = 1.
        n: the number of steps, at least 1.

    Returns:
        beta_1 ... beta_n.

    Raises:
        ValueError: if n < 1, or the schedule, where concrete, is not variance-preserving.

    >>> import jax.numpy as jnp
    >>> [round(float(beta), 5) for beta in to_betas(from_betas(jnp.array([0.1, 0.2, 0.3])), 3)]
    [0.1, 0.2, 0.3]
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 step, got {n}")
    alphas, sigmas = jax.vmap(schedule)(jnp.linspace(0.0, 1.0, n + 1))
    check_that(
        lambda a, s: abs(a * a + s * s - 1) < 1e-3,
        "schedule: expected a variance-preserving path, alpha^2 + sigma^2 = 1; only those are DDPM chains",
        alphas,
        sigmas,
    )
    # log alpha from whichever of alpha and sigma is the smaller one, hence the more accurate
    quiet = sigmas < alphas
    log_alphas = jnp.where(quiet, 0.5 * jnp.log1p(-(jnp.where(quiet, sigmas, 0.0) ** 2)), jnp.log(alphas))
    return -jnp.expm1(2 * jnp.diff(log_alphas))


def from_sde(f, g, nodes: int = 32) -> Schedule:
    """The path of the SDE `dx = f(t) x dt + g(t) dw`, by quadrature (1.4).

    `alpha = exp int_0^t f du`, `sigma^2 = int_0^t g(u)^2 exp(2 int_u^t f) du`: Gauss-Legendre rules, which converge
    spectrally as long as f and g are smooth on [0, t]. They need not be integrable up to t = 1.

    Args:
        f: t -> f(t), the scalar linear drift, in units of 1/time.
        g: t -> g(t), the scalar diffusion coefficient, in units of the data per square root of time.
        nodes: points of the rule in each of the two nested integrals.

    Returns:
        The schedule; `drift` and `diffusion_squared` of it give f and g^2 back.

    Raises:
        ValueError: if nodes < 1.

    >>> schedule = from_sde(lambda t: -0.05 - 9.95 * t, lambda t: (0.1 + 19.9 * t) ** 0.5)
    >>> float(schedule(1.0)[0]), float(linear_vp(0.1, 20.0)(1.0)[0])
    (0.0065..., 0.0065...)
    """
    if nodes < 1:
        raise ValueError(f"nodes: expected at least 1, got {nodes}")
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points, weights = 0.5 * (1 + points), 0.5 * weights  # on [0, 1]
    return bind(_from_sde, f, g, jnp.asarray(points), jnp.asarray(weights))


def _from_sde(f, g, points, weights, t):
    def integral(h, low, high):
        return (high - low) * jnp.sum(weights * jax.vmap(h)(low + (high - low) * points))

    variance = integral(lambda u: g(u) ** 2 * jnp.exp(2 * integral(f, u, t)), 0.0, t)
    return jnp.exp(integral(f, 0.0, t)), safe_sqrt(variance)


def _check_betas(beta_min, beta_max):
    check_number(beta_min, "beta_min", low=0)
    check_number(beta_max, "beta_max", low=0)
    check_that(
        lambda a, b: (a <= b) & (b > 0),
        f"beta_min: expected 0 <= beta_min <= beta_max, beta_max > 0; got beta_min={beta_min}, beta_max={beta_max}",
        beta_min,
        beta_max,
    )
