"""Paths from other descriptions: the betas of a discrete chain, or the coefficients of an SDE."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._bind import bind
from .._checks import as_float, check_that
from .._numerics import safe_sqrt
from ..typing import Schedule

__all__ = ["from_betas", "from_sde", "to_betas", "zero_terminal_snr"]


def from_betas(betas: Float[ArrayLike, " n"]) -> Schedule:
    """DDPM's discrete chain as a continuous path, exact at its n points t = i / n (1.31-1.33).

    `log alpha = 1/2 log prod_{j<=i} (1 - beta_j)` at t = i / n, and it is linear in between. The
    path is variance-preserving. `uniform(n)` visits the chain's own steps, and beta(t) of (1.26) is
    constant on each of them. If the last beta is 1, as after `zero_terminal_snr`, alpha itself is
    linear on the last step, and 0 at t = 1.

    Args:
        betas: beta_1 ... beta_n, each in [0, 1); the last one may be 1.

    Returns:
        The schedule.

    Raises:
        ValueError: if betas is not a non-empty vector, a concrete value is not finite or not in
            [0, 1), but for a last one of 1, or concrete values look like `alphas_cumprod`.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 4; Lu et al. 2022 (DPM-Solver, arXiv
    2206.00927), appendix D.1.

    >>> import jax.numpy as jnp
    >>> schedule = from_betas(jnp.linspace(1e-4, 0.02, 1000))  # DDPM
    >>> float(schedule(1.0)[0])
    0.0063...
    """
    betas = as_float(betas, "betas")
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas: expected a non-empty vector, got shape {betas.shape}")
    check_that(
        lambda b: (b >= 0) & ((b < 1) | (b == 1) & (np.arange(b.size) == b.size - 1)),
        "betas: expected finite values in [0, 1), or a last one of 1, got {}",
        betas,
    )
    check_that(
        lambda b: (b.size < 3) | (b[0] < 0.9) | np.any(np.diff(b) >= 0),
        "betas: expected the variances beta_i of the steps, got {}, which descend from "
        "almost 1 as alphas_cumprod does; its betas are "
        "1 - a / jnp.concatenate([jnp.ones(1), a[:-1]])",
        betas,
    )
    ends = betas == 1
    steps = jnp.where(ends, -jnp.inf, 0.5 * jnp.log1p(-jnp.where(ends, 0.0, betas)))
    starts = jnp.concatenate([jnp.zeros_like(steps[:1]), jnp.cumsum(steps)[:-1]])
    return bind(_from_betas, starts, steps)


def _from_betas(starts, steps, t):
    # The steps are kept, too, because a difference of two sums would lose digits of the slope.
    n = steps.size
    i = jnp.clip(jnp.floor(t * n).astype(int), 0, n - 1)
    part, step = t * n - i, steps[i]
    ends = jnp.isneginf(step)  # the signal ends at t = 1
    log_alpha = starts[i] + part * jnp.where(ends, 0.0, step)
    alpha = jnp.exp(log_alpha) * jnp.where(ends, 1 - part, 1.0)
    variance = jnp.where(ends, 1 - alpha**2, -jnp.expm1(2 * log_alpha))
    return alpha, safe_sqrt(variance)


def zero_terminal_snr(betas: Float[ArrayLike, " n"]) -> Float[Array, " n"]:
    """The betas of a chain whose signal ends at zero: the last one becomes 1.

    `alpha_i' = (alpha_i - alpha_n) alpha_1 / (alpha_1 - alpha_n)`, so that the first noise level
    stays and the last has no signal. At t = 1 the network must predict v, the velocity or x0.

    Args:
        betas: beta_1 ... beta_n, each in [0, 1), n at least 2.

    Returns:
        The new betas, for `from_betas`.

    Raises:
        ValueError: if betas is no vector of at least two numbers, a concrete value is not in
            [0, 1), or all after the first are 0.

    Reference: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.

    >>> betas = zero_terminal_snr(jnp.linspace(1e-4, 0.02, 1000))
    >>> round(float(betas[0]), 6), float(betas[-1]), float(from_betas(betas)(1.0)[0])
    (0.0001, 1.0, 0.0)
    """
    betas = as_float(betas, "betas")
    if betas.ndim != 1 or betas.size < 2:
        raise ValueError(f"betas: expected a vector of at least two numbers, got {betas.shape}")
    check_that(lambda b: (b >= 0) & (b < 1), "betas: expected values in [0, 1), got {}", betas)
    check_that(lambda b: b[1:].max() > 0, "betas: expected one above 0 behind the first", betas)
    logs = 0.5 * jnp.cumsum(jnp.log1p(-betas))
    # alpha_i - alpha_n and alpha_1 - alpha_n without cancellation, but for the factor alpha_n
    above = jnp.expm1(logs - logs[-1])
    alphas = jnp.exp(logs[0]) * above / above[0]
    ratios = alphas[1:] / alphas[:-1]
    return jnp.concatenate([betas[:1], 1 - ratios**2])


def to_betas(schedule: Schedule, n: int) -> Float[Array, " {n}"]:
    """The betas of a variance-preserving path as a chain at t = i / n: the inverse of `from_betas`.

    `beta_i = 1 - (alpha(t_i) / alpha(t_{i-1}))^2` (1.31).

    Args:
        schedule: a schedule with alpha^2 + sigma^2 = 1.
        n: the number of steps, at least 1.

    Returns:
        beta_1 ... beta_n.

    Raises:
        ValueError: if n < 1, or the schedule, where concrete, is not variance-preserving.

    >>> import jax.numpy as jnp
    >>> [round(float(beta), 5) for beta in to_betas(from_betas(jnp.array([0.1, 0.2, 0.3])), 3)]
    [0.1, 0.2, 0.3]
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 step, got {n}")
    alphas, sigmas = jax.vmap(schedule)(jnp.linspace(0.0, 1.0, n + 1))
    check_that(
        lambda a, s: abs(a * a + s * s - 1) < 1e-3,
        "schedule: expected a variance-preserving path, alpha^2 + sigma^2 = 1, got alpha = {} and "
        "sigma = {}; no other path is a DDPM chain",
        alphas,
        sigmas,
    )
    # log alpha from the smaller one of alpha and sigma, which is the more accurate
    quiet = sigmas < alphas
    log_alphas = jnp.where(
        quiet, 0.5 * jnp.log1p(-(jnp.where(quiet, sigmas, 0.0) ** 2)), jnp.log(alphas)
    )
    return -jnp.expm1(2 * jnp.diff(log_alphas))


def from_sde(f, g, nodes: int = 32) -> Schedule:
    """The path of the SDE `dx = f(t) x dt + g(t) dw`, by quadrature (1.4).

    `alpha = exp int_0^t f du`, `sigma^2 = int_0^t g(u)^2 exp(2 int_u^t f) du`. The Gauss-Legendre
    rules converge spectrally as long as f and g are smooth on [0, t]. f and g need not be
    integrable up to t = 1.

    Args:
        f: t -> f(t), the scalar linear drift, in units of 1/time.
        g: t -> g(t), the scalar diffusion coefficient, in units of the data per square root of
            time.
        nodes: the number of points of the rule in each of the two nested integrals.

    Returns:
        The schedule. Its `drift` is f, and its `diffusion_squared` is g^2.

    Raises:
        ValueError: if nodes < 1.

    >>> schedule = from_sde(lambda t: -0.05 - 9.95 * t, lambda t: (0.1 + 19.9 * t) ** 0.5)
    >>> float(schedule(1.0)[0]), float(linear_vp(0.1, 20.0)(1.0)[0])
    (0.0065..., 0.0065...)
    """
    if nodes < 1:
        raise ValueError(f"nodes: expected at least 1, got {nodes}")
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points, weights = 0.5 * (1 + points), 0.5 * weights  # on [0, 1]
    return bind(_from_sde, f, g, jnp.asarray(points), jnp.asarray(weights))


def _from_sde(f, g, points, weights, t):
    def integral(h, low, high):
        return (high - low) * jnp.sum(weights * jax.vmap(h)(low + (high - low) * points))

    variance = integral(lambda u: g(u) ** 2 * jnp.exp(2 * integral(f, u, t)), 0.0, t)
    return jnp.exp(integral(f, 0.0, t)), safe_sqrt(variance)
