"""Data sets that fit in memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_labels", "in_memory"]


def in_memory(arrays: Any, batch_size: int, *, seed: int = 0) -> Callable[[int], Any]:
    """Batches of a data set that fits in memory, as a pure function of the step.

    So resuming needs no iterator state. Each epoch is a new permutation of the examples. A batch
    may hold the end of one epoch and the start of the next, and no example is dropped.

    Args:
        arrays: a pytree of arrays, such as images and labels, with the same leading size n.
        batch_size: the number of examples in a batch, from 1 to n.
        seed: the seed of the permutations.

    Returns:
        `step -> batch`, of the structure of `arrays`, as numpy arrays.

    Raises:
        ValueError: if the data set is empty, leading sizes differ, values are not finite or not
            numbers, or batch_size is outside [1, n].

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
        raise ValueError(
            f"arrays: expected arrays of the same leading size, got {sizes or 'no array'}"
        )
    n = next(iter(sizes.values()))
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size: expected a number from 1 to {n}, the number of examples, got {batch_size}"
        )

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
        raise ValueError(f"{name}: expected numbers, got dtype {array.dtype}")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name}: expected at least one example, got shape {array.shape}")
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(
            f"{name}: expected finite numbers, got {array[tuple(index)]} at {tuple(index.tolist())}"
        )


def check_labels(labels: Any, num_classes: int) -> np.ndarray:
    """The labels of a data set as int32, if they are class labels.

    Args:
        labels: an array of integers, of any shape.
        num_classes: the number of classes.

    Returns:
        The labels, of the shape of `labels`.

    Raises:
        ValueError: if they are not integers, or one lies outside [0, num_classes).

    >>> check_labels([0, 2, 1], 3)
    array([0, 2, 1], dtype=int32)
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: expected integers, got dtype {labels.dtype}")
    bad = np.argwhere((labels < 0) | (labels >= num_classes))
    if len(bad):
        index = tuple(bad[0].tolist())
        raise ValueError(
            f"labels: expected integers in [0, {num_classes}), got {labels[index]} at {index}"
        )
    return labels.astype(np.int32)
