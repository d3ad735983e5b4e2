"""The step against closed forms, averages, devices, the loop and its failures."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from flax import linen, nnx

from diffjax._bind import bind
from diffjax.training import (
    check_labels,
    constant_ema,
    fit,
    functional,
    in_memory,
    init_state,
    make_train_step,
    merge,
    power_ema,
)


def squared_error(params, key, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def noisy(params, key, batch):
    """A loss whose gradient depends on the key."""
    return squared_error(params, key, batch) + jnp.sum(jax.random.normal(key, (3,)) * params["w"])


def regression(n=8):
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(n, 3)), "y": random.normal(size=n)}


def new(optimizer, key=0):
    return init_state(jax.random.key(key), {"w": jnp.array([1.0, -2.0, 0.5])}, optimizer)


def test_one_step_of_gradient_descent_in_closed_form():
    batch, optimizer = regression(), optax.sgd(0.1)
    state, metrics = jax.jit(make_train_step(squared_error, optimizer, ema=constant_ema(0.75)))(new(optimizer), batch)
    w = np.array([1.0, -2.0, 0.5])
    residual = batch["x"] @ w - batch["y"]
    gradient = 2 * batch["x"].T @ residual / 8
    np.testing.assert_allclose(metrics["loss"], np.mean(residual**2))
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient))
    np.testing.assert_allclose(state.params["w"], w - 0.1 * gradient)
    np.testing.assert_allclose(state.ema["w"], w - 0.25 * 0.1 * gradient)
    assert int(state.step) == 1 and "skipped" not in metrics


def test_an_empty_batch_is_refused():
    """Its mean is NaN."""
    with pytest.raises(ValueError, match=r"batch: expected examples, got an array of shape \(0, 3\)"):
        make_train_step(squared_error, optax.sgd(0.1))(new(optax.sgd(0.1)), regression(0))


def test_a_loss_may_return_metrics_and_must_be_a_scalar():
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda p, k, b: (squared_error(p, k, b), {"size": jnp.sum(p["w"] ** 2)}), optimizer)
    assert float(step(new(optimizer), regression())[1]["size"]) == 5.25
    step = make_train_step(lambda p, k, b: p["w"], optimizer)
    with pytest.raises(ValueError, match=r"loss: expected a scalar .* got shape \(3,\)"):
        jax.eval_shape(step, new(optimizer), regression())


def test_each_step_draws_its_own_noise_and_the_key_stays():
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(lambda p, key, b: (0.0 * p["w"].sum(), {"u": jax.random.uniform(key)}), optimizer))
    state, drawn = new(optimizer), []
    for _ in range(3):
        state, metrics = step(state, None)
        drawn.append(float(metrics["u"]))
    expected = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), i))) for i in range(3)]
    assert drawn == expected and len(set(drawn)) == 3


def test_donating_the_state_spares_the_parameters_and_the_key_of_the_caller():
    optimizer = optax.adam(0.1)
    key, params = jax.random.key(0), {"w": jnp.ones(3)}
    state = init_state(key, params, optimizer)
    step = jax.jit(make_train_step(squared_error, optimizer), donate_argnums=0)
    after, _ = step(state, regression())
    assert state.params["w"].is_deleted() and state.ema["w"].is_deleted()
    np.testing.assert_array_equal(params["w"], 1.0)
    jax.random.normal(key)
    step(after, regression())


def test_a_step_traces_once_from_weakly_typed_parameters():
    optimizer, traces = optax.adam(0.1), []

    def loss(params, key, batch):
        traces.append(1)
        return jnp.sum(params**2)

    step = jax.jit(make_train_step(loss, optimizer))
    params = jnp.full(3, 0.5)
    state, _ = step(init_state(jax.random.key(0), params, optimizer), None)
    step(state, None)
    assert params.weak_type and len(traces) == 1


def averaged(ema, steps=12):
    """The average of params 1, 2, 3, ..., starting at 0, after each step."""
    count = optax.GradientTransformation(
        lambda p: optax.EmptyState(), lambda g, s, p: (jax.tree.map(jnp.ones_like, g), s)
    )
    step = jax.jit(make_train_step(lambda p, k, b: jnp.sum(p), count, ema=ema))
    state, seen = init_state(jax.random.key(0), jnp.zeros(()), count), []
    for _ in range(steps):
        state, _ = step(state, None)
        seen.append(float(state.ema))
    return np.array(seen)


def test_constant_average():
    n = np.arange(1, 13)  # the sum of (1 - d) d^(n - k) k over k = 1..n
    d = 0.8
    np.testing.assert_allclose(averaged(constant_ema(d)), n - d / (1 - d) * (1 - d**n), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_power_average_has_the_weights_of_its_closed_form(gamma):
    """For integer gamma + 1 = g the weight of step k among n is (k^g - (k-1)^g) / n^g, which telescopes to 1."""
    n, g = 12, gamma + 1
    k = np.arange(1, n + 1.0)
    weights = (1 - (1 - 1 / k) ** g) * np.array([np.prod((1 - 1 / k[i + 1 :]) ** g) for i in range(n)])
    np.testing.assert_allclose(weights, (k**g - (k - 1) ** g) / n**g)  # the closed form is right
    np.testing.assert_allclose(averaged(power_ema(gamma), n)[-1], np.sum(k * (k**g - (k - 1) ** g)) / n**g, rtol=1e-6)


@pytest.mark.parametrize(("gamma", "std"), [(6.94, 0.10), (16.97, 0.05)])
def test_power_average_has_the_width_of_the_paper(gamma, std):
    n = 4000
    k = np.arange(1, n + 1.0)
    weights = np.array(power_ema(gamma)(jnp.zeros(n), jnp.ones(n), jnp.arange(1, n + 1)))  # 1 - decay
    weights *= np.append(np.cumprod((1 - weights)[:0:-1])[::-1], 1.0)
    np.testing.assert_allclose(weights.sum(), 1)
    mean = np.sum(weights * k / n)
    np.testing.assert_allclose(np.sqrt(np.sum(weights * (k / n - mean) ** 2)), std, rtol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_half_precision_parameters_follows_the_exact_recursion(dtype):
    """The parameters are 2 from the first step on, the average starts at 0."""
    jump = optax.stateless(lambda g, p: jax.tree.map(lambda x: 2 - x, p))
    step = make_train_step(lambda p, k, b: jnp.sum(p["w"]), jump, ema=constant_ema(0.999))
    start = init_state(jax.random.key(0), {"w": jnp.zeros(2, dtype)}, jump)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=3000))(start)
    np.testing.assert_array_equal(state.params["w"], 2)
    assert state.params["w"].dtype == dtype and state.ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.ema["w"], 2 * (1 - 0.999**3000), rtol=1e-5)  # 1.9006


def test_an_average_that_came_in_half_precision_goes_on_in_float32():
    optimizer = optax.sgd(0.0)
    state = init_state(jax.random.key(0), jnp.full(2, 2, jnp.bfloat16), optimizer)
    state = state._replace(ema=jnp.zeros(2, jnp.bfloat16))
    state, _ = make_train_step(lambda p, k, b: jnp.sum(p), optimizer, ema=constant_ema(0.999))(state, None)
    assert state.ema.dtype == jnp.float32
    np.testing.assert_allclose(state.ema, 0.002, rtol=1e-6)


@pytest.mark.parametrize("gamma", [6.94, 16.97])
def test_the_power_average_keeps_the_digits_of_its_weight_in_float32(gamma):
    """The weight of the new parameters is `1 - (1 - 1 / k)^(gamma + 1)`."""
    steps = [1, 2, 3, 10, 1000, 10**5, 2_500_000, 5_000_000, 10**7]
    with mpmath.workdps(50), jax.enable_x64(False):
        exact = [float(1 - (1 - mpmath.mpf(1) / k) ** (mpmath.mpf(gamma) + 1)) for k in steps]
        optimizer = optax.sgd(0.0)
        step = jax.jit(make_train_step(lambda p, k, b: 0 * p, optimizer, ema=power_ema(gamma)))
        state = init_state(jax.random.key(0), jnp.ones(()), optimizer)._replace(ema=jnp.zeros(()))
        weights = [step(state._replace(step=jnp.int32(k - 1)), None)[0].ema for k in steps]
    np.testing.assert_allclose(weights, exact, rtol=1e-6)


def test_the_gradient_norm_of_half_precision_parameters_does_not_overflow():
    optimizer = optax.sgd(1e-3)
    state = init_state(jax.random.key(0), jnp.zeros(100, jnp.float16), optimizer)
    step = make_train_step(lambda p, k, b: 300 * jnp.sum(p), optimizer, skip_nonfinite=True)
    state, metrics = step(state, None)
    np.testing.assert_allclose(metrics["grad_norm"], 3000, rtol=1e-6)
    assert int(metrics["skipped"]) == 0


def test_averages_refuse_what_is_none():
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay: expected a finite number in \[0, 1\], got"):
            constant_ema(decay)
    with pytest.raises(ValueError, match=r"gamma: expected a number above -1, got -1.0"):
        power_ema(-1.0)


def infinite_gradient(params, key, batch):
    """Finite everywhere, but with an infinite slope at zero."""
    return jnp.sum(jnp.sqrt(params["w"] - batch))


@pytest.mark.parametrize("loss", [infinite_gradient, lambda p, k, b: jnp.log(p["w"] - b).sum() * jnp.nan])
def test_a_step_that_is_not_finite_is_skipped_if_asked(loss):
    optimizer = optax.adam(0.1)
    state = init_state(jax.random.key(0), {"w": jnp.ones(3)}, optimizer)
    after, metrics = jax.jit(make_train_step(loss, optimizer, skip_nonfinite=True))(state, jnp.ones(3))
    assert int(metrics["skipped"]) == 1 and int(after.step) == 1
    for kept, before in zip(jax.tree.leaves(after[:3]), jax.tree.leaves(state[:3]), strict=True):
        np.testing.assert_array_equal(kept, before)
    after, _ = make_train_step(loss, optimizer)(state, jnp.ones(3))
    assert not np.isfinite(after.params["w"]).all()


def test_one_update_of_several_micro_batches_is_one_step():
    """Gradient descent on (w - 1)^2 from 0: w = 1 - 0.8^n after n updates, of which the average has its closed form."""
    optimizer = optax.sgd(0.1)
    loss = lambda params, key, batch: jnp.mean((params - batch) ** 2)  # noqa: E731
    step = jax.jit(make_train_step(loss, optimizer, ema=constant_ema(0.9), accumulate=4))
    state = init_state(jax.random.key(0), jnp.zeros(()), optimizer)
    for _ in range(10):
        state, _ = step(state, jnp.ones(4))
    assert int(state.step) == 10
    np.testing.assert_allclose(state.params, 1 - 0.8**10)
    expected = 1 - 0.9**10 - 0.1 * sum(0.9 ** (10 - n) * 0.8**n for n in range(1, 11))
    np.testing.assert_allclose(expected, 0.4583, atol=1e-4)
    np.testing.assert_allclose(state.ema, expected)


@pytest.mark.parametrize("name", ["adam", "polyak_sgd", "lbfgs", "sam", "sophia"])
def test_micro_batches_take_the_step_of_their_union(name):
    inner = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    optimizer = {
        "adam": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
        "polyak_sgd": optax.polyak_sgd(),
        "lbfgs": optax.lbfgs(),
        "sam": optax.contrib.sam(optax.sgd(0.1), inner, opaque_mode=True),
        "sophia": optax.contrib.sophia(0.1),
    }[name]
    loss = lambda *args: (squared_error(*args), {"first": args[2]["x"][:, 0].mean()})  # noqa: E731
    start, batch = new(optimizer), regression(12)
    expected = jax.jit(make_train_step(loss, optimizer, ema=constant_ema(0.75)))(start, batch)
    got = jax.jit(make_train_step(loss, optimizer, ema=constant_ema(0.75), accumulate=4))(start, batch)
    assert_trees_agree(got, expected)


def assert_trees_agree(got, expected, rtol=1e-12):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=jax.tree_util.keystr(path))


def test_each_micro_batch_draws_its_own_noise():
    optimizer = optax.sgd(0.1)
    got, _ = jax.jit(make_train_step(noisy, optimizer, accumulate=4))(new(optimizer), regression())
    key = jax.random.fold_in(jax.random.key(0), 0)
    noise = np.mean([jax.random.normal(jax.random.fold_in(key, i), (3,)) for i in range(4)], axis=0)
    quiet, _ = make_train_step(squared_error, optimizer)(new(optimizer), regression())
    np.testing.assert_allclose(got.params["w"], quiet.params["w"] - 0.1 * noise, rtol=1e-9)


def test_gradients_accumulate_in_float32():
    """Each of 1024 micro-batches has the gradient 1. In bfloat16 a sum of 1 / 1024 each ends at 1 / 4."""
    optimizer = optax.sgd(1.0)
    step = make_train_step(lambda p, k, b: p * b.mean(), optimizer, accumulate=1024)
    state, metrics = step(init_state(jax.random.key(0), jnp.zeros((), jnp.bfloat16), optimizer), jnp.ones(1024))
    assert state.params.dtype == jnp.bfloat16
    np.testing.assert_array_equal((state.params, metrics["grad_norm"]), (-1, 1))


def test_micro_batches_need_less_memory():
    def loss(params, key, batch):
        for layer in params:
            batch = jnp.tanh(batch @ layer)
        return jnp.mean(batch**2)

    optimizer = optax.sgd(0.1)
    state, batch = init_state(jax.random.key(0), jnp.ones((8, 16, 16)), optimizer), jnp.ones((4096, 16))
    memory = [
        jax.jit(make_train_step(loss, optimizer, accumulate=k)).lower(state, batch).compile().memory_analysis()
        for k in (1, 16)
    ]
    assert memory[1].temp_size_in_bytes < memory[0].temp_size_in_bytes / 4


@pytest.mark.usefixtures("without_type_checks")
def test_a_batch_that_cannot_be_split_is_refused():
    optimizer = optax.sgd(0.1)
    for accumulate in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=f"accumulate: expected a positive integer, got {accumulate}"):
            make_train_step(squared_error, optimizer, accumulate=accumulate)
    step = make_train_step(squared_error, optimizer, accumulate=3)
    with pytest.raises(ValueError, match=r"multiple of accumulate=3, got shape \(8, 3\) at batch\['x'\]"):
        step(new(optimizer), regression(8))
    with pytest.raises(ValueError, match=r"multiple of accumulate=3, got shape \(\) at batch\['i'\]"):
        step(new(optimizer), {"i": 0, **regression(9)})


def test_a_step_that_is_finite_is_not_changed_by_skipping():
    optimizer = optax.adam(0.1)
    plain, _ = make_train_step(squared_error, optimizer)(new(optimizer), regression())
    skipping, metrics = make_train_step(squared_error, optimizer, skip_nonfinite=True)(new(optimizer), regression())
    assert int(metrics["skipped"]) == 0
    for a, b in zip(jax.tree.leaves(plain[:3]), jax.tree.leaves(skipping[:3]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def on_devices():
    """The losses and states of one run, with different numbers of devices."""
    worker = pathlib.Path(__file__).parent / "devices_worker.py"
    out = subprocess.run([sys.executable, worker], capture_output=True, text=True, check=True).stdout
    return json.loads(out)


@pytest.mark.parametrize("placed", ["data 2", "data 8", "fsdp 8", "data 2, model 4", "micro data 8"])
def test_any_number_of_devices_trains_the_model_of_one(on_devices, placed):
    losses, state = on_devices[placed]
    expected_losses, expected_state = on_devices["micro one" if placed.startswith("micro") else "one"]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)
    for name, leaf in state.items():
        np.testing.assert_allclose(leaf, expected_state[name], rtol=1e-12, atol=1e-14, err_msg=name)


def test_micro_batches_leave_the_examples_on_their_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer = optax.sgd(0.1)
    batch = jax.device_put(regression(16), jax.NamedSharding(mesh, jax.P("data")))
    state = jax.device_put(new(optimizer), jax.NamedSharding(mesh, jax.P()))
    program = jax.jit(make_train_step(squared_error, optimizer, accumulate=2)).lower(state, batch).compile().as_text()
    assert "all-reduce(" in program
    assert not re.search(r"all-to-all\(|all-gather\(|collective-permute\(", program)


def test_functional_is_the_module_and_back():
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    apply, params = functional(module)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(bind(apply, params)(x), module(x))
    doubled = merge(apply, jax.tree.map(lambda p: 2 * p, params))
    assert type(doubled) is nnx.Linear
    np.testing.assert_allclose(doubled(x), 2 * module(x))
    with pytest.raises(ValueError, match=r"to be an nnx.Param, got mean: BatchStat, var: BatchStat"):
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
    """The parameters of a network with dropout, `call(params, x, key)`, and the same by the module itself."""
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
    """A dropped output is 0, a kept one is doubled: the loss tells which, and only the kept ones train."""
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
    assert 0 < kept.mean() < 1 and len({tuple(row) for row in kept.tolist()}) > 1  # each example has its own

    # The gradient of mean(outputs^2) with respect to the bias is 2 / 16 times the sum of 2 outputs, of those kept.
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


def linear():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def donated():
    state = new(SGD)
    jax.jit(make_train_step(squared_error, SGD), donate_argnums=0)(state, regression())
    return state


SGD = optax.sgd(0.1)
KEY_0 = jax.random.key(0)
SPLIT = r"functional\(module\) for Flax NNX, .*eqx.partition.* for Equinox, .*module.init\(\.\.\.\) for linen"
MISTAKES = {
    "a decay": (
        lambda: make_train_step(squared_error, SGD, ema=0.999),
        r"ema: expected a function \(average, params, step\) .* such as constant_ema\(0.999\), got 0.999",
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
        r"optimizer: expected an optax transformation such as optax.adam\(1e-3\), got the function adam\(learning_rate,",
    ),
    "loss and optimizer swapped": (
        lambda: make_train_step(SGD, squared_error),
        r"loss: expected a function \(params, key, batch\) -> a scalar, got an instance of GradientTransformation",
    ),
    "a network as loss": (lambda: make_train_step(linear(), SGD), r"loss: .* got an instance of Linear"),
    "a seed": (lambda: init_state(0, jnp.ones(2), SGD), r"key: expected a key such as jax.random.key\(0\), got 0"),
    "keys": (
        lambda: init_state(jax.random.split(jax.random.key(0)), jnp.ones(2), SGD),
        r"key: expected one key, got an array of keys of shape \(2,\)",
    ),
    "an NNX module": (lambda: init_state(KEY_0, linear(), SGD), rf"params: .* got an instance of Linear .*{SPLIT}"),
    "modules": (lambda: init_state(KEY_0, {"a": linear()}, SGD), r"got an instance of Linear at params\['a'\]"),
    "a linen module": (lambda: init_state(KEY_0, linen.Dense(2), SGD), rf"got an instance of Dense at .*{SPLIT}"),
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
        r"got rngs.count: RngCount, rngs.key: RngKey; construct dropout layers without rngs, and give the key",
    ),
    "params and apply swapped": (
        lambda: merge({"w": jnp.ones(2)}, functional(linear())[0]),
        r"apply: expected the function that functional\(module\) returned, got an instance of dict",
    ),
    "a state as params": (
        lambda: merge(functional(linear())[0], new(SGD)),
        r"params: expected the parameters of the module, such as state.ema, got an instance of TrainState",
    ),
    "batch and state swapped": (
        lambda: make_train_step(squared_error, SGD)(regression(), new(SGD)),
        r"state: expected a TrainState from init_state, got an instance of dict",
    ),
    "a donated state": (
        lambda: make_train_step(squared_error, SGD)(donated(), regression()),
        r"state: .* got a deleted one at state.params\['w'\]: .*donate_argnums=0 .*the state that it returned",
    ),
    "a state that fit consumed": (
        lambda: fit(donated(), make_train_step(squared_error, SGD), lambda i: regression(), 3, progress=False),
        r"state: .* got a deleted one at state.params\['w'\]: .*the state that it returned",
    ),
    "donated parameters": (lambda: init_state(KEY_0, donated().params, SGD), r"got a deleted one at params\['w'\]"),
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


def test_batches_in_memory_are_epochs_without_gaps():
    data = {"x": np.arange(10), "twice": 2 * np.arange(10)}
    batches = in_memory(data, 4, seed=1)
    drawn = [batches(i) for i in range(10)]
    assert all(batch["x"].shape == (4,) and np.array_equal(2 * batch["x"], batch["twice"]) for batch in drawn)
    epochs = np.concatenate([batch["x"] for batch in drawn]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = in_memory(data, 4, seed=1)  # a pure function of the step: in any order, in another process
    assert all(np.array_equal(again(i)["x"], drawn[i]["x"]) for i in (7, 0, 3))
    assert not np.array_equal(in_memory(data, 10, seed=2)(0)["x"], epochs[0])


def test_bad_data_is_refused():
    x = np.ones((4, 2))
    for arrays, message in (
        (np.ones((0, 2)), r"arrays: expected at least one example, got shape \(0, 2\)"),
        (np.float32(1), r"arrays: expected at least one example, got shape \(\)"),
        ({}, "same leading size, got no array"),
        ({"x": x, "y": np.ones(3)}, r"same leading size, got \{\"arrays\['x'\]\": 4, \"arrays\['y'\]\": 3\}"),
        (
            {"x": x, "y": np.array([1.0, 2.0, np.nan, 0.0])},
            r"arrays\['y'\]: expected finite numbers, got nan at \(2,\)",
        ),
        (np.where(np.eye(4, 2) > 0, -np.inf, 0.0), r"arrays: expected finite numbers, got -inf at \(0, 0\)"),
        (np.array(["a", "b"]), "arrays: expected numbers, got dtype <U1"),
        (np.array([None, 1]), "arrays: expected numbers, got dtype object"),
    ):
        with pytest.raises(ValueError, match=message):
            in_memory(arrays, 2)
    for size in (0, 5):
        with pytest.raises(
            ValueError, match=rf"batch_size: expected a number from 1 to 4, the number of examples, got {size}"
        ):
            in_memory(x, size)
    assert check_labels(np.array([2, 0], np.uint8), 3).dtype == np.int32
    for labels in ([0, 3], [[0], [-1]]):
        with pytest.raises(
            ValueError, match=r"labels: expected integers in \[0, 3\), got (3 at \(1,\)|-1 at \(1, 0\))"
        ):
            check_labels(labels, 3)
    with pytest.raises(ValueError, match="labels: expected integers, got dtype float64"):
        check_labels([0.0], 3)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fail_at(number, loss=squared_error):
    """A jitted step whose loss is NaN at one step."""
    optimizer = optax.sgd(0.01)

    def wrong(params, key, batch):
        return loss(params, key, batch) * jnp.where(batch["i"] == number - 1, jnp.nan, 1.0)

    return jax.jit(make_train_step(wrong, optimizer)), new(optimizer), lambda i: {**regression(), "i": i}


def test_a_nan_stops_the_run_with_its_step_and_the_last_good_checkpoint(tmp_path):
    step, state, batches = fail_at(27)
    settings = {"log_every": 7, "checkpoint_every": 10, "progress": False}
    with pytest.raises(FloatingPointError) as error:
        fit(state, step, batches, 40, directory=tmp_path, **settings)
    assert "at step 27: loss = nan" in str(error.value)
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '20'}" in str(error.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()) == ["10", "20"]
    with pytest.raises(FloatingPointError, match=r"at step 27: loss = nan.*no checkpoint was saved before it"):
        fit(state, step, batches, 40, log_every=40, progress=False)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    optimizer = optax.GradientTransformation(
        lambda p: jnp.zeros((), int),
        lambda g, s, p: (jax.tree.map(lambda x: x * jnp.where(s == 14, jnp.inf, 0.0), g), s + 1),
    )
    step = jax.jit(make_train_step(squared_error, optimizer))
    with pytest.raises(FloatingPointError, match=r"not finite after step 15; .* is .*checkpoints/10$"):
        fit(new(optimizer), step, lambda i: regression(), 15, directory=tmp_path, checkpoint_every=10, progress=False)


def test_skipped_steps_do_not_stop_the_run():
    optimizer = optax.sgd(0.01)
    step = make_train_step(lambda p, k, b: squared_error(p, k, b) * b["factor"], optimizer, skip_nonfinite=True)
    batches = lambda i: {**regression(), "factor": np.nan if i == 3 else 1.0}  # noqa: E731
    state = fit(new(optimizer), jax.jit(step), batches, 10, progress=False)
    assert int(state.step) == 10 and np.isfinite(state.params["w"]).all()


def test_the_log_has_means_and_no_line_twice_after_resuming(tmp_path):
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(lambda p, k, b: 0.0 * p["w"].sum() + b, optimizer))
    batches, settings = (lambda i: jnp.float64(i)), {"log_every": 4, "checkpoint_every": 10, "progress": False}
    called = []
    fit(
        new(optimizer), step, batches, 20, directory=tmp_path, tensorboard=True,
        callback=lambda number, state: called.append((number, int(state.step))), callback_every=8, **settings,
    )  # fmt: skip
    logged = {line["step"]: line["loss"] for line in lines(tmp_path)}
    assert logged == {4: 1.5, 8: 5.5, 10: 8.5, 12: 10.5, 16: 13.5, 20: 17.5}  # loss k - 1 at step k
    assert called == [(8, 8), (16, 16)]
    assert any((tmp_path / "tensorboard").iterdir())

    (tmp_path / "checkpoints" / "20").rename(tmp_path / "gone")  # as if killed before it was written
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "lo')
    fit(new(optimizer), step, batches, 24, directory=tmp_path, **settings)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10, 12, 16, 20, 24]


def test_sigterm_saves_where_it_came_and_the_old_handler_returns(tmp_path):
    optimizer = optax.sgd(0.01)
    step = jax.jit(make_train_step(squared_error, optimizer))
    handler = signal.getsignal(signal.SIGTERM)
    settings = {"directory": tmp_path, "progress": False, "callback_every": 1}
    with pytest.raises(SystemExit) as stopped:
        kill = lambda number, state: os.kill(os.getpid(), signal.SIGTERM) if number == 5 else None  # noqa: E731
        fit(new(optimizer), step, lambda i: regression(), 50, callback=kill, **settings)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    seen = []
    fit(new(optimizer), step, lambda i: regression(), 8, callback=lambda number, state: seen.append(number), **settings)
    assert seen in ([6, 7, 8], [7, 8])  # the signal may be seen one step later


@pytest.mark.usefixtures("without_type_checks")
def test_batches_that_cannot_be_resumed_or_end_early(tmp_path):
    optimizer = optax.sgd(0.01)
    step = jax.jit(make_train_step(squared_error, optimizer))
    run = lambda batches, n, folder=None: fit(  # noqa: E731
        new(optimizer), step, batches, n, directory=folder, progress=False
    )
    with pytest.raises(ValueError, match="a function of the step or an iterator with get_state and"):
        run(iter([regression()]), 1, tmp_path)
    with pytest.raises(ValueError, match="batches: expected a function of the step or an iterator, got <class 'list'>"):
        run([regression()], 1)
    with pytest.raises(ValueError, match="batches: expected num_steps batches, got 2"):
        run(iter([regression()] * 2), 3)
    assert int(run(iter([regression()] * 2), 2).step) == 2
    with pytest.raises(ValueError, match="directory: expected a folder for tensorboard=True"):
        fit(new(optimizer), step, lambda i: regression(), 1, tensorboard=True)

    import grain

    run(lambda i: regression(), 1, tmp_path)
    with pytest.raises(ValueError, match="batches: expected a function of the step, as in the run"):
        run(iter(grain.MapDataset.source([regression()]).repeat().to_iter_dataset()), 2, tmp_path)


def test_the_progress_bar_shows_the_loss(capsys):
    optimizer = optax.sgd(0.01)
    fit(new(optimizer), jax.jit(make_train_step(squared_error, optimizer)), lambda i: regression(), 5, log_every=1)
    err = capsys.readouterr().err
    assert "5/5" in err and "loss" in err and "step/s" in err
