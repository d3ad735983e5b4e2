"""Grids as JSON, with the schedule that they were found for."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from .._math import as_float
from ..schedules import half_log_snr
from ..typing import Schedule

__all__ = ["load_grid", "save_grid"]


def save_grid(path: str | pathlib.Path, ts: Float[Array, " n+1"], schedule: Schedule) -> None:
    """Writes a grid as JSON, with the name and numbers of the schedule it was found for, and its log-SNR at the times.

    Args:
        path: the file.
        ts: the grid.
        schedule: its schedule.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, uniform(2, end=0.5), linear_vp())
    >>> load_grid(path, linear_vp())
    Array([1.  , 0.75, 0.5 ], dtype=float32)
    """
    ts = as_float(ts, "ts")
    pathlib.Path(path).write_text(json.dumps({"ts": ts.tolist(), "schedule": _describe(schedule, ts)}, indent=1) + "\n")


def load_grid(path: str | pathlib.Path, schedule: Schedule) -> Float[Array, " n+1"]:
    """Reads a grid of `save_grid`, for the schedule that it was found for.

    Args:
        path: the file.
        schedule: the schedule to use it with.

    Returns:
        The grid.

    Raises:
        ValueError: if the file holds no grid, or the schedule is another one; it says what differs.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, uniform(2, end=0.5), linear_vp(0.1, 20.0))
    >>> load_grid(path, linear_vp(0.1, 10.0))
    Traceback (most recent call last):
    ValueError: schedule: the grid in ... was found for another one: numbers [0.1..., 20.0], expected [0.1..., 10.0]
    """
    try:
        record = json.loads(pathlib.Path(path).read_text())
        saved = {field: record["schedule"][field] for field in ("name", "numbers", "half_log_snr")}
        ts = jnp.asarray(record["ts"], float)
        if ts.ndim != 1:
            raise ValueError(f"ts of shape {ts.shape}")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected a grid of save_grid in {path}, got {error!r}") from error
    given = _describe(schedule, ts)
    for field, tolerance in (("name", None), ("numbers", 1e-6), ("half_log_snr", 1e-3)):
        a, b = saved[field], given[field]
        same = a == b if tolerance is None else len(a) == len(b) and np.allclose(a, b, rtol=tolerance, atol=tolerance)
        if not same:
            raise ValueError(f"schedule: the grid in {path} was found for another one: {field} {a}, expected {b}")
    return ts


def _describe(schedule, ts):
    """What tells a schedule from others: its function, its numbers, and (for closures) its log-SNR at the grid."""
    fn = schedule.func if isinstance(schedule, Partial) else schedule
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"
    numbers = [float(n) for leaf in jax.tree.leaves(schedule) if not callable(leaf) for n in np.ravel(leaf)]
    values = jax.vmap(lambda t: half_log_snr(schedule, t))(ts)
    return {"name": name, "numbers": numbers, "half_log_snr": [float(v) for v in values]}
