"""Each wrong argument of the functions of training is named."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from linear_regression import new_state, regression, squared_error

from diffjax.training import fit, functional, init_state, make_train_step, merge, power_ema


def linear():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def donated():
    state = new_state(SGD)
    jax.jit(make_train_step(squared_error, SGD), donate_argnums=0)(state, regression())
    return state


SGD = optax.sgd(0.1)
KEY_0 = jax.random.key(0)
SPLIT = (
    r"functional\(module\) for Flax NNX, .*eqx.partition.* for Equinox, "
    r".*module.init\(\.\.\.\) for linen"
)
MISTAKES = {
    "a decay": (
        lambda: make_train_step(squared_error, SGD, ema=0.999),
        r"ema: expected a function \(average, params, step\) .* such as "
        r"constant_ema\(0.999\), got 0.999",
    ),
    "an average that is not called": (
        lambda: make_train_step(squared_error, SGD, ema=power_ema),
        r"ema: .* got the function power_ema\(gamma\)",
    ),
    "a decay by step": (
        lambda: make_train_step(squared_error, SGD, ema=lambda step: 0.9),
        r"ema: .* got the function <lambda>\(step\)",
    ),
    "an optimizer that is not called": (
        lambda: init_state(KEY_0, jnp.ones(2), optax.adam),
        r"optimizer: expected an optax transformation such as optax.adam\(1e-3\), got the "
        r"function adam\(learning_rate,",
    ),
    "loss and optimizer swapped": (
        lambda: make_train_step(SGD, squared_error),
        r"loss: expected a function \(params, key, batch\) -> a scalar, got an instance of "
        r"GradientTransformation",
    ),
    "a network as loss": (
        lambda: make_train_step(linear(), SGD),
        r"loss: .* got an instance of Linear",
    ),
    "a seed": (
        lambda: init_state(0, jnp.ones(2), SGD),
        r"key: expected a key such as jax.random.key\(0\), got 0",
    ),
    "keys": (
        lambda: init_state(jax.random.split(jax.random.key(0)), jnp.ones(2), SGD),
        r"key: expected one key, got an array of keys of shape \(2,\)",
    ),
    "an NNX module": (
        lambda: init_state(KEY_0, linear(), SGD),
        rf"params: .* got an instance of Linear .*{SPLIT}",
    ),
    "modules": (
        lambda: init_state(KEY_0, {"a": linear()}, SGD),
        r"got an instance of Linear at params\['a'\]",
    ),
    "a linen module": (
        lambda: init_state(KEY_0, linen.Dense(2), SGD),
        rf"got an instance of Dense at .*{SPLIT}",
    ),
    "an Equinox module": (
        lambda: init_state(KEY_0, eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), SGD),
        rf"got an instance of custom_jvp at params.activation; .*{SPLIT}",
    ),
    "integers": (
        lambda: init_state(KEY_0, {"n": jnp.arange(2)}, SGD),
        r"params: expected a pytree of floating-point arrays, got the dtype int64 at params\['n'\]",
    ),
    "parameters as module": (
        lambda: functional({"w": jnp.ones(2)}),
        r"module: expected an nnx.Module, got an instance of dict; .*eqx.partition.*module.init",
    ),
    "dropout with its own keys": (
        lambda: functional(nnx.Dropout(0.1, rngs=nnx.Rngs(0))),
        r"got rngs.count: RngCount, rngs.key: RngKey; construct dropout layers without rngs, "
        r"and give the key",
    ),
    "params and apply swapped": (
        lambda: merge({"w": jnp.ones(2)}, functional(linear())[0]),
        r"apply: expected the function that functional\(module\) returned, got an instance of dict",
    ),
    "a state as params": (
        lambda: merge(functional(linear())[0], new_state(SGD)),
        r"params: expected the parameters of the module, such as state.ema, got an instance "
        r"of TrainState",
    ),
    "batch and state swapped": (
        lambda: make_train_step(squared_error, SGD)(regression(), new_state(SGD)),
        r"state: expected a TrainState from init_state, got an instance of dict",
    ),
    "a donated state": (
        lambda: make_train_step(squared_error, SGD)(donated(), regression()),
        r"state: .* got a deleted one at state.params\['w'\]: .*donate_argnums=0 .*the state "
        r"that it returned",
    ),
    "a state that fit consumed": (
        lambda: fit(
            donated(),
            make_train_step(squared_error, SGD),
            lambda i: regression(),
            3,
            progress=False,
        ),
        r"state: .* got a deleted one at state.params\['w'\]: .*the state that it returned",
    ),
    "donated parameters": (
        lambda: init_state(KEY_0, donated().params, SGD),
        r"got a deleted one at params\['w'\]",
    ),
    "a donated average": (
        lambda: merge(functional(linear())[0], donated().ema),
        r"got a deleted one at params\['w'\]",
    ),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_argument_is_named(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()
