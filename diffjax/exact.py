"""Denoisers in closed form: for Gaussian data, Gaussian mixtures, and a finite data set.

They are what a perfectly trained network would be, so a sampler, a likelihood or a loss can be
studied without the error of a network. Each accepts x with any leading batch axes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._bind import bind
from ._checks import as_float, check_that
from ._varying import on_mesh, vary_alike
from .schedules import coefficients
from .typing import Denoiser, Estimate, Schedule

__all__ = [
    "Mixture",
    "conditioned_gaussian",
    "conditioned_mixture",
    "empirical",
    "gaussian",
    "gaussian_mixture",
]


def gaussian(
    mean: Float[ArrayLike, " d"], cov: Float[ArrayLike, "d d"], schedule: Schedule
) -> Denoiser:
    """The denoiser of data ~ N(mean, cov).

    With `K = (alpha^2 cov + sigma^2 I)^-1 (x - alpha mean)`: `x0 = mean + alpha cov K`,
    `eps = sigma K`.

    Args:
        mean: the mean, a vector.
        cov: the covariance; it may be singular as long as t > 0.
        schedule: the path.

    Returns:
        The denoiser, for x of shape (..., d).

    Raises:
        ValueError: if the shapes do not fit, or a concrete cov is not symmetric and positive
            semi-definite.

    >>> denoise = gaussian(jnp.zeros(2), jnp.diag(jnp.array([1.0, 4.0])), linear())
    >>> denoise(jnp.ones(2), 0.5).x0
    Array([1. , 1.6], dtype=float32)
    """
    mean, cov = _checked_gaussian(mean, cov)
    return bind(_gaussian, mean, cov, schedule)


def _checked_gaussian(mean, cov):
    mean, cov = as_float(mean, "mean"), as_float(cov, "cov")
    if mean.ndim != 1:
        raise ValueError(f"mean: expected a vector, got shape {mean.shape}")
    if cov.shape != 2 * mean.shape:
        raise ValueError(
            f"cov: expected shape {2 * mean.shape} for a mean of shape {mean.shape}, "
            f"got {cov.shape}"
        )
    _check_covariances(cov, "cov")
    return mean, cov


def _checked_mixture(weights, means, covs):
    weights, means = as_float(weights, "weights"), as_float(means, "means")
    covs = as_float(covs, "covs")
    if means.ndim != 2:
        raise ValueError(f"means: expected shape (k, d), got {means.shape}")
    k, d = means.shape
    if weights.shape != (k,):
        raise ValueError(
            f"weights: expected shape {(k,)} for means of shape {means.shape}, got {weights.shape}"
        )
    if covs.shape != (k, d, d):
        raise ValueError(
            f"covs: expected shape {(k, d, d)} for means of shape {means.shape}, got {covs.shape}"
        )
    check_that(
        lambda w: (w > 0) & (abs(w.sum() - 1) < 1e-3),
        "weights: expected positive numbers of sum 1, got {}",
        weights,
    )
    _check_covariances(covs, "covs")
    return weights, means, covs


def _check_covariances(covs, name):
    def size(values):
        return 1e-5 * abs(values).max(-1, keepdims=True)

    def symmetric(covs):
        flat, transposed = (c.reshape(*c.shape[:-2], -1) for c in (covs, covs.mT))
        return abs(flat - transposed) <= size(flat)

    def positive(covs):
        values = np.linalg.eigvalsh(covs)
        return values >= -size(values)

    check_that(symmetric, name + ": expected symmetric entries, got {}", covs)
    check_that(positive, name + ": expected no negative eigenvalue, got {}", covs)


def _gaussian(mean, cov, schedule, x, t):
    _check_event(x, mean.shape, "mean")
    alpha, sigma, *_ = coefficients(schedule, t)
    _, x0, eps = _gaussian_terms(mean, cov, alpha, sigma, x)
    return Estimate(x0, eps)


def _gaussian_terms(mean, cov, alpha, sigma, x):
    """Log N(x; alpha mean, alpha^2 cov + sigma^2 I) up to a constant, and both posterior means.

    The spectrum does not depend on x and t, so compilers take it out of a sampler's loop. The
    derivative with respect to cov is taken through the linear system, because eigenvectors are not
    differentiable where eigenvalues coincide.
    """
    variances, vectors = jnp.linalg.eigh(cov)
    vectors = jax.lax.stop_gradient(vectors)
    total = alpha**2 * jnp.maximum(variances, 0.0) + sigma**2
    difference = x - jnp.broadcast_to(alpha * mean, x.shape)
    difference, total, cov, vectors, alpha, sigma = vary_alike(
        difference, total, cov, vectors, alpha, sigma
    )
    dot = functools.partial(jnp.matmul, precision="highest")  # the residual is divided by sigma^2

    def solve(_, b):
        return dot(dot(b, vectors) / jnp.broadcast_to(total, b.shape), vectors.T)

    k = jax.lax.custom_linear_solve(
        lambda v: alpha**2 * dot(v, cov) + sigma**2 * v, difference, solve, symmetric=True
    )
    # x0 = mean + alpha cov K, by the form that does not amplify the rounding of K, which is of size
    # 1 / sigma^2
    near = alpha > sigma
    from_x = (difference - sigma**2 * k) / jnp.where(near, alpha, 1.0)
    shrunk = jnp.where(near, from_x, alpha * dot(k, cov))
    log_density = -0.5 * (jnp.sum(difference * k, -1) + jnp.sum(jnp.log(total)))
    return log_density, jnp.broadcast_to(mean, x.shape) + shrunk, sigma * k


def gaussian_mixture(
    weights: Float[ArrayLike, " k"],
    means: Float[ArrayLike, "k d"],
    covs: Float[ArrayLike, "k d d"],
    schedule: Schedule,
) -> Denoiser:
    """The denoiser of data ~ sum_k weights_k N(means_k, covs_k).

    It averages the posterior means of the components by the probability of each given x.

    Args:
        weights: positive, of sum 1.
        means: the means.
        covs: the covariances, positive definite. Second derivatives with respect to them need
            distinct eigenvalues.
        schedule: the path.

    Returns:
        The denoiser, for x of shape (..., d).

    Raises:
        ValueError: if the shapes do not fit, concrete weights are not positive with sum 1, or a
            concrete covariance is not symmetric and positive semi-definite.

    >>> means, covs = jnp.array([[-1.0], [1.0]]), 0.01 * jnp.ones((2, 1, 1))
    >>> denoise = gaussian_mixture(jnp.array([0.5, 0.5]), means, covs, linear())
    >>> denoise(jnp.array([0.7]), 0.1).x0.round(3), denoise(jnp.array([0.0]), 0.5).x0
    (Array([0.901], dtype=float32), Array([0.], dtype=float32))
    """
    weights, means, covs = _checked_mixture(weights, means, covs)
    return bind(_mixture, jnp.log(weights), means, covs, schedule)


def _mixture(log_weights, means, covs, schedule, x, t):
    _check_event(x, means.shape[1:], "means")
    alpha, sigma, *_ = coefficients(schedule, t)
    terms = jax.vmap(_gaussian_terms, in_axes=(0, 0, None, None, None))
    log_density, x0, eps = terms(means, covs, alpha, sigma, x)  # (k, ...), (k, ..., d), (k, ..., d)
    log_joint = log_density + log_weights.reshape(-1, *(1,) * (log_density.ndim - 1))
    responsibility = jax.nn.softmax(log_joint, axis=0)[..., None]
    return Estimate(jnp.sum(responsibility * x0, 0), jnp.sum(responsibility * eps, 0))


class Mixture(NamedTuple):
    """A Gaussian mixture: `gaussian_mixture(*mixture, schedule)` is its denoiser."""

    weights: Float[Array, " k"]
    """of sum 1"""
    means: Float[Array, "k d"]
    """the mean of each component"""
    covs: Float[Array, "k d d"]
    """the covariance of each component"""


def conditioned_gaussian(
    mean: Float[ArrayLike, " d"],
    cov: Float[ArrayLike, "d d"],
    matrix: Float[ArrayLike, "m d"],
    y: Float[ArrayLike, " m"],
    noise_cov: Float[ArrayLike, "m m"],
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """The mean and the covariance of N(mean, cov), given `y = matrix x + N(0, noise_cov)`.

    With `K = cov A^T (A cov A^T + R)^-1`: `mean + K (y - A mean)` and `cov - K A cov`. So
    `gaussian(*conditioned_gaussian(...), schedule)` is the exact denoiser of the posterior.

    Args:
        mean: the mean of the prior.
        cov: its covariance.
        matrix: A.
        y: the observation.
        noise_cov: R; it may be 0 where `A cov A^T` is not singular.

    Returns:
        `(mean, cov)` of the posterior.

    Raises:
        ValueError: if the shapes do not fit, or cov is not one as for `gaussian`.

    >>> cov = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    >>> given_first = jnp.array([[1.0, 0.0]]), jnp.array([1.0]), jnp.zeros((1, 1))
    >>> mean, cov = conditioned_gaussian(jnp.zeros(2), cov, *given_first)
    >>> mean, cov[1, 1]
    (Array([1. , 0.5], dtype=float32), Array(0.75, dtype=float32))
    """
    given_mean, given_cov = map(on_mesh, _checked_gaussian(mean, cov))
    observation = _observation(given_mean, matrix, y, noise_cov)
    _, *posterior = _condition(given_mean, given_cov, *observation)
    return tuple(posterior)


def conditioned_mixture(
    weights: Float[ArrayLike, " k"],
    means: Float[ArrayLike, "k d"],
    covs: Float[ArrayLike, "k d d"],
    matrix: Float[ArrayLike, "m d"],
    y: Float[ArrayLike, " m"],
    noise_cov: Float[ArrayLike, "m m"],
) -> tuple[Mixture, Float[Array, ""]]:
    """A Gaussian mixture, given `y = matrix x + N(0, noise_cov)`, and the log evidence of y.

    Each component is conditioned. Its weight is multiplied by `N(y; A mean_k, A cov_k A^T + R)`.

    Args:
        weights: the weights of the prior.
        means: its means.
        covs: its covariances.
        matrix: A.
        y: the observation.
        noise_cov: R, as for `conditioned_gaussian`.

    Returns:
        `(Mixture(weights, means, covs), log p(y))`, the evidence in nats.

    Raises:
        ValueError: if the shapes do not fit, or weights and covs are not as for `gaussian_mixture`.

    >>> means, covs = jnp.array([[-1.0], [1.0]]), jnp.ones((2, 1, 1))
    >>> given = jnp.eye(1), jnp.array([0.0]), jnp.eye(1)
    >>> posterior, log_evidence = conditioned_mixture(jnp.array([0.5, 0.5]), means, covs, *given)
    >>> posterior.means.ravel(), log_evidence.round(3)  # log N(0; 1, 2)
    (Array([-0.5,  0.5], dtype=float32), Array(-1.516, dtype=float32))
    """
    weights, *prior = map(on_mesh, _checked_mixture(weights, means, covs))
    observation = _observation(prior[0][0], matrix, y, noise_cov)
    log_evidences, *posterior = jax.vmap(lambda m, c: _condition(m, c, *observation))(*prior)
    log_joint = jnp.log(weights) + log_evidences
    return Mixture(jax.nn.softmax(log_joint), *posterior), jax.nn.logsumexp(log_joint)


def _observation(mean, matrix, y, noise_cov):
    matrix, y, noise_cov = (
        on_mesh(as_float(a, name))
        for a, name in ((matrix, "matrix"), (y, "y"), (noise_cov, "noise_cov"))
    )
    shapes = matrix.shape, y.shape, noise_cov.shape
    m, d = y.size, jnp.size(mean)
    if shapes != ((m, d), (m,), (m, m)):
        raise ValueError(
            f"matrix, y, noise_cov: expected shapes (m, {d}), (m,), (m, m), got {shapes}"
        )
    return matrix, y, noise_cov


def _condition(mean, cov, matrix, y, noise_cov):
    """The log evidence of y, and the mean and covariance given y, in Joseph's form.

    Joseph's form is a sum of covariances, which does not cancel.
    """
    with jax.default_matmul_precision("highest"):
        total = matrix @ cov @ matrix.T + noise_cov
        gain = jax.scipy.linalg.solve(total, matrix @ cov, assume_a="pos").T
        residual = y - matrix @ mean
        kept = jnp.eye(mean.size, dtype=cov.dtype) - gain @ matrix
        posterior = kept @ cov @ kept.T + gain @ noise_cov @ gain.T
        log_evidence = jax.scipy.stats.multivariate_normal.logpdf(
            residual, jnp.zeros_like(y), total
        )
        return log_evidence, mean + gain @ residual, posterior


def empirical(data: Float[ArrayLike, "n *event"], schedule: Schedule) -> Denoiser:
    """The denoiser of a finite data set: what a network of unlimited capacity would learn from it.

    `x0 = sum_i w_i data_i` with `w = softmax(-|x - alpha data_i|^2 / (2 sigma^2))`. At t = 0 it is
    the nearest point.

    Args:
        data: the data set, n points of any shape.
        schedule: the path.

    Returns:
        The denoiser, for x of shape (..., *event). Where sigma = 0 its noise estimate is infinite,
        but 0 at a point of the data.

    Raises:
        ValueError: if the data set is empty, or holds values that are not finite.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), eq. 57.

    >>> denoise = empirical(jnp.array([[-1.0], [1.0]]), linear())
    >>> denoise(jnp.array([0.2]), 0.01).x0
    Array([1.], dtype=float32)
    """
    data = as_float(data, "data")
    if not data.size or not data.ndim:
        raise ValueError(f"data: expected at least one point, got an array of shape {data.shape}")
    bad = jnp.sum(~jnp.isfinite(data))
    check_that(lambda bad: bad == 0, "data: expected finite values, got {} that are not", bad)
    return bind(_empirical, data, schedule)


def _empirical(data, schedule, x, t):
    _check_event(x, data.shape[1:], "data")
    alpha, sigma, *_ = coefficients(schedule, t)
    axes = tuple(range(-(data.ndim - 1), 0))
    points = data.reshape(data.shape[:1] + (1,) * (x.ndim - data.ndim + 1) + data.shape[1:])
    differences = jnp.expand_dims(x, 0) - alpha * points
    distances = jnp.sum(differences**2, axes)
    distances = distances - jnp.min(distances, 0, keepdims=True)
    variance = jnp.maximum(sigma**2, jnp.finfo(distances.dtype).tiny)
    weights = jax.nn.softmax(-0.5 * distances / variance, axis=0)
    x0 = jnp.tensordot(weights, data, ((0,), (0,)))
    rest = x - alpha * x0
    return Estimate(x0, rest / jnp.where((sigma == 0) & (rest == 0), 1.0, sigma))


def _check_event(x, event, name):
    if jnp.shape(x)[jnp.ndim(x) - len(event) :] != event:
        raise ValueError(
            f"x: expected shape (..., {', '.join(map(str, event))}) from {name}, got {jnp.shape(x)}"
        )
