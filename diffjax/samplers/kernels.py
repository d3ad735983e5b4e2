"""Transition kernels `(x, t, s) -> (mean, std)`: the Gaussian that a stochastic step draws from.

A sampler hides its Gaussian. Policy gradients, importance weights and particle methods need it:

    kernel_sampler(kernel)                  x_s = mean + std z,  z ~ N(0, I)
    log_transition(kernel, x, t, y, s)      log N(y; mean, std^2 I)

`ddim` with eta, `ddpm`, `euler_maruyama` and `bridge_sampler` are samplers of such kernels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._bind import bind
from .._calls import call_denoiser
from .._checks import as_scalar, check_number, check_that
from .._numerics import safe_sqrt
from ..dynamics import noise_amplitude, reverse_drift
from ..process import posterior
from ..schedules import diffusion
from ..schedules.coefficients import alpha_sigma, log_ratio
from ..typing import Amplitude, Denoiser, Estimate, Kernel, Sampler, Schedule, Time
from ._sample import one_step

__all__ = [
    "ddim_kernel",
    "ddpm_kernel",
    "euler_maruyama_kernel",
    "kernel_sampler",
    "log_transition",
    "sde_dpm_solver_kernel",
]


def kernel_sampler(kernel: Kernel) -> Sampler:
    """The sampler that draws each step from a kernel: `x_s = mean + std z`, z ~ N(0, I).

    Args:
        kernel: `(x, t, s) -> (mean, std)`.

    Returns:
        The sampler.

    >>> schedule = linear()
    >>> denoise = gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), schedule)
    >>> sampler = kernel_sampler(ddpm_kernel(denoise, schedule))
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform(10))
    Array([3.], dtype=float32)
    """
    return one_step(bind(_draw, kernel))


def _draw(kernel, key, x, t, s):
    mean, std = kernel(x, t, s)
    return mean + std * jax.random.normal(key, x.shape, x.dtype)


def log_transition(kernel: Kernel, x: Array, t: Time, y: Array, s: Time) -> Float[Array, ""]:
    """The log density `log N(y; mean, std^2 I)` of a step from x at time t to y at time s, in nats.

    The sum over the steps of a trajectory is the log density of the chain, without that of its
    start:
    `jax.vmap(functools.partial(log_transition, kernel))(xs[:-1], ts[:-1], xs[1:], ts[1:]).sum()`.

    Args:
        kernel: `(x, t, s) -> (mean, std)`.
        x: one sample at time t, of any shape; vmap for many.
        t: its time, a scalar.
        y: the sample at time s, of the shape of x.
        s: the time of y, s < t.

    Returns:
        The log density, a scalar.

    Raises:
        ValueError: if y has another shape than x, or a concrete std is 0, because a step without
            noise has no density.

    Reference: Black et al. 2024 (DDPO, arXiv 2305.13301), section 4.3, for the chain's policy
    gradient.

    >>> schedule = linear()
    >>> kernel = ddpm_kernel(gaussian(jnp.zeros(2), jnp.eye(2), schedule), schedule)
    >>> mean, std = kernel(jnp.ones(2), 0.8, 0.4)
    >>> log_p = log_transition(kernel, jnp.ones(2), 0.8, mean, 0.4)
    >>> log_p + jnp.log(2 * jnp.pi * std**2)  # d = 2, at the mean
    Array(0., dtype=float32)
    """
    mean, std = kernel(x, t, s)
    if jnp.shape(y) != jnp.shape(mean):
        raise ValueError(f"y: expected the shape of x, {jnp.shape(mean)}, got {jnp.shape(y)}")
    message = (
        "kernel: expected a positive std, got {} from t={} to s={}. "
        "A step without noise has no density: leave it out, or give it noise"
    )
    check_that(lambda std, t, s: std > 0, message, std, t, s)
    return jnp.sum(jax.scipy.stats.norm.logpdf(y, mean, std))


def towards(estimate: Estimate, alpha: Array, sigma: Array) -> Array:
    """The step of DDIM and DPM-Solver-1 to (alpha, sigma), which keeps both estimates (1.56)."""
    return alpha * estimate.x0 + sigma * estimate.eps


def ddim_kernel(denoise: Denoiser, schedule: Schedule, eta: float | Array = 1.0) -> Kernel:
    """DDIM's kernel of stochasticity eta.

    `mean = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps`, `std = eta sigma_s sqrt(1 - SNR_t / SNR_s)`.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        eta: the stochasticity, in [0, 1]: 1 is ancestral DDPM, 0 the deterministic step.

    Returns:
        The kernel.

    Raises:
        ValueError: for a concrete eta outside [0, 1].

    Reference: Song et al. 2021 (DDIM, arXiv 2010.02502), eq. 12 and 16.

    >>> kernel = ddim_kernel(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> mean, std = kernel(jnp.array([1.0]), 1.0, 0.0)
    >>> mean, float(std)
    (Array([3.], dtype=float32), 0.0)
    """
    check_number(eta, "eta", 0, 1)
    return bind(_ddim_kernel, denoise, schedule, eta)


def _ddim_kernel(denoise, schedule, eta, x, t, s):
    alpha, sigma = alpha_sigma(schedule, s)
    std = as_scalar(eta, "eta") * posterior(schedule, s, t).std
    kept = safe_sqrt(jnp.maximum((sigma - std) * (sigma + std), 0.0))
    return towards(call_denoiser(denoise, x, t), alpha, kept), std


def ddpm_kernel(denoise: Denoiser, schedule: Schedule) -> Kernel:
    """Ancestral DDPM's kernel: `q(x_s | x_t, x0)` with the estimate in place of x0 (1.29).

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.

    Returns:
        The kernel.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), algorithm 2 with eq. 7; (1.29).

    >>> kernel = ddpm_kernel(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> mean, std = kernel(jnp.array([1.0]), 1.0, 0.0)
    >>> mean, float(std)
    (Array([3.], dtype=float32), 0.0)
    """
    return bind(_ddpm_kernel, denoise, schedule)


def _ddpm_kernel(denoise, schedule, x, t, s):
    x_weight, x0_weight, std = posterior(schedule, s, t)
    return x_weight * x + x0_weight * call_denoiser(denoise, x, t).x0, std


def euler_maruyama_kernel(
    denoise: Denoiser, schedule: Schedule, amplitude: Amplitude = diffusion
) -> Kernel:
    """Euler-Maruyama's kernel for the reverse SDE of any noise amplitude a (1.19).

    `mean = x + (s - t) (v(x, t) - a^2 score / 2)`, `std = a sqrt(t - s)`.

    Args:
        denoise: the denoiser.
        schedule: its path.
        amplitude: `(schedule, t) -> a`; `diffusion` is g, Anderson's reverse SDE (1.20).

    Returns:
        The kernel.

    Reference: Song et al. 2021 (arXiv 2011.13456), section 4.1; (1.19).

    >>> kernel = euler_maruyama_kernel(gaussian(jnp.zeros(1), jnp.eye(1), linear_vp()), linear_vp())
    >>> mean, std = kernel(jnp.array([1.0]), 0.5, 0.4)  # beta(0.5) = 10.05
    >>> round(float(mean[0]), 4), round(float(std**2), 4)  # 1 - 0.1 beta / 2 and 0.1 beta
    (0.4975, 1.005)
    """
    return bind(_euler_maruyama_kernel, denoise, schedule, amplitude)


def _euler_maruyama_kernel(denoise, schedule, amplitude, x, t, s):
    drift = reverse_drift(denoise, schedule, amplitude, x, t)
    return diffuse(x, drift, noise_amplitude(amplitude, schedule, t), t, s)


def diffuse(x, drift, amplitude, t, s):
    """The mean and the standard deviation of an Euler-Maruyama step."""
    return x + (s - t) * drift, amplitude * jnp.sqrt(t - s)


def sde_dpm_solver_kernel(
    denoise: Denoiser, schedule: Schedule, tau: float | Array = 1.0
) -> Kernel:
    """The first-order kernel of SDE-DPM-Solver++, for the reverse SDE of noise amplitude tau g.

    `mean = sigma_s / sigma_t e^(-tau^2 h) x + alpha_s (1 - e^(-(1 + tau^2) h)) x0` and
    `std = sigma_s sqrt(1 - e^(-2 tau^2 h))`, with h the step in half log-SNR.
    For tau = 1 it is `ddpm_kernel`, for tau = 0 the step of DDIM.

    Args:
        denoise: the denoiser.
        schedule: its path; any path works.
        tau: the noise amplitude in units of g: 1 is Anderson's SDE, 0 the probability flow.

    Returns:
        The kernel.

    Raises:
        ValueError: if a concrete tau is negative or not finite.

    Reference: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), SDE-DPM-Solver++1; Xue et al. 2023
    (SA-Solver, arXiv 2309.05019) for any tau.

    >>> denoise = gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear())
    >>> kernel = sde_dpm_solver_kernel(denoise, linear(), 0.5)
    >>> mean, std = kernel(jnp.array([1.0]), 1.0, 0.0)
    >>> mean, float(std)
    (Array([3.], dtype=float32), 0.0)
    """
    check_number(tau, "tau", 0)
    return bind(_sde_dpm_solver_kernel, denoise, schedule, tau)


def _sde_dpm_solver_kernel(denoise, schedule, tau, x, t, s):
    square = as_scalar(tau, "tau") ** 2
    (alpha_t, sigma_t), (alpha, sigma) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    h = log_ratio(alpha, sigma) - log_ratio(alpha_t, sigma_t)
    # tau^2 h, and 0 for 0 * infinity
    noise = jnp.where(square > 0, square * jnp.where(square > 0, h, 0.0), 0.0)
    x0_weight = -alpha * jnp.expm1(-h - noise)
    mean = sigma / sigma_t * jnp.exp(-noise) * x + x0_weight * call_denoiser(denoise, x, t).x0
    return mean, sigma * safe_sqrt(-jnp.expm1(-2 * noise))
