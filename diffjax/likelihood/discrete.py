"""The likelihood of discrete data, by dequantization.

A value of k levels has the mass of the density in its bin. With x = 2 (value + u) / k - 1 and any
density q of u in [0, 1)^d,

    log P(value) = d log(2/k) + log int p(x) du
                >= d log(2/k) + E log (1/K) sum_k p(x_k) / q(u_k)
                >= d log(2/k) + E log p(x) / q(u)

`dequantize` draws u from the uniform q = 1, `variational_dequantize` from a q that may be learned.
`bits_per_dim(..., levels=k)` takes `log p - log q`, or `importance_weighted_bound` of K of them.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from .._checks import as_float, check_that

__all__ = [
    "bits_per_dim",
    "dequantize",
    "importance_weighted_bound",
    "quantize",
    "variational_dequantize",
]


def bits_per_dim(log_density: ArrayLike, dims: int, levels: int | None = None) -> Array:
    """Bits per dimension, `-log p / (d log 2)` (1.21), of continuous or of discrete data.

    With `levels`, they are those of discrete data that `dequantize` scaled to [-1, 1], which adds
    `log2(k / 2)` bits: 7 for 8-bit data.

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
    return -jnp.asarray(log_density) / (dims * jnp.log(2.0)) + (
        0.0 if levels is None else jnp.log2(levels / 2)
    )


def dequantize(
    key: PRNGKeyArray, values: Integer[ArrayLike, "*x"], levels: int
) -> Float[Array, "*x"]:
    """Uniform dequantization to [-1, 1): `2 (value + u) / levels - 1` with u ~ U[0, 1).

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


def quantize(x: Float[ArrayLike, "*x"], levels: int) -> Int[Array, "*x"]:
    """The inverse of `dequantize`: `floor(levels (x + 1) / 2)`, clipped to [0, levels).

    Args:
        x: floating-point data, of any shape; samples may leave [-1, 1).
        levels: the number of levels, at least 2.

    Returns:
        Integers in [0, levels), of the shape of x.

    Raises:
        ValueError: if x is not floating-point, or levels < 2.

    >>> quantize(jnp.array([-1.2, -1.0, 0.0, 0.999]), 256)
    Array([  0,   0, 128, 255], dtype=int32)
    """
    if levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    return jnp.clip(jnp.floor((as_float(x, "x") + 1) / 2 * levels), 0, levels - 1).astype(jnp.int32)


def variational_dequantize(
    key: PRNGKeyArray,
    values: Integer[ArrayLike, "*x"],
    levels: int,
    mean: Float[ArrayLike, "..."],
    scale: Float[ArrayLike, "..."],
) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
    """Dequantization by a logit-normal q: `u = sigmoid(mean + scale eps)`.

    With `x = 2 (value + u) / levels - 1`, `log p(x) - log q(u)` bounds the log probability of the
    values as the log density of `dequantize`'s x does, in the same units: q is a density of u, and
    log q = 0 where it is uniform. The result is differentiable in mean and scale.

    Args:
        key: a PRNG key.
        values: integers in [0, levels): one example, of any shape. vmap for many.
        levels: the number of levels, at least 2.
        mean: the mean of the logit of u, of the shape of values or a scalar; for instance from a
            network that sees the values.
        scale: the standard deviation of the logit of u, positive, likewise.

    Returns:
        `(x, log_q)`: floating-point data in [-1, 1), of the shape of values, and the log density of
        u, a scalar.

    Raises:
        ValueError: if values are not integers, levels < 2, mean or scale have another shape,
            concrete values are out of range, or a concrete scale is not positive.

    Reference: Ho et al. 2019 (Flow++, arXiv 1902.00275), section 3.1.

    >>> keys, values = jax.random.split(jax.random.key(0), 1000), jnp.array([0, 255])
    >>> draw = lambda key: variational_dequantize(key, values, 256, mean=0.0, scale=1.0)
    >>> x, log_q = jax.vmap(draw)(keys)
    >>> log_density = -2 * jnp.log(2.0)  # uniform on [-1, 1]^2: 8 bits, more if q is not uniform
    >>> float(bits_per_dim(log_density - log_q, 2, levels=256).mean())
    8.3...
    """
    values = _check_values(values, levels)
    mean, scale = as_float(mean, "mean"), as_float(scale, "scale")
    for name, array in (("mean", mean), ("scale", scale)):
        if array.shape not in ((), values.shape):
            raise ValueError(
                f"{name}: expected a scalar or the shape of values, {values.shape}, "
                f"got {array.shape}"
            )
    check_that(lambda s: s > 0, "scale: expected positive numbers, got {}", scale)
    eps = jax.random.normal(key, values.shape, jnp.result_type(mean, scale))
    logit = mean + scale * eps
    # the derivative of u with respect to its logit is u (1 - u)
    log_slope = jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit)
    log_q = jnp.sum(jax.scipy.stats.norm.logpdf(eps) - jnp.log(scale) - log_slope)
    return _in_bins(values, jax.nn.sigmoid(logit), levels), log_q


def importance_weighted_bound(log_weights: Float[ArrayLike, "k *batch"]) -> Float[Array, "*batch"]:
    """The bound `log (1/K) sum_k w_k` on a log probability, from K independent `log w_k`.

    For discrete data, `log w_k = log p(x_k) - log q(u_k)` for K dequantizations of one example,
    with log q = 0 for uniform ones. The mean of the bound rises with K, from the mean of log w to
    the log probability itself. The log densities must be exact: noise of variance v from
    Hutchinson's probes raises the bound by about v / 2, above the truth.

    Args:
        log_weights: in nats, of shape (K, ...).

    Returns:
        The bound in nats, of shape (...). `bits_per_dim` takes it as a log density.

    Raises:
        ValueError: if there is no first axis, or nothing on it.

    Reference: Burda et al. 2016 (IWAE, arXiv 1509.00519), eq. 8; for dequantization Hoogeboom et
    al. 2020 (arXiv 2001.11235).

    >>> float(importance_weighted_bound(jnp.log(jnp.array([1.0, 3.0])))) == float(jnp.log(2.0))
    True
    """
    log_weights = as_float(log_weights, "log_weights")
    if not log_weights.ndim or not len(log_weights):
        raise ValueError(f"log_weights: expected shape (K, ...), K >= 1, got {log_weights.shape}")
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(len(log_weights))


def _check_values(values, levels):
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"values: expected integers, got dtype {values.dtype}")
    if levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    check_that(
        lambda v: (v >= 0) & (v < levels),
        f"values: expected integers in [0, {levels}), got {{}}",
        values,
    )
    return values


def _in_bins(values, u, levels):
    """`2 (value + u) / levels - 1`, with u clipped so that rounding cannot leave the bin."""
    margin = 2 * levels * jnp.finfo(u.dtype).eps
    return 2 * (values + jnp.clip(u, margin, 1 - margin)) / levels - 1
