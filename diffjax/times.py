"""Random times to train at: `(key, n) -> (times, weights)` for a batch of n examples.

The mean of `weights * losses` is the loss over the batch (`losses.over_batch`). A sampler may use
any grid whatever the times in training were; `diffjax.grids` says which grid suits which sampler.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import check_number, check_that
from .schedules import half_log_snr, half_log_snr_inverse
from .typing import Schedule, Time

__all__ = [
    "antithetic_times",
    "log_normal_times",
    "log_snr_times",
    "stratified_times",
    "uniform_times",
]


def uniform_times(
    key: PRNGKeyArray, n: int, low: Time = 1e-5, high: Time = 1.0
) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
    """Draws n independent times, uniform on [low, high).

    Args:
        key: a PRNG key.
        n: the number of times, at least 1.
        low: the smallest time.
        high: the largest time, above low.

    Returns:
        `(times, weights)`, n of each. The weights are 1.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= low < high <= 1.

    >>> ts, weights = uniform_times(jax.random.key(0), 3)
    >>> ts.shape, weights
    ((3,), Array([1., 1., 1.], dtype=float32))
    """
    _check_times(n, low, high)
    return _unweighted(_clip(low + (high - low) * jax.random.uniform(key, (n,)), low, high))


def stratified_times(
    key: PRNGKeyArray, n: int, low: Time = 1e-5, high: Time = 1.0
) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
    """Draws n times, the i-th uniform in the i-th of n equal parts of [low, high).

    They are uniform on average, and a mean over them has less variance.

    Args:
        key: a PRNG key.
        n: the number of times, at least 1.
        low: the smallest time.
        high: the largest time, above low.

    Returns:
        `(times, weights)`, n of each. The times ascend, and the weights are 1.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= low < high <= 1.

    Reference: Kingma et al. 2021 (VDM, arXiv 2107.00630), appendix I.1, with independent offsets.

    >>> ts, weights = stratified_times(jax.random.key(0), 4, 0.0, 1.0)
    >>> (4 * ts).astype(int)
    Array([0, 1, 2, 3], dtype=int32)
    """
    _check_times(n, low, high)
    parts = jnp.arange(n) + jax.random.uniform(key, (n,))
    return _unweighted(_clip(low + (high - low) * parts / n, low, high))


def antithetic_times(
    key: PRNGKeyArray, n: int, low: Time = 1e-5, high: Time = 1.0
) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
    """Draws n times in mirrored pairs, t and low + high - t.

    They are uniform on average, and in a mean over them what is odd about the middle cancels.

    Args:
        key: a PRNG key.
        n: the number of times, at least 1. If it is odd, one time has no partner.
        low: the smallest time.
        high: the largest time, above low.

    Returns:
        `(times, weights)`, n of each: the first half of the times, then their partners. The weights
        are 1.

    Raises:
        ValueError: if n < 1, or concrete times are not 0 <= low < high <= 1.

    Reference: Hammersley and Morton 1956 (Mathematical Proceedings of the Cambridge Philosophical
    Society 52); used for training by Song et al. 2021 (DDIM, arXiv 2010.02502).

    >>> ts, weights = antithetic_times(jax.random.key(0), 4, 0.0, 1.0)
    >>> (ts[:2] + ts[2:]).round(5)
    Array([1., 1.], dtype=float32)
    """
    _check_times(n, low, high)
    ts = low + (high - low) * jax.random.uniform(key, (n - n // 2,))
    return _unweighted(_clip(jnp.concatenate([ts, low + high - ts[: n // 2]]), low, high))


def log_snr_times(
    key: PRNGKeyArray, n: int, schedule: Schedule, low: Time = 1e-5, high: Time = 1.0
) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
    """Draws n times whose log-SNR is uniform and stratified, with their importance weights.

    The density is proportional to `-lambda' = g^2 / (2 sigma^2)`, as is the likelihood weighting of
    the noise error. `mean(weights * losses)` has the expectation that it has for uniform times, and
    under the likelihood weighting its terms no longer vary by that factor.

    Args:
        key: a PRNG key.
        n: the number of times, at least 1.
        schedule: the path, whose log-SNR is finite at both times.
        low: the smallest time.
        high: the largest time, above low.

    Returns:
        `(times, weights)`, n of each. The weights have mean 1.

    Raises:
        ValueError: if n < 1, concrete times are not 0 <= low < high <= 1, or the log-SNR is
            infinite at one of them.

    Reference: Song et al. 2021 (arXiv 2101.09258), section 5 and appendix B; Kingma et al. 2021
    (VDM, arXiv 2107.00630), eq. 18.

    >>> ts, weights = log_snr_times(jax.random.key(0), 4, edm(80.0), 0.01, 1.0)
    >>> (100 * weights / ts).astype(int)  # the density is 1 / (t log(100)); log(100) / 0.99 = 4.65
    Array([465, 465, 465, 465], dtype=int32)
    """
    _check_times(n, low, high)
    start, end = half_log_snr(schedule, low), half_log_snr(schedule, high)
    message = (
        "low, high: expected times of finite log-SNR, "
        f"got half log-SNRs {{}} at {low} and {{}} at {high}"
    )
    check_that(lambda start, end: np.isfinite(start) & np.isfinite(end), message, start, end)
    values = end + (start - end) * (jnp.arange(n) + jax.random.uniform(key, (n,))) / n
    ts = jax.vmap(lambda value: half_log_snr_inverse(schedule, value))(values)
    slopes = jax.vmap(jax.grad(lambda t: half_log_snr(schedule, t)))(ts)
    return ts, (end - start) / ((high - low) * slopes)


def log_normal_times(
    key: PRNGKeyArray,
    n: int,
    schedule: Schedule,
    mean: float | Array = -1.2,
    std: float | Array = 1.2,
) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
    """Draws n times at which Karras' sigma is log-normal: `log(sigma / alpha) ~ N(mean, std^2)`.

    Args:
        key: a PRNG key.
        n: the number of times, at least 1.
        schedule: the path; noise levels that it does not reach are moved to its nearer end.
        mean: the mean of log(sigma / alpha), in nats.
        std: its standard deviation.

    Returns:
        `(times, weights)`, n of each. The weights are 1: these times are a part of the objective.

    Raises:
        ValueError: if n < 1, or a concrete std is negative.

    Reference: Karras et al. 2022 (EDM, arXiv 2206.00364), Table 1 and section 5.

    >>> ts, weights = log_normal_times(jax.random.key(0), 2, edm(80.0), mean=0.0, std=0.0)
    >>> (ts * 80).round(3)
    Array([1., 1.], dtype=float32)
    """
    _check_times(n, 0.0, 1.0)
    check_number(std, "std", low=0)
    z = jax.random.normal(key, (n,))
    return _unweighted(jax.vmap(lambda z: half_log_snr_inverse(schedule, -(mean + std * z)))(z))


def _unweighted(ts):
    return ts, jnp.ones_like(ts)


def _clip(ts, low, high):
    """Keeps rounded times in [low, high), because a weighting may be infinite at high."""
    high = jax.lax.stop_gradient(jnp.asarray(high, ts.dtype))  # only rounded times are clipped
    return jnp.clip(ts, low, jnp.nextafter(high, jnp.zeros_like(high)))


def _check_times(n, low, high):
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    message = "low, high: expected 0 <= low < high <= 1, got low={}, high={}"
    check_that(lambda low, high: (0 <= low) & (low < high) & (high <= 1), message, low, high)
