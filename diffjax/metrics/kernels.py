"""Maximum mean discrepancy, with two cases: the kernel distance (KID) and the energy distance."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._numerics import safe_sqrt
from .._once import once
from ._features import block_rows, map_distances, map_rows, pair

__all__ = ["KernelDistance", "energy_distance", "kernel_distance", "mmd", "polynomial_kernel"]

_ROWS = 256  # so many rows meet all the others in one product of matrices
Kernel = Callable[[Float[Array, " d"], Float[Array, " d"]], Float[Array, ""]]


def mmd(
    kernel: Kernel, x: Float[ArrayLike, "n *x"], y: Float[ArrayLike, "m *x"]
) -> Float[Array, ""]:
    """The unbiased estimate of the squared maximum mean discrepancy.

        sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1))
            - 2 sum_{ij} k(x_i, y_j) / (n m)

    Because it is unbiased, it can be negative when the distributions are close. If it is a loss,
    the kernel must have a finite gradient at x = y (`jnp.linalg.norm` has none).

    Args:
        kernel: `k(x, y)` of two samples, each flattened to (d,), with `k(x, y) = k(y, x)`.
        x: samples (n, ...), n >= 2.
        y: samples (m, ...), m >= 2.

    Returns:
        The squared discrepancy, a scalar.

    Raises:
        ValueError: if there are fewer than two samples, trailing shapes differ, the dtype is not
            floating-point, or values are not finite.

    Reference: Gretton et al. 2012 (JMLR 13), eq. 3.

    >>> x, y = jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [3.0]])
    >>> mmd(jnp.dot, x, y)  # 0 * 2 + 1 * 3 - 2 * (1 * 2)
    Array(-1., dtype=float32)
    """
    return _mmd(kernel, *pair(x, y, least=2))


def polynomial_kernel(x: Float[Array, " d"], y: Float[Array, " d"]) -> Float[Array, ""]:
    """The kernel of the KID, `(x.y / d + 1)^3`.

    Args:
        x: one sample, of shape (d,).
        y: another one.

    Returns:
        The kernel's value, a scalar.

    Reference: Binkowski et al. 2018 (arXiv 1801.01401).

    >>> polynomial_kernel(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
    Array(8., dtype=float32)
    """
    return (jnp.dot(x, y, precision="highest") / x.size + 1) ** 3


class KernelDistance(NamedTuple):
    """What `kernel_distance` returns."""

    value: Float[Array, ""]
    """The mean of the blocks' estimates."""
    standard_error: Float[Array, ""]
    """The standard error of that mean; NaN for a single block."""


def kernel_distance(
    key: PRNGKeyArray, x: Float[ArrayLike, "n *x"], y: Float[ArrayLike, "m *x"], *, size: int = 1000
) -> KernelDistance:
    """The squared MMD with the kernel `(x.y / d + 1)^3`, averaged over blocks.

    In Inception features it is the KID. Both sets are shuffled and cut into the same number of
    blocks, the smallest for which no block has more than `size` samples. Samples that are left over
    are not used. The blocks share no sample. So their estimates are independent and unbiased, and
    the standard error is `std / sqrt(blocks)`.

    Args:
        key: the key of the shuffles.
        x: samples (n, ...).
        y: samples (m, ...).
        size: the maximum number of samples in a block.

    Returns:
        The estimate and its standard error.

    Raises:
        ValueError: as `mmd`; if a block would hold fewer than two samples of either set.

    Reference: Binkowski et al. 2018 (arXiv 1801.01401).

    >>> x = jax.random.normal(jax.random.key(0), (500, 8))
    >>> value, standard_error = kernel_distance(jax.random.key(1), x[:250] + 1, x[250:], size=50)
    >>> bool(value > 5 * standard_error)
    True
    """
    x, y = pair(x, y, least=2)
    blocks = -(-max(len(x), len(y)) // max(size, 1))
    if size < 2 or min(len(x), len(y)) < 2 * blocks:
        raise ValueError(
            f"size: expected blocks of at least 2 samples of each set, "
            f"got {size} for {len(x)} and {len(y)} samples"
        )

    return _kernel_distance(key, x, y, blocks)


@functools.partial(jax.jit, static_argnums=3)
def _kernel_distance(key, x, y, blocks):
    def cut(key, a):
        used = jax.random.permutation(key, a)[: len(a) // blocks * blocks]
        return used.reshape(blocks, -1, a.shape[1])

    keys = jax.random.split(key)
    cuts = cut(keys[0], x), cut(keys[1], y)
    estimates = jax.lax.map(lambda block: _mmd(polynomial_kernel, *block, rows=_ROWS), cuts)
    return KernelDistance(jnp.mean(estimates), jnp.std(estimates, ddof=1) / blocks**0.5)


def energy_distance(x: Float[ArrayLike, "n *x"], y: Float[ArrayLike, "m *x"]) -> Float[Array, ""]:
    """The unbiased estimate of the energy distance, `2 E|x - y| - E|x - x'| - E|y - y'|`.

    It is `mmd` with the kernel `-|x - y|`, which has no scale to choose. Its gradient is finite
    also where two samples are equal.

    Args:
        x: samples (n, ...), n >= 2.
        y: samples (m, ...), m >= 2.

    Returns:
        The distance, in the units of the features. Its expectation is zero if and only if the
        distributions are equal.

    Raises:
        ValueError: as `mmd`.

    Reference: Székely and Rizzo 2013 (J. Stat. Plan. Inference 143); as an MMD, Sejdinovic et al.
    2013 (arXiv 1207.6076).

    >>> energy_distance(jnp.array([[0.0], [2.0]]), jnp.array([[10.0], [13.0]]))  # 2 * 10.5 - 2 - 3
    Array(16., dtype=float32)
    """
    return _energy_distance(*pair(x, y, least=2))


@jax.jit
def _energy_distance(x, y):
    def mean(x, y, pairs):
        """The distance of a sample to itself is exactly 0, so it needs no mask."""
        return jnp.mean(map_distances(lambda _, squares: jnp.sum(safe_sqrt(squares)) / pairs, x, y))

    return 2 * mean(x, y, len(y)) - mean(x, x, len(x) - 1) - mean(y, y, len(y) - 1)


@once
def _mmd(kernel, x, y, rows=None):
    across = map_rows(lambda row, y: jnp.mean(jax.vmap(kernel, (None, 0))(row, y)), x, y, rows)
    return _mean_within(kernel, x, rows) + _mean_within(kernel, y, rows) - 2 * jnp.mean(across)


def _mean_within(kernel, x, rows):
    """The mean over i != j. Kernels are symmetric: each sample in a circle meets the next half."""
    n = len(x)
    rows = min(-(-n // 8), block_rows(x, rows))
    circle = x[np.arange(n + rows + n // 2) % n]

    @jax.checkpoint
    def block(first, circle):
        ours, theirs = (
            jax.lax.dynamic_slice_in_dim(circle, first, size) for size in (rows, rows + n // 2)
        )
        values = jax.vmap(jax.vmap(kernel, (None, 0)), (0, None))(ours, theirs)
        row = jnp.arange(rows)[:, None]
        ahead = jnp.arange(rows + n // 2)[None] - row  # of the row, in the circle
        counted = (ahead > 0) & (ahead <= n // 2) & (first + row < n)
        # two samples that are opposite to each other meet twice
        times = jnp.where(2 * ahead == n, 1, 2).astype(values.dtype)
        return jnp.sum(jnp.where(counted, times * values, 0)) / (n * (n - 1.0))

    return jnp.sum(jax.lax.map(lambda first: block(first, circle), jnp.arange(0, n, rows)))
