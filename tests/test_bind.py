"""bind: what is bound is data, at any depth, whatever kind of function holds it."""

import functools
import pickle

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from diffjax import bind


def polynomial(a, b, x, c=0.0):
    return a * x**2 + b * x + c


def test_binds_the_first_arguments_and_keywords():
    assert bind(polynomial, 2.0, 3.0, c=5.0)(10.0) == 235.0
    assert bind(polynomial, 2.0)(3.0, 10.0, c=5.0) == 235.0  # later arguments at the call
    assert bind(polynomial, 2.0, 3.0, c=5.0)(10.0, c=0.0) == 230.0  # the call's keyword wins


def test_binds_of_binds_are_merged():
    nested = bind(bind(bind(polynomial, 2.0), 3.0, c=1.0), c=5.0)
    flat = bind(polynomial, 2.0, 3.0, c=5.0)
    assert jax.tree.structure(nested) == jax.tree.structure(flat)
    assert jax.tree.leaves(nested) == jax.tree.leaves(flat)


@pytest.mark.parametrize(
    "inner",
    [
        lambda a: bind(polynomial, a),
        lambda a: Partial(polynomial, a),
        lambda a: functools.partial(polynomial, a),
    ],
)
def test_nested_gradient_does_not_vanish(inner):
    # jax's own Partial of a Partial keeps the inner one static: a has no gradient there
    assert not jax.tree.leaves(Partial(Partial(polynomial, 2.0)))
    f = bind(inner(2.0), 3.0)
    gradient = jax.grad(lambda f: f(10.0))(f)
    assert [float(g) for g in jax.tree.leaves(gradient)] == [100.0, 10.0]


def apply_twice(f, x):
    return f(f(x))


def sum_of(fs, x):
    return sum(f(x) for f in fs["list"])


def test_functions_among_the_arguments_are_data():
    inner = bind(polynomial, 0.0, 3.0)
    assert [
        float(g) for g in jax.tree.leaves(jax.grad(lambda f: f(5.0))(bind(apply_twice, inner)))
    ][1] == 30.0
    assert (
        float(jax.jit(lambda f, x: f(x))(bind(sum_of, {"list": [jnp.sin, inner, jnp.cos]}), 0.0))
        == 1.0
    )


def test_a_bound_function_is_traced_once_over_changing_numbers():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def call(f, x):
        return f(x)

    values = [
        float(call(bind(apply_twice, bind(polynomial, 0.0, b)), 1.0)) for b in (1.0, 2.0, 3.0)
    ]
    assert values == [1.0, 4.0, 9.0]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(x.shape[-1], param_dtype=jnp.float64)(x) * t


class NNX(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

    def __call__(self, x, t):
        return self.dense(x) * t

    def method(self, x, t):
        return self(x, t)


class Equinox(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x, t):
        return (x @ self.weight + self.bias) * t


def plain(params, x, t):
    return (x @ params["w"] + params["b"]) * t


def networks():
    w = jnp.arange(1.0, 5.0).reshape(2, 2)
    module, x = Linen(), jnp.ones(2)
    variables = module.init(jax.random.key(0), x, 1.0)
    return {
        "plain": bind(plain, {"w": w, "b": jnp.zeros(2)}),
        "partial": bind(functools.partial(plain, {"w": w, "b": jnp.zeros(2)})),
        "linen": bind(module.apply, variables),
        "nnx": NNX(),
        "bound nnx": bind(NNX()),
        "method of nnx": bind(NNX().method),
        "equinox": Equinox(w, jnp.zeros(2)),
        "bound equinox": bind(Equinox(w, jnp.zeros(2))),
    }


@pytest.mark.parametrize(
    "name",
    ["plain", "partial", "linen", "nnx", "bound nnx", "method of nnx", "equinox", "bound equinox"],
)
def test_every_kind_of_network_has_its_gradient(name):
    # out = (x W + b) t: the gradient of the sum is t x_i on W_ij and t on b, whatever holds W and b
    network, x, t = networks()[name], jnp.array([3.0, 5.0]), 2.0

    def total(f, x):
        return jnp.sum(f(x, t))

    gradient = jax.jit(jax.grad(total))(bind(network), x)
    shapes = {leaf.ndim: leaf for leaf in jax.tree.leaves(gradient)}
    np.testing.assert_allclose(shapes[2], t * np.outer(x, np.ones(2)))
    np.testing.assert_allclose(shapes[1], [t, t])
    assert len(jax.tree.leaves(gradient)) == 2


def test_pickles():
    f = pickle.loads(pickle.dumps(bind(apply_twice, bind(polynomial, 0.0, jnp.array(3.0)))))
    assert float(f(1.0)) == 9.0


@pytest.mark.usefixtures("without_type_checks")
def test_refuses_what_cannot_be_called():
    with pytest.raises(ValueError, match=r"fn: expected a function or a callable module, got 3"):
        bind(3)
