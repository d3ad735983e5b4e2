"""The solvers and the grids that are compared."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import diffjax as dj
from diffjax import optimal_grids, samplers


class Solver(NamedTuple):
    """A deterministic sampler, and what its steps cost."""

    make: Callable[..., dj.Sampler]
    evaluations: int = 1
    """network evaluations per step"""
    min_steps: int = 1
    """minimum number of steps of a run"""


SOLVERS = {
    "DDIM": Solver(samplers.ddim),
    "DPM-Solver-2": Solver(samplers.dpm_solver_2, 2),
    "DPM-Solver-3": Solver(samplers.dpm_solver_3, 3),
    "DPM-Solver++ 2S": Solver(samplers.dpm_solver_2s, 2),
    "DPM-Solver++ 2M": Solver(samplers.dpm_solver_2m, min_steps=2),
    "DPM-Solver++ 3M": Solver(samplers.dpm_solver_3m, min_steps=3),
    "UniPC-2": Solver(functools.partial(samplers.unipc, order=2), min_steps=2),
    "UniPC-3": Solver(samplers.unipc, min_steps=3),
    "DEIS-3": Solver(samplers.deis, min_steps=3),
    "eps Adams-3": Solver(samplers.noise_adams, min_steps=3),
    "velocity Adams-2": Solver(functools.partial(samplers.velocity_adams, order=2), min_steps=2),
    "velocity Adams-3": Solver(samplers.velocity_adams, min_steps=3),
    "Heun": Solver(samplers.heun, 2),
}


def published_grid(
    name: str, schedule: dj.typing.Schedule, n: int, start: float, end: float
) -> jax.Array:
    if name == "Karras":  # without its last step to t = 0
        return dj.karras(schedule, n + 1, start, end)[:-1]
    if name == "uniform log-SNR":
        return dj.uniform_log_snr(schedule, n, start, end)
    return {"uniform t": dj.uniform, "quadratic t": dj.quadratic}[name](n, start, end)


def programmed_grids(ts: jax.Array, tables: jax.Array, steps: int) -> dict[int, jax.Array]:
    """The grids of 1, ..., n steps that dynamic programs find for a batch of tables, by n."""
    cheapest_paths = functools.partial(optimal_grids.cheapest_paths, steps=steps)
    budgets = jax.jit(jax.vmap(cheapest_paths))(tables)
    return {n: jnp.asarray(ts)[budgets.paths[:, n - 1, : n + 1]] for n in range(1, steps + 1)}
