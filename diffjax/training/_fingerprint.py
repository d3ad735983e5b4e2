"""Names, shapes, dtypes and checksums of the arrays in a pytree.

A checksum is computed where the array is. It depends neither on the mesh nor on the number of
processes, so an array may be saved by one and checked by another.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._processes import gather

__all__ = ["describe", "fingerprint", "is_key", "named", "text"]


def named(tree: Any, part: str | None = None) -> dict[str, Any]:
    """The leaves by name, such as "params.hidden.kernel". Dots inside a key are written as %2E.

    The names begin with that of `part`, if the tree is a part of another one.

    >>> import numpy as np
    >>> named({"a.b": 1, "a": {"b": 2}})
    {'a.b': 2, 'a%2Eb': 1}
    """
    leaves = jax.tree.leaves_with_path(tree)
    start = [] if part is None else [part]
    names = {".".join([*start, *map(_quoted, path)]) or "%": leaf for path, leaf in leaves}
    if len(names) < len(leaves):
        raise ValueError(
            f"state: expected leaves with different names, "
            f"got {len(leaves)} leaves and {len(names)} names"
        )
    return names


def _quoted(key: Any) -> str:
    name = jax.tree_util.keystr((key,), simple=True)
    return re.sub("[%./]", lambda match: f"%{ord(match[0]):02X}", name) or "%"


def is_key(leaf: Any) -> bool:
    """Whether it is an array of typed PRNG keys, or describes one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> list:
    """`[shape, dtype]`, as JSON can hold them."""
    return [
        list(np.shape(leaf)),
        str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype),
    ]


def text(shape: list[int], dtype: str) -> str:
    """The description in words: "(3, 4) float32"."""
    return f"{tuple(shape)} {dtype}"


def fingerprint(leaves: dict[str, Any]) -> Callable[[], dict[str, list]]:
    """Begins to compute the checksums on the devices, and returns what waits for them.

    That gives `{name: [shape, dtype, checksum]}`. The checksum of objects and deleted arrays is
    None. If an array is spread over several processes, all of them must wait together.

    >>> import numpy as np
    >>> fingerprint({"w": np.ones(2, np.float32)})() == fingerprint({"w": jax.numpy.ones(2)})()
    True
    """
    described = {name: describe(leaf) for name, leaf in leaves.items()}
    parts = {name: _partial_sums(leaf) for name, leaf in leaves.items()}
    spread = [
        name for name, part in parts.items() if part is not None and not part.is_fully_addressable
    ]

    def wait() -> dict[str, list]:
        sums = {name: None if part is None else _total(part) for name, part in parts.items()}
        if spread:
            of_processes = gather([sums[name] for name in spread])
            sums |= zip(spread, map(sum, zip(*of_processes, strict=True)), strict=True)
        return {
            name: [*described[name], None if total is None else total % 2**32]
            for name, total in sums.items()
        }

    return wait


def _total(part: jax.Array) -> int:
    """The sum of the shards that this process has, each counted once over all processes."""
    shards = [shard.data for shard in part.addressable_shards if shard.replica_id == 0]
    return sum(int(np.sum(shard, dtype=np.uint64)) for shard in jax.device_get(shards))


def _partial_sums(leaf: Any) -> jax.Array | None:
    """Sums whose total is the checksum: one for each shard, so that no device waits for another."""
    if isinstance(leaf, jax.Array) and leaf.is_deleted():  # a batch that its step donated
        return None
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        words = _host_words(np.asarray(leaf))
        # it may be changed after this returns
        return None if words is None else jax.block_until_ready(_sum(words))
    if isinstance(leaf.sharding, NamedSharding):
        return _sums_of_shards(leaf, leaf.sharding.mesh, leaf.sharding.spec)
    return _sum(leaf)


def _host_words(array: np.ndarray) -> np.ndarray | None:
    """The bytes as unsigned integers, which need no 64-bit types on the device."""
    if array.dtype.hasobject:
        return None
    if array.dtype == bool:
        return array.astype(np.uint8)
    size = math.gcd(array.dtype.itemsize, 4)
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{size}")
    return words & np.uint8(2**bits - 1) if (bits := _bits(array.dtype)) < 8 else words


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums_of_shards(x: jax.Array, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> jax.Array:
    axes = [() if names is None else names for names in (*spec, *[None] * (x.ndim - len(spec)))]
    axes = [(names,) if isinstance(names, str) else names for names in axes]

    def local(block: jax.Array) -> jax.Array:
        begin = [jax.lax.axis_index(names) * n for names, n in zip(axes, block.shape, strict=True)]
        return _sum(block, x.shape, begin)[None]

    out = PartitionSpec(tuple(name for names in axes for name in names))
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=out)(x)


@functools.partial(jax.jit, static_argnums=1)
def _sum(x: jax.Array, shape: tuple[int, ...] | None = None, begin: Any = None) -> jax.Array:
    """The sum modulo 2^32 of all words, each mixed with its position.

    The order of a sum does not matter, so every shard can add its part. It begins at `begin` in an
    array of that shape. The mixing is that of MurmurHash3.
    """
    words = _words(x).astype(jnp.uint32)
    sizes = (x.shape if shape is None else shape) + words.shape[x.ndim :]
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(sizes[axis + 1 :]) % 2**32)
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if begin is not None and axis < x.ndim:
            index += begin[axis].astype(jnp.uint32)
        place += stride * index
    return jnp.sum(_mix(words ^ _mix(place + np.uint32(1))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == bool or (jnp.issubdtype(x.dtype, jnp.unsignedinteger) and _bits(x.dtype) <= 32):
        return x
    return jax.lax.bitcast_convert_type(x, f"uint{min(_bits(x.dtype), 32)}")


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return (
        jnp.finfo(dtype).bits
        if jnp.issubdtype(dtype, jnp.floating)
        else 8 * np.dtype(dtype).itemsize
    )


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
