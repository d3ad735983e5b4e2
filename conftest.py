"""Names that the examples in docstrings use without importing them."""

import inspect

import jax
import pytest


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    import jax.numpy as jnp

    import diffjax

    doctest_namespace.update(jax=jax, jnp=jnp)
    exported = [getattr(diffjax, name) for name in diffjax.__all__]
    for module in (diffjax._bind, *filter(inspect.ismodule, exported)):
        doctest_namespace.update({name: getattr(module, name) for name in module.__all__})
