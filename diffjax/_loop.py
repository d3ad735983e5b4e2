"""The training loop: a host loop around a step, with its progress bar, logs and checkpoints."""

import contextlib
import json
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import checkpoints
from diffjax._math import check_alive

__all__ = ["fit"]


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
    """Trains until `num_steps` steps have been taken, from the newest checkpoint in `directory` if it holds one.

    The same command continues a run that was stopped anywhere, and ends (on the same devices) with bitwise the same
    parameters as if it had never been stopped. On SIGTERM the loop saves a checkpoint and exits with status 143. The
    device is asked for its metrics only when they are logged.

    Args:
        state: a `TrainState`. If `step` donates it, it is gone afterwards.
        step: `(state, batch) -> (state, metrics)`, from `make_train_step`, jitted by the caller.
        batches: a function `step -> batch` such as `in_memory`, or an iterator: one of grain's, whose place goes into the
            checkpoints, or any other where there is no `directory`.
        num_steps: the number of steps in all, those of earlier runs included.
        directory: where to keep `checkpoints/`, `metrics.jsonl` and `tensorboard/`; None to write nothing.
        log_every: steps between two lines of `metrics.jsonl`. Each holds means over the steps since the last one.
        checkpoint_every: steps between two checkpoints. There is one at the end, too.
        keep: how many checkpoints to keep.
        callback: called as `callback(step, state)`, to draw samples, say. It must not keep the state.
        callback_every: steps between two calls.
        tensorboard: whether to write the metrics for TensorBoard, too (needs tensorboardX).
        progress: whether to show a progress bar with loss, speed and time left (needs tqdm).

    Returns:
        The final state.

    Raises:
        FloatingPointError: if a loss, a gradient norm or a parameter is not finite; it names the step and the last
            checkpoint. Steps that `skip_nonfinite` left out do not count.
        ValueError: if `batches` ends early, or cannot be saved or resumed; and as `checkpoints.restore`.
        OSError: as `checkpoints.save`.

    Clipping, warm-up and a cosine schedule are optax's:

    >>> import optax
    >>> from diffjax.training import in_memory, init_state, make_train_step
    >>> optimizer = optax.chain(
    ...     optax.clip_by_global_norm(1.0),
    ...     optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=10, decay_steps=100)),
    ... )
    >>> def loss(params, key, batch):
    ...     return jnp.mean((batch["x"] * params["slope"] - batch["y"]) ** 2)
    >>> batches = in_memory({"x": np.arange(8.0), "y": 3 * np.arange(8.0)}, batch_size=4)
    >>> step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
    >>> state = init_state(jax.random.key(0), {"slope": jnp.zeros(())}, optimizer)
    >>> state = fit(state, step, batches, num_steps=100, progress=False)
    >>> bool(abs(state.params["slope"] - 3) < 0.1)
    True
    """
    is_iterator = _check_batches(batches, directory)
    if tensorboard and directory is None:
        raise ValueError("fit: tensorboard=True needs a directory")
    with contextlib.ExitStack() as stack:
        manager = None
        if directory is not None:
            directory = pathlib.Path(directory)
            state = _resume(directory / "checkpoints", state, batches, is_iterator)
            manager = stack.enter_context(checkpoints.manager(directory / "checkpoints", keep=keep))
        check_alive(state, "state")
        start = int(state.step)
        terminated = stack.enter_context(_on_sigterm()) if manager is not None else threading.Event()
        write = stack.enter_context(_log(directory, start, tensorboard))
        bar = stack.enter_context(_progress_bar(start, num_steps)) if progress else None

        pending, since = [], time.perf_counter()
        for done in range(start + 1, num_steps + 1):
            state, metrics = step(state, _draw(batches, done - 1, is_iterator))
            pending.append(metrics)
            if bar is not None:
                bar.update()

            stop = terminated.is_set()
            save = stop or done == num_steps or done % checkpoint_every == 0
            call = done % callback_every == 0
            if save or call or done % log_every == 0:
                record = _means(pending, done, manager)
                now = time.perf_counter()
                write(done, {**record, "steps_per_second": len(pending) / (now - since)})
                pending, since = [], now
                if bar is not None:
                    bar.set_postfix_str(f"loss {record.get('loss', math.nan):.4g}", refresh=False)
            if save and manager is not None:
                _require_finite_parameters(state, done, manager)
                checkpoints.save(manager, done, state, _place(batches) if is_iterator else None)
            if call and callback is not None:
                callback(done, state)
            if stop:
                break
        if manager is not None:
            checkpoints.wait(manager)
        if terminated.is_set():
            raise SystemExit(128 + signal.SIGTERM)
    return state


def _check_batches(batches: Any, directory: Any) -> bool:
    """Whether the batches come from an iterator."""
    if not hasattr(batches, "__next__"):
        if not callable(batches):
            raise ValueError(f"fit: batches must be a function of the step or an iterator, got {type(batches)}")
        return False
    if directory is not None and not (hasattr(batches, "get_state") and hasattr(batches, "set_state")):
        raise ValueError(
            f"fit: to resume from checkpoints, batches must be a function of the step or an iterator with get_state and "
            f"set_state (as grain's), got {type(batches)}"
        )
    return True


def _draw(batches: Any, step: int, is_iterator: bool) -> Any:
    if not is_iterator:
        return batches(step)
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(f"fit: batches ended after {step} steps; repeat the data set, or lower num_steps") from None


def _place(batches: Any) -> Any:
    state = batches.get_state()
    return state.decode() if isinstance(state, bytes) else state


def _resume(directory: pathlib.Path, state: Any, batches: Any, is_iterator: bool) -> Any:
    restored = checkpoints.restore(directory, state)
    if restored is None:
        return state
    if (restored.data is not None) != is_iterator:
        kinds = ("an iterator", "a function of the step")
        was, now = kinds if restored.data is not None else kinds[::-1]
        raise ValueError(f"fit: the run in {directory} drew its batches from {was}, batches is {now}")
    if is_iterator:
        batches.set_state(restored.data.encode() if isinstance(restored.data, str) else restored.data)
    return restored.state


def _means(pending: list[dict], done: int, manager: Any) -> dict[str, float]:
    """The mean of each metric over the steps before `done`, which are checked one by one."""
    pending = jax.device_get(pending)
    for number, metrics in enumerate(pending, start=done - len(pending) + 1):
        values = {name: metrics[name] for name in ("loss", "grad_norm") if name in metrics}
        if not metrics.get("skipped", False) and not np.isfinite(list(values.values())).all():
            what = ", ".join(f"{name} = {value}" for name, value in values.items())
            raise FloatingPointError(f"not finite at step {number}: {what}; {_last_checkpoint(manager)}")
    means = {}
    for name in pending[0]:
        values = np.array([metrics[name] for metrics in pending], np.float64)
        means[name] = float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan
    return means


def _require_finite_parameters(state: Any, done: int, manager: Any) -> None:
    if not _all_finite((state.params, state.ema)):
        raise FloatingPointError(f"the parameters are not finite after step {done}; {_last_checkpoint(manager)}")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in leaves]).all()


def _last_checkpoint(manager: Any) -> str:
    if manager is not None:
        checkpoints.wait(manager)
        if (last := manager.latest_step()) is not None:
            return f"the last good checkpoint is {manager.directory / str(last)}"
    return "no checkpoint was saved before it"


@contextlib.contextmanager
def _on_sigterm():
    """An event that SIGTERM sets; only the main thread may ask for it."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


@contextlib.contextmanager
def _log(directory: pathlib.Path | None, start: int, tensorboard: bool):
    """A function `write(step, record)`. Lines of a stopped run beyond the step it resumes from are dropped."""
    if directory is None:
        yield lambda step, record: None
        return
    path = directory / "metrics.jsonl"
    kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
    path.write_text("".join(f"{line}\n" for line in kept))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a", buffering=1))
        writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1))

        def write(step: int, record: dict[str, float]) -> None:
            known = {name: value if math.isfinite(value) else None for name, value in record.items()}
            file.write(json.dumps({"step": step, **known}) + "\n")
            if writer is not None:
                for name, value in record.items():
                    writer.add_scalar(name, value, step)

        yield write


def _lines(path: pathlib.Path) -> Iterator[str]:
    """The whole lines of a file: the last one may have been cut off."""
    if path.exists():
        yield from (line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))


def _progress_bar(start: int, num_steps: int):
    from tqdm import tqdm

    return tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True)
