"""Checkpoints of any pytree of arrays, by Orbax: complete or absent, and checked when read.

A checkpoint holds the arrays by name ("params.hidden.kernel"), the position of the data iterator,
and a manifest with the shape, dtype and checksum of every array. So a damaged checkpoint and one of
another architecture are recognized before anything is used.

Arrays may be sharded over devices and processes. Each process writes and reads its own shards, and
the checksums are computed on the devices, so no array is gathered anywhere.
"""

import functools
import json
import os
import pathlib
import threading
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ._fingerprint import describe, fingerprint, is_key, named
from ._lock import FolderLock
from ._manifest import ManifestSave, check_same, read_manifest
from ._processes import gather, is_main, together

__all__ = ["Checkpoint", "manager", "restore", "save", "wait"]

# Orbax counts the saves of a process in one variable, which the beginning of each save reads.
_SAVE_BEGINS = threading.Lock()


class Checkpoint(NamedTuple):
    """What `restore` returns."""

    step: int
    """The step it was saved at."""
    state: Any
    """The pytree that was saved, or the part of it that was asked for."""
    data: Any
    """What was saved beside it. `fit` stores the position of its batches there."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, with a lock on its folder until it is closed."""

    def __init__(self, directory: pathlib.Path, options: ocp.CheckpointManagerOptions) -> None:
        self._folder_lock = together(lambda: FolderLock(directory) if is_main() else None)
        try:
            super().__init__(directory, options=options)
        except BaseException:
            self._unlock()
            raise

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._folder_lock is not None:
            self._folder_lock.release()


def manager(directory: str | pathlib.Path, *, keep: int = 3) -> ocp.CheckpointManager:
    """Opens a folder for writing checkpoints, and creates it if necessary.

    The folder is locked until the manager is closed or its process ends. The processes of one
    `jax.distributed` program share it.

    Args:
        directory: the folder.
        keep: how many checkpoints to keep. Older ones are removed once a newer one is complete.

    Returns:
        Orbax's manager. Close it (`.close()`) at the end.

    Raises:
        ValueError: if keep < 1.
        RuntimeError: if another program, or another manager of this one, writes to the folder.

    >>> import tempfile
    >>> with manager(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     for step in (10, 20, 30):
    ...         save(checkpoints, step, {"w": np.ones(3)})
    ...     wait(checkpoints)
    ...     checkpoints.all_steps()
    [20, 30]
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, lightweight_initialize=True
    )
    return _Manager(pathlib.Path(directory).absolute(), options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, data: Any = None) -> None:
    """Begins to save a state. It may be donated once this returns; `wait` waits for the write.

    Checkpoints of this step or later ones are left over from a run that was resumed before them.
    They are renamed to "replaced-STEP" (or "replaced-STEP-2" and so on) and no longer count.

    Over several processes, each process calls this with its part of the same global arrays. `data`
    and arrays that are not global (numpy arrays, or arrays on a local device) must be the same in
    all of them.

    Args:
        manager: an open `manager`.
        step: the number of steps taken.
        state: a pytree of arrays, typed PRNG keys included.
        data: anything that JSON can hold.

    Raises:
        ValueError: if a leaf of the state is not an array, or if JSON cannot hold `data`.
        OSError: if this save, or the one begun before it, fails, for example on a full disk.
            Earlier checkpoints are intact.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with manager(folder) as checkpoints:
    ...     save(checkpoints, 7, {"w": np.ones(2)}, data={"epoch": 1})
    >>> restore(folder, {"w": np.zeros(2)})
    Checkpoint(step=7, state={'w': array([1., 1.])}, data={'epoch': 1})
    """
    leaves = named(state)
    _check_leaves(leaves)
    checksums = fingerprint(leaves)
    if jax.process_count() > 1:  # processes communicate in their main threads alone
        checksums = functools.partial(dict, checksums())
    items: dict[str, Any] = {"manifest": ManifestSave(checksums, _as_json(data))}
    if arrays := {name: _to_write(leaf) for name, leaf in leaves.items() if np.size(leaf)}:
        items["state"] = ocp.args.StandardSave(arrays)
    wait(manager)
    try:
        _set_aside(manager, step)
        with _SAVE_BEGINS:
            manager.save(step, args=ocp.args.Composite(**items), force=True)
    except Exception as error:
        raise _save_error(manager, error) from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is complete.

    Args:
        manager: as for `save`.

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


def restore(
    directory: str | pathlib.Path, like: Any, *, part: str | None = None
) -> Checkpoint | None:
    """Reads the newest checkpoint that is intact, without touching the folder.

    Args:
        directory: the folder of the checkpoints, or that of a run of `fit`, which holds it.
        like: a pytree of arrays, or of `jax.ShapeDtypeStruct`s, with the structure, shapes and
            dtypes to expect. Arrays return with its shardings. A leaf without one returns on the
            default device, like an array that was never placed.
        part: the name of the part to read, such as "params" or "ema" of a `TrainState`. `like`
            then describes that part alone, and nothing else is read.

    Returns:
        The checkpoint; None if the folder holds none.

    Warns:
        UserWarning: for each newer checkpoint that is damaged, with its path.

    Raises:
        ValueError: if the newest checkpoint has another structure, shape or dtype (the message
            lists what differs), or no such part.
        OSError: if a checkpoint cannot be read (permissions, a broken disk), or if all checkpoints
            are damaged.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> restore(folder, {"w": np.zeros(2)}) is None
    True
    >>> with manager(folder) as checkpoints:
    ...     save(checkpoints, 7, {"params": {"w": np.ones(2)}, "step": np.array(7)})
    >>> restore(folder, {"w": np.zeros(2)}, part="params").state
    {'w': array([1., 1.])}
    >>> restore(folder, {"w": np.zeros(3), "b": np.zeros(2)}, part="params")
    Traceback (most recent call last):
    ValueError: ... is of another architecture:
      params.b: expected (2,) float64, the checkpoint has none
      params.w: expected (3,) float64, the checkpoint has (2,) float64
    """
    directory = pathlib.Path(directory).absolute()
    leaves = named(like, part)
    _check_leaves(leaves)
    damaged = []
    # Process 0 lists the folder for all, because another might see a checkpoint a moment later.
    for path in map(pathlib.Path, gather(_checkpoints_in(directory))[0]):
        manifest, reason = _attempt(path, lambda path=path: read_manifest(path))
        arrays = {}
        if reason is None:
            check_same(path, manifest, leaves, part)
            arrays, reason = _attempt(path, lambda path=path: _read_arrays(path, leaves))
        if reason is None:
            read = fingerprint(arrays)()
            differ = [name for name in leaves if read[name] != manifest["arrays"][name]]
            reason = f"the checksum of {differ[0]} differs" if differ else None
        if reason is not None:
            damaged.append(f"{path} ({reason})")
            continue
        for reason in damaged:
            message = f"damaged checkpoint: {reason}; {path} is used instead"
            warnings.warn(message, stacklevel=2)
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in leaves])
        return Checkpoint(int(path.name), state, manifest["data"])
    if damaged:
        raise OSError(f"every checkpoint in {directory} is damaged: {'; '.join(damaged)}")
    return None


def _checkpoints_in(directory: pathlib.Path) -> list[str]:
    """The paths of the checkpoints in a folder, or in "checkpoints" within it, newest first."""
    for folder in (directory, directory / "checkpoints"):
        if folder.is_dir():
            steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
            if steps:
                return [str(folder / str(step)) for step in sorted(steps, reverse=True)]
    return []


def _attempt(path: pathlib.Path, read: Any) -> tuple[Any, str | None]:
    """What `read` returns, and None; or why the checkpoint is damaged. All processes agree."""
    result, failure = None, None
    try:
        result = read()
    except Exception as error:
        failure = [_is_damage(path, error), _first_line(error)]
    failures = [found for found in gather(failure) if found is not None]
    for damage, reason in failures:
        if not damage:
            raise OSError(
                f"could not read the checkpoint {path}, which may be intact: {reason}; "
                f"repair the access to it, or move it away to use an older one"
            )
    return result, failures[0][1] if failures else None


def _is_damage(path: pathlib.Path, error: Exception) -> bool:
    """Whether the content of a checkpoint is at fault, and not the disk, permissions or memory."""
    missing = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
        return False
    if isinstance(error, OSError) and not isinstance(error, missing):
        return False
    try:
        for folder, _, files in os.walk(path, onerror=_raise):
            for name in files:
                with open(os.path.join(folder, name), "rb") as file:
                    while file.read(2**24):
                        pass
    except OSError as unreadable:
        return isinstance(unreadable, missing)
    return True


def _raise(error: OSError) -> None:
    raise error


def _read_arrays(path: pathlib.Path, leaves: dict[str, Any]) -> dict[str, Any]:
    targets = {name: _target(leaf) for name, leaf in leaves.items() if np.size(leaf)}
    arrays: dict[str, Any] = {}
    if targets:
        # Without Orbax's `Checkpointer`, whose barrier would hang if one process alone fails.
        handler = ocp.PyTreeCheckpointHandler()
        arguments = {name: _restore_args(target) for name, target in targets.items()}
        args = ocp.args.PyTreeRestore(targets, restore_args=arguments, partial_restore=True)
        arrays = handler.restore(epath.Path(path / "state"), args=args)
    return {name: _like(arrays.pop(name, None), leaf) for name, leaf in leaves.items()}


def _restore_args(target: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if target.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target.dtype)
    return ocp.ArrayRestoreArgs(
        sharding=target.sharding, global_shape=target.shape, dtype=target.dtype
    )


def _as_json(data: Any) -> Any:
    """The data as they are now, and as `restore` will return them."""
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise ValueError(f"data: expected what JSON can hold, got {data!r}: {error}") from error


def _check_leaves(leaves: dict[str, Any]) -> None:
    for name, leaf in leaves.items():
        if not is_key(leaf) and np.dtype(describe(leaf)[1]).kind in "OUSmM":
            raise ValueError(f"{name}: expected an array of numbers, got {type(leaf).__name__}")


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    later = [old for old in manager.all_steps() if old >= step]
    if not later:
        return

    def rename() -> None:
        for old in later:
            path, number = pathlib.Path(manager.directory), 1
            while (aside := path / f"replaced-{old}{f'-{number}' * (number > 1)}").exists():
                number += 1
            path.joinpath(str(old)).rename(aside)

    together(lambda: rename() if is_main() else None)
    manager.reload()


def _save_error(manager: ocp.CheckpointManager, error: Exception) -> OSError:
    manager.reload()  # what it meant to remove is still there
    return OSError(
        f"could not save a checkpoint in {manager.directory}: {_first_line(error)}; "
        f"the complete ones are {manager.all_steps()}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _to_write(leaf: Any) -> Any:
    """The leaf as Orbax takes it. It copies numpy arrays before `save` returns."""
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) and not _is_local(leaf) else np.asarray(leaf)


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to read: key data for keys, and a sharding if the leaf has one of its own."""
    sharding = getattr(leaf, "sharding", None)
    unplaced = isinstance(leaf, jax.Array) and not leaf.committed
    if unplaced or (sharding is not None and _is_local(sharding)):
        sharding = None
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    shape, dtype = describe(leaf)
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)


def _is_local(x: Any) -> bool:
    """Whether one of several processes has all of it. Orbax takes such arrays from numpy."""
    return jax.process_count() > 1 and x.is_fully_addressable


def _like(array: Any, leaf: Any) -> Any:
    """The array that was read, as a leaf of the same kind; it is None if the leaf is empty."""
    target = _target(leaf)
    if array is None:
        array = np.zeros(target.shape, target.dtype)
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return array
    if not isinstance(array, jax.Array):
        placed = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) or leaf.committed else None
        array = jnp.asarray(array) if placed is None else jax.device_put(array, placed)
    return jax.random.wrap_key_data(array, impl=_key_impl(leaf)) if is_key(leaf) else array


def _key_impl(leaf: Any) -> Any:
    found = []
    abstract = jax.ShapeDtypeStruct((), leaf.dtype)
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), abstract)
    return found[0]
