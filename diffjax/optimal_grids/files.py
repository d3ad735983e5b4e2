"""Grids as JSON: their times, and the log-SNR at these times.

The log-SNRs are the noise levels that a grid visits, and they define it on any path. Where two
paths have the same log-SNR, their x differ only by a factor, and so do the runs of DDIM or
DPM-Solver on them.

JSON has no infinity. An infinite log-SNR, such as that of `linear` at t = 0, is the string "inf" or
"-inf".
"""

import json
import math
import pathlib
import reprlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import check_that, shown
from ..samplers._sample import _check_grid
from ..schedules import half_log_snr, half_log_snr_inverse
from ..typing import Schedule

__all__ = ["load_grid", "save_grid"]

# The tolerance of half log-SNRs. Rounding a time to float32 changes them by less, except within
# 1e-4 of t = 1.
_TOLERANCE = 1e-3


def save_grid(path: str | pathlib.Path, ts: Float[ArrayLike, " times"], schedule: Schedule) -> None:
    """Writes a grid as JSON: its times, and `lambda(t) = log(alpha / sigma)` at each of them.

    Args:
        path: the file.
        ts: the grid.
        schedule: its schedule.

    Raises:
        ValueError: if ts is not a vector of at least 2 descending times in [0, 1], or if the
            log-SNR does not increase along it.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, uniform(2), linear())
    >>> json.loads(path.read_text())
    {'ts': [1.0, 0.5, 0.0], 'half_log_snr': ['-inf', 0.0, 'inf']}
    """
    ts = _check_grid(ts)
    values = _half_log_snrs(schedule, ts)
    message = "schedule: expected a log-SNR that increases along ts, got half log-SNRs {}"
    check_that(_increase, message, values)
    record = {
        "ts": ts.tolist(),
        "half_log_snr": [v if math.isfinite(v) else str(v) for v in values.tolist()],
    }
    pathlib.Path(path).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def load_grid(path: str | pathlib.Path, schedule: Schedule) -> Float[Array, " times"]:
    """Reads a grid of `save_grid`: the times at which the schedule has the log-SNRs of the file.

    For the schedule that the grid was saved for, these are the saved times. For another schedule,
    `half_log_snr_inverse` finds them. The grid is then as good as before for samplers that depend
    on the path only through the log-SNR, such as `ddim` and `dpm_solver_2m`. For others, such as
    `velocity_adams` and `deis`, find a grid on the path itself.

    Args:
        path: the file.
        schedule: the schedule to use the grid with.

    Returns:
        The grid.

    Raises:
        ValueError: if the file does not hold a grid as `save_grid` writes it, or if the schedule
            does not reach one of the log-SNRs, for example an infinite one.
        OSError: if the file cannot be read.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, jnp.array([0.8, 0.5, 0.0]), linear())  # sigma / alpha = 4, 1 and 0
    >>> load_grid(path, linear())
    Array([0.8, 0.5, 0. ], dtype=float32)
    >>> load_grid(path, edm(8.0))
    Array([0.5  , 0.125, 0.   ], dtype=float32)
    >>> load_grid(path, ve(0.01, 8.0))
    Traceback (most recent call last):
    ValueError: schedule: expected one with half log-SNRs of [inf], ... got [4.605...] ...
    """
    data = pathlib.Path(path).read_bytes()
    try:
        record = json.loads(data)
        ts, values = (
            jnp.asarray(_floats(record[field]), float) for field in ("ts", "half_log_snr")
        )
        ts = _check_grid(ts)
        if values.shape != ts.shape or not _increase(values):
            raise ValueError(
                f"half_log_snr: expected {ts.size} numbers that increase, got {shown(values)}"
            )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"path: expected a grid of save_grid in {path}, got {reason}") from error
    if _agree(_half_log_snrs(schedule, ts), values).all():
        return ts
    found = jax.vmap(lambda value: half_log_snr_inverse(schedule, value))(values)
    nearest = _half_log_snrs(schedule, found)
    missed = ~_agree(nearest, values)
    if missed.any():
        raise ValueError(
            f"schedule: expected one with half log-SNRs of {shown(values[missed])}, "
            f"which the grid in {path} visits, got {shown(nearest[missed])} at the nearest times. "
            "Give the schedule that the grid was saved for, or find a grid for this one"
        )
    return _check_grid(found)


def _floats(values):
    if not isinstance(values, list):
        raise ValueError(f"expected a list of numbers, got {reprlib.repr(values)}")
    return [float(v) for v in values]


def _half_log_snrs(schedule, ts):
    return jax.vmap(lambda t: half_log_snr(schedule, t))(ts)


def _increase(values):
    return (values[1:] > values[:-1]).all()


def _agree(a, b):
    return np.isclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
