"""For tests and docstrings: memory is given back. For docstrings: names that they use without
importing them.
"""

import ctypes
import gc
import inspect

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forgets():
    """A worker does not keep the compiled programs of a module that is done, about 1.4 MB each."""
    yield
    jax.clear_caches()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc gives freed memory back to the system only when asked
        libc.malloc_trim(0)


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    import jax.numpy as jnp

    import diffjax

    doctest_namespace.update(jax=jax, jnp=jnp)
    exported = [getattr(diffjax, name) for name in diffjax.__all__]
    for module in (diffjax._bind, *filter(inspect.ismodule, exported)):
        doctest_namespace.update({name: getattr(module, name) for name in module.__all__})
