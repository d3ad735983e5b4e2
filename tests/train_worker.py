"""A training run in a process of its own, which `training/test_checkpoints.py` stops in several
ways.

python train_worker.py DIRECTORY {run,terminate,kill,full}
"""

import os
import pathlib
import resource
import signal
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.training import fit, init_state, make_train_step, power_ema

STEPS, EVERY = 40, 10
DATA = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
# 9 MB of state: a write takes a while
SHAPES = {"w1": (16, 256), "w2": (256, 2000), "w3": (2000, 16)}


def new():
    """The state, the step and the batches of the run."""
    random = np.random.default_rng(1)
    params = {
        name: jnp.asarray(random.normal(0, 0.05, shape), jnp.float32)
        for name, shape in SHAPES.items()
    }
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS))

    def loss(params, key, batch):
        noise = jax.random.normal(key, batch.shape)
        hidden = jax.nn.silu(jax.nn.silu((batch + noise) @ params["w1"]) @ params["w2"])
        return jnp.mean((hidden @ params["w3"] - noise) ** 2)

    batches = iter(
        grain.MapDataset.source(DATA).seed(3).shuffle().repeat().batch(8).to_iter_dataset()
    )
    return (
        init_state(jax.random.key(2), params, optimizer),
        make_train_step(loss, optimizer, ema=power_ema()),
        batches,
    )


def interfere(how: str, directory: pathlib.Path):
    """The callback of a run, called at every step, after its checkpoint has begun to be written."""

    def callback(step, state):
        if how == "terminate" and step == 23:
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "full" and step == 25:
            while not (directory / "checkpoints" / "20").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        if how == "kill" and step % EVERY == 0 and step > EVERY:  # the first one is left complete
            while not (directory / "checkpoints" / str(step)).exists():
                unfinished = [
                    path
                    for path in (directory / "checkpoints").glob(f"{step}.*tmp*/**/*")
                    if path.is_file()
                ]
                if unfinished:
                    os.kill(os.getpid(), signal.SIGKILL)

    return callback


if __name__ == "__main__":
    directory, how = pathlib.Path(sys.argv[1]), sys.argv[2]
    state, step, batches = new()
    settings = {
        "checkpoint_every": EVERY,
        "callback": interfere(how, directory),
        "callback_every": 1,
        "keep": 2,
    }
    fit(
        state,
        jax.jit(step, donate_argnums=0),
        batches,
        STEPS,
        directory=directory,
        progress=False,
        **settings,
    )
