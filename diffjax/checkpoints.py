"""Checkpoints of any pytree of arrays, by Orbax: written in the background, complete or absent, checked when read.

A checkpoint holds the arrays by name ("params.hidden.kernel"), the place of the data iterator, and a manifest with every
array's shape, dtype and checksum. So a damaged checkpoint is told from a good one, and one of another architecture
from a damaged one, before anything is used.
"""

import json
import pathlib
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

__all__ = ["Checkpoint", "manager", "restore", "save", "wait"]


class Checkpoint(NamedTuple):
    """What `restore` returns."""

    step: int
    """The step it was saved at."""
    state: Any
    """The pytree that was saved."""
    data: Any
    """What was saved beside it: the place of the data iterator."""


def manager(directory: str | pathlib.Path, *, keep: int = 3) -> ocp.CheckpointManager:
    """Opens a folder for writing checkpoints, and creates it if need be. One process at a time may write to it.

    Args:
        directory: the folder.
        keep: how many checkpoints to keep; older ones go once a newer one is complete.

    Returns:
        Orbax's manager, to be closed (`.close()`) at the end.

    Raises:
        ValueError: if keep < 1.

    >>> import tempfile
    >>> with manager(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     for step in (10, 20, 30):
    ...         save(checkpoints, step, {"w": np.ones(3)})
    ...     wait(checkpoints)
    ...     checkpoints.all_steps()
    [20, 30]
    """
    if keep < 1:
        raise ValueError(f"manager: keep must be at least 1, got {keep}")
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, lightweight_initialize=True)
    return ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, data: Any = None) -> None:
    """Begins to save a state, and returns once it is copied: it may then be donated. `wait` waits for the write.

    Checkpoints of this step or later ones are the leftovers of a run that was resumed before them: they are renamed
    to "replaced-STEP" and no longer count.

    Args:
        manager: an open `manager`.
        step: the number of steps taken.
        state: a pytree of arrays, typed PRNG keys included.
        data: anything that JSON can hold.

    Raises:
        OSError: if this save, or the one begun before it, fails (a full disk, say). Earlier checkpoints are intact.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with manager(folder) as checkpoints:
    ...     save(checkpoints, 7, {"w": np.ones(2)}, data={"epoch": 1})
    >>> restore(folder, {"w": np.zeros(2)})
    Checkpoint(step=7, state={'w': array([1., 1.])}, data={'epoch': 1})
    """
    named = _named(state)
    arrays = {name: _host(leaf) for name, leaf in named.items()}
    described = {name: [*_describe(leaf), _checksum(arrays[name])] for name, leaf in named.items()}
    manifest = {"arrays": described, "data": data}
    manifest["checksum"] = _checksum(json.dumps(manifest).encode())
    wait(manager)
    # Orbax copies numpy arrays before it returns, so that the caller may change or donate them.
    args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), manifest=ocp.args.JsonSave(manifest))
    try:
        _set_aside(manager, step)
        manager.save(step, args=args, force=True)
    except Exception as error:
        raise _save_error(manager, error) from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is complete.

    Raises:
        OSError: if it failed. Earlier checkpoints are intact.

    >>> import tempfile
    >>> with manager(tempfile.mkdtemp()) as checkpoints:
    ...     save(checkpoints, 7, {"w": np.ones(2)})
    ...     wait(checkpoints)
    ...     checkpoints.latest_step()
    7
    """
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _save_error(manager, error) from error


def restore(directory: str | pathlib.Path, like: Any) -> Checkpoint | None:
    """Reads the newest checkpoint that is intact, without touching the folder.

    Args:
        directory: the folder.
        like: a pytree of arrays with the structure, shapes and dtypes to expect. Arrays return on its devices.

    Returns:
        The checkpoint; None if the folder holds none.

    Warns:
        UserWarning: for each newer checkpoint that is damaged, with its path.

    Raises:
        ValueError: if the newest checkpoint has another structure, shape or dtype; it lists what differs.
        OSError: if there are checkpoints and all are damaged.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> restore(folder, {"w": np.zeros(2)}) is None
    True
    >>> with manager(folder) as checkpoints:
    ...     save(checkpoints, 7, {"w": np.ones(2)})
    >>> restore(folder, {"w": np.zeros(3), "b": np.zeros(2)})
    Traceback (most recent call last):
    ValueError: ... is of another architecture:
      b: expected (2,) float64, the checkpoint has none
      w: expected (3,) float64, the checkpoint has (2,) float64
    """
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        return None
    steps = sorted((int(path.name) for path in directory.iterdir() if path.name.isdecimal()), reverse=True)
    named = _named(like)
    damaged = []
    for step in steps:
        path = directory / str(step)
        try:
            manifest = _read_manifest(path)
        except Exception as error:
            damaged.append(f"{path} ({_first_line(error)})")
            continue
        _check_same(path, manifest["arrays"], named)
        try:
            arrays = _read_arrays(path, manifest["arrays"], named)
        except Exception as error:
            damaged.append(f"{path} ({_first_line(error)})")
            continue
        for reason in damaged:
            warnings.warn(f"damaged checkpoint: {reason}; {path} is used instead", stacklevel=2)
        leaves = [_like(arrays[name], leaf) for name, leaf in named.items()]
        return Checkpoint(step, jax.tree.unflatten(jax.tree.structure(like), leaves), manifest["data"])
    if damaged:
        raise OSError(f"every checkpoint in {directory} is damaged: {'; '.join(damaged)}")
    return None


def _read_manifest(path: pathlib.Path) -> dict:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        manifest = reader.restore(path / "manifest")
    checksum = manifest.pop("checksum")
    if _checksum(json.dumps(manifest).encode()) != checksum:
        raise ValueError("the checksum of the manifest differs")
    return manifest


def _read_arrays(path: pathlib.Path, described: dict, named: dict) -> dict[str, np.ndarray]:
    like = {name: _host(leaf) for name, leaf in named.items()}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        arrays = reader.restore(path / "state", args=ocp.args.StandardRestore(like))
    for name, (_, _, checksum) in described.items():
        if _checksum(arrays[name]) != checksum:
            raise ValueError(f"the checksum of {name} differs")
    return arrays


def _check_same(path: pathlib.Path, described: dict, named: dict) -> None:
    saved = {name: _text(shape, dtype) for name, (shape, dtype, _) in described.items()}
    expected = {name: _text(*_describe(leaf)) for name, leaf in named.items()}
    differ = [
        f"  {name}: expected {expected.get(name, 'none')}, the checkpoint has {saved.get(name, 'none')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if differ:
        raise ValueError("\n".join([f"the checkpoint {path} is of another architecture:", *differ]))


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    later = [old for old in manager.all_steps() if old >= step]
    for old in later:
        path = pathlib.Path(manager.directory)
        path.joinpath(str(old)).rename(path / f"replaced-{old}")
    if later:
        manager.reload()


def _save_error(manager: ocp.CheckpointManager, error: Exception) -> OSError:
    manager.reload()  # what it meant to remove is still there
    kept = manager.all_steps()
    return OSError(f"could not save a checkpoint in {manager.directory}: {_first_line(error)}; complete are: {kept}")


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _host(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _like(array: np.ndarray, leaf: Any) -> Any:
    """The array as a leaf of the same kind, on the same devices."""
    if not isinstance(leaf, jax.Array):
        return array
    if _is_key(leaf):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        return jax.device_put(key, leaf.sharding)
    return jax.device_put(array, leaf.sharding)


def _describe(leaf: Any) -> tuple[list[int], str]:
    return list(np.shape(leaf)), str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def _text(shape: list[int], dtype: str) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''}) {dtype}"


def _checksum(data: np.ndarray | bytes) -> int:
    return zlib.crc32(data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
