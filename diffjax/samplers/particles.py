"""Samplers of interacting particles: weights correct what guidance gets wrong.

x has a leading axis of particles, and the sampler's memory holds their weights. Read it with
`samplers.final_state`, and draw equally weighted particles with `resample`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._calls import call_denoiser, reuse
from .._checks import as_scalar, check_number, check_that
from .._varying import zeros_of
from ..guidance._moves import tweedie_gain
from ..guidance._together import together
from ..process import posterior
from ..schedules import alpha_sigma, diffusion_squared
from ..typing import Denoiser, Sampler, Schedule, State, Time
from .kernels import euler_maruyama_kernel

__all__ = [
    "Particles",
    "effective_sample_size",
    "log_evidence",
    "resample",
    "tilted_cfg",
    "twisted",
]


class Particles(NamedTuple):
    """The memory of a sampler of particles."""

    log_weights: Float[Array, " p"]
    """The logarithms of the unnormalized weights, whose mean estimates the evidence."""
    other: Any = ()
    """What else the method remembers of each particle."""


def log_evidence(state: State) -> Float[Array, ""]:
    """The logarithm of the estimated evidence: of the mean of the weights.

    The mean itself, not its logarithm, is an unbiased estimate of the evidence under the discrete
    chain of the grid.

    Args:
        state: the state of a sampler of particles, such as `final_state(...)`.

    Returns:
        The log evidence in nats, a scalar.

    Raises:
        ValueError: if all concrete weights are 0, or one is NaN.

    >>> state = State(jnp.zeros(2), Particles(jnp.log(jnp.array([0.1, 0.3]))))
    >>> jnp.exp(log_evidence(state)).round(3)
    Array(0.2, dtype=float32)
    """
    return _log_mean(_weights_of(state))


def _weights_of(state):
    log_weights = state.memory.log_weights
    check_that(
        lambda log_weights: np.isfinite(log_weights).any() & ~np.isnan(log_weights).any(),
        "log_weights: expected numbers, and at least one that is not -inf, got {}. "
        "The twist is 0 or NaN at every particle",
        log_weights,
    )
    return log_weights


def _log_mean(log_weights):
    return jax.nn.logsumexp(log_weights) - jnp.log(len(log_weights))


def effective_sample_size(state: State) -> Float[Array, ""]:
    """The effective number of weighted particles, `(sum_i w_i)^2 / sum_i w_i^2`.

    Args:
        state: the state of a sampler of particles, such as `final_state(...)`.

    Returns:
        A number from 1 (one particle has all the weight) to p (all weights are equal).

    Raises:
        ValueError: if all concrete weights are 0, or one is NaN.

    Reference: Doucet and Johansen 2009 (A tutorial on particle filtering and smoothing).

    >>> state = State(jnp.zeros(3), Particles(jnp.log(jnp.array([0.5, 0.5, 0.0]))))
    >>> effective_sample_size(state)
    Array(2., dtype=float32)
    """
    return 1 / jnp.sum(jax.nn.softmax(_weights_of(state)) ** 2)


def resample(key: PRNGKeyArray, state: State) -> Float[Array, "p *x"]:
    """Draws as many equally weighted particles as there are, by systematic resampling.

    A particle of normalized weight w is drawn floor(p w) or ceil(p w) times.

    Args:
        key: a PRNG key.
        state: the state of a sampler of particles, such as `final_state(...)`.

    Returns:
        The particles, of the shape of `state.x`.

    Raises:
        ValueError: if all concrete weights are 0, or one is NaN.

    Reference: Doucet and Johansen 2009 (A tutorial on particle filtering and smoothing).

    >>> state = State(jnp.arange(4.0), Particles(jnp.log(jnp.array([0.0, 0.5, 0.5, 0.0]))))
    >>> resample(jax.random.key(0), state)
    Array([1., 1., 2., 2.], dtype=float32)
    """
    return state.x[_systematic(key, _weights_of(state))]


def _systematic(key, log_weights):
    n, edges = len(log_weights), jnp.cumsum(jax.nn.softmax(log_weights))
    points = (jnp.arange(n) + jax.random.uniform(key, dtype=edges.dtype)) / n
    return jnp.minimum(
        jnp.searchsorted(edges, points * edges[-1], side="right", method="sort"), n - 1
    )


def _redrawn(key, state, threshold):
    """Draws the particles anew where their effective number is below threshold times their number.

    Then each has the mean of the weights.
    """
    log_weights = state.memory.log_weights
    n = len(log_weights)
    poor = effective_sample_size(state) < as_scalar(threshold, "threshold") * n
    chosen = jnp.where(poor, _systematic(key, log_weights), jnp.arange(n))
    equal = jnp.broadcast_to(_log_mean(log_weights), (n,))
    state = jax.tree.map(lambda leaf: leaf[chosen], state)
    weights = jnp.where(poor, equal, log_weights)
    return State(state.x, state.memory._replace(log_weights=weights))


def twisted(
    denoise: Denoiser,
    schedule: Schedule,
    log_twist: Callable[[Array, Time], Array],
    threshold: float | Array = 0.5,
) -> Sampler:
    """Twisted sequential Monte Carlo: ancestral DDPM under a likelihood, corrected by weights.

    A particle steps by the kernel p of `ddpm` with its mean guided by the gradient of the twist,
    q, and its weight is multiplied by

        p(x_s | x_t) / q(x_s | x_t)  twist(x_s, s) / twist(x_t, t)

    As the number of particles grows, their law tends to the posterior of the chain of this grid,
    for every twist that is positive wherever the likelihood is. A twist close to the likelihood of
    x_t keeps the weights even. The mean of the weights estimates the evidence without bias
    (`log_evidence`). A particle at which the twist is 0 keeps the weight 0. 1 evaluation of the
    denoiser and 1 of the twist with its gradient per step.

    Args:
        denoise: the denoiser of the prior.
        schedule: its path.
        log_twist: `log_twist(x, t)` of one particle, an approximation of `log p(y | x_t = x)`; at
            the last time it must be the log likelihood itself. `guidance.tweedie_twist` makes one.
        threshold: the particles are drawn anew where the effective sample size is below this share
            of their number: 0 never draws anew, above 1 always.

    Returns:
        The sampler, for x of shape (p, *event): p particles.

    Raises:
        ValueError: if a concrete threshold is negative; at the first step, if x has no axis of
            particles, or log_twist does not return a scalar for one particle.

    Reference: Wu et al. 2023 (TDS, arXiv 2306.17775).

    >>> prior = gaussian(jnp.zeros(1), jnp.eye(1), linear())
    >>> twist = tweedie_twist(prior, linear(), lambda x: x, jnp.ones(1), 0.5)
    >>> x = jax.random.normal(jax.random.key(0), (1000, 1))
    >>> ts = uniform(50, start=0.999)
    >>> state = final_state(jax.random.key(1), twisted(prior, linear(), twist), x, ts)
    >>> x0 = resample(jax.random.key(2), state)
    >>> bool(abs(x0.mean() - 0.8) < 0.05), bool(abs(x0.var() - 0.2) < 0.03)
    (True, True)
    """
    check_number(threshold, "threshold", 0)
    return Sampler(
        bind(_twisted_start, log_twist),
        bind(_twisted_step, denoise, schedule, log_twist, threshold),
    )


def _twist(log_twist, x, t):
    """The twist of every particle, and its gradient."""

    def one(x):
        value = log_twist(x, t)
        if jnp.shape(value):
            raise ValueError(
                f"log_twist: expected a scalar for one particle of shape {x.shape}, got shape "
                f"{jnp.shape(value)}"
            )
        return value

    return jax.vmap(jax.value_and_grad(one))(x)


def _check_particles(x):
    if x.ndim < 2:
        raise ValueError(f"x: expected shape (p, *event) for p particles, got {x.shape}")


def _twisted_start(log_twist, x, t):
    _check_particles(x)
    value, gradient = _twist(log_twist, x, t)
    return State(x, Particles(value, (value, gradient)))


def _twisted_step(denoise, schedule, log_twist, threshold, key, state, t, s):
    keys = jax.random.split(key)
    x, (log_weights, (value, gradient)) = _redrawn(keys[0], state, threshold)
    x_weight, x0_weight, std = posterior(schedule, s, t)
    # Where alpha = 0, x says nothing about the data, and where std = 0, there is no density: the
    # step is not guided.
    gain, noisy = tweedie_gain(*alpha_sigma(schedule, t)), std > 0
    shift = jnp.where(noisy, x0_weight * gain / jnp.where(noisy, std, 1.0), 0.0) * gradient
    z = jax.random.normal(keys[1], x.shape, x.dtype)
    mean = x_weight * x + x0_weight * call_denoiser(denoise, x, t).x0
    x = (mean + std * (z + shift)).astype(x.dtype)
    ratio = -_sum(shift * (z + 0.5 * shift))  # log p(x_s | x_t) - log q(x_s | x_t)
    after, gradient = _twist(log_twist, x, s)
    dead = jnp.isneginf(log_weights)  # value is -inf as well
    gained = ratio + after - jnp.where(dead, 0.0, value)
    log_weights = jnp.where(dead, -jnp.inf, log_weights + gained).astype(log_weights.dtype)
    return State(x, Particles(log_weights, (after, gradient)))


def _sum(x):
    """The sum over the numbers of each particle."""
    return jnp.sum(x, tuple(range(1, x.ndim)))


def tilted_cfg(
    conditional: Denoiser,
    unconditional: Denoiser,
    schedule: Schedule,
    scale: float | Array,
    threshold: float | Array = 0.5,
) -> Sampler:
    """Classifier-free guidance with the weights that make it exact.

    Particles of the reverse SDE under `cfg` of scale w do not follow the density that is
    proportional to `p(x | c)^w p(x)^(1 - w)`, at any noise level. With the weights

        d log W = g^2 / 2  w (w - 1) |score_c - score_u|^2 dt        (time running backward)

    they do, as steps get short. Euler-Maruyama; 1 evaluation of both denoisers per step.

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition.
        schedule: the path.
        scale: w, a scalar; 0 and 1 need no weights.
        threshold: as for `twisted`.

    Returns:
        The sampler, for x of shape (p, *event): p particles.

    Raises:
        ValueError: if a concrete threshold is negative or the scale is a function; at the first
            step, if x has no axis of particles or the scale is not a scalar.

    Reference: Skreta et al. 2025 (Feynman-Kac correctors, arXiv 2503.02819).

    >>> towards = lambda mean, var: gaussian(jnp.array([mean]), var * jnp.eye(1), linear_vp())
    >>> sampler = tilted_cfg(towards(1.0, 0.25), towards(0.0, 1.0), linear_vp(), 3.0)
    >>> x, ts = jax.random.normal(jax.random.key(0), (2000, 1)), uniform(200)
    >>> x0 = resample(jax.random.key(2), final_state(jax.random.key(1), sampler, x, ts))
    >>> bool(abs(x0.mean() - 1.2) < 0.05)  # p(x | c)^3 / p(x)^2 = N(1.2, 0.1)
    True
    """
    check_number(threshold, "threshold", 0)
    if callable(scale):
        raise ValueError("scale: expected a number, got a function: the tilt is one density")
    return Sampler(
        bind(_tilted_start),
        bind(_tilted_step, together(conditional, unconditional), schedule, scale, threshold),
    )


def _tilted_start(x, t):
    _check_particles(x)
    return State(x, Particles(_sum(zeros_of(x))))


def _tilted_step(pair, schedule, scale, threshold, key, state, t, s):
    keys = jax.random.split(key)
    scale = as_scalar(scale, "scale")
    x, (log_weights, _) = _redrawn(keys[0], state, threshold)
    c, u = pair(x, t)
    guided = jax.tree.map(lambda c, u: u + scale * (c - u), c, u)
    kernel = euler_maruyama_kernel(bind(reuse, "conditional", guided, x), schedule)
    mean, std = kernel(x, t, s)
    rate = 0.5 * diffusion_squared(schedule, t) / alpha_sigma(schedule, t)[1] ** 2
    gained = rate * scale * (scale - 1) * _sum((c.eps - u.eps) ** 2) * (t - s)
    x = mean + std * jax.random.normal(keys[1], x.shape, x.dtype)
    return State(x.astype(mean.dtype), Particles((log_weights + gained).astype(log_weights.dtype)))
