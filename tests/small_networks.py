"""Small networks of each kind with random parameters, and inputs for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.networks import MLP, DiT, UNet

SHAPES = {MLP: (5,), UNet: (8, 4, 2), DiT: (4, 8, 2)}
CLASSES = 3


def build(kind, num_classes=CLASSES, dtype=None, dropout=0.0):
    rngs = nnx.Rngs(0)
    settings = {"width": 8, "num_classes": num_classes, "dtype": dtype, "dropout": dropout}
    if kind is MLP:
        return MLP(5, depth=2, **settings, rngs=rngs)
    if kind is UNet:
        # the middle has attention
        return UNet(SHAPES[UNet], multipliers=(1, 2), blocks=1, **settings, rngs=rngs)
    return DiT(SHAPES[DiT], depth=2, heads=2, **settings, rngs=rngs)


@functools.cache
def trained(kind, dropout=0.0):
    """As if trained: no layer is zero."""
    leaves, structure = jax.tree.flatten(nnx.eval_shape(lambda: build(kind, dropout=dropout)))
    random = np.random.default_rng(0)
    values = [
        random.normal(0, 1 / np.sqrt(leaf.size // leaf.shape[-1] + 1), leaf.shape)
        for leaf in leaves
    ]
    return jax.tree.unflatten(
        structure,
        [jnp.asarray(value, leaf.dtype) for value, leaf in zip(values, leaves, strict=True)],
    )


def random_like(network, seed=0):
    """As if trained: no layer is zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), network
    )


@jax.jit
def call(network, x, t, cond=None):
    return network(x, t, cond)


def inputs(kind):
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(2, 3, *SHAPES[kind])))
    return x, jnp.asarray(random.uniform(size=(2, 3))), jnp.array([[0, 1, 2], [3, 2, 1]])
