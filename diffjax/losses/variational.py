r"""The continuous-time variational bound, for one example.

    -log p(x0) <= KL(q(x_1 | x0) || p(x_1)) + E[-log p(x0 | x_s)]
                  + int_s^1 (-lambda') E |eps - eps_theta(x_t, t)|^2 dt

This is the loss of infinitely many steps of ancestral sampling: prior, reconstruction at the time s
of least noise, and diffusion. `lambda` is half the log-SNR, so `-lambda' = g^2 / (2 sigma^2)`, and
the last term is (1.14) with the likelihood weighting, in nats. In the variable lambda it is
`int |eps - eps_theta|^2 d lambda`, which depends on the schedule only through its two ends.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._calls import call_denoiser
from .._checks import as_float, check_that
from ..process import perturb
from ..schedules import coefficients, diffusion_squared
from ..typing import Denoiser, Reconstruction, Schedule, Time

__all__ = ["discrete_reconstruction", "gaussian_reconstruction", "variational_bound"]


def gaussian_reconstruction(
    key: PRNGKeyArray | None, x0: Array, alpha: float | Array, sigma: float | Array
) -> Float[Array, ""]:
    """`E_eps[-log p(x0 | x_s)]` of a Gaussian decoder, in closed form.

    With `p(x0 | x_s) = N(x_s / alpha, (sigma / alpha)^2 I)` it is
    `d/2 log(2 pi e sigma^2 / alpha^2)`. It bounds the density of continuous data.

    Args:
        key: unused.
        x0: one example, of any shape.
        alpha: alpha(s), a scalar.
        sigma: sigma(s) > 0, a scalar.

    Returns:
        The reconstruction term, in nats.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 5, in the limit where the decoder is
    `q(x_s | x0)` as a density of x0.

    >>> round(float(gaussian_reconstruction(None, jnp.zeros(2), 1.0, jnp.e)), 3)  # 2 + log(2 pi e)
    4.838
    """
    return x0.size * (jnp.log(sigma / alpha) + 0.5 * jnp.log(2 * jnp.pi * jnp.e))


def discrete_reconstruction(levels: int) -> Reconstruction:
    """`-log P(x0 | x_s)` of data of k levels at one draw of x_s: a softmax over the levels.

    Independently for each element, `P(v | z) ~ exp(-|z - alpha v|^2 / (2 sigma^2))` over the k
    values `v = (2 i + 1) / k - 1`, the middles of the bins of `likelihood.dequantize`. It bounds
    the probability of discrete data, given as those middles, without dequantization. Any other x0
    counts as the level whose bin it falls into.

    Args:
        levels: k, at least 2.

    Returns:
        `(key, x0, alpha, sigma) -> nats`.

    Raises:
        ValueError: if levels < 2.

    Reference: Kingma et al. 2021 (VDM, arXiv 2107.00630), eq. 8 and section 3.3.

    >>> reconstruction = discrete_reconstruction(2)
    >>> nats = reconstruction(jax.random.key(0), jnp.array([0.5, -0.5]), 1.0, 0.01)
    >>> round(float(nats), 3)
    0.0
    """
    if levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    return bind(_discrete_reconstruction, _level(jnp.arange(levels), levels))


def _level(k, levels):
    """The k-th of the equal levels in [-1, 1]: the middle of its bin."""
    return (2 * k + 1) / levels - 1


def _discrete_reconstruction(values, key, x0, alpha, sigma):
    z = alpha * x0 + sigma * jax.random.normal(key, x0.shape, x0.dtype)

    def log_kernel(v):
        return -0.5 * ((z - alpha * v) / sigma) ** 2

    k = jnp.clip(jnp.floor((x0 + 1) * values.size / 2), 0, values.size - 1)
    level = _level(k, values.size)
    return jnp.sum(jax.nn.logsumexp(jax.vmap(log_kernel)(values), 0) - log_kernel(level))


def variational_bound(
    key: PRNGKeyArray,
    denoise: Denoiser,
    schedule: Schedule,
    x0: Float[ArrayLike, "*x"],
    t: Time,
    *,
    start: Time = 1e-5,
    end: Time = 1.0,
    weight: float | Array = 1.0,
    reconstruction: Reconstruction = gaussian_reconstruction,
) -> Float[Array, ""]:
    """An unbiased estimate of the variational bound on -log p(x0), at one time and one noise.

    Its mean over eps and over t uniform on [start, end] is the bound in the module's docstring.
    Gradients go through the schedule. `schedules.monotone_vp` learns its ends from this loss, and
    its shape from the square of the loss, that is, from the variance.

    Args:
        key: a PRNG key, for the noise.
        denoise: the denoiser, of any parametrization.
        schedule: the path; the prior is N(0, sigma(end)^2 I).
        x0: one example, of any shape.
        t: a time in [start, end], with alpha > 0.
        start: s, the time of least noise, with sigma > 0.
        end: the time of the prior.
        weight: the importance weight of t, 1 for uniform t. Times and weights of
            `times.log_snr_times` give the least variance.
        reconstruction: `gaussian_reconstruction` for densities, `discrete_reconstruction(levels)`
            for probabilities.

    Returns:
        The bound in nats; `likelihood.bits_per_dim(-bound, d)` converts it to bits per dimension.

    Raises:
        ValueError: if the denoiser does not return an `Estimate` of the shape of x0, or for a
            concrete t or start where the bound is infinite.

    Reference: Kingma et al. 2021 (VDM, arXiv 2107.00630), eq. 11, 15 and 17-18.

    >>> schedule = edm(80.0)
    >>> denoise = as_denoiser(lambda x, t: x / (80 * t), schedule, EPS)  # exact if all data are 0
    >>> key, x0 = jax.random.key(0), jnp.zeros(1)
    >>> bound = variational_bound(key, denoise, schedule, x0, 0.5, start=0.01)
    >>> reconstruction = 0.5 * jnp.log(2 * jnp.pi * jnp.e * 0.8**2)  # the other two terms are 0
    >>> round(float(bound), 4) == round(float(reconstruction), 4)
    True
    """
    x0 = as_float(x0, "x0")
    noise_key, reconstruction_key = jax.random.split(key)
    eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
    error = jnp.sum((eps - call_denoiser(denoise, perturb(schedule, x0, eps, t), t).eps) ** 2)
    slope = 0.5 * diffusion_squared(schedule, t) / coefficients(schedule, t).sigma ** 2
    first, last = coefficients(schedule, start), coefficients(schedule, end)
    message = (
        "t: expected a time with alpha > 0 and sigma > 0, got t={1}, "
        "where the weight g^2 / (2 sigma^2) is {0}"
    )
    check_that(lambda slope, t: np.isfinite(slope), message, slope, t)
    check_that(
        lambda s, t: s > 0,
        "start: expected a time with sigma > 0, got start={1} with sigma={0}",
        first.sigma,
        start,
    )
    prior = 0.5 * jnp.sum((last.alpha / last.sigma * x0) ** 2)
    reconstructed = reconstruction(reconstruction_key, x0, first.alpha, first.sigma)
    return prior + reconstructed + weight * (end - start) * slope * error
