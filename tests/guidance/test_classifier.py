"""Guidance by a classifier and by an energy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import schedules
from diffjax.exact import gaussian
from diffjax.guidance import classifier, energy
from diffjax.parametrizations import score

SCHEDULE = schedules.linear()


def prior():
    return gaussian(jnp.zeros(2), jnp.eye(2), SCHEDULE)


def log_prob(x, t):
    return -0.5 * jnp.sum((x - 1.0) ** 2, -1) * (1 + t)


@pytest.mark.parametrize("t", [0.2, 0.9])
def test_the_score_grows_by_the_scaled_gradient(t):
    x = jnp.array([0.3, -0.7])
    guided = classifier(prior(), log_prob, SCHEDULE, 2.5, event_ndim=1)
    expected = score(prior(), SCHEDULE, x, t) - 2.5 * (x - 1) * (1 + t)
    np.testing.assert_allclose(score(guided, SCHEDULE, x, t), expected, rtol=1e-12)
    x0, eps = guided(x, t)
    np.testing.assert_allclose((1 - t) * x0 + t * eps, x, rtol=1e-12)


def test_a_batch_is_guided_sample_by_sample():
    xs = jnp.arange(6.0).reshape(3, 2)
    guided = classifier(prior(), log_prob, SCHEDULE, lambda t: 1 + t, event_ndim=1)
    each = jax.vmap(guided, in_axes=(0, None))(xs, 0.5)
    chex.assert_trees_all_close(guided(xs, 0.5), each, rtol=1e-14)


def test_an_energy_is_a_negative_log_probability():
    x = jnp.array([0.3, -0.7])
    by_energy = energy(prior(), lambda x, t: -log_prob(x, t), SCHEDULE, 2.0, event_ndim=1)
    by_log_prob = classifier(prior(), log_prob, SCHEDULE, 2.0, event_ndim=1)
    chex.assert_trees_all_equal(by_energy(x, 0.5), by_log_prob(x, 0.5))


# a vector of logits, logits of a batch, one number for a batch
@pytest.mark.parametrize("shape", [(2,), (10,), (3, 10), (3, 2), None], ids=str)
def test_a_classifier_of_a_wrong_shape_is_an_error(shape):
    def values(x, t):
        return x.sum() if shape is None else jnp.zeros(shape) * x.sum()

    xs = jnp.zeros(2) if shape in ((2,), (10,)) else jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"log_prob: expected one number for each sample.*label"):
        classifier(prior(), values, SCHEDULE, event_ndim=1)(xs, 0.5)
    with pytest.raises(ValueError, match=r"energy: expected one number for each sample.*sum over"):
        energy(prior(), values, SCHEDULE, event_ndim=1)(xs, 0.5)


def test_pure_noise_names_alpha():
    guided = classifier(prior(), log_prob, SCHEDULE, event_ndim=1)
    with pytest.raises(ValueError, match=r"t: expected a time with alpha > 0, got t=1.0.*below"):
        guided(jnp.zeros(2), 1.0)
    assert jnp.isnan(jax.jit(guided)(jnp.ones(2), 1.0).x0).all()
