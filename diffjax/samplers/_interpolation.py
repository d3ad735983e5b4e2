"""The exponential integrator: what the fast solvers interpolate, and the resulting weights.

With lambda = log(alpha / sigma), u = lambda - lambda_t and h = lambda_s - lambda_t, the probability
flow from t to s is

    data      x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(u - h) x0 du
    noise     x_s = alpha_s / alpha_t x_t - sigma_s int_0^h e^(h - u) eps du                  (1.53)
    velocity  x_s / (alpha_s + sigma_s) = x_t / (alpha_t + sigma_t) + int (eps - x0) dr,
              with r = sigma / (alpha + sigma)

exactly. If the prediction p (x0, eps or eps - x0) keeps its value at t, each of the three is DDIM.
A solver of higher order replaces p by a polynomial that also takes the values p_j at nodes u_j:

    x_s = alpha_s x0 + sigma_s eps + sum_j w_j (p_j - p),
    sum_j w_j u_j^k = m_k,   m_k = int_0^h kernel(u) u^k du                                   (1.55)

for k from 1 to the number of nodes. So a solver is an `Interpolation`: a prediction, the variable
u, and the moments m_k. For x0 and eps in the log-SNR, the moments are phi-functions:

    data_prediction            DPM-Solver++ (2M, 3M and SDE), UniPC, SA-Solver, data_adams
    noise_prediction           DPM-Solver's multistep form, noise_adams
    noise_prediction_in_time   DEIS
    velocity_prediction        velocity_adams

The nodes are earlier predictions. A corrector also uses the prediction at the end of the step.

A node at infinity (before the first step, or where alpha or sigma is 0) has weight 0, its limit.
So the first steps have lower orders without being counted. A step of infinite h is DDIM.

A step that is long compared with the distances of its nodes takes a lower order. In such a step, a
polynomial of high degree is extrapolated far beyond its nodes and the w_j are large, so that small
differences p_j - p become large errors. The order is therefore the highest at which sum_j |w_j|
stays below a multiple of m_0, the weight of p itself (`limited_weights`). Even steps keep every
order.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._bind import bind
from .._numerics import phis
from ..schedules import half_log_snr
from ..schedules.coefficients import alpha_sigma, log_ratio
from ..typing import Estimate, Schedule, Time


class Place(NamedTuple):
    """A time, and the values of the schedule there."""

    t: Float[Array, ""]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    half_log_snr: Float[Array, ""]


def places(schedule: Schedule, *ts: Time) -> tuple[Place, ...]:
    """The places of several times, from one call of the schedule to keep the program small."""
    times = jnp.stack([jnp.asarray(t) for t in ts])
    alphas, sigmas = jax.vmap(lambda t: alpha_sigma(schedule, t))(times)
    return tuple(map(Place, times, alphas, sigmas, log_ratio(alphas, sigmas)))


class Interpolation(NamedTuple):
    """What is interpolated, in which variable, and with which weights."""

    predict: Callable[[Estimate], Array]
    variable: Callable[[Place], Float[Array, ""]]
    weights: Callable[..., Float[Array, " n"]]
    """`weights(t, s, nodes)`: w_j of the step from t to s, for nodes u_j relative to u at t.

    An argument `limits` replaces the default limits of `limited_weights`.
    """


# ---- x0 in the log-SNR: DPM-Solver++, UniPC, SA-Solver -------------------------------------------

# The largest sum_j |w_j| / m_0 with one, two and three nodes. On short even steps, the
# Adams-Bashforth methods of order 2 and 3 have 1/2 and 7/4. With these limits and at least ten
# steps, no method is worse than its first-order form on any grid and schedule of the library.
DATA_LIMITS = (0.72, 2.5)
# With noise, the limits are divided by this power of c = 1 + tau^2, because the differences contain
# noise, which is extrapolated with them.
NOISE_POWER = 1 / 16
# A corrector interpolates: its first node is the end of the step.
CORRECTOR_LIMITS = (1.0, 1.0, 1.0)


def data_prediction(b: Callable | None = None, tau: float | Array = 0.0) -> Interpolation:
    """x0 as a polynomial in lambda, with the kernel `c e^(c (u - h))`, `c = 1 + tau^2`.

    With `b`, the moment of a single node is `-b(-c h) h / 2` instead of the exact one. For `bh2`
    this evaluates the linear extrapolation at the middle of the step.
    """
    return Interpolation(bind(predict_x0), bind(_half_log_snr), bind(_data_weights, b, tau))


def predict_x0(estimate: Estimate) -> Array:
    """The data prediction."""
    return estimate.x0


def _half_log_snr(t):
    return t.half_log_snr


def _data_weights(b, tau, t, s, nodes, limits=None):
    c = 1 + jnp.square(tau)
    limits = limits or [limit / c**NOISE_POWER for limit in DATA_LIMITS]
    h, finite = log_snr_step(t, s)
    moments = [c * moment for moment in _exponential_moments(nodes.size, h, -c * h)]
    weights = limited_weights(nodes, moments, limits, None if b is None else -b(-c * h) * h / 2)
    return jnp.where(finite, s.alpha * weights, 0.0)


def _exponential_moments(n, h, z):
    """`int_0^h e^(z (1 - u / h)) u^k du = k! h^(k+1) phi_{k+1}(z)` for k = 0 ... n."""
    return [math.factorial(k) * h ** (k + 1) * phi for k, phi in enumerate(phis(n + 1, z))]


def bh1(h: float | Array) -> float | Array:
    """UniPC's `B1(h) = h`, for `unipc(denoise, schedule, 2, bh1)`.

    Args:
        h: a step in half log-SNR, of either sign.

    Returns:
        `B1(h)`.

    Reference: Zhao et al. 2023 (UniPC, arXiv 2302.04867), section 4.1.

    >>> bh1(0.5)
    0.5
    """
    return h


def bh2(h: float | Array) -> Array:
    """UniPC's `B2(h) = e^h - 1`, the integral of the kernel.

    DPM-Solver-2 and DPM-Solver++(2M) weight their difference with it.

    Args:
        h: a step in half log-SNR, of either sign.

    Returns:
        `B2(h)`.

    Reference: Zhao et al. 2023 (UniPC, arXiv 2302.04867), section 4.1.

    >>> float(bh2(0.5))
    0.6487...
    """
    return jnp.expm1(h)


# ---- eps in the log-SNR: DPM-Solver --------------------------------------------------------------

# Higher limits: eps in the log-SNR and the linear velocity change less over a long step.
REGULAR_LIMITS = (math.inf, 3.5)


def noise_prediction() -> Interpolation:
    """The noise eps as a polynomial in lambda, with the kernel `-e^(h - u)`."""
    return Interpolation(bind(predict_eps), bind(_half_log_snr), bind(_noise_weights))


def predict_eps(estimate: Estimate) -> Array:
    """The noise prediction."""
    return estimate.eps


def _noise_weights(t, s, nodes, limits=REGULAR_LIMITS):
    h, finite = log_snr_step(t, s)
    weights = limited_weights(nodes, _exponential_moments(nodes.size, h, h), limits)
    return jnp.where(finite, -s.sigma * weights, 0.0)


# ---- eps in time: DEIS ---------------------------------------------------------------------------


def noise_prediction_in_time(schedule: Schedule, points: int = 16) -> Interpolation:
    """The noise eps as a polynomial in t, with the kernel `d(sigma / alpha)/dt`.

    A Gauss-Legendre rule gives the integral. The weights have no limits, because the grids of the
    library are even enough in t.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    rule = jnp.asarray(0.5 * (1 + nodes)), jnp.asarray(0.5 * weights)
    return Interpolation(bind(predict_eps), bind(_time), bind(_time_weights, schedule, *rule))


def _time(t):
    return t.t


def _time_weights(schedule, points, weights, t, s, nodes):
    # by parts: alpha_s int_0^d v^k d(sigma / alpha)
    #           = sigma_s d^k - alpha_s int_0^d k v^(k-1) sigma / alpha dv
    step = s.t - t.t
    points, weights = points.astype(step.dtype), weights.astype(step.dtype)
    ratios = jnp.exp(-jax.vmap(lambda p: half_log_snr(schedule, t.t + step * p))(points))

    def moment(k):
        return step**k * (s.sigma - s.alpha * jnp.sum(weights * k * points ** (k - 1) * ratios))

    return lagrange_weights(nodes, [moment(k) for k in range(1, nodes.size + 1)])


# ---- eps - x0 in sigma / (alpha + sigma) ---------------------------------------------------------


def velocity_prediction() -> Interpolation:
    """The velocity eps - x0 of the linear path, as a polynomial in r = sigma / (alpha + sigma)."""
    return Interpolation(bind(predict_linear_velocity), bind(_linear_time), bind(_velocity_weights))


def predict_linear_velocity(estimate: Estimate) -> Array:
    """The velocity of the linear path, which is used on every path."""
    return estimate.eps - estimate.x0


def _linear_time(t):
    return t.sigma / (t.alpha + t.sigma)


def _velocity_weights(t, s, nodes, limits=REGULAR_LIMITS):
    step = _linear_time(s) - _linear_time(t)
    moments = [step ** (k + 1) / (k + 1) for k in range(nodes.size + 1)]
    return (s.alpha + s.sigma) * limited_weights(nodes, moments, limits)


# ---- weights of given moments --------------------------------------------------------------------


def limited_weights(
    nodes: Float[Array, " n"], moments, limits, one_node=None
) -> Float[Array, " n"]:
    """The `lagrange_weights` of the first k nodes, for the largest k that the limits allow.

    That is the largest k with `sum_j |w_j| <= limits[k - 1] |m_0|`. `moments` starts with m_0.
    Nodes of weight 0 come last and do not count.
    """
    weights = jnp.zeros_like(nodes)
    for k, limit in zip(range(1, nodes.size + 1), limits, strict=False):
        higher = lagrange_weights(nodes[:k], moments[1 : k + 1], one_node)
        fits = (higher[-1] != 0) & (sum(map(jnp.abs, higher)) / limit <= jnp.abs(moments[0]))
        weights = jnp.where(fits, jnp.pad(higher, (0, nodes.size - k)), weights)
    return weights


def lagrange_weights(nodes: Float[Array, " n"], moments, one_node=None) -> Float[Array, " n"]:
    """The weights w with `sum_j w_j nodes_j^k = moments_k` for k = 1 ... n.

    Nodes at infinity, at 0 or repeated have weight 0. `one_node` replaces the first moment if only
    one node is left.
    """
    # Scalars: XLA compiles them to a smaller program than short vectors.
    u, v, known = list(nodes), [], []
    for j, node in enumerate(u):
        repeated = sum((node == other for other in u[:j]), jnp.array(False))
        known.append(jnp.isfinite(node) & (node != 0) & ~repeated)
        v.append(jnp.where(known[j], 1 / jnp.where(known[j], node, 1.0), 0.0))
    if one_node is not None and u:
        single = sum(k.astype(int) for k in known) == 1
        moments = [jnp.where(single, one_node, moments[0]), *moments[1:]]
    u = [jnp.where(known[j], node, 0.0) for j, node in enumerate(u)]
    weights = []
    for j in range(nodes.size):
        # The coefficients of u, u^2, ... in u / u_j prod_i (u - u_i) / (u_j - u_i). A node of
        # weight 0 has v_i = 1 / u_i = 0, so that its factor (1 - v_i u) / (1 - v_i u_j) is 1.
        basis = [v[j]]
        for i in range(nodes.size):
            if i != j:
                gap = jnp.where(known[i], v[i] * (u[i] - u[j]), 1.0)
                product = [*basis, 0.0]
                basis = [
                    (product[k] - v[i] * product[k - 1] if k else product[0]) / gap
                    for k in range(len(product))
                ]
        weight = sum(b * m for b, m in zip(basis, moments, strict=True))
        weights.append(jnp.where(known[j], weight, 0.0))
    return jnp.stack(weights) if weights else jnp.zeros_like(nodes)


def log_snr_step(t: Place, s: Place):
    """`lambda_s - lambda_t`, or 1 if that is infinite, and whether it is finite."""
    h = differences(s.half_log_snr, t.half_log_snr)
    finite = jnp.isfinite(h)
    return jnp.where(finite, h, 1.0), finite


def differences(nodes, u):
    """`nodes - u`, infinite where either is: inf - inf would be NaN."""
    finite = jnp.isfinite(nodes) & jnp.isfinite(u)
    return jnp.where(finite, jnp.where(finite, nodes, 0.0) - jnp.where(finite, u, 0.0), jnp.inf)
