"""The loss of a classifier of noisy data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import losses, schedules
from diffjax.losses import noisy_classification

SCHEDULE = schedules.linear()


def loss_of(*args):
    return noisy_classification(jax.random.key(0), *args)


def test_the_loss_is_the_cross_entropy_at_x_t():
    x0, logits = jnp.array([1.0, -2.0]), jnp.array([[0.3, -1.0], [0.2, 0.5], [1.0, 0.0]])
    x = 0.6 * x0 + 0.4 * jax.random.normal(jax.random.key(0), (2,))
    scores = np.exp(np.asarray(logits @ x) + 0.4)
    loss = loss_of(lambda x, t: logits @ x + t, SCHEDULE, x0, 0.4, 2)
    np.testing.assert_allclose(loss, -np.log(scores[2] / scores.sum()), rtol=1e-12)


def test_its_minimum_is_the_posterior_of_the_class():
    # classes N(1, v) and N(-1, v): log p(1 | x_t) / p(0 | x_t) = 2 alpha x / (alpha^2 v + sigma^2)
    v, t = 0.25, 0.5
    labels = jax.random.bernoulli(jax.random.key(0), 0.5, (4000,)).astype(int)
    x0 = (2.0 * labels - 1)[:, None] + np.sqrt(v) * jax.random.normal(jax.random.key(1), (4000, 1))

    def mean_loss(slope):
        def one(key, x0, t, label):
            return noisy_classification(
                key, lambda x, t: jnp.concatenate([0 * x, slope * x]), SCHEDULE, x0, t, label
            )

        def fixed(key, n):
            return (jnp.full(n, t), jnp.ones(n))

        return losses.over_batch(jax.random.key(0), one, x0, labels, times=fixed)

    exact = 2 * (1 - t) / ((1 - t) ** 2 * v + t**2)
    slope, curvature = jax.grad(mean_loss)(exact), jax.grad(jax.grad(mean_loss))(exact)
    # at the minimum over all data the gradients of the examples have variance = curvature
    assert abs(slope) < 4 * np.sqrt(curvature / 4000)
    assert abs(jax.grad(mean_loss)(0.8 * exact)) > 4 * np.sqrt(curvature / 4000)


def test_labels_and_logits_are_checked():
    def classify(x, t):
        return jnp.zeros(3) * x[0]

    for label in (-1, 3):
        with pytest.raises(ValueError, match=r"label: expected a class from 0 to 2, got"):
            loss_of(classify, SCHEDULE, jnp.ones(2), 0.5, label)
        loss = jax.jit(lambda label: loss_of(classify, SCHEDULE, jnp.ones(2), 0.5, label))(label)
        assert jnp.isnan(loss)
    for label in (True, jnp.arange(2), jnp.array([0, 0, 1]), 1.0):
        with pytest.raises(ValueError, match="label: expected one integer, got"):
            loss_of(classify, SCHEDULE, jnp.ones(2), 0.5, label)
    with pytest.raises(ValueError, match=r"classify: expected logits of shape \(classes,\)"):
        loss_of(lambda x, t: jnp.zeros((1, 3)), SCHEDULE, jnp.ones(2), 0.5, 0)
