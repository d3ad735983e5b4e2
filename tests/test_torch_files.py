"""Reading weight files: what is refused, and how tensors find their places. What torch writes is
read in test_parity.
"""

import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.torch_files import load_tensors, read_tensors

MAGIC = 0x1950A86A20F9469CFC6C


def written(folder, data, name="weights"):
    path = folder / name
    path.write_bytes(data)
    return path


STORAGE = np.arange(4, dtype="f4").tobytes()


def zipped(pickled, storage=STORAGE, byteorder=b"little"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", storage)
    return file.getvalue()


def legacy(pickled, keys=("0",), little_endian=True):
    head = [pickle.dumps(x, 2) for x in (MAGIC, 1001, {"little_endian": little_endian})]
    tail = [pickle.dumps(list(keys), 2), *((4).to_bytes(8, "little") + STORAGE for _ in keys)]
    return b"".join([*head, pickled, *tail])


def tensor(
    offset, shape, stride, storage=b"ctorch\nFloatStorage\n", function=b"_rebuild_tensor_v2"
):
    """The pickle of {"w": tensor}, as torch writes it: a view of the storage "0" of 4 elements."""
    # Less the protocol in front and the stop at the end.
    offset, shape, stride = (pickle.dumps(x, 2)[2:-1] for x in (offset, shape, stride))
    pid = b"(X\x07\0\0\0storage" + storage + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n"
        + function
        + b"\n("
        + pid
        + offset
        + shape
        + stride
        + b"\x89NtRs."
    )


def headed(text, body=bytes(16)):
    return len(text).to_bytes(8, "little") + text + body


def safetensors(header, body=bytes(16)):
    return headed(json.dumps(header).encode(), body)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
VIEW = tensor(0, (2, 2), (1, 0))  # it leaves the end of the storage alone
FORMATS = pytest.mark.parametrize(
    "data",
    [zipped(VIEW), legacy(VIEW), safetensors({"w": ENTRY})],
    ids=["zip", "legacy", "safetensors"],
)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_safetensors_of_every_dtype(tmp_path):
    """What the package reads, and float8, which it does not."""
    bits = bytes(range(200, 216))
    names = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint64 uint32 uint16 uint8"
    codes = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 I64 I32 I16 I8 U64 U32 U16 U8"
    dtypes = {
        code: jnp.dtype(name) for code, name in zip(codes.split(), names.split(), strict=True)
    }
    header = {
        code: {
            "dtype": code,
            "shape": [2, 8 // dtype.itemsize],
            "data_offsets": [16 * i, 16 * i + 16],
        }
        for i, (code, dtype) in enumerate(dtypes.items())
    }
    read = read_tensors(written(tmp_path, safetensors(header, bits * len(dtypes))))
    assert {code: tensor.dtype for code, tensor in read.items()} == dtypes
    for code, tensor in read.items():
        assert tensor.shape == tuple(header[code]["shape"]) and tensor.tobytes() == bits
    ones = np.frombuffer(
        b"\x80\x3f\x38\x3c", "u1"
    )  # 1 in bfloat16, float8_e4m3fn and float8_e5m2, by their definitions
    header = {
        "w": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]},
        "x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [2, 3]},
        "y": {"dtype": "F8_E5M2", "shape": [1, 1], "data_offsets": [3, 4]},
    }
    assert all(
        tensor == 1
        for tensor in read_tensors(written(tmp_path, safetensors(header, ones.tobytes()))).values()
    )


@pytest.mark.parametrize("length", [0x80, 0x4B50], ids=["pickle", "zip"])
def test_the_length_of_a_header_may_look_like_another_format(tmp_path, length):
    header = json.dumps({"w": ENTRY}).encode().ljust(length)
    read = read_tensors(written(tmp_path, headed(header, np.arange(4, dtype="f4").tobytes())))
    np.testing.assert_array_equal(read["w"], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "wrap", [bytes, zipped, legacy, lambda pickled: pickle.dumps(MAGIC, 2) + pickled]
)
def test_a_pickle_runs_nothing(tmp_path, wrap):
    victim = tmp_path / "victim"
    path = written(tmp_path, wrap(pickle.dumps({"w": Bomb(victim)}, 2)))
    with pytest.raises(
        ValueError,
        match=rf"{path}, which cannot be read: it wants to load {os.mkdir.__module__}\.mkdir",
    ):
        read_tensors(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Bomb(victim)))
    assert victim.exists()  # it would have


@pytest.mark.parametrize(
    "name", ["builtins\neval", "torch\nload", "torch.nn\nLinear", "collections\nCounter"]
)
def test_only_what_tensors_are_made_of_is_admitted(tmp_path, name):
    with pytest.raises(ValueError, match="wants to load " + name.replace("\n", r"\.")):
        read_tensors(written(tmp_path, zipped(b"\x80\x02c" + name.encode() + b"\n.")))


@pytest.mark.parametrize("wrap", [zipped, legacy])
def test_views_of_a_storage(tmp_path, wrap):
    def read(*view):
        return read_tensors(written(tmp_path, wrap(tensor(*view))))["w"]

    np.testing.assert_array_equal(read(0, (2, 2), (1, 2)), [[0, 2], [1, 3]])
    np.testing.assert_array_equal(read(3, (3,), (0,)), [3, 3, 3])
    np.testing.assert_array_equal(read(2, (), ()), 2)
    np.testing.assert_array_equal(read(1, (2,), (2,), b"ctorch.cuda\nFloatStorage\n"), [1, 3])
    assert read(4, (0, 2), (2, 1)).shape == (0, 2)
    assert not read(0, (4,), (1,)).flags.writeable
    for view in (
        (2, (3,), (1,)),
        (0, (2, 3), (2, 1)),
        (3, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (4, (), ()),
    ):
        with pytest.raises(ValueError, match="overruns 4 elements"):
            read(*view)
    for view in ((0, (2,), (1, 1)), (0.5, (2,), (1,)), (0, 2, 1), (0, (2**70,), (0,))):
        with pytest.raises(ValueError, match="cannot be read: "):
            read(*view)
    for storage in (b"X\x01\0\0\0O", b"X\x02\0\0\0M8", b"N"):  # objects, dates, nothing
        with pytest.raises(ValueError, match="cannot be read: "):
            read(0, (1,), (1,), storage)


@FORMATS
def test_a_truncated_file(tmp_path, data):
    assert read_tensors(written(tmp_path, data))["w"].shape == (2, 2)
    for length in range(0, len(data), 3):
        path = written(tmp_path, data[:length])
        with pytest.raises(ValueError, match=f"{path}, which cannot be read: .+"):
            read_tensors(path)


@FORMATS
def test_a_damaged_file_is_refused_or_read_but_nothing_else(tmp_path, data):
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[random.integers(len(data))] = random.integers(256)
        try:
            read_tensors(written(tmp_path, bytes(damaged)))
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "it begins like none of them"),
        (b"GIF89a and so on", "it begins like none of them"),
        (pickle.dumps({"w": 1.0}), "a pickle, but not one of torch.save"),
        (zipped(pickle.dumps([1])), "expected a dict of tensors, got list"),
        (
            zipped(pickle.dumps({"epoch": 3, "model": {}})),
            "flat dict of tensors, but 'epoch' is int, 'model' is dict",
        ),
        (zipped(VIEW, byteorder=b"big"), "not little-endian"),
        (legacy(VIEW, little_endian=False), "not little-endian"),
        (legacy(VIEW, keys=("1",)), "KeyError"),
        (legacy(VIEW, keys=()), "KeyError"),
        (zipped(VIEW, storage=b"0123456"), "overruns 1 elements"),
        (zipped(VIEW.replace(b"storage", b"package")), r"expected a storage, got \('package'"),
        (
            legacy(VIEW.replace(b"K\x04tQ", b"K\x04(K\x01K\x02ttQ")),
            r"expected a storage, got .*\(1, 2\)",
        ),
        (safetensors({"w": ENTRY})[:40], "SafetensorError"),
        (safetensors({"w": ENTRY | {"dtype": "F33"}}), "F33"),
        (safetensors({"w": ENTRY | {"shape": [2, 3]}}), "SafetensorError"),
        (safetensors({"w": ENTRY | {"shape": [-1]}}), "SafetensorError"),
        (
            safetensors({"w": ENTRY | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
            "too big",
        ),
        (safetensors({"w": ENTRY | {"shape": [0] * 65, "data_offsets": [0, 0]}}, b""), "dimension"),
        (safetensors({"w": ENTRY | {"data_offsets": [4, 20]}}), "SafetensorError"),
        (safetensors({"w": ENTRY | {"data_offsets": [-16, 0]}}), "SafetensorError"),
        (safetensors([ENTRY]), "it begins like none of them"),
    ],
)
def test_malformed_files(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read_tensors(written(tmp_path, data))


def stored(*changes, compression=zipfile.ZIP_STORED):
    """A zip file of a state dict, with changes to what it says of its storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", VIEW)
        archive.writestr("archive/data/0", bytes(10**7))
        for name, value in changes:
            setattr(archive.getinfo("archive/data/0"), name, value)
    return file.getvalue()


# a tuple of two tuples, each of two tuples, ...: 2^40 of them, one in memory
DOUBLED = b"q\0h\0\x86" * 40
DEEP = b"\x85" * 300_000  # a tuple of a tuple of a tuple ...
WIDE = pickle.dumps((2**62,) * 10**5, 2)[2:-1]
HOSTILE = {  # (file, message)
    "doubled key": (b"\x80\x02})" + DOUBLED + b"Ns.", "not one of torch.save"),
    "doubled name": (
        zipped(b"\x80\x02})" + DOUBLED + b"Ns."),
        "expected names that are strings, got tuple",
    ),
    "doubled class": (
        zipped(b"\x80\x04X\x01\0\0\0a)" + DOUBLED + b"\x93."),
        "names that are strings, got tuple",
    ),
    "doubled storage": (zipped(b"\x80\x02)" + DOUBLED + b"Q."), r"expected a storage, got \(\("),
    "deep name": (
        zipped(b"\x80\x02})" + DEEP + b"Ns."),
        "expected names that are strings, got tuple",
    ),
    "deep storage": (zipped(b"\x80\x02)" + DEEP + b"Q."), r"expected a storage, got \(\("),
    "memo index": (b"\x80\x02Nr\xff\xff\xff\x0f.", "not one of torch.save"),
    "many axes": (
        zipped(VIEW.replace(b"K\x02K\x02\x86", WIDE)),
        "shape: expected at most 64 integers",
    ),
    "many arguments": (
        zipped(b"\x80\x02ccollections\nOrderedDict\n" + WIDE + b"R."),
        "at most 10 arguments",
    ),
    "many names": (zipped(b"\x80\x02}(X\x01\0\0\0wNX\x01\0\0\0wNu."), "each name once"),
    "opcode": (zipped(b"\x80\x02c__builtin__\nset\n)\x81."), "it wants to load __builtin__.set"),
    "instance": (zipped(b"\x80\x02)q\0)\x81."), "its pickle holds NEWOBJ"),
    "compressed": (stored(compression=zipfile.ZIP_DEFLATED), "archive/data.pkl is compressed"),
    "entry beyond the file": (
        stored(("file_size", 2**40)),
        "its entries have [0-9]{13} bytes, the file 1[0-9]{7}",
    ),
    "entry twice": (stored(("filename", "archive/data.pkl")), "expected each name once"),
    "header beyond the file": (b"\xff" * 7 + b"\x7f{}", "SafetensorError"),
    "deep header": (headed(b'{"w":' + b"[" * 10**5), "SafetensorError"),
    "header's many axes": (
        safetensors({"w": ENTRY | {"shape": [2**62] * 10**4}}),
        "SafetensorError",
    ),
    "tensors that overlap": (safetensors({"v": ENTRY, "w": ENTRY}), "SafetensorError"),
    "a hole": (safetensors({"w": ENTRY}, bytes(17)), "SafetensorError"),
}
READ = """
import json, pathlib, sys, tracemalloc
from diffjax.torch_files import read_tensors

results = {}
tracemalloc.start()
for path in pathlib.Path(sys.argv[1]).iterdir():
    tracemalloc.reset_peak()
    try:
        message = str(read_tensors(path))
    except ValueError as error:
        message = str(error)
    results[path.name] = message, tracemalloc.get_traced_memory()[1]
print(json.dumps(results))
"""


def test_hostile_files_are_refused_in_memory_of_the_order_of_their_size(tmp_path):
    """In a process of its own, which they might crash or hang."""
    for name, (data, _) in HOSTILE.items():
        written(tmp_path, data, name)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    root = pathlib.Path(__file__).parent.parent
    results = json.loads(
        subprocess.run(command, cwd=root, stdout=subprocess.PIPE, timeout=100, check=True).stdout
    )
    assert results.keys() == HOSTILE.keys()
    for name, (data, expected) in HOSTILE.items():
        message, peak = results[name]
        assert re.search(f"which cannot be read: .*{expected}", message), (name, message)
        assert peak < 10**6 + 200 * len(data), (name, peak)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none")


class Network(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 5), rngs=rngs)
        self.layers = nnx.List([nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])


def state(**changes):
    shapes = {
        "stem.weight": (4, 3, 3, 5),
        "stem.bias": (4,),
        "layers.1.weight": (2, 4),
        "layers.1.bias": (2,),
    }
    shapes |= {
        f"layers.0.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")
    }
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=shape)
        for name, shape in (shapes | changes).items()
        if shape is not None
    }


@pytest.mark.parametrize(
    "build", [nnx.eval_shape, lambda make: make()], ids=["structure", "network"]
)
def test_tensors_find_their_places(build):
    empty = build(lambda: Network(nnx.Rngs(0)))
    tensors = state(**{"layers.0.num_batches_tracked": ()})
    network = load_tensors(empty, tensors)
    np.testing.assert_array_equal(
        network.stem.kernel[1, 2, 0, 3], tensors["stem.weight"][3, 0, 1, 2]
    )
    np.testing.assert_array_equal(network.layers[1].kernel[...], tensors["layers.1.weight"].T)
    for ours, theirs in {
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }.items():
        np.testing.assert_array_equal(
            getattr(network.layers[0], ours)[...], tensors[f"layers.0.{theirs}"]
        )
    half = load_tensors(
        empty, {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    )
    assert half.stem.kernel.dtype == jnp.bfloat16


def test_tensors_that_do_not_fit_are_all_listed():
    changes = {
        "stem.weight": (4, 3, 5, 3),
        "stem.bias": None,
        "layers.1.weight": (4, 2),
        "extra": (1,),
    }
    with pytest.raises(ValueError) as error:
        load_tensors(nnx.eval_shape(lambda: Network(nnx.Rngs(0))), state(**changes))
    assert str(error.value).splitlines() == [
        "load_tensors: the tensors do not fit Network:",
        "  extra: expected none, got (1,)",
        "  layers.1.weight: expected (2, 4), got (4, 2)",
        "  stem.bias: expected (4,), got none",
        "  stem.weight: expected (4, 3, 3, 5), got (4, 3, 5, 3)",
    ]
