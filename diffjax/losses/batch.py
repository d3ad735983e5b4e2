"""The loss over a batch, of the loss of one example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_number
from ..times import stratified_times
from ..typing import Times

__all__ = ["over_batch"]


def over_batch(
    key: PRNGKeyArray,
    loss: Callable[..., Float[Array, ""]],
    examples: Any,
    cond: Any = None,
    *,
    times: Times = stratified_times,
    drop: float | Array | None = None,
    null: Any = None,
) -> Float[Array, ""]:
    """The weighted mean of a loss over a batch, `1/n sum_i w_i loss(key_i, x_i, t_i, cond_i)`.

    The times and their weights are drawn for the batch as a whole; each example has its own key.
    For classifier-free guidance, each condition is replaced by `null` with the probability `drop`.

    Args:
        key: a PRNG key.
        loss: the loss of one example, `loss(key, x, t)`, or `loss(key, x, t, cond)` if there are
            conditions.
        examples: a pytree of arrays with the leading size n: the data x0, or the pairs (x0, x1) of
            a coupling.
        cond: a pytree of arrays with the leading size n: the conditions, such as labels. None:
            there are none.
        times: `(key, n) -> (times, weights)`, of `diffjax.times`; bind other ends or a schedule
            with `lambda key, n: log_snr_times(key, n, schedule)`.
        drop: the probability with which a condition is dropped, in [0, 1]; None: no condition is.
            Ho and Salimans use 0.1 to 0.2.
        null: what takes its place: a pytree as one example's condition, such as the label
            `network.null`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: if there are no examples, leading sizes differ, a concrete `drop` is outside [0,
            1], or it comes without `null` and `cond`.

    Reference: Ho and Salimans 2022 (arXiv 2207.12598), algorithm 1, for dropped conditions.

    >>> def loss(key, x0, t, label):
    ...     return jnp.where(label == 10, 0.0, 1.0)
    >>> labels = jnp.arange(1000) % 10
    >>> value = over_batch(jax.random.key(0), loss, jnp.zeros((1000, 2)), labels, drop=0.2, null=10)
    >>> bool(abs(value - 0.8) < 0.05)
    True
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((examples, cond))}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            f"examples, cond: expected arrays of one leading size, at least 1, got {sorted(sizes)}"
        )
    if (drop is None) != (null is None) or (drop is not None and cond is None):
        raise ValueError(
            "drop, null: expected both or none, and cond beside them: null takes the place of a condition"
        )
    ((n,),) = sizes
    time_key, drop_key, loss_key = jax.random.split(key, 3)
    ts, weights = times(time_key, n)
    if drop is not None:
        check_number(drop, "drop", 0, 1)
        gone = jax.random.bernoulli(drop_key, drop, (n,))
        replace = lambda c, other: jnp.where(
            gone.reshape(-1, *[1] * (jnp.ndim(c) - 1)), jnp.asarray(other)[None], c
        )  # noqa: E731
        cond = jax.tree.map(replace, cond, null)
    conditions = () if cond is None else (cond,)
    return jnp.mean(
        weights * jax.vmap(loss)(jax.random.split(loss_key, n), examples, ts, *conditions)
    )
