"""Multistep solvers: one evaluation per step, and a memory of the last ones.

Each function names what it interpolates. If a step is too long compared with the distances of its
nodes, every method but `deis` takes a lower order. `diffjax.grids` says on which grids this does
not happen.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_number
from ..typing import Denoiser, Sampler, Schedule
from ._interpolation import (
    bh1,
    bh2,
    data_prediction,
    noise_prediction,
    noise_prediction_in_time,
    velocity_prediction,
)
from ._multistep import multistep

__all__ = [
    "bh1",
    "bh2",
    "data_adams",
    "deis",
    "dpm_solver_2m",
    "dpm_solver_3m",
    "noise_adams",
    "sa_solver",
    "sde_dpm_solver_2m",
    "unipc",
    "velocity_adams",
]


def dpm_solver_2m(denoise: Denoiser, schedule: Schedule) -> Sampler:
    """DPM-Solver++(2M): extrapolates the last two x0 to the middle of the step.

    With `h = lambda_s - lambda_t` and r the ratio of the last h to this one:
    `x_s = sigma_s / sigma_t x + alpha_s (1 - e^-h) ((1 + 1 / (2 r)) x0 - 1 / (2 r) x0_before)`. The
    first step and a step to or from an infinite log-SNR are DDIM. Second order; 1 evaluation per
    step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.

    Returns:
        The sampler.

    Reference: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 2. It is UniP-2 with B2.

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_2m(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 20)).round(1)
    Array([0.5], dtype=float32)
    """
    return multistep(denoise, schedule, data_prediction(bh2), 2)


def dpm_solver_3m(denoise: Denoiser, schedule: Schedule) -> Sampler:
    """DPM-Solver++(3M): a parabola through the last three x0. Third order; 1 evaluation per step.

    `x_s = sigma_s / sigma_t x + alpha_s int_0^h e^(u - h) x0(u) du`, exact for the parabola. (The
    authors' code halves the quadratic term and so loses the third order.) The first step is DDIM,
    the second one `dpm_solver_2m`.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.

    Returns:
        The sampler.

    Reference: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), the Taylor expansion of its eq. 9 to
    the third order.

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_3m(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 20)).round(2)
    Array([0.5], dtype=float32)
    """
    return multistep(denoise, schedule, data_prediction(bh2), 3)


def sde_dpm_solver_2m(denoise: Denoiser, schedule: Schedule, tau: float | Array = 1.0) -> Sampler:
    """SDE-DPM-Solver++(2M): `dpm_solver_2m` for the reverse SDE of noise amplitude tau g.

        x_s = sigma_s / sigma_t e^(-tau^2 h) x + alpha_s (1 - e^(-(1 + tau^2) h)) D
              + sigma_s sqrt(1 - e^(-2 tau^2 h)) z,  z ~ N(0, I)

    with the extrapolated D of `dpm_solver_2m`. With D = x0 and tau = 1 (SDE-DPM-Solver++(1)) it is
    `ddpm`. 1 evaluation per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        tau: the noise amplitude in units of g: 1 is Anderson's SDE, 0 the probability flow (which
            still draws noise).

    Returns:
        The sampler.

    Raises:
        ValueError: if a concrete tau is negative or not finite.

    Reference: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), SDE-DPM-Solver++(2M); Xue et al.
    2023 (SA-Solver, arXiv 2309.05019) for any tau.

    >>> schedule = linear_vp()
    >>> sampler = sde_dpm_solver_2m(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> x0 = sample(jax.random.key(0), sampler, jnp.zeros((1000, 1)), uniform_log_snr(schedule, 20))
    >>> 0.45 < float(x0.std()) < 0.55
    True
    """
    check_number(tau, "tau", 0)
    return multistep(denoise, schedule, data_prediction(bh2, tau), 2, tau)


def sa_solver(
    denoise: Denoiser, schedule: Schedule, order: int = 3, tau: float | Array = 1.0
) -> Sampler:
    """SA-Solver: a stochastic Adams predictor and corrector on x0. 1 evaluation per step.

    The predictor interpolates the last `order` x0; the corrector adds the new one. Both use the
    same noise. Take an even grid: very short steps amplify the noise in the differences.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        order: the number of x0 that the predictor uses, from 1 to 3; its order for tau = 0.
        tau: the noise amplitude in units of g.

    Returns:
        The sampler.

    Raises:
        ValueError: if order is not 1, 2 or 3, or a concrete tau is negative or not finite.

    Reference: Xue et al. 2023 (SA-Solver, arXiv 2309.05019), algorithm 1 with a constant tau.

    >>> schedule = linear_vp()
    >>> sampler = sa_solver(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> x0 = sample(jax.random.key(0), sampler, jnp.zeros((1000, 1)), uniform_log_snr(schedule, 20))
    >>> 0.45 < float(x0.std()) < 0.55
    True
    """
    _check_order(order)
    check_number(tau, "tau", 0)
    return multistep(denoise, schedule, data_prediction(tau=tau), order, tau, corrected=True)


def unipc(denoise: Denoiser, schedule: Schedule, order: int = 3, b=bh2) -> Sampler:
    """UniPC: a predictor (UniP) on x0, and a corrector (UniC) that needs no evaluation of its own.

    Its order is `order + 1`, with 1 evaluation per step. The last step is not corrected, which
    saves one evaluation. If the polynomial has one node, its weight is `B(h) / 2` and not the exact
    integral; with more nodes B cancels.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        order: the order p of UniP-p and UniC-p, from 1 to 3.
        b: `bh2` for B2 = e^h - 1, `bh1` for B1 = h.

    Returns:
        The sampler.

    Raises:
        ValueError: if order is not 1, 2 or 3.

    Reference: Zhao et al. 2023 (UniPC, arXiv 2302.04867), algorithms 1 and 2 in their
    data-prediction form.

    >>> schedule = linear_vp()
    >>> sampler = unipc(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 10)).round(1)
    Array([0.5], dtype=float32)
    """
    _check_order(order)
    return multistep(denoise, schedule, data_prediction(b), order, corrected=True)


def deis(denoise: Denoiser, schedule: Schedule, order: int = 3) -> Sampler:
    """tAB-DEIS: a polynomial in time through the last `order` eps. 1 evaluation per step.

    `x_s = alpha_s / alpha_t x + alpha_s int_t^s eps(u) d(sigma / alpha)(u)`, where a Gauss-Legendre
    rule gives the integral.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        order: the number of eps that it uses, from 1 to 3; 1 is DDIM.

    Returns:
        The sampler.

    Raises:
        ValueError: if order is not 1, 2 or 3.

    Reference: Zhang and Chen 2023 (DEIS, arXiv 2204.13902), eq. 14-15.

    >>> schedule = linear_vp()
    >>> sampler = deis(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), quadratic(20, end=1e-3)).round(2)
    Array([0.5], dtype=float32)
    """
    _check_order(order)
    return multistep(denoise, schedule, noise_prediction_in_time(schedule), order)


def data_adams(denoise: Denoiser, schedule: Schedule, order: int = 3) -> Sampler:
    """Exponential Adams-Bashforth: x0 as a polynomial in the half log-SNR.

    `x_s = sigma_s / sigma_t x + alpha_s int_0^h e^(u - h) x0(u) du`. 1 evaluation per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        order: the number of x0 that it uses, from 1 to 3; 1 is DDIM.

    Returns:
        The sampler.

    Raises:
        ValueError: if order is not 1, 2 or 3.

    Reference: Hochbruck and Ostermann 2010 (Acta Numerica 19), section 2.5; Lu et al. 2022
    (DPM-Solver++, arXiv 2211.01095), eq. 9.

    >>> schedule = linear_vp()
    >>> sampler = data_adams(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 20)).round(2)
    Array([0.5], dtype=float32)
    """
    _check_order(order)
    return multistep(denoise, schedule, data_prediction(), order)


def noise_adams(denoise: Denoiser, schedule: Schedule, order: int = 3) -> Sampler:
    """Exponential Adams-Bashforth: eps as a polynomial in the half log-SNR (1.53), (1.55).

    `x_s = alpha_s / alpha_t x - sigma_s int_0^h e^(h - u) eps(u) du`: the multistep form of
    DPM-Solver. 1 evaluation per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        order: the number of eps that it uses, from 1 to 3; 1 is DDIM.

    Returns:
        The sampler.

    Raises:
        ValueError: if order is not 1, 2 or 3.

    Reference: Zhang and Chen 2023 (DEIS, arXiv 2204.13902), section 3; Lu et al. 2022 (DPM-Solver,
    arXiv 2206.00927), eq. 3.5; (1.53), (1.55).

    >>> schedule = linear_vp()
    >>> sampler = noise_adams(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 40)).round(2)
    Array([0.5], dtype=float32)
    """
    _check_order(order)
    return multistep(denoise, schedule, noise_prediction(), order)


def velocity_adams(
    denoise: Denoiser,
    schedule: Schedule,
    order: int = 3,
    gains: Float[Array, "n {order}-1"] | None = None,
) -> Sampler:
    """Adams-Bashforth on the linear path's velocity eps - x0; regular at both ends of any path.

    With `r = sigma / (alpha + sigma)` and `y = x / (alpha + sigma)`, the probability flow of every
    path is `dy/dr = eps - x0`. 1 evaluation per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        order: the number of velocities that it uses, from 1 to 3; 1 is DDIM.
        gains: factors of the weights of the earlier velocities, one row for each of the n steps of
            the grid. `optimal_grids.fit_grid` can fit them with the grid. Factors of 1 change
            nothing. On a grid of more steps, the last row applies to the rest.

    Returns:
        The sampler.

    Raises:
        ValueError: if order is not 1, 2 or 3, or gains is not a matrix of order - 1 columns.

    Reference: Hairer, Nørsett and Wanner 1993, section III.1, with variable steps; (1.18) on the
    linear path.

    >>> schedule = linear_vp()
    >>> sampler = velocity_adams(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), quadratic(20)).round(2)
    Array([0.5], dtype=float32)
    """
    _check_order(order)
    if gains is not None and (jnp.ndim(gains) != 2 or jnp.shape(gains)[1] != order - 1):
        raise ValueError(
            f"gains: expected shape (n, {order - 1}) for order {order}, got {jnp.shape(gains)}"
        )
    return multistep(denoise, schedule, velocity_prediction(), order, gains=gains)


def _check_order(order):
    if order not in (1, 2, 3):
        raise ValueError(f"order: expected 1, 2 or 3, got {order}")
