"""Agreement between the processes of one program. With one process, nothing is communicated."""

import json
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

__all__ = ["Signals", "gather", "is_main", "together"]


def is_main() -> bool:
    """Whether this process is the one that writes logs and renames files."""
    return jax.process_index() == 0


def gather(value: Any) -> list:
    """The values of all processes, in their order. A value is anything that JSON can hold.

    >>> gather({"a": 1})
    [{'a': 1}]
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(content), np.int32)).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def together(function: Callable[[], T]) -> T:
    """Calls the function in every process. If it fails in one, it fails in all.

    >>> together(lambda: 3)
    3
    """
    if jax.process_count() == 1:
        return function()
    error, result = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    reasons = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"process {i}: {reason}" for i, reason in enumerate(reasons) if reason is not None]
    if failed:
        raise RuntimeError(f"another process failed: {'; '.join(failed)}")
    return result  # pyright: ignore[reportReturnType]


class Stop(BaseException):
    """Ends the loop of a run that a signal asked to stop."""


class Signals:
    """A context in which the first SIGTERM or SIGINT only asks the loop to stop.

    Python lets the main thread alone handle signals, so elsewhere the context does nothing. A
    signal that the program ignores stays ignored.

    Over several processes, jax's preemption service tells every process of a SIGTERM that one of
    them got, and at which step all of them are to stop. That service handles SIGTERM itself. A
    SIGINT is passed on to it.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._several = jax.process_count() > 1
        self._received: int | None = None
        self._waiting = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                if (previous := signal.getsignal(number)) is not signal.SIG_IGN:
                    self._previous[number] = signal.SIG_DFL if previous is None else previous
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, _) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._received = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._waiting:
            raise Stop

    def interrupt(self, function: Callable[..., T], *args: Any) -> T:
        """Calls the function. A signal, also an earlier one, ends the call by `Stop`.

        Over several processes no call is ended, because the others are in a step that needs this
        process.
        """
        self._waiting = True
        try:
            if self._received is not None and not self._several:
                raise Stop
            return function(*args)
        finally:
            self._waiting = False

    def check(self, step: int) -> None:
        """Raises `Stop` if the run ends after this step. Every process calls it at every step."""
        if self._enabled and (_preempted(step) if self._several else self._received is not None):
            raise Stop

    def error(self) -> BaseException:
        """The exception that ends the run once its state is saved."""
        interrupted = self._received == signal.SIGINT
        return KeyboardInterrupt() if interrupted else SystemExit(128 + signal.SIGTERM)


def _preempted(step: int) -> bool:
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # the service is switched off: SIGTERM kills the process
        return False
