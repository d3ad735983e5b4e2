"""Guidance by a linear observation `y = A x0 + noise`: inpainting, deblurring, super-resolution.

All methods move the estimate of the data as if `x0 | x_t ~ N(x0, V)`, whose posterior mean is

    x0 + V A^T (A V A^T + R)^-1 (y - A x0),   V = Cov[x0 | x_t] = sigma^2 / alpha dx0/dx (Tweedie)

and they differ in the V that they take, on the left and inside the inverse:

    mmps      Tweedie       Tweedie      exact for every Gaussian prior
    pigdm     Tweedie       r^2 I        exact for a prior of covariance prior_std^2 I
    diffpir   another r^2 I, on both sides; no derivative of the network
    dps       Tweedie       0            not exact for any Gaussian prior but a point

A denoiser here takes one sample. For a batch, `jax.vmap(guided, in_axes=(0, None))` is a denoiser,
or vmap over the sampler.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from .._checks import (
    as_float,
    as_scalar,
    as_static,
    broadcasts_to,
    check_number,
    described,
)
from .._once import once
from .._varying import vary_alike, varying_scan, zeros_of
from ..schedules import alpha_sigma
from ..typing import Denoiser, Estimate, Schedule, Time
from ._moves import along_score, tweedie_gain, with_x0

__all__ = ["diffpir", "dps", "mmps", "pigdm", "tweedie_twist"]


def mmps(
    denoise: Denoiser,
    schedule: Schedule,
    observe: Callable[[Array], Array],
    y: ArrayLike,
    noise: float | Array,
    iterations: int = 5,
) -> Denoiser:
    """Moment-matching posterior sampling: the covariance of x0 given x_t by Tweedie's formula.

    It is exact for every Gaussian prior if `iterations` is at least the number of observations.
    With fewer it is the best step in the space that they span. A learned network's Jacobian is not
    exactly symmetric, which conjugate gradients assume.

    Args:
        denoise: the denoiser of the prior.
        schedule: its path.
        observe: A, a linear function of one sample, such as `lambda x: mask * x`. A differentiable
            one is linearized at the estimate.
        y: the observation, of the shape of `observe(x)`. Without noise it must be one that some x
            has: for `lambda x: mask * x` give `mask * image`.
        noise: the standard deviation of the observation, at least 0; it broadcasts to y.
        iterations: the number of steps of conjugate gradients. Each takes a product with the
            transposed Jacobian of the network.

    Returns:
        The denoiser of the posterior, for one sample.

    Raises:
        ValueError: if a concrete noise is negative or iterations < 1. When it is called, if
            observe(x) has another shape than y, or alpha = 0 at a concrete time.

    Reference: Rozet et al. 2024 (arXiv 2405.13712); Boys et al. 2023 (TMPD, arXiv 2310.06721).

    >>> denoise = gaussian(jnp.zeros(2), jnp.array([[1.0, 0.5], [0.5, 1.0]]), linear())
    >>> first = lambda x: x[:1]
    >>> guided = mmps(denoise, linear(), first, jnp.array([1.0]), 0.0)
    >>> guided(jnp.zeros(2), 0.999).x0.round(2)  # E[x0 | the first number is 1]
    Array([1. , 0.5], dtype=float32)
    """
    problem = _problem(observe, y, noise)
    return bind(_mmps, denoise, schedule, problem, as_static(iterations, "iterations"))


@once
def _mmps(denoise, schedule, problem, empty, x, t) -> Estimate:
    estimate, transposed = _with_jacobian(denoise, x, t)
    a, a_transposed, residual, variance = _linearized(problem, estimate.x0)
    gain = tweedie_gain(*alpha_sigma(schedule, t))
    k = _conjugate_gradients(
        lambda u: gain * a(transposed(a_transposed(u))) + variance * u, residual, empty
    )
    return along_score(estimate, transposed(a_transposed(k)), schedule, t)


def pigdm(
    denoise: Denoiser,
    schedule: Schedule,
    observe: Callable[[Array], Array],
    y: ArrayLike,
    noise: float | Array,
    prior_std: float | Array = 1.0,
    iterations: int = 5,
) -> Denoiser:
    """Pseudoinverse-guided diffusion: `r^2 I` in place of the covariance inside the inverse.

    `r^2 = s^2 sigma^2 / (sigma^2 + alpha^2 s^2)`, the variance of x0 given x_t for a prior
    N(mean, s^2 I) with s = prior_std. Conjugate gradients replace the pseudoinverse of the paper.

    Args:
        denoise: the denoiser of the prior.
        schedule: its path.
        observe: A, as for `mmps`.
        y: the observation.
        noise: its standard deviation.
        prior_std: s, in units of the data.
        iterations: the number of steps of conjugate gradients with `r^2 A A^T + R`; one is enough
            if A only selects numbers.

    Returns:
        The guided denoiser, for one sample.

    Raises:
        ValueError: as `mmps`, and if a concrete prior_std is not positive.

    Reference: Song et al. 2023 (PiGDM, ICLR 2023).

    >>> denoise = gaussian(jnp.zeros(2), jnp.eye(2), linear())
    >>> guided = pigdm(denoise, linear(), lambda x: x[:1], jnp.array([1.0]), 1.0)
    >>> guided(jnp.zeros(2), 0.999).x0.round(2)
    Array([0.5, 0. ], dtype=float32)
    """
    check_number(prior_std, "prior_std", low=1e-38)
    problem = _problem(observe, y, noise)
    return bind(_pigdm, denoise, schedule, problem, prior_std, as_static(iterations, "iterations"))


@once
def _pigdm(denoise, schedule, problem, prior_std, empty, x, t) -> Estimate:
    estimate, transposed = _with_jacobian(denoise, x, t)
    a, a_transposed, residual, variance = _linearized(problem, estimate.x0)
    alpha, sigma = alpha_sigma(schedule, t)
    prior_std = as_scalar(prior_std, "prior_std")
    r = prior_std * sigma / jnp.hypot(sigma, alpha * prior_std)
    k = _conjugate_gradients(lambda u: r**2 * a(a_transposed(u)) + variance * u, residual, empty)
    return along_score(estimate, transposed(a_transposed(k)), schedule, t)


def diffpir(
    denoise: Denoiser,
    schedule: Schedule,
    observe: Callable[[Array], Array],
    y: ArrayLike,
    noise: float | Array,
    weight: float | Array = 1.0,
    iterations: int = 5,
) -> Denoiser:
    """DiffPIR: the estimate is moved to the proximal point of the observation.

    `argmin_z |y - A z|^2 / noise^2 + |z - x0|^2 / r^2` with `r^2 = (sigma / alpha)^2 / weight`. It
    takes no derivative of the network. It is exact for a flat prior and weight 1. The paper also
    draws a part of the noise anew in each step, as `ddim` with eta does, with another share.

    Args:
        denoise: the denoiser of the prior.
        schedule: its path.
        observe: A, as for `mmps`.
        y: the observation.
        noise: its standard deviation.
        weight: lambda, how much the estimate counts.
        iterations: the number of steps of conjugate gradients, as for `pigdm`.

    Returns:
        The guided denoiser, for one sample.

    Raises:
        ValueError: as `mmps`, and if a concrete weight is not positive.

    Reference: Zhu et al. 2023 (DiffPIR, arXiv 2305.08995).

    >>> denoise = gaussian(jnp.zeros(2), jnp.eye(2), linear())
    >>> guided = diffpir(denoise, linear(), lambda x: x[:1], jnp.array([1.0]), 1.0)
    >>> guided(jnp.zeros(2), 0.5).x0  # r = 1
    Array([0.5, 0. ], dtype=float32)
    """
    check_number(weight, "weight", low=1e-38)
    problem = _problem(observe, y, noise)
    return bind(_diffpir, denoise, schedule, problem, weight, as_static(iterations, "iterations"))


@once
def _diffpir(denoise, schedule, problem, weight, empty, x, t) -> Estimate:
    estimate = call_denoiser(denoise, x, t)
    a, a_transposed, residual, variance = _linearized(problem, estimate.x0)
    alpha, sigma = alpha_sigma(schedule, t)
    # both sides times alpha^2 weight: regular at alpha = 0
    variance = variance * alpha**2 * as_scalar(weight, "weight")
    k = _conjugate_gradients(
        lambda u: sigma**2 * a(a_transposed(u)) + variance * u, residual, empty
    )
    return with_x0(estimate, estimate.x0 + sigma**2 * a_transposed(k), schedule, t)


def dps(
    denoise: Denoiser,
    schedule: Schedule,
    observe: Callable[[Array], Array],
    y: ArrayLike,
    noise: float | Array,
) -> Denoiser:
    """Diffusion posterior sampling: it treats the estimate as if it were the data, `V = 0`.

    It is `classifier` with `log N(y; A E[x0 | x_t], noise^2 I)`. It overrates the observation: for
    Gaussian data the variance of its samples is too small, and much too small at small noise. The
    authors' code divides by |y - A x0| and multiplies by a tuned number, which is another method.

    Args:
        denoise: the denoiser of the prior.
        schedule: its path.
        observe: A, any differentiable function of one sample.
        y: the observation.
        noise: its standard deviation, above 0.

    Returns:
        The guided denoiser, for one sample.

    Raises:
        ValueError: if a concrete noise is not positive; see also `mmps`.

    Reference: Chung et al. 2023 (DPS, arXiv 2209.14687).

    >>> denoise = gaussian(jnp.zeros(2), jnp.eye(2), linear())
    >>> guided = dps(denoise, linear(), lambda x: x[:1], jnp.array([1.0]), 0.5)
    >>> guided(jnp.zeros(2), 0.5).x0.round(3)  # sigma^2 / alpha dx0/dx / noise^2 = 2
    Array([2., 0.], dtype=float32)
    """
    check_number(noise, "noise", low=1e-38)
    return bind(_dps, denoise, schedule, _problem(observe, y, noise))


def _dps(denoise, schedule, problem, x, t) -> Estimate:
    estimate, transposed = _with_jacobian(denoise, x, t)
    _, a_transposed, residual, variance = _linearized(problem, estimate.x0)
    return along_score(estimate, transposed(a_transposed(residual / variance)), schedule, t)


def tweedie_twist(
    denoise: Denoiser,
    schedule: Schedule,
    observe: Callable[[Array], Array],
    y: ArrayLike,
    noise: float | Array,
) -> Callable[[Array, Time], Array]:
    """The log likelihood of y given x_t, by Tweedie's covariance: the twist for `twisted`.

    `log N(y; A x0, A V A^T + R)` with V as for `mmps`; exact for a Gaussian prior, where its
    gradient is the guidance of `mmps`. The covariance is computed in full, with one product with
    the network's Jacobian for each number of y: for few observations. Its gradient takes second
    derivatives of the network.

    Args:
        denoise: the denoiser of the prior.
        schedule: its path.
        observe: A, as for `mmps`.
        y: the observation.
        noise: its standard deviation, above 0.

    Returns:
        `log_twist(x, t)` for one sample, in nats. Where sigma = 0 it is the log likelihood of x.
        Where alpha = 0 the Jacobian vanishes, and the prior's covariance is missing. `twisted`
        stays unbiased there.

    Raises:
        ValueError: if a concrete noise is not positive; see also `mmps`.

    Reference: Wu et al. 2023 (TDS, arXiv 2306.17775), with the covariance of Rozet et al. 2024
    (arXiv 2405.13712).

    >>> prior = gaussian(jnp.zeros(1), jnp.eye(1), linear())
    >>> log_twist = tweedie_twist(prior, linear(), lambda x: x, jnp.ones(1), 1.0)
    >>> log_twist(jnp.zeros(1), 0.999)  # log N(1; 0, 1 + 1)
    Array(-1.51..., dtype=float32)
    """
    check_number(noise, "noise", low=1e-38)
    return bind(_tweedie_twist, denoise, schedule, _problem(observe, y, noise))


def _tweedie_twist(denoise, schedule, problem, x, t):
    estimate, transposed = _with_jacobian(denoise, x, t)
    alpha, sigma = alpha_sigma(schedule, t)
    # at sigma = 0 the data are x / alpha, and a network may be undefined
    x0 = jnp.where(sigma > 0, estimate.x0, x / jnp.where(sigma > 0, 1.0, alpha))
    a, a_transposed, residual, variance = _linearized(problem, x0)
    basis = jnp.eye(residual.size, dtype=residual.dtype).reshape(-1, *residual.shape)
    basis, residual = vary_alike(basis, residual)
    rows = jax.vmap(lambda u: a(transposed(a_transposed(u))))(basis).reshape(2 * (residual.size,))
    noise = jnp.broadcast_to(variance, residual.shape).ravel()
    covariance = jnp.where(sigma > 0, tweedie_gain(alpha, sigma) * rows, 0.0) + jnp.diag(noise)
    return jax.scipy.stats.multivariate_normal.logpdf(
        residual.ravel(), jnp.zeros(residual.size), covariance
    )


def _problem(observe, y, noise):
    if not callable(observe):
        raise ValueError(
            f"observe: expected a function of one sample, such as lambda x: matrix @ x, got "
            f"{described(observe)}"
        )
    check_number(noise, "noise", low=0)
    y = as_float(jnp.asarray(y), "y")
    if not broadcasts_to(jnp.shape(noise), y.shape):
        raise ValueError(
            f"noise: expected a shape that broadcasts to y, {y.shape}, got {jnp.shape(noise)}"
        )
    return observe, y, noise


def _with_jacobian(denoise, x, t):
    """The estimate at x, and `u -> (dx0/dx)^T u`."""

    def estimates(x):
        estimate = call_denoiser(denoise, x, t)
        return estimate.x0, estimate.eps

    x0, transposed, eps = jax.vjp(estimates, x, has_aux=True)
    return Estimate(x0, eps), lambda u: transposed(u)[0].astype(x0.dtype)


def _linearized(problem, x0):
    """A and A^T of the observation at x0, the residual `y - A x0`, and the variance of y."""
    observe, y, noise = problem
    predicted, a = jax.linearize(observe, x0)
    shape = getattr(predicted, "shape", None)
    if shape != y.shape:
        raise ValueError(
            f"y: expected the shape of observe(x), {shape} for x of shape "
            f"{x0.shape}, got {y.shape}. For a batch, jax.vmap(guided, in_axes=(0, None)) is a "
            "denoiser"
        )
    transposed = jax.linear_transpose(a, x0)
    residual = y.astype(predicted.dtype) - predicted
    return a, lambda u: transposed(u)[0], residual, jnp.square(noise)


def _conjugate_gradients(product, b, empty):
    """The k with `product(k) = b`, by as many steps as `empty` is long.

    It returns the iterate of the smallest residual: the last one, unless rounding or a system
    without a solution stops the descent. `jax.scipy.sparse.linalg.cg` stops by a loop that meshes
    with explicit axes refuse.
    """

    def step(state, _):
        k, rest, direction, square, best, least = state
        moved = product(direction)
        length = _ratio(square, jnp.sum(direction * moved))
        k, rest = k + length * direction, rest - length * moved
        next_square = jnp.sum(rest**2)
        direction = rest + _ratio(next_square, square) * direction
        better = next_square < least
        best, least = jnp.where(better, k, best), jnp.where(better, next_square, least)
        return (k, rest, direction, next_square, best, least), None

    zero, square = zeros_of(b), jnp.sum(b**2)
    return varying_scan(step, (zero, b, b, square, zero, square), empty)[0][4]


def _ratio(a, b):
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
