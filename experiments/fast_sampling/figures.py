"""The figure: error against network evaluations."""

import pathlib
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from experiments.fast_sampling.adaptive import DIFFRAX, PAIRS
from experiments.fast_sampling.comparison import Results
from experiments.fast_sampling.solvers import SOLVERS
from experiments.fast_sampling.tables import Value, best_of

NAMES = (*SOLVERS, "DPM-Solver-fast", *PAIRS, *DIFFRAX)


def figure(
    results: Results, value: Value, ylabel: str, path: pathlib.Path, nfe, published, found
) -> None:
    """The best published grid and the best found grid of each solver."""
    fig, axes = plt.subplots(
        1, 2, figsize=(11.5, 4.6), sharey=True, sharex=True, layout="constrained"
    )
    kind = "best found" if len(found) > 2 else "learned"
    titles = "best published grid of each solver", f"{kind} grid of each solver"
    for ax, grids, title in zip(axes, ((*published, "adaptive"), found), titles, strict=True):
        for i, solver in enumerate(NAMES):
            points: dict[float, float] = {}
            for run, result in results.items():
                if run.solver == solver and run.grid in grids:
                    points[run.nfe] = min(points.get(run.nfe, np.inf), value(result))
            if points:
                multistage = solver not in SOLVERS or SOLVERS[solver].evaluations > 1
                style = {
                    "color": plt.get_cmap("tab20")(i),
                    "marker": "os^vDPX*"[i % 8],
                    "ls": "--" if multistage else "-",
                }
                nfes, values = zip(*sorted(points.items()), strict=True)
                ax.plot(nfes, values, ms=4, lw=1, label=solver, **style)
        ax.set(title=title, xlabel="network evaluations (NFE)", xscale="log", yscale="log")
        ax.set_xticks(nfe, nfe)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.3, which="both")
    low, high = axes[0].get_ylim()
    if high < 30 * low:
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    runs = [best_of(results, published, k, value) for k in nfe]
    best = [(run.nfe, value(results[run])) for run in runs if run is not None]
    axes[1].plot(*zip(*best, strict=True), "k:", lw=2, label="best of all published")
    axes[0].set_ylabel(textwrap.fill(ylabel, 45, break_on_hyphens=False))
    handles = {
        label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)
