"""How far a set of samples is from a set of data. Computed on the host, in float64 whatever jax's default is."""

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["frechet_distance", "gaussian_frechet_distance"]


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of samples.

    It is `gaussian_frechet_distance` of the sample means and the unbiased sample covariances. In the feature space of an
    Inception network this is the FID (Heusel et al. 2017, https://arxiv.org/abs/1706.08500); in pixels, no network is
    needed. It is a squared distance, and biased upwards for few samples.

    Args:
        x: samples (n, ...), n >= 2; the axes after the first are flattened.
        y: samples (m, ...), m >= 2, of the same trailing shape.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: on fewer than two samples, other trailing shapes, or values that are not finite.

    >>> x = np.random.default_rng(0).normal(size=(100, 3))
    >>> round(frechet_distance(x, x + np.array([1.0, 2.0, 0.0])), 6)
    5.0
    """
    x, y = _samples("x", x), _samples("y", y)
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"frechet_distance: x and y must be samples of one shape, got {x.shape[1:]} and {y.shape[1:]}")
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    covariances = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    cov_x, cov_y = covariances
    return gaussian_frechet_distance(x.mean(0), cov_x, y.mean(0), cov_y)


def gaussian_frechet_distance(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    """The Fréchet distance (the squared Wasserstein-2 distance) between two Gaussians.

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr (C1^{1/2} C2 C1^{1/2})^{1/2}

    (Dowson & Landau 1982). The last trace is the sum of the singular values of `C1^{1/2} C2^{1/2}`, so that covariances
    of any rank are handled, and no eigenvalue is squared and rooted again.

    Args:
        mean1: m1, (d,).
        cov1: C1, (d, d), positive semidefinite of any rank.
        mean2: m2, (d,).
        cov2: C2, (d, d), likewise.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: on other shapes, values that are not finite, or a covariance with a clearly negative eigenvalue.

    >>> gaussian_frechet_distance([0.0, 3.0], np.diag([4.0, 0.0]), [0.0, 0.0], np.diag([1.0, 0.0]))
    10.0
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    d = mean1.size
    if (mean1.shape, cov1.shape, mean2.shape, cov2.shape) != ((d,), (d, d), (d,), (d, d)):
        got = (mean1.shape, cov1.shape, mean2.shape, cov2.shape)
        raise ValueError(f"gaussian_frechet_distance: expected shapes (d,), (d, d), (d,), (d, d), got {got}")
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise ValueError("gaussian_frechet_distance: means and covariances must be finite")
    overlap = np.linalg.svd(_root("cov1", cov1) @ _root("cov2", cov2), compute_uv=False).sum()
    return float(max(0.0, np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap))


def _root(name: str, cov: np.ndarray) -> np.ndarray:
    """The symmetric square root."""
    values, vectors = np.linalg.eigh(cov)
    if values.min(initial=0.0) < -1e-6 * max(values.max(initial=0.0), 0.0) or not np.allclose(cov, cov.T):
        raise ValueError(f"gaussian_frechet_distance: {name} must be symmetric and positive semidefinite")
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _samples(name: str, samples: ArrayLike) -> np.ndarray:
    samples = np.asarray(samples, np.float64)
    if samples.ndim < 2 or len(samples) < 2:
        raise ValueError(f"frechet_distance: {name} must hold at least two samples (n, ...), got shape {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError(f"frechet_distance: {name} must be finite")
    return samples
