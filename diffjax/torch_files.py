"""Published weights: files of PyTorch or safetensors into NNX networks, without PyTorch."""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors import safe_open

from ._torch_pickles import read_legacy, read_zip

__all__ = ["load_tensors", "read_tensors"]

# NNX's names and torch's.
_PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_DTYPES = {
    "BOOL": jnp.bool_,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
}


def read_tensors(path: str | pathlib.Path) -> Mapping[str, np.ndarray]:
    """Reads the tensors of a file: safetensors, or a state dict that `torch.save` wrote.

    Reading never runs code from the file. A tensor of safetensors is mapped to memory when it is
    looked up, so that a large file is never in memory as a whole. A file of `torch.save` is a
    pickle, in a zip archive or in the older form. Only the opcodes and classes of state dicts are
    admitted.

    Args:
        path: the file; its content tells the format.

    Returns:
        The tensors by name, with the dtypes of the file. They are read-only. Those of a state dict
        share memory where they share a storage.

    Raises:
        ValueError: if the file is truncated, malformed or of another kind; if it wants to load
            anything but tensors, naming it; if what it holds is not a flat dict of tensors.
        OSError: if the file cannot be read.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"w": np.array([1.0, 2.0], "f4")}, path)
    >>> dict(read_tensors(path))
    {'w': array([1., 2.], dtype=float32)}
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        # behind the length of the header, whose bytes may be those of a pickle
        if start[8:] == b"{":
            return _Safetensors(path)
        if start[:2] == b"PK":
            return read_zip(path)
        if start[:1] == b"\x80":
            return read_legacy(path)
        raise ValueError("it begins like none of them")
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"path: expected a file of safetensors or a state dict of torch.save, "
            f"got {path}, which cannot be read: {reason}"
        ) from error


class _Safetensors(Mapping):
    """The tensors of a file of safetensors; each lookup maps its own part of the file."""

    def __init__(self, path: pathlib.Path):
        with safe_open(path, framework="numpy") as file:  # checks the header against the file
            names = list(file.keys())
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self._path, self._start = path, 8 + size
        self._entries = {name: header[name] for name in names}
        codes = {entry["dtype"] for entry in self._entries.values()}
        if unknown := codes - _DTYPES.keys():
            raise ValueError(f"it has tensors of the dtype {min(unknown)}")
        for entry in self._entries.values():  # shapes that numpy cannot have
            np.broadcast_to(np.empty((), _DTYPES[entry["dtype"]]), entry["shape"])

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if not math.prod(shape):
            return np.empty(shape, dtype)
        offset = self._start + entry["data_offsets"][0]
        return np.memmap(self._path, dtype, "r", offset, shape).view(np.ndarray)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load_tensors(
    network: Any, tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None = None
) -> Any:
    """A network with the tensors of a PyTorch state dict as its parameters.

    The network's attributes must have the names of the state dict. Within a layer, torch's `weight`
    is NNX's `kernel`, with its axes (out, in, ...) moved to (..., in, out), or the `scale` of a
    norm, or the `embedding` of a table. `running_mean` and `running_var` are `mean` and `var`.
    `num_batches_tracked`, which only training uses, is ignored.

    Args:
        network: an NNX network, or its structure alone, the result of `nnx.eval_shape`.
        tensors: arrays by name.
        dtype: of the floating-point parameters; None for those of the tensors.

    Returns:
        A new network.

    Raises:
        ValueError: listing every tensor that is missing, unexpected or of another shape.

    >>> from flax import nnx
    >>> linear = nnx.eval_shape(lambda: nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    >>> tensors = {"weight": np.array([[1.0, 2.0]], "f4"), "bias": np.array([0.5], "f4")}
    >>> load_tensors(linear, tensors)(jnp.ones(2))
    Array([3.5], dtype=float32)
    >>> load_tensors(linear, {"weight": np.zeros((2, 1)), "scale": np.ones(1)})
    Traceback (most recent call last):
    ValueError: load_tensors: the tensors do not fit Linear:
      bias: expected (1,), got none
      scale: expected none, got (1,)
      weight: expected (1, 2), got (2, 1)
    """
    leaves, structure = jax.tree.flatten_with_path(network)
    places = [tensor_name(path) for path, _ in leaves]
    expected = {}
    for (name, transpose), (_, leaf) in zip(places, leaves, strict=True):
        expected[name] = (*leaf.shape[:-3:-1], *leaf.shape[:-2]) if transpose else leaf.shape
    used = [name for name in tensors if name.rpartition(".")[2] != "num_batches_tracked"]
    got = {name: tensors[name].shape for name in used}
    differ = [
        f"  {name}: expected {expected.get(name, 'none')}, got {got.get(name, 'none')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if differ:
        raise ValueError(
            "\n".join([f"load_tensors: the tensors do not fit {type(network).__name__}:", *differ])
        )
    arrays = [_arranged(tensors[name], transpose, dtype) for name, transpose in places]
    return jax.tree.unflatten(structure, arrays)


def tensor_name(path) -> tuple[str, bool]:
    """The name in a state dict of a parameter by its path, and whether it is a kernel."""
    place = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    module, dot, name = place.rpartition(".")
    return module + dot + _PARAMETERS.get(name, name), name == "kernel"


def _arranged(tensor: np.ndarray, transpose: bool, dtype: DTypeLike | None) -> Array:
    if transpose:
        tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    if dtype is not None and jnp.issubdtype(tensor.dtype, jnp.floating):
        tensor = tensor.astype(dtype)
    return jnp.asarray(tensor)
