"""Gaussian mixtures with their exact denoiser: the data, the exact flow, and the scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax import exact, samplers

START, END = 1.0, 1e-3
SCHEDULE = dj.linear_vp()
PUBLISHED = ("uniform log-SNR", "uniform t", "quadratic t", "Karras")
FOUND = ("DP ELBO", "DP KLUB", "DP solver error", "learned", "learned with gains")

Mixture = tuple[jax.Array, jax.Array, jax.Array]
"""Weights, means and covariances."""


def random_mixture(seed: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """8 components (10 if not in 2-D) of deviations 0.05 to 0.3; the total variance is about 1."""
    rng, k = np.random.default_rng((seed, dim)), 8 if dim == 2 else 10
    weights = rng.dirichlet(np.full(k, 5.0))
    means = rng.normal(size=(k, dim))
    rotations = np.linalg.qr(rng.normal(size=(k, dim, dim)))[0]
    variances = rng.uniform(0.05, 0.3, (k, 1, dim)) ** 2
    return weights, means, (rotations * variances) @ rotations.swapaxes(1, 2)


def denoiser_of(mixture: Mixture) -> dj.typing.Denoiser:
    return exact.gaussian_mixture(*mixture, SCHEDULE)


def draw(key: jax.Array, mixture: Mixture, n: int) -> jax.Array:
    """Data points of a mixture."""
    weights, means, covs = mixture
    which = jax.random.categorical(key, jnp.log(weights), shape=(n,))
    noise = jax.random.normal(jax.random.fold_in(key, 1), (n, means.shape[1]))
    variances, vectors = jnp.linalg.eigh(covs)
    scaled = jnp.sqrt(variances)[which] * noise
    return means[which] + jnp.einsum("nij,nj->ni", vectors[which], scaled)


def component(mixture: Mixture, x: jax.Array) -> jax.Array:
    """The most probable component of each of the data points x (n, d)."""
    weights, means, covs = mixture
    variances, vectors = jnp.linalg.eigh(covs)
    centred = x[None] - means[:, None]
    white = jnp.einsum("kni,kij->knj", centred, vectors) / jnp.sqrt(variances)[:, None]
    logs = jnp.log(weights) - 0.5 * jnp.sum(jnp.log(variances), -1)
    return jnp.argmax(logs[:, None] - 0.5 * jnp.sum(white**2, -1), 0)


def scored(mixture: Mixture, x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The error over the samples in the goal's component, and the share of the others."""
    same = component(mixture, x) == component(mixture, goal)
    squares = jnp.mean((x - goal) ** 2, -1)
    error = jnp.sqrt(jnp.sum(jnp.where(same, squares, 0)) / jnp.maximum(jnp.sum(same), 1))
    return error, jnp.mean(~same)


def references(mixtures: Mixture, x1: jax.Array) -> np.ndarray:
    """Ends of the exact flow, by a fourth-order method with 1000 steps in float64."""
    with jax.enable_x64(True):
        schedule = dj.linear_vp()

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, 0, None))
        def ends(mixture, x, ts):
            sampler = samplers.unipc(denoiser_of(mixture), schedule)
            return dj.sample(jax.random.key(0), sampler, x, ts)

        args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (mixtures, x1))
        coarse, fine = (
            ends(*args, dj.uniform_log_snr(schedule, n, START, END)) for n in (500, 1000)
        )
        difference = float(jnp.abs(coarse - fine).max())
        print(f"  reference flow: {difference:.1e} between 500 and 1000 steps", flush=True)
        return np.asarray(fine, np.float32)
