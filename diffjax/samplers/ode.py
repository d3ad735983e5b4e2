"""Classical solvers of the probability-flow ODE in the time of the path: Euler and Heun.

They evaluate the velocity itself, and never at sigma = 0.
"""

import jax.numpy as jnp

from .._bind import bind
from .._varying import stack, varying_scan, zeros_of
from ..parametrizations import velocity
from ..schedules import alpha_sigma
from ..typing import Denoiser, Sampler, Schedule
from ._sample import one_step

__all__ = ["euler", "heun"]


def euler(denoise: Denoiser, schedule: Schedule) -> Sampler:
    """Euler's method: `x_s = x + (s - t) v(x, t)`. First order; 1 evaluation per step.

    On the linear path it is DDIM and the sampler of rectified flow.

    Args:
        denoise: the denoiser.
        schedule: its path.

    Returns:
        The sampler.

    Reference: Liu et al. 2023 (rectified flow, arXiv 2209.03003), section 2.1; (1.18).

    >>> sampler = euler(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> sampler.step(None, sampler.init(jnp.array([1.0]), 1.0), 1.0, 0.5).x
    Array([2.], dtype=float32)
    """
    return one_step(bind(_euler, denoise, schedule))


def _euler(denoise, schedule, key, x, t, s):
    return x + (s - t) * velocity(denoise, schedule, x, t)


def heun(denoise: Denoiser, schedule: Schedule) -> Sampler:
    """Heun's method, the explicit trapezoidal rule. Second order; 2 evaluations per step.

    `x' = x + (s - t) v(x, t)`, `x_s = x + (s - t) (v(x, t) + v(x', s)) / 2`. A step to sigma = 0,
    where the velocity of most networks is undefined, is Euler's: `x_s = x'`.

    Args:
        denoise: the denoiser.
        schedule: its path.

    Returns:
        The sampler.

    Reference: Hairer, Nørsett and Wanner 1993, section II.1; Karras et al. 2022 (EDM, arXiv
    2206.00364), algorithm 1, for the step to sigma = 0; (1.18).

    >>> sampler = heun(gaussian(jnp.array([3.0]), jnp.zeros((1, 1)), linear()), linear())
    >>> sampler.step(None, sampler.init(jnp.array([1.0]), 1.0), 1.0, 0.5).x
    Array([2.], dtype=float32)
    """
    return one_step(bind(_heun, denoise, schedule))


def _heun(denoise, schedule, key, x, t, s):
    noisy = alpha_sigma(schedule, s)[1] > 0
    times = stack([t, jnp.where(noisy, s, t)])
    weights = stack([s - t, jnp.where(noisy, 0.5 * (s - t), 0.0)])

    def stage(carry, inputs):  # a scan, so that a compiled sampler holds the network once
        x, before = carry
        time, weight = inputs
        v = velocity(denoise, schedule, x, time)
        return (x + weight * (v - before), v), None

    (x, _), _ = varying_scan(stage, (x, zeros_of(x)), (times, weights))
    return x
