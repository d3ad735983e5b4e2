"""A variance-preserving path whose log-SNR is a monotone network, learned by gradient descent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._checks import check_that
from ..typing import Schedule

__all__ = ["MonotoneNetwork", "init_monotone", "monotone_vp"]


class MonotoneNetwork(NamedTuple):
    """`h(t) = |slope| t + sum_j |outer_j| sigmoid(|inner_j| t + bias_j)`.

    It increases with t whatever the numbers are.
    """

    slope: Float[Array, ""]
    """|slope| is a lower bound on the slope of h."""
    inner: Float[Array, " units"]
    """inner_j: how fast unit j rises."""
    bias: Float[Array, " units"]
    """bias_j: where unit j rises."""
    outer: Float[Array, " units"]
    """outer_j: how far unit j rises."""


def init_monotone(key: PRNGKeyArray, units: int = 64) -> MonotoneNetwork:
    """Initial numbers of a monotone network: a straight line, varied by a few percent by the units.

    Args:
        key: a PRNG key.
        units: the number of sigmoids, at least 1. (The paper takes 1024.)

    Returns:
        The numbers, a pytree to optimize.

    Raises:
        ValueError: if units < 1.

    Reference: see `monotone_vp`.

    >>> init_monotone(jax.random.key(0), 8).inner.shape
    (8,)
    """
    if units < 1:
        raise ValueError(f"units: expected at least 1, got {units}")
    inner, bias, outer = jax.random.normal(key, (3, units))
    return MonotoneNetwork(jnp.ones(()), 4 * inner, 4 * bias, outer / units)


def monotone_vp(
    network: MonotoneNetwork, high: float | Array = 6.65, low: float | Array = -2.5
) -> Schedule:
    """A variance-preserving path with a learned log-SNR.

    `alpha^2 = sigmoid(2 lambda)`, `sigma^2 = sigmoid(-2 lambda)`,
    `lambda(t) = high - (high - low) (h(t) - h(0)) / (h(1) - h(0))`. The network and both ends are
    data of the schedule, so `jax.grad` of a loss reaches them. The mean of
    `losses.variational_bound` depends only on the ends; its variance also on the shape in between.

    Args:
        network: h, see `init_monotone`.
        high: lambda(0), half the log-SNR at the data end. VDM starts at a log-SNR of 13.3.
        low: lambda(1) < high, half the log-SNR at the prior end. VDM starts at a log-SNR of -5.

    Returns:
        The schedule. A little noise stays at t = 0, and a little data at t = 1.

    Raises:
        ValueError: if concrete ends are not finite with low < high.

    Reference: Kingma et al. 2021 (VDM, arXiv 2107.00630), eq. 3, section 3.2 and appendices H and
    I.2; here with one layer fewer.

    >>> schedule = monotone_vp(init_monotone(jax.random.key(0)), 6.0, -3.0)
    >>> round(float(half_log_snr(schedule, 0.0)), 3), round(float(half_log_snr(schedule, 1.0)), 3)
    (6.0, -3.0)
    """
    message = "high, low: expected finite numbers with low < high, got high={}, low={}"
    check_that(
        lambda high, low: np.isfinite(high) & np.isfinite(low) & (low < high), message, high, low
    )
    return bind(_monotone_vp, network, high, low)


def _monotone_vp(network, high, low, t):
    start, end = _monotone(network, jnp.zeros_like(t)), _monotone(network, jnp.ones_like(t))
    value = high - (high - low) * (_monotone(network, t) - start) / (end - start)
    alpha = jnp.exp(0.5 * jax.nn.log_sigmoid(2 * value))
    sigma = jnp.exp(0.5 * jax.nn.log_sigmoid(-2 * value))
    return alpha, sigma


def _monotone(network, t):
    slope, inner, bias, outer = network
    return jnp.abs(slope) * t + jnp.sum(jnp.abs(outer) * jax.nn.sigmoid(jnp.abs(inner) * t + bias))
