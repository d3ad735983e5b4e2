"""The squared error of a network."""

import jax.numpy as jnp

__all__ = ["mean_squared_error"]


def mean_squared_error(network, goal, x, t):
    """`|network(x, t) - goal|^2`, a mean over the elements of x."""
    out = network(x, t)
    if jnp.shape(out) != jnp.shape(x):
        raise ValueError(
            f"network: it returned {jnp.shape(out)} for x of shape {jnp.shape(x)}; expected the same shape"
        )
    return jnp.mean((out - goal) ** 2)
