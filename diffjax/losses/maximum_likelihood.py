r"""Maximum likelihood of a continuous normalizing flow, for one example (1.12), with what keeps the flow easy to integrate.

    -log p(x_0) = -log p(x_1) - int_0^1 div v dt        (1.12), (1.22), (1.23)
    kinetic     = int_0^1 |v(x_t, t)|^2 dt              the paths' energy: least for optimal transport
    jacobian    = int_0^1 |dv/dx|_F^2 dt                how much the velocity varies around the path

Both are integrals along the trajectory, added to the state of the same solve; the Jacobian's norm is `E |z^T dv/dx|^2` over
the probes of the divergence, whose products are at hand.
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
    """The negative log-likelihood of one example under the flow of a velocity network, regularized (1.12).

    Args:
        key: a PRNG key, of the probes: drawn once, and held along the trajectory.
        network: `(x, t) -> dx/dt`, from data (t = 0) to prior (t = 1). Bind its parameters (`bind(apply, params)`): what a
            closure hides, `diffrax.BacksolveAdjoint()` cannot differentiate.
        x: one example, of any shape.
        kinetic_weight: at least 0; lambda_K. Like the nats it weighs against, the integral is a sum over the elements of x.
        jacobian_weight: at least 0; lambda_J.
        log_prior: `x_1 -> log p(x_1)`: any prior with a density.
        probes: `(key, x) -> (n, *x.shape)`, see `likelihood.log_likelihood`.
        start: the time of the data.
        end: the time of the prior.
        **options: solver, stepsize_controller, adjoint, dt0, max_steps of `solve.integrate`. The adjoint chooses how the
            gradient is found: `diffrax.RecursiveCheckpointAdjoint()` (the default) is exact for the steps that were made,
            `diffrax.BacksolveAdjoint()` solves backwards in constant memory, `diffrax.DirectAdjoint()` allows forward mode.

    Returns:
        `FlowDensity(loss, log_density, kinetic, jacobian)`; to train, `jnp.mean` the losses.

    Raises:
        ValueError: if the network's output or a probe has another shape than x.
        RuntimeError: if max_steps do not suffice.

    Reference: Chen et al. 2018 (arXiv 1806.07366), section 4; Grathwohl et al. 2019 (FFJORD, arXiv 1810.01367), eq. 8;
    Finlay et al. 2020 (RNODE, arXiv 2002.02798), sections 3 to 5 and algorithm 1.

    >>> from diffjax.divergence import exact_probes
    >>> flow = maximum_likelihood(None, lambda x, t: jnp.log(2.0) * x, jnp.zeros(2), probes=exact_probes)
    >>> float(flow.log_density), float(flow.jacobian)  # x_1 = 2 x_0: log(4 / (2 pi)); 2 log(2)^2
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
