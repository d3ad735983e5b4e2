"""Side studies: a loss's variance by the draw of times, and bits/dim by dequantization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax import divergence, likelihood, times, training, weightings
from diffjax.networks import MLP
from experiments import small_models
from experiments.objectives import Data, Path, Settings
from experiments.objectives.objectives import (
    batch_loss,
    denoising,
    log_snr_t,
    uniform_t,
    variational_bound,
)
from experiments.objectives.scores import log_density
from experiments.train_images import Model


def variance_of_times(
    model: Model, path: Path, data: Data, settings: Settings, batches: int = 400
) -> dict:
    """The mean and variance of a batch's likelihood-weighted loss, for each draw of times."""
    draws = {
        "independent": lambda key, n, path: times.uniform_times(key, n, path.low, path.high),
        "antithetic": lambda key, n, path: times.antithetic_times(key, n, path.low, path.high),
        "stratified": uniform_t,
        "importance": log_snr_t,
    }
    x0s = jnp.asarray(data.train[: settings.batch])
    out = {}
    for name, draw in draws.items():
        objective = denoising(model.parametrization, weightings.likelihood, draw)

        @jax.jit
        def batch_losses(keys, x0s, model, objective=objective):
            def one(key):
                return batch_loss(objective, model.network, path, key, x0s, None)

            return jax.lax.map(one, keys)

        keys = jax.random.split(jax.random.key(7), batches)
        values = np.asarray(batch_losses(keys, x0s, model), np.float64)
        out[name] = {"mean": values.mean(), "variance": values.var(ddof=1)}
    return out


def dequantization(
    model: Model, path: Path, data: Data, settings: Settings, n: int = 16, k: int = 8
) -> dict:
    """Bits/dim of n held-out images under one model, with the exact trace, by dequantization.

    The variational q is a network of the image. It is fitted on the training images to the
    variational bound, which is cheap to differentiate.
    """
    dims, levels = data.held_out[0].size, data.levels
    if levels is None or data.held_out_labels is None:
        raise ValueError("data: expected integer data with labels, got real numbers or no labels")
    apply, q0 = training.functional(MLP(dims, width=128, depth=2, rngs=nnx.Rngs(1)))
    q0 = {"mean": q0, "log_scale": jax.tree.map(jnp.copy, q0)}

    def draw(q, key, image):
        centred = (2.0 * image + 1) / levels - 1
        mean, log_scale = (apply(q[name], centred, 0.0) for name in ("mean", "log_scale"))
        return likelihood.variational_dequantize(key, image, levels, mean, jnp.exp(0.5 + log_scale))

    def loss(q, key, batch):
        images, labels = batch
        time_key, key = jax.random.split(key)
        ts, weights = log_snr_t(time_key, len(images), path)

        def one(key, image, label, t, weight):
            pixel_key, noise_key = jax.random.split(key)
            x, log_q = draw(q, pixel_key, image)
            bound = variational_bound(noise_key, model.denoiser(label), path, x, t, weight)
            return (bound + log_q) / dims

        keys = jax.random.split(key, len(images))
        return jnp.mean(jax.vmap(one)(keys, images, labels, ts, weights))

    batches = training.in_memory((data.train, data.labels), settings.batch, seed=0)
    q, _ = small_models.train(loss, q0, batches, 1000, 1e-3, seed=5)

    @functools.partial(jax.jit, static_argnames="variational")
    def log_weights(q, key, images, labels, variational):
        def one(key, image, label):
            if variational:
                x, log_q = draw(q, key, image)
            else:
                x, log_q = likelihood.dequantize(key, image, levels), 0.0
            log_p = log_density(None, model.denoiser(label), path, x, divergence.exact_probes)
            return log_p - log_q

        return jax.vmap(one)(jax.random.split(key, n), images, labels)

    measured = {}
    for name, variational in (("uniform", False), ("variational", True)):
        images, labels = data.held_out[:n], data.held_out_labels[:n]
        keys = [jax.random.key(10 + i) for i in range(k)]
        weights = jnp.stack([log_weights(q, key, images, labels, variational) for key in keys])
        measured[name] = likelihood.bits_per_dim(jnp.mean(weights, 0), dims, levels)
        weighted = likelihood.importance_weighted_bound(weights)
        bits = likelihood.bits_per_dim(weighted, dims, levels)
        measured[f"{name}, {k} importance-weighted"] = bits
    gains = {
        name: np.asarray(measured["uniform"] - bits, np.float64) for name, bits in measured.items()
    }
    return {
        name: {
            "bits_per_dim": float(bits.mean()),
            "less_than_uniform": float(gains[name].mean()),
            "standard_error_of_that": float(gains[name].std(ddof=1) / np.sqrt(n)),
        }
        for name, bits in measured.items()
    }
