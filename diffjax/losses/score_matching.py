"""Score matching to a known score, or from samples of p_t alone.

    explicit_score_matching     |s_theta(x, t) - score(x, t)|^2     (1.13)
    implicit_score_matching     |s_theta|^2 + 2 div s_theta         Hyvärinen
    sliced_score_matching       (z . s_theta)^2 + 2 z^T J z         Song et al.

Their expectations differ only by constants: the Fisher information of p_t and, for denoising score
matching (`denoising` with SCORE), another one. So all have the same gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._calls import call_network
from ..divergence import divergence
from ..typing import Network, Time
from ._errors import mean_squared_error

__all__ = ["explicit_score_matching", "implicit_score_matching", "sliced_score_matching"]


def explicit_score_matching(
    network: Network, score: Callable[[Array, Time], Array], x: Array, t: Time
) -> Float[Array, ""]:
    """The loss of one point for a known score, `|s_theta(x, t) - score(x, t)|^2` (1.13).

    It is for distillation, or where a closed form exists (`exact`), and to test the other losses.

    Args:
        network: predicts the score.
        score: `(x, t) -> grad log p_t(x)`, for instance `bind(score, denoise, schedule)`.
        x: one sample of p_t, of any shape.
        t: its time, a scalar.

    Returns:
        The loss, a mean over the elements of x (`2 / d` times the integrand of (1.13)).

    Raises:
        ValueError: if the network's output has another shape than x.

    Reference: Hyvärinen 2005, eq. 2; (1.13).

    >>> explicit_score_matching(lambda x, t: -2 * x, lambda x, t: -x, jnp.ones(3), 0.5)
    Array(1., dtype=float32)
    """
    return mean_squared_error(network, score(x, t), x, t)


def implicit_score_matching(
    network: Network, x: Array, t: Time, probes: Float[Array, "n *x"]
) -> Float[Array, ""]:
    """Score matching from samples alone: `(|s_theta|^2 + 2 div s_theta) / d`.

    Its mean is that of `explicit_score_matching` minus the constant `mean |grad log p|^2 / d`. With
    `exact_probes` it is Hyvärinen's loss, which takes d products. With `rademacher_probes` or
    `gaussian_probes` it is sliced score matching with variance reduction.

    Args:
        network: predicts the score.
        x: one sample of p_t, of any shape.
        t: its time, a scalar.
        probes: of shape (n, *x.shape), such as `divergence.exact_probes(key, x)`.

    Returns:
        The loss.

    Raises:
        ValueError: if the network's output or a probe has another shape than x.

    Reference: Hyvärinen 2005, theorem 1; Song et al. 2019 (SSM-VR, arXiv 1905.07088).

    >>> from diffjax.divergence import exact_probes
    >>> x = jnp.array([2.0, 1.0])
    >>> probes = exact_probes(None, x)
    >>> implicit_score_matching(lambda x, t: -x, x, 0.5, probes).round(4)  # (5 - 2 * 2) / 2
    Array(0.5, dtype=float32)
    """
    score, trace = divergence(lambda x: call_network(network, x, t), x, probes)
    return (jnp.sum(score**2) + 2 * trace) / x.size


def sliced_score_matching(
    network: Network, x: Array, t: Time, probes: Float[Array, "n *x"]
) -> Float[Array, ""]:
    """Score matching along random directions z: `((z . s_theta)^2 + 2 z^T (ds_theta/dx) z) / d`.

    The loss is the mean over the probes z. Its expectation is that of `implicit_score_matching`,
    which computes the first term exactly and has less variance.

    Args:
        network: predicts the score.
        x: one sample of p_t, of any shape.
        t: its time, a scalar.
        probes: the z, of shape (n, *x.shape), with `E z z^T = 1`, such as
            `divergence.rademacher_probes(key, x)`.

    Returns:
        The loss.

    Raises:
        ValueError: if the network's output or a probe has another shape than x.

    Reference: Song et al. 2019 (arXiv 1905.07088), eq. 7.

    >>> x = jnp.array([2.0, 1.0])
    >>> sliced_score_matching(lambda x, t: -x, x, 0.5, jnp.array([[1.0, -1.0]]))  # (1 - 2 * 2) / 2
    Array(-1.5, dtype=float32)
    """
    score, trace = divergence(lambda x: call_network(network, x, t), x, probes)
    squares = jax.vmap(lambda z: jnp.vdot(z, score) ** 2)(probes)
    return (jnp.mean(squares) + 2 * trace) / x.size
