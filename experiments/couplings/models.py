"""The pairs of distributions, the couplings, and the training of the networks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from sklearn.datasets import make_moons

import diffjax as dj
from diffjax import couplings, losses, samplers, times, training
from diffjax.networks import MLP
from experiments import small_models
from experiments.couplings import Settings


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    angles = 2 * np.pi * rng.integers(8, size=n) / 8
    means = 5 * np.stack([np.cos(angles), np.sin(angles)], 1)
    return means + np.sqrt(0.1) * rng.normal(size=(n, 2))


def moons(rng: np.random.Generator, n: int) -> np.ndarray:
    return 3 * np.asarray(make_moons(n, noise=0.2, random_state=int(rng.integers(2**31)))[0]) - 1


def gaussian(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, 2))


PAIRS = {
    "8 Gaussians to moons": (eight_gaussians, moons),
    "1 Gaussian to 8": (gaussian, eight_gaussians),
}
COUPLINGS: dict[str, Callable] = {
    "independent": couplings.independent,
    "optimal": couplings.optimal,
    "entropic": couplings.entropic,
}


class Model(NamedTuple):
    """The networks of velocity and score, and the range of times that they are trained on."""

    velocity: Partial
    score: Partial
    low: float
    high: float


def train(pair: str, name: str, settings: Settings, seed: int) -> Model:
    prior, data = PAIRS[pair]
    rng = np.random.default_rng(seed)
    bridge = name == "entropic"
    coupling = couplings.entropic(2 * settings.amplitude**2) if bridge else COUPLINGS[name]
    # A bridge's velocity and score are infinite at the ends.
    low, high = (1e-3, 1 - 1e-3) if bridge else (0.0, 1.0)

    def new(stream):
        return training.functional(MLP(2, width=settings.width, depth=3, rngs=nnx.Rngs(stream)))

    (apply, velocity), (_, score) = new(2 * seed), new(2 * seed + 1)

    def model(params):
        score = dj.bind(scaled_score, apply, params["score"], settings.amplitude)
        return Model(dj.bind(apply, params["velocity"]), score, low, high)

    def loss(params, key, batch):
        pair_key, key = jax.random.split(key)
        x0, x1 = batch
        x1 = coupling(pair_key, x0, x1)
        velocity, score, *_ = model(params)

        def one(key, pair, t):
            x0, x1 = pair
            if not bridge:
                return losses.conditional_flow_matching(velocity, x0, x1, t)
            return losses.bridge_matching(key, velocity, score, x0, x1, t, settings.amplitude)

        return losses.over_batch(
            key, one, (x0, x1), times=lambda key, n: times.stratified_times(key, n, low, high)
        )

    def batches():
        while True:
            yield tuple(sample(rng, settings.batch).astype(np.float32) for sample in (data, prior))

    params = {"velocity": velocity, "score": score}
    params, _ = small_models.train(
        loss, params, batches(), settings.steps, settings.learning_rate, seed
    )
    return model(params)


def scaled_score(apply, params, amplitude, x, t):
    """The network predicts the bridge's noise: `score = -eps / (a sqrt(t (1 - t)))`."""
    return -apply(params, x, t) / (amplitude * jnp.sqrt(t * (1 - t)))


@jax.jit
def flow(velocity: Partial, x1: jax.Array, ts: jax.Array) -> jax.Array:
    """Euler's method; with any prior, a velocity network is a denoiser of the linear path."""
    denoise = dj.as_denoiser(velocity, dj.linear(), dj.VELOCITY)
    return dj.trajectory(jax.random.key(0), dj.euler(denoise, dj.linear()), x1, ts)


@jax.jit
def diffusion(key, velocity, score, amplitude, x1, ts) -> jax.Array:
    return dj.trajectory(key, samplers.bridge_sampler(velocity, score, amplitude), x1, ts)
