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
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._bind import bind
from .._math import phi, safe_sqrt
from ..schedules import coefficients, half_log_snr
from ..typing import Denoiser, Estimate, History, Sampler, Schedule, State, Time
from .ddim import towards, towards_anew


class Interpolation(NamedTuple):
    """What is interpolated, in which variable, and what the integral of the polynomial weighs its values with."""

    predict: Callable[[Estimate], Array]
    variable: Callable[[Schedule, Time], Float[Array, ""]]
    weights: Callable[[Schedule, Time, Time, Float[Array, " n"]], Float[Array, " n"]]
    """`weights(schedule, t, s, nodes)`: w_j for the nodes u_j, relative to the variable at t."""


def lagrange_weights(nodes: Float[Array, " n"], moments, one_node=None) -> Float[Array, " n"]:
    """The w with `sum_j w_j nodes_j^k = moments_k`, k = 1 ... n. Nodes at infinity, at 0 or repeated have weight 0.

    `one_node` replaces the first moment where a single node is left.
    """
    known = jnp.isfinite(nodes) & (nodes != 0)
    known = [known[j] & jnp.all(nodes[:j] != nodes[j]) for j in range(nodes.size)]
    places = [jnp.where(known[j], nodes[j], 1.0) for j in range(nodes.size)]
    if one_node is not None and places:
        moments = [jnp.where(sum(k.astype(int) for k in known) == 1, one_node, moments[0]), *moments[1:]]
    weights = []
    for j, node in enumerate(places):
        # the basis polynomial u / u_j prod_i (u - u_i) / (u_j - u_i), by its coefficients of u, u^2, ...
        basis = [1 / node] + [0.0] * (len(places) - 1)
        for i, other in enumerate(places):
            if i != j:
                gap = jnp.where(known[i] & known[j], node - other, 1.0)
                product = [high - other * low for high, low in zip([0.0, *basis[:-1]], basis, strict=True)]
                basis = [jnp.where(known[i], new / gap, old) for new, old in zip(product, basis, strict=True)]
        weights.append(jnp.where(known[j], sum(b * m for b, m in zip(basis, moments, strict=True)), 0.0))
    return jnp.stack(weights) if weights else jnp.zeros(0)


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


def bh1(h: Array) -> Array:
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


def bh2(h: Array) -> Array:
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
    return Interpolation(bind(x0_of), bind(half_log_snr), bind(_data_weights, b, tau))


def _data_weights(b, tau, schedule, t, s, nodes):
    c = 1 + jnp.square(tau)
    h, finite = _log_snr_step(schedule, t, s)
    moments = [c * math.factorial(k) * h ** (k + 1) * phi(k + 1, -c * h) for k in range(1, nodes.size + 1)]
    weights = lagrange_weights(nodes, moments, None if b is None else -b(-c * h) * h / 2)
    return jnp.where(finite, coefficients(schedule, s).alpha * weights, 0.0)


def noise_prediction(b: Callable | None = None) -> Interpolation:
    """The noise eps as a polynomial in lambda, under the kernel `-e^(h - u)`; `b` as for `data_prediction`."""
    return Interpolation(bind(eps_of), bind(half_log_snr), bind(_noise_weights, b))


def _noise_weights(b, schedule, t, s, nodes):
    h, finite = _log_snr_step(schedule, t, s)
    moments = [math.factorial(k) * h ** (k + 1) * phi(k + 1, h) for k in range(1, nodes.size + 1)]
    weights = lagrange_weights(nodes, moments, None if b is None else b(h) * h / 2)
    return jnp.where(finite, -coefficients(schedule, s).sigma * weights, 0.0)


def velocity_prediction() -> Interpolation:
    """The velocity eps - x0 of the linear path as a polynomial in its time r = sigma / (alpha + sigma)."""
    return Interpolation(bind(linear_velocity_of), bind(linear_time), bind(_velocity_weights))


def linear_time(schedule: Schedule, t: Time) -> Float[Array, ""]:
    """The time of equal log-SNR on the linear path, `r = sigma / (alpha + sigma)`."""
    alpha, sigma, *_ = coefficients(schedule, t)
    return sigma / (alpha + sigma)


def _velocity_weights(schedule, t, s, nodes):
    alpha, sigma, *_ = coefficients(schedule, s)
    step = linear_time(schedule, s) - linear_time(schedule, t)
    moments = [step ** (k + 1) / (k + 1) for k in range(1, nodes.size + 1)]
    return (alpha + sigma) * lagrange_weights(nodes, moments)


def noise_prediction_in_time(points: int = 16) -> Interpolation:
    """The noise eps as a polynomial in t, under the kernel `d(sigma / alpha)/dt`, by a Gauss-Legendre rule: DEIS."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    rule = jnp.asarray(0.5 * (1 + nodes)), jnp.asarray(0.5 * weights)
    return Interpolation(bind(eps_of), bind(_time), bind(_time_weights, *rule))


def _time(schedule, t):
    return jnp.asarray(t)


def _time_weights(points, weights, schedule, t, s, nodes):
    # by parts: alpha_s int_0^d v^k d(sigma/alpha) = sigma_s d^k - alpha_s int_0^d k v^(k-1) sigma/alpha dv
    alpha, sigma, *_ = coefficients(schedule, s)
    step = s - t
    points, weights = points.astype(step.dtype), weights.astype(step.dtype)
    ratios = jnp.exp(-jax.vmap(lambda p: half_log_snr(schedule, t + step * p))(points))

    def moment(k):
        return step**k * (sigma - alpha * jnp.sum(weights * k * points ** (k - 1) * ratios))

    return lagrange_weights(nodes, [moment(k) for k in range(1, nodes.size + 1)])


def _log_snr_step(schedule, t, s):
    """lambda_s - lambda_t where it is finite (1 elsewhere), and whether it is."""
    h = half_log_snr(schedule, s) - half_log_snr(schedule, t)
    finite = jnp.isfinite(h)
    return jnp.where(finite, h, 1.0), finite


# ---- multistep methods -----------------------------------------------------------------------------------------------


def multistep(
    denoise: Denoiser,
    schedule: Schedule,
    interpolation: Interpolation,
    order: int,
    tau: float | Array | None = None,
    corrector: Interpolation | None = None,
    gains: Float[Array, "steps order-1"] | None = None,
) -> Sampler:
    """The Adams-Bashforth method of an interpolation: the last `order` predictions, one evaluation a step.

    With `tau`, the noise of the reverse SDE of that amplitude is added. With a `corrector`, x is improved once its own
    prediction is known, by an Adams-Moulton step from the time before, without another evaluation. With `gains`, the weights
    of every step are multiplied by a row of them.
    """
    if gains is not None:
        return Sampler(
            bind(_no_counted_history, jnp.zeros(order - 1)), bind(_scaled, denoise, schedule, interpolation, gains)
        )
    if corrector is None:
        step = bind(_multistep, denoise, schedule, interpolation, tau)
        return Sampler(bind(_no_history, jnp.zeros(order - 1)), step)
    step = bind(_corrected_multistep, denoise, schedule, interpolation, tau, corrector)
    return Sampler(bind(_no_corrected_history, jnp.zeros(order)), step)


def _no_history(empty, x, t):  # the length of `empty` is that of the memory: a shape, while a number would be traced
    values = jnp.zeros((empty.size, *x.shape), x.dtype)
    return State(x, History(values, jnp.full(empty.shape, jnp.inf, jnp.result_type(t, 1.0))))


def _advance(key, estimate, schedule, tau, t, s):
    if tau is None:
        return towards(estimate, schedule, s)
    h, finite = _log_snr_step(schedule, t, s)
    share = -jnp.expm1(-2 * jnp.square(tau) * h)
    share = jnp.where(finite, share, jnp.where(jnp.equal(tau, 0), 0.0, 1.0))
    return towards_anew(key, estimate, schedule, s, coefficients(schedule, s).sigma * safe_sqrt(share))


def _multistep(denoise, schedule, interpolation, tau, key, state, t, s):
    history, nodes, *_ = state.memory
    estimate = denoise(state.x, t)
    p, u = interpolation.predict(estimate), interpolation.variable(schedule, t)
    weights = interpolation.weights(schedule, t, s, nodes - u)
    x = _advance(key, estimate, schedule, tau, t, s) + _combine(weights, history, p)
    return State(x, History(_push(p, history), _push(u, nodes)))


def _no_counted_history(empty, x, t):
    return State(x, _no_history(empty, x, t).memory._replace(count=jnp.zeros((), jnp.int32)))


def _scaled(denoise, schedule, interpolation, gains, key, state, t, s):
    count = state.memory.count
    scaled = interpolation._replace(weights=bind(_scaled_weights, interpolation.weights, gains[count]))
    state = _multistep(denoise, schedule, scaled, None, key, state, t, s)
    return state._replace(memory=state.memory._replace(count=count + 1))


def _scaled_weights(weights, gain, schedule, t, s, nodes):
    return gain * weights(schedule, t, s, nodes)


def _no_corrected_history(empty, x, t):
    return State(x, _no_history(empty, x, t).memory._replace(last_step=(x, jnp.asarray(t))))


def _corrected_multistep(denoise, schedule, interpolation, tau, corrector, key, state, t, s):
    history, nodes, (uncorrected, before), _ = state.memory
    x0, eps = denoise(state.x, t)
    p, u = interpolation.predict(Estimate(x0, eps)), interpolation.variable(schedule, t)
    # the last step once more, with the new prediction among its nodes
    last, older = history[0], history[1:]
    weights = corrector.weights(schedule, before, t, jnp.concatenate([u[None], nodes[1:]]) - nodes[0])
    x = uncorrected + _combine(weights, jnp.concatenate([p[None], older]), last)
    estimate = Estimate(x0, eps + (x - state.x) / coefficients(schedule, t).sigma)
    x = _advance(key, estimate, schedule, tau, t, s)
    weights = interpolation.weights(schedule, t, s, nodes[:-1] - u)
    memory = History(_push(p, history), _push(u, nodes), (x, jnp.asarray(t)))
    return State(x + _combine(weights, history[:-1], p), memory)


def _combine(weights, values, p):
    """sum_j w_j (p_j - p)."""
    return sum((weights[j] * (values[j] - p) for j in range(weights.size)), jnp.zeros_like(p))


def _push(new, old):
    return jnp.concatenate([new[None], old])[: len(old)]
