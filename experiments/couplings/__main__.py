"""Runs the study and writes its record, report and figure."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import diffjax as dj
from diffjax.metrics import curvature, path_length, wasserstein
from experiments.couplings import Settings
from experiments.couplings.figures import figure
from experiments.couplings.models import COUPLINGS, PAIRS, diffusion, flow, train
from experiments.results import Score, table, write_record, write_report

SCORES = {
    "length": Score("The mean length of a path from prior to data.", "units of x", "lower"),
    "curvature": Score(
        "The mean of `int |dx/dt - (x1 - x0)|^2 dt` over paths. It is 0 for straight paths.",
        "squared units of x",
        "lower",
    ),
    "n steps": Score(
        "The 2-Wasserstein distance of samples after n Euler steps to as many data points. "
        "The goal is the distance between two sets of data points.",
        "units of x",
        "lower",
    ),
}


def measure(pair: str, name: str, settings: Settings, seed: int):
    """The scores and trajectories of each row, and the distance between two sets of data."""
    model = train(pair, name, settings, seed)
    rng = np.random.default_rng(1000 + seed)
    prior, data = PAIRS[pair]
    x1 = jnp.asarray(prior(rng, settings.points), jnp.float32)
    fresh, other = data(rng, settings.points), data(rng, settings.points)

    def row(run, smooth=True):
        ts = dj.uniform(200, model.high, model.low)
        xs = run(ts)
        distances = {
            n: wasserstein(run(dj.uniform(n, model.high, model.low))[-1], fresh, 2)
            for n in settings.nfe
        }
        scores: dict = {"distance": distances}
        # The length and curvature of a Brownian path grow without bound with the number of steps.
        if smooth:
            scores["length"] = float(jax.vmap(path_length, 1)(xs).mean())
            scores["curvature"] = float(jax.vmap(curvature, (None, 1))(ts, xs).mean())
        return scores, np.asarray(xs)

    ode = row(functools.partial(flow, model.velocity, x1))
    between_data = wasserstein(other, fresh, 2)
    if name != "entropic":
        return {name: ode}, between_data
    args = jax.random.key(seed), model.velocity, model.score, settings.amplitude, x1
    sde = row(functools.partial(diffusion, *args), smooth=False)
    return {f"{name}, ODE": ode, f"{name}, SDE": sde}, between_data


def spread(values: list) -> str:
    """The mean and the standard deviation; nothing if there is no value."""
    return "" if None in values else f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def cells(label: str, seeds: list[dict], settings: Settings) -> list[str]:
    """Means and standard deviations over the seeds."""
    columns = [[s.get(name) for s in seeds] for name in ("length", "curvature")]
    columns += [[s["distance"][n] for s in seeds] for n in settings.nfe]
    return [label, *(spread(column) for column in columns)]


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    scores, floor, trajectories, tables = {}, {}, {}, {}
    for pair in PAIRS:
        scores[pair], floors, trajectories[pair] = {}, [], {}
        for name in COUPLINGS:
            for seed in range(settings.seeds):
                rows, between_data = measure(pair, name, settings, seed)
                floors.append(between_data)
                for label, (row, xs) in rows.items():
                    scores[pair].setdefault(label, []).append(row)
                    trajectories[pair].setdefault(label, xs)
        floor[pair] = float(np.mean(floors))
        head = ["coupling", "length", "curvature", *(f"{n} steps" for n in settings.nfe)]
        text = table(head, (cells(label, seeds, settings) for label, seeds in scores[pair].items()))
        tables[f"{pair}; {floor[pair]:.3f} between data"] = text
    figure(trajectories, scores, floor, settings, settings.out / "couplings.png")
    measured = {"rows": scores, "data_to_data": floor}
    seconds = time.perf_counter() - begin
    record = write_record(settings.out / "result.json", settings, measured, seconds)
    caption = "Trajectories of each coupling, and the distance to data against Euler steps."
    write_report(settings.out, "Couplings", record, SCORES, tables, {"couplings.png": caption})
    return measured


if __name__ == "__main__":
    main(tyro.cli(Settings))
