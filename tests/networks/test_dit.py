"""The diffusion transformer: patches, their positions, and attention between them."""

import jax.numpy as jnp
import numpy as np
from small_networks import call, inputs, trained

from diffjax.networks import DiT
from diffjax.networks.dit import patchify, positions, unpatchify


def test_patches_are_a_permutation_of_the_pixels():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    # the second patch of the second row of three
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(unpatchify(tokens, 2, (4, 6, 3)), x)


def test_attention_moves_information_between_patches():
    x, t, _ = (a[0, 0] for a in inputs(DiT))
    other = x.at[0, 0].add(1.0)  # the first patch
    change = abs(call(trained(DiT), other, t) - call(trained(DiT), x, t))
    assert float(change[2:, 6:].min()) > 1e-6


def test_positions_tell_patches_apart():
    table = positions(8, 8, 16)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1) + 9 * np.eye(64)
    assert distance.min() > 0.4
