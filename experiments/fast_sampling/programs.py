"""Dynamic programs over the steps of a grid, for a batch of mixtures."""

import functools
import itertools

import jax
import jax.numpy as jnp

import diffjax as dj
from diffjax import optimal_grids, samplers
from experiments.fast_sampling.mixtures import END, SCHEDULE, START, Mixture, denoiser_of, draw
from experiments.fast_sampling.solvers import SOLVERS, programmed_grids

# For each solver, the solver whose error its program sums; OTHERS for solvers without an entry.
ERROR_OF = {
    "DDIM": "DDIM",
    "DPM-Solver-2": "DPM-Solver-2",
    "Heun": "DPM-Solver-2",
    "DPM-Solver-3": "DPM-Solver-3",
}
OTHERS = "DPM-Solver++ 2S"


def mixture_grids(
    mixtures: Mixture, x1: jax.Array, candidates: int, steps: int
) -> dict[str, dict[int, jax.Array]]:
    """Grids of 1, ..., n steps by what they minimize (a bound, or a solver's error) and by n."""
    ts = dj.uniform_log_snr(SCHEDULE, candidates, START, END)
    x0 = jax.jit(jax.vmap(functools.partial(draw, jax.random.key(5), n=256)))(mixtures)

    def bound(table):
        def one(mixture, x0):
            return table(jax.random.key(6), denoiser_of(mixture), SCHEDULE, ts, x0)

        return jax.jit(jax.vmap(one))(mixtures, x0)

    def error(make):
        def one(mixture, x):
            denoise = denoiser_of(mixture)
            parts = [jnp.linspace(a, b, 9)[:-1] for a, b in itertools.pairwise(ts)]
            fine = jnp.concatenate([*parts, ts[-1:]])
            accurate = samplers.dpm_solver_3(denoise, SCHEDULE)
            xs = dj.trajectory(jax.random.key(0), accurate, x, fine)[::8]
            return optimal_grids.solver_error_table(make(denoise, SCHEDULE), SCHEDULE, ts, xs)

        return jax.jit(jax.vmap(one))(mixtures, x1[:, :16])

    tables = {
        "DP ELBO": bound(optimal_grids.elbo_table),
        "DP KLUB": bound(optimal_grids.klub_table),
    }
    solvers = dict.fromkeys((*ERROR_OF.values(), OTHERS))
    tables |= {name: error(SOLVERS[name].make) for name in solvers}
    grids = {name: programmed_grids(ts, table, steps) for name, table in tables.items()}
    return jax.block_until_ready(grids)
