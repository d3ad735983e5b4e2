"""Reads state dicts from pickles of `torch.save`, without PyTorch and without running their code.

Ordinary unpickling runs whatever the file asks for. Here a file may ask only for the parts of a
state dict: an ordered dict, tensors, their storages and dtypes. A tensor is a strided view of a
storage: element i lies at `offset + i . stride`. Reading takes time and memory linear in the size
of the file, whatever the file says.
"""

import io
import math
import pathlib
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["read_legacy", "read_zip"]

_DTYPES = [  # (name in numpy and torch, torch's storage)
    ("float64", "Double"),
    ("float32", "Float"),
    ("float16", "Half"),
    ("bfloat16", "BFloat16"),
    ("float8_e4m3fn", None),
    ("float8_e5m2", None),
    ("int64", "Long"),
    ("int32", "Int"),
    ("int16", "Short"),
    ("int8", "Char"),
    ("uint64", None),
    ("uint32", None),
    ("uint16", None),
    ("uint8", "Byte"),
    ("bool", "Bool"),
]
_NUMPY = {name: jnp.dtype(name) for name, _ in _DTYPES}
# The first object of a file that PyTorch wrote before version 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C


def read_zip(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a zip: PREFIX/data.pkl is the pickle, PREFIX/data/KEY the bytes of a storage."""
    length = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = _as_dict([(entry.filename, entry) for entry in archive.infolist()])
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed, which torch.save never does")
        size = sum(entry.file_size for entry in entries.values())
        if size > length:
            raise ValueError(f"its entries have {size} bytes, the file {length}")
        pickled = next((name for name in entries if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("it is a zip archive without data.pkl, not one of torch.save")
        prefix = pickled.removesuffix("data.pkl")
        if prefix + "byteorder" in entries and archive.read(prefix + "byteorder") != b"little":
            raise ValueError("it is not little-endian")
        tensors = _tensors(_unpickle(io.BytesIO(archive.read(pickled))))
        keys = {tensor.storage.key for tensor in tensors.values()}
        buffers = {key: archive.read(f"{prefix}data/{key}") for key in keys}
    return {name: _array(name, tensor, buffers) for name, tensor in tensors.items()}


def read_legacy(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads five pickles (magic number, version, platform, state dict, keys), then all storages.

    A storage is its length, followed by its bytes.
    """
    data = path.read_bytes()
    file = io.BytesIO(data)
    magic = _unpickle(file)
    if type(magic) is not int or magic != _MAGIC:
        raise ValueError("a pickle, but not one of torch.save")
    _, platform = _unpickle(file), _unpickle(file)
    if not _as_dict(platform.pairs)["little_endian"]:
        raise ValueError("it is not little-endian")
    tensors, keys = _tensors(_unpickle(file)), _unpickle(file)
    _check_strings(keys)
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    buffers = {}
    for key in keys:
        (length,) = struct.unpack("<q", file.read(8))
        start = file.tell()
        end = start + length * dtypes[key].itemsize
        if not start <= end <= len(data):
            raise ValueError(f"storage {key} ends at byte {end}, the file at {len(data)}")
        buffers[key] = memoryview(data)[start:end]
        file.seek(end)
    return {name: _array(name, tensor, buffers) for name, tensor in tensors.items()}


class _Dict:
    """A dict in a pickle, kept as pairs because hashing its keys could take forever."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list | None = None):
        self.pairs = [] if pairs is None else pairs


class _Storage(NamedTuple):
    """A storage as a pickle describes it."""

    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A tensor as a pickle describes it; offset and strides count elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError(f"expected a tensor's storage, got {_kind(storage)}")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"expected a tensor's dtype, got {_kind(dtype)}")
    _check_sizes("offset", (offset,))
    _check_sizes("shape", shape)
    _check_sizes("stride", stride)
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(stride))


def _check_sizes(name: str, sizes: Any) -> None:
    """Checks for at most 64 sizes of 64 bits each, so that their product is quick to compute."""
    known = isinstance(sizes, tuple | list) and len(sizes) <= 64
    if not known or any(type(n) is not int or abs(n) >= 2**63 for n in sizes):
        raise ValueError(
            f"{name}: expected at most 64 integers below 2^63, got {reprlib.repr(sizes)}"
        )


_ADMITTED = {  # what a pickle may ask for
    "collections.OrderedDict": _Dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": lambda *args: _tensor(*args[:4]),
    "torch._utils._rebuild_tensor_v3": lambda *args: _tensor(*args[:4], dtype=args[6]),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.storage.UntypedStorage": _NUMPY["uint8"],
    **{f"torch.{storage}Storage": _NUMPY[name] for name, storage in _DTYPES if storage},
    **{f"torch.{name}": _NUMPY[name] for name, _ in _DTYPES},
}


def _unpickle(file: io.BytesIO) -> Any:
    """Reads the next pickle of a torch file.

    It knows the opcodes that state dicts are written with. It calls only what `_ADMITTED` holds,
    sets no attribute and hashes no object of the pickle, so time and memory are linear in its
    length. (`pickle.Unpickler` allocates what a memo index asks for, and can hash nested tuples
    forever.)
    """
    stack, marks, memo = [], [], {}

    def pop(start: int) -> list:
        values = stack[start:]
        del stack[start:]
        return values

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(-int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop(marks.pop())))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                values = pop(-1 if opcode.name == "APPEND" else marks.pop())
                stack[-1].extend(values)
            case "EMPTY_DICT":
                stack.append(_Dict())
            case "SETITEM" | "SETITEMS":
                values = pop(-2 if opcode.name == "SETITEM" else marks.pop())
                stack[-1].pairs.extend(zip(values[::2], values[1::2], strict=True))
            case "GLOBAL":
                stack.append(_find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_find(*pop(-2)))
            case "BINPERSID":
                stack.append(_persistent(stack.pop()))
            case "REDUCE":
                function, args = pop(-2)
                if len(args) > 10:
                    raise ValueError(f"expected at most 10 arguments of a call, got {len(args)}")
                stack.append(function(*args))
            case "BUILD":  # an ordered dict's attributes, where torch keeps the version
                stack.pop()
            case name:
                raise ValueError(f"its pickle holds {name}, which no state dict needs")
    return stack.pop()


def _find(module: Any, name: Any) -> Any:
    _check_strings([module, name])
    found = _ADMITTED.get(f"{module}.{name}".replace("torch.cuda.", "torch."))
    if found is None:
        raise ValueError(
            f"it wants to load {module}.{name}, and only tensors are admitted; "
            "in PyTorch, save network.state_dict()"
        )
    return found


def _persistent(pid: Any) -> _Storage:
    """The storage that a persistent id describes: dtype, key, location, size; once also a view."""
    match pid:
        case ("storage", np.dtype() as dtype, str(key), _, _):
            return _Storage(key, dtype)
        case ("storage", np.dtype() as dtype, str(key), _, _, None):
            return _Storage(key, dtype)
    raise ValueError(f"expected a storage, got {reprlib.repr(pid)}")


def _kind(value: Any) -> str:
    return type(value).__name__.strip("_").lower()


def _check_strings(keys: Any) -> None:
    others = [_kind(key) for key in keys if type(key) is not str]
    if others:
        raise ValueError(f"expected names that are strings, got {others[0]}")


def _as_dict(pairs: list) -> dict[str, Any]:
    """Returns the pairs as a dict. Checks that the keys are strings, and that none occurs twice."""
    _check_strings(key for key, _ in pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("expected each name once, got one twice")
    return found


def _tensors(state: Any) -> dict[str, _Tensor]:
    if not isinstance(state, _Dict):
        raise ValueError(f"expected a dict of tensors, got {_kind(state)}")
    tensors = _as_dict(state.pairs)
    others = [
        f"{name!r} is {_kind(t)}" for name, t in tensors.items() if not isinstance(t, _Tensor)
    ]
    if others:
        raise ValueError(
            f"expected a flat dict of tensors, but {', '.join(others[:5])}; "
            "in PyTorch, save network.state_dict()"
        )
    return tensors


def _array(name: str, tensor: _Tensor, buffers: Mapping[str, Any]) -> np.ndarray:
    """The tensor as a view of its storage. Checks that it lies inside."""
    storage, dtype, offset, shape, stride = tensor
    buffer = buffers[storage.key]
    size = len(buffer) // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    # numpy's own check can overflow
    if min(0, offset, *shape, *stride) < 0 or (math.prod(shape) and last >= size):
        raise ValueError(
            f"{name} of shape {shape}, stride {stride} and offset {offset} overruns {size} elements"
        )
    return np.ndarray(
        shape, dtype, buffer, offset * dtype.itemsize, [step * dtype.itemsize for step in stride]
    )
