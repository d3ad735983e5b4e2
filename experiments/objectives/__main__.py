"""Runs or continues the study and writes its record, report and figure."""

import dataclasses
import json
import time
from collections.abc import Iterator

import jax
import tyro

from experiments.objectives import PATHS, Settings
from experiments.objectives.distances import distances_of
from experiments.objectives.draws import dequantization, variance_of_times
from experiments.objectives.objectives import LEARNED_SCHEDULE, OBJECTIVES, PLANE_ONLY
from experiments.objectives.scores import score
from experiments.objectives.tables import figure, table
from experiments.objectives.training import load, train
from experiments.results import Score, write_record, write_report

FRECHET = "The Fréchet distance between Gaussians fitted to samples and to held-out images, in {}."
NATS = "nats; bits/dim for digits"
SCORES = {
    "held-out NLL": Score("Minus the flow's log density at held-out data.", NATS, "lower"),
    "bound of the SDE": Score(
        "The variational bound on minus the SDE's log density at the same data.", NATS, "lower"
    ),
    "sliced 1-Wasserstein": Score(
        "The 1-Wasserstein distance of samples to held-out points, averaged over random lines.",
        "units of x",
        "lower",
    ),
    "2-Wasserstein": Score(
        "The 2-Wasserstein distance of samples to held-out points.", "units of x", "lower"
    ),
    "Fréchet (pixels)": Score(FRECHET.format("pixels"), "squared pixels from -1 to 1", "lower"),
    "Fréchet (classifier)": Score(
        FRECHET.format("the 32 features of a small classifier"), "squared features", "lower"
    ),
    "KID (EfficientNet)": Score(
        "The squared MMD of 1280 features of EfficientNet-Lite0.", "", "lower"
    ),
    "NFE to 1%": Score(
        "The evaluations of Heun's method after which the first distance stays within 1% of its "
        "limit, for each seed.",
        "evaluations",
        "lower",
    ),
    "training": Score(
        "The median time of the training steps over the seeds, on the machine above.",
        "s",
        "lower",
    ),
}


def rows_of(name: str, settings: Settings) -> Iterator[tuple[str, str, int]]:
    """(objective, path, seed) of every row; all rows of the first seed come first."""
    for seed in settings.seeds:
        for objective_name, objective in OBJECTIVES.items():
            if settings.objectives and objective_name not in settings.objectives:
                continue
            if name == "digits" and objective_name.startswith(PLANE_ONLY):
                continue
            if objective.simulates and seed != settings.seeds[0]:
                continue
            if objective_name == LEARNED_SCHEDULE:
                yield objective_name, "learned VP", seed
            else:
                for path in settings.paths if objective.any_path else ("linear",):
                    yield objective_name, path, seed


def begin_or_continue(settings: Settings) -> tuple[dict, float]:
    """The scores so far by data set, and their seconds; empty if the folder holds no run."""
    path = settings.out / "result.json"
    if not path.exists():
        return {}, 0.0
    record = json.loads(path.read_text())
    free = {"out", "data", "paths", "objectives", "seeds", "efficientnet"}
    saved, new = record["settings"], dataclasses.asdict(settings)
    new = json.loads(json.dumps(new, default=str))
    differ = [name for name, value in new.items() if name not in free and saved.get(name) != value]
    if (saved.get("efficientnet") is None) != (settings.efficientnet is None):
        differ.append("efficientnet")
    if differ:
        raise ValueError(
            f"{path}: it was begun with another value of {', '.join(differ)}; choose another --out"
        )
    return record["scores"], record["seconds"]


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    scores, earlier = begin_or_continue(settings)
    begin = time.perf_counter() - earlier

    def write():
        seconds = time.perf_counter() - begin
        return write_record(settings.out / "result.json", settings, scores, seconds)

    for name in settings.data:
        data = load(name, settings)
        distances, between_data = distances_of(name, data, settings)
        result = scores.setdefault(name, {"rows": []})
        result["between_data"] = between_data
        done = {(row["objective"], row["path"], row["seed"]) for row in result["rows"]}
        for objective_name, path, seed in rows_of(name, settings):
            if (objective_name, path, seed) in done:
                continue
            objective = OBJECTIVES[objective_name]
            model, final_path, seconds = train(objective, PATHS.get(path), data, settings, seed)
            row = {"objective": objective_name, "path": path, "seed": seed, "seconds": seconds}
            row |= score(model, final_path, data, distances, objective, settings)
            print(name, table([row]).splitlines()[-1], flush=True)
            first = seed == settings.seeds[0]
            if first and objective_name == "noise (DDPM)" and name != "digits":
                variances = result.setdefault("variance_of_times", {})
                variances[path] = variance_of_times(model, final_path, data, settings)
            flow_matching = (objective_name, path) == ("velocity (flow matching)", "linear")
            if first and flow_matching and name == "digits":
                result["dequantization"] = dequantization(model, final_path, data, settings)
            result["rows"].append(row)
            write()
            jax.clear_caches()  # otherwise the compiled programs of all models fill the memory
    results = {name: scores[name] for name in settings.data}
    figure(results, settings.out / "objectives.png")
    tables = {name: text(name, result, settings) for name, result in results.items()}
    caption = (
        "Held-out negative log-likelihood against the first distance. "
        "Models outside the range are drawn at the edge."
    )
    write_report(settings.out, "Objectives", write(), SCORES, tables, {"objectives.png": caption})
    return scores


def text(name: str, result: dict, settings: Settings) -> str:
    """The table of a data set, and the results of its side studies."""
    held_out = settings.digits_held_out if name == "digits" else settings.held_out
    between = ", ".join(f"{k}: {v:.4g}" for k, v in result["between_data"].items())
    lines = [
        table(result["rows"]),
        f"{settings.samples} samples; {held_out} held-out examples for the likelihood.",
        f"Between data: {between}",
    ]
    for path, draws in result.get("variance_of_times", {}).items():
        independent = draws["independent"]["variance"]
        ratios = {draw: v["variance"] / independent for draw, v in draws.items()}
        shown = ", ".join(f"{draw}: {ratio:.3f}" for draw, ratio in ratios.items())
        label = "Relative variance of the likelihood-weighted loss by the draw of its times"
        lines.append(f"{label}, {path}: {shown}")
    if "dequantization" in result:
        shown = []
        for way, v in result["dequantization"].items():
            less = f"{v['less_than_uniform']:.3f} ± {v['standard_error_of_that']:.3f}"
            shown.append(f"{way}: {v['bits_per_dim']:.3f}, {less} lower than uniform")
        lines.append("Bits/dim by dequantization: " + "; ".join(shown))
    return "\n\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Settings))
