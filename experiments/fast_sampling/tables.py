"""Tables of the results."""

from collections.abc import Callable, Iterable

import numpy as np

from experiments import results as pages
from experiments.fast_sampling.comparison import Results, Run

Value = Callable[[tuple], float]
"""The score by which results are compared."""


def best_of(results: Results, grids: Iterable[str], nfe: float, value: Value) -> Run | None:
    """The run with the smallest value at one NFE, among some grids."""
    runs = [run for run in results if run.grid in grids and run.nfe == nfe]
    return min(runs, key=lambda run: value(results[run])) if runs else None


def table(
    results: Results,
    nfes: tuple[int, ...],
    value: Value,
    published,
    found,
    worst: Value | None = None,
) -> str:
    """The best published and the best found run at each NFE, then each solver."""

    def row(title, grids, solver=None):
        def cell(run):
            name = "" if solver else f" ({run.solver}, {run.grid})"
            return f"{value(results[run]):.1e}{name}"

        runs = [best_of(_of_solver(results, solver), grids, nfe, value) for nfe in nfes]
        return [title, *("" if run is None else cell(run) for run in runs)]

    def compared(title, show, *grids):
        runs = [[best_of(results, some, nfe, value) for some in grids] for nfe in nfes]
        best = [[results[run] for run in some if run is not None] for some in runs]
        return [title, *(show(*some) if len(some) == len(grids) else "" for some in best)]

    rows = [row("best published", published), row("best found", found)]
    ratio = compared(
        "found / published", lambda a, b: f"{value(b) / value(a):.2f}", published, found
    )
    rows.append(ratio)
    if worst is not None:
        rows += [compared("worst, published", lambda a: f"{worst(a):.1e}", published)]
        rows += [compared("worst, found", lambda a: f"{worst(a):.1e}", found)]

        def flips(*pair):
            return " / ".join(f"{100 * np.median(result[1]):.1f}" for result in pair)

        rows += [compared("flips, %, published / found", flips, published, found)]
    for solver in dict.fromkeys(run.solver for run in results if run.grid != "adaptive"):
        rows.append(row(f"{solver}, uniform log-SNR", ("uniform log-SNR",), solver))
        if any(run.grid in found for run in _of_solver(results, solver)):
            rows.append(row(f"{solver}, best found", found, solver))
    return pages.table(["", *nfes], rows)


def _of_solver(results: Results, solver: str | None) -> Results:
    return {run: result for run, result in results.items() if solver in (None, run.solver)}


def saved_evaluations(
    results: Results, value: Value, solver: str, found: tuple[str, ...]
) -> dict[float, float]:
    """The evaluations on uniform log-SNR that match the best found grid, by the grid's NFE."""
    ours = _of_solver(results, solver)
    baseline = sorted(
        (run.nfe, value(result)) for run, result in ours.items() if run.grid == "uniform log-SNR"
    )
    if len(baseline) < 2:
        return {}
    nfes, errors = np.log(np.array(baseline)).T
    order = np.argsort(errors)
    out = {}
    for nfe in sorted({run.nfe for run in ours if run.grid in found}):
        best = best_of(ours, found, nfe, value)
        assert best is not None
        error = np.log(value(ours[best]))
        inside = errors.min() <= error <= errors.max()
        matching = float(np.exp(np.interp(error, errors[order], nfes[order])))
        out[nfe] = matching if inside else float("inf")
    return out
