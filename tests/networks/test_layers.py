"""Layers: dropout, attention and time features against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
from flax import nnx
from small_networks import random_like

from diffjax.networks import Attention, _layers
from diffjax.networks._layers import time_features


def test_dropout_has_the_expectation_of_its_input_and_the_variance_of_a_mask():
    x, rate = jnp.full(200_000, 3.0), 0.2
    out = _layers.dropout(x, rate, jax.random.key(0))
    # Each entry is x / (1 - r) with probability 1 - r: mean x, variance x^2 r / (1 - r).
    variance = 9 * rate / (1 - rate)
    assert abs(float(out.mean()) - 3) < 4 * np.sqrt(variance / x.size)
    np.testing.assert_allclose(float(out.var()), variance, rtol=0.02)
    np.testing.assert_allclose(np.unique(out), [0.0, 3 / 0.8])


@pytest.mark.parametrize("context", [None, 5])
def test_attention_is_that_of_the_paper(context):
    """`concat_h softmax(q_h k_h^T / sqrt(d_h)) v_h W + b` (Vaswani et al. 2017, section 3.2.2),
    head by head.
    """
    layer = random_like(nnx.eval_shape(lambda: Attention(8, 2, context=context, rngs=nnx.Rngs(0))))
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), layer)
    random = np.random.default_rng(0)
    x, other = random.normal(size=(3, 4, 8)), random.normal(size=(3, 7, 5))
    weights = {
        name: (np.asarray(linear.kernel[...]), np.asarray(linear.bias[...]))
        for name, linear in vars(layer).items()
        if isinstance(linear, nnx.Linear)
    }
    if context is None:
        parts = np.split(x @ weights["qkv"][0] + weights["qkv"][1], 3, axis=-1)
    else:
        projected = other @ weights["kv"][0] + weights["kv"][1]
        parts = [x @ weights["q"][0] + weights["q"][1], *np.split(projected, 2, axis=-1)]
    heads = []
    for q, k, v in zip(*(np.split(part, 2, axis=-1) for part in parts), strict=True):
        scores = np.exp(q @ np.swapaxes(k, 1, 2) / 2.0)
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    expected = np.concatenate(heads, -1) @ weights["out"][0] + weights["out"][1]
    out = layer(jnp.asarray(x)) if context is None else layer(jnp.asarray(x), jnp.asarray(other))
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="context: expected"):
        layer(jnp.asarray(x), jnp.asarray(other)) if context is None else layer(jnp.asarray(x))
    with pytest.raises(ValueError, match=r"x: expected shape \(n, tokens, 8\), got \(4, 8\)"):
        layer(jnp.asarray(x[0]), None if context is None else jnp.asarray(other))
    if context is not None:
        with pytest.raises(
            ValueError, match=r"context: expected shape \(n, tokens, 5\), got \(3, 4, 8\)"
        ):
            layer(jnp.asarray(x), jnp.asarray(x))


def test_time_features_are_smooth_and_tell_times_apart():
    t = jnp.linspace(-3.0, 3.0, 601)
    features, slope = jax.jit(
        lambda t: jax.jvp(lambda t: time_features(t, 32), (t,), (jnp.ones_like(t),))
    )(t)
    assert scipy.spatial.distance.pdist(features).min() > 0.5  # neighbours are 0.01 apart
    assert np.abs(slope).max() <= 256
