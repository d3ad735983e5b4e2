r"""Maximum likelihood of a continuous normalizing flow with two regularizers, for one example.

    -log p(x_0) = -log p(x_1) - int_0^1 div v dt        (1.12), (1.22), (1.23)
    kinetic     = int_0^1 |v(x_t, t)|^2 dt              energy, least for optimal transport
    jacobian    = int_0^1 |dv/dx|_F^2 dt                variation of the velocity around the path

The regularizers keep the flow easy to integrate. Both are integrals along the trajectory, computed
in the same solve. The Jacobian's norm is `E |z^T dv/dx|^2` over the probes z of the divergence, so
it reuses their products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._calls import call_network
from .._checks import as_float
from ..divergence import probe_products, rademacher_probes
from ..solve import integrate
from ..typing import Network, Probes, Time

__all__ = ["FlowDensity", "maximum_likelihood", "standard_normal"]


class FlowDensity(NamedTuple):
    """The loss of one example, and its parts."""

    loss: Float[Array, ""]
    """`-log_density + kinetic_weight * kinetic + jacobian_weight * jacobian`."""
    log_density: Float[Array, ""]
    """log p(x_0), in nats."""
    kinetic: Float[Array, ""]
    """`int |v|^2 dt`."""
    jacobian: Float[Array, ""]
    """`int |dv/dx|_F^2 dt`."""


def standard_normal(x: Array) -> Float[Array, ""]:
    """The log density of N(0, I) at one x, in nats.

    Args:
        x: one point, of any shape.

    Returns:
        The log density.

    >>> float(standard_normal(jnp.zeros(2)))  # -log(2 pi)
    -1.8378...
    """
    return jnp.sum(jax.scipy.stats.norm.logpdf(x))


def maximum_likelihood(
    key: PRNGKeyArray | None,
    network: Network,
    x: Float[ArrayLike, "*x"],
    *,
    kinetic_weight: float | Array = 0.0,
    jacobian_weight: float | Array = 0.0,
    log_prior: Callable[[Array], Array] = standard_normal,
    probes: Probes = rademacher_probes,
    start: Time = 0.0,
    end: Time = 1.0,
    **options: Any,
) -> FlowDensity:
    """The regularized negative log-likelihood of one example under a velocity network (1.12).

    Args:
        key: a PRNG key for the probes, which are drawn once and kept along the trajectory;
            `exact_probes` need none.
        network: `(x, t) -> dx/dt`, from data (t = 0) to prior (t = 1). Bind its parameters
            (`bind(apply, params)`): `diffrax.BacksolveAdjoint()` cannot differentiate with respect
            to what a closure holds.
        x: one example, of any shape.
        kinetic_weight: lambda_K, at least 0. The integral is a sum over the elements of x, like the
            log-likelihood.
        jacobian_weight: lambda_J, at least 0.
        log_prior: `x_1 -> log p(x_1)`, of any prior with a density.
        probes: `(key, x) -> (n, *x.shape)`, see `likelihood.log_likelihood`.
        start: the time of the data.
        end: the time of the prior.
        **options: solver, stepsize_controller, adjoint, dt0, max_steps of `solve.integrate`. The
            adjoint chooses how the gradient is computed: `diffrax.RecursiveCheckpointAdjoint()`
            (the default) is exact for the steps taken, `diffrax.BacksolveAdjoint()` solves backward
            in constant memory, `diffrax.DirectAdjoint()` allows forward mode.

    Returns:
        `FlowDensity(loss, log_density, kinetic, jacobian)`; to train, average the losses.

    Raises:
        ValueError: if the network's output or a probe has another shape than x.
        RuntimeError: if max_steps is too small.

    Reference: Chen et al. 2018 (arXiv 1806.07366), section 4; Grathwohl et al. 2019 (FFJORD, arXiv
    1810.01367), eq. 8; Finlay et al. 2020 (RNODE, arXiv 2002.02798), sections 3 to 5 and algorithm
    1; (1.12).

    >>> from diffjax.divergence import exact_probes
    >>> velocity = lambda x, t: jnp.log(2.0) * x  # x_1 = 2 x_0
    >>> flow = maximum_likelihood(None, velocity, jnp.zeros(2), probes=exact_probes)
    >>> float(flow.log_density), float(flow.jacobian)  # log(4 / (2 pi)) and 2 log(2)^2
    (-0.4515..., 0.9609...)
    """
    x = as_float(x, "x")
    zero = jnp.zeros((), x.dtype)
    flow = bind(_with_integrals, network, probes(key, x))
    x1, integral, kinetic, jacobian = integrate(flow, (x, zero, zero, zero), start, end, **options)
    log_density = log_prior(x1) + integral
    loss = -log_density + kinetic_weight * kinetic + jacobian_weight * jacobian
    return FlowDensity(loss, log_density, kinetic, jacobian)


def _with_integrals(network, z, t, state, args):
    with jax.default_matmul_precision("highest"):
        velocity, products = probe_products(lambda x: call_network(network, x, t), state[0], z)
        divergence = jnp.vdot(products, z) / len(z)
    return velocity, divergence, jnp.sum(velocity**2), jnp.sum(products**2) / len(z)
