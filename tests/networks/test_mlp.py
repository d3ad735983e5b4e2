"""The multilayer perceptron: its key and its conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_networks import call, inputs, trained

from diffjax.networks import MLP


def test_one_key_for_a_whole_call():
    network = trained(MLP, dropout=0.5)
    with pytest.raises(
        ValueError,
        match=r"key: expected one jax.random.key .* got key<fry>\[2\]; jax.vmap over the call",
    ):
        network(jnp.zeros((2, 5)), 0.5, 1, jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"key: expected one jax.random.key .* got int"):
        network(jnp.zeros((2, 5)), 0.5, 1, 0)


def test_mapped_on_explicit_axes_with_dropout_it_is_the_plain_call():
    x, t, cond = (jnp.concatenate([*a])[:4] for a in inputs(MLP))
    keys = jax.random.split(jax.random.key(0), 4)
    network = trained(MLP, dropout=0.3)
    mapped = jax.jit(lambda network, *args: jax.vmap(network)(*args))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    sharded = jax.device_put((x, t, cond), NamedSharding(mesh, PartitionSpec("data")))
    out = mapped(
        network,
        *sharded,
        jax.device_put(jax.random.clone(keys), NamedSharding(mesh, PartitionSpec("data"))),
    )
    assert out.sharding.spec[0] == "data"
    np.testing.assert_allclose(out, mapped(network, x, t, cond, keys), atol=1e-12)
    shared = call(network, sharded[0], 0.3, 2)  # one time and one label for all
    np.testing.assert_allclose(shared, call(network, x, 0.3, 2), atol=1e-12)


def test_conditions_that_are_refused():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="condition: expected None beside num_classes=3"):
        MLP(2, width=8, num_classes=3, condition=lambda cond: cond, rngs=nnx.Rngs(0))
    # a function without parameters
    plain = MLP(2, width=8, condition=lambda cond: cond, rngs=nnx.Rngs(0))
    assert plain(x, 0.5, jnp.ones(8)).shape == (2,)
    with pytest.raises(
        ValueError, match="condition: expected vectors of the network's width 8, got 5 channels"
    ):
        plain(x, 0.5, jnp.ones(5))
    with pytest.raises(
        ValueError,
        match=r"cond: expected that of one sample or .*shape \(\), got one of shape \(3,\)",
    ):
        plain(x, 0.5, jnp.ones((3, 8)))
