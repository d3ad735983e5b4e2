"""Training of the U-Net and of its controls, and sampling.

A network sees an image folded: each block of 2x2 pixels is one pixel of four channels. This makes a
U-Net four times cheaper, and changes neither the data nor their Fréchet distance.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import diffjax as dj
from diffjax import likelihood, losses, training
from diffjax.networks import ControlNet, UNet, controlled

SCHEDULE, LEVELS, CLASSES = dj.linear(), 256, 10
EVENT = (14, 14, 4)


def fold(images):
    """(n, 2h, 2w) -> (n, h, w, 4), of numpy or jax."""
    n, height, width = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2)
    return blocks.swapaxes(2, 3).reshape(n, height // 2, width // 2, 4)


def unfold(folded):
    """The inverse of `fold`."""
    n, height, width, _ = folded.shape
    blocks = folded.reshape(n, height, width, 2, 2).swapaxes(2, 3)
    return blocks.reshape(n, 2 * height, 2 * width)


def train(network_of: Callable, params, data, settings, steps: int, out: pathlib.Path, watch):
    """The average of the parameters of `network_of(params, *hints)`, trained by flow matching.

    Args:
        network_of: `(params, *hints) -> network`.
        params: where the training starts.
        data: folded images, labels, and the hints, if there are any.
        settings: learning rate, batch, label dropout, seed and interval.
        steps: of the training.
        out: the folder of the checkpoints.
        watch: called as `watch(step, params)` with the average.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(200, steps // 4), steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss(params, key, batch):
        images, labels, *hints = batch
        pixel_key, key = jax.random.split(key)
        x0s = likelihood.dequantize(pixel_key, images, LEVELS)

        def one(key, pair, t, label):
            x0, hints = pair
            network = dj.bind(network_of(params, *hints), cond=label)
            return losses.denoising(key, network, SCHEDULE, dj.VELOCITY, x0, t)

        drop = {"drop": settings.label_dropout, "null": CLASSES}
        return losses.over_batch(key, one, (x0s, hints), labels, **drop)

    step = training.make_train_step(loss, optimizer, ema=training.power_ema())
    state = training.fit(
        training.init_state(jax.random.key(settings.seed), params, optimizer),
        jax.jit(step, donate_argnums=0),
        training.in_memory(data, settings.batch, seed=settings.seed),
        steps,
        directory=out,
        checkpoint_every=settings.every,
        callback=lambda step, state: watch(step, state.ema),
        callback_every=settings.every,
    )
    return state.ema


def train_unet(data, settings) -> UNet:
    """The U-Net that is controlled afterwards."""
    options: dict[str, Any] = {"num_classes": CLASSES, "rngs": nnx.Rngs(settings.seed)}
    unet = UNet(EVENT, width=settings.width, multipliers=(1, 2), blocks=1, **options)
    apply, params = training.functional(unet)
    network_of = functools.partial(dj.bind, apply)
    out = settings.out / "unet"
    params = train(network_of, params, data, settings, settings.steps, out, lambda *_: None)
    return training.merge(apply, params)  # pyright: ignore[reportReturnType]


def train_control(unet: UNet, data, settings, name: str, watch) -> Callable:
    """Trains a control; returns the network of a hint, as a pytree."""
    apply, params = training.functional(ControlNet(unet, EVENT[-1], rngs=nnx.Rngs(settings.seed)))
    of = dj.bind(_controlled, apply, unet)
    out = settings.out / name

    def watched(step, params):
        watch(step, dj.bind(of, params))

    params = train(of, params, data, settings, settings.control_steps, out, watched)
    return dj.bind(of, params)


def _controlled(apply, unet, params, hint):
    return controlled(unet, [(dj.bind(apply, params), hint, 1.0)])


def without_control(unet: UNet) -> Callable:
    """The U-Net as the network of a hint, which it does not see."""
    return dj.bind(_uncontrolled, unet)


def _uncontrolled(unet, hint):
    return dj.bind(unet)


@functools.partial(jax.jit, static_argnames="steps")
def draw(
    key: jax.Array,
    network_of: Callable,
    labels,
    hints,
    steps: int,
    unet: UNet | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """Images (n, 28, 28) from 0 to 255 of the labels and folded hints, by DPM-Solver++(2M).

    With `unet`, they are guided away from what it draws without label and control.
    """
    ts = dj.uniform_log_snr(SCHEDULE, steps, end=0.0)

    def denoiser(network, label):
        return dj.as_denoiser(dj.bind(network, cond=label), SCHEDULE, dj.VELOCITY)

    def one(args):
        (prior_key, key), label, hint = jax.random.split(args[0]), *args[1:]
        denoise = denoiser(network_of(hint), label)
        if unet is not None:
            denoise = dj.cfg(denoise, denoiser(unet, CLASSES), scale)
        x1 = dj.sample_prior(prior_key, SCHEDULE, EVENT)
        return dj.sample(key, dj.dpm_solver_2m(denoise, SCHEDULE), x1, ts)

    keys = jax.random.split(key, len(labels))
    x0s = jax.lax.map(one, (keys, labels, hints), batch_size=100)
    return unfold(jnp.asarray(likelihood.quantize(x0s, LEVELS)))
