"""Singlestep DPM-Solver: intermediate evaluations at freely chosen places within a step.

The rows of Fig. 1.4 give the times and the weights w of the stages, which `_singlestep` runs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._checks import check_number, check_that
from .._numerics import phis
from .._varying import stack, zeros_of
from ..schedules import half_log_snr_inverse
from ..typing import Denoiser, Sampler, Schedule
from ._interpolation import places, predict_eps, predict_x0
from ._sample import one_step
from ._singlestep import Stages, run_stages

__all__ = ["dpm_solver_2", "dpm_solver_2s", "dpm_solver_3"]


def _stages(schedule, t, s, ratios):
    """Returns h, the targets, and a function from the weights w to `Stages`.

    The targets are the places at `lambda_t + r h`, followed by s. If h is infinite, all of them but
    s are t.
    """
    t, s = places(schedule, t, s)
    h = s.half_log_snr - t.half_log_snr
    finite = jnp.isfinite(h)
    start, h = jnp.where(finite, t.half_log_snr, 0.0), jnp.where(finite, h, 1.0)
    ratios = stack([jnp.asarray(r, h.dtype) for r in ratios])
    inner = jax.vmap(lambda r: half_log_snr_inverse(schedule, start + r * h))(ratios)
    targets = [*places(schedule, *jnp.where(finite, inner, t.t)), s]

    def stages(weights):
        times = stack([place.t for place in (t, *targets[:-1])])
        weights = jnp.where(finite, stack([zeros_of(h), *weights]), 0.0)
        return Stages(times, jax.tree.map(lambda *leaves: stack(leaves), *targets), weights)

    return h, targets, stages


def stages_1(schedule, t, s):
    """The stage of DPM-Solver-1 (1.56)."""
    (target,) = places(schedule, s)
    return jax.tree.map(lambda a: jnp.asarray(a)[None], Stages(t, target, zeros_of(t)))


def stages_2(schedule, t, s, r1=0.5):
    """The stages of DPM-Solver-2 (Fig. 1.4)."""
    h, (_, s), stages = _stages(schedule, t, s, (r1,))
    return stages([-s.sigma * jnp.expm1(h) / (2 * r1)])


def stages_2s(schedule, t, s, r1=0.5):
    """The stages of DPM-Solver++(2S)."""
    h, (_, s), stages = _stages(schedule, t, s, (r1,))
    return stages([-s.alpha * jnp.expm1(-h) / (2 * r1)])


def stages_3(schedule, t, s, r1=1 / 3, r2=2 / 3):
    """The stages of DPM-Solver-3 (Fig. 1.4)."""
    h, (_, u2, s), stages = _stages(schedule, t, s, (r1, r2))
    _, phi_2 = phis(2, jnp.stack([r2 * h, h]))
    return stages([-u2.sigma * r2 / r1 * r2 * h * phi_2[0], -s.sigma / r2 * h * phi_2[1]])


def _singlestep(denoise, schedule, predict, make_stages, ratios, key, x, t, s):
    t, s = jnp.asarray(t), jnp.asarray(s)
    return run_stages(denoise, predict, x, make_stages(schedule, t, s, *ratios))[0][0]


def dpm_solver_2(denoise: Denoiser, schedule: Schedule, r1: float | Array = 0.5) -> Sampler:
    """DPM-Solver-2: noise prediction with one intermediate time, at `lambda_t + r1 h`.

    `u = alpha_r / alpha_t x - sigma_r (e^(r1 h) - 1) eps`,
    `x_s = alpha_s / alpha_t x - sigma_s (e^h - 1) (eps + (eps_u - eps) / (2 r1))` (Fig. 1.4).
    Second order; 2 evaluations per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works. A step to or from an infinite log-SNR is DDIM.
        r1: where the intermediate time lies, in (0, 1].

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete r1 outside (0, 1].

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), algorithms 1 and 4; Fig. 1.4, (1.55).

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_2(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 20)).round(1)
    Array([0.5], dtype=float32)
    """
    _check_ratios(r1)
    return one_step(bind(_singlestep, denoise, schedule, predict_eps, stages_2, (r1,)))


def dpm_solver_2s(denoise: Denoiser, schedule: Schedule, r1: float | Array = 0.5) -> Sampler:
    """DPM-Solver++(2S): data prediction with one intermediate time, at `lambda_t + r1 h`.

    `u = sigma_r / sigma_t x + alpha_r (1 - e^(-r1 h)) x0`,
    `x_s = sigma_s / sigma_t x + alpha_s (1 - e^-h) (x0 + (x0_u - x0) / (2 r1))`.
    Second order; 2 evaluations per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works. A step to or from an infinite log-SNR is DDIM.
        r1: where the intermediate time lies, in (0, 1].

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete r1 outside (0, 1].

    Reference: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 1.

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_2s(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 20)).round(1)
    Array([0.5], dtype=float32)
    """
    _check_ratios(r1)
    return one_step(bind(_singlestep, denoise, schedule, predict_x0, stages_2s, (r1,)))


def dpm_solver_3(
    denoise: Denoiser, schedule: Schedule, r1: float | Array = 1 / 3, r2: float | Array = 2 / 3
) -> Sampler:
    """DPM-Solver-3: noise prediction with two intermediate times.

    With u1 as in `dpm_solver_2`, `D1 = eps_u1 - eps` and `D2 = eps_u2 - eps` (Fig. 1.4):

        u2 = alpha_r2 / alpha_t x - sigma_r2 (e^(r2 h) - 1) eps
             - sigma_r2 (r2 / r1) ((e^(r2 h) - 1) / (r2 h) - 1) D1
        x_s = alpha_s / alpha_t x - sigma_s (e^h - 1) eps - (sigma_s / r2) ((e^h - 1) / h - 1) D2

    Third order; 3 evaluations per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works. A step to or from an infinite log-SNR is DDIM.
        r1: where the first intermediate time lies, in (0, 1]. Third order needs r2 = 2/3.
        r2: where the second one lies, in (r1, 1].

    Returns:
        The sampler.

    Raises:
        ValueError: for concrete ratios outside (0, 1], or r2 <= r1.

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), algorithms 2 and 5; Fig. 1.4, (1.55).

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_3(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 10)).round(2)
    Array([0.5], dtype=float32)
    """
    _check_ratios(r1, r2)
    return one_step(bind(_singlestep, denoise, schedule, predict_eps, stages_3, (r1, r2)))


def _check_ratios(*ratios):
    for i, r in enumerate(ratios):
        check_number(r, f"r{i + 1}", 0, 1)
        check_that(lambda r: r > 0, f"r{i + 1}: expected a number in (0, 1], got {{}}", r)
    if len(ratios) == 2:
        check_that(lambda a, b: a < b, "r1, r2: expected r1 < r2, got r1={}, r2={}", *ratios)
