r"""Training losses, each for one example.

    denoising                   w(t) |out - target|^2               (1.14), (1.15)
    flow_matching               |v_theta(x_t, t) - v(x_t, t)|^2     (1.16)
    conditional_flow_matching   |v_theta(x_t, t) - (x1 - x0)|^2     (1.17)

`vmap` over keys, examples and times (`times`), and average. A squared error is the mean over the elements of x, so that a
loss does not grow with the dimension. The weights w are in `weightings`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._math import as_float
from .parametrizations import Parametrization, output, target
from .process import perturb
from .typing import Network, Schedule, Time
from .weightings import Weighting, unweighted

__all__ = ["conditional_flow_matching", "denoising", "flow_matching"]


def denoising(
    key: PRNGKeyArray,
    network: Network,
    schedule: Schedule,
    parametrization: Parametrization,
    x0: Array,
    t: Time,
    weighting: Weighting = unweighted,
) -> Float[Array, ""]:
    """The denoising loss of one example: `w(t) |network(x_t, t) - target|^2`, `x_t = alpha x0 + sigma eps` (1.14), (1.15).

    With SCORE it is denoising score matching, with EPS the loss of DDPM, with VELOCITY flow matching from Gaussian noise.

    Args:
        key: the key of the noise eps.
        network: the network, its condition bound.
        schedule: the path.
        parametrization: what the network predicts.
        x0: one example, of any shape.
        t: its time, a scalar; at t > 0 every weighting is finite.
        weighting: the weight of the noise level.

    Returns:
        The loss, a mean over the elements of x0 (`2 / d` times the integrand of (1.14)).

    Raises:
        ValueError: if the network's output has another shape than x0, or t is not a scalar.

    Reference: Vincent 2011; Ho et al. 2020 (arXiv 2006.11239), eq. 14; Song et al. 2021 (arXiv 2011.13456), eq. 7.

    >>> def network(x, t):  # for data that are all zero, eps = x / sigma
    ...     return x / t
    >>> denoising(jax.random.key(0), network, linear(), EPS, jnp.zeros(4), 0.5, inverse_variance)
    Array(0., dtype=float32)
    """
    x0 = as_float(x0, "x0")
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    x = perturb(schedule, x0, eps, t)
    error = output(network, schedule, parametrization, x, t) - target(schedule, parametrization, x0, eps, t)
    return weighting(schedule, parametrization, t) * jnp.mean(error**2)


def flow_matching(network: Network, velocity: Callable[[Array, Time], Array], x: Array, t: Time) -> Float[Array, ""]:
    """The flow-matching loss of one point against a velocity that is known: `|v_theta(x, t) - v(x, t)|^2` (1.16).

    For distillation, or where a closed form exists; otherwise `conditional_flow_matching` has the same gradient.

    Args:
        network: predicts the velocity.
        velocity: `(x, t) -> dx/dt`, for instance `bind(velocity, denoise, schedule)`.
        x: one sample of p(x_t), of any shape.
        t: its time, a scalar.

    Returns:
        The loss, a mean over the elements of x.

    Raises:
        ValueError: if the network's output has another shape than x.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 5.

    >>> flow_matching(lambda x, t: 2 * x, lambda x, t: x, jnp.ones(3), 0.5)
    Array(1., dtype=float32)
    """
    return _mean_squared_error(network, velocity(x, t), x, t)


def conditional_flow_matching(network: Network, x0: Array, x1: Array, t: Time) -> Float[Array, ""]:
    """The conditional flow-matching loss of one pair: `|v_theta(x_t, t) - (x1 - x0)|^2`, `x_t = (1 - t) x0 + t x1` (1.17).

    Any prior and any coupling: the pair is given. With independent Gaussian x1 it is `denoising` with VELOCITY on the
    linear path.

    Args:
        network: predicts the velocity in increasing t, from data to prior.
        x0: a data example, of any shape.
        x1: the draw of the prior that it is paired with, of the shape of x0.
        t: its time, a scalar.

    Returns:
        The loss, a mean over the elements of x0.

    Raises:
        ValueError: if the shapes differ.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 23; Tong et al. 2024 (arXiv 2302.00482), eq. 14-15. Their clock
    runs the other way.

    >>> conditional_flow_matching(lambda x, t: jnp.zeros_like(x), jnp.array([1.0]), jnp.array([3.0]), 0.5)
    Array(4., dtype=float32)
    """
    x0, x1 = as_float(x0, "x0"), as_float(x1, "x1")
    if x0.shape != x1.shape:
        raise ValueError(f"x1: expected the shape of x0, {x0.shape}, got {x1.shape}")
    return _mean_squared_error(network, x1 - x0, (1 - t) * x0 + t * x1, t)


def _mean_squared_error(network, goal, x, t):
    out = network(x, t)
    if jnp.shape(out) != jnp.shape(x):
        raise ValueError(
            f"network: it returned {jnp.shape(out)} for x of shape {jnp.shape(x)}; expected the same shape"
        )
    return jnp.mean((out - goal) ** 2)
