"""Constants that vary as data do, for loops under `vmap`, `shard_map` and explicit meshes."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def zeros_of(x, *numbers):
    """Zeros of the shape and dtype of x, computed from x and the numbers.

    Under a transformation, a loop that computes something varying must not start from a constant.
    These zeros are mapped where `vmap` maps x or one of the numbers, vary over the same axes of
    `shard_map`, and are sharded as x is. The compiler turns them into a constant.
    """
    zeros = jnp.equal(x, x) & False
    for number in numbers:
        zeros = zeros | (jnp.equal(number, number) & False)
    return zeros.astype(jnp.result_type(x))


def stack(numbers):
    """`jnp.stack` of scalars. On a mesh with explicit axes constants get the others' sharding."""
    zero = zeros_of(numbers[0], *numbers)
    return jnp.stack([number + zero for number in numbers])


def on_mesh(x):
    """Returns x, placed on the mesh with explicit axes if there is one.

    Otherwise `vmap` refuses constants and the results of callbacks there.
    """
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    if explicit and jax.typeof(x).sharding.mesh.empty:
        return jax.sharding.reshard(x, PartitionSpec())
    return x


def varying_carry(step, carry):
    """Casts a loop's first carry to vary over the axes of `shard_map` that `step(carry)` does."""
    carry = jax.tree.map(on_mesh, carry)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    cast, varying = None, jax.tree.map(_varying_axes, carry)
    while cast != varying:
        cast = varying
        carry = jax.tree.map(
            lambda x, axes: jax.lax.pcast(x, tuple(axes - _varying_axes(x)), to="varying"),
            carry,
            cast,
        )
        varying = jax.tree.map(_varying_axes, jax.eval_shape(step, carry))
    return carry


def varying_scan(body, carry, xs, scan=jax.lax.scan):
    """A scan whose first carry is cast to vary as the later ones do."""
    first = jax.tree.map(lambda x: x[0], xs)
    return scan(body, varying_carry(lambda carry: body(carry, first)[0], carry), xs)


def vary_alike(*trees):
    """Casts every array to vary over all axes of `shard_map` that any of them varies over."""
    axes = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(trees)))
    return jax.tree.map(
        lambda x: jax.lax.pcast(x, tuple(axes - _varying_axes(x)), to="varying") if axes else x,
        trees,
    )


def _varying_axes(x):
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # jax renamed it


def error_if(x, wrong, message: str):
    """Returns x, or raises RuntimeError at run time if `wrong`. In `shard_map` it returns NaN."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), x)
    return eqx.error_if(x, wrong, message)
