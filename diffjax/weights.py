"""Published weights: tensors from PyTorch's and safetensors' files, without PyTorch, into Flax NNX networks.

A `.pth` file is a pickle, and unpickling runs whatever the file asks for. Here it may ask for what a state dict is made of
(an ordered dict, tensors, their storages and dtypes) and for nothing else. A tensor is a strided view of a storage:
element i lies at `offset + i . stride`.
"""

import io
import json
import math
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = ["load_tensors", "read_tensors"]

_DTYPES = [  # numpy's and torch's name, torch's storage, safetensors' code
    ("float64", "Double", "F64"),
    ("float32", "Float", "F32"),
    ("float16", "Half", "F16"),
    ("bfloat16", "BFloat16", "BF16"),
    ("float8_e4m3fn", None, "F8_E4M3"),
    ("float8_e5m2", None, "F8_E5M2"),
    ("int64", "Long", "I64"),
    ("int32", "Int", "I32"),
    ("int16", "Short", "I16"),
    ("int8", "Char", "I8"),
    ("uint64", None, "U64"),
    ("uint32", None, "U32"),
    ("uint16", None, "U16"),
    ("uint8", "Byte", "U8"),
    ("bool", "Bool", "BOOL"),
]
_NUMPY = {name: np.dtype(name) for name, _, _ in _DTYPES}
_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a torch file of before version 1.6
_PARAMETERS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}  # NNX's and torch's


def read_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file: safetensors, or a state dict that `torch.save` wrote, in its zip or its older form.

    Args:
        path: the file; its content tells the format.

    Returns:
        The tensors by name, in their own dtypes, read-only. Tensors that share a storage share memory here, too.

    Raises:
        ValueError: if the file is truncated, malformed or of another kind; if it wants to load anything but tensors, naming
            it; if what it holds is not a flat dict of tensors.

    >>> import tempfile
    >>> header = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(len(header).to_bytes(8, "little") + header + np.array([1.0, 2.0], "f4").tobytes())
    ...     file.flush()
    ...     read_tensors(file.name)
    {'w': array([1., 2.], dtype=float32)}
    """
    data = pathlib.Path(path).read_bytes()
    try:
        if data.startswith(b"PK"):
            return _read_zip(data)
        if data.startswith(b"\x80"):  # a pickle
            return _read_legacy(data)
        return _read_safetensors(data)
    except Exception as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"read_tensors: cannot read {path}: {reason}") from error


def load_tensors(network: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    """A network with the tensors of a PyTorch state dict as its parameters.

    The network's attributes must bear the names of the state dict. Within a layer, torch's `weight` is NNX's `kernel`, with
    its axes (out, in, ...) moved to (..., in, out), or a norm's `scale`; `running_mean` and `running_var` are `mean` and
    `var`. `num_batches_tracked`, which only training uses, is left out.

    Args:
        network: an NNX network, or its structure alone, as `nnx.eval_shape` gives it.
        tensors: arrays by name.

    Returns:
        A new network, whose parameters have the dtypes of the tensors.

    Raises:
        ValueError: listing every tensor that is missing, unexpected or of another shape.

    >>> from flax import nnx
    >>> linear = nnx.eval_shape(lambda: nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    >>> load_tensors(linear, {"weight": np.array([[1.0, 2.0]], "f4"), "bias": np.array([0.5], "f4")})(jnp.ones(2))
    Array([3.5], dtype=float32)
    >>> load_tensors(linear, {"weight": np.zeros((2, 1)), "scale": np.ones(1)})
    Traceback (most recent call last):
    ValueError: load_tensors: the tensors do not fit Linear:
      bias: expected (1,), got none
      scale: expected none, got (1,)
      weight: expected (1, 2), got (2, 1)
    """
    leaves, structure = jax.tree.flatten_with_path(network)
    places = [_place(path) for path, _ in leaves]
    expected = {}
    for (name, transpose), (_, leaf) in zip(places, leaves, strict=True):
        expected[name] = (*leaf.shape[:-3:-1], *leaf.shape[:-2]) if transpose else leaf.shape
    got = {name: t.shape for name, t in tensors.items() if name.rpartition(".")[2] != "num_batches_tracked"}
    differ = [
        f"  {name}: expected {expected.get(name, 'none')}, got {got.get(name, 'none')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if differ:
        raise ValueError("\n".join([f"load_tensors: the tensors do not fit {type(network).__name__}:", *differ]))
    arrays = [_arranged(tensors[name], transpose) for name, transpose in places]
    return jax.tree.unflatten(structure, arrays)


def _place(path) -> tuple[str, bool]:
    """A parameter's name in a state dict, and whether it is a kernel."""
    module, dot, name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").rpartition(".")
    return module + dot + _PARAMETERS.get(name, name), name == "kernel"


def _arranged(tensor: np.ndarray, transpose: bool) -> Array:
    return jnp.asarray(tensor.transpose(*range(2, tensor.ndim), 1, 0) if transpose else tensor)


class _Tensor(NamedTuple):
    """A tensor as a pickle describes it; offset and strides count elements."""

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Loads a state dict as a dict of `_Tensor`, and notes the dtype of every storage."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.storages: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = _admitted().get(f"{module}.{name}".replace("torch.cuda.", "torch."))
        if found is None:
            raise ValueError(f"it wants to load {module}.{name}, and only tensors are admitted")
        return found

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, _, _, *view = pid
        if kind != "storage" or any(view):
            raise ValueError(f"expected a storage, got {pid}")
        self.storages[key] = dtype
        return key, dtype


def _admitted() -> dict[str, Any]:
    """What a pickle may ask for. The functions are made anew, since a pickle can set the attributes of what it gets."""

    def tensor(storage, offset, shape, stride, *_):
        key, dtype = storage
        return _Tensor(key, dtype, offset, shape, stride)

    def typed_tensor(storage, offset, shape, stride, _requires_grad, _hooks, dtype, *_):
        return _Tensor(storage[0], dtype, offset, shape, stride)

    def parameter(data, *_):
        return data

    return {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": typed_tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch.storage.UntypedStorage": "uint8",
        **{f"torch.{storage}Storage": name for name, storage, _ in _DTYPES if storage},
        **{f"torch.{name}": name for name, _, _ in _DTYPES},
    }


def _read_zip(data: bytes) -> dict[str, np.ndarray]:
    """PREFIX/data.pkl is the pickle, PREFIX/data/KEY the bytes of a storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("it is a zip archive, but not of torch.save: there is no data.pkl")
        prefix = pickled.removesuffix("data.pkl")
        if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
            raise ValueError("it is not little-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(pickled)))
        state = unpickler.load()
        buffers = {key: archive.read(f"{prefix}data/{key}") for key in unpickler.storages}
    return _arrays(state, buffers.__getitem__)


def _read_legacy(data: bytes) -> dict[str, np.ndarray]:
    """Five pickles (magic number, version, platform, state dict, keys); then every storage: its length and its bytes."""
    file = io.BytesIO(data)
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("a pickle, but not one of torch.save")
    _, platform = _Unpickler(file).load(), _Unpickler(file).load()
    if not platform["little_endian"]:
        raise ValueError("it is not little-endian")
    unpickler = _Unpickler(file)
    state, buffers = unpickler.load(), {}
    for key in _Unpickler(file).load():
        (length,) = struct.unpack("<q", file.read(8))
        start = file.tell()
        end = start + length * _NUMPY[unpickler.storages[key]].itemsize
        if not start <= end <= len(data):
            raise ValueError(f"storage {key} ends at byte {end}, the file at {len(data)}")
        buffers[key] = memoryview(data)[start:end]
        file.seek(end)
    return _arrays(state, buffers.__getitem__)


def _arrays(state: Any, buffer: Callable[[str], Any]) -> dict[str, np.ndarray]:
    if not isinstance(state, dict):
        raise ValueError(f"expected a dict of tensors, got {type(state).__name__}")
    others = [f"{name!r} is {type(t).__name__}" for name, t in state.items() if not isinstance(t, _Tensor)]
    if others:
        raise ValueError(f"expected a flat dict of tensors, but {', '.join(others[:5])}")
    return {name: _array(name, t, buffer(t.key)) for name, t in state.items()}


def _array(name: str, tensor: _Tensor, buffer: Any) -> np.ndarray:
    """The view of a storage, checked to lie inside of it."""
    _, _, offset, shape, stride = tensor
    dtype, size = _NUMPY[tensor.dtype], len(buffer) // _NUMPY[tensor.dtype].itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if min(0, offset, *shape, *stride) < 0 or (math.prod(shape) and last >= size):  # numpy's own check can overflow
        raise ValueError(f"{name} of shape {shape}, stride {stride} and offset {offset} overruns {size} elements")
    return np.ndarray(shape, dtype, buffer, offset * dtype.itemsize, [step * dtype.itemsize for step in stride])


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The length of the header, 8 bytes; the header, JSON; the tensors' bytes, to which its offsets refer."""
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or 8 + length > len(data):
        raise ValueError("neither a torch file nor a complete safetensors file")
    header, body = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    dtypes, tensors = {code: _NUMPY[name] for name, _, code in _DTYPES}, {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, shape, (start, end) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not 0 <= start <= end <= len(body) or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}, {dtype} of shape {shape}, spans bytes {start} to {end} of {len(body)}")
            tensors[name] = np.frombuffer(body[start:end], dtype).reshape(shape)
    return tensors
