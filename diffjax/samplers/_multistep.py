"""The engine of the multistep methods: their memory, predictor, corrector and noise.

What they interpolate, and the weights of it, are in `_interpolation`.
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
    """The last predictions, as a ring: the next one takes the place `count % n`."""
    nodes: Float[Array, " n"]
    """The variable where they were made, the newest first; infinite where there is none yet."""
    count: Int[Array, ""]
    """How many predictions there have been."""
    last_step: Any = None
    """For a corrected method: where its last step began, and the weights of it."""


def multistep(
    denoise: Denoiser,
    schedule: Schedule,
    interpolation: Interpolation,
    order: int,
    tau: float | Array | None = None,
    corrected: bool = False,
    gains: Float[Array, "steps order-1"] | None = None,
) -> Sampler:
    """The Adams-Bashforth method of an interpolation.

    It sees the last `order` predictions, and makes one evaluation a step. With `tau`, the noise of
    the reverse SDE of that amplitude is added. If `corrected`, x is improved once its own
    prediction is known, by an Adams-Moulton step from the time before, without another evaluation.
    With `gains`, which a corrected method does not take, the weights of every step are multiplied
    by a row of them.
    """
    if not corrected:
        step = bind(_predictor_step, denoise, schedule, interpolation, tau, gains)
        return Sampler(bind(_start, jnp.zeros(order)), step)
    step = bind(_corrected_step, denoise, schedule, interpolation, tau)
    return Sampler(bind(_corrected_start, schedule, jnp.zeros(order + 1)), step)


def _start(empty, x, t):
    # the length of `empty` is that of the memory: a shape, while a number would be traced
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
        weights = gains[state.memory.count] * weights
    x = _advance(key, estimate, s, *_noise(tau, t, s)) + _combine(
        history, _of_predictions(0, weights)
    )
    return State(x, history)


def _corrected_step(denoise, schedule, interpolation, tau, key, state, t, s):
    estimate = call_denoiser(denoise, state.x, t)
    t, s = places(schedule, t, s)
    history = _remember(state.memory, interpolation, estimate, t)
    kept, fresh = _noise(tau, t, s)
    # x is corrected to `x + _combine(history, correction)`: the last step once more, with the new
    # prediction among its nodes. The correction is scaled like the noise that it belongs to.
    (before, last), nodes = state.memory.last_step, history.nodes
    others = differences(jnp.concatenate([nodes[:1], nodes[2:]]), nodes[1])
    correction = (
        _of_predictions(1, interpolation.weights(before, t, others, limits=CORRECTOR_LIMITS)) - last
    )
    weights = _of_predictions(0, interpolation.weights(t, s, differences(nodes[1:-1], nodes[0])))
    weights = jnp.pad(weights, (0, 1))
    x = _advance(key, estimate, s, kept, fresh) + _combine(
        history, weights + kept / t.sigma * correction
    )
    return State(x, history._replace(last_step=(t, jnp.roll(weights, 1))))


def _remember(history, interpolation, estimate, t):
    """The newest prediction in the place of the oldest: one write a step, and no copy."""
    n, dtype = len(history.values), history.values.dtype
    prediction = interpolation.predict(estimate).astype(dtype)
    values = jax.lax.dynamic_update_index_in_dim(history.values, prediction, history.count % n, 0)
    nodes = jnp.concatenate([interpolation.variable(t)[None], history.nodes[:-1]])
    return history._replace(values=values, nodes=nodes, count=history.count + 1)


def _of_predictions(base, weights):
    """The weights of all predictions, given those of their differences from number `base`."""
    return jnp.concatenate([weights[:base], -jnp.sum(weights, keepdims=True), weights[base:]])


def _combine(history, weights):
    """sum_j w_j p_j, the weight of the newest prediction first."""
    n = len(history.values)
    by_place = weights[(history.count - 1 - np.arange(n)) % n]
    return sum(weight * value for weight, value in zip(by_place, history.values, strict=True))


def _noise(tau, t, s):
    """The noise at s: kept is `sigma_s e^(-tau^2 h)`, new `sigma_s sqrt(1 - e^(-2 tau^2 h))`."""
    if tau is None:
        return s.sigma, None
    tau = as_scalar(tau, "tau")
    h, finite = log_snr_step(t, s)
    exponent = jnp.where(finite, jnp.square(tau) * h, jnp.where(jnp.equal(tau, 0), 0.0, jnp.inf))
    return s.sigma * jnp.exp(-exponent), s.sigma * safe_sqrt(-jnp.expm1(-2 * exponent))


def _advance(key, estimate, s, kept, fresh):
    x = towards(estimate, s.alpha, kept)
    return x if fresh is None else x + fresh * jax.random.normal(key, x.shape, x.dtype)
