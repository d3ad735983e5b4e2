"""A linear regression to train: its loss, its data, and a new state."""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.training import init_state


def squared_error(params, key, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def regression(n=8):
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(n, 3)), "y": random.normal(size=n)}


def new_state(optimizer, key=0):
    return init_state(jax.random.key(key), {"w": jnp.array([1.0, -2.0, 0.5])}, optimizer)
