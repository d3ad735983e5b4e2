"""Wasserstein distances between samples: exact on the host, or of random projections in jax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from .._checks import check_number
from ._features import host_features, pair

__all__ = ["sliced_wasserstein", "wasserstein"]


def wasserstein(x: npt.ArrayLike, y: npt.ArrayLike, p: float = 2) -> float:
    """The exact Wasserstein distance between two sets of equally many samples.

        min over permutations s of (mean_i |x_i - y_{s(i)}|^p)^{1/p}

    Optimal assignment finds it in O(n^3) time and O(n^2) memory, for n up to some thousands. For
    two sets from one distribution in d dimensions it decreases only as n^{-1/d}.

    Args:
        x: samples (n, ...).
        y: samples (n, ...).
        p: the power, at least 1.

    Returns:
        The distance, in the units of the features.

    Raises:
        ValueError: if there are no samples, shapes differ, values are not finite, or p < 1.

    Reference: Peyré and Cuturi 2019 (arXiv 1803.00567), eq. 2.2 and proposition 2.1.

    >>> wasserstein([[0.0], [1.0]], [[5.0], [3.0]], p=1)
    3.5
    """
    check_number(p, "p", 1)
    x, y = pair(x, y, to=host_features)
    if len(x) != len(y):
        raise ValueError(f"y: expected as many samples as x, {len(x)}, got {len(y)}")
    cost = cdist(x, y) ** p
    return float(np.mean(cost[linear_sum_assignment(cost)]) ** (1 / p))


def sliced_wasserstein(
    key: PRNGKeyArray,
    x: Float[ArrayLike, "n *x"],
    y: Float[ArrayLike, "m *x"],
    *,
    projections: int = 100,
    p: float | Array = 2,
) -> Float[Array, ""]:
    """The Wasserstein distance of projections on random lines.

        (mean over theta of int_0^1 |F_x^-1(u) - F_y^-1(u)|^p du)^{1/p}

    F_x is the distribution function of the `theta.x_i`, with theta uniform on the sphere. In one
    dimension transport is monotone, so each integral is exact, also for sets of different sizes. As
    a loss it has a finite gradient, which is zero at distance zero.

    Args:
        key: the key of the directions.
        x: samples (n, ...).
        y: samples (m, ...).
        projections: the number of directions.
        p: the power, at least 1.

    Returns:
        The distance, in the units of the features. For a translation by v and p = 2 it is about
        `|v| / sqrt(d)`.

    Raises:
        ValueError: if there are no samples, trailing shapes differ, the dtype is not
            floating-point, values are not finite, there is no projection, or p < 1.

    Reference: Bonneel et al. 2015 (J. Math. Imaging Vis. 51).

    >>> x = jnp.array([[0.0], [1.0], [5.0]])
    >>> sliced_wasserstein(jax.random.key(0), x, x + 3)
    Array(3., dtype=float32)
    """
    check_number(p, "p", 1)
    x, y = pair(x, y)
    if projections < 1:
        raise ValueError(f"projections: expected at least 1, got {projections}")
    return _sliced_wasserstein(key, x, y, projections, p)


@functools.partial(jax.jit, static_argnums=3)
def _sliced_wasserstein(key, x, y, projections, p):
    directions = jax.random.normal(key, (x.shape[1], projections), jnp.result_type(x, y))
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    # the distance does not depend on the origin
    origin = jax.lax.stop_gradient(jnp.mean(y, axis=0, keepdims=True))
    on_x, on_y = (
        jnp.sort(jnp.matmul(a - origin, directions, precision="highest"), axis=0) for a in (x, y)
    )
    total = jnp.mean(_monotone_cost(on_x, on_y, p))
    zero = total == 0  # NaN is not
    return jnp.where(zero, 0.0, jnp.where(zero, 1.0, total) ** (1 / p))


def _monotone_cost(x, y, p):
    """`int |F_x^-1 - F_y^-1|^p du` of sorted columns.

    Both are constant between the multiples of 1/n and of 1/m.
    """
    n, m = len(x), len(y)
    # in units of 1 / (n m): exact
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(ends, prepend=0) / (n * m)
    gaps = jnp.abs(x[(ends - 1) // m] - y[(ends - 1) // n])
    return jnp.sum(jnp.asarray(widths, gaps.dtype)[:, None] * gaps**p, axis=0)
