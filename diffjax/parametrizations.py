"""What networks predict, and the denoiser that each of them defines.

A network is trained towards some linear combination `a x0 + b eps` of data and noise. Together with
`alpha x0 + sigma eps = x` this gives two linear equations for the two unknowns of a denoiser,

    ( alpha  sigma ) ( x0  )   (     x      )
    (   a      b   ) ( eps ) = ( scale out  )

so every parametrization is a row `(a, b)` of that matrix and a scale, and all share one solver:

    X0         x0                          a = 1,      b = 0
    EPS        eps                         a = 0,      b = 1                         (1.11)
    SCORE      -eps / sigma                a = 0,      b = -1,      scale = sigma    (1.11), (1.15)
    V          alpha eps - sigma x0        a = -sigma, b = alpha
    VELOCITY   alpha' x0 + sigma' eps      a = alpha', b = sigma'                    (1.9), (1.17)
    edm(sd)    (x0 - c_skip x) / c_out     a = sigma / (sd S), b = -alpha sd / S

with `S^2 = sigma^2 + alpha^2 sd^2`. The system is singular only where the network's own target says
nothing about an unknown: EPS and SCORE about x0 where alpha = 0, X0 about eps where sigma = 0. A
concrete time there is an error. If the time is traced, that estimate is NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._bind import bind
from ._calls import call_denoiser, call_network
from ._checks import as_float, as_scalar, check_number, check_that, is_concrete
from ._numerics import SMALLEST_TIME, from_right, inside
from .schedules import coefficients, half_log_snr, half_log_snr_inverse
from .typing import Denoiser, Estimate, Network, Schedule, Time

__all__ = [
    "EPS",
    "SCORE",
    "VELOCITY",
    "X0",
    "Parametrization",
    "V",
    "as_denoiser",
    "at_timesteps",
    "batched",
    "edm_preconditioning",
    "reschedule",
    "score",
    "target",
    "velocity",
]


def _no_preconditioning(schedule, t):
    return 1.0, t


class Parametrization(NamedTuple):
    """What a network predicts, and which inputs it sees.

    `row(schedule, t) -> (a, b, scale)`: `scale * network(c_in x, c_noise)` estimates
    `a x0 + b eps`. `inputs(schedule, t) -> (c_in, c_noise)`: the input scaling and the time
    variable; (1, t) by default.
    """

    row: Callable[[Schedule, Time], tuple]
    inputs: Callable[[Schedule, Time], tuple] = bind(_no_preconditioning)


def _x0(schedule, t):
    return 1.0, 0.0, 1.0


def _eps(schedule, t):
    return 0.0, 1.0, 1.0


def _score(schedule, t):
    return 0.0, -1.0, coefficients(schedule, t).sigma


def _v(schedule, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    return -sigma, alpha, 1.0


def _velocity(schedule, t):
    *_, dalpha, dsigma = coefficients(schedule, t)
    return dalpha, dsigma, 1.0


X0 = Parametrization(bind(_x0))
"""The network predicts the data x0."""
EPS = Parametrization(bind(_eps))
"""The network predicts the noise eps.

Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 11; (1.11).
"""
SCORE = Parametrization(bind(_score))
"""The network predicts the score, -eps / sigma.

Reference: Song et al. 2021 (arXiv 2011.13456); (1.11), (1.15).
"""
V = Parametrization(bind(_v))
"""The network predicts v = alpha eps - sigma x0.

Reference: Salimans and Ho 2022 (arXiv 2202.00512), section 4.
"""
VELOCITY = Parametrization(bind(_velocity))
"""The network predicts the velocity dx_t/dt = alpha' x0 + sigma' eps.

Reference: Lipman et al. 2023 (arXiv 2210.02747); (1.17).
"""


def edm_preconditioning(sigma_data: float | Array = 0.5) -> Parametrization:
    """EDM preconditioning on any path: input and target have unit variance at every time.

    In Karras' sigma, which is `sigma / alpha` here, `D(x) = c_skip x + c_out F(c_in x, c_noise)`.
    On `x = alpha x0 + sigma eps` itself, with `S^2 = sigma^2 + alpha^2 sigma_data^2`:

        c_in = 1/S,                          c_noise = log(sigma / alpha) / 4,
        c_skip = alpha sigma_data^2 / S^2,   c_out = sigma sigma_data / S
        F's target = (sigma x0 / sigma_data - alpha sigma_data eps) / S

    For sigma_data = 1 the target is -v on a variance-preserving path. `c_noise` is infinite where
    alpha or sigma is 0: start the grid where alpha > 0. (No sampler evaluates at its last time if
    sigma = 0 there.)

    Args:
        sigma_data: the standard deviation of the data.

    Returns:
        The parametrization.

    Raises:
        ValueError: if a concrete sigma_data is not positive and finite.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), eq. 7 and Table 1.

    >>> c_in, c_noise = edm_preconditioning(0.5).inputs(edm(80.0), 1 / 80)
    >>> round(float(c_in), 4), float(c_noise)  # Karras' sigma = 1
    (0.8944, -0.0)
    """
    check_number(sigma_data, "sigma_data", low=1e-38)
    return Parametrization(bind(_edm_row, sigma_data), bind(_edm_inputs, sigma_data))


def _edm_row(sigma_data, schedule, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    total = jnp.hypot(sigma, alpha * as_scalar(sigma_data, "sigma_data"))
    return sigma / (sigma_data * total), -alpha * sigma_data / total, 1.0


def _edm_inputs(sigma_data, schedule, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    total = jnp.hypot(sigma, alpha * as_scalar(sigma_data, "sigma_data"))
    return 1 / total, -0.25 * half_log_snr(schedule, t)


def target(
    schedule: Schedule, parametrization: Parametrization, x0: Array, eps: Array, t: Time
) -> Array:
    """The training target of the network: `(a x0 + b eps) / scale`.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        x0: data, of any shape.
        eps: the noise that was added, of the shape of x0.
        t: a scalar time.

    Returns:
        The target, of the shape of x0.

    >>> target(linear(), VELOCITY, jnp.array([1.0]), jnp.array([3.0]), 0.5)  # x1 - x0  (1.17)
    Array([2.], dtype=float32)
    """
    a, b, scale = parametrization.row(schedule, t)
    return (a * x0 + b * eps) / scale


def as_denoiser(network: Network, schedule: Schedule, parametrization: Parametrization) -> Denoiser:
    """The denoiser that a trained network defines.

    Args:
        network: `(x, t) -> out`, of the shape of x: a function, a Flax NNX module,
            `bind(unet, cond=y)` ...
        schedule: the path that it was trained on.
        parametrization: what it predicts: X0, EPS, SCORE, V, VELOCITY or
            `edm_preconditioning(sigma_data)`.

    Returns:
        `denoise(x, t) -> Estimate(x0, eps)`.

    Raises:
        ValueError: if the parametrization is not a `Parametrization`. When the denoiser is called,
            if the network's output is not an array of the shape of x; at a concrete time, also if
            the target says nothing about x0 (EPS and SCORE where alpha = 0) or about eps (X0 where
            sigma = 0).

    >>> def network(x, t):  # for data that are all zero, eps = x / sigma
    ...     return x / t
    >>> as_denoiser(network, linear(), EPS)(jnp.array([0.5]), 0.25)
    Estimate(x0=Array([0.], dtype=float32), eps=Array([2.], dtype=float32))
    """
    check_parametrization(parametrization)
    return bind(_denoise, network, schedule, parametrization)


def check_parametrization(parametrization) -> None:
    """Raises ValueError unless it is a `Parametrization`."""
    if not isinstance(parametrization, Parametrization):
        raise ValueError(
            "parametrization: expected X0, EPS, SCORE, V, VELOCITY or "
            f"edm_preconditioning(sigma_data), as in diffjax.EPS, got {parametrization!r}"
        )


def _denoise(network, schedule, parametrization, x, t):
    from_x, from_out = solve(schedule, parametrization, t)
    unknown = _check_known(t, *from_out)
    # An unknown estimate is NaN, because an infinite one could be clipped to a number.
    from_out = [jnp.where(u, jnp.nan, q) for u, q in zip(unknown, from_out, strict=True)]
    x, out = as_float(x, "x"), output(network, schedule, parametrization, x, t)
    return Estimate(*(p * x + q * out for p, q in zip(from_x, from_out, strict=True)))


def _check_known(t, x0_from_out, eps_from_out):
    """Whether the network says nothing about x0, and about eps; an error at a concrete time."""
    # At t = 0, and where a limit at 0 is evaluated, a huge coefficient of eps is 1 / sigma.
    at_start = jnp.asarray(t) <= SMALLEST_TIME
    unknown = (
        jnp.isinf(x0_from_out),
        jnp.isinf(eps_from_out) | (at_start & (jnp.abs(eps_from_out) > 1e6)),
    )
    check_that(
        lambda x0_unknown, t: ~x0_unknown,
        "t: expected a time with alpha > 0, got t={1}, where alpha = 0 and a network that predicts "
        "the noise says nothing about x0. Start the grid below, as uniform(20, start=0.999) does, "
        "or train X0, V or VELOCITY",
        unknown[0],
        t,
    )
    check_that(
        lambda eps_unknown, t: ~eps_unknown,
        "t: expected a time with sigma > 0, got t={1}, where sigma = 0 and a network that predicts "
        "x0 says nothing about the noise. Stay above, for instance at t=1e-3, or take x0 from the "
        "network itself",
        unknown[1],
        t,
    )
    return unknown


def output(network, schedule, parametrization, x, t):
    """The network's raw output at x_t = x, in at least float32."""
    check_parametrization(parametrization)
    c_in, c_noise = parametrization.inputs(schedule, t)
    out = as_float(call_network(network, c_in * x, c_noise), "network output")
    if is_concrete(c_noise) and not np.all(np.isfinite(c_noise)):
        check_that(
            np.isfinite,
            f"t: expected a time with alpha > 0 and sigma > 0, got t={t}; the network saw the time "
            f"variable {c_noise} and returned {{}}. "
            "Start the grid below, as uniform(20, start=0.999) does",
            out,
        )
    return out


def solve(schedule, parametrization, t):
    """(x0, eps) as from_x * x + from_out * out: the two columns of the inverse matrix.

    It is Cramer's rule, except where `a = 0` or `b = 0`: there the row alone gives eps or x0, which
    avoids 0/0 at an end. The coefficients of an estimate that the network says nothing about are
    infinite.
    """
    alpha, sigma, *_ = coefficients(schedule, t)
    a, b, scale = parametrization.row(schedule, t)
    no_eps, no_x0 = jnp.equal(b, 0), jnp.equal(a, 0)
    det = alpha * b - sigma * a
    det_x0, det_eps = jnp.where(no_eps, a, det), jnp.where(no_x0, b, det)
    x0_from_x, x0_from_out = b / det_x0, jnp.where(no_eps, 1.0, -sigma) / det_x0
    eps_from_x, eps_from_out = -a / det_eps, jnp.where(no_x0, 1.0, alpha) / det_eps
    return (x0_from_x, eps_from_x), (x0_from_out * scale, eps_from_out * scale)


def batched(network: Callable[..., Array]) -> Network:
    """Adapts a network of batches, `(B, ...)` and `(B,)`, to one sample and a scalar time.

    `batched(network)(x, t, cond=c) = network(x[None], t[None], cond=c[None])[0]`. Under `vmap` the
    mapped axis comes before this axis of length 1, so layers that mix the examples of a batch see
    one example. Draw a batch of samples by `vmap` over the sampler: without it, x would be taken
    for one sample.

    Args:
        network: `(xs, ts, **conditions) -> out` of the shape of xs, where everything has a leading
            axis of the same length.

    Returns:
        `(x, t, **conditions) -> out` for one sample, the contract of this library.

    Raises:
        ValueError: when it is called, if the network's output is not an array of the shape of its
            input.

    >>> def network(xs, ts, cond):  # (B, 2), (B,), (B,)
    ...     return xs * ts[:, None] + cond[:, None]
    >>> denoise = as_denoiser(bind(batched(network), cond=jnp.array(1.0)), linear(), X0)
    >>> denoise(jnp.array([2.0, 4.0]), 0.5).x0
    Array([2., 3.], dtype=float32)
    """
    return bind(_batched, network)


def _batched(network, x, t, **conditions):
    x, t, conditions = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (x, t, conditions))
    return call_network(bind(network, **conditions), x, t)[0]


def at_timesteps(network: Callable[..., Array], n: int) -> Network:
    """Adapts a network trained on the n integer timesteps of a DDPM chain to a time in [0, 1].

    Step i of `from_betas(betas)` is t = (i + 1) / n. The network sees the nearest step:
    `at_timesteps(network, n)(x, t) = network(x, max(round(n t) - 1, 0))`.

    Between two steps, that step's noise level differs from that of x. A grid of steps avoids this:
    `jnp.round(n * ts) / n`.

    Args:
        network: `(x, i, **conditions) -> out`, with integer i from 0 to n - 1.
        n: the number of steps of the chain, at least 1.

    Returns:
        `(x, t, **conditions) -> out`.

    Raises:
        ValueError: if n < 1.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), algorithm 1, whose t from 1 to n is i + 1.

    >>> network = at_timesteps(lambda x, i: 0 * x + i, 1000)
    >>> [float(network(jnp.zeros(()), t)) for t in (1.0, 0.5, 0.001)]
    [999.0, 499.0, 0.0]
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 step, got {n}")
    return bind(_at_timesteps, network, n)


def _at_timesteps(network, n, x, t, **conditions):
    step = jnp.maximum(jnp.round(n * jnp.asarray(t)).astype(int) - 1, 0)
    return call_network(bind(network, **conditions), x, step)


def score(denoise: Denoiser, schedule: Schedule, x: Array, t: Time) -> Array:
    """The score of the marginal, `grad log p(x_t) = -E[eps | x_t] / sigma` (1.11).

    Args:
        denoise: a denoiser.
        schedule: its path.
        x: one sample, or a batch that shares the time.
        t: a scalar time. At t = 0 the limit from the right is taken, at t = 1 that from the left.

    Returns:
        The score, of the shape of x, in units of 1/x.

    Reference: Song et al. 2021 (arXiv 2011.13456), section 3.2, with Tweedie's formula; (1.11).

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear_vp())
    >>> score(denoise, linear_vp(), jnp.array([3.0]), 0.5).round(4)
    Array([-3.], dtype=float32)
    """
    t = inside(t)
    return -call_denoiser(denoise, x, t).eps / coefficients(schedule, t).sigma


def velocity(denoise: Denoiser, schedule: Schedule, x: Array, t: Time) -> Array:
    """The velocity of the probability-flow ODE in increasing t (1.18).

    `dx/dt = alpha' E[x0 | x_t] + sigma' E[eps | x_t]` equals `f x - g^2 score / 2` (1.9), (1.10),
    but is regular where f and g^2 are infinite.

    Args:
        denoise: a denoiser.
        schedule: its path.
        x: one sample, or a batch that shares the time.
        t: a scalar time; at t = 0 the limit from the right is taken. (On a VP path the velocity
            is infinite there, unless the denoiser's eps vanishes, as in the closed forms.)

    Returns:
        dx/dt, of the shape of x.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 13; Lipman et al. 2023 (arXiv 2210.02747),
    eq. 8.

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear_vp())
    >>> velocity(denoise, linear_vp(), jnp.array([3.0]), 0.5).round(4)
    Array([0.], dtype=float32)
    """
    t = from_right(t)
    *_, dalpha, dsigma = coefficients(schedule, t)
    x0, eps = call_denoiser(denoise, x, t)
    return dalpha * x0 + dsigma * eps


def reschedule(denoise: Denoiser, trained_on: Schedule, sample_with: Schedule) -> Denoiser:
    """Adapts a denoiser trained on one path to another path.

    It is evaluated at the time of equal log-SNR, on x rescaled to match. At equal `sigma / alpha`
    the noisy data of two paths differ only by a factor, so both posterior means agree.

    Args:
        denoise: a denoiser for `trained_on`.
        trained_on: the path of the denoiser.
        sample_with: the path to use it on. Where its log-SNR leaves the range of `trained_on`, the
            nearer end is used.

    Returns:
        A denoiser for `sample_with`.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), appendix C.

    >>> mean, cov, x = jnp.zeros(1), jnp.eye(1), jnp.array([2.0])
    >>> denoise = reschedule(gaussian(mean, cov, linear_vp()), linear_vp(), linear())
    >>> denoise(x, 0.5).x0.round(4), gaussian(mean, cov, linear())(x, 0.5).x0.round(4)
    (Array([2.], dtype=float32), Array([2.], dtype=float32))
    """
    return bind(_rescheduled, denoise, trained_on, sample_with)


def _rescheduled(denoise, trained_on, sample_with, x, t):
    t_trained = half_log_snr_inverse(trained_on, half_log_snr(sample_with, t))
    alpha, sigma, *_ = coefficients(sample_with, t)
    alpha_trained, sigma_trained, *_ = coefficients(trained_on, t_trained)
    x = x * jnp.hypot(alpha_trained, sigma_trained) / jnp.hypot(alpha, sigma)
    return call_denoiser(denoise, x, t_trained)
