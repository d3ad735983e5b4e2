"""The U-Net: any size and rank, and attention where it is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_networks import random_like

import diffjax as dj
from diffjax.networks import UNet


@pytest.mark.parametrize(
    "shape", [(25, 25, 1), (28, 28, 1), (5, 12, 2), (13, 3), (3, 5, 6, 2)], ids=str
)
def test_a_u_net_of_any_size(shape):
    make = functools.partial(
        UNet, shape, width=4, multipliers=(1, 1, 2, 1), blocks=1, attention=(shape[0],)
    )
    network = random_like(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    last = (-1,) * len(shape)
    x = np.random.default_rng(0).normal(size=(3, *shape))
    x[1] = x[2]
    x[1][last] += 1e-4
    out = np.asarray(jax.jit(lambda f, x, t: f(x, t))(network, x, jnp.array([0.2, 0.7, 0.7])))
    assert out.shape == x.shape
    np.testing.assert_allclose(
        out[1], jax.jit(lambda f, x, t: f(x, t))(network, x[1], 0.7), atol=1e-9
    )
    assert abs(out[1] - out[2])[last] > 1e-3 * 1e-4  # the last row and column are not cropped away


def test_a_u_net_of_sequences_is_the_one_of_images_of_one_row():
    """With SAME padding a row of height 1 meets the middle row of a kernel alone, at each level."""
    settings = {"width": 4, "multipliers": (1, 2), "blocks": 1}
    network = random_like(nnx.eval_shape(lambda: UNet((11, 2), **settings, rngs=nnx.Rngs(0))))
    images = nnx.eval_shape(lambda: UNet((1, 11, 2), **settings, rngs=nnx.Rngs(0)))

    def as_rows(leaf, image_leaf):
        if leaf.shape == image_leaf.shape:
            return leaf
        other, leaf = np.random.default_rng(1).normal(size=image_leaf.shape[1:]), np.asarray(leaf)
        return np.stack([other, leaf, -other])  # what is above and below meets the padding

    leaves = map(as_rows, *map(jax.tree.leaves, (network, images)))
    images = jax.tree.unflatten(jax.tree.structure(images), leaves)
    x = np.random.default_rng(0).normal(size=(3, 11, 2))
    call = jax.jit(lambda f, x: f(x, 0.4))
    np.testing.assert_allclose(
        call(images, x[:, None])[:, 0], call(network, x), rtol=1e-9, atol=1e-9
    )


def test_attention_only_where_asked():
    def attending(attention):
        network = nnx.eval_shape(
            lambda: UNet((8, 8, 1), width=8, blocks=1, attention=attention, rngs=nnx.Rngs(0))
        )
        return [
            layers[0].attention is not None
            for layers in (*network.down, *network.up)
            if hasattr(layers[0], "conv1")
        ]

    # Down: one block at each of 8, 4, 2. Up: two at each of 2, 4, 8.
    assert attending(()) == [False] * 9
    assert attending((4,)) == [False, True, False, False, False, True, True, False, False]


def test_guidance_of_a_u_net_takes_less_than_two_forwards():
    """The first convolutions do not see the condition: they are computed once."""
    settings = {"width": 8, "multipliers": (1, 2), "blocks": 1, "num_classes": 3}
    network, x = UNet((16, 16, 1), **settings, rngs=nnx.Rngs(0)), jnp.ones((16, 16, 1))

    def denoiser(cond):
        return dj.as_denoiser(dj.bind(network, cond=cond), dj.linear(), dj.X0)

    def operations(denoise):
        return jax.jit(denoise).lower(x, 0.5).compile().cost_analysis()["flops"]

    one, guided = operations(denoiser(1)), operations(dj.cfg(denoiser(1), denoiser(3), 2.0))
    assert 1.5 * one < guided < 1.98 * one
