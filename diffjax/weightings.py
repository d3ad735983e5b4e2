r"""Weightings of the noise levels: `(schedule, parametrization, t) -> w` weights a squared error.

For one network, the errors of x0, eps, score and output differ by factors that depend only on t. So
the published weightings, each stated for the error that its paper uses, apply to every
parametrization:

    unweighted         1 on the output itself            Ho et al. 2020 ("simple"), flow matching
    inverse_variance   1/sigma^2 on the noise            (1.14) with lambda = 1
    likelihood         g^2 on the score                  (1.14) with lambda = g^2, a bound
    snr                SNR on x0, 1 on the noise         Ho et al. 2020, for any parametrization
    min_snr(gamma)     min(SNR, gamma) on x0             Hang et al. 2023
    p2(gamma, k)       1 / (k + SNR)^gamma on the noise  Choi et al. 2022
    edm_weighting(sd)  (s^2 + sd^2) / (s sd)^2 on x0     Karras et al. 2022, s = sigma / alpha

At t = 0 and t = 1 every weight is its limit, which may be infinite.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._bind import bind
from ._checks import as_scalar, check_number
from ._numerics import limit
from .parametrizations import Parametrization, solve
from .schedules import coefficients, diffusion
from .typing import Schedule, Time, Weighting

__all__ = ["edm_weighting", "inverse_variance", "likelihood", "min_snr", "p2", "snr", "unweighted"]


def unweighted(schedule: Schedule, parametrization: Parametrization, t: Time) -> Float[Array, ""]:
    """1: the plain squared error of what the network predicts.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        t: a scalar time.

    Returns:
        The weight.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 14; Lipman et al. 2023 (arXiv
    2210.02747), eq. 9.

    >>> float(unweighted(linear(), VELOCITY, 0.5))
    1.0
    """
    return jnp.ones(())


def inverse_variance(
    schedule: Schedule, parametrization: Parametrization, t: Time
) -> Float[Array, ""]:
    """`1/sigma^2` on the noise error, or 1 on the score error: (1.14) with lambda(t) = 1.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        t: a scalar time.

    Returns:
        The weight.

    >>> float(inverse_variance(linear(), EPS, 0.5)), float(inverse_variance(linear(), SCORE, 0.5))
    (4.0, 1.0)
    """
    return _weight(bind(_inverse_variance), schedule, parametrization, t)


def _inverse_variance(schedule, t):
    return 1 / coefficients(schedule, t).sigma


def likelihood(schedule: Schedule, parametrization: Parametrization, t: Time) -> Float[Array, ""]:
    """`g^2` on the score error, which bounds the negative log-likelihood.

    Up to a constant, the bound is d / 2 times the mean of the loss over uniform t.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        t: a scalar time.

    Returns:
        The weight.

    Reference: Song et al. 2021 (arXiv 2101.09258), eq. 7 and theorem 1; (1.14) with lambda = g^2.

    >>> round(float(likelihood(linear(), SCORE, 0.5)), 4)  # g^2 = 2 t / (1 - t)
    2.0
    """
    return _weight(bind(_likelihood), schedule, parametrization, t)


def _likelihood(schedule, t):
    return diffusion(schedule, t) / coefficients(schedule, t).sigma


def snr(schedule: Schedule, parametrization: Parametrization, t: Time) -> Float[Array, ""]:
    """`SNR = alpha^2 / sigma^2` on the x0 error, or 1 on the noise error.

    It is DDPM's simple loss for any parametrization.

    Args:
        schedule: any schedule.
        parametrization: what the network predicts.
        t: a scalar time.

    Returns:
        The weight.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 14; Salimans and Ho 2022 (arXiv
    2202.00512), section 4.

    >>> float(snr(linear(), EPS, 0.2)), round(float(snr(linear(), X0, 0.2)), 4)
    (1.0, 16.0)
    """
    return _weight(bind(_snr), schedule, parametrization, t)


def _snr(schedule, t):
    return 1.0


def p2(gamma: float | Array = 1.0, k: float | Array = 1.0) -> Weighting:
    """`1 / (k + SNR)^gamma` on the noise error, with SNR = alpha^2 / sigma^2.

    It gives low noise levels less weight.

    Args:
        gamma: the exponent, at least 0; 0 gives `snr`.
        k: the SNR around which the weight falls, above 0.

    Returns:
        The weighting.

    Raises:
        ValueError: if a concrete gamma is negative, a concrete k not positive, or one not finite.

    Reference: Choi et al. 2022 (P2, arXiv 2204.00227), eq. 8.

    >>> round(float(p2(1.0, 1.0)(linear(), EPS, 0.5)), 4)
    0.5
    """
    check_number(gamma, "gamma", 0)
    check_number(k, "k", low=1e-38)
    return bind(_weight, bind(_p2, gamma, k))


def _p2(gamma, k, schedule, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    return jnp.hypot(jnp.sqrt(as_scalar(k, "k")), alpha / sigma) ** -as_scalar(gamma, "gamma")


def min_snr(gamma: float | Array = 5.0) -> Weighting:
    """`min(SNR, gamma)` on the x0 error, with SNR = alpha^2 / sigma^2.

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
    return bind(_weight, bind(_min_snr, gamma))


def _min_snr(gamma, schedule, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    return jnp.minimum(1.0, jnp.sqrt(as_scalar(gamma, "gamma")) * sigma / alpha)


def edm_weighting(sigma_data: float | Array = 0.5) -> Weighting:
    """`(s^2 + sigma_data^2) / (s sigma_data)^2` on the x0 error, with s = sigma / alpha.

    With EDM's preconditioning it is 1 on the network's output.

    Args:
        sigma_data: the standard deviation of the data.

    Returns:
        The weighting.

    Raises:
        ValueError: if a concrete sigma_data is not positive and finite.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), Table 1.

    >>> round(float(edm_weighting(0.5)(edm(80.0), edm_preconditioning(0.5), 0.01)), 4)
    1.0
    """
    check_number(sigma_data, "sigma_data", low=1e-38)
    return bind(_weight, bind(_edm_weighting, sigma_data))


def _edm_weighting(sigma_data, schedule, t):
    alpha, sigma, *_ = coefficients(schedule, t)
    return jnp.hypot(1.0, sigma / (alpha * as_scalar(sigma_data, "sigma_data")))


def _weight(factor, schedule, parametrization, t):
    """The weight of the output's squared error, if the noise error has the weight factor^2."""

    def root(t):
        _, (_, eps_from_out) = solve(schedule, parametrization, t)
        return factor(schedule, t) * eps_from_out

    return limit(root, t) ** 2
