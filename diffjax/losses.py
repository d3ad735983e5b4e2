r"""Training losses, each for one example.

    explicit_score_matching     |s_theta(x, t) - score(x, t)|^2     (1.13)
    implicit_score_matching     |s_theta|^2 + 2 div s_theta         Hyvarinen; of random probes, sliced
    sliced_score_matching       (z . s_theta)^2 + 2 z^T J z         Song et al.
    denoising                   w(t) |out - target|^2               (1.14), (1.15)
    flow_matching               |v_theta(x_t, t) - v(x_t, t)|^2     (1.16)
    conditional_flow_matching   |v_theta(x_t, t) - (x1 - x0)|^2     (1.17)

`vmap` over keys, examples and times (`times`), and average. A squared error is the mean over the elements of x, so that a
loss does not grow with the dimension. The weights w are in `weightings`. The first four differ by constants on average, if
what is denoised is the score: they have the same gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._math import as_float
from .likelihood import divergence
from .parametrizations import Parametrization, output, target
from .process import perturb
from .typing import Network, Schedule, Time
from .weightings import Weighting, unweighted

__all__ = [
    "conditional_flow_matching",
    "denoising",
    "explicit_score_matching",
    "flow_matching",
    "implicit_score_matching",
    "sliced_score_matching",
]


def explicit_score_matching(
    network: Network, score: Callable[[Array, Time], Array], x: Array, t: Time
) -> Float[Array, ""]:
    """The score-matching loss of one point against a score that is known: `|s_theta(x, t) - score(x, t)|^2` (1.13).

    For distillation, or where a closed form exists (`exact`): the oracle of the other three.

    Args:
        network: predicts the score.
        score: `(x, t) -> grad log p_t(x)`, for instance `bind(score, denoise, schedule)`.
        x: one sample of p_t, of any shape.
        t: its time, a scalar.

    Returns:
        The loss, a mean over the elements of x (`2 / d` times the integrand of (1.13)).

    Raises:
        ValueError: if the network's output has another shape than x.

    Reference: Hyvarinen 2005, eq. 2; (1.13).

    >>> explicit_score_matching(lambda x, t: -2 * x, lambda x, t: -x, jnp.ones(3), 0.5)
    Array(1., dtype=float32)
    """
    return _mean_squared_error(network, score(x, t), x, t)


def implicit_score_matching(network: Network, x: Array, t: Time, probes: Float[Array, "n *x"]) -> Float[Array, ""]:
    """Score matching from samples alone: `(|s_theta|^2 + 2 div s_theta) / d`.

    On average `explicit_score_matching` less `mean |grad log p|^2 / d`, which no parameter moves. With `exact_probes` it is
    Hyvarinen's, of d products; with `rademacher_probes` or `gaussian_probes` sliced score matching with variance reduction.

    Args:
        network: predicts the score.
        x: one sample of p_t, of any shape.
        t: its time, a scalar.
        probes: of shape (n, *x.shape), as of `likelihood.exact_probes(key, x)`.

    Returns:
        The loss.

    Raises:
        ValueError: if the network's output or a probe has another shape than x.

    Reference: Hyvarinen 2005, theorem 1; Song et al. 2019 (arXiv 1905.07088), eq. 8.

    >>> from diffjax.likelihood import exact_probes
    >>> x = jnp.array([2.0, 1.0])
    >>> implicit_score_matching(lambda x, t: -x, x, 0.5, exact_probes(None, x)).round(4)  # (5 - 2 * 2) / 2
    Array(0.5, dtype=float32)
    """
    _check_shape(jax.eval_shape(network, x, t), x)
    score, trace = divergence(lambda x: network(x, t), x, probes)
    return (jnp.sum(score**2) + 2 * trace) / x.size


def sliced_score_matching(network: Network, x: Array, t: Time, probes: Float[Array, "n *x"]) -> Float[Array, ""]:
    """Score matching along random directions z: the mean over z of `((z . s_theta)^2 + 2 z^T (ds_theta/dx) z) / d`.

    On average `implicit_score_matching`, which needs no slice of the first term and has less variance.

    Args:
        network: predicts the score.
        x: one sample of p_t, of any shape.
        t: its time, a scalar.
        probes: the z, of shape (n, *x.shape), with `E z z^T = 1`, as of `likelihood.rademacher_probes(key, x)`.

    Returns:
        The loss.

    Raises:
        ValueError: if the network's output or a probe has another shape than x.

    Reference: Song et al. 2019 (arXiv 1905.07088), eq. 7.

    >>> from diffjax.likelihood import exact_probes
    >>> x = jnp.array([2.0, 1.0])
    >>> sliced_score_matching(lambda x, t: -x, x, 0.5, jnp.array([[1.0, -1.0]]))  # (1 - 2 * 2) / 2
    Array(-1.5, dtype=float32)
    """
    _check_shape(jax.eval_shape(network, x, t), x)
    score, trace = divergence(lambda x: network(x, t), x, probes)
    return (jnp.mean(jax.vmap(lambda z: jnp.vdot(z, score) ** 2)(probes)) + 2 * trace) / x.size


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
    _check_shape(out, x)
    return jnp.mean((out - goal) ** 2)


def _check_shape(out, x):
    if jnp.shape(out) != jnp.shape(x):
        raise ValueError(
            f"network: it returned {jnp.shape(out)} for x of shape {jnp.shape(x)}; expected the same shape"
        )
