"""The likelihood of a diffusion model, by the change of variables along its probability flow.

    log p(x0) = log p(x1) + int_0^1 div v(x_t, t) dt                     (1.22), (1.23)
    div v = tr(dv/dx) = mean_z z^T (dv/dx) z,   E[z z^T] = I             (Hutchinson)

The probes z are one array, drawn once and held along the whole trajectory: `rademacher_probes` and `gaussian_probes`
give unbiased estimates, and the scaled basis of `exact_probes`, `z_i = sqrt(d) e_i`, the trace itself. All are the same
computation.

Discrete data of k levels are bins of the density: with x = 2 (value + u) / k - 1 and any density q of u in [0, 1)^d,

    log P(value) = d log(2/k) + log int p(x) du >= d log(2/k) + E log (1/K) sum_k p(x_k) / q(u_k) >= ... E log p(x) / q(u)

`dequantize` draws u from the uniform q = 1, `variational_dequantize` from one that may be learned; `log p - log q` is what
`bits_per_dim(..., levels=k)` takes, and `importance_weighted_bound` of K of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._bind import bind
from ._math import as_float, check_that, safe_sqrt, zeros_of
from .flows import probability_flow
from .process import log_prior
from .solve import integrate
from .typing import Denoiser, Schedule, Time

__all__ = [
    "StandardErrors",
    "bits_per_dim",
    "dequantize",
    "divergence",
    "exact_probes",
    "gaussian_probes",
    "importance_weighted_bound",
    "log_likelihood",
    "rademacher_probes",
    "standard_errors",
    "variational_dequantize",
]

Probes = Callable[[PRNGKeyArray, Array], Array]


def rademacher_probes(key: PRNGKeyArray, x: Array, n: int = 1) -> Float[Array, "n *x"]:
    """N probes of independent random signs: of all probes, those of the least variance for a symmetric Jacobian.

    Args:
        key: a PRNG key.
        x: what to probe at; only its shape and dtype matter.
        n: how many, at least 1. To choose it: `functools.partial(rademacher_probes, n=8)`.

    Returns:
        Probes, of shape (n, *x.shape).

    Reference: Hutchinson 1989; Grathwohl et al. 2019 (FFJORD, arXiv 1810.01367), section 3.1.

    >>> rademacher_probes(jax.random.key(0), jnp.zeros(3), n=2).shape
    (2, 3)
    """
    return jax.random.rademacher(key, (n, *x.shape), x.dtype)


def gaussian_probes(key: PRNGKeyArray, x: Array, n: int = 1) -> Float[Array, "n *x"]:
    """N standard normal probes.

    Args:
        key: a PRNG key.
        x: what to probe at; only its shape and dtype matter.
        n: how many, at least 1.

    Returns:
        Probes, of shape (n, *x.shape).

    Reference: as `rademacher_probes`.

    >>> gaussian_probes(jax.random.key(0), jnp.zeros(3), n=2).shape
    (2, 3)
    """
    return jax.random.normal(key, (n, *x.shape), x.dtype)


def exact_probes(key: PRNGKeyArray, x: Array) -> Float[Array, "d *x"]:
    """The d probes `sqrt(d) e_i`, over which the mean of `z^T J z` is the trace of J: d products, no randomness.

    Args:
        key: unused.
        x: what to probe at; only its shape and dtype matter.

    Returns:
        Probes, of shape (x.size, *x.shape).

    >>> exact_probes(None, jnp.zeros(4))[0]
    Array([2., 0., 0., 0.], dtype=float32)
    """
    return (jnp.sqrt(x.size) * jnp.eye(x.size)).astype(x.dtype).reshape(x.size, *x.shape)


def divergence(f: Callable[[Array], Array], x: Array, probes: Float[Array, "n *x"]) -> tuple[Array, Float[Array, ""]]:
    """f(x), and the estimate `mean_z z^T (df/dx) z` of its divergence: one evaluation and one product per probe.

    Args:
        f: a vector field, from the shape of x to the shape of x.
        x: one point, of any shape.
        probes: the probes z, of shape (n, *x.shape).

    Returns:
        `(f(x), divergence)`.

    Raises:
        ValueError: if the probes do not have the shape of x behind their first axis.

    >>> f = lambda x: jnp.array([[1.0, 2.0], [3.0, 4.0]]) @ x
    >>> divergence(f, jnp.ones(2), exact_probes(None, jnp.ones(2)))[1].round(4)
    Array(5., dtype=float32)
    """
    y, products = probe_products(f, x, probes)
    return y, jnp.vdot(products, probes) / len(probes)


def probe_products(f: Callable[[Array], Array], x: Array, probes: Float[Array, "n *x"]) -> tuple[Array, Array]:
    """f(x), and `z^T (df/dx)` for every probe, of shape (n, *x.shape)."""
    if probes.shape[1:] != x.shape or not probes.shape[0]:
        raise ValueError(f"probes: expected shape (n, {', '.join(map(str, x.shape))}), n >= 1, got {probes.shape}")
    x = as_float(x, "x")
    y, transposed = jax.vjp(lambda x: as_float(f(x), "network's output").astype(x.dtype), x)
    if y.shape != x.shape:
        raise ValueError(f"network: it returned {y.shape} for x of shape {x.shape}; expected the same shape")
    probes = probes + zeros_of(y)[None]
    if len(probes) == 1:  # a mapped axis of length 1 would cost copies of every activation
        return y, transposed(probes[0])[0][None]
    return y, jax.vmap(lambda z: transposed(z)[0])(probes)


def log_likelihood(
    key: PRNGKeyArray,
    denoise: Denoiser,
    schedule: Schedule,
    x: Array,
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
        key: a PRNG key, of the probes.
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


def bits_per_dim(log_density: Array, dims: int, levels: int | None = None) -> Array:
    """Bits per dimension, `-log p / (d log 2)` (1.21); with `levels`, those of the discrete data behind dequantized ones.

    Data of k levels scaled to [-1, 1] by `dequantize` gain `log2(k / 2)` bits: 7 for 8-bit data.

    Args:
        log_density: log densities in nats, of any shape.
        dims: d, the number of elements of one example, at least 1.
        levels: k, the number of levels of the data; None for continuous data.

    Returns:
        Bits per dimension, of the shape of log_density.

    Raises:
        ValueError: if dims < 1 or levels < 2.

    Reference: Theis et al. 2016 (arXiv 1511.01844), section 3.1.

    >>> uniform_density = -64 * jnp.log(2.0)  # uniform on [-1, 1]^64
    >>> float(bits_per_dim(uniform_density, 64, levels=256))
    8.0
    """
    if dims < 1:
        raise ValueError(f"dims: expected at least 1, got {dims}")
    if levels is not None and levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    return -log_density / (dims * jnp.log(2.0)) + (0.0 if levels is None else jnp.log2(levels / 2))


def dequantize(key: PRNGKeyArray, values: Int[Array, "..."], levels: int) -> Float[Array, "..."]:
    """Uniform dequantization of discrete data to [-1, 1): `2 (value + u) / levels - 1`, u ~ U[0, 1).

    Args:
        key: a PRNG key.
        values: integers in [0, levels), of any shape.
        levels: the number of levels, at least 2: 256 for 8-bit data.

    Returns:
        Floating-point data, of the shape of values.

    Raises:
        ValueError: if values are not integers, levels < 2, or concrete values are out of range.

    Reference: Theis et al. 2016 (arXiv 1511.01844), section 3.1.

    >>> x = dequantize(jax.random.key(0), jnp.array([0, 255]), 256)
    >>> bool((x[0] < -0.99) & (x[1] > 0.99))
    True
    """
    values = _check_values(values, levels)
    return _in_bins(values, jax.random.uniform(key, values.shape), levels)


def variational_dequantize(
    key: PRNGKeyArray, values: Int[Array, "..."], levels: int, mean: float | Array, scale: float | Array
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Dequantization by a logit-normal q, `x = 2 (value + u) / levels - 1` with `u = sigmoid(mean + scale eps)`.

    `log p(x) - log q(u)` bounds the log probability of the values as the log density of `dequantize`'s x does, and has the
    same units: q is a density of u, 0 = log q where it is uniform. It is differentiable in mean and scale.

    Args:
        key: a PRNG key.
        values: integers in [0, levels): one example, of any shape. vmap for many.
        levels: the number of levels, at least 2.
        mean: of the logit of u, of the shape of values or a scalar; from a network that sees the values, for instance.
        scale: its standard deviation, positive, likewise.

    Returns:
        `(x, log_q)`: floating-point data in [-1, 1), of the shape of values, and the log density of u, a scalar.

    Raises:
        ValueError: if values are not integers, levels < 2, mean or scale have another shape, concrete values are out of
            range, or a concrete scale is not positive.

    Reference: Ho et al. 2019 (Flow++, arXiv 1902.00275), section 3.1.

    >>> keys, values = jax.random.split(jax.random.key(0), 1000), jnp.array([0, 255])
    >>> x, log_q = jax.vmap(lambda key: variational_dequantize(key, values, 256, mean=0.0, scale=1.0))(keys)
    >>> log_density = -2 * jnp.log(2.0)  # uniform on [-1, 1]^2: 8 bits, and what q is off the uniform
    >>> float(bits_per_dim(log_density - log_q, 2, levels=256).mean())
    8.3...
    """
    values = _check_values(values, levels)
    mean, scale = as_float(mean, "mean"), as_float(scale, "scale")
    for name, array in (("mean", mean), ("scale", scale)):
        if array.shape not in ((), values.shape):
            raise ValueError(f"{name}: expected a scalar or the shape of values, {values.shape}, got {array.shape}")
    check_that(lambda s: s > 0, "scale: expected positive numbers, got {}", scale)
    eps = jax.random.normal(key, values.shape, jnp.result_type(mean, scale))
    logit = mean + scale * eps
    log_slope = jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit)  # of u by its logit, u (1 - u)
    log_q = jnp.sum(jax.scipy.stats.norm.logpdf(eps) - jnp.log(scale) - log_slope)
    return _in_bins(values, jax.nn.sigmoid(logit), levels), log_q


def importance_weighted_bound(log_weights: Float[Array, "k *batch"]) -> Float[Array, "*batch"]:
    """The multi-sample bound on a log probability, `log (1/K) sum_k w_k`, from K independent `log w_k`.

    For discrete data `log w_k = log p(x_k) - log q(u_k)` over K dequantizations of one example (log q = 0 of the uniform
    ones). Its mean rises with K, from that of log w to the log probability itself. Log densities must be exact: the
    noise of Hutchinson's probes, of variance v, lifts the bound by about v / 2, above the truth.

    Args:
        log_weights: in nats, of shape (K, ...).

    Returns:
        The bound in nats, of shape (...): a log density to `bits_per_dim`.

    Raises:
        ValueError: if there is no first axis, or nothing on it.

    Reference: Burda et al. 2016 (arXiv 1509.00519), eq. 8; Hoogeboom et al. 2020 (arXiv 2001.11235) for dequantization.

    >>> float(importance_weighted_bound(jnp.log(jnp.array([1.0, 3.0])))) == float(jnp.log(2.0))
    True
    """
    log_weights = as_float(log_weights, "log_weights")
    if not log_weights.ndim or not len(log_weights):
        raise ValueError(f"log_weights: expected shape (K, ...), K >= 1, got {log_weights.shape}")
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(len(log_weights))


class StandardErrors(NamedTuple):
    """A mean over examples, and the two standard errors whose squares add up to the square of its own."""

    mean: Float[Array, ""]
    of_data: Float[Array, ""]
    of_probes: Float[Array, ""]


def standard_errors(values: Float[Array, "n m"]) -> StandardErrors:
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


def _check_values(values, levels):
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"values: expected integers, got dtype {values.dtype}")
    if levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    check_that(lambda v: (v >= 0) & (v < levels), f"values: expected integers in [0, {levels}), got {{}}", values)
    return values


def _in_bins(values, u, levels):
    """`2 (value + u) / levels - 1`, with u kept off 0 and 1 by what rounding could carry into the next bin."""
    margin = 2 * levels * jnp.finfo(u.dtype).eps
    return 2 * (values + jnp.clip(u, margin, 1 - margin)) / levels - 1
