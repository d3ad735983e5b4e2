"""Inpainting by replacement: any sampler, with the known part drawn anew after every step."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._bind import bind
from .._checks import as_static, broadcasts_to, check_that
from .._varying import varying_scan
from ..process import perturb, transition
from ..typing import Sampler, Schedule, State

__all__ = ["repaint"]


def repaint(
    sampler: Sampler, schedule: Schedule, known: ArrayLike, mask: ArrayLike, resamples: int = 10
) -> Sampler:
    """RePaint: the known part of x is replaced by noisy data after every step.

    `x_s <- mask (alpha_s known + sigma_s z) + (1 - mask) x_s`. It then goes back to time t by the
    forward process and repeats the step, `resamples` times in all, so that the unknown part adapts
    to the known one. With `resamples = 1` it is inpainting by replacement, whose law is far from
    the posterior even for Gaussian data (docs/guidance.md has both in closed form).

    Args:
        sampler: the sampler, such as `ddpm(denoise, schedule)`.
        schedule: its path.
        known: the data, of the shape of x or one that broadcasts to it; where the mask is 0 it is
            unused.
        mask: 1 or True where the data are known, 0 or False elsewhere; likewise.
        resamples: how often each step is taken, at least 1; 10 in the paper.

    Returns:
        The sampler.

    Raises:
        ValueError: if resamples is no integer of at least 1, or a concrete mask has other values
            than 0 and 1; and at the first step, if known or mask does not broadcast to x.

    Reference: Lugmayr et al. 2022 (RePaint, arXiv 2201.09865); Song et al. 2021 (arXiv 2011.13456)
    for replacement.

    >>> denoise = gaussian(jnp.zeros(2), jnp.array([[1.0, 0.9], [0.9, 1.0]]), linear())
    >>> known, mask = jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0])
    >>> sampler = repaint(ddpm(denoise, linear()), linear(), known, mask)
    >>> x0 = sample(jax.random.key(0), sampler, jnp.zeros((1000, 2)), uniform(50))
    >>> float(x0[0, 0]), bool(abs(x0[:, 1].mean() - 1.8) < 0.1)
    (2.0, True)
    """
    known, mask = jnp.asarray(known), jnp.asarray(mask)
    check_that(lambda m: (m == 0) | (m == 1), "mask: expected values 0 and 1, got {}", mask)
    empty = as_static(resamples, "resamples")
    return Sampler(sampler.init, bind(_repaint, sampler, schedule, known, mask, empty))


def _repaint(sampler, schedule, known, mask, empty, key, state, t, s):
    for name, value in (("known", known), ("mask", mask)):
        shape = jnp.shape(value)
        if not broadcasts_to(shape, state.x.shape):
            raise ValueError(
                f"{name}: expected a shape that broadcasts to x, {state.x.shape}, got {shape}"
            )
    known = jnp.broadcast_to(known, state.x.shape).astype(state.x.dtype)
    scale, std = transition(schedule, s, t)

    def again(carry, i):
        x, _ = carry
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        z, back = (jax.random.normal(k, x.shape, x.dtype) for k in keys[1:])
        after = sampler.step(keys[0], State(x, state.memory), t, s)
        x = jnp.where(mask, perturb(schedule, known, z, s), after.x).astype(x.dtype)
        return ((scale * x + std * back).astype(x.dtype), State(x, after.memory)), None

    return varying_scan(again, (state.x, state), jnp.arange(empty.size))[0][1]
