"""The training loop: a host loop around a step, with its progress bar, logs and checkpoints."""

import contextlib
import math
import operator
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_alive
from . import checkpoints
from ._fingerprint import fingerprint, named, text
from ._log import metrics_log, progress_bar, say
from ._processes import Signals, Stop, gather, is_main

__all__ = ["fit"]

_MOST_SKIPPED = 1000


def fit(
    state: Any,
    step: Callable[[Any, Any], tuple[Any, dict]],
    batches: Callable[[int], Any] | Iterator,
    num_steps: int,
    *,
    directory: str | pathlib.Path | None = None,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    keep: int = 3,
    callback: Callable[[int, Any], None] | None = None,
    callback_every: int = 1000,
    tensorboard: bool = False,
    progress: bool = True,
) -> Any:
    """Trains until `num_steps` steps have been taken, from the newest checkpoint in `directory`.

    The same command continues a run that was stopped anywhere, and ends (on the same devices) with
    bitwise the same parameters as if it had never been stopped. On SIGTERM and on Ctrl-C the loop
    saves a checkpoint, and exits with status 143 or by `KeyboardInterrupt`, even while it waits for
    a batch. A second Ctrl-C ends it at once, without a checkpoint. Metrics are copied from the
    device only when they are logged.

    Over several processes (`jax.distributed`), each process calls `fit` with the same arguments and
    a folder that all of them see. A SIGTERM to one stops all of them at the same step. Only process
    0 writes logs.

    Args:
        state: a `TrainState`. If `step` donates it, it is gone afterwards.
        step: `(state, batch) -> (state, metrics)`, from `make_train_step`, jitted by the caller.
        batches: a function `step -> batch` such as `in_memory`, or an iterator. Checkpoints store
            the position of grain's iterators; any other iterator needs `directory=None`.
        num_steps: the total number of steps, including those of earlier runs.
        directory: where to keep `checkpoints/`, `metrics.jsonl` and `tensorboard/`; None to write
            nothing. One run at a time may use it.
        log_every: steps between two lines of `metrics.jsonl`. Each holds means over the steps since
            the last one.
        checkpoint_every: steps between two checkpoints. The last step always has one.
        keep: how many checkpoints to keep.
        callback: called as `callback(step, state)`, for example to draw samples. It must not keep
            the state.
        callback_every: steps between two calls.
        tensorboard: whether to write the metrics for TensorBoard as well (needs tensorboardX).
        progress: whether to show a progress bar with loss, speed and time left (needs tqdm).

    Returns:
        The final state.

    Warns:
        UserWarning: if a run continues with batches other than those it had, or with another
            `jax_enable_x64`; and as `checkpoints.restore`.

    Raises:
        FloatingPointError: if a loss or a gradient norm is not finite; if the parameters, their
            average or the optimizer's state are not finite at a checkpoint or at the end; or if
            `skip_nonfinite` skipped every step of the run, or 1000 in a row. It names the step and
            the last checkpoint.
        ValueError: if the arguments are in another order, or an interval is below 1; if `batches`
            ends early, or cannot be saved or resumed; and as `checkpoints.restore`.
        OSError: as `checkpoints.save` and `checkpoints.restore`.
        RuntimeError: if another run writes to `directory`; it names that process.

    Clipping, warm-up and a cosine schedule are optax's:

    >>> import optax
    >>> from diffjax.training import in_memory, init_state, make_train_step
    >>> rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=10, decay_steps=100)
    >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    >>> def loss(params, key, batch):
    ...     return jnp.mean((batch["x"] * params["slope"] - batch["y"]) ** 2)
    >>> batches = in_memory({"x": np.arange(8.0), "y": 3 * np.arange(8.0)}, batch_size=4)
    >>> step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
    >>> state = init_state(jax.random.key(0), {"slope": jnp.zeros(())}, optimizer)
    >>> state = fit(state, step, batches, num_steps=100, progress=False)
    >>> bool(abs(state.params["slope"] - 3) < 0.1)
    True
    """
    _check_order(state, step)
    source = _Batches(batches, must_resume=directory is not None)
    intervals = {
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "callback_every": callback_every,
    }
    for name, value in intervals.items():
        if operator.index(value) < 1:
            raise ValueError(
                f"{name}: expected a number of steps of at least 1, got {value}; "
                f"to switch it off, pass more than num_steps"
            )
    if tensorboard and directory is None:
        raise ValueError("directory: expected a folder for tensorboard=True, got None")
    progress = progress and is_main()
    with contextlib.ExitStack() as stack:
        manager = None
        if directory is not None:
            directory = pathlib.Path(directory)
            # The folder is locked first, so that no other run writes what is read here.
            manager = stack.enter_context(checkpoints.manager(directory / "checkpoints", keep=keep))
            state = _resume(directory / "checkpoints", state, source, progress)
        check_alive(state, "state")
        saved = done = int(state.step)
        if done >= num_steps:
            say(f"fit: {done} steps are done, num_steps is {num_steps}: nothing to do", progress)
        signals = stack.enter_context(Signals(enabled=manager is not None))
        write = stack.enter_context(
            metrics_log(directory if is_main() else None, done, tensorboard)
        )
        bar = stack.enter_context(progress_bar(done, num_steps)) if progress else None
        log = _Log(write, bar, lambda: _last_checkpoint(manager))

        def save() -> None:
            log.flush(done)
            log.require_a_step(done, last=done == num_steps)
            if not (finite := _finite(state)).all():
                parts = ", ".join(np.array(_PARTS)[~finite])
                raise FloatingPointError(
                    f"{parts}: not finite after step {done}; {_last_checkpoint(manager)}"
                )
            if manager is not None:
                checkpoints.save(manager, done, state, source.record(done))

        try:
            while done < num_steps:
                batch = signals.interrupt(source.draw, done)
                state, metrics = step(state, batch)
                done += 1
                log.add(metrics)
                call = done % callback_every == 0
                if done == num_steps or done % checkpoint_every == 0:
                    save()
                    saved = done
                elif call or done % log_every == 0:
                    log.flush(done)
                if callback is not None and call:
                    callback(done, state)
                signals.check(done)
        except Stop:
            if saved < done:
                save()
            if manager is not None:
                checkpoints.wait(manager)
            raise signals.error() from None
        if manager is not None:
            checkpoints.wait(manager)
    return state


def _check_order(state: Any, step: Any) -> None:
    order = "fit(state, step, batches, num_steps)"
    if not hasattr(state, "step"):
        got = type(state).__name__
        raise ValueError(f"state: expected a TrainState (see init_state), got {got}; {order}")
    if not callable(step):
        got = type(step).__name__
        raise ValueError(f"step: expected a function (see make_train_step), got {got}; {order}")


class _Batches:
    """The source of the batches, a function of the step or an iterator, and how to resume it."""

    def __init__(self, batches: Any, must_resume: bool) -> None:
        self._batches = batches
        self._is_iterator = hasattr(batches, "__next__")
        self._resumes = must_resume
        if not self._is_iterator and not callable(batches):
            raise ValueError(
                f"batches: expected a function of the step or an iterator, got {type(batches)}"
            )
        has_place = hasattr(batches, "get_state") and hasattr(batches, "set_state")
        if self._is_iterator and must_resume and not has_place:
            raise ValueError(
                f"batches: expected a function of the step or an iterator with get_state and "
                f"set_state (as grain's), to resume from checkpoints, got {type(batches)}"
            )
        self._last: tuple[Any, Any] | None = None  # the position before the last batch, and it
        self._drawing: Any = None  # the position before a batch that is being drawn

    def draw(self, step: int) -> Any:
        if not self._is_iterator:
            batch = self._batches(step)
            self._last = None, batch
            return batch
        self._drawing = self._place() if self._resumes else None
        try:
            batch = next(self._batches)
        except StopIteration:
            raise ValueError(
                f"batches: expected num_steps batches, got {step}; "
                f"repeat the data set, or lower num_steps"
            ) from None
        self._last, self._drawing = (self._drawing, batch), None
        return batch

    def _place(self) -> Any:
        state = self._batches.get_state()
        return state.decode() if isinstance(state, bytes) else state

    def _go_to(self, place: Any) -> None:
        self._batches.set_state(place.encode() if isinstance(place, str) else place)

    def record(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the batches, for each process."""
        mine: dict[str, Any] = {}
        if self._is_iterator:
            mine["place"] = self._place() if self._drawing is None else self._drawing
        if self._last is not None:
            before, batch = self._last
            mine["last"] = {"before": before, "arrays": fingerprint(named(batch))()}
        return {
            "iterator": self._is_iterator,
            "x64": jnp.result_type(float) == jnp.float64,
            "processes": gather(mine),
        }

    def resume(self, step: int, data: dict[str, Any], directory: pathlib.Path) -> None:
        """Continues where a checkpoint of that step was saved, and warns of what has changed."""
        if data["iterator"] != self._is_iterator:
            kinds = ("an iterator", "a function of the step")
            was, now = kinds if data["iterator"] else kinds[::-1]
            raise ValueError(
                f"batches: expected {was}, as in the run in {directory}, got {now}; "
                f"pass what the run had, or another directory"
            )
        count, processes = len(data["processes"]), jax.process_count()
        if count != processes:
            if self._is_iterator:
                raise ValueError(
                    f"batches: expected the {count} iterators of {count} processes whose positions "
                    f"were saved in {directory}, got {processes}; resume with {count} processes"
                )
            return
        mine = data["processes"][jax.process_index()]
        if (last := mine.get("last")) is None:
            if self._is_iterator:
                self._go_to(mine["place"])
            return
        # The last batch that the run saw is drawn again, to see that it is the same.
        if self._is_iterator:
            self._go_to(last["before"])
        batch = self.draw(step - 1)
        if self._is_iterator and self._place() != mine["place"]:
            self._go_to(mine["place"])
        _warn_if_other(step, last["arrays"], fingerprint(named(batch))())


def _warn_if_other(step: int, was: dict[str, list], now: dict[str, list]) -> None:
    shapes_were, shapes_are = (
        {name: text(*found[:2]) for name, found in arrays.items()} for arrays in (was, now)
    )
    if shapes_were != shapes_are:
        names = [x for x in sorted(was | now) if shapes_were.get(x) != shapes_are.get(x)]
        differ = "; ".join(
            f"{x}: {shapes_were.get(x, 'none')} then, {shapes_are.get(x, 'none')} now"
            for x in names
        ).replace("%: ", "")
        message = f"fit: the run goes on with batches of other shapes or dtypes: {differ}"
    elif any(None not in (was[x][2], now[x][2]) and was[x] != now[x] for x in was):
        message = (
            f"fit: the run goes on with other batches: that of step {step} has other values than "
            f"when it was saved (another data set, order or seed, or draws without a fixed seed)"
        )
    else:
        return
    warnings.warn(f"{message}; it will not end as if it had never been stopped", stacklevel=5)


def _resume(directory: pathlib.Path, state: Any, source: _Batches, progress: bool) -> Any:
    restored = checkpoints.restore(directory, state)
    if restored is None:
        return state
    say(f"fit: resumes at step {restored.step}, from {directory / str(restored.step)}", progress)
    was, now = restored.data["x64"], jnp.result_type(float) == jnp.float64
    if was != now:
        warnings.warn(
            f"fit: the run goes on with jax_enable_x64 {now}, and was saved with {was}; "
            f"it will not end as if it had never been stopped",
            stacklevel=3,
        )
    source.resume(restored.step, restored.data, directory)
    return restored.state


class _Log:
    """The metrics since the last line of the log, which are checked one by one."""

    def __init__(self, write: Callable, bar: Any, last_checkpoint: Callable[[], str]) -> None:
        self._write, self._bar, self._last_checkpoint = write, bar, last_checkpoint
        self._pending, self._since = [], time.perf_counter()
        self._skipped = 0  # in a row

    def add(self, metrics: dict) -> None:
        self._pending.append(metrics)
        if self._bar is not None:
            self._bar.update()

    def flush(self, done: int) -> None:
        """Writes the means over the steps before `done`."""
        if not self._pending:
            return
        pending = jax.device_get(self._pending)
        for number, metrics in enumerate(pending, start=done - len(pending) + 1):
            self._check(number, metrics)
        means = {name: _mean([metrics[name] for metrics in pending]) for name in pending[0]}
        now = time.perf_counter()
        self._write(done, {**means, "steps_per_second": len(pending) / (now - self._since)})
        self._pending, self._since = [], now
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {means.get('loss', math.nan):.4g}", refresh=False)

    def _check(self, number: int, metrics: dict) -> None:
        if metrics.get("skipped", False):
            self._skipped += 1
            return
        self._skipped = 0
        values = {name: metrics[name] for name in ("loss", "grad_norm") if name in metrics}
        if not np.isfinite(list(values.values())).all():
            what = ", ".join(f"{name} = {value}" for name, value in values.items())
            raise FloatingPointError(
                f"not finite at step {number}: {what}; {self._last_checkpoint()}"
            )

    def require_a_step(self, done: int, last: bool) -> None:
        """Raises if all steps of the run, or very many in a row, were skipped."""
        if self._skipped >= _MOST_SKIPPED or (last and 0 < done == self._skipped):
            raise FloatingPointError(
                f"not finite in any step from {done - self._skipped + 1} to {done}, so all of them "
                f"were skipped; {self._last_checkpoint()}"
            )


def _mean(values: list) -> float:
    array = np.array(values, np.float64)
    finite = np.isfinite(array)
    return float(array[finite].mean()) if finite.any() else math.nan


_PARTS = ("params", "ema", "opt_state")


def _finite(state: Any) -> np.ndarray:
    return np.array(_all_finite(*(getattr(state, part) for part in _PARTS)))


@jax.jit
def _all_finite(params: Any, ema: Any, opt_state: Any) -> tuple:
    def finite(tree: Any, allowed: Callable) -> jax.Array:
        leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return jnp.array([(jnp.isfinite(x) | allowed(x)).all() for x in leaves], bool).all()

    # Some optimizers begin with an infinite scalar, such as the best value so far.
    infinite = lambda x: jnp.isinf(x) & (x.ndim == 0)  # noqa: E731
    never = jnp.zeros_like
    return (
        finite(params, lambda x: never(x, bool)),
        finite(ema, lambda x: never(x, bool)),
        finite(opt_state, infinite),
    )


def _last_checkpoint(manager: Any) -> str:
    if manager is not None:
        checkpoints.wait(manager)
        if (last := manager.latest_step()) is not None:
            return f"the last good checkpoint is {manager.directory / str(last)}"
    return "no checkpoint was saved before it"
