"""The loss over a batch: keys, times, weights, and conditions that drop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.losses import over_batch


def test_the_loss_over_a_batch_is_the_weighted_mean():
    """With a loss that returns its arguments: times and weights of the batch as a whole, examples
    and conditions.
    """
    xs, labels = jnp.arange(6.0), jnp.array([3, 1, 4, 1, 5, 9])
    times = lambda key, n: (jnp.arange(n) / 10, 1.0 + jnp.arange(n))  # noqa: E731
    loss = lambda key, x, t, label: 100 * x + t + 0.001 * label  # noqa: E731
    expected = np.mean(
        (1 + np.arange(6)) * (100 * np.arange(6) + np.arange(6) / 10 + 0.001 * np.asarray(labels))
    )
    np.testing.assert_allclose(
        over_batch(jax.random.key(0), loss, xs, labels, times=times), expected, rtol=1e-12
    )
    pairs = over_batch(
        jax.random.key(0), lambda key, pair, t: pair[0] * pair[1], (xs, xs), times=times
    )
    np.testing.assert_allclose(pairs, np.mean((1 + np.arange(6)) * np.arange(6) ** 2), rtol=1e-12)


def test_each_example_has_a_key_and_conditions_drop_on_their_own():
    n, rate = 4000, 0.2
    noise = lambda key, x, t: jax.random.normal(key) ** 2  # noqa: E731
    # chi-squared: mean 1, variance 2 / n of independent keys
    assert abs(over_batch(jax.random.key(0), noise, jnp.zeros(n)) - 1) < 5 * np.sqrt(2 / n)
    cond = {"label": jnp.arange(n) % 3, "text": jnp.ones((n, 2))}
    null = {"label": 3, "text": jnp.zeros(2)}
    both = lambda key, x, t, c: jnp.where(
        c["label"] == 3, 1.0 - c["text"].sum(), c["text"].sum() - 2
    )  # noqa: E731
    # the leaves of a condition drop together: a kept one counts 0, a dropped one 1
    for drop in (rate, jnp.asarray(rate)):
        value = over_batch(jax.random.key(1), both, jnp.zeros(n), cond, drop=drop, null=null)
        assert abs(value - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
    always = over_batch(jax.random.key(1), both, jnp.zeros(n), cond, drop=1.0, null=null)
    assert always == 1


def test_what_over_batch_refuses():
    loss = lambda key, x, t, *c: x  # noqa: E731
    for arguments, message in (
        ((jnp.zeros(3), jnp.zeros(2)), r"examples, cond: expected arrays of one leading size"),
        ((jnp.zeros(0),), r"at least 1, got \[\(0,\)\]"),
        ((jnp.zeros(()),), r"at least 1, got \[\(\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            over_batch(jax.random.key(0), loss, *arguments)
    with pytest.raises(ValueError, match="drop, null: expected both or none.*got drop, cond"):
        over_batch(jax.random.key(0), loss, jnp.zeros(3), jnp.zeros(3), drop=0.1)
    with pytest.raises(ValueError, match=r"drop: expected a finite number in \[0, 1\], got 1.5"):
        over_batch(jax.random.key(0), loss, jnp.zeros(3), jnp.zeros(3), drop=1.5, null=1)
