"""Fidelity and diversity by nearest neighbours: do samples lie where the data are, and everywhere?

The ball of a sample is closed, and reaches to its k-th nearest neighbour in its set, not counting
the sample. The scores count points of one set in the balls of the other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._features import map_distances, nan_unless_finite, pair

__all__ = ["DensityCoverage", "PrecisionRecall", "density_coverage", "precision_recall"]

_NAMES = ("real", "generated")
_PASSES = 16  # more nearest neighbours than this are sorted


class PrecisionRecall(NamedTuple):
    """What `precision_recall` returns."""

    precision: Float[Array, ""]
    """The share of generated samples in some ball of the real ones: fidelity."""
    recall: Float[Array, ""]
    """The share of real samples in some ball of the generated ones: diversity."""


class DensityCoverage(NamedTuple):
    """What `density_coverage` returns."""

    density: Float[Array, ""]
    """The mean number of real balls that hold a generated sample, divided by k: fidelity.

    It is about 1 for equal distributions.
    """
    coverage: Float[Array, ""]
    """The share of real balls that hold a generated sample: diversity.

    It is `1 - 2^-k` for equal distributions and large n = m.
    """


def precision_recall(
    real: Float[ArrayLike, "n *x"], generated: Float[ArrayLike, "m *x"], k: int = 3
) -> PrecisionRecall:
    """Improved precision and recall.

        precision = mean_j [g_j in union_i B(r_i, k)],    recall = mean_i [r_i in union_j B(g_j, k)]

    A single outlier among the real samples has a large ball, which raises the precision.
    `density_coverage` changes less.

    Args:
        real: samples (n, ...).
        generated: samples (m, ...).
        k: the number of the neighbour that a ball reaches to; 0 < k < n, m.

    Returns:
        Both shares, in [0, 1].

    Raises:
        ValueError: if trailing shapes differ, the dtype is not floating-point, values are not
            finite, or k is out of range.

    Reference: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1-2.

    >>> real = jnp.arange(10.0)[:, None]
    >>> precision_recall(real, real[:5] + 0.5, k=1)
    PrecisionRecall(precision=Array(1., dtype=float32), recall=Array(0.6, dtype=float32))
    """
    real, generated = pair(real, generated, _NAMES)
    _check_k(k, real, "real")
    _check_k(k, generated, "generated")
    both = PrecisionRecall(_share(generated, real, k), _share(real, generated, k))
    return nan_unless_finite(both, real, generated)


def density_coverage(
    real: Float[ArrayLike, "n *x"], generated: Float[ArrayLike, "m *x"], k: int = 5
) -> DensityCoverage:
    """Density and coverage, which use balls around the real samples alone.

        density = 1 / (k m) sum_ij [g_j in B(r_i, k)],    coverage = mean_i [some g_j in B(r_i, k)]

    Args:
        real: samples (n, ...).
        generated: samples (m, ...).
        k: the number of the neighbour that a ball reaches to; 0 < k < n.

    Returns:
        Density, in [0, n / k], and coverage, in [0, 1].

    Raises:
        ValueError: as `precision_recall`.

    Reference: Naeem et al. 2020 (arXiv 2002.09797), section 3.

    >>> real = jnp.arange(10.0)[:, None]
    >>> density_coverage(real, real[:5] + 0.5, k=1)
    DensityCoverage(density=Array(2., dtype=float32), coverage=Array(0.6, dtype=float32))
    """
    real, generated = pair(real, generated, _NAMES)
    _check_k(k, real, "real")
    counts = _counts(real, generated, k)
    density = jnp.mean(counts, dtype=real.dtype) * (len(real) / (k * len(generated)))
    both = DensityCoverage(density, jnp.mean(counts > 0, dtype=real.dtype))
    return nan_unless_finite(both, real, generated)


def _check_k(k, x, name):
    if not 0 < k < len(x):
        raise ValueError(f"k: expected 0 < k < {len(x)}, the number of {name} samples, got {k}")


@functools.partial(jax.jit, static_argnums=2)
def _share(points, centres, k):
    """The share of the points that some ball of the centres holds."""
    radii = _squared_radii(centres, k)
    inside = map_distances(lambda _, distances: jnp.any(distances <= radii), points, centres)
    return jnp.mean(inside, dtype=points.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _counts(real, generated, k):
    """How many generated samples each real ball holds."""
    balls = real, _squared_radii(real, k)
    return map_distances(lambda ball, distances: jnp.sum(distances <= ball[1]), balls, generated)


def _squared_radii(x, k):
    """The squared distance from each sample to its k-th nearest other."""

    def radius(row, distances):
        return _kth_smallest(jnp.where(jnp.arange(len(x)) == row[1], jnp.inf, distances), k)

    return map_distances(radius, (x, jnp.arange(len(x))), x)


def _kth_smallest(x, k):
    """The k-th smallest number.

    For small k it takes k passes, which are ten times as fast on a CPU as `top_k`, a full sort.
    """
    if k > _PASSES:
        return -jax.lax.top_k(-x, k)[0][-1]
    for _ in range(k - 1):
        x = jnp.where(jnp.arange(len(x)) == jnp.argmin(x), jnp.inf, x)
    return jnp.min(x)
