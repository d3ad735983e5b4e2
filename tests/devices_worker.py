"""Trains a small model with its batch and its state placed on eight CPU devices in several ways.

It prints the loss of each of five steps and the final state of each way as JSON;
`training/test_step.py` compares them.
"""

import json
import os

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.training import init_state, make_train_step

STEPS, SIZE, DIM, WIDTH = 5, 16, 4, 8
RANDOM = np.random.default_rng(0)
BATCHES = RANDOM.normal(size=(STEPS, SIZE, DIM))
PARAMS = {"in": RANDOM.normal(size=(DIM, WIDTH)), "out": RANDOM.normal(size=(WIDTH, DIM))}


def loss(params, key, batch):
    """Denoising with noise for the whole batch, and dropout with a key of each example."""
    noise_key, dropout_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, batch.shape)

    def error(key, x, noise):
        hidden = jnp.tanh((x + noise) @ params["in"]) * jax.random.bernoulli(key, 0.9, (WIDTH,))
        return jnp.sum((hidden @ params["out"] - x) ** 2)

    return jnp.mean(jax.vmap(error)(jax.random.split(dropout_key, len(batch)), batch, noise))


def train(mesh, batch_spec, width_spec, **settings):
    """Five steps. The parameters are sharded over their axis of size WIDTH."""
    specs = {"in": P(None, width_spec), "out": P(width_spec)}
    params = {
        name: jax.device_put(PARAMS[name], NamedSharding(mesh, specs[name])) for name in PARAMS
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    state = init_state(jax.random.key(0), params, optimizer)
    step = jax.jit(make_train_step(loss, optimizer, **settings), donate_argnums=0)
    losses = []
    for batch in BATCHES:
        state, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, P(batch_spec))))
        losses.append(float(metrics["loss"]))
    leaves = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state[:3])
    }
    return losses, {name: np.asarray(leaf).tolist() for name, leaf in leaves.items()}


def mesh(*shape):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(
        json.dumps(
            {
                "one": train(mesh(1), None, None),
                "data 2": train(mesh(2), "data", None),
                "data 8": train(mesh(8), "data", None),
                "fsdp 8": train(mesh(8), "data", "data"),
                "data 2, model 4": train(mesh(2, 4), "data", "model"),
                "micro one": train(mesh(1), None, None, accumulate=2),
                "micro data 8": train(mesh(8), "data", None, accumulate=2),
            }
        )
    )
