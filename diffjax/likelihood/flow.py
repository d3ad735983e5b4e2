"""The log density of a model, by the change of variables along its probability flow.

    log p(x0) = log p(x1) + int_0^1 div v(x_t, t) dt                     (1.22), (1.23)

If the flow starts at a time s > 0, the model of the data is p(x0) = alpha_s^d p_s(alpha_s x0). The
probes of the divergence are drawn once and kept along the whole trajectory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._checks import as_float, check_that
from .._numerics import safe_sqrt
from ..divergence import divergence, rademacher_probes
from ..dynamics import probability_flow
from ..process import log_prior
from ..schedules import alpha_sigma
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
    """The log density of one data point under the model, by its probability flow (1.22), (1.23).

    It is `d log alpha(start) + log p(x_end) + int div v dt` along the flow from `alpha(start) x` at
    `start` to `end`. It runs at matmul precision "highest". vmap for many x, with a key for each.

    Args:
        key: a PRNG key for the probes; `exact_probes` need none.
        denoise: the denoiser.
        schedule: its path; the prior is N(0, sigma(end)^2 I).
        x: one data point, of any shape.
        probes: `(key, x) -> (n, *x.shape)`: `rademacher_probes`, `gaussian_probes`, `exact_probes`
            or your own.
        start: the time at which the flow starts, with alpha > 0: 0 where the velocity is finite
            there, above 0 for networks on VP paths. The log density of the marginal at a later time
            t is `log_likelihood(..., x_t / alpha, start=t) - d log alpha`.
        end: the time of the prior.
        with_steps: whether to return the number of steps, too. Each takes as many evaluations of
            the denoiser as the solver has stages, 6 for the default `diffrax.Tsit5()`.
        **options: solver, stepsize_controller, adjoint, dt0, max_steps of `solve.integrate`. The
            controller's tolerances bound the error per step, both of x and of the log density's
            integral.

    Returns:
        The log density in nats, a scalar. Unless the probes are exact, it is an unbiased estimate.
        With `with_steps`, a pair of it and the number of steps that were tried.

    Raises:
        ValueError: if the shape of the probes is not (n, *x.shape), or alpha is 0 at a concrete
            start.
        RuntimeError: if the flow needs more than max_steps.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 39-40; Grathwohl et al. 2019 (FFJORD, arXiv
    1810.01367), eq. 8; (1.22), (1.23).

    >>> key, x, schedule = jax.random.key(0), jnp.zeros(2), linear()
    >>> denoise = gaussian(jnp.zeros(2), jnp.eye(2), schedule)
    >>> float(log_likelihood(key, denoise, schedule, x, probes=exact_probes))  # -log(2 pi)
    -1.837...
    """
    x, alpha = as_float(x, "x"), alpha_sigma(schedule, start)[0]
    check_that(
        lambda alpha: alpha > 0, "start: expected a time where alpha > 0, got alpha = {}", alpha
    )
    flow = bind(_with_divergence, probability_flow(denoise, schedule), probes(key, x))
    state = (alpha * x).astype(x.dtype), jnp.zeros((), x.dtype)
    (x1, integral), steps = integrate(flow, state, start, end, with_steps=True, **options)
    log_density = x.size * jnp.log(alpha) + log_prior(schedule, x1, end) + integral
    return (log_density, steps) if with_steps else log_density


def _with_divergence(flow, z, t, state, args):
    # set here, because an adjoint may trace the field again
    with jax.default_matmul_precision("highest"):
        return divergence(lambda x: flow(t, x, args), state[0], z)


class StandardErrors(NamedTuple):
    """A mean over examples, and the two parts of its standard error, which add in squares."""

    mean: Float[Array, ""]
    of_data: Float[Array, ""]
    """The standard error from the choice of the examples."""
    of_probes: Float[Array, ""]
    """The standard error from the choice of the probes."""


def standard_errors(values: Float[ArrayLike, "n m"]) -> StandardErrors:
    """The mean of estimates for n examples with m probes each, and its two standard errors.

    `of_probes^2 = within / (n m)`, `of_data^2 = between / n - of_probes^2`, where `within` is the
    unbiased variance over the probes, averaged over the examples, and `between` that of the
    examples' means. Both squares are unbiased, except that 0 replaces a negative `of_data^2`.

    Args:
        values: log densities or bits/dim, of shape (n, m), m >= 2, each from its own probe. Other
            noise that is drawn with the probe, such as that of dequantization, counts as part of
            it.

    Returns:
        `StandardErrors(mean, of_data, of_probes)` in the units of values. `of_data` of a single
        example is NaN.

    Raises:
        ValueError: if values have another shape.

    Reference: Searle, Casella and McCulloch 1992 (Variance Components, Wiley), chapter 3, the
    estimator of one-way random effects.

    >>> errors = standard_errors(jnp.array([[1.0, 3.0], [6.0, 6.0]]))
    >>> float(errors.mean), float(errors.of_probes)  # 4, sqrt(1 / 4)
    (4.0, 0.5)
    >>> float(errors.of_data)  # sqrt(8 / 2 - 1 / 4)
    1.936...
    """
    values = as_float(values, "values")
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(f"values: expected shape (n, m), n >= 1 and m >= 2, got {values.shape}")
    of_probes = jnp.mean(jnp.var(values, axis=1, ddof=1)) / values.size
    total = jnp.var(jnp.mean(values, axis=1), ddof=1) / len(values)
    return StandardErrors(
        jnp.mean(values), safe_sqrt(jnp.maximum(total - of_probes, 0.0)), safe_sqrt(of_probes)
    )
