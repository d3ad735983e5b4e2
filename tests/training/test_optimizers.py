"""Every transformation of optax and optax.contrib takes a step whose state is donated, or is
refused by name.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from diffjax.training import init_state, make_train_step

SGD = optax.sgd(0.1)
INNER_STEP = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


# What the constructors require, by the names of their parameters.
ARGUMENTS = {
    **dict.fromkeys(["learning_rate", "clipping", "step_size", "eta"], 0.1),
    **dict.fromkeys(
        ["max_delta", "threshold", "max_norm", "l2_norm_clip", "noise_multiplier"], 1.0
    ),
    **dict.fromkeys(["decay", "gamma", "slow_step_size"], 0.5),
    **dict.fromkeys(
        ["max_backtracking_steps", "max_linesearch_steps", "max_consecutive_errors", "sync_period"],
        2,
    ),
    **dict.fromkeys(["inner", "optimizer", "base_optimizer", "fast_optimizer", "tx"], SGD),
    **{"mask": {"w": False, "b": True}, "freeze_mask": {"w": False, "b": True}},
    **{"seed": 0, "step_size_fn": lambda step: 0.1, "f": lambda g, p=None: g},
    **{"should_transform_fn": lambda step, *_, **__: step >= 0},
    **{"transforms": {"a": SGD, "b": optax.polyak_sgd()}, "param_labels": {"w": "a", "b": "b"}},
    **{"measure": optax.tree.norm, "measure_name": "norm", "measures": {"norm": optax.tree.norm}},
}


COMPOSED = {
    "chain": lambda: optax.chain(
        optax.clip(1.0), optax.polyak_sgd(), optax.contrib.reduce_on_plateau()
    ),
    "named_chain": lambda: optax.named_chain(
        ("clip", optax.clip(1.0)), ("polyak", optax.polyak_sgd())
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.polyak_sgd)(max_learning_rate=1.0),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(
        learning_rate=0.1
    ),
    "masked": lambda: optax.masked(optax.polyak_sgd(), {"w": True, "b": False}),
    "measure_with_ema": lambda: optax.monitor(
        {"norm": optax.measure_with_ema(optax.tree.norm, 0.5)}
    ),
    "sam": lambda: optax.contrib.sam(SGD, INNER_STEP, opaque_mode=True),
    "scale_by_muon": lambda: optax.masked(
        optax.contrib.scale_by_muon(
            weight_dimension_numbers=functools.partial(
                jax.tree.map, lambda g: optax.contrib.MuonDimensionNumbers()
            )
        ),
        {"w": True, "b": False},
    ),
}


REFUSED = {"apply_every", "differentially_private_aggregate", "dpsgd", "lookahead"}
UNANNOTATED = {
    "dog",
    "dowg",
    "hutchinson_estimator_diag_hessian",
    "monitor",
    "scale_by_factored_rms",
}


def build(constructor, required):
    return constructor(**{name: ARGUMENTS[name] for name in required})


def constructors():
    """The name and the constructor of every transformation, each function once."""
    seen = set()
    for module in (optax, optax.contrib):
        for name, constructor in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(constructor) or constructor in seen:
                continue
            seen.add(constructor)
            signature = inspect.signature(constructor)
            if name in UNANNOTATED or "GradientTransformation" in str(signature.return_annotation):
                required = [p.name for p in signature.parameters.values() if p.default is p.empty]
                yield name, COMPOSED.get(name, functools.partial(build, constructor, required))


CONSTRUCTORS = dict(constructors())
PARAMS = {
    "w": np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3),
    "b": np.full(3, 0.5, np.float32),
}
BATCH = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def loss(params, key, batch):
    return jnp.mean((batch @ params["w"] + params["b"][None] - 1) ** 2)


@pytest.fixture(autouse=True)
def _as_optax_runs():
    """Some of its transformations promote ranks."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:optax", "ignore:Specifying a key:UserWarning"
)
@pytest.mark.parametrize("name", sorted(CONSTRUCTORS.keys() - REFUSED))
def test_every_optimizer_takes_steps_that_donate_the_state(name):
    optimizer = CONSTRUCTORS[name]()
    params = jax.tree.map(jnp.asarray, PARAMS)
    step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
    state, metrics = step(init_state(jax.random.key(0), params, optimizer), BATCH)
    state, metrics = step(state, BATCH)
    assert int(state.step) == 2 and np.isfinite(metrics["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema)))
    assert any((state.params[key] != PARAMS[key]).any() for key in PARAMS) == (
        name != "set_to_zero"
    )
    np.testing.assert_array_equal(params["w"], PARAMS["w"])  # the caller's are alive


REFUSALS = {
    "MultiSteps": (optax.MultiSteps(SGD, 4), "MultiStepsState: use accumulate=k"),
    "its transformation": (
        optax.MultiSteps(SGD, 4).gradient_transformation(),
        "MultiStepsState: use accumulate=k",
    ),
    "in a chain": (
        optax.chain(optax.clip(1.0), optax.apply_every(4)),
        "ApplyEvery: use accumulate=k",
    ),
    "transparent sam": (
        optax.contrib.sam(SGD, INNER_STEP),
        r"SAMState: use .*sam\(\.\.\., opaque_mode=True\)",
    ),
    "lookahead": (
        optax.lookahead(SGD, 2, 0.5),
        r"LookaheadState: it needs the gradient of `params.fast` alone",
    ),
    "private": (
        optax.contrib.differentially_private_aggregate(1.0, 1.0, key=jax.random.key(0)),
        "DifferentiallyPrivateAggregateState: it needs the gradient of each example",
    ),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", REFUSALS)
def test_an_update_that_is_no_whole_step_is_refused(name):
    optimizer, message = REFUSALS[name]
    state = init_state(jax.random.key(0), PARAMS, optimizer)
    with pytest.raises(
        ValueError, match=f"optimizer: expected one whose update is a whole step, .* {message}"
    ):
        jax.eval_shape(make_train_step(loss, optimizer), state, BATCH)


def quadratic(params, key, batch):
    """|params|^2 / 2: the gradient is params."""
    return 0.5 * jnp.sum(params**2)


# The optimizer, and what it multiplies the parameters (3, -4) by.
WANTS = {
    # Polyak's step is (loss - its minimum) / |gradient|^2 = 1 / 2 times the gradient.
    "the loss": (optax.polyak_sgd(max_learning_rate=10.0), 0.5),
    "in a chain": (optax.chain(optax.identity(), optax.polyak_sgd(max_learning_rate=10.0)), 0.5),
    # The step of sam is the gradient at w + 0.05 w / |w|, for |w| = 5.
    "its gradient elsewhere": (
        optax.contrib.sam(SGD, INNER_STEP, opaque_mode=True),
        1 - 0.1 * (1 + 0.05 / 5),
    ),
    # The first step of length 4 to give enough decrease is halved twice: 4 and 2 lead to |w| = 15
    # and 5.
    "its values elsewhere": (
        optax.chain(optax.sgd(4.0), optax.scale_by_backtracking_linesearch(9, decrease_factor=0.5)),
        0.0,
    ),
}


@pytest.mark.parametrize("name", WANTS)
def test_an_optimizer_gets_what_it_asks_for(name):
    optimizer, expected = WANTS[name]
    state = init_state(jax.random.key(0), jnp.array([3.0, -4.0]), optimizer)
    state, _ = make_train_step(quadratic, optimizer)(state, None)
    np.testing.assert_allclose(state.params, expected * np.array([3.0, -4.0]), rtol=1e-6, atol=1e-6)
