"""Runs the study and writes its record, report and figures."""

import operator
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import tyro

from experiments.fast_sampling import Settings, images, mixtures
from experiments.fast_sampling.figures import figure
from experiments.fast_sampling.images import CASES, on_images
from experiments.fast_sampling.on_mixtures import on_mixtures
from experiments.fast_sampling.tables import saved_evaluations, table
from experiments.results import Score, write_record, write_report

SCORES = {
    "NFE": Score(
        "The evaluations of the network for one sample: the columns of the tables.",
        "evaluations",
        "lower",
    ),
    "error": Score(
        "The root mean square distance per dimension to the end of the exact flow, over the "
        "samples that end in the same component: the median of the mixtures, and the worst.",
        "standard deviations of the data",
        "lower",
    ),
    "flips": Score(
        "The share of the samples that end in another component than the exact flow.", "%", "lower"
    ),
    "Fréchet distance": Score(
        "The Fréchet distance between Gaussians fitted to pixels of samples and held-out images.",
        "squared pixels from -1 to 1",
        "lower",
    ),
    "RMS distance": Score(
        "The root mean square distance to the accurate ends of the model's own flow.",
        "pixels from -1 to 1",
        "lower",
    ),
}


def median(result) -> float:
    return float(np.median(result[0]))


def worst(result) -> float:
    return float(np.max(result[0]))


def mixture_study(dim: int, settings: Settings) -> tuple[dict, str, dict[str, str]]:
    """The record, the text of the report, and the captions of the figures."""
    results, costs = on_mixtures(dim, settings)
    grids = mixtures.PUBLISHED, mixtures.FOUND
    ylabel = f"RMS error per dimension (d = {dim}, median of {settings.seeds} mixtures)"
    path = settings.out / f"mixture_{dim}d.png"
    figure(results, median, ylabel, path, settings.nfe, *grids)
    text = [table(results, settings.nfe, median, *grids, worst)]
    for solver in ("DPM-Solver-2", "DPM-Solver-3"):
        saved = saved_evaluations(results, median, solver, mixtures.FOUND)
        cells = ", ".join(f"{k}: {n:.1f}" for k, n in saved.items())
        label = "evaluations on uniform log-SNR that match the best found grid at each NFE"
        text.append(f"{solver}, {label}: {cells}")
    adaptive = [
        f"{run.solver} at {run.nfe}: {median(v):.1e}"
        for run, v in results.items()
        if run.grid == "adaptive"
    ]
    text += ["Adaptive solvers, error at each NFE: " + ", ".join(adaptive), _seconds(costs)]
    rows = [
        {
            **run._asdict(),
            "error_median": median(result),
            "error_worst": worst(result),
            "flips_median": float(np.median(result[1])),
            "flips_worst": float(np.max(result[1])),
        }
        for run, result in results.items()
    ]
    record = {"rows": rows, "seconds_to_find_grids": costs}
    return record, "\n\n".join(text), {path.name: f"{ylabel}, against NFE."}


def image_study(name: str, settings: Settings) -> tuple[dict, str, dict[str, str]]:
    """The record, the text and the captions for a trained model."""
    case = CASES[name](settings)
    results, accurate, costs = on_images(case, settings)
    text, captions = [f"Fréchet distance of the accurate ends: {accurate:.3f}", _seconds(costs)], {}
    for index, score, label in (
        (0, "frechet", "Fréchet distance to held-out images (squared pixels)"),
        (1, "distance", "RMS distance to the accurate end (per pixel)"),
    ):
        value, ylabel = operator.itemgetter(index), f"{case.title}: {label}"
        path = settings.out / f"{name}_{score}.png"
        figure(results, value, ylabel, path, case.nfe, images.PUBLISHED, images.FOUND[1:])
        text += [f"{label}:", table(results, case.nfe, value, images.PUBLISHED, images.FOUND)]
        captions[path.name] = f"{ylabel}, against NFE."
    rows = [{**run._asdict(), "frechet": v[0], "distance": v[1]} for run, v in results.items()]
    record = {"rows": rows, "accurate_frechet": accurate, "seconds_to_find_grids": costs}
    return record, "\n\n".join(text), captions


def _seconds(costs: dict[str, float]) -> str:
    shown = ", ".join(f"{name}: {cost:.0f}" for name, cost in costs.items())
    return f"Seconds to find grids: {shown}"


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    begin, scores, tables, figures = time.perf_counter(), {}, {}, {}
    studies: dict[str, Callable] = {
        f"Mixtures in {d} dimensions": partial(mixture_study, d) for d in settings.dims
    }
    studies |= {
        f"The trained model of {name}": partial(image_study, name) for name in settings.models
    }
    for title, study in studies.items():
        scores[title], tables[title], captions = study(settings)
        figures |= captions
    seconds = time.perf_counter() - begin
    record = write_record(settings.out / "result.json", settings, scores, seconds)
    write_report(settings.out, "Fast sampling", record, SCORES, tables, figures)
    return scores


if __name__ == "__main__":
    main(tyro.cli(Settings))
