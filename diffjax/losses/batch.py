"""The loss over a batch, from the loss of one example."""

import functools
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
        times: `(key, n) -> (times, weights)`, from `diffjax.times`. Set other ends or a schedule
            with `lambda key, n: log_snr_times(key, n, schedule)`.
        drop: the probability of dropping a condition, in [0, 1]; None drops none. Ho and Salimans
            use 0.1 to 0.2.
        null: the replacement of a dropped condition: a pytree like the condition of one example,
            such as the label `network.null`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: if there are no examples, leading sizes differ, a concrete `drop` is outside
            [0, 1], or only one of `drop` and `null` is given, or they come without `cond`.

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
        given = {"drop": drop, "null": null, "cond": cond}
        names = ", ".join(name for name, value in given.items() if value is not None)
        raise ValueError(f"drop, null: expected both or none, and cond with both, got {names}")
    ((n,),) = sizes
    time_key, drop_key, loss_key = jax.random.split(key, 3)
    ts, weights = times(time_key, n)
    if drop is not None:
        check_number(drop, "drop", 0, 1)
        dropped = jax.random.bernoulli(drop_key, drop, (n,))
        cond = jax.tree.map(functools.partial(_replace, dropped), cond, null)
    conditions = () if cond is None else (cond,)
    losses = jax.vmap(loss)(jax.random.split(loss_key, n), examples, ts, *conditions)
    return jnp.mean(weights * losses)


def _replace(dropped, cond, null):
    dropped = dropped.reshape(-1, *[1] * (jnp.ndim(cond) - 1))
    return jnp.where(dropped, jnp.asarray(null)[None], cond)
