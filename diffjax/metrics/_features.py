"""Checked features (n, d), and passes over pairs of them in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import as_float, is_concrete

# The size of the largest array that a pass over pairs may build, unless one row of x needs more.
_ELEMENTS = 2**26
_BLOCK = 2**17  # the size of a block of distances
_UNROLL = 16  # how many features are added to a block at a time


def host_features(x, name: str, least: int = 1) -> np.ndarray:
    """Samples (n, ...) as a float64 array (n, d)."""
    return _flat(np.asarray(x, np.float64), name, least)


def features(x, name: str, least: int = 1) -> jax.Array:
    """Samples (n, ...) as a jax array (n, d) of at least float32."""
    return _flat(as_float(x, name), name, least)


def pair(x, y, names=("x", "y"), least: int = 1, to=features):
    """Two sets of samples, which must have the same trailing shape."""
    first, second = np.shape(x)[1:], np.shape(y)[1:]
    x, y = to(x, names[0], least), to(y, names[1], least)
    if first != second:
        raise ValueError(
            f"{names[1]}: expected samples of the shape of {names[0]}, {first}, got {second}"
        )
    return x, y


def _flat(x, name, least):
    if x.ndim < 2 or x.shape[0] < least or x.size == 0:
        raise ValueError(
            f"{name}: expected at least {least} samples, (n, ...), got shape {x.shape}"
        )
    if is_concrete(x):
        bad = int(np.sum(~np.isfinite(np.asarray(x).reshape(len(x), -1)).all(1)))
        if bad:
            raise ValueError(
                f"{name}: expected finite features, got {bad} of {len(x)} rows that are not"
            )
    return x.reshape(len(x), -1)


def nan_unless_finite(result, *arrays):
    """The result, or NaN in its place, because comparisons and counts would hide a traced NaN."""
    finite = jnp.all(jnp.stack([jnp.isfinite(array).all() for array in arrays]))
    return jax.tree.map(lambda value: jnp.where(finite, value, jnp.nan), result)


def map_rows(fn, x, y, rows=None):
    """`fn(row, y)` for each row of the pytree x, stacked.

    A few rows are computed at a time, and once more in the backward pass.
    """
    rows = min(len(jax.tree.leaves(x)[0]), block_rows(y, rows))
    return jax.lax.map(jax.checkpoint(lambda row: fn(row, y)), x, batch_size=rows)


def block_rows(y, rows=None):
    """How many rows meet all of y at a time."""
    return max(1, rows or _ELEMENTS // y.size)


def map_distances(fn, x, y):
    """`fn(row, |row - y_j|^2 for all j)` for each row of x, whose first leaf holds the samples.

    The distances are summed feature by feature, in a block of rows that stays in the cache of a
    CPU. That is three times as fast there as a sum over the last axis, and as exact.
    """
    unroll = min(y.shape[1], _UNROLL)
    pad = -y.shape[1] % unroll  # by features that are equal
    groups = jnp.pad(y, ((0, 0), (0, pad))).T.reshape(-1, unroll, len(y))

    def of_row(row, groups):
        sample = jnp.pad(jax.tree.leaves(row)[0], (0, pad)).reshape(-1, unroll)

        @jax.checkpoint
        def add(total, group):
            for a, column in zip(*group, strict=True):
                total += (a - column) ** 2
            return total, None

        start = jnp.zeros(len(y), jnp.result_type(sample, y))
        return fn(row, jax.lax.scan(add, start, (sample, groups))[0])

    return map_rows(of_row, x, groups, rows=max(1, _BLOCK // len(y)))
