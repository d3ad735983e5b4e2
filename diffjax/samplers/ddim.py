"""DDIM and ancestral DDPM: steps that reuse the two estimates of a denoiser, regular at both ends of every path."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from .._checks import as_scalar, check_number, is_concrete
from .._numerics import safe_sqrt
from ..process import posterior
from ..schedules.coefficients import alpha_sigma
from ..typing import Denoiser, Estimate, Sampler, Schedule
from ._sample import one_step

__all__ = ["ddim", "ddpm"]


def ddim(denoise: Denoiser, schedule: Schedule, eta: float | Array = 0.0) -> Sampler:
    """DDIM: to the next time with the same estimates of data and noise, part of the noise drawn anew.

    `x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z`, with `c = eta sigma_s sqrt(1 - SNR_t / SNR_s)`, z ~ N(0, I). For
    eta = 0 it is deterministic, exact at every step if the data are one point, and the same as DPM-Solver-1 (1.56); for
    eta = 1 it is ancestral DDPM. First order; 1 evaluation a step.

    Args:
        denoise: the denoiser.
        schedule: its path, any.
        eta: the stochasticity, in [0, 1]. A concrete 0 draws no noise.

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete eta outside [0, 1].

    Reference: Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.

    >>> sampler = ddim(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> sampler.step(None, sampler.init(jnp.array([1.0]), 1.0), 1.0, 0.5).x
    Array([2.], dtype=float32)
    """
    check_number(eta, "eta", 0, 1)
    if is_concrete(eta) and np.all(np.equal(eta, 0)):
        return one_step(bind(_ddim, denoise, schedule))
    return one_step(bind(_ddim_stochastic, denoise, schedule, eta))


def towards(estimate: Estimate, alpha: Array, sigma: Array) -> Array:
    """X at (alpha, sigma) if both estimates stay as they are: the step of DDIM, and DPM-Solver-1 (1.56)."""
    return alpha * estimate.x0 + sigma * estimate.eps


def _ddim(denoise, schedule, key, x, t, s):
    return towards(call_denoiser(denoise, x, t), *alpha_sigma(schedule, s))


def _ddim_stochastic(denoise, schedule, eta, key, x, t, s):
    alpha, sigma = alpha_sigma(schedule, s)
    fresh = as_scalar(eta, "eta") * posterior(schedule, s, t).std
    kept = safe_sqrt(jnp.maximum((sigma - fresh) * (sigma + fresh), 0.0))
    return towards(call_denoiser(denoise, x, t), alpha, kept) + fresh * jax.random.normal(key, x.shape, x.dtype)


def ddpm(denoise: Denoiser, schedule: Schedule) -> Sampler:
    """Ancestral DDPM: a draw of `q(x_s | x_t, x0)` with the estimate in place of x0 (1.29).

    On `from_betas(betas)` with the grid `uniform(len(betas))` it is DDPM itself, with the variance beta-tilde. 1
    evaluation a step.

    Args:
        denoise: the denoiser.
        schedule: its path, any.

    Returns:
        The sampler.

    Reference: Ho et al. 2020 (arXiv 2006.11239), algorithm 2 with eq. 7.

    >>> sampler = ddpm(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> sampler.step(jax.random.key(0), sampler.init(jnp.array([1.0]), 1.0), 1.0, 0.0).x
    Array([3.], dtype=float32)
    """
    return one_step(bind(_ddpm, denoise, schedule))


def _ddpm(denoise, schedule, key, x, t, s):
    x_weight, x0_weight, std = posterior(schedule, s, t)
    return x_weight * x + x0_weight * call_denoiser(denoise, x, t).x0 + std * jax.random.normal(key, x.shape, x.dtype)
