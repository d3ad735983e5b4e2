"""The networks whose features are compared: any leading axes, dtypes, refusals. Their numbers are
in test_parity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.features import EfficientNetLite0, InceptionV3


@functools.cache
def network():
    """As if trained, at 32 pixels."""
    leaves, structure = jax.tree.flatten(
        nnx.eval_shape(lambda: EfficientNetLite0(32, rngs=nnx.Rngs(0)))
    )
    random = np.random.default_rng(0)

    def value(shape):
        *fan_in, _ = shape
        if not fan_in:
            return random.uniform(0.5, 1.5, shape)
        return random.normal(0, np.sqrt(2 / np.prod(fan_in)), shape)

    return jax.tree.unflatten(
        structure, [jnp.asarray(value(leaf.shape), jnp.float32) for leaf in leaves]
    )


@jax.jit
def call(network, x):
    return network(x)


def test_batched_is_mapped_is_one_by_one():
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(3, 1, 20, 24, 3)), jnp.float32)
    batched = call(network(), x)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda x: network()(x))))(x)
    single = [[call(network(), x[i, j]) for j in range(1)] for i in range(3)]
    # float32 rounds by 6e-8, some fifty layers in a row.
    np.testing.assert_allclose(mapped, batched, atol=1e-4)
    np.testing.assert_allclose(np.array(single), batched, atol=1e-4)
    assert batched.shape == (3, 1, 1280) and float(jnp.std(batched, axis=(0, 1)).mean()) > 0.05


KINDS = pytest.mark.parametrize("kind, features", [(InceptionV3, 2048), (EfficientNetLite0, 1280)])


@functools.cache
def structure(kind):
    return nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0)))


@KINDS
def test_dtypes_and_an_empty_batch(kind, features):
    for given, returned in (("bfloat16", "float32"), ("float64", "float64")):
        x = jax.ShapeDtypeStruct((0, 8, 9, 3), jnp.dtype(given))
        out = jax.eval_shape(call, structure(kind), x)
        assert (out.shape, out.dtype) == ((0, features), jnp.dtype(returned))


@KINDS
def test_refusals(kind, features):
    with pytest.raises(
        ValueError,
        match=r"x: expected images \(\.\.\., height, width, 3\), got shape \(2, 3, 8, 8\)",
    ):
        structure(kind)(jnp.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"got shape \(8, 3\)"):
        structure(kind)(jnp.zeros((8, 3)))
    with pytest.raises(
        ValueError, match=r"x: expected a floating-point dtype, with values in \[0, 1\], got uint8"
    ):
        structure(kind)(jnp.zeros((8, 8, 3), jnp.uint8))
    for value in (-1.0, 1.1, jnp.nan):
        with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\]"):
            structure(kind)(jnp.full((8, 8, 3), value))
