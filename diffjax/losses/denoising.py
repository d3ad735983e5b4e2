"""The denoising loss for any network on any path."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import as_float
from ..parametrizations import Parametrization, output, target
from ..process import perturb
from ..typing import Network, Schedule, Time, Weighting
from ..weightings import unweighted

__all__ = ["denoising"]


def denoising(
    key: PRNGKeyArray,
    network: Network,
    schedule: Schedule,
    parametrization: Parametrization,
    x0: Float[ArrayLike, "*x"],
    t: Time,
    weighting: Weighting = unweighted,
) -> Float[Array, ""]:
    """The denoising loss of one example, `w(t) |network(x_t, t) - target|^2` (1.14), (1.15).

    Here `x_t = alpha x0 + sigma eps`. With SCORE it is denoising score matching, with EPS the loss
    of DDPM, with VELOCITY flow matching from Gaussian noise.

    Args:
        key: a PRNG key, for the noise eps.
        network: the network, its condition bound.
        schedule: the path.
        parametrization: what the network predicts.
        x0: one example, of any shape.
        t: its time, a scalar; every weighting is finite for 0 < t < 1.
        weighting: the weight of the noise level.

    Returns:
        The loss, a mean over the elements of x0 (`2 / d` times the integrand of (1.14)).

    Raises:
        ValueError: if the network's output has another shape than x0, or t is not a scalar.

    Reference: Vincent 2011; Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 14; Song et al. 2021
    (arXiv 2011.13456), eq. 7; (1.14), (1.15).

    >>> def network(x, t):  # if all data are 0, eps = x / sigma
    ...     return x / t
    >>> denoising(jax.random.key(0), network, linear(), EPS, jnp.zeros(4), 0.5, inverse_variance)
    Array(0., dtype=float32)
    """
    x0 = as_float(x0, "x0")
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    x = perturb(schedule, x0, eps, t)
    out = output(network, schedule, parametrization, x, t)
    error = out - target(schedule, parametrization, x0, eps, t)
    return weighting(schedule, parametrization, t) * jnp.mean(error**2)
