"""The data sets, and the training of one model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import diffjax as dj
from diffjax import likelihood, schedules, training
from diffjax.networks import MLP
from experiments import small_models
from experiments.image_models import digits
from experiments.objectives import MAX_NOISE, MIN_NOISE, Data, Path, Settings
from experiments.objectives.objectives import Objective, batch_loss
from experiments.train_images import Model


def load(name: str, settings: Settings) -> Data:
    if name == "digits":
        data = digits.load(0)
        network = functools.partial(MLP, 64, width=256, depth=4, num_classes=10)
        labels = data.train_labels.astype(np.int32), data.held_out_labels.astype(np.int32)
        steps, levels = settings.digits_steps, data.levels
        return Data(data.train, labels[0], data.held_out, labels[1], network, steps, levels)
    points = [
        small_models.points(name, n, i).astype(np.float32) for i, n in enumerate((20_000, 2000))
    ]
    network = functools.partial(MLP, 2, width=64, depth=3)
    return Data(points[0], None, points[1], None, network, settings.steps)


def learned_path(params) -> Path:
    return Path(schedules.monotone_vp(*params), jnp.zeros(()), jnp.ones(()))


def train(
    objective: Objective, path: Path | None, data: Data, settings: Settings, seed: int
) -> tuple[Model, Path, float]:
    """The model, its final path, and the seconds. Without a path, one is learned."""
    apply, network = training.functional(data.network(rngs=nnx.Rngs(seed)))
    params: dict[str, Any] = {"network": network}
    if path is None:  # learned: the shape of half the log-SNR, and its two ends
        ends = (-jnp.log(jnp.asarray(noise)) for noise in (MIN_NOISE, MAX_NOISE))
        params["schedule"] = schedules.init_monotone(jax.random.key(seed)), *ends

    def loss(params, key, batch):
        x0s, labels = (batch, None) if data.labels is None else batch
        if data.levels is not None:
            key, pixel_key = jax.random.split(key)
            x0s = likelihood.dequantize(pixel_key, x0s, data.levels)
        current = learned_path(params["schedule"]) if path is None else path
        return batch_loss(objective, dj.bind(apply, params["network"]), current, key, x0s, labels)

    steps, batch = data.steps, settings.batch
    if objective.simulates:
        steps, batch = settings.simulated_steps, settings.simulated_batch
    arrays = data.train if data.labels is None else (data.train, data.labels)
    batches = training.in_memory(arrays, batch, seed=seed)
    params, seconds = small_models.train(
        loss, params, batches, steps, settings.learning_rate, seed, clip=1.0
    )
    final = learned_path(params["schedule"]) if path is None else path
    network = dj.bind(apply, params["network"])
    return Model(network, final.schedule, objective.parametrization), final, seconds
