"""The squared error of a network."""

import jax.numpy as jnp

from .._calls import call_network
from .._checks import as_float

__all__ = ["mean_squared_error"]


def mean_squared_error(network, target, x, t):
    """`|network(x, t) - target|^2`, a mean over the elements of x."""
    out = call_network(network, x, t)
    if jnp.shape(target) != jnp.shape(x):
        raise ValueError(
            f"target: expected a velocity or score of the shape of x, {jnp.shape(x)}, "
            f"got {jnp.shape(target)}"
        )
    return jnp.mean((as_float(out, "network's output") - as_float(target, "target")) ** 2)
