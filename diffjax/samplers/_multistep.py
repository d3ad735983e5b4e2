"""The engine of the multistep methods: their memory, predictor, corrector and noise.

What they interpolate, and with which weights, is in `_interpolation`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._bind import bind
from .._calls import call_denoiser
from .._checks import as_scalar
from .._numerics import safe_sqrt
from .._varying import zeros_of
from ..typing import Denoiser, Sampler, Schedule, State
from ._interpolation import CORRECTOR_LIMITS, Interpolation, differences, log_snr_step, places
from .kernels import towards


class History(NamedTuple):
    """What a multistep method remembers."""

    values: Float[Array, "n *x"]
    """The last predictions, in a ring buffer: the next one is written to index `steps % n`."""
    nodes: Float[Array, " n"]
    """The variable u at each prediction, newest first; infinite where there is none yet."""
    steps: Int[Array, ""]
    """The number of predictions so far."""
    last_step: Any = None
    """For a corrected method: where its last step began, and the weights it used."""


def multistep(
    denoise: Denoiser,
    schedule: Schedule,
    interpolation: Interpolation,
    order: int,
    tau: float | Array | None = None,
    corrected: bool = False,
    gains: Float[Array, "steps {order}-1"] | None = None,
) -> Sampler:
    """The Adams-Bashforth method of an interpolation.

    It uses the last `order` predictions and makes one evaluation per step. With `tau`, it adds the
    noise of the reverse SDE of amplitude tau g. If `corrected`, it improves x once the prediction
    at x is known, by an Adams-Moulton step from the previous time. This needs no other evaluation.
    The rows of `gains` multiply the weights of the steps; a corrected method does not take them.
    """
    if not corrected:
        step = bind(_predictor_step, denoise, schedule, interpolation, tau, gains)
        return Sampler(bind(_start, jnp.zeros(order)), step)
    step = bind(_corrected_step, denoise, schedule, interpolation, tau)
    return Sampler(bind(_corrected_start, schedule, jnp.zeros(order + 1)), step)


def _start(empty, x, t):
    # `empty` has the length of the memory: a shape is static, while a number would be traced
    nodes = jnp.full(empty.shape, jnp.inf, jnp.result_type(t, 1.0))
    values = jnp.broadcast_to(zeros_of(x), (empty.size, *x.shape))
    return State(x, History(values, nodes, jnp.zeros((), jnp.int32)))


def _corrected_start(schedule, empty, x, t):
    (before,) = places(schedule, t)
    weights = jnp.zeros_like(before.t, shape=empty.shape)
    return State(x, _start(empty, x, t).memory._replace(last_step=(before, weights)))


def _predictor_step(denoise, schedule, interpolation, tau, gains, key, state, t, s):
    estimate = call_denoiser(denoise, state.x, t)
    t, s = places(schedule, t, s)
    history = _remember(state.memory, interpolation, estimate, t)
    weights = interpolation.weights(t, s, differences(history.nodes[1:], history.nodes[0]))
    if gains is not None:
        weights = gains[state.memory.steps] * weights
    x = _advance(key, estimate, s, *_noise(tau, t, s))
    return State(x + _combine(history, _prediction_weights(0, weights)), history)


def _corrected_step(denoise, schedule, interpolation, tau, key, state, t, s):
    estimate = call_denoiser(denoise, state.x, t)
    t, s = places(schedule, t, s)
    history = _remember(state.memory, interpolation, estimate, t)
    kept, fresh = _noise(tau, t, s)
    # The corrected x is `x + _combine(history, correction)`: the last step is repeated with the new
    # prediction among its nodes. The correction is scaled like the noise that it belongs to.
    (before, last), nodes = state.memory.last_step, history.nodes
    others = differences(jnp.concatenate([nodes[:1], nodes[2:]]), nodes[1])
    again = interpolation.weights(before, t, others, limits=CORRECTOR_LIMITS)
    correction = _prediction_weights(1, again) - last
    weights = interpolation.weights(t, s, differences(nodes[1:-1], nodes[0]))
    weights = jnp.pad(_prediction_weights(0, weights), (0, 1))
    x = _advance(key, estimate, s, kept, fresh)
    x = x + _combine(history, weights + kept / t.sigma * correction)
    return State(x, history._replace(last_step=(t, jnp.roll(weights, 1))))


def _remember(history, interpolation, estimate, t):
    """Overwrites the oldest prediction with the newest: one write per step, and no copy."""
    n, dtype = len(history.values), history.values.dtype
    prediction = interpolation.predict(estimate).astype(dtype)
    values = jax.lax.dynamic_update_index_in_dim(history.values, prediction, history.steps % n, 0)
    nodes = jnp.concatenate([interpolation.variable(t)[None], history.nodes[:-1]])
    return history._replace(values=values, nodes=nodes, steps=history.steps + 1)


def _prediction_weights(base, weights):
    """The weights of all predictions, from those of their differences to prediction `base`."""
    return jnp.concatenate([weights[:base], -jnp.sum(weights, keepdims=True), weights[base:]])


def _combine(history, weights):
    """`sum_j w_j p_j`, with the weight of the newest prediction first."""
    n = len(history.values)
    by_place = weights[(history.steps - 1 - np.arange(n)) % n]
    return sum(weight * value for weight, value in zip(by_place, history.values, strict=True))


def _noise(tau, t, s):
    """The std at s of the kept and of the fresh noise.

    Kept: `sigma_s e^(-tau^2 h)`; fresh: `sigma_s sqrt(1 - e^(-2 tau^2 h))`.
    """
    if tau is None:
        return s.sigma, None
    tau = as_scalar(tau, "tau")
    h, finite = log_snr_step(t, s)
    exponent = jnp.where(finite, jnp.square(tau) * h, jnp.where(jnp.equal(tau, 0), 0.0, jnp.inf))
    return s.sigma * jnp.exp(-exponent), s.sigma * safe_sqrt(-jnp.expm1(-2 * exponent))


def _advance(key, estimate, s, kept, fresh):
    x = towards(estimate, s.alpha, kept)
    return x if fresh is None else x + fresh * jax.random.normal(key, x.shape, x.dtype)
