"""The differential equations of a path, as functions of (time, x, args) for diffrax.

    forward SDE            dx = f x dt + g dw                                        (1.2)
    probability-flow ODE   dx/dt = f x - g^2 score / 2 = alpha' x0 + sigma' eps      (1.9), (1.18)
    reverse SDE            dx = [f x - (g^2 + a^2) score / 2] dt + a dw,  dt < 0     (1.19)

All three have the marginals p(x_t) of the path, the reverse SDE for *any* noise amplitude a(t).
With a = 0 it is the ODE, and with a = g Anderson's reverse SDE (1.20).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import lineax
import numpy as np
from jaxtyping import Array

from ._bind import bind
from ._calls import call_denoiser
from ._checks import as_scalar, check_that
from ._numerics import from_right
from .parametrizations import velocity
from .schedules import coefficients, diffusion, drift
from .typing import Amplitude, Denoiser, Schedule, Time

__all__ = ["SDE", "forward_sde", "probability_flow", "reverse_sde"]


class SDE(NamedTuple):
    """`dx = drift(t, x, args) dt + diffusion(t, x, args) dw`.

    The two functions are for `diffrax.ODETerm` and `diffrax.ControlTerm`.
    """

    drift: Callable[..., Array]
    diffusion: Callable[..., lineax.AbstractLinearOperator]


def probability_flow(denoise: Denoiser, schedule: Schedule) -> Callable[..., Array]:
    """The right-hand side of the probability-flow ODE, whose flow has the path's marginals (1.18).

    Args:
        denoise: the denoiser.
        schedule: its path.

    Returns:
        `(t, x, args) -> dx/dt`, for `diffrax.ODETerm`.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 13; (1.18).

    >>> import diffrax
    >>> denoise = gaussian(jnp.zeros(1), 4 * jnp.eye(1), linear())
    >>> term = diffrax.ODETerm(probability_flow(denoise, linear()))
    >>> solution = diffrax.diffeqsolve(term, diffrax.Tsit5(), 1.0, 0.0, -0.01, jnp.array([0.5]))
    >>> solution.ys.round(3)  # N(0, 1) -> N(0, 4)
    Array([[1.]], dtype=float32)
    """
    return bind(_probability_flow, denoise, schedule)


def _probability_flow(denoise, schedule, t, x, args):
    return velocity(denoise, schedule, x, t)


def forward_sde(schedule: Schedule) -> SDE:
    """The forward SDE `dx = f x dt + g dw`, from data to prior (1.2).

    Args:
        schedule: any schedule. Where alpha(1) = 0 the coefficients are infinite at t = 1: stop
            before it.

    Returns:
        `SDE(drift, diffusion)`, functions of (t, x, args).

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 5.

    >>> sde = forward_sde(linear_vp(0.1, 20.0))
    >>> sde.drift(0.0, jnp.array([2.0]), None)
    Array([-0.1], dtype=float32)
    """
    return SDE(bind(_forward_drift, schedule), bind(_forward_diffusion, schedule))


def _forward_drift(schedule, t, x, args):
    return drift(schedule, t) * x


def _forward_diffusion(schedule, t, x, args):
    return _isotropic(diffusion(schedule, t), x)


def reverse_sde(denoise: Denoiser, schedule: Schedule, amplitude: Amplitude = diffusion) -> SDE:
    """The reverse SDE of any noise amplitude, in the reversed time tau = 1 - t (1.19), (1.20).

    `dx = -[velocity - a^2 score / 2] dtau + a dw`, from prior to data. It runs forward in its own
    time because diffrax's stochastic Runge-Kutta solvers silently give wrong results when
    integrated backward in time.

    Args:
        denoise: the denoiser.
        schedule: its path.
        amplitude: `(schedule, t) -> a`; `diffusion` gives Anderson's SDE. Any other function of
            time is valid, too: `lambda schedule, t: schedule(t)[1]` is finite at t = 1 on every
            path.

    Returns:
        `SDE(drift, diffusion)`, functions of (tau, x, args).

    Reference: Anderson 1982 (Stochastic Processes and their Applications 12); Song et al. 2021
    (arXiv 2011.13456), eq. 6; Karras et al. 2022 (EDM, arXiv 2206.00364), eq. 6.

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear_vp(0.1, 20.0))
    >>> sde = reverse_sde(denoise, linear_vp(0.1, 20.0))
    >>> sde.drift(1.0, jnp.array([2.0]), None).round(3)  # -(f x - g^2 score) = -beta(0) x / 2
    Array([-0.1], dtype=float32)
    """
    return SDE(
        bind(_reverse_drift, denoise, schedule, amplitude),
        bind(_reverse_diffusion, schedule, amplitude),
    )


def reverse_drift(denoise: Denoiser, schedule: Schedule, amplitude, x: Array, t: Time) -> Array:
    """The drift of (1.19) in increasing t, `velocity - a^2 score / 2`, by one call of denoise."""
    a, t = noise_amplitude(amplitude, schedule, t), from_right(t)
    _, sigma, dalpha, dsigma = coefficients(schedule, t)
    x0, eps = call_denoiser(denoise, x, t)
    return dalpha * x0 + (dsigma + 0.5 * a**2 / sigma) * eps


def noise_amplitude(amplitude: Amplitude, schedule: Schedule, t: Time) -> Array:
    """`amplitude(schedule, t)`, checked to be a finite scalar."""
    if not callable(amplitude):
        raise ValueError(
            f"amplitude: expected a function (schedule, t) -> a, got {amplitude}; "
            "a constant one is lambda schedule, t: 0.5"
        )
    a = as_scalar(amplitude(schedule, t), "amplitude")
    check_that(
        lambda a, t: np.isfinite(a),
        "amplitude: expected a finite number, got {} at t={}. The diffusion g is infinite where "
        "alpha = 0. Start below, as uniform(20, start=0.999) does, or take another amplitude, such "
        "as lambda schedule, t: schedule(t)[1]",
        a,
        t,
    )
    return a


def _reverse_drift(denoise, schedule, amplitude, tau, x, args):
    return -reverse_drift(denoise, schedule, amplitude, x, 1 - tau)


def _reverse_diffusion(schedule, amplitude, tau, x, args):
    return _isotropic(noise_amplitude(amplitude, schedule, 1 - tau), x)


def _isotropic(scale, x):
    return scale * lineax.IdentityLinearOperator(jax.eval_shape(lambda: x))
