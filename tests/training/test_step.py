"""The training step against closed forms: micro-batches, devices, steps that are not finite."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import new_state, regression, squared_error

from diffjax.training import constant_ema, init_state, make_train_step


def noisy(params, key, batch):
    """A loss whose gradient depends on the key."""
    return squared_error(params, key, batch) + jnp.sum(jax.random.normal(key, (3,)) * params["w"])


def test_one_step_of_gradient_descent_in_closed_form():
    batch, optimizer = regression(), optax.sgd(0.1)
    state, metrics = jax.jit(make_train_step(squared_error, optimizer, ema=constant_ema(0.75)))(
        new_state(optimizer), batch
    )
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
    with pytest.raises(
        ValueError, match=r"batch: expected examples, got an array of shape \(0, 3\)"
    ):
        make_train_step(squared_error, optax.sgd(0.1))(new_state(optax.sgd(0.1)), regression(0))


@pytest.mark.usefixtures("without_type_checks")
def test_a_loss_may_return_metrics_and_must_be_a_scalar():
    optimizer = optax.sgd(0.1)
    step = make_train_step(
        lambda p, k, b: (squared_error(p, k, b), {"size": jnp.sum(p["w"] ** 2)}), optimizer
    )
    assert float(step(new_state(optimizer), regression())[1]["size"]) == 5.25
    step = make_train_step(lambda p, k, b: p["w"], optimizer)
    with pytest.raises(ValueError, match=r"loss: expected a scalar, .* got shape \(3,\)"):
        jax.eval_shape(step, new_state(optimizer), regression())


def test_each_step_draws_its_own_noise_and_the_key_stays():
    optimizer = optax.sgd(0.0)
    step = jax.jit(
        make_train_step(
            lambda p, key, b: (0.0 * p["w"].sum(), {"u": jax.random.uniform(key)}), optimizer
        )
    )
    state, drawn = new_state(optimizer), []
    for _ in range(3):
        state, metrics = step(state, None)
        drawn.append(float(metrics["u"]))
    expected = [
        float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), i))) for i in range(3)
    ]
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


def test_the_gradient_norm_of_half_precision_parameters_does_not_overflow():
    optimizer = optax.sgd(1e-3)
    state = init_state(jax.random.key(0), jnp.zeros(100, jnp.float16), optimizer)
    step = make_train_step(lambda p, k, b: 300 * jnp.sum(p), optimizer, skip_nonfinite=True)
    state, metrics = step(state, None)
    np.testing.assert_allclose(metrics["grad_norm"], 3000, rtol=1e-6)
    assert int(metrics["skipped"]) == 0


def infinite_gradient(params, key, batch):
    """Finite everywhere, but with an infinite slope at zero."""
    return jnp.sum(jnp.sqrt(params["w"] - batch))


@pytest.mark.parametrize(
    "loss", [infinite_gradient, lambda p, k, b: jnp.log(p["w"] - b).sum() * jnp.nan]
)
def test_a_step_that_is_not_finite_is_skipped_if_asked(loss):
    optimizer = optax.adam(0.1)
    state = init_state(jax.random.key(0), {"w": jnp.ones(3)}, optimizer)
    after, metrics = jax.jit(make_train_step(loss, optimizer, skip_nonfinite=True))(
        state, jnp.ones(3)
    )
    assert int(metrics["skipped"]) == 1 and int(after.step) == 1
    for kept, before in zip(jax.tree.leaves(after[:3]), jax.tree.leaves(state[:3]), strict=True):
        np.testing.assert_array_equal(kept, before)
    after, _ = make_train_step(loss, optimizer)(state, jnp.ones(3))
    assert not np.isfinite(after.params["w"]).all()


def test_one_update_of_several_micro_batches_is_one_step():
    """Gradient descent on (w - 1)^2 from 0: w = 1 - 0.8^n after n updates, of which the average has
    its closed form.
    """
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
    start, batch = new_state(optimizer), regression(12)
    expected = jax.jit(make_train_step(loss, optimizer, ema=constant_ema(0.75)))(start, batch)
    got = jax.jit(make_train_step(loss, optimizer, ema=constant_ema(0.75), accumulate=4))(
        start, batch
    )
    assert_trees_agree(got, expected)


def assert_trees_agree(got, expected, rtol=1e-12):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=jax.tree_util.keystr(path))


def test_each_micro_batch_draws_its_own_noise():
    optimizer = optax.sgd(0.1)
    got, _ = jax.jit(make_train_step(noisy, optimizer, accumulate=4))(
        new_state(optimizer), regression()
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    noise = np.mean([jax.random.normal(jax.random.fold_in(key, i), (3,)) for i in range(4)], axis=0)
    quiet, _ = make_train_step(squared_error, optimizer)(new_state(optimizer), regression())
    np.testing.assert_allclose(got.params["w"], quiet.params["w"] - 0.1 * noise, rtol=1e-9)


def test_gradients_accumulate_in_float32():
    """Each of 1024 micro-batches has the gradient 1. In bfloat16 a sum of 1 / 1024 each ends at 1 /
    4.
    """
    optimizer = optax.sgd(1.0)
    step = make_train_step(lambda p, k, b: p * b.mean(), optimizer, accumulate=1024)
    state, metrics = step(
        init_state(jax.random.key(0), jnp.zeros((), jnp.bfloat16), optimizer), jnp.ones(1024)
    )
    assert state.params.dtype == jnp.bfloat16
    np.testing.assert_array_equal((state.params, metrics["grad_norm"]), (-1, 1))


def test_micro_batches_need_less_memory():
    def loss(params, key, batch):
        for layer in params:
            batch = jnp.tanh(batch @ layer)
        return jnp.mean(batch**2)

    optimizer = optax.sgd(0.1)
    state, batch = (
        init_state(jax.random.key(0), jnp.ones((8, 16, 16)), optimizer),
        jnp.ones((4096, 16)),
    )
    memory = [
        jax.jit(make_train_step(loss, optimizer, accumulate=k))
        .lower(state, batch)
        .compile()
        .memory_analysis()
        for k in (1, 16)
    ]
    assert memory[1].temp_size_in_bytes < memory[0].temp_size_in_bytes / 4


@pytest.mark.usefixtures("without_type_checks")
def test_a_batch_that_cannot_be_split_is_refused():
    optimizer = optax.sgd(0.1)
    for accumulate in (0, -1, 2.0, None):
        with pytest.raises(
            ValueError, match=f"accumulate: expected a positive integer, got {accumulate}"
        ):
            make_train_step(squared_error, optimizer, accumulate=accumulate)
    step = make_train_step(squared_error, optimizer, accumulate=3)
    with pytest.raises(
        ValueError, match=r"multiple of accumulate=3, got shape \(8, 3\) at batch\['x'\]"
    ):
        step(new_state(optimizer), regression(8))
    with pytest.raises(
        ValueError, match=r"multiple of accumulate=3, got shape \(\) at batch\['i'\]"
    ):
        step(new_state(optimizer), {"i": 0, **regression(9)})


def test_a_step_that_is_finite_is_not_changed_by_skipping():
    optimizer = optax.adam(0.1)
    plain, _ = make_train_step(squared_error, optimizer)(new_state(optimizer), regression())
    skipping, metrics = make_train_step(squared_error, optimizer, skip_nonfinite=True)(
        new_state(optimizer), regression()
    )
    assert int(metrics["skipped"]) == 0
    for a, b in zip(jax.tree.leaves(plain[:3]), jax.tree.leaves(skipping[:3]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def on_devices():
    """The losses and states of one run, with different numbers of devices."""
    worker = pathlib.Path(__file__).parents[1] / "devices_worker.py"
    out = subprocess.run(
        [sys.executable, worker], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "placed", ["data 2", "data 8", "fsdp 8", "data 2, model 4", "micro data 8"]
)
def test_any_number_of_devices_trains_the_model_of_one(on_devices, placed):
    losses, state = on_devices[placed]
    expected_losses, expected_state = on_devices[
        "micro one" if placed.startswith("micro") else "one"
    ]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)
    for name, leaf in state.items():
        np.testing.assert_allclose(leaf, expected_state[name], rtol=1e-12, atol=1e-14, err_msg=name)


def test_micro_batches_leave_the_examples_on_their_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer = optax.sgd(0.1)
    batch = jax.device_put(regression(16), jax.NamedSharding(mesh, jax.P("data")))
    state = jax.device_put(new_state(optimizer), jax.NamedSharding(mesh, jax.P()))
    program = (
        jax.jit(make_train_step(squared_error, optimizer, accumulate=2))
        .lower(state, batch)
        .compile()
        .as_text()
    )
    assert "all-reduce(" in program
    assert not re.search(r"all-to-all\(|all-gather\(|collective-permute\(", program)
