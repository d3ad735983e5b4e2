"""The state of a training run, and one step of it."""

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
from jaxtyping import Array, PRNGKeyArray

from .._checks import accepted, check_alive, described
from .ema import constant_ema

__all__ = ["TrainState", "init_state", "make_train_step"]


class TrainState(NamedTuple):
    """Everything that training changes, as one pytree."""

    params: Any
    """The parameters, a pytree of arrays."""
    ema: Any
    """Their moving average, of the same structure, for sampling. It is float32 or better, whatever
    the dtype of the parameters; `optax.tree.cast_like(state.ema, state.params)` converts it."""
    opt_state: Any
    """The state of the optax optimizer."""
    step: Array
    """The number of steps taken, int32."""
    key: PRNGKeyArray
    """The key of the whole run; step k uses `fold_in(key, k)`."""


def init_state(
    key: PRNGKeyArray, params: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step. The average starts at the parameters.

    All its arrays are copies, including those of the optimizer's state. So a step that donates its
    state leaves the caller's key and parameters alive, and donates no buffer twice.

    Args:
        key: the key of the whole run.
        params: a pytree of floating-point arrays. For a Flax NNX module it is the second result of
            `functional`, for a linen module the result of its `init`, for an Equinox module the
            first result of `eqx.partition(module, eqx.is_inexact_array)`.
        optimizer: the optax transformation that `make_train_step` also gets.

    Returns:
        The state, with step 0.

    Raises:
        ValueError: if an argument is of another kind, or its buffers were donated.

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
    # A copy with a given dtype is not weakly typed. A weak type would make the second step retrace.
    return jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), state)


def make_train_step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    ema: Callable[[Array, Array, Array], Any] = constant_ema(0.999),  # noqa: B008 (a pure function)
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """One step of gradient descent with a moving average.

    The step is a function `(state, batch) -> (state, metrics)`. With `k = state.step + 1` and the
    key `fold_in(state.key, state.step)`:

        g      = grad loss(params, key, batch)
        params = params + optimizer(g)
        ema    = ema(ema, params, k)

    It is not jitted; the usual call is `jax.jit(step, donate_argnums=0)`. A batch that is sharded
    over devices (`jax.device_put(batch, NamedSharding(...))`) gives the same result, because the
    noise is drawn for the whole batch. docs/training.md shows how.

    Args:
        loss: `loss(params, key, batch)` returns a scalar, or a scalar and a dict of scalar metrics.
        optimizer: an optax transformation, including clipping and the learning-rate schedule. Its
            update gets those of optax's extra arguments `value`, `grad`, `value_fn`, `obj_fn` and
            `grad_fn` that it accepts, so line searches and optimizers that adapt to the loss work.
        ema: the new average of one array, as a function `(average, params, k)`:
            `constant_ema(decay)`, `power_ema(gamma)`, or your own. It gets both arrays in float32
            or better.
        accumulate: the number m of micro-batches into which the batch is split, to save memory.
            Loss, metrics and gradient are means over them, and the parameters, the average and the
            count change once. If the loss is a mean over the batch, the step is that of the whole
            batch, except that each micro-batch has its own key, `fold_in(key, i)`. Micro-batch i
            holds the examples i, i + m, i + 2 m, ..., so the examples of a sharded batch stay on
            their devices.
        skip_nonfinite: whether a step whose loss or gradient is not finite leaves params, ema and
            opt_state unchanged. It then sets the metric "skipped" to 1, which is 0 otherwise.

    Returns:
        The step. Its metrics hold "loss", "grad_norm", and what `loss` adds.

    Raises:
        ValueError: if an argument is of another kind. When traced: if the loss is not a scalar, if
            the batch is empty or cannot be split, or if an update of the optimizer is not a whole
            step (such as `optax.MultiSteps`) or needs a gradient other than that of the mean loss.

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
            raise ValueError(
                f"loss: expected a scalar, such as the mean over the batch, "
                f"got shape {jnp.shape(value)}"
            )
        return value, metrics

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        if not isinstance(state, TrainState):
            raise ValueError(
                f"state: expected a TrainState from init_state, got {described(state)}"
            )
        check_alive(state, "state")
        _check_updates(state.opt_state)
        _check_batch(batch, accumulate)
        key = jax.random.fold_in(state.key, state.step)

        def gradient(params):
            def of_part(*args):
                return jax.value_and_grad(objective, has_aux=True)(params, *args)

            mean = _mean_over_parts(of_part, accumulate)
            (value, metrics), grads = mean(jax.random.clone(key), batch)
            return {**metrics, "loss": value}, optax.tree.cast_like(grads, params)

        # A line search calls value_fn with the extra arguments that it does not know itself.
        def value_fn(params, obj_fn=None, grad_fn=None):
            mean = _mean_over_parts(lambda *args: objective(params, *args)[0], accumulate)
            return mean(jax.random.clone(key), batch)

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
            params, average, opt_state = jax.tree.map(
                lambda a, b: jnp.where(ok, a, b), new[:3], state[:3]
            )
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
    optax.LookaheadState: (
        "it needs the gradient of `params.fast` alone; the average of the state replaces it"
    ),
    optax.contrib.DifferentiallyPrivateAggregateState: (
        "it needs the gradient of each example; write this step by hand"
    ),
}


def _check_updates(opt_state):
    """Raises unless one update is a whole step, because each changes the average and the count."""

    def unfit(x):
        return (
            type(x) in _UNFIT and getattr(x, "cache", x) is not None
        )  # sam's opaque mode has none

    for part in jax.tree.leaves(opt_state, is_leaf=unfit):
        if unfit(part):
            raise ValueError(
                f"optimizer: expected one whose update is a whole step, from the gradient of the "
                f"mean loss, got one with the state {type(part).__name__}: {_UNFIT[type(part)]}"
            )


def _check_function(name, fn, expected):
    arguments = expected.partition(")")[0].split(",")
    try:
        inspect.signature(fn).bind(*arguments)
    except TypeError:
        raise ValueError(f"{name}: expected a function {expected}, got {described(fn)}") from None


def _check_optimizer(optimizer):
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"optimizer: expected an optax transformation such as optax.adam(1e-3), "
            f"got {described(optimizer)}"
        )


def _check_key(key):
    dtype = getattr(key, "dtype", None)
    old_style = dtype == jnp.uint32
    if not old_style and not (dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key: expected a key such as jax.random.key(0), got {described(key)}")
    if not old_style and key.shape:
        raise ValueError(f"key: expected one key, got an array of keys of shape {key.shape}")


def _check_params(params):
    check_alive(params, "params")
    for path, leaf in jax.tree.leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, nnx.Module)
    ):
        is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex)
        if not is_array or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            what = f"the dtype {jnp.result_type(leaf)}" if is_array else described(leaf)
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
        def split(x):
            # Neighbours go to different parts, so the examples of a sharded batch stay in place.
            return jnp.moveaxis(jnp.reshape(x, (-1, parts, *jnp.shape(x)[1:])), 1, 0)

        batches = jax.tree.map(split, batch)

        def add(total, part):
            i, batch = part
            new = jax.checkpoint(fn, prevent_cse=False)(jax.random.fold_in(key, i), batch)
            return jax.tree.map(lambda t, x: t + jnp.asarray(x, t.dtype) / parts, total, new), None

        first = jax.tree.map(lambda x: x[0], batches)
        zeros = jax.tree.map(lambda x: _accurate(jnp.zeros_like(x)), jax.eval_shape(fn, key, first))
        return jax.lax.scan(add, zeros, (jnp.arange(parts), batches))[0]

    return mean
