"""The figure: trajectories of each coupling, and the distance to data against Euler steps."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from experiments.couplings import Settings


def figure(
    trajectories: dict, scores: dict, floor: dict, settings: Settings, path: pathlib.Path
) -> None:
    fig, axes = plt.subplots(2, 5, figsize=(14, 5.6), layout="constrained")
    for row, (pair, columns) in zip(axes, trajectories.items(), strict=True):
        for ax, (name, xs) in zip(row, columns.items(), strict=False):
            ax.plot(xs[:, :80, 0], xs[:, :80, 1], lw=0.4, color="tab:gray", alpha=0.7)
            ax.scatter(*xs[0, :400].T, s=2, color="tab:orange", label="prior")
            ax.scatter(*xs[-1, :400].T, s=2, color="tab:blue", label="samples")
            ax.set(title=name, xticks=(), yticks=(), aspect="equal")
        row[0].set_ylabel(pair)
        for name, seeds in scores[pair].items():
            means = [np.mean([s["distance"][n] for s in seeds]) for n in settings.nfe]
            row[-1].plot(settings.nfe, means, marker="o", ms=3, label=name)
        row[-1].axhline(floor[pair], color="k", ls=":", lw=1, label="data to data")
        row[-1].set(
            xscale="log",
            yscale="log",
            xlabel="Euler steps",
            ylabel="2-Wasserstein distance to data",
        )
        row[-1].set_xticks(settings.nfe, settings.nfe)
        row[-1].minorticks_off()
        row[-1].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        row[-1].yaxis.set_major_formatter("{x:g}")
        row[-1].legend(fontsize=7)
    axes[0, 0].legend(fontsize=7, markerscale=3)
    fig.savefig(path, dpi=120)
    plt.close(fig)
