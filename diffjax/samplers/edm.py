"""Karras' sampler on any path: Heun's method in sigma / alpha, with churn."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._checks import as_scalar, check_number
from .._numerics import safe_sqrt
from .._varying import stack, zeros_of
from ..schedules import alpha_sigma, coefficients, half_log_snr_inverse
from ..typing import Denoiser, Sampler, Schedule
from ._interpolation import Place, predict_eps
from ._sample import one_step
from ._singlestep import Stages, run_stages

__all__ = ["edm_sampler"]


def edm_sampler(
    denoise: Denoiser,
    schedule: Schedule,
    churn: float | Array | None = None,
    noise_min: float | Array = 0.0,
    noise_max: float | Array = jnp.inf,
    noise_scale: float | Array = 1.0,
) -> Sampler:
    """EDM's sampler: raises the noise level a little (churn), then takes one Heun step of the ODE.

    In Karras' coordinates, `y = x / alpha` and `s = sigma / alpha`, the ODE is `dy/ds = eps`. One
    step from s_i to s_{i+1} is

        s' = s_i (1 + churn) if noise_min <= s_i <= noise_max else s_i
        y' = y_i + sqrt(s'^2 - s_i^2) noise_scale z,  z ~ N(0, I)
        Euler:  y = y' + (s_{i+1} - s') eps(y', s')
        Heun:   y = y' + (s_{i+1} - s') (eps(y', s') + eps(y, s_{i+1})) / 2

    A step from alpha = 0 (s' infinite) or to sigma = 0 (s_{i+1} = 0) leaves out Heun and is DDIM.
    Second order; 2 evaluations per step. Take the grid `karras(schedule, n)`. The noise level is
    never raised above the largest one of the path.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        churn: Karras' gamma, `min(S_churn / n, sqrt(2) - 1)`. None draws no noise.
        noise_min: Karras' S_tmin, in units of sigma / alpha.
        noise_max: Karras' S_tmax, in the same units.
        noise_scale: Karras' S_noise.

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete churn or noise_scale that is negative or not finite.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), algorithm 2 (algorithm 1 without churn).

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), edm(80.0))
    >>> x1 = sample_prior(jax.random.key(1), edm(80.0), (1000, 1))
    >>> sampler = edm_sampler(denoise, edm(80.0), churn=0.2)
    >>> x0 = sample(jax.random.key(0), sampler, x1, karras(edm(80.0), 20))
    >>> 0.9 < float(x0.std()) < 1.1
    True
    """
    check_number(noise_scale, "noise_scale", 0)
    if churn is None:
        return one_step(bind(_heun_step, denoise, schedule))
    check_number(churn, "churn", 0)
    churned = bind(_churned_step, denoise, schedule, churn, noise_min, noise_max, noise_scale)
    return one_step(churned)


def _heun_step(denoise, schedule, key, x, t, s):
    """Euler in sigma / alpha is DDIM; the second stage adds half the difference of the two eps."""
    alpha_t, sigma_t = alpha_sigma(schedule, t)
    alpha_s, sigma_s = alpha_sigma(schedule, s)
    second_order = (sigma_s > 0) & (alpha_t > 0)
    half_step = 0.5 * (sigma_s - alpha_s * sigma_t / jnp.where(second_order, alpha_t, 1.0))
    targets = Place(*(stack([a, a]) for a in (s, alpha_s, sigma_s, zeros_of(sigma_s))))
    weights = stack([zeros_of(half_step), jnp.where(second_order, half_step, 0.0)])
    stages = Stages(stack([t, jnp.where(second_order, s, t)]), targets, weights)
    return run_stages(denoise, predict_eps, x, stages)[0][0]


def _churned_step(denoise, schedule, churn, noise_min, noise_max, noise_scale, key, x, t, s):
    alpha, sigma, *_ = coefficients(schedule, t)
    noise_only = alpha == 0
    level = jnp.where(noise_only, jnp.inf, sigma / jnp.where(noise_only, 1.0, alpha))
    in_range = (noise_min <= level) & (level <= noise_max)
    raised = jnp.where(in_range, (1 + as_scalar(churn, "churn")) * level, level)
    t_raised = jnp.where(raised > level, half_log_snr_inverse(schedule, -jnp.log(raised)), t)
    alpha_raised, sigma_raised, *_ = coefficients(schedule, t_raised)
    kept = jnp.where(noise_only, 1.0, alpha_raised / jnp.where(noise_only, 1.0, alpha))
    added_square = (sigma_raised - kept * sigma) * (sigma_raised + kept * sigma)
    added = safe_sqrt(jnp.maximum(added_square, 0.0))
    z = as_scalar(noise_scale, "noise_scale") * jax.random.normal(key, x.shape, x.dtype)
    return _heun_step(denoise, schedule, None, kept * x + added * z, t_raised, s)
