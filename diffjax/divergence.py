"""The divergence of a vector field, exact or by Hutchinson's trace estimator.

    div v = tr(dv/dx) = mean_z z^T (dv/dx) z,   E[z z^T] = I             (1.23)

The probes z are one array. `rademacher_probes` and `gaussian_probes` give unbiased estimates. The
scaled basis of `exact_probes`, `z_i = sqrt(d) e_i`, gives the trace itself by the same computation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import as_float
from ._varying import zeros_of

__all__ = ["divergence", "exact_probes", "gaussian_probes", "rademacher_probes"]


def rademacher_probes(
    key: PRNGKeyArray, x: Float[Array, "*x"], n: int = 1
) -> Float[Array, "{n} *x"]:
    """Draws n probes of independent random signs.

    For a symmetric Jacobian they have the minimum variance.

    Args:
        key: a PRNG key.
        x: the point; only its shape and dtype matter.
        n: the number of probes, at least 1. `functools.partial(rademacher_probes, n=8)` sets it.

    Returns:
        Probes, of shape (n, *x.shape).

    Reference: Hutchinson 1989 (Communications in Statistics 18); Grathwohl et al. 2019 (FFJORD,
    arXiv 1810.01367), section 3.1.

    >>> rademacher_probes(jax.random.key(0), jnp.zeros(3), n=2).shape
    (2, 3)
    """
    return jax.random.rademacher(key, (n, *x.shape), x.dtype)


def gaussian_probes(key: PRNGKeyArray, x: Float[Array, "*x"], n: int = 1) -> Float[Array, "{n} *x"]:
    """Draws n standard normal probes.

    Args:
        key: a PRNG key.
        x: the point; only its shape and dtype matter.
        n: the number of probes, at least 1.

    Returns:
        Probes, of shape (n, *x.shape).

    Reference: see `rademacher_probes`.

    >>> gaussian_probes(jax.random.key(0), jnp.zeros(3), n=2).shape
    (2, 3)
    """
    return jax.random.normal(key, (n, *x.shape), x.dtype)


def exact_probes(key: PRNGKeyArray | None, x: Float[Array, "*x"]) -> Float[Array, "d *x"]:
    """The d probes `sqrt(d) e_i`: the mean of `z^T J z` over them is the trace of J in (1.23).

    The trace takes d products and has no randomness.

    Args:
        key: unused.
        x: the point; only its shape and dtype matter.

    Returns:
        Probes, of shape (x.size, *x.shape).

    >>> exact_probes(None, jnp.zeros(4))[0]
    Array([2., 0., 0., 0.], dtype=float32)
    """
    return (jnp.sqrt(x.size) * jnp.eye(x.size)).astype(x.dtype).reshape(x.size, *x.shape)


def divergence(
    f: Callable[[Array], Array], x: Array, probes: Float[Array, "n *x"]
) -> tuple[Array, Float[Array, ""]]:
    """f(x), and the estimate `mean_z z^T (df/dx) z` of its divergence (1.23).

    It takes one evaluation and one product per probe.

    Args:
        f: a vector field, from the shape of x to the shape of x.
        x: one point, of any shape.
        probes: the probes z, of shape (n, *x.shape).

    Returns:
        `(f(x), divergence)`.

    Raises:
        ValueError: if the shape of the probes is not (n, *x.shape) with n >= 1, or f(x) has another
            shape than x.

    >>> f = lambda x: jnp.array([[1.0, 2.0], [3.0, 4.0]]) @ x
    >>> divergence(f, jnp.ones(2), exact_probes(None, jnp.ones(2)))[1].round(4)
    Array(5., dtype=float32)
    """
    y, products = probe_products(f, x, probes)
    return y, jnp.vdot(products, probes) / len(probes)


def probe_products(
    f: Callable[[Array], Array], x: Array, probes: Float[Array, "n *x"]
) -> tuple[Array, Array]:
    """f(x), and `z^T (df/dx)` for every probe, of shape (n, *x.shape)."""
    if probes.shape[1:] != x.shape or not probes.shape[0]:
        raise ValueError(
            f"probes: expected shape (n, {', '.join(map(str, x.shape))}), n >= 1, "
            f"got {probes.shape}"
        )
    x = as_float(x, "x")
    y, transposed = jax.vjp(lambda x: as_float(f(x), "network's output").astype(x.dtype), x)
    if y.shape != x.shape:
        raise ValueError(
            f"network: it returned {y.shape} for x of shape {x.shape}; expected the same shape"
        )
    probes = probes + zeros_of(y)[None]
    if len(probes) == 1:  # a mapped axis of length 1 would cost copies of every activation
        return y, transposed(probes[0])[0][None]
    return y, jax.vmap(lambda z: transposed(z)[0])(probes)
