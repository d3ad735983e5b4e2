"""Flow matching to a known velocity, of pairs, and of the bridges between them.

    flow_matching               |v_theta(x, t) - v(x, t)|^2                    (1.16)
    conditional_flow_matching   |v_theta(x_t, t) - (x1 - x0)|^2                (1.17)
    bridge_matching             |v_theta(x_t, t) - u|^2
                                + a^2 t (1 - t) |s_theta(x_t, t) - score(x_t | x0, x1)|^2

The pairs (x0, x1) may come from any prior by any coupling (`couplings`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import as_float
from ..process import brownian_bridge
from ..typing import Network, Time
from ._errors import mean_squared_error

__all__ = ["bridge_matching", "conditional_flow_matching", "flow_matching"]


def flow_matching(
    network: Network, velocity: Callable[[Array, Time], Array], x: Array, t: Time
) -> Float[Array, ""]:
    """The flow-matching loss of one point, `|v_theta(x, t) - v(x, t)|^2`, for a known v (1.16).

    It is for distillation, or where a closed form exists. `conditional_flow_matching` has the same
    gradient and does not need v.

    Args:
        network: predicts the velocity.
        velocity: `(x, t) -> dx/dt`, for instance `bind(velocity, denoise, schedule)`.
        x: one sample of p(x_t), of any shape.
        t: its time, a scalar.

    Returns:
        The loss, a mean over the elements of x.

    Raises:
        ValueError: if the network's output has another shape than x.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 5; (1.16).

    >>> flow_matching(lambda x, t: 2 * x, lambda x, t: x, jnp.ones(3), 0.5)
    Array(1., dtype=float32)
    """
    return mean_squared_error(network, velocity(x, t), x, t)


def conditional_flow_matching(
    network: Network, x0: Float[ArrayLike, "*x"], x1: Float[ArrayLike, "*x"], t: Time
) -> Float[Array, ""]:
    """The conditional flow-matching loss of one pair, `|v_theta(x_t, t) - (x1 - x0)|^2` (1.17).

    Here `x_t = (1 - t) x0 + t x1`. The pair may come from any prior and any coupling. With
    independent Gaussian x1 it is `denoising` with VELOCITY on the linear path.

    Args:
        network: predicts the velocity in increasing t, from data to prior.
        x0: a data example, of any shape.
        x1: the draw of the prior that it is paired with, of the shape of x0.
        t: the time, a scalar.

    Returns:
        The loss, a mean over the elements of x0.

    Raises:
        ValueError: if the shapes differ, or t is not a scalar.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 23; Tong et al. 2024 (arXiv 2302.00482),
    eq. 14-15, both with time reversed; (1.17).

    >>> zero = lambda x, t: jnp.zeros_like(x)
    >>> conditional_flow_matching(zero, jnp.array([1.0]), jnp.array([3.0]), 0.5)
    Array(4., dtype=float32)
    """
    x0, x1 = _pair(x0, x1, t)
    return mean_squared_error(network, x1 - x0, (1 - t) * x0 + t * x1, t)


def bridge_matching(
    key: PRNGKeyArray,
    velocity: Network,
    score: Network,
    x0: Float[ArrayLike, "*x"],
    x1: Float[ArrayLike, "*x"],
    t: Time,
    amplitude: float | Array,
) -> Float[Array, ""]:
    """The loss of simulation-free score and flow matching ([SF]2M) of one pair on its bridge.

    `|v_theta - u|^2 + a^2 t (1 - t) |s_theta - s|^2`, at one point of the bridge, with the velocity
    u and score s of `process.brownian_bridge`. The weight makes the error of the score that of unit
    noise. If the pairs come from the entropic coupling with epsilon = 2 a^2, the minimum is the
    Schrödinger bridge: `samplers.bridge_sampler` runs its SDE, and the flow of v_theta has the same
    marginals.

    Args:
        key: a PRNG key, for the noise of the bridge.
        velocity: a network `(x, t) -> v`, in increasing t, from data to prior.
        score: a network `(x, t) -> grad log p_t(x)`.
        x0: a data example, of any shape.
        x1: the draw of the prior that it is paired with, of the shape of x0.
        t: the time, a scalar in (0, 1): u and s are infinite at the ends.
        amplitude: a > 0, the noise amplitude of the bridge, in units of x per square root of time.

    Returns:
        The loss, a mean over the elements of x0.

    Raises:
        ValueError: if the shapes differ, or t is not a scalar.

    Reference: Tong et al. 2024 ([SF]2M, arXiv 2307.03672), eq. 11 with the weight of eq. 17, and
    algorithm 1, with time reversed.

    >>> zero, x0, x1 = lambda x, t: jnp.zeros_like(x), jnp.array([1.0]), jnp.array([3.0])
    >>> bridge_matching(jax.random.key(0), zero, zero, x0, x1, 0.5, 1.0)  # 4 + eps^2
    Array(..., dtype=float32)
    """
    x0, x1 = _pair(x0, x1, t)
    bridge = brownian_bridge(x0, x1, jax.random.normal(key, x0.shape, x0.dtype), t, amplitude)
    velocity_error = mean_squared_error(velocity, bridge.velocity, bridge.x, t)
    score_error = mean_squared_error(score, bridge.score, bridge.x, t)
    return velocity_error + amplitude**2 * t * (1 - t) * score_error


def _pair(x0, x1, t):
    if jnp.ndim(t):
        raise ValueError(f"t: expected a scalar (vmap for many pairs), got shape {jnp.shape(t)}")
    x0, x1 = as_float(x0, "x0"), as_float(x1, "x1")
    if x0.shape != x1.shape:
        raise ValueError(f"x1: expected the shape of x0, {x0.shape}, got {x1.shape}")
    return x0, x1
