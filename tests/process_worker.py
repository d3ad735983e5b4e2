"""One process of several: `test_processes.py` starts them, and stops them in several ways.

python process_worker.py JOB DIRECTORY INDEX COUNT PORT
"""

import pathlib
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.training import checkpoints, fit, in_memory, init_state, make_train_step

JOB, DIRECTORY, INDEX, COUNT, PORT = sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:])
STEPS, BATCH, WIDTH = 12, 16, 64
DATA = np.random.default_rng(0).normal(size=(48, WIDTH)).astype(np.float32)


def mesh():
    return jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))


def sharding(*axes):
    return NamedSharding(mesh(), PartitionSpec(*axes))


def loss(params, key, batch):
    noise = jax.random.normal(key, batch.shape)
    return jnp.mean((jnp.tanh((batch + noise) @ params["w"]) - noise) ** 2)


OPTIMIZER = optax.adam(1e-2)


def new(sharded):
    """The state before the first step: sharded over all devices, or replicated as it is made."""
    params = {
        "w": jnp.asarray(np.random.default_rng(1).normal(0, 0.1, (WIDTH, WIDTH)), jnp.float32)
    }
    state = init_state(jax.random.key(2), params, OPTIMIZER)
    if not sharded:
        return state
    split = lambda x: sharding("data") if x.shape == (WIDTH, WIDTH) else sharding()  # noqa: E731
    host = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        state,
    )
    placed = jax.tree.map(lambda x: place(np.asarray(x), split(x)), host)
    return placed._replace(key=jax.random.wrap_key_data(placed.key))


def place(array, where):
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def batches(step):
    """The same global batch on any number of processes."""
    return place(in_memory(DATA, BATCH)(step), sharding("data"))


def train(name, steps, sharded=True, **settings):
    step = jax.jit(make_train_step(loss, OPTIMIZER), donate_argnums=0)
    directory = DIRECTORY / name
    settings = {"checkpoint_every": 6, "log_every": 3, "progress": False, **settings}
    return fit(new(sharded), step, batches, steps, directory=directory, **settings)


def tree():
    """Leaves of every kind; the same values on any number of devices."""
    big = np.arange(1024.0, dtype=np.float32).reshape(8, 128)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), 4)))
    return {
        "sharded": place(big, sharding("data")),
        "columns": place(big, sharding(None, "data")),
        "replicated": place(big[0], sharding()),
        "bfloat16": place(big.astype(jnp.bfloat16), sharding("data")),
        "keys": jax.random.wrap_key_data(place(keys, sharding("data"))),
        "local": jnp.arange(3),
        "numpy": np.arange(5),
        "empty": place(np.zeros((0, 4), np.float32), sharding()),
    }


def check(found, expected):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert type(a) is type(b) and (a.dtype, a.shape) == (b.dtype, b.shape), path
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if isinstance(a, jax.Array):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path
            pairs = zip(a.addressable_shards, b.addressable_shards, strict=True)
        else:
            pairs = [(a, b)]
        for x, y in pairs:
            assert (
                np.asarray(getattr(x, "data", x)).tobytes()
                == np.asarray(getattr(y, "data", y)).tobytes()
            ), path


def restore(name):
    expected = tree()
    abstract = lambda x: (  # noqa: E731
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        if isinstance(x, jax.Array) and not x.is_fully_addressable
        else x
    )
    for like in (expected, jax.tree.map(abstract, expected)):
        check(checkpoints.restore(DIRECTORY / name, like).state, expected)
    part = checkpoints.restore(DIRECTORY / name, expected["sharded"], part="sharded")
    check(part.state, expected["sharded"])


def job_save():
    with checkpoints.manager(DIRECTORY / "tree") as manager:
        for step in (1, 2, 1, 2, 1):  # each of the last three sets earlier ones aside
            checkpoints.save(manager, step, tree())
    restore("tree")
    train("never", STEPS)
    for steps in (7, STEPS):
        train("again", steps)
    for steps in (6, STEPS):
        train("local", steps, sharded=False)


def job_restore():
    restore("tree")
    train("never", STEPS + 6)  # on from what others saved
    train(f"alone-{COUNT}", STEPS)


def job_wait():
    """Trains for ever; another process sends the signals."""
    train("wait", 10**6, checkpoint_every=10**6, callback=tell, callback_every=1)


def job_interrupt():
    train("interrupt", 10**6, checkpoint_every=10**6, callback=tell, callback_every=1)


def job_die():
    train("die", 10**6, checkpoint_every=5, callback=tell, callback_every=1)


def job_on():
    """Resumes a run that was ended, and takes two steps."""
    for name in ("wait", "interrupt", "die"):
        path = DIRECTORY / name
        start = max(
            int(found.name) for found in (path / "checkpoints").iterdir() if found.name.isdecimal()
        )
        assert int(train(name, start + 2).step) == start + 2


def tell(step, state):
    """Says that the second checkpoint has begun, so the first one is complete."""
    time.sleep(0.01)
    if step == 12:
        (DIRECTORY / f"ready-{JOB}-{INDEX}").touch()


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if COUNT > 1:
        jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, INDEX, heartbeat_timeout_seconds=10)
    globals()[f"job_{JOB}"]()
