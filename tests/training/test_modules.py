"""Modules as functions of their parameters: Flax NNX, linen and Equinox, with dropout."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from linear_regression import regression

from diffjax._bind import bind
from diffjax.training import constant_ema, functional, init_state, make_train_step, merge


def test_functional_is_the_module_and_back():
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    apply, params = functional(module)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(bind(apply, params)(x), module(x))
    doubled = merge(apply, jax.tree.map(lambda p: 2 * p, params))
    assert type(doubled) is nnx.Linear
    np.testing.assert_allclose(doubled(x), 2 * module(x))
    with pytest.raises(
        ValueError, match=r"to be an nnx.Param, got mean: BatchStat, var: BatchStat"
    ):
        functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


class DropNNX(nnx.Module):
    def __init__(self):
        self.linear, self.dropout = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)

    def __call__(self, x, key=None):
        return self.dropout(self.linear(x), deterministic=key is None, rngs=key)


class DropLinen(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(2)(x))


class DropEquinox(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x, key=None):
        return self.dropout(self.linear(x), key=key, inference=key is None)


def dropping(kind):
    """The parameters of a network with dropout, `call(params, x, key)`, and the same by the module
    itself.
    """
    if kind == "nnx":
        module = DropNNX()
        apply, params = functional(module)
        return params, apply, module
    if kind == "linen":
        module = DropLinen()
        params = module.init(jax.random.key(0), jnp.zeros(3))
        call = lambda p, x, key: module.apply(p, x, train=key is not None, rngs={"dropout": key})  # noqa: E731
        return params, call, module.bind(params, rngs={"dropout": jax.random.key(0)})
    module = DropEquinox(eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5))
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return params, lambda p, x, key: eqx.combine(p, rest)(x, key), module


@pytest.mark.parametrize("kind", ["nnx", "linen", "equinox"])
def test_a_key_reaches_the_dropout_of_a_network_that_trains(kind):
    """A dropped output is 0, a kept one is doubled: the loss tells which, and only the kept ones
    train.
    """
    params, call, module = dropping(kind)
    x = regression()["x"].astype(np.float32)
    plain = np.array(jax.vmap(module)(x))

    def loss(params, key, batch):
        keys = jax.random.split(key, len(batch))
        outputs = jax.vmap(lambda x, key: call(params, x, key))(batch, keys)
        return jnp.mean(outputs**2), {"outputs": outputs}

    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss, optimizer, ema=constant_ema(0.0)), donate_argnums=0)
    state, metrics = step(init_state(jax.random.key(0), params, optimizer), x)
    kept = np.array(metrics["outputs"]) != 0
    np.testing.assert_allclose(metrics["outputs"], np.where(kept, 2 * plain, 0), rtol=1e-5)
    # each example has its own
    assert 0 < kept.mean() < 1 and len({tuple(row) for row in kept.tolist()}) > 1

    # The gradient of mean(outputs^2) with respect to the bias is 2 / 16 times the sum of 2 outputs,
    # of those kept.
    bias = next(leaf for leaf in jax.tree.leaves(params) if leaf.shape == (2,))
    moved = next(leaf for leaf in jax.tree.leaves(state.ema) if leaf.shape == (2,))
    gradient = 2 / 16 * np.sum(2 * np.array(metrics["outputs"]), axis=0)
    np.testing.assert_allclose(moved, bias - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_a_jitted_call_traces_once_over_changing_parameters():
    apply, params = functional(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    traces = []

    @jax.jit
    def call(network, x):
        traces.append(1)
        return network(x)

    for scale in range(3):
        call(bind(apply, jax.tree.map(lambda p: scale * p, params)), jnp.ones(3))  # noqa: B023
    assert len(traces) == 1
