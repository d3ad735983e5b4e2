r"""Couplings of data and prior: `(key, x0, x1) -> x1` gives each data point its partner.

Flow matching takes any joint distribution with the right marginals (1.17). The choice decides how
straight the paths are:

    independent    pi = p(x0) p(x1)
                   The paths cross, and the velocity is their average.
    optimal        argmin sum_i |x0_i - x1_pi(i)|^2
                   The exact transport of the minibatch, whose paths do not cross.
    entropic(eps)  argmin <pi, |x0 - x1|^2> + eps KL(pi || uniform)
                   Between the two, as in the Schrödinger bridge: a bridge of noise amplitude a
                   (`process.brownian_bridge`) has eps = 2 a^2.

The data stay in place, and only the prior's draws move. For a class-conditional network, couple
within each class, as `optimal(..., labels=...)` does. Over a mixed batch, the draws that one class
gets no longer have the prior's distribution, from which sampling starts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray
from scipy.optimize import linear_sum_assignment

from ._bind import bind
from ._checks import as_float, check_number, check_that
from ._varying import on_mesh, varying_carry
from .typing import Coupling

__all__ = ["Plan", "entropic", "independent", "optimal", "sinkhorn", "squared_distances"]


def independent(
    key: PRNGKeyArray | None, x0: Float[Array, "n *x"], x1: Float[Array, "n *x"]
) -> Float[Array, "n *x"]:
    """The independent coupling: x1 as it was drawn.

    Args:
        key: unused.
        x0: data, n points of any shape.
        x1: n independent draws of the prior.

    Returns:
        x1.

    Raises:
        ValueError: if the shapes differ or n = 0.

    Reference: Lipman et al. 2023 (arXiv 2210.02747), section 4; Liu et al. 2023 (arXiv 2209.03003),
    section 2.1.

    >>> independent(None, jnp.array([[0.0], [5.0]]), jnp.array([[4.0], [1.0]])).ravel()
    Array([4., 1.], dtype=float32)
    """
    _check_pairs(x0, x1)
    return x1


def optimal(
    key: PRNGKeyArray | None,
    x0: Float[Array, "n *x"],
    x1: Float[Array, "m *x"],
    *,
    labels: Integer[Array, " n"] | None = None,
) -> Float[Array, "n *x"]:
    """The optimal transport of a minibatch: permutes x1 to minimize `sum_i |x0_i - x1_i|^2`.

    SciPy's `linear_sum_assignment` runs on the host, in O(n^3). Under jit it is a callback, and
    under vmap the batches take turns. No gradient passes through the choice of the permutation.

    If m is not n, each data point still has the mass 1/n in the plan and each draw the mass 1/m.
    Both sets are copied until they have lcm(n, m) points, and the partner of x0_i is drawn from the
    partners of its copies. (The n cheapest of m > n draws would not have the prior's distribution.)
    This takes O(lcm(n, m)^3): make one number a multiple of the other.

    With `labels`, draws are permuted only within a class: x1_j is a draw for the class of x0_j. So
    the draws of each class keep the prior's distribution, from which sampling starts.

    Args:
        key: a PRNG key to draw the partners if m does not divide n; otherwise unused.
        x0: data, n points of any shape.
        x1: m independent draws of the prior.
        labels: the class of each data point, integers; with them m = n.

    Returns:
        The partner of each data point, of the shape of x0.

    Raises:
        ValueError: if the points differ in shape, n = 0 or m = 0, or concrete points are not
            finite; if m is not n and lcm(n, m) is above 8192, or a key is needed but missing; if
            the labels are not n integers, or m is not n with labels.

    Reference: Pooladian et al. 2023 (arXiv 2304.14772), section 3.1; Tong et al. 2024 (OT-CFM,
    arXiv 2302.00482), proposition 3.4; for unequal numbers Peyré and Cuturi 2019 (arXiv
    1803.00567), eq. 2.10 and 2.11.

    >>> x0, x1 = jnp.array([[0.0], [5.0], [6.0]]), jnp.array([[4.0], [1.0], [2.0]])
    >>> optimal(None, x0, x1).ravel()
    Array([1., 2., 4.], dtype=float32)
    >>> optimal(None, x0, x1, labels=jnp.array([0, 1, 1])).ravel()
    Array([4., 1., 2.], dtype=float32)
    >>> optimal(None, x0, x1[:1]).ravel()
    Array([4., 4., 4.], dtype=float32)
    """
    cost = squared_distances(x0, x1)
    check_that(np.isfinite, "x0, x1: expected finite numbers, got others among them", cost)
    n, m = cost.shape
    if labels is not None:
        labels = jnp.asarray(labels)
        if labels.shape != (n,) or not jnp.issubdtype(labels.dtype, jnp.integer) or m != n:
            raise ValueError(
                f"labels: expected {n} integers, the classes of x0, and as many draws x1, "
                f"got {labels.dtype}{list(labels.shape)} and {m} draws"
            )
    copies = math.lcm(n, m) // n
    if m != n and copies * n > _MAX_COPIES:
        raise ValueError(
            "x0, x1: expected numbers of points whose least common multiple is at most "
            f"{_MAX_COPIES}, got {n} and {m}; let one be a multiple of the other"
        )
    classes = jnp.zeros(n, jnp.int32) if labels is None else labels
    shape = jax.ShapeDtypeStruct((n, copies), np.int32)
    cost = jax.lax.stop_gradient(cost)
    partners = on_mesh(
        jax.pure_callback(_assign, shape, cost, classes, vmap_method="broadcast_all")
    )
    if copies == 1:
        return jnp.asarray(x1)[partners[:, 0]]
    if key is None:
        raise ValueError(
            f"key: expected a key to draw one of the {copies} partners of each data point, got None"
        )
    return jnp.asarray(x1)[partners[jnp.arange(n), jax.random.randint(key, (n,), 0, copies)]]


_MAX_COPIES = 8192  # the matrix of their costs takes half a GB


def _assign(cost, classes):
    """For each batch of costs, the columns of the copies of each row: (..., n, lcm(n, m) / n)."""
    cost, classes = np.asarray(cost), np.asarray(classes)
    if cost.ndim > 2:
        return np.stack([_assign(*batch) for batch in zip(cost, classes, strict=True)])
    n, m = cost.shape
    size = math.lcm(n, m)
    columns = np.arange(size) % m
    if np.isfinite(cost).all():  # traced points may not be finite, which their values show
        rows = np.arange(size) // (size // n)
        for label in np.unique(classes):
            members = np.flatnonzero(classes[rows] == label)
            chosen = linear_sum_assignment(cost[np.ix_(rows[members], columns[members])])[1]
            columns[members] = columns[members][chosen]
    return columns.reshape(n, -1).astype(np.int32)


def entropic(
    epsilon: float | Array, tolerance: float = 1e-3, max_iterations: int = 1000
) -> Coupling:
    """The entropic transport of a minibatch: draws the partner of x0_i by row i of Sinkhorn's plan.

    A draw of the prior may be used twice or not at all; on average all are used equally often,
    provided that Sinkhorn's iterations reached their tolerance. The numbers of data and draws may
    differ. A smaller epsilon needs more iterations. Under jit nothing is raised: check
    `sinkhorn(...).error`. A small epsilon approaches `optimal`, a large one `independent`.

    Args:
        epsilon: the strength of the entropy, above 0, in units of a squared distance: 2 a^2 for a
            bridge of amplitude a.
        tolerance: see `sinkhorn`.
        max_iterations: see `sinkhorn`.

    Returns:
        The coupling.

    Raises:
        ValueError: if a concrete epsilon is not positive. When the coupling is called, if the
            points differ in shape, there are none, or concrete points need more iterations.

    Reference: Tong et al. 2024 ([SF]2M, arXiv 2307.03672), section 3.2 and proposition 3.4.

    >>> x0, x1 = jnp.array([[0.0], [5.0]]), jnp.array([[4.0], [1.0]])
    >>> entropic(0.01)(jax.random.key(0), x0, x1).ravel()
    Array([1., 4.], dtype=float32)
    """
    check_number(epsilon, "epsilon", low=1e-38)
    return bind(_entropic, epsilon, tolerance, max_iterations)


def _entropic(epsilon, tolerance, max_iterations, key, x0, x1):
    plan = sinkhorn(squared_distances(x0, x1), epsilon, tolerance, max_iterations)
    message = (
        f"max_iterations: expected enough for an error of {tolerance} at epsilon={epsilon}, "
        f"got {max_iterations} and an error of {plan.error}"
    )
    check_that(lambda error: error <= tolerance, message, plan.error)
    return x1[jax.random.categorical(key, plan.log_plan)]


class Plan(NamedTuple):
    """An entropic transport plan between two uniform distributions."""

    log_plan: Float[Array, "n m"]
    """log pi: the rows sum to 1/n, up to rounding."""
    error: Float[Array, ""]
    """A bound on `sum_j |sum_i pi_ij - 1/m|`: at most the tolerance, unless iterations ran out."""
    iterations: Int[Array, ""]
    """The number of iterations."""


def sinkhorn(
    cost: Float[Array, "n m"],
    epsilon: float | Array,
    tolerance: float | Array = 1e-3,
    max_iterations: int | Array = 1000,
) -> Plan:
    """The entropic transport plan of uniform weights: `argmin_pi <pi, C> + eps KL(pi || 1/(n m))`.

    Sinkhorn's iterations run on the logarithms, `log pi = (f_i + g_j - C_ij) / eps`, so that
    nothing underflows for a small epsilon.

    Args:
        cost: C, of shape (n, m), such as `squared_distances(x0, x1)`.
        epsilon: the strength of the entropy, above 0, in units of the cost.
        tolerance: the summed error of the columns' sums at which to stop.
        max_iterations: the maximum number of iterations. They are a while loop, so there is no
            reverse-mode derivative.

    Returns:
        `Plan(log_plan, error, iterations)`.

    Raises:
        ValueError: if the cost is not a matrix with entries, a concrete cost is not finite, or a
            concrete epsilon is not positive.

    Reference: Cuturi 2013 (arXiv 1306.0895), algorithm 1; Peyré and Cuturi 2019 (arXiv 1803.00567),
    remark 4.23.

    >>> plan = jnp.exp(sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), 0.5).log_plan)
    >>> float(plan[0, 0]), 0.5 / (1 + jnp.e**-2)
    (0.440..., 0.440...)
    """
    cost = as_float(cost, "cost")
    if cost.ndim != 2 or not cost.size:
        raise ValueError(f"cost: expected a matrix (n, m) with n, m >= 1, got shape {cost.shape}")
    check_that(np.isfinite, "cost: expected finite numbers, got others among them", cost)
    check_number(epsilon, "epsilon", low=1e-38)
    return _sinkhorn(cost, epsilon, tolerance, max_iterations)


@jax.jit
def _sinkhorn(cost, epsilon, tolerance, max_iterations):
    (n, m), scores = cost.shape, -cost / epsilon

    # the error of the rows before f is updated; that of the columns after it is no larger
    def iterate(state):
        f, _, _, count = state
        g = -jax.nn.logsumexp(scores + f, 0, keepdims=True) - jnp.log(m)
        rows = jax.nn.logsumexp(scores + g, 1, keepdims=True)
        return -rows - jnp.log(n), g, jnp.sum(jnp.abs(jnp.exp(f + rows) - 1 / n)), count + 1

    def unfinished(state):
        *_, error, count = state
        return (error > tolerance) & (count < max_iterations)

    zeros = jnp.zeros((n, 1), cost.dtype), jnp.zeros((1, m), cost.dtype)
    start = (*zeros, jnp.asarray(jnp.inf, cost.dtype), jnp.zeros((), int))
    f, g, error, count = jax.lax.while_loop(unfinished, iterate, varying_carry(iterate, start))
    return Plan(scores + f + g, error, count)


def squared_distances(x0: Float[Array, "n *x"], x1: Float[Array, "m *x"]) -> Float[Array, "n m"]:
    """`|x0_i - x1_j|^2`, the cost of every pair.

    Args:
        x0: n points of any shape.
        x1: m points of that shape.

    Returns:
        The costs, of shape (n, m).

    Raises:
        ValueError: if the points differ in shape or there are none.

    >>> squared_distances(jnp.array([[0.0], [5.0]]), jnp.array([[4.0], [1.0]]))
    Array([[16.,  1.],
           [ 1., 16.]], dtype=float32)
    """
    if (
        jnp.ndim(x0) < 1
        or jnp.ndim(x1) < 1
        or jnp.shape(x0)[1:] != jnp.shape(x1)[1:]
        or not jnp.size(x0) * jnp.size(x1)
    ):
        raise ValueError(
            "x0, x1: expected data points and draws of the prior of one shape, (n, ...) and "
            f"(m, ...), n, m >= 1, got {jnp.shape(x0)} and {jnp.shape(x1)}"
        )
    x0, x1 = (as_float(x, name).reshape(len(x), -1) for name, x in (("x0", x0), ("x1", x1)))
    return _differences(x0, x1)


@jax.jit
def _differences(x0, x1):
    # by differences, because a matrix product is less exact; by rows, because all are n m d numbers
    return jax.lax.map(jax.checkpoint(lambda a: jnp.sum((a[None] - x1) ** 2, 1)), x0)


def _check_pairs(x0, x1):
    if jnp.shape(x0) != jnp.shape(x1) or not jnp.size(x0) or jnp.ndim(x0) < 1:
        raise ValueError(
            "x0, x1: expected as many data points as draws of the prior, of one shape (n, ...), "
            f"n >= 1, got {jnp.shape(x0)} and {jnp.shape(x1)}"
        )
