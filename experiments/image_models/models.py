"""Training of a class-conditional model of images, and sampling from it."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import diffjax as dj
from diffjax import likelihood
from experiments import train_images
from experiments.image_models import Images, Settings
from experiments.train_images import Model, save_picture


def train(network: nnx.Module, data: Images, settings: Settings) -> tuple[Model, float]:
    """Trains a model; returns it, and the seconds of the training steps in all runs."""
    settings.out.mkdir(parents=True, exist_ok=True)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(200, settings.steps // 4), settings.steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=settings.weight_decay)
    )

    def picture(step, model):
        labels = class_labels(8 * len(data.names), data)
        xs = generate(model, labels, noise(0, len(labels), data), dj.uniform(20), settings.guidance)
        save_images(settings.out / f"preview_{step:06d}.png", to_images(xs, data), data)

    arrays = data.train.astype(np.int32), data.train_labels.astype(np.int32)
    args = network, optimizer, arrays, len(data.names), settings, picture, data.levels
    options = {"log_every": min(20, settings.steps), "tensorboard": settings.tensorboard}
    model = train_images.train(*args, **options)
    lines = training_log(settings)
    steps = np.diff([0, *(line["step"] for line in lines)])
    seconds = sum(n / line["steps_per_second"] for n, line in zip(steps, lines, strict=True))
    return model, float(seconds)


def training_log(settings: Settings) -> list[dict]:
    return [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]


@functools.partial(jax.jit, static_argnames=("method", "run", "block"))
def generate(
    model: Model,
    labels: jax.Array,
    x1: jax.Array,
    ts: jax.Array,
    scale: float | None = None,
    method: Callable[..., dj.Sampler] = dj.heun,
    run: Callable[..., jax.Array] = dj.sample,
    block: int = 200,
    **options: Any,
) -> jax.Array:
    """Samples of the labels from start points x1, by a deterministic method.

    They are guided if scale is given. Images are drawn in blocks, which bounds the memory. Further
    options go to the method.
    """

    def one(args):
        label, x = args
        denoise = model.denoiser(label)
        if scale is not None:
            denoise = dj.cfg(denoise, model.denoiser(), scale)
        return run(jax.random.key(0), method(denoise, model.schedule, **options), x, ts)

    return jax.lax.map(one, (labels, x1), batch_size=block)


def noise(seed: int, n: int, data: Images) -> jax.Array:
    """The start points of n samples."""
    return jax.random.normal(jax.random.key(seed), (n, *data.train.shape[1:]))


def class_labels(n: int, data: Images) -> jax.Array:
    """The labels 0, 1, ..., over and over."""
    return jnp.resize(jnp.arange(len(data.names)), (n,))


def to_images(xs: jax.Array, data: Images) -> np.ndarray:
    """Samples in [-1, 1) as integer images."""
    return np.asarray(likelihood.quantize(xs, data.levels))


def save_images(path, images: np.ndarray, data: Images, columns=()) -> None:
    """One row for each class. The labels of the images are 0, 1, ..., over and over."""
    save_picture(path, images.reshape(-1, *data.shape), list(data.names), data.levels, columns)
