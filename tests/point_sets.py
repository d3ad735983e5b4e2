"""Sets of points, and the metrics of two sets that want more than the sets."""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.metrics import kernel_distance, sliced_wasserstein


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def on_grid(seed, *shape):
    """Multiples of 2^-9 that float32 still holds exactly beside an offset of 10,000."""
    return np.round(normal(seed, *shape) * 2**9).astype(np.float32) / np.float32(2**9)


def rbf(x, y):
    return jnp.exp(-jnp.sum((x - y) ** 2))


def sliced(x, y, **options):
    return sliced_wasserstein(jax.random.key(0), x, y, **options)


def kernel(x, y, **options):
    return kernel_distance(jax.random.key(0), x, y, **options)
