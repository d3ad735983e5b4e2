"""The comparison of every solver on every grid, including learned grids."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from experiments.fast_sampling.solvers import SOLVERS

LEARNED = ("DPM-Solver-2", "DPM-Solver-3", "DPM-Solver++ 2M", "velocity Adams-3")
WITH_GAINS = "velocity Adams-3"  # the solver whose gains are learned, too


class Run(NamedTuple):
    """The key of a result: what was run."""

    solver: str
    grid: str
    nfe: float


Results = dict[Run, tuple[Any, Any]]
"""The two scores of each run."""


def steps_of(name: str, nfe: int) -> int:
    """The steps that take exactly nfe evaluations; 0 if there are none or not enough."""
    steps, rest = divmod(nfe, SOLVERS[name].evaluations)
    return 0 if rest or steps < SOLVERS[name].min_steps else steps


def compare(
    nfes: tuple[int, ...],
    learned_nfes: tuple[int, ...],
    *,
    grids: Callable[[str, int], dict[str, jax.Array]],
    error: Callable[[Callable, jax.Array], float],
    learn: Callable[[Callable, jax.Array, bool], Iterator[tuple[str, tuple]]],
    score: Callable[[Callable, jax.Array, jax.Array | None], tuple],
) -> tuple[Results, dict[str, float]]:
    """The scores of each run, and the seconds to learn each grid.

    Args:
        nfes: numbers of network evaluations.
        learned_nfes: those for which grids are learned.
        grids: `(solver, steps) -> {name: ts}`, the grids that are not learned.
        error: `(make, ts) -> error`. Learning starts from the grid with the smallest error.
        learn: `(make, ts, with_gains) -> (name, (ts, gains)), ...`, the grids learned from ts.
        score: `(make, ts, gains) -> scores`.
    """
    results, costs = {}, {}
    for name, (make, *_) in SOLVERS.items():
        for nfe in nfes:
            n = steps_of(name, nfe)
            if not n:
                continue
            chosen = {grid: (ts, None) for grid, ts in grids(name, n).items()}
            if name in LEARNED and nfe in learned_nfes:
                first = min((ts for ts, _ in chosen.values()), key=lambda ts: error(make, ts))
                begin = time.perf_counter()
                for grid, numbers in learn(make, first, name == WITH_GAINS):
                    chosen[grid] = jax.block_until_ready(numbers)
                    costs[f"{name}, {grid}, {nfe}"] = time.perf_counter() - begin
                    begin = time.perf_counter()
            results |= {
                Run(name, grid, nfe): score(make, *numbers) for grid, numbers in chosen.items()
            }
        print(f"  {name} done", flush=True)
    return results, costs
