"""Time grids: the n + 1 descending times that a sampler visits in n steps.

A grid is a plain array: `ts[0]` is the time of the prior, and `ts[-1]` the time at which to stop.
Any descending array of times in [0, 1] is a grid. The number of steps determines a shape, so it is
a Python integer. Everything else may be traced.

A sampler works best on a grid whose steps are even in the variable in which it interpolates:

- `dpm_solver_*`, `unipc`, `sa_solver`, `sde_dpm_solver_2m`, `data_adams`, `noise_adams`:
  `uniform_log_snr`
- `velocity_adams`, `deis`: `uniform` on `linear` and `gvp`, `quadratic` on other VP paths,
  `uniform_log_snr` on `ve` and `edm`
- `ddim`: `uniform`, but `uniform_log_snr` on `ve` and `edm`
- `edm_sampler`: `karras`

On another grid a multistep sampler lowers its order where a step is too long. With ten steps or
more it is then no worse than its first-order form, but it gains less than on its best grid.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._bind import bind
from ._checks import check_that, is_concrete
from ._once import once
from ._varying import zeros_of
from .schedules import half_log_snr, half_log_snr_inverse
from .typing import Schedule, Time

__all__ = ["karras", "quadratic", "uniform", "uniform_log_snr"]

_INSIDE = 1e-3  # the distance of the spacing from an end of infinite log-SNR


def uniform(n: int, start: Time = 1.0, end: Time = 0.0) -> Float[Array, " {n}+1"]:
    """Uniform in time: `t_i = start + (end - start) i / n`.

    Good for `ddim`, and for `deis` and `velocity_adams` on `linear` and `gvp`. Its last step is
    long in the log-SNR, in which DPM-Solver, UniPC and SA-Solver interpolate: use `uniform_log_snr`
    for them.

    Args:
        n: the number of steps, at least 1.
        start: the first time, in (0, 1].
        end: the last time, in [0, start).

    Returns:
        n + 1 descending times.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= end < start <= 1.

    >>> uniform(4)
    Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    return _interpolate(n, start, end, lambda t: t, lambda t: t)


def quadratic(n: int, start: Time = 1.0, end: Time = 0.0) -> Float[Array, " {n}+1"]:
    """Uniform in the square root of time, hence finer near the data.

    `t_i = (sqrt(start) + (sqrt(end) - sqrt(start)) i / n)^2`. Good for `deis` and
    `velocity_adams` on variance-preserving paths.

    Args:
        n: the number of steps, at least 1.
        start: the first time, in (0, 1].
        end: the last time, in [0, start).

    Returns:
        n + 1 descending times.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= end < start <= 1.

    Reference: Song et al. 2021 (DDIM, arXiv 2010.02502), appendix D.2.

    >>> quadratic(4)
    Array([1.    , 0.5625, 0.25  , 0.0625, 0.    ], dtype=float32)
    """
    return _interpolate(n, start, end, jnp.sqrt, jnp.square)


def uniform_log_snr(
    schedule: Schedule, n: int, start: Time = 1.0, end: Time = 1e-3
) -> Float[Array, " {n}+1"]:
    """Uniform in the log-SNR (Fig. 1.4).

    `lambda_i = lambda(start) + (lambda(end) - lambda(start)) i / n`. Good for every
    sampler that interpolates in the log-SNR (DPM-Solver, UniPC, SA-Solver, `data_adams`,
    `noise_adams`), and for all samplers on `ve` and `edm`.

    Args:
        schedule: any schedule.
        n: the number of steps, at least 1.
        start: the first time. It must be below 1 if alpha(1) = 0 and the network predicts eps or
            the score.
        end: the last time; 0 for the data themselves. `unipc` should end above 0: where sigma = 0
            its last correction has no weight.

    Returns:
        n + 1 descending times, exactly start and end at the ends. If the log-SNR is infinite at an
        end (at t = 1 with alpha(1) = 0, at t = 0 with sigma(0) = 0), the inner times have the
        log-SNRs of a grid whose end lies 1e-3 inside.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= end < start <= 1, or if the log-SNR
            does not decrease in time.

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), section 3.4.

    >>> [round(float(t), 3) for t in uniform_log_snr(linear_vp(), 4)]
    [1.0, 0.722, 0.305, 0.032, 0.001]
    >>> [round(float(t), 3) for t in uniform_log_snr(linear(), 4, end=0.0)]
    [1.0, 0.969, 0.5, 0.031, 0.0]
    """
    warp = bind(_finite_half_log_snr, schedule)
    _check_log_snr(schedule, start, end, warp(end))
    return _interpolate(n, start, end, warp, bind(half_log_snr_inverse, schedule))


def karras(
    schedule: Schedule, n: int, start: Time = 1.0, end: Time = 1e-3, rho: float | Array = 7.0
) -> Float[Array, " {n}+1"]:
    """Karras' grid: n - 1 steps, uniform in `(sigma / alpha)^(1 / rho)`, and a last one to t = 0.

    Made for `edm_sampler`. Karras' sigma, the noise-to-signal ratio, is `sigma / alpha` here. On
    `edm(80.0)`, `end=0.002 / 80` gives his values.

    Args:
        schedule: any schedule.
        n: the number of steps, at least 2.
        start: the first time. If alpha is 0 there, the next times are those of a grid that starts
            at 1 - 1e-3.
        end: the last time but one, with sigma > 0.
        rho: a larger rho gives a finer grid near the data. Karras takes 7.

    Returns:
        n + 1 descending times, the last one 0.

    Raises:
        ValueError: if n < 2, or concrete times are not 0 <= end < start <= 1, or if the log-SNR
            does not decrease in time or is infinite at `end`.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), eq. 5.

    >>> [round(80 * float(t), 3) for t in karras(edm(80.0), 5, end=0.002 / 80)]
    [80.0, 17.528, 2.515, 0.17, 0.002, 0.0]
    """
    if n < 2:
        raise ValueError(f"n: expected at least 2 steps, got {n}")
    _check_log_snr(schedule, start, end, half_log_snr(schedule, end))
    warp, unwarp = bind(_karras_warp, schedule, rho), bind(_karras_unwarp, schedule, rho)
    ts = _interpolate(n - 1, start, end, warp, unwarp)
    return jnp.concatenate([ts, zeros_of(ts[:1])])


def _karras_warp(schedule, rho, t):
    return jnp.exp(-_finite_half_log_snr(schedule, t) / rho)


def _karras_unwarp(schedule, rho, value):
    return half_log_snr_inverse(schedule, -rho * jnp.log(value))


def _interpolate(n, start, end, warp, unwarp):
    """Returns n + 1 times from start to end, evenly spaced in warp(t)."""
    if n < 1:
        raise ValueError(f"n: expected at least 1 step, got {n}")
    check_that(
        lambda start, end: (0 <= end) & (end < start) & (start <= 1),
        "start, end: expected 0 <= end < start <= 1, got start={}, end={}",
        start,
        end,
    )
    return _evenly_warped(n, jnp.asarray(start, float), jnp.asarray(end, float), warp, unwarp)


@once
def _evenly_warped(n, start, end, warp, unwarp):
    inner = jax.vmap(unwarp)(jnp.linspace(warp(start), warp(end), n + 1)[1:-1])
    return jnp.concatenate([start[None], inner, end[None]])


def _finite_half_log_snr(schedule, t):
    """Half the log-SNR at t, or at the time 1e-3 inside if t is an end where it is infinite."""
    value = half_log_snr(schedule, t)
    inner = jnp.clip(t, _INSIDE, 1 - _INSIDE)
    return half_log_snr(schedule, jnp.where(jnp.isfinite(value), t, inner))


def _check_log_snr(schedule, start, end, end_value):
    if is_concrete(start, end):
        inside = jax.vmap(lambda t: half_log_snr(schedule, t))(jnp.linspace(end, start, 65)[1:-1])
        check_that(
            lambda v: np.diff(v) < 0,
            "schedule: expected a log-SNR that decreases in t, got half log-SNRs {}",
            inside,
        )
    start_value = _finite_half_log_snr(schedule, start)
    for name, t, value in (("start", start, start_value), ("end", end, end_value)):
        expected = f"{name}: expected a time with a finite log-SNR, "
        check_that(jnp.isfinite, f"{expected}got {name}={t} with half the log-SNR {{}}", value)
