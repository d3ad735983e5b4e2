r"""Training losses, each for one example, the weightings of the noise levels, and the times to train at.

    denoising                   w(t) |out - target|^2               (1.14), (1.15)
    flow_matching               |v_theta(x_t, t) - v(x_t, t)|^2     (1.16)
    conditional_flow_matching   |v_theta(x_t, t) - (x1 - x0)|^2     (1.17)

`vmap` over keys, examples and times, and average. A squared error is the mean over the elements of x, so that a loss does
not grow with the dimension.

A weighting is a function `(schedule, parametrization, t) -> w`: the weight of the squared error of what the network
predicts. The errors of x0, eps, score and output of one network differ by factors that depend on t alone, so the published
weightings, each stated for the error that its paper speaks of, apply to every parametrization:

    unweighted         1 on the output itself               "simple" loss of Ho et al. 2020, flow matching
    inverse_variance   1/sigma^2 on the noise               (1.14) with lambda = 1
    likelihood         g^2 on the score                     (1.14) with lambda = g^2: the bound on the likelihood
    min_snr(gamma)     min(SNR, gamma) on x0                Hang et al. 2023
    edm_weighting(sd)  (s^2 + sd^2) / (s sd)^2 on x0        Karras et al. 2022, s = sigma / alpha
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._bind import bind
from ._math import as_float, check_number, check_that
from .parametrizations import Parametrization, output, solve, target
from .process import perturb
from .schedules import coefficients, diffusion_squared, half_log_snr_inverse
from .typing import Network, Schedule, Time

__all__ = [
    "conditional_flow_matching",
    "denoising",
    "edm_weighting",
    "flow_matching",
    "inverse_variance",
    "likelihood",
    "log_normal_times",
    "min_snr",
    "stratified_times",
    "uniform_times",
    "unweighted",
]

Weighting = Callable[[Schedule, Parametrization, Time], Array]


def unweighted(schedule: Schedule, parametrization: Parametrization, t: Time) -> Float[Array, ""]:
    """1: the plain squared error of what the network predicts.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        t: a scalar time.

    Returns:
        The weight.

    Reference: Ho et al. 2020 (arXiv 2006.11239), eq. 14; Lipman et al. 2023 (arXiv 2210.02747), eq. 9.

    >>> float(unweighted(linear(), VELOCITY, 0.5))
    1.0
    """
    return jnp.ones(())


def denoising(
    key: PRNGKeyArray,
    network: Network,
    schedule: Schedule,
    parametrization: Parametrization,
    x0: Array,
    t: Time,
    weighting: Weighting = unweighted,
) -> Float[Array, ""]:
    """The denoising loss of one example: `w(t) |network(x_t, t) - target|^2`, `x_t = alpha x0 + sigma eps` (1.14), (1.15).

    With SCORE it is denoising score matching, with EPS the loss of DDPM, with VELOCITY flow matching from Gaussian noise.

    Args:
        key: the key of the noise eps.
        network: the network, its condition bound.
        schedule: the path.
        parametrization: what the network predicts.
        x0: one example, of any shape.
        t: its time, a scalar; at t > 0 every weighting is finite.
        weighting: the weight of the noise level.

    Returns:
        The loss, a mean over the elements of x0 (`2 / d` times the integrand of (1.14)).

    Raises:
        ValueError: if the network's output has another shape than x0, or t is not a scalar.

    Reference: Vincent 2011; Ho et al. 2020 (arXiv 2006.11239), eq. 14; Song et al. 2021 (arXiv 2011.13456), eq. 7.

    >>> def network(x, t):  # for data that are all zero, eps = x / sigma
    ...     return x / t
    >>> denoising(jax.random.key(0), network, linear(), EPS, jnp.zeros(4), 0.5, inverse_variance)
    Array(0., dtype=float32)
    """
    x0 = as_float(x0, "x0")
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    x = perturb(schedule, x0, eps, t)
    error = output(network, schedule, parametrization, x, t) - target(schedule, parametrization, x0, eps, t)
    return weighting(schedule, parametrization, t) * jnp.mean(error**2)


def flow_matching(network: Network, velocity: Callable[[Array, Time], Array], x: Array, t: Time) -> Float[Array, ""]:
    """The flow-matching loss of one point against a velocity that is known: `|v_theta(x, t) - v(x, t)|^2` (1.16).

    For distillation, or where a closed form exists; otherwise `conditional_flow_matching` has the same gradient.

    Args:
        network: predicts the velocity.
        velocity: `(x, t) -> dx/dt`, for instance `bind(velocity, denoise, schedule)`.
        x: one sample of p(x_t), of any shape.
        t: its time, a scalar.

    Returns:
        The loss, a mean over the elements of x.

    Raises:
        ValueError: if the network's output has another shape than x.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 5.

    >>> flow_matching(lambda x, t: 2 * x, lambda x, t: x, jnp.ones(3), 0.5)
    Array(1., dtype=float32)
    """
    return _mean_squared_error(network, velocity(x, t), x, t)


def conditional_flow_matching(network: Network, x0: Array, x1: Array, t: Time) -> Float[Array, ""]:
    """The conditional flow-matching loss of one pair: `|v_theta(x_t, t) - (x1 - x0)|^2`, `x_t = (1 - t) x0 + t x1` (1.17).

    Any prior and any coupling: the pair is given. With independent Gaussian x1 it is `denoising` with VELOCITY on the
    linear path.

    Args:
        network: predicts the velocity in increasing t, from data to prior.
        x0: a data example, of any shape.
        x1: the draw of the prior that it is paired with, of the shape of x0.
        t: its time, a scalar.

    Returns:
        The loss, a mean over the elements of x0.

    Raises:
        ValueError: if the shapes differ.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), eq. 23; Tong et al. 2024 (arXiv 2302.00482), eq. 14-15. Their clock
    runs the other way.

    >>> conditional_flow_matching(lambda x, t: jnp.zeros_like(x), jnp.array([1.0]), jnp.array([3.0]), 0.5)
    Array(4., dtype=float32)
    """
    x0, x1 = as_float(x0, "x0"), as_float(x1, "x1")
    if x0.shape != x1.shape:
        raise ValueError(f"x1: expected the shape of x0, {x0.shape}, got {x1.shape}")
    return _mean_squared_error(network, x1 - x0, (1 - t) * x0 + t * x1, t)


def _mean_squared_error(network, goal, x, t):
    out = network(x, t)
    if jnp.shape(out) != jnp.shape(x):
        raise ValueError(
            f"network: it returned {jnp.shape(out)} for x of shape {jnp.shape(x)}; expected the same shape"
        )
    return jnp.mean((out - goal) ** 2)


# ---- weightings ------------------------------------------------------------------------------------------------------


def inverse_variance(schedule: Schedule, parametrization: Parametrization, t: Time) -> Float[Array, ""]:
    """`1/sigma^2` on the noise error, which is 1 on the score error: (1.14) with lambda(t) = 1.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        t: a scalar time above 0.

    Returns:
        The weight.

    >>> float(inverse_variance(linear(), EPS, 0.5)), float(inverse_variance(linear(), SCORE, 0.5))
    (4.0, 1.0)
    """
    return _of_noise(schedule, parametrization, t) / coefficients(schedule, t).sigma ** 2


def likelihood(schedule: Schedule, parametrization: Parametrization, t: Time) -> Float[Array, ""]:
    """`g^2` on the score error: half its mean over uniform t, times d, bounds the negative log-likelihood.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        t: a scalar time above 0, with alpha > 0.

    Returns:
        The weight.

    Reference: Song et al. 2021 (arXiv 2101.09258), eq. 7 and theorem 1; (1.14) with lambda = g^2.

    >>> float(likelihood(linear(), SCORE, 0.5))  # g^2 = 2 t / (1 - t)
    2.0
    """
    return diffusion_squared(schedule, t) * inverse_variance(schedule, parametrization, t)


def min_snr(gamma: float | Array = 5.0) -> Weighting:
    """`min(SNR, gamma)` on the x0 error, SNR = alpha^2 / sigma^2.

    Args:
        gamma: the largest weight, above 0.

    Returns:
        The weighting.

    Raises:
        ValueError: if a concrete gamma is not positive and finite.

    Reference: Hang et al. 2023 (arXiv 2303.09556), section 3.4.

    >>> [round(float(min_snr(5.0)(linear(), X0, t)), 4) for t in (0.1, 0.5)]
    [5.0, 1.0]
    """
    check_number(gamma, "gamma", low=1e-38)
    return bind(_min_snr, gamma)


def _min_snr(gamma, schedule, parametrization, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    return _of_noise(schedule, parametrization, t) * jnp.minimum(1.0, gamma * (sigma / alpha) ** 2)


def edm_weighting(sigma_data: float | Array = 0.5) -> Weighting:
    """`(s^2 + sigma_data^2) / (s sigma_data)^2` on the x0 error, s = sigma / alpha: uniform for EDM's preconditioning.

    Args:
        sigma_data: the standard deviation of the data.

    Returns:
        The weighting.

    Raises:
        ValueError: if a concrete sigma_data is not positive and finite.

    Reference: Karras et al. 2022 (arXiv 2206.00364), Table 1.

    >>> round(float(edm_weighting(0.5)(edm(80.0), edm_preconditioning(0.5), 0.01)), 4)
    1.0
    """
    check_number(sigma_data, "sigma_data", low=1e-38)
    return bind(_edm_weighting, sigma_data)


def _edm_weighting(sigma_data, schedule, parametrization, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    return _of_noise(schedule, parametrization, t) * (1 + (sigma / (alpha * sigma_data)) ** 2)


def _of_noise(schedule, parametrization, t):
    """The squared error of the noise estimate, as a multiple of the squared error of the network's output."""
    _, (_, eps_from_out) = solve(schedule, parametrization, t)
    return eps_from_out**2


# ---- times -----------------------------------------------------------------------------------------------------------


def uniform_times(key: PRNGKeyArray, n: int, low: Time = 1e-5, high: Time = 1.0) -> Float[Array, " n"]:
    """N independent times, uniform on [low, high).

    Args:
        key: a PRNG key.
        n: how many, at least 1.
        low: the smallest time.
        high: the largest time, above low.

    Returns:
        n times.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= low < high <= 1.

    >>> uniform_times(jax.random.key(0), 3).shape
    (3,)
    """
    _check_times(n, low, high)
    return low + (high - low) * jax.random.uniform(key, (n,))


def stratified_times(key: PRNGKeyArray, n: int, low: Time = 1e-5, high: Time = 1.0) -> Float[Array, " n"]:
    """N times, the i-th uniform in the i-th of n equal parts of [low, high): uniform on average, with less variance.

    Args:
        key: a PRNG key.
        n: how many, at least 1.
        low: the smallest time.
        high: the largest time, above low.

    Returns:
        n ascending times.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= low < high <= 1.

    Reference: Kingma et al. 2021 (VDM, arXiv 2107.00630), appendix I.1, with independent offsets.

    >>> ts = stratified_times(jax.random.key(0), 4, 0.0, 1.0)
    >>> (4 * ts).astype(int)
    Array([0, 1, 2, 3], dtype=int32)
    """
    _check_times(n, low, high)
    return low + (high - low) * (jnp.arange(n) + jax.random.uniform(key, (n,))) / n


def log_normal_times(
    key: PRNGKeyArray, n: int, schedule: Schedule, mean: float | Array = -1.2, std: float | Array = 1.2
) -> Float[Array, " n"]:
    """N times at which Karras' sigma is log-normal: `log(sigma / alpha) ~ N(mean, std^2)`.

    Args:
        key: a PRNG key.
        n: how many, at least 1.
        schedule: the path; noise levels that it does not reach are moved to its nearer end.
        mean: the mean of log(sigma / alpha), in nats.
        std: its standard deviation.

    Returns:
        n times.

    Raises:
        ValueError: if n < 1, or a concrete std is negative.

    Reference: Karras et al. 2022 (arXiv 2206.00364), Table 1 and section 5.

    >>> (log_normal_times(jax.random.key(0), 2, edm(80.0), mean=0.0, std=0.0) * 80).round(3)
    Array([1., 1.], dtype=float32)
    """
    _check_times(n, 0.0, 1.0)
    check_number(std, "std", low=0)
    return jax.vmap(lambda z: half_log_snr_inverse(schedule, -(mean + std * z)))(jax.random.normal(key, (n,)))


def _check_times(n, low, high):
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    message = f"low, high: expected 0 <= low < high <= 1, got low={low}, high={high}"
    check_that(lambda low, high: (0 <= low) & (low < high) & (high <= 1), message, low, high)
