r"""The exponential integrator of which the fast solvers are tables.

With lambda = log(alpha / sigma), u = lambda - lambda_t and h = lambda_s - lambda_t, the probability flow from t to s is

    data      x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(u - h) x0 du
    noise     x_s = alpha_s / alpha_t x_t - sigma_s int_0^h e^(h - u) eps du                                      (1.53)
    velocity  x_s / (alpha_s + sigma_s) = x_t / (alpha_t + sigma_t) + int (eps - x0) dr,  r = sigma / (alpha + sigma)

exactly. If the prediction p (x0, eps or eps - x0) stays what it is at t, each of the three is DDIM. A solver of higher order
puts a polynomial through values p_j at other nodes u_j in its place, and adds

    x_s = alpha_s x0 + sigma_s eps + sum_j w_j (p_j - p),   sum_j w_j u_j^k = m_k,   m_k = int_0^h kernel(u) u^k du  (1.55)

for k = 1 ... the number of nodes. So a solver is a prediction, the variable u, and the moments m_k, which are phi-functions
for the first two. A node at infinity (before the first step, or where alpha or sigma is 0) has the weight 0, which is its
limit; so the lower orders of the first steps need no counting. A step of infinite h is DDIM.

A step that is long beside the distances of its nodes lowers its order. There a polynomial of high degree is extrapolated far
beyond its nodes, and the w_j are large: small differences p_j - p become large errors. So the order is the highest at which
sum_j |w_j| stays below a multiple of m_0, the weight of p itself (`limited_weights`). Even steps keep every order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._bind import bind
from .._calls import call_denoiser
from .._checks import as_scalar
from .._numerics import phis, safe_sqrt
from .._varying import zeros_of
from ..schedules import half_log_snr
from ..schedules.coefficients import alpha_sigma, log_ratio
from ..typing import Denoiser, Estimate, Sampler, Schedule, State, Time
from .kernels import towards


class Place(NamedTuple):
    """A time, and what the schedule is there."""

    t: Float[Array, ""]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    half_log_snr: Float[Array, ""]


def places(schedule: Schedule, *ts: Time) -> tuple[Place, ...]:
    """The places of some times, from one evaluation of the schedule for all, which keeps the program small."""
    times = jnp.stack([jnp.asarray(t) for t in ts])
    alphas, sigmas = jax.vmap(lambda t: alpha_sigma(schedule, t))(times)
    return tuple(map(Place, times, alphas, sigmas, log_ratio(alphas, sigmas)))


class Interpolation(NamedTuple):
    """What is interpolated, in which variable, and what the integral of the polynomial weighs its values with."""

    predict: Callable[[Estimate], Array]
    variable: Callable[[Place], Float[Array, ""]]
    weights: Callable[..., Float[Array, " n"]]
    """`weights(t, s, nodes)`: w_j of the step from t to s for the nodes u_j, relative to the variable at t.

    `limits` replaces the limits of `limited_weights`.
    """


class History(NamedTuple):
    """The memory of a multistep method: its last predictions."""

    values: Float[Array, "n *x"]
    """The predictions, as a ring: the next one takes the place `count % n`."""
    nodes: Float[Array, " n"]
    """Where they were made, in the variable of the method, the newest first; infinite where there is none yet."""
    count: Int[Array, ""]
    """How many predictions there have been."""
    last_step: Any = None
    """Where the last step of a method with a corrector began, and its weights."""


# The largest sum_j |w_j| / m_0 with one node, with two, and with three. On short even steps the Adams-Bashforth methods
# have 1/2 and 7/4. With these limits no method is worse than its first-order form from ten steps on, on any grid and any
# schedule of the library.
DATA_LIMITS = (0.72, 2.5)
# With noise they are divided by a power of c = 1 + tau^2: the differences contain noise, which is extrapolated with them.
NOISE_POWER = 1 / 16
# Higher for eps in the log-SNR and for the linear velocity, which change less over a long step.
REGULAR_LIMITS = (math.inf, 3.5)
# A corrector interpolates: its first node is the end of the step.
CORRECTOR_LIMITS = (1.0, 1.0, 1.0)


def limited_weights(nodes: Float[Array, " n"], moments, limits, one_node=None) -> Float[Array, " n"]:
    """The `lagrange_weights` of the first k nodes, for the largest k with `sum_j |w_j| <= limits[k - 1] |m_0|`.

    `moments` starts with m_0. Nodes that have weight 0 in `lagrange_weights` come last, and do not count.
    """
    weights = jnp.zeros_like(nodes)
    for k, limit in zip(range(1, nodes.size + 1), limits, strict=False):
        higher = lagrange_weights(nodes[:k], moments[1 : k + 1], one_node)
        fits = (higher[-1] != 0) & (sum(map(jnp.abs, higher)) / limit <= jnp.abs(moments[0]))
        weights = jnp.where(fits, jnp.pad(higher, (0, nodes.size - k)), weights)
    return weights


def lagrange_weights(nodes: Float[Array, " n"], moments, one_node=None) -> Float[Array, " n"]:
    """The w with `sum_j w_j nodes_j^k = moments_k`, k = 1 ... n. Nodes at infinity, at 0 or repeated have weight 0.

    `one_node` replaces the first moment where a single node is left.
    """
    # Scalars: XLA compiles them to a smaller program than short vectors.
    u, v, known = list(nodes), [], []
    for j, node in enumerate(u):
        known.append(jnp.isfinite(node) & (node != 0) & ~sum((node == other for other in u[:j]), jnp.array(False)))
        v.append(jnp.where(known[j], 1 / jnp.where(known[j], node, 1.0), 0.0))
    if one_node is not None and u:
        moments = [jnp.where(sum(k.astype(int) for k in known) == 1, one_node, moments[0]), *moments[1:]]
    u = [jnp.where(known[j], node, 0.0) for j, node in enumerate(u)]
    weights = []
    for j in range(nodes.size):
        # the basis polynomial u / u_j prod_i (u - u_i) / (u_j - u_i) by its coefficients of u, u^2, ...; v = 1 / u is 0
        # for what is no node, and its factor (1 - v_i u) / (1 - v_i u_j) is 1
        basis = [v[j]]
        for i in range(nodes.size):
            if i != j:
                gap = jnp.where(known[i], v[i] * (u[i] - u[j]), 1.0)
                product = [*basis, 0.0]
                basis = [(product[k] - v[i] * product[k - 1] if k else product[0]) / gap for k in range(len(product))]
        weights.append(jnp.where(known[j], sum(b * m for b, m in zip(basis, moments, strict=True)), 0.0))
    return jnp.stack(weights) if weights else jnp.zeros_like(nodes)


# ---- predictions -----------------------------------------------------------------------------------------------------


def x0_of(estimate: Estimate) -> Array:
    """The data prediction."""
    return estimate.x0


def eps_of(estimate: Estimate) -> Array:
    """The noise prediction."""
    return estimate.eps


def linear_velocity_of(estimate: Estimate) -> Array:
    """The velocity on the linear path, whichever the path."""
    return estimate.eps - estimate.x0


def bh1(h: float | Array) -> float | Array:
    """UniPC's `B1(h) = h`, for `unipc(denoise, schedule, 2, bh1)`.

    Args:
        h: a step in half log-SNR, of either sign.

    Returns:
        B1.

    Reference: Zhao et al. 2023 (UniPC, arXiv 2302.04867), section 4.1.

    >>> bh1(0.5)
    0.5
    """
    return h


def bh2(h: float | Array) -> Array:
    """UniPC's `B2(h) = e^h - 1`, the integral of the kernel; DPM-Solver-2 and DPM-Solver++(2M) weigh their difference so.

    Args:
        h: a step in half log-SNR, of either sign.

    Returns:
        B2.

    Reference: Zhao et al. 2023 (UniPC, arXiv 2302.04867), section 4.1.

    >>> float(bh2(0.5))
    0.6487...
    """
    return jnp.expm1(h)


def data_prediction(b: Callable | None = None, tau: float | Array = 0.0) -> Interpolation:
    """x0 as a polynomial in lambda, under the kernel `c e^(c (u - h))`, `c = 1 + tau^2`.

    With `b`, a single difference is weighed by `b h / 2` in place of its exact moment: a first-order difference taken at the
    middle of the step.
    """
    return Interpolation(bind(x0_of), bind(_half_log_snr), bind(_data_weights, b, tau))


def _half_log_snr(t):
    return t.half_log_snr


def _data_weights(b, tau, t, s, nodes, limits=None):
    c = 1 + jnp.square(tau)
    limits = limits or [limit / c**NOISE_POWER for limit in DATA_LIMITS]
    h, finite = _log_snr_step(t, s)
    moments = [c * moment for moment in _exponential_moments(nodes.size, h, -c * h)]
    weights = limited_weights(nodes, moments, limits, None if b is None else -b(-c * h) * h / 2)
    return jnp.where(finite, s.alpha * weights, 0.0)


def noise_prediction(b: Callable | None = None) -> Interpolation:
    """The noise eps as a polynomial in lambda, under the kernel `-e^(h - u)`; `b` as for `data_prediction`."""
    return Interpolation(bind(eps_of), bind(_half_log_snr), bind(_noise_weights, b))


def _noise_weights(b, t, s, nodes, limits=REGULAR_LIMITS):
    h, finite = _log_snr_step(t, s)
    moments = _exponential_moments(nodes.size, h, h)
    weights = limited_weights(nodes, moments, limits, None if b is None else b(h) * h / 2)
    return jnp.where(finite, -s.sigma * weights, 0.0)


def _exponential_moments(n, h, z):
    """`int_0^h e^(z (1 - u / h)) u^k du = k! h^(k+1) phi_{k+1}(z)` for k = 0 ... n."""
    return [math.factorial(k) * h ** (k + 1) * phi for k, phi in enumerate(phis(n + 1, z))]


def velocity_prediction() -> Interpolation:
    """The velocity eps - x0 of the linear path as a polynomial in its time r = sigma / (alpha + sigma)."""
    return Interpolation(bind(linear_velocity_of), bind(_linear_time), bind(_velocity_weights))


def _linear_time(t):
    return t.sigma / (t.alpha + t.sigma)


def _velocity_weights(t, s, nodes, limits=REGULAR_LIMITS):
    step = _linear_time(s) - _linear_time(t)
    moments = [step ** (k + 1) / (k + 1) for k in range(nodes.size + 1)]
    return (s.alpha + s.sigma) * limited_weights(nodes, moments, limits)


def noise_prediction_in_time(schedule: Schedule, points: int = 16) -> Interpolation:
    """The noise eps as a polynomial in t, under the kernel `d(sigma / alpha)/dt`, by a Gauss-Legendre rule: DEIS.

    Without limits: the grids of the library are even enough in t.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    rule = jnp.asarray(0.5 * (1 + nodes)), jnp.asarray(0.5 * weights)
    return Interpolation(bind(eps_of), bind(_time), bind(_time_weights, schedule, *rule))


def _time(t):
    return t.t


def _time_weights(schedule, points, weights, t, s, nodes):
    # by parts: alpha_s int_0^d v^k d(sigma/alpha) = sigma_s d^k - alpha_s int_0^d k v^(k-1) sigma/alpha dv
    step = s.t - t.t
    points, weights = points.astype(step.dtype), weights.astype(step.dtype)
    ratios = jnp.exp(-jax.vmap(lambda p: half_log_snr(schedule, t.t + step * p))(points))

    def moment(k):
        return step**k * (s.sigma - s.alpha * jnp.sum(weights * k * points ** (k - 1) * ratios))

    return lagrange_weights(nodes, [moment(k) for k in range(1, nodes.size + 1)])


def _log_snr_step(t, s):
    """lambda_s - lambda_t where it is finite (1 elsewhere), and whether it is."""
    h = _relative(s.half_log_snr, t.half_log_snr)
    finite = jnp.isfinite(h)
    return jnp.where(finite, h, 1.0), finite


def _relative(nodes, u):
    """The distances nodes - u, infinite where either is: inf - inf would be NaN."""
    finite = jnp.isfinite(nodes) & jnp.isfinite(u)
    return jnp.where(finite, jnp.where(finite, nodes, 0.0) - jnp.where(finite, u, 0.0), jnp.inf)


# ---- multistep methods -----------------------------------------------------------------------------------------------


def multistep(
    denoise: Denoiser,
    schedule: Schedule,
    interpolation: Interpolation,
    order: int,
    tau: float | Array | None = None,
    corrector: Interpolation | None = None,
    gains: Float[Array, "steps {order}-1"] | None = None,
) -> Sampler:
    """The Adams-Bashforth method of an interpolation: the last `order` predictions, one evaluation a step.

    With `tau`, the noise of the reverse SDE of that amplitude is added. With a `corrector`, x is improved once its own
    prediction is known, by an Adams-Moulton step from the time before, without another evaluation. With `gains`, the weights
    of every step are multiplied by a row of them (of a method without a corrector).
    """
    if corrector is None:
        step = bind(_multistep, denoise, schedule, interpolation, tau, gains)
        return Sampler(bind(_no_history, jnp.zeros(order)), step)
    step = bind(_corrected_multistep, denoise, schedule, interpolation, tau, corrector)
    return Sampler(bind(_no_corrected_history, schedule, jnp.zeros(order + 1)), step)


def _no_history(empty, x, t):  # the length of `empty` is that of the memory: a shape, while a number would be traced
    nodes = jnp.full(empty.shape, jnp.inf, jnp.result_type(t, 1.0))
    values = jnp.broadcast_to(zeros_of(x), (empty.size, *x.shape))
    return State(x, History(values, nodes, jnp.zeros((), jnp.int32)))


def _no_corrected_history(schedule, empty, x, t):
    (before,) = places(schedule, t)
    weights = jnp.zeros_like(before.t, shape=empty.shape)
    return State(x, _no_history(empty, x, t).memory._replace(last_step=(before, weights)))


def _multistep(denoise, schedule, interpolation, tau, gains, key, state, t, s):
    estimate = call_denoiser(denoise, state.x, t)
    t, s = places(schedule, t, s)
    u = interpolation.variable(t)
    history = _remember(state.memory, interpolation.predict(estimate), u)
    weights = interpolation.weights(t, s, _relative(history.nodes[1:], u))
    if gains is not None:
        weights = gains[state.memory.count] * weights
    return State(_advance(key, estimate, s, *_noise(tau, t, s)) + _combine(history, _differences(0, weights)), history)


def _corrected_multistep(denoise, schedule, interpolation, tau, corrector, key, state, t, s):
    estimate = call_denoiser(denoise, state.x, t)
    before, last = state.memory.last_step
    t, s = places(schedule, t, s)
    u = interpolation.variable(t)
    history = _remember(state.memory, interpolation.predict(estimate), u)
    kept, fresh = _noise(tau, t, s)
    # x is corrected to `x + _combine(history, correction)`: the last step once more, with the new prediction among its
    # nodes. The correction is scaled like the noise that it belongs to.
    others = jnp.concatenate([history.nodes[:1], history.nodes[2:]])
    others = _relative(others, history.nodes[1])
    correction = _differences(1, corrector.weights(before, t, others, limits=CORRECTOR_LIMITS)) - last
    weights = jnp.pad(_differences(0, interpolation.weights(t, s, _relative(history.nodes[1:-1], u))), (0, 1))
    x = _advance(key, estimate, s, kept, fresh) + _combine(history, weights + kept / t.sigma * correction)
    return State(x, history._replace(last_step=(t, jnp.roll(weights, 1))))


def _noise(tau, t, s):
    """The standard deviations of the noise at s: what is kept, and what is drawn anew (if any ever is)."""
    if tau is None:
        return s.sigma, None
    tau = as_scalar(tau, "tau")
    h, finite = _log_snr_step(t, s)
    exponent = jnp.where(finite, jnp.square(tau) * h, jnp.where(jnp.equal(tau, 0), 0.0, jnp.inf))
    return s.sigma * jnp.exp(-exponent), s.sigma * safe_sqrt(-jnp.expm1(-2 * exponent))


def _advance(key, estimate, s, kept, fresh):
    x = towards(estimate, s.alpha, kept)
    return x if fresh is None else x + fresh * jax.random.normal(key, x.shape, x.dtype)


def _remember(history, p, u):
    """The newest in the place of the oldest: one write a step, and no copy."""
    place, p = history.count % len(history.values), p.astype(history.values.dtype)
    values = jax.lax.dynamic_update_index_in_dim(history.values, p, place, 0)
    nodes = jnp.concatenate([u[None], history.nodes[:-1]])
    return history._replace(values=values, nodes=nodes, count=history.count + 1)


def _differences(base, weights):
    """The weights of the differences to the prediction number `base`, as weights of all predictions."""
    return jnp.concatenate([weights[:base], -jnp.sum(weights, keepdims=True), weights[base:]])


def _combine(history, weights):
    """sum_j w_j p_j, the newest first."""
    n = len(history.values)
    by_place = weights[(history.count - 1 - np.arange(n)) % n]
    return sum(weight * value for weight, value in zip(by_place, history.values, strict=True))
