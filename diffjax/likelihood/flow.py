"""The log density of a model, by the change of variables along its probability flow.

    log p(x0) = log p(x1) + int_0^1 div v(x_t, t) dt                     (1.22), (1.23)

The probes of the divergence are drawn once and held along the whole trajectory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._checks import as_float
from .._numerics import safe_sqrt
from ..divergence import divergence, rademacher_probes
from ..dynamics import probability_flow
from ..process import log_prior
from ..solve import integrate
from ..typing import Denoiser, Probes, Schedule, Time

__all__ = ["StandardErrors", "log_likelihood", "standard_errors"]


def log_likelihood(
    key: PRNGKeyArray | None,
    denoise: Denoiser,
    schedule: Schedule,
    x: Float[ArrayLike, "*x"],
    *,
    probes: Probes = rademacher_probes,
    start: Time = 1e-5,
    end: Time = 1.0,
    with_steps: bool = False,
    **options: Any,
) -> Any:
    """The log density of one x under the model, `log p(x1) + int div v dt` along its probability flow (1.22), (1.23).

    Runs at matmul precision "highest". vmap for many x, with a key for each.

    Args:
        key: a PRNG key, of the probes; None if they need none, as `exact_probes`.
        denoise: the denoiser.
        schedule: its path; the prior is N(0, sigma(end)^2 I).
        x: one sample, of any shape.
        probes: `(key, x) -> (n, *x.shape)`: `rademacher_probes`, `gaussian_probes`, `exact_probes` or your own.
        start: the time of x. 0 where the velocity is finite there; above it for networks on VP paths. Where alpha(start) is
            not about 1, the log density of data x0 is that of `x = alpha x0` plus `d log alpha`.
        end: the time of the prior.
        with_steps: whether to return the number of steps, too: each takes as many evaluations of the
            denoiser as the solver has stages, 6 for the default `diffrax.Tsit5()`.
        **options: solver, stepsize_controller, adjoint, dt0, max_steps of `solve.integrate`; the controller's tolerances
            bound the error of a step, that of the log density's integral too.

    Returns:
        The log density in nats, a scalar (an unbiased estimate of it, unless the probes are exact); with_steps, a pair
        of it and the number of steps that were tried.

    Raises:
        ValueError: if the probes do not have the shape of x behind their first axis.
        RuntimeError: if max_steps do not suffice.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 39-40; Grathwohl et al. 2019 (arXiv 1810.01367), eq. 8.

    >>> denoise = gaussian(jnp.zeros(2), jnp.eye(2), linear())
    >>> float(log_likelihood(jax.random.key(0), denoise, linear(), jnp.zeros(2), probes=exact_probes))  # -log(2 pi)
    -1.837...
    """
    x = as_float(x, "x")
    flow = bind(_with_divergence, probability_flow(denoise, schedule), probes(key, x))
    state = x, jnp.zeros((), x.dtype)
    (x1, integral), steps = integrate(flow, state, start, end, with_steps=True, **options)
    log_density = log_prior(schedule, x1, end) + integral
    return (log_density, steps) if with_steps else log_density


def _with_divergence(flow, z, t, state, args):
    with jax.default_matmul_precision("highest"):  # here, where an adjoint that traces the field again finds it, too
        return divergence(lambda x: flow(t, x, args), state[0], z)


class StandardErrors(NamedTuple):
    """A mean over examples, and the two standard errors whose squares add up to the square of its own."""

    mean: Float[Array, ""]
    of_data: Float[Array, ""]
    """The standard error from the choice of the examples."""
    of_probes: Float[Array, ""]
    """The standard error from the choice of the probes."""


def standard_errors(values: Float[ArrayLike, "n m"]) -> StandardErrors:
    """The mean of estimates for n examples with m probes each, and its standard errors from the data and the probes.

    `of_probes^2 = within / (n m)`, `of_data^2 = between / n - of_probes^2`, where `within` is the unbiased variance over
    the probes, averaged over the examples, and `between` that of the examples' means. Both squares are unbiased, but for
    0 in place of an `of_data^2` below it.

    Args:
        values: log densities or bits/dim, of shape (n, m), m >= 2; each with a probe of its own. What else is drawn anew
            with it, such as the noise of dequantization, counts as the probes'.

    Returns:
        `StandardErrors(mean, of_data, of_probes)` in the unit of values. `of_data` of a single example is NaN.

    Raises:
        ValueError: if values have another shape.

    Reference: Searle, Casella & McCulloch 1992, chapter 3: the estimator of one-way random effects.

    >>> errors = standard_errors(jnp.array([[1.0, 3.0], [6.0, 6.0]]))
    >>> float(errors.mean), float(errors.of_probes), float(errors.of_data)  # 4, sqrt(1 / 4), sqrt(8 / 2 - 1 / 4)
    (4.0, 0.5, 1.936...)
    """
    values = as_float(values, "values")
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(f"values: expected shape (n, m), n >= 1 and m >= 2, got {values.shape}")
    of_probes = jnp.mean(jnp.var(values, axis=1, ddof=1)) / values.size
    total = jnp.var(jnp.mean(values, axis=1), ddof=1) / len(values)
    return StandardErrors(jnp.mean(values), safe_sqrt(jnp.maximum(total - of_probes, 0.0)), safe_sqrt(of_probes))
