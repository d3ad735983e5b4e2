"""Every solver on every grid, on Gaussian mixtures."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax import optimal_grids
from experiments.fast_sampling import Settings
from experiments.fast_sampling.adaptive import fast_and_adaptive
from experiments.fast_sampling.comparison import Results, compare
from experiments.fast_sampling.mixtures import (
    END,
    PUBLISHED,
    SCHEDULE,
    START,
    Mixture,
    denoiser_of,
    random_mixture,
    references,
    scored,
)
from experiments.fast_sampling.programs import ERROR_OF, OTHERS, mixture_grids
from experiments.fast_sampling.solvers import published_grid

Points = tuple[Mixture, jax.Array, jax.Array]
"""A batch of mixtures, start points x1 of each, and the ends of the exact flow from them."""


def sampled(
    make: Callable, mixture: Mixture, x: jax.Array, ts: jax.Array, gains: jax.Array | None
) -> jax.Array:
    options = {} if gains is None else {"gains": gains}
    return dj.sample(jax.random.key(0), make(denoiser_of(mixture), SCHEDULE, **options), x, ts)


@functools.partial(jax.jit, static_argnames="make")
def score(
    points: Points, ts: jax.Array, gains: jax.Array | None, make: Callable
) -> tuple[jax.Array, jax.Array]:
    """Errors and flips for each mixture, of a grid with or without gains."""

    def one(mixture, x, goal, ts, gains):
        return scored(mixture, sampled(make, mixture, x, ts, gains), goal)

    return jax.vmap(one)(*points, ts, gains)


@functools.partial(jax.jit, static_argnames=("make", "steps"))
def fit(points: Points, ts: jax.Array, gains: jax.Array | None, make: Callable, steps: int):
    """The fitted grids and gains, one mixture after the other."""

    def one(args):
        mixture, x, goal, ts, gains = args
        width = 2 * scored(mixture, sampled(make, mixture, x, ts, gains), goal)[0]

        def residuals(ts, gains=None):
            return bounded(sampled(make, mixture, x, ts, gains) - goal, width)

        fitted = optimal_grids.fit_grid(residuals, ts, gains, steps)
        return fitted.ts, fitted.numbers

    return jax.lax.map(one, (*points, ts, gains))


def bounded(error: jax.Array, width: jax.Array) -> jax.Array:
    """`r / sqrt(1 + mean(r^2) / width^2)`, so that no sample's error exceeds width."""
    return error / jnp.sqrt(1 + jnp.mean(error**2, -1, keepdims=True) / width**2)


def on_mixtures(dim: int, settings: Settings) -> tuple[Results, dict[str, float]]:
    """Errors and flips on the second half of the points, and the seconds to find grids."""
    n_points, seeds = settings.points[settings.dims.index(dim)], settings.seeds
    drawn = [random_mixture(seed, dim) for seed in range(seeds)]
    mixtures = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *drawn)
    x1 = jax.random.normal(jax.random.key(dim), (seeds, n_points, dim))
    print(f"mixtures in {dim} dimensions", flush=True)
    x0, half = jnp.asarray(references(mixtures, x1)), n_points // 2
    first, second = (
        (mixtures, x1[:, part], x0[:, part]) for part in (slice(half), slice(half, None))
    )
    max_steps = min(max(settings.nfe), settings.candidates)
    begin = time.perf_counter()
    programmed = mixture_grids(mixtures, x1[:, :half], settings.candidates, max_steps)
    seconds = {"all dynamic programs": time.perf_counter() - begin}

    def grids(name, n):
        published = {grid: published_grid(grid, SCHEDULE, n, START, END) for grid in PUBLISHED}
        found = {
            "DP ELBO": "DP ELBO",
            "DP KLUB": "DP KLUB",
            "DP solver error": ERROR_OF.get(name, OTHERS),
        }
        found = {grid: programmed[table][n] for grid, table in found.items() if n <= max_steps}
        return {grid: jnp.tile(ts, (seeds, 1)) for grid, ts in published.items()} | found

    def learn(make, ts, with_gains):
        ts, gains = fit(first, ts, None, make, settings.fit_steps)
        yield "learned", (ts, gains)
        if with_gains:
            gains = jnp.ones((seeds, ts.shape[1] - 1, 2))
            yield "learned with gains", fit(first, ts, gains, make, settings.fit_steps)

    results, costs = compare(
        settings.nfe,
        settings.learned_nfe,
        grids=grids,
        error=lambda make, ts: float(np.median(score(first, ts, None, make)[0])),
        learn=learn,
        score=lambda make, ts, gains: jax.device_get(score(second, ts, gains, make)),
    )
    return results | fast_and_adaptive(*second, settings.nfe), seconds | costs
