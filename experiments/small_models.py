"""What studies of small models share: data in the plane, paths, normalized targets, training."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import make_circles, make_moons

import diffjax as dj
from diffjax import times, training
from diffjax.parametrizations import Parametrization

PATHS = {
    "linear VP": dj.linear_vp(),
    "VE": dj.ve(0.02, 10.0),
    "linear": dj.linear(),
    "GVP": dj.gvp(),
}
# Mean and standard deviation of log(sigma / alpha) on every path, for data of scale 1 with details
# of scale 0.1.
LOG_NOISE = -1.2, 1.5


def points(name: str, n: int, seed: int) -> np.ndarray:
    """Points (n, 2) of rings, moons or a mixture of six Gaussians, each of a scale of about 1."""
    rng = np.random.default_rng(seed)
    if name == "rings":
        return 1.5 * np.asarray(make_circles(n, noise=0.05, factor=0.4, random_state=seed)[0])
    if name == "moons":
        return make_moons(n, noise=0.07, random_state=seed)[0] - np.array([0.5, 0.25])
    if name == "mixture":
        angles = 2 * np.pi * rng.integers(6, size=n) / 6
        return 1.3 * np.stack([np.cos(angles), np.sin(angles)], 1) + 0.12 * rng.normal(size=(n, 2))
    raise ValueError(f"data: expected rings, moons or mixture, got {name!r}")


def normalized(parametrization: Parametrization) -> Parametrization:
    """The parametrization with inputs and target of unit variance, for data of unit variance."""
    return parametrization._replace(
        row=dj.bind(_unit_row, parametrization.row), inputs=dj.bind(_unit_inputs)
    )


def _unit_row(row, schedule, t):
    a, b, _ = row(schedule, t)
    return a, b, jnp.hypot(a, b)


def _unit_inputs(schedule, t):
    return 1 / jnp.hypot(*schedule(t)), t


def log_normal_times(key: jax.Array, n: int, schedule: dj.typing.Schedule, low: Any, high: Any):
    """Times with log-normal noise levels, equal for all paths, clipped to [low, high]; weights."""
    ts, weights = times.log_normal_times(key, n, schedule, *LOG_NOISE)
    return ts.clip(low, high), weights


def train(
    loss: Callable,
    params: Any,
    batches: Any,
    steps: int,
    learning_rate: float,
    seed: int,
    clip: float | None = None,
) -> tuple[Any, float]:
    """Trains with Adam and cosine decay; returns the averaged parameters and the seconds.

    The clock starts after two steps, because the first one compiles. The time of the
    remaining steps is scaled to all steps.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    if clip is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    step = jax.jit(
        training.make_train_step(loss, optimizer, ema=training.power_ema()), donate_argnums=0
    )
    state = training.init_state(jax.random.key(seed), params, optimizer)
    state = training.fit(state, step, batches, min(2, steps), progress=False)
    begin = time.perf_counter()
    state = jax.block_until_ready(training.fit(state, step, batches, steps, progress=False))
    seconds = (time.perf_counter() - begin) * steps / max(steps - 2, 1)
    return state.ema, seconds
