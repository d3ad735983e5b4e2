"""Samplers of the reverse SDE of any noise amplitude and of a bridge; Langevin corrections."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser, call_network, reuse
from .._checks import as_scalar, as_static, check_number
from .._varying import varying_scan
from ..schedules import alpha_sigma, diffusion
from ..typing import Amplitude, Denoiser, Kernel, Network, Sampler, Schedule
from ._sample import one_step
from .kernels import ddpm_kernel, diffuse, euler_maruyama_kernel, kernel_sampler

__all__ = ["bridge_sampler", "euler_maruyama", "predictor_corrector"]


def euler_maruyama(
    denoise: Denoiser, schedule: Schedule, amplitude: Amplitude = diffusion
) -> Sampler:
    """Euler-Maruyama for the reverse SDE of any noise amplitude a (1.19).

    `x_s = x + (s - t) (v(x, t) - a^2 score / 2) + a sqrt(t - s) z`, z ~ N(0, I). Weak order 1; 1
    evaluation per step.

    Args:
        denoise: the denoiser.
        schedule: its path. If alpha(1) = 0, g is infinite at t = 1: start the grid below 1, or
            choose another amplitude.
        amplitude: `(schedule, t) -> a`; `diffusion` is g, Anderson's reverse SDE (1.20).

    Returns:
        The sampler.

    Reference: Song et al. 2021 (arXiv 2011.13456), section 4.1; (1.19).

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear_vp())
    >>> sampler = euler_maruyama(denoise, linear_vp())
    >>> x0 = sample(jax.random.key(0), sampler, jnp.zeros((1000, 1)), uniform(500, end=1e-3))
    >>> 0.9 < float(x0.std()) < 1.1
    True
    """
    return kernel_sampler(euler_maruyama_kernel(denoise, schedule, amplitude))


def bridge_sampler(velocity: Network, score: Network, amplitude: float | Array) -> Sampler:
    """Euler-Maruyama for the SDE of a Schrödinger bridge, from any prior to the data.

    `x_s = x + (s - t) (v(x, t) - a^2 score(x, t) / 2) + a sqrt(t - s) z`, z ~ N(0, I) (1.19).
    Velocity and score are separate functions, because for a prior that is not Gaussian neither
    determines the other. Each step evaluates both once. With amplitude 0 it is Euler's method for
    the flow, which has the same marginals.

    Args:
        velocity: `(x, t) -> v`, in increasing t, such as a network trained by
            `losses.bridge_matching`.
        score: `(x, t) -> grad log p_t(x)`.
        amplitude: a, at least 0. That of the bridge gives the paths of the bridge; any other gives
            paths with the same marginals.

    Returns:
        The sampler.

    Raises:
        ValueError: if a concrete amplitude is negative or not finite.

    Reference: Tong et al. 2024 ([SF]2M, arXiv 2307.03672), eq. 6 and algorithm 2; (1.19).

    >>> sampler = bridge_sampler(lambda x, t: jnp.ones_like(x), lambda x, t: -x, 0.0)
    >>> sample(jax.random.key(0), sampler, jnp.array([3.0]), uniform(10)).round(3)
    Array([2.], dtype=float32)
    """
    check_number(amplitude, "amplitude", 0)
    return kernel_sampler(bind(_bridge_kernel, velocity, score, amplitude))


def _bridge_kernel(velocity, score, amplitude, x, t, s):
    amplitude = as_scalar(amplitude, "amplitude")
    v, score_value = call_network(velocity, x, t, "velocity"), call_network(score, x, t, "score")
    return diffuse(x, v - 0.5 * amplitude**2 * score_value, amplitude, t, s)


def predictor_corrector(
    denoise: Denoiser,
    schedule: Schedule,
    predictor: Callable[[Denoiser, Schedule], Kernel] = ddpm_kernel,
    snr: float | Array = 0.16,
    corrections: int = 1,
) -> Sampler:
    """Draws from a kernel, then corrects x by Langevin dynamics at the new time.

    A correction is `x <- x + h score + sqrt(2 h) z`, z ~ N(0, I), with `h = 2 (snr sigma)^2`. That
    is Song's `h = 2 (snr |z| / |score|)^2` with the norms that both have on average, so that a
    sample depends neither on the others of its batch nor on the norm of its own noise. 1 evaluation
    per step, and 1 per correction.

    Args:
        denoise: the denoiser, for the predictor and the corrections.
        schedule: its path.
        predictor: makes the kernel, such as `ddpm_kernel`, `euler_maruyama_kernel` or
            `bind(ddim_kernel, eta=0.5)`. The kernel may evaluate the denoiser only at its own x and
            t.
        snr: the signal-to-noise ratio of a correction, dimensionless.
        corrections: the number of corrections per step, at least 1.

    Returns:
        The sampler.

    Raises:
        ValueError: if a concrete snr is negative or not finite, or corrections < 1; and at the
            first step, if the predictor evaluates the denoiser elsewhere.

    Reference: Song et al. 2021 (arXiv 2011.13456), algorithms 1, 4 and 5.

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear_vp())
    >>> sampler = predictor_corrector(denoise, linear_vp())
    >>> x0 = sample(jax.random.key(0), sampler, jnp.zeros((1000, 1)), uniform(100, end=1e-3))
    >>> 0.9 < float(x0.std()) < 1.1
    True
    """
    check_number(snr, "snr", 0)
    empty = as_static(corrections, "corrections")
    return one_step(bind(_predictor_corrector, denoise, schedule, predictor, snr, empty))


def _predictor_corrector(denoise, schedule, predictor, snr, empty, key, x, t, s):
    sigma, snr = alpha_sigma(schedule, s)[1], as_scalar(snr, "snr")

    def stage(x, i):  # a scan, so that a compiled sampler holds the network once
        first = i == 0
        time = jnp.where(first | (sigma == 0), t, s)  # at sigma = 0, eps may be undefined
        estimate = call_denoiser(denoise, x, time)
        predicted = predictor(bind(reuse, "predictor", estimate, x), schedule)(x, t, s)
        # h score = -2 snr^2 sigma eps and sqrt(2 h) = 2 snr sigma: both vanish at sigma = 0
        corrected = x - 2 * snr**2 * sigma * estimate.eps, 2 * snr * sigma
        mean, std = (jnp.where(first, p, c) for p, c in zip(predicted, corrected, strict=True))
        return mean + std * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype), None

    return varying_scan(stage, x, jnp.arange(1 + empty.size))[0]
