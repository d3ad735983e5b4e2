"""The loss of a classifier of noisy data, for classifier guidance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import as_float, check_that
from ..process import perturb
from ..typing import Schedule, Time

__all__ = ["noisy_classification"]


def noisy_classification(
    key: PRNGKeyArray,
    classify: Callable[..., Array],
    schedule: Schedule,
    x0: Array,
    t: Time,
    label: Any,
) -> Float[Array, ""]:
    """The cross-entropy of a classifier of noisy data, `-log p(label | x_t)`, for one example.

    Its minimum over all functions is the classifier of x_t that classifier guidance needs:
    `lambda x, t: jax.nn.log_softmax(classify(x, t))[..., label]` is its log probability.

    Args:
        key: draws the noise of x_t.
        classify: `classify(x, t) -> logits` of one example, of shape (classes,).
        schedule: the path of the denoiser to be guided.
        x0: one example, of any shape.
        t: its time, a scalar.
        label: its class, an integer.

    Returns:
        The loss in nats, a scalar.

    Raises:
        ValueError: if the logits are not a vector, or the label is not one integer, or a concrete
            one is not a class. A traced one that is not gives NaN.

    Reference: Dhariwal and Nichol 2021 (ADM, arXiv 2105.05233); (1.40).

    >>> classify = lambda x, t: jnp.zeros(10)
    >>> loss = noisy_classification(jax.random.key(0), classify, linear(), jnp.ones(2), 0.5, 3)
    >>> round(float(loss), 3)  # log 10
    2.303
    """
    x0 = as_float(x0, "x0")
    x = perturb(schedule, x0, jax.random.normal(key, x0.shape, x0.dtype), t)
    logits = classify(x, t)
    if jnp.ndim(logits) != 1:
        raise ValueError(
            f"classify: expected logits of shape (classes,) for one example of shape {x.shape}, "
            f"got shape {jnp.shape(logits)}"
        )
    dtype = jnp.result_type(label)
    if jnp.shape(label) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"label: expected one integer, got {dtype} of shape {jnp.shape(label)}; "
            "over_batch gives each example its own"
        )
    check_that(
        lambda label: (label >= 0) & (label < logits.size),
        f"label: expected a class from 0 to {logits.size - 1}, got {{}}",
        label,
    )
    # a label outside, where it is traced, gives NaN
    log_probs = jax.nn.log_softmax(as_float(logits, "logits"))
    return -log_probs.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
