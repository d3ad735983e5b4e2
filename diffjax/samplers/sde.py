"""Samplers of the reverse SDE at any noise amplitude, and of a bridge; Langevin corrections of any sampler."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser, call_network
from .._checks import as_scalar, check_number
from ..schedules import coefficients, diffusion
from ..typing import Amplitude, Denoiser, Network, Sampler, Schedule
from .kernels import diffuse, euler_maruyama_kernel, kernel_sampler

__all__ = ["bridge_sampler", "euler_maruyama", "predictor_corrector"]


def euler_maruyama(denoise: Denoiser, schedule: Schedule, amplitude: Amplitude = diffusion) -> Sampler:
    """Euler-Maruyama for the reverse SDE of any noise amplitude a (1.19).

    `x_s = x + (s - t) (v(x, t) - a^2 score / 2) + a sqrt(t - s) z`, z ~ N(0, I). Weak order 1; 1 evaluation a step.

    Args:
        denoise: the denoiser.
        schedule: its path. On paths with alpha(1) = 0, g is infinite at t = 1: start the grid below, or choose
            another amplitude.
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
    """Euler-Maruyama for the SDE of a Schrodinger bridge, from any prior to the data.

    `x_s = x + (s - t) (v(x, t) - a^2 score(x, t) / 2) + a sqrt(t - s) z`, z ~ N(0, I): (1.19). Velocity and
    score are separate functions, because for a prior that is not Gaussian neither determines the other. 1 evaluation of
    both a step. With amplitude 0 it is Euler's method for the flow, which has the same marginals.

    Args:
        velocity: `(x, t) -> v`, in increasing t, such as a network trained by `losses.bridge_matching`.
        score: `(x, t) -> grad log p_t(x)`.
        amplitude: a, at least 0: that of the bridge for its own paths, any other for other paths of the same marginals.

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
    drift = call_network(velocity, x, t, "velocity") - 0.5 * amplitude**2 * call_network(score, x, t, "score")
    return diffuse(x, drift, amplitude, t, s)


def predictor_corrector(
    predictor: Sampler, denoise: Denoiser, schedule: Schedule, snr: float | Array = 0.16
) -> Sampler:
    """Any sampler, each of its steps followed by a step of Langevin dynamics at the new time.

    `x <- x + h score + sqrt(2 h) z`, z ~ N(0, I), with the step size `h = 2 (snr sigma)^2`. That is Song's
    `2 (snr |z| / |score|)^2` with the norms that both have on average, so that a sample does not depend on the others of
    its batch, nor on its own noise. Wrap twice for two corrections. 1 evaluation a step more than the predictor.

    Args:
        predictor: the sampler to correct, such as `ddpm(denoise, schedule)` or `euler_maruyama(denoise, schedule)`.
        denoise: the denoiser.
        schedule: its path.
        snr: the signal-to-noise ratio of the correction, dimensionless.

    Returns:
        The sampler.

    Raises:
        ValueError: if a concrete snr is negative or not finite.

    Reference: Song et al. 2021 (arXiv 2011.13456), algorithms 1, 4 and 5.

    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), linear_vp())
    >>> sampler = predictor_corrector(ddpm(denoise, linear_vp()), denoise, linear_vp())
    >>> x0 = sample(jax.random.key(0), sampler, jnp.zeros((1000, 1)), uniform(100, end=1e-3))
    >>> 0.9 < float(x0.std()) < 1.1
    True
    """
    check_number(snr, "snr", 0)
    return Sampler(predictor.init, bind(_predictor_corrector, predictor.step, denoise, schedule, snr))


def _predictor_corrector(predict, denoise, schedule, snr, key, state, t, s):
    predict_key, correct_key = jax.random.split(key)
    state = predict(predict_key, state, t, s)
    return state._replace(x=_langevin(denoise, schedule, snr, correct_key, state.x, t, s))


def _langevin(denoise, schedule, snr, key, x, t, s):
    # h score = -2 snr^2 sigma eps and sqrt(2 h) = 2 snr sigma: both vanish at sigma = 0, where eps may have no value
    sigma, snr = coefficients(schedule, s).sigma, as_scalar(snr, "snr")
    eps = call_denoiser(denoise, x, jnp.where(sigma > 0, s, t)).eps
    moved = x + 2 * snr * sigma * (jax.random.normal(key, x.shape, x.dtype) - snr * eps)
    return jnp.where(sigma > 0, moved, x)
