"""Training: a state that is one pytree, a pure step, and a loop.

    apply, params = functional(network)                           # apply(params, x, t) = network(x, t)
    loss = lambda params, key, batch: ...                         # a scalar, by way of `bind(apply, params)`
    step = make_train_step(loss, optimizer, ema=constant_ema(0.999))
    state = init_state(key, params, optimizer)
    state = fit(state, jax.jit(step, donate_argnums=0), batches, num_steps=10_000, directory="runs/mine")
    network = merge(apply, state.ema)

A module is split once into a function and a plain dict of arrays: a dict costs a tenth of a module at each call of a
jitted function, and optax, the average and Orbax need to know nothing of modules. Nothing here depends on diffusion.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray

from diffjax._bind import bind
from diffjax._loop import fit
from diffjax._math import accepted, check_alive, check_number, check_that

__all__ = [
    "TrainState",
    "check_labels",
    "constant_ema",
    "fit",
    "functional",
    "in_memory",
    "init_state",
    "make_train_step",
    "merge",
    "power_ema",
]


class TrainState(NamedTuple):
    """Everything that training changes, as one pytree."""

    params: Any
    """The parameters, a pytree of arrays."""
    ema: Any
    """Their moving average, of the same structure: what to sample with. It is float32 or better,
    whatever the dtype of the parameters; `optax.tree.cast_like(state.ema, state.params)` has theirs."""
    opt_state: Any
    """The state of the optax optimizer."""
    step: Array
    """The number of steps taken, int32."""
    key: PRNGKeyArray
    """The key of the whole run; step k uses `fold_in(key, k)`."""


def functional(module: nnx.Module) -> tuple[Partial, dict]:
    """Splits a Flax NNX module into a pure function and its parameters: `apply(params, *args) = module(*args)`.

    Args:
        module: a module all of whose arrays are `nnx.Param`.

    Returns:
        `apply`, and `params`, a nested dict of arrays. `bind(apply, params)` is a network like the module.

    Raises:
        ValueError: if it is no NNX module, or holds other variables, which a pure function cannot
            update: batch statistics, or the keys of a dropout layer that was made with `rngs`. A
            layer made without, `nnx.Dropout(rate)`, gets its key when it is called.

    >>> module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> apply, params = functional(module)
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (3,), 'kernel': (2, 3)}
    >>> x = jnp.ones(2)
    >>> bool((apply(params, x) == module(x)).all())
    True
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"module: expected an nnx.Module, got {_described(module)}; of Equinox, use "
            f"eqx.partition(module, eqx.is_inexact_array), of linen module.apply and module.init"
        )
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    if rest:
        names = [f"{'.'.join(map(str, path))}: {type(leaf).__name__}" for path, leaf in nnx.to_flat_state(rest)]
        raise ValueError(
            f"module: expected every variable to be an nnx.Param, got {', '.join(names)}; construct "
            f"dropout layers without rngs, and give the key at the call"
        )
    return bind(_apply, graph), nnx.to_pure_dict(state)


def merge(apply: Partial, params: Any) -> nnx.Module:
    """The way back from `functional`: the module with these parameters.

    Raises:
        ValueError: if `apply` is not from `functional`, or `params` are not the module's parameters.

    >>> apply, params = functional(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> merge(apply, jax.tree.map(jnp.zeros_like, params))(jnp.ones(2))
    Array([0., 0., 0.], dtype=float32)
    """
    if not (isinstance(apply, Partial) and apply.func is _apply and len(apply.args) == 1):
        raise ValueError(f"apply: expected the function that functional(module) returned, got {_described(apply)}")
    check_alive(params, "params")
    try:
        return nnx.merge(apply.args[0], params)
    except ValueError as error:
        raise ValueError(
            f"params: expected the parameters of the module, such as state.ema, got {_described(params)}"
        ) from error


def _apply(graph, params, *args, **kwargs):
    return nnx.merge(graph, params)(*args, **kwargs)


def init_state(key: PRNGKeyArray, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the parameters.

    All its arrays are copies, those of the optimizer's state included. So a step that donates its
    state leaves the caller's key and parameters alive, and gives no buffer away twice.

    Args:
        key: the key of the whole run.
        params: a pytree of floating-point arrays: of a Flax NNX module the second result of
            `functional`, of a linen module what its `init` returns, of an Equinox module the first
            result of `eqx.partition(module, eqx.is_inexact_array)`.
        optimizer: the optax transformation that `make_train_step` gets, too.

    Raises:
        ValueError: if an argument is not of that kind, or its buffers were donated.

    >>> state = init_state(jax.random.key(0), {"w": jnp.ones(2)}, optax.sgd(0.1))
    >>> state.ema, int(state.step)
    ({'w': Array([1., 1.], dtype=float32)}, 0)
    """
    _check_key(key)
    _check_params(params)
    _check_optimizer(optimizer)
    ema = jax.tree.map(_accurate, params)
    key = jax.random.wrap_key_data(jax.random.key_data(key), impl=jax.random.key_impl(key))
    state = TrainState(params, ema, optimizer.init(params), jnp.zeros((), jnp.int32), key)
    # With its dtype given, the copy is not weakly typed. A weak type would make the second step retrace.
    return jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), state)


def constant_ema(decay: float) -> Partial:
    """An average that forgets at a constant rate: `ema <- decay ema + (1 - decay) params`.

    Args:
        decay: a number in [0, 1].

    Returns:
        The new average as a function `(average, params, step)`, the `ema` of `make_train_step`.

    Raises:
        ValueError: if decay is not in [0, 1].

    >>> constant_ema(0.75)(0.0, 1.0, 1)
    0.25
    """
    check_number(decay, "decay", 0, 1)
    return bind(_move, 1 - decay)


def _move(weight, average, params, step):
    return average + weight * (params - average)


def power_ema(gamma: float = 6.94) -> Partial:
    """The power-function average, whose weights grow as step^gamma and so stretch with the length of the run.

    `ema <- decay ema + (1 - decay) params` with `decay = (1 - 1 / step)^(gamma + 1)` (Karras et al.
    2024, https://arxiv.org/abs/2312.02696, equation 2). The weights' standard deviation relative to
    the run's length is `sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))`: 0.10 for gamma = 6.94 and
    0.05 for 16.97.

    Args:
        gamma: a number above -1.

    Returns:
        The new average as a function `(average, params, step)`, the `ema` of `make_train_step`. The
        steps count from 1. The first step replaces the average.

    Raises:
        ValueError: if gamma <= -1.

    >>> power_ema(1.0)(0.0, 1.0, 2)  # 1 - decay
    Array(0.75, dtype=float32, ...)
    """
    check_that(lambda g: g > -1, "gamma: expected a number above -1, got {}", gamma)
    return bind(_power_ema, gamma)


def _power_ema(gamma, average, params, step):
    # 1 - decay, which is of the order of 1 / step: a decay near 1 would lose its digits.
    weight = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / step))
    return _move(weight, average, params, step)


def make_train_step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    ema: Callable[[Array, Array, Array], Any] = constant_ema(0.999),  # noqa: B008 (a pure function)
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """One step of gradient descent with a moving average: a function `(state, batch) -> (state, metrics)`.

    With `k = state.step + 1` and the key `fold_in(state.key, state.step)`:

        g      = grad loss(params, key, batch)
        params = params + optimizer(g)
        ema    = ema(ema, params, k)

    It is not jitted: `jax.jit(step, donate_argnums=0)` is the usual way to call it. With a batch that
    is sharded over devices (`jax.device_put(batch, NamedSharding(...))`) the jitted step is the same
    step, because its noise is drawn for the whole batch. docs/training.md shows how.

    Args:
        loss: `loss(params, key, batch)` returns a scalar, or a scalar and a dict of scalar metrics.
        optimizer: an optax transformation, clipping and learning-rate schedule included. Its update
            gets what it asks for of optax's extra arguments `value`, `grad`, `value_fn`, `obj_fn` and
            `grad_fn`, so line searches and optimizers that adapt to the loss work, too.
        ema: the new average of one array, as a function `(average, params, k)`: `constant_ema(decay)`,
            `power_ema(gamma)`, or your own. It gets both arrays in float32 or better.
        accumulate: the number m of micro-batches into which the batch is split, to save memory. Loss,
            metrics and gradient are means over them, and the parameters, the average and the count
            move once. For a loss that is a mean over the batch the step is that of the whole batch,
            except that each micro-batch has its own key, `fold_in(key, i)`. Micro-batch i holds the
            examples i, i + m, i + 2 m, ..., so the examples of a sharded batch stay on their devices.
        skip_nonfinite: whether a step whose loss or gradient is not finite leaves params, ema and
            opt_state as they were (and sets the metric "skipped" to 1, which is 0 otherwise).

    Returns:
        The step. Its metrics hold "loss", "grad_norm", and what `loss` adds.

    Raises:
        ValueError: if an argument is not of its kind. When traced: if the loss is not a scalar, the
            batch is empty or cannot be split, or an update of the optimizer is not a whole step
            (`optax.MultiSteps`, say) or needs another gradient than that of the mean loss.

    >>> def loss(params, key, batch):
    ...     return jnp.mean((batch @ params["w"] - 1.0) ** 2)
    >>> optimizer = optax.sgd(0.25)
    >>> state = init_state(jax.random.key(0), {"w": jnp.zeros(2)}, optimizer)
    >>> state, metrics = make_train_step(loss, optimizer, ema=constant_ema(0.5))(state, jnp.eye(2))
    >>> state.params, state.ema
    ({'w': Array([0.25, 0.25], dtype=float32)}, {'w': Array([0.125, 0.125], dtype=float32)})
    """
    _check_function("loss", loss, "(params, key, batch) -> a scalar")
    _check_optimizer(optimizer)
    _check_function("ema", ema, "(average, params, step) -> average, such as constant_ema(0.999)")
    if not (isinstance(accumulate, int | np.integer) and accumulate >= 1):
        raise ValueError(f"accumulate: expected a positive integer, got {accumulate}")

    def objective(params, key, batch):
        value = loss(params, key, batch)
        value, metrics = value if isinstance(value, tuple) else (value, {})
        if jnp.shape(value) != ():
            raise ValueError(f"loss: expected a scalar (the mean over the batch, say), got shape {jnp.shape(value)}")
        return value, metrics

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        if not isinstance(state, TrainState):
            raise ValueError(f"state: expected a TrainState from init_state, got {_described(state)}")
        check_alive(state, "state")
        _check_updates(state.opt_state)
        _check_batch(batch, accumulate)
        key = jax.random.fold_in(state.key, state.step)

        def gradient(params):
            part = lambda *args: jax.value_and_grad(objective, has_aux=True)(params, *args)  # noqa: E731
            (value, metrics), grads = _mean_over_parts(part, accumulate)(jax.random.clone(key), batch)
            return {**metrics, "loss": value}, optax.tree.cast_like(grads, params)

        # A line search calls value_fn with the extra arguments that it does not know itself.
        def value_fn(params, obj_fn=None, grad_fn=None):
            part = lambda *args: objective(params, *args)[0]  # noqa: E731
            return _mean_over_parts(part, accumulate)(jax.random.clone(key), batch)

        metrics, grads = gradient(state.params)
        extra = {
            **{"value": metrics["loss"], "grad": grads, "value_fn": value_fn, "obj_fn": value_fn},
            "grad_fn": lambda params, _: gradient(params)[1],
        }
        extra = accepted(optimizer.update, extra)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        average = jax.tree.map(functools.partial(_average, ema, state.step + 1), state.ema, params)
        new = TrainState(params, average, opt_state, state.step + 1, state.key)

        # In float32 this is the same expression as in optax's clipping, so it is computed once.
        metrics["grad_norm"] = optax.tree.norm(jax.tree.map(_accurate, grads))
        if skip_nonfinite:
            ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            params, average, opt_state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new[:3], state[:3])
            new = new._replace(params=params, ema=average, opt_state=opt_state)
            metrics["skipped"] = jnp.where(ok, 0, 1)
        return new, metrics

    return step


def _accurate(x):
    """The array in float32 or better, for sums of many small terms."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _average(ema, step, average, params):
    average = _accurate(average)
    return jnp.asarray(ema(average, jnp.asarray(params, average.dtype), step), average.dtype)


_UNFIT = {
    optax.MultiStepsState: "use accumulate=k of make_train_step and a batch k times as large",
    optax.ApplyEvery: "use accumulate=k of make_train_step and a batch k times as large",
    optax.contrib.SAMState: "use optax.contrib.sam(..., opaque_mode=True)",
    optax.LookaheadState: "it wants the gradient of `params.fast` alone; the average of the state does its work",
    optax.contrib.DifferentiallyPrivateAggregateState: "it wants the gradient of each example; write this step by hand",
}


def _check_updates(opt_state):
    """Raises unless one update is one whole step, because each moves the average and the count."""
    # The opaque mode of sam has no cache.
    unfit = lambda x: type(x) in _UNFIT and getattr(x, "cache", x) is not None  # noqa: E731
    for part in jax.tree.leaves(opt_state, is_leaf=unfit):
        if unfit(part):
            raise ValueError(
                f"optimizer: expected one whose update is a whole step, from the gradient of the mean "
                f"loss, got one with the state {type(part).__name__}: {_UNFIT[type(part)]}"
            )


def _described(x):
    """What a wrong argument is, for an error message."""
    if inspect.isfunction(x):
        return f"the function {x.__name__}({', '.join(inspect.signature(x).parameters)})"
    if isinstance(x, type) or inspect.isroutine(x):
        return x.__name__
    return repr(x) if isinstance(x, bool | int | float | str | None) else f"an instance of {type(x).__name__}"


def _check_function(name, fn, expected):
    arguments = expected.partition(")")[0].split(",")
    try:
        inspect.signature(fn).bind(*arguments)
    except TypeError:
        raise ValueError(f"{name}: expected a function {expected}, got {_described(fn)}") from None


def _check_optimizer(optimizer):
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"optimizer: expected an optax transformation such as optax.adam(1e-3), got {_described(optimizer)}"
        )


def _check_key(key):
    dtype = getattr(key, "dtype", None)
    old_style = dtype == jnp.uint32
    if not old_style and not (dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key: expected a key such as jax.random.key(0), got {_described(key)}")
    if not old_style and key.shape:
        raise ValueError(f"key: expected one key, got an array of keys of shape {key.shape}")


def _check_params(params):
    check_alive(params, "params")
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Module)):
        is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex)
        if not is_array or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            what = f"the dtype {jnp.result_type(leaf)}" if is_array else _described(leaf)
            raise ValueError(
                f"params: expected a pytree of floating-point arrays, got {what} at "
                f"params{jax.tree_util.keystr(path)}; split a network first: "
                f"apply, params = functional(module) for Flax NNX, "
                f"params, rest = eqx.partition(module, eqx.is_inexact_array) for Equinox, "
                f"params = module.init(...) for linen"
            )


def _check_batch(batch, parts):
    for path, leaf in jax.tree.leaves_with_path(batch):
        shape = jnp.shape(leaf)
        if 0 in shape:
            raise ValueError(f"batch: expected examples, got an array of shape {shape}")
        if parts > 1 and (not shape or shape[0] % parts):
            raise ValueError(
                f"batch: expected a leading size that is a multiple of accumulate={parts}, "
                f"got shape {shape} at batch{jax.tree_util.keystr(path)}"
            )


def _mean_over_parts(fn, parts):
    """The mean of `fn(key, batch)`, a pytree, over parts of the batch, one after the other."""
    if parts == 1:
        return fn

    def mean(key, batch):
        # Neighbours go to different parts, so the examples of a sharded batch stay on their devices.
        split = lambda x: jnp.moveaxis(jnp.reshape(x, (-1, parts, *jnp.shape(x)[1:])), 1, 0)  # noqa: E731
        batches = jax.tree.map(split, batch)

        def add(total, part):
            i, batch = part
            new = jax.checkpoint(fn, prevent_cse=False)(jax.random.fold_in(key, i), batch)
            return jax.tree.map(lambda t, x: t + jnp.asarray(x, t.dtype) / parts, total, new), None

        first = jax.tree.map(lambda x: x[0], batches)
        zeros = jax.tree.map(lambda x: _accurate(jnp.zeros_like(x)), jax.eval_shape(fn, key, first))
        return jax.lax.scan(add, zeros, (jnp.arange(parts), batches))[0]

    return mean


def in_memory(arrays: Any, batch_size: int, *, seed: int = 0) -> Callable[[int], Any]:
    """Batches of a data set that fits in memory, as a pure function of the step; so resuming needs no iterator state.

    Each epoch is a new permutation of the examples. Epochs follow on one another without a gap: a batch may hold the
    end of one and the start of the next, and no example is dropped.

    Args:
        arrays: a pytree of arrays (images and labels, say) with the same leading size n.
        batch_size: examples a batch, from 1 to n.
        seed: the seed of the permutations.

    Returns:
        `step -> batch`, of the structure of `arrays`, as numpy arrays.

    Raises:
        ValueError: on an empty data set, leading sizes that differ, values that are not finite or not numbers, or a
            batch_size outside [1, n].

    >>> batches = in_memory({"x": np.arange(5)}, 3)
    >>> sorted(np.concatenate([batches(i)["x"] for i in range(5)]).tolist())
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    """
    leaves, structure = jax.tree.flatten_with_path(arrays)
    named = {f"arrays{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    for name, array in named.items():
        _check_data(name, array)
    sizes = {name: len(array) for name, array in named.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"in_memory: all arrays must have the same leading size, got {sizes or 'no array'}")
    n = next(iter(sizes.values()))
    if not 1 <= batch_size <= n:
        raise ValueError(f"in_memory: batch_size must lie in [1, {n}] for {n} examples, got {batch_size}")

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(n)

    def batch(step: int):
        epoch, start = divmod(int(step) * batch_size, n)
        index = order(epoch)[start : start + batch_size]
        if len(index) < batch_size:
            index = np.concatenate([index, order(epoch + 1)[: batch_size - len(index)]])
        return jax.tree.unflatten(structure, [array[index] for array in named.values()])

    return batch


def _check_data(name: str, array: np.ndarray) -> None:
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"in_memory: {name} must hold numbers, got dtype {array.dtype}")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"in_memory: {name} must hold at least one example, got shape {array.shape}")
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"in_memory: {name} must be finite, got {array[tuple(index)]} at {tuple(index.tolist())}")


def check_labels(labels: Any, num_classes: int) -> np.ndarray:
    """The labels of a data set as int32, if they are class labels.

    Raises:
        ValueError: if they are not integers, or one lies outside [0, num_classes).

    >>> check_labels([0, 2, 1], 3)
    array([0, 2, 1], dtype=int32)
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"check_labels: labels must be integers, got dtype {labels.dtype}")
    bad = np.argwhere((labels < 0) | (labels >= num_classes))
    if len(bad):
        index = tuple(bad[0].tolist())
        raise ValueError(f"check_labels: labels must lie in [0, {num_classes}), got {labels[index]} at {index}")
    return labels.astype(np.int32)
