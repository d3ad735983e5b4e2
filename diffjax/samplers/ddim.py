"""DDIM and ancestral DDPM, from the estimates of a denoiser; regular at both ends of every path."""

from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from ..schedules import alpha_sigma
from ..typing import Denoiser, Sampler, Schedule
from ._sample import one_step
from .kernels import ddim_kernel, ddpm_kernel, kernel_sampler, towards

__all__ = ["ddim", "ddpm"]


def ddim(denoise: Denoiser, schedule: Schedule, eta: float | Array | None = None) -> Sampler:
    """DDIM: keeps the estimates of data and noise, but draws a part of the noise anew.

    `x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z`, with
    `c = eta sigma_s sqrt(1 - SNR_t / SNR_s)`, z ~ N(0, I). Without eta it draws no noise (c = 0).
    It is then DPM-Solver-1 (1.56), and exact at every step if the data are a single point. With
    eta = 1 it is ancestral DDPM. First order; 1 evaluation per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        eta: the stochasticity, in [0, 1]. None draws no noise; 0 draws it and multiplies it by 0.

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete eta outside [0, 1].

    Reference: Song et al. 2021 (DDIM, arXiv 2010.02502), eq. 12 and 16; (1.56).

    >>> sampler = ddim(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> sampler.step(None, sampler.init(jnp.array([1.0]), 1.0), 1.0, 0.5).x
    Array([2.], dtype=float32)
    """
    if eta is None:
        return one_step(bind(_ddim, denoise, schedule))
    return kernel_sampler(ddim_kernel(denoise, schedule, eta))


def _ddim(denoise, schedule, key, x, t, s):
    return towards(call_denoiser(denoise, x, t), *alpha_sigma(schedule, s))


def ddpm(denoise: Denoiser, schedule: Schedule) -> Sampler:
    """Ancestral DDPM: a draw of `q(x_s | x_t, x0)` with the estimate in place of x0 (1.29).

    On `from_betas(betas)` with the grid `uniform(len(betas))` it is DDPM itself, with the variance
    beta-tilde. 1 evaluation per step.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.

    Returns:
        The sampler.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), algorithm 2 with eq. 7; (1.29).

    >>> sampler = ddpm(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> sampler.step(jax.random.key(0), sampler.init(jnp.array([1.0]), 1.0), 1.0, 0.0).x
    Array([3.], dtype=float32)
    """
    return kernel_sampler(ddpm_kernel(denoise, schedule))
