"""The squared error of a network."""

import jax.numpy as jnp

from .._calls import call_network
from .._checks import as_float

__all__ = ["mean_squared_error"]


def mean_squared_error(network, goal, x, t):
    """`|network(x, t) - goal|^2`, a mean over the elements of x."""
    out = call_network(network, x, t)
    if jnp.shape(goal) != jnp.shape(x):
        raise ValueError(
            f"expected a goal of the shape of x, {jnp.shape(x)}, got {jnp.shape(goal)}"
        )
    return jnp.mean((as_float(out, "network's output") - as_float(goal, "goal")) ** 2)
