"""Grids as JSON, with the schedule that they were found for.

JSON has no infinity. An infinite number of the schedule, such as its log-SNR at t = 0, is the string "inf" or "-inf".
"""

import json
import math
import pathlib
import reprlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import check_that
from ..samplers._sample import _check_grid
from ..schedules import half_log_snr
from ..typing import Schedule

__all__ = ["load_grid", "save_grid"]


def save_grid(path: str | pathlib.Path, ts: Float[ArrayLike, " times"], schedule: Schedule) -> None:
    """Writes a grid as JSON, with the name and numbers of the schedule it was found for, and its log-SNR at the times.

    Args:
        path: the file.
        ts: the grid.
        schedule: its schedule.

    Raises:
        ValueError: if ts is no vector of at least 2 times that descend within [0, 1], or if the log-SNR is NaN at one of
            them.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, uniform(2, end=0.5), linear_vp())
    >>> load_grid(path, linear_vp())
    Array([1.  , 0.75, 0.5 ], dtype=float32)
    """
    ts = _check_grid(ts)
    description = {
        field: value if field == "name" else [v if math.isfinite(v) else str(v) for v in value]
        for field, value in _describe(schedule, ts).items()
    }
    record = {"ts": ts.tolist(), "schedule": description}
    pathlib.Path(path).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def load_grid(path: str | pathlib.Path, schedule: Schedule) -> Float[Array, " times"]:
    """Reads a grid of `save_grid`, for the schedule that it was found for.

    Args:
        path: the file.
        schedule: the schedule to use it with.

    Returns:
        The grid.

    Raises:
        ValueError: if the file holds no grid that `save_grid` would write, or if the schedule is another one; it says what
            differs.
        OSError: if the file cannot be read.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, uniform(2, end=0.5), linear_vp(0.1, 20.0))
    >>> load_grid(path, linear_vp(0.1, 10.0))
    Traceback (most recent call last):
    ValueError: schedule: the grid in ... was found for another one: numbers [0.1..., 20.0], expected [0.1..., 10.0]
    """
    data = pathlib.Path(path).read_bytes()
    try:
        record = json.loads(data)
        description = record["schedule"]
        saved = {"name": description["name"]}
        saved |= {field: _floats(description[field]) for field in ("numbers", "half_log_snr")}
        ts = _check_grid(jnp.asarray(_floats(record["ts"]), float))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"path: expected a grid of save_grid in {path}, got {reason}") from error
    given = _describe(schedule, ts)
    for field, tolerance in (("name", None), ("numbers", 1e-6), ("half_log_snr", 1e-3)):
        a, b = saved[field], given[field]
        same = a == b if tolerance is None else len(a) == len(b) and np.allclose(a, b, rtol=tolerance, atol=tolerance)
        if not same:
            raise ValueError(f"schedule: the grid in {path} was found for another one: {field} {a}, expected {b}")
    return ts


def _floats(values):
    if not isinstance(values, list):
        raise ValueError(f"expected a list of numbers, got {reprlib.repr(values)}")
    return [float(v) for v in values]


def _describe(schedule, ts):
    """What tells a schedule from others: its function, its numbers, and (for closures) its log-SNR at the grid."""
    fn = schedule.func if isinstance(schedule, Partial) else schedule
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"
    numbers = [float(n) for leaf in jax.tree.leaves(schedule) if not callable(leaf) for n in np.ravel(leaf)]
    values = jax.vmap(lambda t: half_log_snr(schedule, t))(ts)
    check_that(lambda v: ~np.isnan(v), "schedule: expected a log-SNR at every time of the grid, got {}", values)
    return {"name": name, "numbers": numbers, "half_log_snr": [float(v) for v in values]}
