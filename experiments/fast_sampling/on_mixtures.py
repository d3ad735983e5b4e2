"""Every solver on every grid, on mixtures."""

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
from experiments.fast_sampling.solvers import LEARNED, SOLVERS, WITH_GAINS, Results, Run, published_grid, steps_of

Points = tuple[Mixture, jax.Array, jax.Array]
"""A batch of mixtures, start points x1 of each, and where the exact flow takes them."""


def sampled(make: Callable, mixture: Mixture, x: jax.Array, ts: jax.Array, gains: jax.Array | None) -> jax.Array:
    options = {} if gains is None else {"gains": gains}
    return dj.sample(jax.random.key(0), make(denoiser_of(mixture), SCHEDULE, **options), x, ts)


@functools.partial(jax.jit, static_argnames="make")
def score(points: Points, ts: jax.Array, gains: jax.Array | None, make: Callable) -> tuple[jax.Array, jax.Array]:
    """Errors and flips of a grid, and gains if there are any, for each mixture."""

    def one(mixture, x, goal, ts, gains):
        return scored(mixture, sampled(make, mixture, x, ts, gains), goal)

    return jax.vmap(one)(*points, ts, gains)


@functools.partial(jax.jit, static_argnames=("make", "steps"))
def fit(points: Points, ts: jax.Array, gains: jax.Array | None, make: Callable, steps: int):
    """The fitted grid and gains, one mixture after the other."""

    def one(args):
        mixture, x, goal, ts, gains = args
        width = 2 * scored(mixture, sampled(make, mixture, x, ts, gains), goal)[0]

        def residuals(ts, gains=None):
            return bounded(sampled(make, mixture, x, ts, gains) - goal, width)

        fitted = optimal_grids.fit_grid(residuals, ts, gains, steps)
        return fitted.ts, fitted.numbers

    return jax.lax.map(one, (*points, ts, gains))


def bounded(error: jax.Array, width: jax.Array) -> jax.Array:
    """`r / sqrt(1 + |r|^2 / width^2)`: a sample that ends elsewhere altogether counts as one that is off by width."""
    return error / jnp.sqrt(1 + jnp.mean(error**2, -1, keepdims=True) / width**2)


def on_mixtures(dim: int, settings: Settings) -> tuple[Results, dict[str, float]]:
    """Errors and flips on the second half of the points, each over the mixtures; and the seconds to find grids."""
    n_points, seeds = settings.points[settings.dims.index(dim)], settings.seeds
    mixtures = [random_mixture(seed, dim) for seed in range(seeds)]
    mixtures = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *mixtures)
    x1 = jax.random.normal(jax.random.key(dim), (seeds, n_points, dim))
    print(f"mixtures in {dim} dimensions", flush=True)
    x0, half = jnp.asarray(references(mixtures, x1)), n_points // 2
    first, second = ((mixtures, x1[:, part], x0[:, part]) for part in (slice(half), slice(half, None)))
    most = min(max(settings.nfe), settings.candidates)
    costs, results = {}, {}

    def timed(name, function, *args):
        begin = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        costs[name] = time.perf_counter() - begin
        return out

    programmed = timed("all dynamic programs", mixture_grids, mixtures, x1[:, :half], settings.candidates, most)
    print("  dynamic programs done", flush=True)
    for name, (make, *_) in SOLVERS.items():
        for nfe in settings.nfe:
            n = steps_of(name, nfe)
            if not n:
                continue
            grids = {grid: published_grid(grid, SCHEDULE, n, START, END) for grid in PUBLISHED}
            grids = {grid: jnp.tile(ts, (seeds, 1)) for grid, ts in grids.items()}
            if n <= most:
                grids |= {grid: programmed[grid][n] for grid in ("DP ELBO", "DP KLUB")}
                grids["DP solver error"] = programmed[ERROR_OF.get(name, OTHERS)][n]
            chosen = {grid: (ts, None) for grid, ts in grids.items()}
            if name in LEARNED and nfe in settings.learned_nfe:
                on_first = {grid: np.median(score(first, ts, None, make)[0]) for grid, ts in grids.items()}
                start, steps = grids[min(on_first, key=lambda grid: on_first[grid])], settings.fit_steps
                chosen["learned"] = timed(f"{name}, {nfe}", fit, first, start, None, make, steps)
                if name == WITH_GAINS:
                    args = first, chosen["learned"][0], jnp.ones((seeds, n, 2)), make, steps
                    chosen["learned with gains"] = timed(f"{name} with gains, {nfe}", fit, *args)
            for grid, numbers in chosen.items():
                results[Run(name, grid, nfe)] = jax.device_get(score(second, *numbers, make))
        for grid in ("uniform log-SNR", "learned", "learned with gains"):
            errors = {run.nfe: v[0] for run, v in results.items() if run[:2] == (name, grid)}
            if errors:
                medians = ", ".join(f"{nfe}: {np.median(error):.1e}" for nfe, error in errors.items())
                print(f"  {name:17s} {grid:18s} {medians}", flush=True)
    return results | fast_and_adaptive(*second, settings.nfe), costs
