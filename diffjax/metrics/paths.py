"""Length and curvature of the paths of a sampler.

A path is the `x_t` of one trajectory at a grid of times; `vmap` for many.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import as_float
from .._numerics import safe_sqrt

__all__ = ["curvature", "path_energy", "path_length"]


def path_length(xs: Float[ArrayLike, "n *x"]) -> Float[Array, ""]:
    """The length of a path, `int |dx/dt| dt = sum_k |x_{k+1} - x_k|`.

    Args:
        xs: one trajectory, see `samplers.trajectory`, of shape (times, *x).

    Returns:
        The length, in units of x: at least the distance between its ends.

    Raises:
        ValueError: if there are fewer than two points.

    >>> path_length(jnp.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]))
    Array(7., dtype=float32)
    """
    return jnp.sum(safe_sqrt(jnp.sum(_steps(xs) ** 2, 1)))


def path_energy(ts: Float[ArrayLike, " n"], xs: Float[ArrayLike, "n *x"]) -> Float[Array, ""]:
    """The energy of a path, `int |dx/dt|^2 dt = sum_k |x_{k+1} - x_k|^2 / |t_{k+1} - t_k|`.

    Its mean over the data is at least the squared 2-Wasserstein distance between the distributions
    at the two ends, divided by the time between them.

    Args:
        ts: the times, ascending or descending.
        xs: one trajectory, of shape (times, *x).

    Returns:
        The energy, in squared units of x per unit of time.

    Raises:
        ValueError: if there are fewer than two points, or the numbers of times and points differ.

    Reference: Benamou and Brenier 2000; Tong et al. 2024 (arXiv 2302.00482) normalize it by that
    distance.

    >>> path_energy(jnp.array([1.0, 0.5, 0.0]), jnp.array([[0.0], [3.0], [3.0]]))
    Array(18., dtype=float32)
    """
    steps, dts = _steps(xs), _intervals(ts, xs)
    return jnp.sum(jnp.sum(steps**2, 1) / jnp.abs(dts))


def curvature(ts: Float[ArrayLike, " n"], xs: Float[ArrayLike, "n *x"]) -> Float[Array, ""]:
    """How far a path is from straight: `int |dx/dt - (x_end - x_start) / T|^2 dt`.

    It is the energy minus that of the straight line between the ends. It is 0 for a path that one
    Euler step can follow.

    Args:
        ts: the times, ascending or descending. T is the time between the first and the last.
        xs: one trajectory, of shape (times, *x).

    Returns:
        The curvature, in squared units of x per unit of time.

    Raises:
        ValueError: as `path_energy`.

    Reference: Liu et al. 2023 (rectified flow, arXiv 2209.03003), section 2.2, calls its average
    straightness.

    >>> curvature(jnp.array([1.0, 0.5, 0.0]), jnp.array([[0.0], [3.0], [3.0]]))  # 18 - 3^2
    Array(9., dtype=float32)
    """
    steps, dts = _steps(xs), _intervals(ts, xs)
    mean = jnp.sum(steps, 0, keepdims=True) / jnp.sum(dts)
    return jnp.sum((steps / dts[:, None] - mean) ** 2 * jnp.abs(dts)[:, None])


def _steps(xs):
    if jnp.ndim(xs) < 1 or len(xs) < 2:
        raise ValueError(f"xs: expected at least two points (times, *x), got shape {jnp.shape(xs)}")
    return jnp.diff(as_float(xs, "xs").reshape(len(xs), -1), axis=0)


def _intervals(ts, xs):
    if jnp.shape(ts) != jnp.shape(xs)[:1]:
        raise ValueError(
            f"ts: expected a time for each of the {len(xs)} points, got shape {jnp.shape(ts)}"
        )
    return jnp.diff(as_float(ts, "ts"))
