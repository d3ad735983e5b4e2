"""The Fréchet distance between Gaussians fitted to samples, on the host in float64.

A Gaussian is fitted to the samples themselves, or to sums over them (`Moments`), which add up over
batches and devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from numpy.typing import ArrayLike

from ._features import features, host_features, pair

__all__ = [
    "Moments",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_frechet_distance",
    "moments",
]


class Moments(NamedTuple):
    """Sums over samples: the sufficient statistics of a Gaussian. They add up over sets."""

    count: Any
    """The number of samples."""
    sum: Any
    """`sum_i x_i`, (d,)."""
    outer: Any
    """`sum_i x_i x_i^T`, (d, d)."""


def moments(x: ArrayLike) -> Moments:
    """The sums over a batch from which `frechet_distance` fits its Gaussian.

    `jax.tree.map(operator.add, a, b)` gives the moments of both batches, and
    `jax.lax.psum(moments(x), axis)` under `shard_map` those of all devices. A jax array is summed
    on its device, also when traced, in its precision but at least float32. Any other array is
    summed on the host, in float64 (which `jnp.add` would round, without x64).

    The covariance is a difference of such sums and loses `(mean / std)^2` roundings. In float32,
    features of mean 30 and standard deviation 1 lose three of seven digits. The distance does not
    change when one constant is subtracted from both sides, so subtract a rough mean from every
    batch first: `moments(x - shift)`. `frechet_distance` refuses sums that have fewer than three
    digits left.

    Args:
        x: samples (n, ...).

    Returns:
        The moments.

    Raises:
        ValueError: if there are no samples, or values are not finite (checked unless traced).

    >>> moments(np.array([[1.0, 2.0], [3.0, 0.0]]))
    Moments(count=2, sum=array([4., 2.]), outer=array([[10.,  2.], [ 2.,  4.]]))
    """
    if not isinstance(x, jax.Array):
        x = host_features(x, "x")
        return Moments(len(x), x.sum(0), x.T @ x)
    x = features(x, "x")
    return Moments(jnp.int32(len(x)), jnp.sum(x, axis=0), jnp.matmul(x.T, x, precision="highest"))


def frechet_distance(
    x: ArrayLike | Moments, y: ArrayLike | Moments, *, allow_few: bool = False
) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of samples.

    It is `gaussian_frechet_distance` of the sample means and the unbiased sample covariances. In
    the feature space of an Inception network this is the FID. In pixels, no network is needed. It
    is a squared distance, and biased upwards by about a constant over n. So compare equal numbers
    of samples, or extrapolate by `frechet_infinity`.

    Args:
        x: samples (n, ...), n >= 2, the axes after the first flattened; or their `moments`.
        y: samples (m, ...) of the same trailing shape, or their `moments`.
        allow_few: accept no more samples than features, whose sample covariance is singular.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: if there are fewer than two samples, or no more samples than features (unless
            `allow_few`), trailing shapes differ, values are not finite, or moments are too
            imprecise for three significant digits of the covariance.

    Reference: Heusel et al. 2017 (arXiv 1706.08500).

    >>> x = np.random.default_rng(0).normal(size=(100, 3))
    >>> round(frechet_distance(x, x + np.array([1.0, 2.0, 0.0])), 6)
    5.0
    >>> batches = jax.tree.map(lambda *sums: sum(sums), moments(x[:50]), moments(x[50:]))
    >>> round(frechet_distance(batches, x), 6)
    0.0
    """
    if not isinstance(x, Moments) and not isinstance(y, Moments):
        x, y = pair(x, y, least=2, to=host_features)
    return _distance(*_fit("x", x, allow_few), *_fit("y", y, allow_few))


def frechet_infinity(
    key: PRNGKeyArray, x: ArrayLike, y: ArrayLike | Moments, *, sizes: Sequence[int] | None = None
) -> float:
    """The Fréchet distance extrapolated to infinitely many samples x.

    In Inception features it is FID-infinity. The bias of `frechet_distance` is a constant over N,
    to leading order. So it is computed for random subsets of x of several sizes N, and a line in
    1/N, fitted by least squares, is evaluated at 1/N = 0. Three errors remain: noise of either
    sign; the bias of a finite y, so m should be much larger than n; and the next term of the bias,
    which makes the result too low unless the smallest N is several times the number of features.

    Args:
        key: the key of the subsets.
        x: samples (n, ...), the generated ones.
        y: samples (m, ...) of the same trailing shape, or their `moments`: the reference.
        sizes: the N, each larger than the number of features and at most n. The default is 15 sizes
            from n/10 to n at equal intervals, as in the authors' code (5,000 to 50,000).

    Returns:
        The extrapolated distance; it may be negative.

    Raises:
        ValueError: as `frechet_distance`; if sizes are out of range, or fewer than two differ.

    Reference: Chong and Forsyth 2020 (arXiv 1911.07023).

    >>> random = np.random.default_rng(0)
    >>> x, y = random.normal(size=(500, 4)), random.normal(size=(20000, 4))
    >>> abs(frechet_infinity(jax.random.key(0), x, y)) < frechet_distance(x, y)
    True
    """
    if isinstance(y, Moments):
        x = host_features(x, "x", least=2)
    else:
        x, y = pair(x, y, least=2, to=host_features)
    n, d = x.shape
    counts = np.asarray(np.linspace(n / 10, n, 15) if sizes is None else sizes).astype(int)
    if np.unique(counts).size < 2 or counts.min() <= d or counts.max() > n:
        raise ValueError(
            f"sizes: expected different numbers N, {d} features < N <= {n} samples, "
            f"got {counts.tolist()}; subsets of no more samples than features are too biased"
        )
    reference = _fit("y", y)
    orders = (np.asarray(jax.random.permutation(k, n)) for k in jax.random.split(key, counts.size))
    values = [
        _distance(*_fit("x", x[order[:size]]), *reference)
        for order, size in zip(orders, counts, strict=True)
    ]
    return float(np.polyfit(1 / counts, values, 1)[1])


def gaussian_frechet_distance(
    mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike
) -> float:
    """The Fréchet distance (the squared Wasserstein-2 distance) between two Gaussians.

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr (C1^{1/2} C2 C1^{1/2})^{1/2}

    The last trace is computed as the sum of the singular values of `C1^{1/2} C2^{1/2}`. So the
    covariances may have any rank, and no eigenvalue is squared and rooted again.

    Args:
        mean1: m1, (d,).
        cov1: C1, (d, d), positive semidefinite of any rank.
        mean2: m2, (d,).
        cov2: C2, (d, d), likewise.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or a covariance has a clearly
            negative eigenvalue.

    Reference: Dowson and Landau 1982 (J. Multivariate Anal. 12).

    >>> gaussian_frechet_distance([0.0, 3.0], np.diag([4.0, 0.0]), [0.0, 0.0], np.diag([1.0, 0.0]))
    10.0
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    d = mean1.size
    if (mean1.shape, cov1.shape, mean2.shape, cov2.shape) != ((d,), (d, d), (d,), (d, d)):
        got = (mean1.shape, cov1.shape, mean2.shape, cov2.shape)
        raise ValueError(
            f"mean1, cov1, mean2, cov2: expected shapes (d,), (d, d), (d,), (d, d), got {got}"
        )
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise ValueError("mean1, cov1, mean2, cov2: expected finite numbers, got others")
    for name, cov in (("cov1", cov1), ("cov2", cov2)):
        values = np.linalg.eigvalsh(cov)
        negative = values.min(initial=0.0) < -1e-6 * max(values.max(initial=0.0), 0.0)
        if negative or not np.allclose(cov, cov.T):
            raise ValueError(
                f"{name}: expected a symmetric, positive semidefinite matrix, "
                f"got one with eigenvalues {values}"
            )
    return _distance(mean1, _root(cov1), mean2, _root(cov2))


def _distance(mean1, root1, mean2, root2) -> float:
    """From the means and the square roots of the covariances, `|R|^2 = tr C`."""
    if mean1.shape != mean2.shape:
        raise ValueError(f"y: expected as many features as x, {mean1.size}, got {mean2.size}")
    overlap = np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    squares = np.sum((mean1 - mean2) ** 2) + np.sum(root1**2) + np.sum(root2**2)
    return float(max(0.0, squares - 2 * overlap))


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues that are negative by rounding count as zero."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _fit(name: str, x, allow_few: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the square root of the covariance."""
    if isinstance(x, Moments):
        n, mean, cov = _from_moments(name, x)
    else:
        x = host_features(x, name, least=2)
        n, mean, cov = len(x), x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))
    if n <= mean.size and not allow_few:
        raise ValueError(
            f"{name}: expected more samples than features, got {n:.0f} samples of {mean.size} "
            f"features, whose covariance is singular and whose distance is biased upwards; "
            f"take more samples, or pass allow_few=True"
        )
    return mean, _root(cov)


def _from_moments(name, x):
    precision = np.finfo(np.asarray(x.outer).dtype).eps
    n, total, outer = (np.asarray(a, np.float64) for a in x)
    if n.shape != () or total.ndim != 1 or outer.shape != 2 * total.shape:
        raise ValueError(
            f"{name}: expected moments of shapes (), (d,), (d, d), "
            f"got {n.shape}, {total.shape}, {outer.shape}"
        )
    if n < 2 or not (np.isfinite(total).all() and np.isfinite(outer).all()):
        raise ValueError(
            f"{name}: expected finite moments of at least 2 samples, "
            f"got {n:.0f} samples and sums up to {total.max()}"
        )
    mean = total / n
    cov = (outer - n * np.outer(mean, mean)) / (n - 1)
    if precision * np.trace(outer) / n > 1e-3 * np.trace(cov):
        raise ValueError(
            f"{name}: the covariance is lost in the rounding of the sums, whose mean square is "
            f"{np.trace(outer) / n:.3g}; subtract one constant from both sides first: "
            f"moments(x - shift)"
        )
    return float(n), mean, (cov + cov.T) / 2
