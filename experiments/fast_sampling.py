"""Fast sampling: every solver x every grid, and what a grid that is found saves.

    python -m experiments.fast_sampling                                                   # mixtures and digits
    python -m experiments.fast_sampling --seeds 2 --dims 2 --points 1000 --nfe 5 10 --learned-nfe 5 10 --no-digits

(a) Gaussian mixtures in 2 and 64 dimensions with their exact denoiser on linear VP, t from 1 to 1e-3. The error is the root
    mean square distance, a dimension, to the end of the exact flow (float64), over the samples that end in the component
    where the flow ends; the share of the others ("flips") is counted apart. Grids are found on one half of the start points
    and scored on the other half. The figures are medians over mixtures.
(b) The trained digits model: Fréchet distance and distance to the end of its own accurate trajectory.

Everything goes to runs/fast_sampling/.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx

import diffjax as dj
from diffjax import exact, grids, optimal_grids, samplers
from diffjax.metrics import frechet_distance
from diffjax.networks import MLP
from experiments import digits, images

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the fast-sampling experiment."""

    out: pathlib.Path = pathlib.Path("runs/fast_sampling")
    """where figures and scores go"""
    nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20, 30, 50)
    """network evaluations"""
    learned_nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20)
    """network evaluations for which grids are learned by gradient"""
    dims: tuple[int, ...] = (2, 64)
    """dimensions of the mixtures"""
    seeds: int = 10
    """mixtures in each dimension"""
    points: tuple[int, ...] = (1000, 128)
    """start points of a mixture in each dimension, half of them to find grids on"""
    candidates: int = 64
    """candidate times of the dynamic programs"""
    learning_steps: int = 250
    """steps of gradient descent on a grid"""
    learning_rate: float = 0.03
    """of Adam on the logarithms of the grid's steps"""
    digits: bool = True
    """whether to sample the digits model, too"""
    digits_out: pathlib.Path = pathlib.Path("runs/digits")
    """the folder of the digits experiment, whose checkpoint is used; trained there if there is none"""


class Solver(NamedTuple):
    make: Callable
    evaluations: int = 1
    """a step"""
    least: int = 1
    """steps"""


SOLVERS = {
    "DDIM": Solver(samplers.ddim),
    "DPM-Solver-2": Solver(samplers.dpm_solver_2, 2),
    "DPM-Solver-3": Solver(samplers.dpm_solver_3, 3),
    "DPM-Solver++ 2S": Solver(samplers.dpm_solver_2s, 2),
    "DPM-Solver++ 2M": Solver(samplers.dpm_solver_2m, least=2),
    "DPM-Solver++ 3M": Solver(samplers.dpm_solver_3m, least=3),
    "UniPC-2": Solver(functools.partial(samplers.unipc, order=2), least=2),
    "UniPC-3": Solver(samplers.unipc, least=3),
    "DEIS-3": Solver(samplers.deis, least=3),
    "eps Adams-3": Solver(samplers.noise_adams, least=3),
    "velocity Adams-2": Solver(functools.partial(samplers.velocity_adams, order=2), least=2),
    "velocity Adams-3": Solver(samplers.velocity_adams, least=3),
    "Heun": Solver(samplers.heun, 2),
}
LEARNED = ("DPM-Solver-2", "DPM-Solver-3", "DPM-Solver++ 2M", "velocity Adams-3")
PUBLISHED = ("uniform log-SNR", "uniform t", "quadratic t", "Karras")
FOUND = ("DP ELBO", "DP KLUB", "DP solver error", "learned", "learned with gains")


def steps_of(name: str, nfe: int) -> int:
    """How many steps use up a number of evaluations; 0 if none do, or the method needs more."""
    steps, rest = divmod(nfe, SOLVERS[name].evaluations)
    return 0 if rest or steps < SOLVERS[name].least else steps


# ---- (a) mixtures ----------------------------------------------------------------------------------------------------

START, END = 1.0, 1e-3
SCHEDULE = dj.linear_vp()


def random_mixture(seed: int, dim: int):
    """Weights, means and covariances of 8 (in 2-D) or 10 components, of unit variance in all, deviations 0.05 to 0.3."""
    rng, k = np.random.default_rng((seed, dim)), 8 if dim == 2 else 10
    weights = rng.dirichlet(np.full(k, 5.0))
    means = rng.normal(size=(k, dim))
    rotations = np.linalg.qr(rng.normal(size=(k, dim, dim)))[0]
    variances = rng.uniform(0.05, 0.3, (k, 1, dim)) ** 2
    return weights, means, (rotations * variances) @ rotations.swapaxes(1, 2)


def denoiser_of(mixture):
    return exact.gaussian_mixture(*mixture, SCHEDULE)


def component(mixture, x):
    """The most probable component of data points x, (n, d)."""
    weights, means, covs = mixture
    variances, vectors = jnp.linalg.eigh(covs)
    white = jnp.einsum("kni,kij->knj", x[None] - means[:, None], vectors) / jnp.sqrt(variances)[:, None]
    logs = jnp.log(weights) - 0.5 * jnp.sum(jnp.log(variances), -1)
    return jnp.argmax(logs[:, None] - 0.5 * jnp.sum(white**2, -1), 0)


def scored(mixture, x, goal):
    """The error over the samples in the goal's component, and the share of the others."""
    own = component(mixture, x) == component(mixture, goal)
    squares = jnp.mean((x - goal) ** 2, -1)
    return jnp.sqrt(jnp.sum(jnp.where(own, squares, 0)) / jnp.maximum(jnp.sum(own), 1)), 1 - jnp.mean(own)


def references(mixtures, x1):
    """Ends and candidates' points of the exact flow in float64: a fourth-order method in 1000 steps."""
    with jax.enable_x64(True):
        schedule = dj.linear_vp()

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, 0, None))
        def ends(mixture, x, ts):
            return dj.sample(jax.random.key(0), samplers.unipc(denoiser_of(mixture), schedule), x, ts)

        args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (mixtures, x1))
        coarse, fine = (ends(*args, dj.uniform_log_snr(schedule, n, START, END)) for n in (500, 1000))
        print(f"  reference flow: {float(jnp.abs(coarse - fine).max()):.1e} between 500 and 1000 steps", flush=True)
        return np.asarray(fine, np.float32)


def published_grid(name: str, n: int):
    if name == "Karras":  # without its last step to t = 0
        return dj.karras(SCHEDULE, n + 1, START, END)[:-1]
    if name == "uniform log-SNR":
        return dj.uniform_log_snr(SCHEDULE, n, START, END)
    return {"uniform t": dj.uniform, "quadratic t": dj.quadratic}[name](n, START, END)


def mixture_tables(mixtures, x1, candidates):
    """The tables of the dynamic programs for every mixture, by the solver whose error they hold."""
    ts = dj.uniform_log_snr(SCHEDULE, candidates, START, END)

    def data(key, mixture, n=256):
        weights, means, covs = mixture
        which = jax.random.categorical(key, jnp.log(weights), shape=(n,))
        noise = jax.random.normal(jax.random.fold_in(key, 1), (n, means.shape[1]))
        variances, vectors = jnp.linalg.eigh(covs)
        return means[which] + jnp.einsum("nij,nj->ni", vectors[which], jnp.sqrt(variances)[which] * noise)

    x0 = jax.block_until_ready(jax.jit(jax.vmap(functools.partial(data, jax.random.key(5))))(mixtures))

    def bound(table):
        def of(mixture, x0):
            return table(jax.random.key(6), denoiser_of(mixture), SCHEDULE, ts, x0)

        return jax.block_until_ready(jax.jit(jax.vmap(of))(mixtures, x0))

    def local(make):
        def of(mixture, x):
            denoise = denoiser_of(mixture)
            fine = jnp.concatenate([jnp.linspace(a, b, 9)[:-1] for a, b in itertools.pairwise(ts)] + [ts[-1:]])
            xs = dj.trajectory(jax.random.key(0), samplers.dpm_solver_3(denoise, SCHEDULE), x, fine)[::8]
            return optimal_grids.solver_error_table(make(denoise, SCHEDULE), SCHEDULE, ts, xs)

        return jax.block_until_ready(jax.jit(jax.vmap(of))(mixtures, x1[:, :16]))

    tables = {"DP ELBO": bound(optimal_grids.elbo_table), "DP KLUB": bound(optimal_grids.klub_table)}
    errors = {name: local(SOLVERS[name].make) for name in ("DDIM", "DPM-Solver-2", "DPM-Solver-3", "DPM-Solver++ 2S")}
    return ts, tables, errors


def programmed_grids(ts, tables, steps: int):
    """The grids of 1 ... steps steps of a batch of tables."""
    budgets = jax.jit(jax.vmap(functools.partial(optimal_grids.cheapest_paths, steps=steps)))(tables)
    return {n: ts[budgets.paths[:, n - 1, : n + 1]] for n in range(1, steps + 1)}


TABLE_OF = {"DDIM": "DDIM", "DPM-Solver-2": "DPM-Solver-2", "Heun": "DPM-Solver-2", "DPM-Solver-3": "DPM-Solver-3"}


def on_mixtures(dim: int, settings: Settings):
    """Errors and flips on the second half of the points: {(solver, grid, nfe): (errors, flips) over seeds}."""
    points = settings.points[settings.dims.index(dim)]
    seeds, half = settings.seeds, points // 2
    mixtures = [random_mixture(seed, dim) for seed in range(seeds)]
    mixtures = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *mixtures)
    x1 = jax.random.normal(jax.random.key(dim), (seeds, points, dim))
    print(f"mixtures in {dim} dimensions", flush=True)
    x0 = references(mixtures, x1)
    most = min(max(settings.nfe), settings.candidates)
    ts, bounds, errors = mixture_tables(mixtures, x1[:, :half], settings.candidates)
    programmed = {name: programmed_grids(ts, table, most) for name, table in bounds.items()}
    programmed |= {("DP solver error", name): programmed_grids(ts, table, most) for name, table in errors.items()}
    print("  dynamic programs done", flush=True)

    results, costs = {}, {}
    for name, (make, *_) in SOLVERS.items():

        def run(mixture, x, ts, make=make):
            return dj.sample(jax.random.key(0), make(denoiser_of(mixture), SCHEDULE), x, ts)

        def score(mixture, x, goal, ts, run=run):
            return scored(mixture, run(mixture, x, ts), goal)

        score_all = jax.jit(jax.vmap(score))

        def learn(mixture, x, goal, ts, run=run):
            def loss(ts):
                x0 = run(mixture, x, ts)
                return jnp.log(scored(mixture, x0, goal)[0])

            return optimal_grids.learn_grid(
                loss,
                ts,
                optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.learning_steps)),
                settings.learning_steps,
            ).ts

        learn_all = jax.jit(jax.vmap(learn))
        for nfe in settings.nfe:
            n = steps_of(name, nfe)
            if not n:
                continue
            chosen = {grid: jnp.tile(published_grid(grid, n), (seeds, 1)) for grid in PUBLISHED}
            if n <= most:
                chosen |= {grid: programmed[grid][n] for grid in FOUND[:2]}
                chosen["DP solver error"] = programmed["DP solver error", TABLE_OF.get(name, "DPM-Solver++ 2S")][n]
            first, second = slice(None, half), slice(half, None)
            if name in LEARNED and nfe in settings.learned_nfe:
                begin = time.perf_counter()
                on_first = {
                    g: np.median(score_all(mixtures, x1[:, first], x0[:, first], t)[0]) for g, t in chosen.items()
                }
                best = min(on_first, key=on_first.get)
                chosen["learned"] = jax.block_until_ready(learn_all(mixtures, x1[:, first], x0[:, first], chosen[best]))
                costs[name, nfe] = time.perf_counter() - begin
            if name == "velocity Adams-3" and nfe in settings.learned_nfe:
                fitted = learn_gains(mixtures, x1[:, first], x0[:, first], chosen["learned"], settings)
                scores = score_gains(mixtures, x1[:, second], x0[:, second], fitted.ts, fitted.numbers)
                results[name, "learned with gains", nfe] = tuple(np.asarray(s) for s in scores)
            for grid, times in chosen.items():
                scores = score_all(mixtures, x1[:, second], x0[:, second], times)
                results[name, grid, nfe] = tuple(np.asarray(s) for s in scores)
        line = {
            nfe: f"{np.median(results[name, 'uniform log-SNR', nfe][0]):.1e}"
            for nfe in settings.nfe
            if (name, "uniform log-SNR", nfe) in results
        }
        print(f"  {name:17s} uniform log-SNR {line}", flush=True)
        line = {
            nfe: f"{np.median(results[name, 'learned', nfe][0]):.1e}"
            for nfe in settings.nfe
            if (name, "learned", nfe) in results
        }
        if line:
            print(f"  {name:17s} learned         {line}", flush=True)
    results |= fast_and_adaptive(mixtures, x1[:, half:], x0[:, half:], settings)
    return results, costs


def run_gains(mixture, x, ts, gains):
    sampler = samplers.velocity_adams(denoiser_of(mixture), SCHEDULE, gains=gains)
    return dj.sample(jax.random.key(0), sampler, x, ts)


@jax.jit
@jax.vmap
def score_gains(mixture, x, goal, ts, gains):
    return scored(mixture, run_gains(mixture, x, ts, gains), goal)


@functools.partial(jax.jit, static_argnames="settings")
def learn_gains(mixtures, x1, x0, ts, settings):
    """Grids and gains of velocity Adams-3, learned together."""

    def learn(mixture, x, goal, ts):
        def loss(ts, gains):
            return jnp.log(scored(mixture, run_gains(mixture, x, ts, gains), goal)[0])

        rate = optax.cosine_decay_schedule(settings.learning_rate, settings.learning_steps)
        return optimal_grids.learn_grid(loss, ts, optax.adam(rate), settings.learning_steps, jnp.ones((ts.size - 1, 2)))

    return jax.vmap(learn)(mixtures, x1, x0, ts)


def fast_and_adaptive(mixtures, x1, x0, settings):
    """DPM-Solver-fast at every K, and the adaptive solvers at several tolerances, with the evaluations that they took."""
    results = {}
    for nfe in settings.nfe:

        def fast(mixture, x, goal, nfe=nfe):
            sampler, ts = dj.samplers.dpm_solver_fast(denoiser_of(mixture), SCHEDULE, nfe, START, END)
            return scored(mixture, dj.sample(jax.random.key(0), sampler, x, ts), goal)

        scores = jax.jit(jax.vmap(fast))(mixtures, x1, x0)
        results["DPM-Solver-fast", "uniform log-SNR", nfe] = tuple(np.asarray(s) for s in scores)
    for name, pair in (("DPM-Solver-12", samplers.DPM_SOLVER_12), ("DPM-Solver-23", samplers.DPM_SOLVER_23)):

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
        def adaptive(mixture, x, goal, tolerance, pair=pair):
            def one(x):
                denoise = denoiser_of(mixture)
                return samplers.dpm_solver_adaptive(denoise, SCHEDULE, x, START, END, pair, tolerance, tolerance)

            ends, evaluations = jax.vmap(one)(x)
            return *scored(mixture, ends, goal), jnp.mean(evaluations)

        for tolerance in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3):
            errors, flips, evaluations = (np.asarray(s) for s in adaptive(mixtures, x1, x0, tolerance))
            results[name, "adaptive", round(float(np.median(evaluations)), 1)] = errors, flips
    return results


# ---- (b) the digits model --------------------------------------------------------------------------------------------

LINEAR = dj.linear()
IMAGE_SOLVERS = ("DDIM", "DPM-Solver-2", "DPM-Solver++ 2M", "UniPC-3", "velocity Adams-3", "Heun")


def image_grid(name: str, n: int):
    """A grid from 1 to 0; the one in log-SNR is uniform between t = 0.999 and 0.001, its ends moved to 1 and 0."""
    if name == "uniform log-SNR":
        return dj.uniform_log_snr(LINEAR, n, 0.999, 0.001).at[0].set(1.0).at[-1].set(0.0)
    return {"uniform t": dj.uniform, "quadratic t": dj.quadratic}[name](n)


def on_digits(settings: Settings):
    """{(solver, grid, nfe): (Fréchet distance, distance to the accurate end)} of the trained digits model."""
    defaults = dataclasses.replace(digits.Settings(), out=settings.digits_out)
    data = digits.load(defaults.seed)
    network = MLP(64, width=defaults.width, depth=defaults.depth, num_classes=10, rngs=nnx.Rngs(defaults.seed))
    settings.digits_out.mkdir(parents=True, exist_ok=True)
    apply, params, _ = images.train(network, data, (64,), defaults, settings.digits_out)
    params = jax.device_put(params)
    held_out = images.pixels(data.held_out, data)
    labels = jnp.resize(jnp.arange(10), 1400)
    x1 = jax.random.normal(jax.random.key(1), (1400, 64))
    few = slice(0, 200)  # to find grids on: other start points than those that are scored
    x1_few = jax.random.normal(jax.random.key(2), (200, 64))

    @functools.partial(jax.jit, static_argnames="make")
    def run(params, labels, x, ts, make):
        denoise = images.denoiser(apply, params, labels)
        return dj.sample(jax.random.key(0), make(denoise, LINEAR), x, ts)

    accurate = functools.partial(run, ts=dj.quadratic(200), make=samplers.heun)
    x0, x0_few = accurate(params, labels, x1), accurate(params, labels[few], x1_few)
    print(f"digits: Fréchet distance of the accurate ends {distance(x0, data, held_out):.3f}", flush=True)

    @functools.partial(jax.jit, static_argnames="make")
    def learn(params, ts, make):
        def loss(ts):
            return jnp.log(jnp.mean((run(params, labels[few], x1_few, ts, make) - x0_few) ** 2))

        rate = optax.cosine_decay_schedule(settings.learning_rate, settings.learning_steps)
        return optimal_grids.learn_grid(loss, ts, optax.adam(rate), settings.learning_steps).ts

    ts = grids.uniform_log_snr(LINEAR, settings.candidates, 0.999, 0.001)
    batch = jnp.asarray(images.pixels(data.train[:256], data), jnp.float32)
    denoise = images.denoiser(apply, params, jnp.asarray(data.train_labels[:256]))
    klub = optimal_grids.klub_table(jax.random.key(3), denoise, LINEAR, ts, batch)
    programmed = programmed_grids(ts, klub[None], max(settings.nfe))

    results = {}
    for name in IMAGE_SOLVERS:
        make = SOLVERS[name].make
        for nfe in settings.nfe:
            n = steps_of(name, nfe)
            if not n:
                continue
            chosen = {grid: image_grid(grid, n) for grid in ("uniform log-SNR", "uniform t", "quadratic t")}
            chosen["DP KLUB"] = programmed[n][0].at[0].set(1.0).at[-1].set(0.0)
            if name in ("velocity Adams-3", "DPM-Solver++ 2M", "DPM-Solver-2") and nfe in settings.learned_nfe:
                chosen["learned"] = learn(params, chosen["quadratic t"], make=make)
            for grid, times in chosen.items():
                x = run(params, labels, x1, times, make=make)
                rms = float(jnp.sqrt(jnp.mean((x - x0) ** 2)))
                results[name, grid, nfe] = distance(x, data, held_out), rms
    return results, distance(x0, data, held_out)


def distance(x, data, held_out) -> float:
    return frechet_distance(images.pixels(images.to_images(x, data), data), held_out)


# ---- figures ---------------------------------------------------------------------------------------------------------

NAMES = (*SOLVERS, "DPM-Solver-fast", "DPM-Solver-12", "DPM-Solver-23")
STYLES = {  # a colour and a marker each; dashed where a step takes several evaluations
    name: {
        "color": f"C{i % 10}",
        "marker": "os^vDPX*"[i % 8],
        "ls": "--" if SOLVERS.get(name, Solver(None, 2)).evaluations > 1 else "-",
    }
    for i, name in enumerate(NAMES)
}


def best_of(results, names, nfe, value):
    """The (solver, grid) of the smallest value among some grids at one NFE."""
    keys = [key for key in results if key[1] in names and key[2] == nfe]
    return min(keys, key=lambda key: value(results[key])) if keys else None


def figure(results, value, ylabel: str, path: pathlib.Path, nfe, published, found) -> None:
    """Work against precision: the best published grid for each solver, and the best found one."""
    fig, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), sharey=True, sharex=True, layout="constrained")
    titles = "best published grid of each solver", "best found grid of each solver"
    for ax, names, title in zip(axes, ((*published, "adaptive"), found), titles, strict=True):
        for solver in NAMES:
            points = {}
            for (name, grid, evaluations), result in results.items():
                if name == solver and grid in names:
                    points[evaluations] = min(points.get(evaluations, np.inf), value(result))
            if points:
                ax.plot(*zip(*sorted(points.items()), strict=True), ms=4, lw=1, label=solver, **STYLES[solver])
        ax.set(title=title, xlabel="network evaluations (NFE)", xscale="log", yscale="log")
        ax.set_xticks(nfe, nfe)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.3, which="both")
    best = [(k, value(results[best_of(results, published, k, value)])) for k in nfe]
    axes[1].plot(*zip(*best, strict=True), "k:", lw=2, label="best of all published")
    axes[0].set_ylabel(ylabel)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def table(results, settings, value, published, found) -> str:
    """Markdown: the best published and the best found at each NFE, and DPM-Solver-2 and -3 on both."""

    def row(title, names, solvers=None, number=True):
        cells = []
        for nfe in settings.nfe:
            some = {k: v for k, v in results.items() if solvers is None or k[0] in solvers}
            key = best_of(some, names, nfe, value)
            cells.append(
                ""
                if key is None
                else f"{value(results[key]):.1e}" + ("" if solvers or not number else f" ({key[0]}, {key[1]})")
            )
        return f"| {title} | " + " | ".join(cells) + " |"

    lines = ["| | " + " | ".join(str(k) for k in settings.nfe) + " |", "|---" * (len(settings.nfe) + 1) + "|"]
    lines.append(row("best published", published))
    lines.append(row("best found", found))
    for solver in dict.fromkeys(key[0] for key in results if key[1] != "adaptive"):
        lines.append(row(f"{solver}, uniform log-SNR", ("uniform log-SNR",), (solver,)))
        if any(key[0] == solver and key[1] in found for key in results):
            lines.append(row(f"{solver}, best found", found, (solver,)))
    return "\n".join(lines)


def saved_evaluations(results, value, solver: str, found) -> dict[int, float]:
    """For each NFE on a found grid: how many evaluations uniform log-SNR needs for that error (interpolated)."""
    baseline = sorted(
        (nfe, value(v)) for (name, grid, nfe), v in results.items() if name == solver and grid == "uniform log-SNR"
    )
    if len(baseline) < 2:
        return {}
    nfes, errors = np.log(np.array(baseline)).T
    order = np.argsort(errors)
    out = {}
    for nfe in sorted({k[2] for k in results if k[0] == solver and k[1] in found}):
        error = min(value(v) for (name, grid, k), v in results.items() if name == solver and grid in found and k == nfe)
        inside = errors.min() <= np.log(error) <= errors.max()
        out[nfe] = float(np.exp(np.interp(np.log(error), errors[order], nfes[order]))) if inside else float("inf")
    return out


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    begin, report = time.perf_counter(), []
    record = {"settings": {k: str(v) for k, v in dataclasses.asdict(settings).items()}, "results": {}}

    def median(result):
        return float(np.median(result[0]))

    for dim in settings.dims:
        results, costs = on_mixtures(dim, settings)
        ylabel = f"RMS error a dimension (d = {dim}, median of {settings.seeds} mixtures)"
        figure(results, median, ylabel, settings.out / f"mixture_{dim}d.png", settings.nfe, PUBLISHED, FOUND)
        report += [f"## Mixtures in {dim} dimensions\n", table(results, settings, median, PUBLISHED, FOUND)]
        for solver in ("DPM-Solver-2", "DPM-Solver-3"):
            saved = {k: round(n, 1) for k, n in saved_evaluations(results, median, solver, FOUND).items()}
            report.append(
                f"{solver}, evaluations on uniform log-SNR for the error of the best found grid of K: {saved}"
            )
        adaptive = {k: f"{median(v):.1e}" for k, v in results.items() if k[1] == "adaptive"}
        report.append(f"adaptive: {adaptive}")
        report.append(
            f"seconds to learn the grids of {settings.seeds} mixtures: { {k: round(v) for k, v in costs.items()} }"
        )
        record["results"][f"mixture_{dim}d"] = [
            {
                "solver": s,
                "grid": g,
                "nfe": k,
                "error_median": median(v),
                "error_worst": float(np.max(v[0])),
                "flips_median": float(np.median(v[1])),
                "flips_worst": float(np.max(v[1])),
            }
            for (s, g, k), v in results.items()
        ]
    if settings.digits:
        results, accurate = on_digits(settings)
        image_published, image_found = PUBLISHED[:3], ("DP KLUB", "learned")
        for index, name, ylabel in (
            (0, "frechet", "Fréchet distance to held-out (pixels)"),
            (1, "distance", "RMS distance to the accurate end (a pixel)"),
        ):

            def value(result, index=index):
                return result[index]

            figure(
                results,
                value,
                f"digits: {ylabel}",
                settings.out / f"digits_{name}.png",
                settings.nfe,
                image_published,
                image_found,
            )
            report += [f"## Digits: {ylabel}\n", table(results, settings, value, image_published, image_found)]
        report.append(f"Fréchet distance of the accurate ends: {accurate:.3f}")
        record["results"]["digits"] = [
            {"solver": s, "grid": g, "nfe": k, "frechet": v[0], "distance": v[1]} for (s, g, k), v in results.items()
        ]
    record["seconds"] = time.perf_counter() - begin
    (settings.out / "metrics.json").write_text(json.dumps(record, indent=1) + "\n")
    (settings.out / "report.md").write_text("\n\n".join(report) + "\n")
    print("\n\n".join(report))
    return record


if __name__ == "__main__":
    main(tyro.cli(Settings))
