"""Tests and docstrings give memory back. Docstrings use names without importing them."""

import ctypes
import gc
import inspect
import os
import pathlib

import jax
import pytest

STATM = pathlib.Path("/proc/self/statm")  # its second number is that of the pages in memory
LIMIT = 1.5e9


def pytest_collection_finish():
    """The objects of all imports and tests stay: the garbage collector need not look at them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def _forgets_from_a_size_on():
    """A worker forgets its compiled programs, about 1.4 MB each, when it has grown to 1.5 GB."""
    yield
    if STATM.exists() and int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LIMIT:
        jax.clear_caches()
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc gives memory back only when asked
            libc.malloc_trim(0)


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    import jax.numpy as jnp

    import diffjax

    doctest_namespace.update(jax=jax, jnp=jnp)
    exported = [getattr(diffjax, name) for name in diffjax.__all__]
    for module in (diffjax._bind, *filter(inspect.ismodule, exported)):
        doctest_namespace.update({name: getattr(module, name) for name in module.__all__})
