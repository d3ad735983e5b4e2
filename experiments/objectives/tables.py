"""The table and the figure of the results."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from experiments import results as pages
from experiments.objectives import PATHS
from experiments.objectives.objectives import OBJECTIVES


def by_model(rows) -> dict[tuple[str, str], list[dict]]:
    """The rows of all seeds, by objective and path."""
    out: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        out.setdefault((row["objective"], row["path"]), []).append(row)
    return out


def spread(values, digits: int = 3) -> str:
    """The mean, and the standard deviation if there are several values."""
    failed = [value is None for value in values]
    if any(failed):
        return "solver gave up" if all(failed) else "solver gave up on some"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def table(rows: list[dict]) -> str:
    names = list(rows[0]["distances"])
    head = ["objective", "path", "seeds", "held-out NLL", "bound of the SDE", *names]
    head += ["NFE to 1%", "training, s"]
    lines = (cells(*model, seeds, names) for model, seeds in by_model(rows).items())
    return pages.table(head, lines)


def cells(objective: str, path: str, seeds: list[dict], names: list[str]) -> list[str]:
    """A model's row of the table, from the rows of its seeds."""
    needed = sorted(row["nfe_to_1%"] or np.inf for row in seeds)
    out = [objective, path, str(len(seeds)), spread([row["nll"] for row in seeds])]
    out.append("" if seeds[0]["bound"] is None else spread([row["bound"] for row in seeds]))
    out += [spread([row["distances"][name] for row in seeds]) for name in names]
    out.append(", ".join("more than 64" if np.isinf(n) else f"{n:.0f}" for n in needed))
    return [*out, f"{np.median([row['seconds'] for row in seeds]):.0f}"]


def figure(results: dict[str, dict], path: pathlib.Path) -> None:
    """Likelihood against the first distance. Colours are objectives, markers are paths."""
    size = 4.6 * len(results) + 2.6, 4.4
    fig, axes = plt.subplots(1, len(results), figsize=size, layout="constrained", squeeze=False)
    colours = {name: plt.get_cmap("tab20")(i) for i, name in enumerate(OBJECTIVES)}
    markers = dict(zip((*PATHS, "learned VP"), "os^vD", strict=True))
    for ax, (name, result) in zip(axes[0], results.items(), strict=True):
        first = next(iter(result["rows"][0]["distances"]))
        models = by_model(result["rows"])
        nlls = [
            np.mean([np.inf if row["nll"] is None else row["nll"] for row in rows])
            for rows in models.values()
        ]
        distances = [np.mean([row["distances"][first] for row in rows]) for rows in models.values()]
        # Worse models are drawn at the edge.
        most = np.median(nlls) + 0.25, 2 * np.median(distances)
        for (objective, path_name), *point in zip(models, nlls, distances, strict=True):
            style = {
                "color": colours[objective],
                "marker": markers[path_name],
                "clip_on": False,
                "zorder": 3,
            }
            ax.plot(*np.minimum(point, most), ls="", ms=6, mec="k", mew=0.3, **style)
        between = result["between_data"][first]
        ax.axhline(between, color="k", ls=":", lw=1)
        units = "bits/dim" if name == "digits" else "nats"
        x, y = f"held-out negative log-likelihood ({units})", f"{first} distance of samples"
        beyond = [
            f"{m:.2f} or more at the edge" if np.max(v) > m else ""
            for v, m in zip((nlls, distances), most, strict=True)
        ]
        x, y = (f"{label}\n{note}".strip() for label, note in zip((x, y), beyond, strict=True))
        ax.set(title=name, xlabel=x, ylabel=y)
        ax.set(
            xlim=(min(nlls) - 0.02, min(max(nlls) + 0.02, most[0])),
            ylim=(0.8 * between, min(1.05 * max(distances), most[1])),
        )
        ax.grid(alpha=0.3, which="both")
    shown = {row["objective"] for result in results.values() for row in result["rows"]}
    handles = [
        Line2D([], [], ls="", marker="o", color=c, mec="k", mew=0.3, label=n)
        for n, c in colours.items()
        if n in shown
    ]
    handles += [
        Line2D([], [], ls="", marker=m, color="w", mec="k", label=n) for n, m in markers.items()
    ]
    handles.append(Line2D([], [], ls=":", color="k", lw=1, label="between data"))
    fig.legend(handles=handles, loc="outside right center", fontsize=7.5)
    fig.savefig(path, dpi=130)
    plt.close(fig)
