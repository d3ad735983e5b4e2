"""One compilation for all equal calls that the caller does not jit.

Outside `jit`, jax compiles a loop at every call, because the body of the loop is a new function
each time. `once` is for functions that hold such a loop. Inside the caller's own `jit` it changes
nothing, because an inner program becomes a part of the outer one.
"""

import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

__all__ = ["once"]


def once(fn: Callable) -> Callable:
    """Compiles `fn` once for all calls with equal functions, structure, shapes and Python numbers.

    Arrays are data. A function among the arguments is static, together with what it reads from its
    closure, its module's globals and its class. If any of that changes, `fn` is compiled again, so
    a model trained in place never gives stale results. If a function reads a tracer, or something
    whose changes cannot be detected, `fn` is called without compilation. The last 16 programs are
    kept.
    """

    @functools.lru_cache(16)
    def program(static):
        def run(arrays):
            (structure, rest), arrays = static.value, iter(arrays)
            args, kwargs = jax.tree.unflatten(
                structure, [next(arrays) if a is _ARRAY else a for a in rest]
            )
            return fn(*args, **kwargs)

        return jax.jit(run)

    @functools.wraps(fn)
    def call(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        if jax.sharding.get_abstract_mesh().explicit_axes:  # `vmap` of `jit` forgets the mesh
            return fn(*args, **kwargs)
        arrays = [leaf for leaf in leaves if isinstance(leaf, _ARRAYS)]
        rest = [_ARRAY if isinstance(leaf, _ARRAYS) else leaf for leaf in leaves]
        try:
            key = (
                *_structure_state(structure, ()),
                *(_state(leaf, ()) for leaf in rest if leaf is not _ARRAY),
            )
            static = _Keyed(key, (structure, rest))
            hash(static)
        except (_OpaqueError, TypeError, ValueError):  # a value without a hash, keys without order
            return fn(*args, **kwargs)
        return program(static)(arrays)

    return call


class _OpaqueError(Exception):
    """A value whose changes between two calls cannot be detected."""


class _Keyed:
    """A value that is compared by its key."""

    def __init__(self, key: Hashable, value: Any):
        self.key, self.value = key, value

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, _Keyed) and self.key == other.key


class _Identity:
    """A value that is compared by identity. It is kept alive, so its id is not reused."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self):
        return id(self.value)

    def __eq__(self, other):
        return isinstance(other, _Identity) and self.value is other.value


_ARRAYS = (jax.Array, np.ndarray, np.generic)
_ARRAY = type("_Array", (), {})  # marks the place of an array among the leaves
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), np.dtype)
_IMMUTABLE = (jax.Array, types.BuiltinFunctionType, np.ufunc, jax.numpy.ufunc, type(jax.jit(len)))
_LIBRARIES = {
    "diffjax",
    "diffrax",
    "equinox",
    "flax",
    "jax",
    "jaxlib",
    "lineax",
    "numpy",
    "optax",
    "scipy",
}


def _is_library(module: str | None) -> bool:
    package = (module or "").partition(".")[0]
    return package in _LIBRARIES or (package in sys.stdlib_module_names and package != "__main__")


def _state(value: Any, inside: tuple) -> Hashable:
    """A key that two values share exactly if a function cannot tell them apart."""
    if isinstance(value, Tracer | np.ndarray):
        raise _OpaqueError
    if isinstance(value, _CONSTANTS):
        # 0, 0.0, -0.0 and False are equal, but give different programs
        return type(value), repr(value)
    if isinstance(value, _IMMUTABLE) or (
        isinstance(value, types.ModuleType) and _is_library(value.__name__)
    ):
        return _Identity(value)
    if isinstance(value, types.MethodType):
        return _state(value.__func__, inside), _state(value.__self__, inside)
    if isinstance(value, types.FunctionType | type) and value in inside:  # it refers to itself
        return _Identity(value)
    if isinstance(value, types.FunctionType):
        if value.__globals__.get("__name__") == "jaxtyping._decorator":  # it only checks types
            return _Identity(value), _state(vars(value)["__wrapped__"], (*inside, value))
        return _Identity(value), *(_state(v, (*inside, value)) for v in _reads(value))
    if isinstance(value, type):
        return _Identity(value), *(_state(v, (*inside, value)) for v in _members(value))
    leaves, structure = jax.tree.flatten(value)
    if not jax.tree_util.treedef_is_leaf(structure):
        return (*_structure_state(structure, inside), *(_state(leaf, inside) for leaf in leaves))
    if isinstance(value, jax.custom_jvp | jax.custom_vjp) and _is_library(value.__module__):
        return _Identity(value)
    if type(value).__hash__ not in (object.__hash__, None):  # a value such as a frozen dataclass
        return value, _state(type(value), inside)
    raise _OpaqueError


def _structure_state(structure: Any, inside: tuple) -> tuple:
    """The structure of a pytree, and the state of the classes and of the bound functions in it."""
    if structure.node_data() is None:
        return (structure,)
    kind, data = structure.node_data()
    found = [
        _state(kind, inside),
        *([_state(data, inside)] if issubclass(kind, functools.partial) else []),
    ]
    return (
        structure,
        *found,
        *(s for child in structure.children() for s in _structure_state(child, inside)),
    )


def _reads(fn: types.FunctionType) -> Iterator[Any]:
    """What a function reads from its closure, its defaults and its globals."""
    try:
        yield from (cell.cell_contents for cell in fn.__closure__ or ())
    except ValueError as error:  # a cell that is still empty
        raise _OpaqueError from error
    yield from (fn.__defaults__, fn.__kwdefaults__)
    if not _is_library(fn.__globals__.get("__name__")):
        yield from (fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__)


def _members(kind: type) -> Iterator[Any]:
    """The functions and other attributes that a class and its base classes define."""
    for base in kind.__mro__:
        if not _is_library(base.__module__):
            for name, member in vars(base).items():
                inner = [
                    getattr(member, a, None) for a in ("fget", "__func__", "__wrapped__", "method")
                ]
                functions = [f for f in (member, *inner) if isinstance(f, types.FunctionType)]
                if functions:
                    yield from functions
                elif not name.startswith("_"):
                    yield member


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that the code, and the functions defined in it, could read as globals."""
    inner = [
        name
        for const in code.co_consts
        if isinstance(const, types.CodeType)
        for name in _names(const)
    ]
    return tuple(dict.fromkeys((*code.co_names, *inner)))
