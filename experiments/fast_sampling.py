"""Fast sampling: every solver x every grid, and what a grid that is found saves.

    python -m experiments.fast_sampling                                                       # mixtures and digits
    python -m experiments.fast_sampling --fashion-data /usr/share/datasets/fashion-mnist      # Fashion-MNIST as well
    python -m experiments.fast_sampling --seeds 2 --dims 2 --points 400 --nfe 5 10 --learned-nfe 5 --no-digits   # a look

(a) Gaussian mixtures in 2 and 64 dimensions with their exact denoiser on linear VP, t from 1 to 1e-3. The error is the root
    mean square distance, a dimension, to the end of the exact flow (float64), over the samples that end in the component
    where the flow ends; the share of the others ("flips") is counted apart. Grids are found on one half of the start points
    and scored on the other half. The figures are medians over mixtures.
(b) The trained digits model, and the Fashion-MNIST one: Fréchet distance, and distance to the end of their own accurate
    trajectories.

Everything goes to runs/fast_sampling/.
"""

import dataclasses
import functools
import itertools
import operator
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx

import diffjax as dj
from diffjax import exact, optimal_grids, samplers
from diffjax.dynamics import probability_flow
from diffjax.metrics import frechet_distance
from diffjax.networks import MLP
from experiments import digits, fashion_mnist, images
from experiments.results import write_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the fast-sampling experiment."""

    out: pathlib.Path = pathlib.Path("runs/fast_sampling")
    """where figures and scores go"""
    nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20, 30, 50)
    """network evaluations"""
    learned_nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20)
    """network evaluations for which grids are learned"""
    dims: tuple[int, ...] = (2, 64)
    """dimensions of the mixtures"""
    seeds: int = 10
    """mixtures in each dimension"""
    points: tuple[int, ...] = (1500, 192)
    """start points of a mixture in each dimension, half of them to find grids on"""
    candidates: int = 64
    """candidate times of the dynamic programs"""
    fit_steps: int = 40
    """steps of Levenberg-Marquardt on a grid of a mixture, at most"""
    learning_steps: int = 60
    """steps of Adam on a grid of a trained model, whose Jacobians would cost more"""
    learning_rate: float = 0.03
    """of Adam on the logarithms of the grid's steps"""
    digits: bool = True
    """whether to sample the digits model"""
    digits_out: pathlib.Path = pathlib.Path("runs/digits")
    """the folder of the digits experiment, whose checkpoint is used; trained there if there is none"""
    fashion_data: pathlib.Path | None = None
    """the folder of Fashion-MNIST's idx .gz files: to sample that model, too"""
    fashion_out: pathlib.Path = pathlib.Path("runs/fashion_mnist")
    """the folder of the Fashion-MNIST experiment, as above"""
    fashion_nfe: tuple[int, ...] = (5, 6, 10, 20)
    """network evaluations of the Fashion-MNIST model"""
    fashion_samples: int = 400
    """of the Fashion-MNIST model, scored"""


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
WITH_GAINS = "velocity Adams-3"  # the solver whose weights are learned, too


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
    return jnp.sqrt(jnp.sum(jnp.where(own, squares, 0)) / jnp.maximum(jnp.sum(own), 1)), jnp.mean(~own)


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


def bounded(error, width):
    """`r / sqrt(1 + |r|^2 / width^2)`: a sample that ends elsewhere altogether counts as one that is off by width."""
    return error / jnp.sqrt(1 + jnp.mean(error**2, -1, keepdims=True) / width**2)


def on_mixtures(dim: int, settings: Settings):
    """Errors and flips on the second half of the points, {(solver, grid, nfe): (errors, flips) over seeds}; and seconds."""
    points = settings.points[settings.dims.index(dim)]
    seeds, half = settings.seeds, points // 2
    mixtures = [random_mixture(seed, dim) for seed in range(seeds)]
    mixtures = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *mixtures)
    x1 = jax.random.normal(jax.random.key(dim), (seeds, points, dim))
    print(f"mixtures in {dim} dimensions", flush=True)
    x0 = references(mixtures, x1)
    first, second = ((mixtures, x1[:, part], x0[:, part]) for part in (slice(half), slice(half, None)))
    most = min(max(settings.nfe), settings.candidates)
    begin, costs = time.perf_counter(), {}
    ts, bounds, errors = mixture_tables(mixtures, x1[:, :half], settings.candidates)
    programmed = {name: programmed_grids(ts, table, most) for name, table in bounds.items()}
    programmed |= {("DP solver error", name): programmed_grids(ts, table, most) for name, table in errors.items()}
    costs["all dynamic programs"] = time.perf_counter() - begin
    print("  dynamic programs done", flush=True)

    results = {}

    def record(key, scores):
        results[key] = tuple(np.asarray(s) for s in scores)

    for name, (make, *_) in SOLVERS.items():

        def run(mixture, x, ts, gains=None, make=make):
            options = {} if gains is None else {"gains": gains}
            return dj.sample(jax.random.key(0), make(denoiser_of(mixture), SCHEDULE, **options), x, ts)

        @jax.jit
        @jax.vmap
        def score(mixture, x, goal, *numbers, run=run):
            return scored(mixture, run(mixture, x, *numbers), goal)

        @jax.jit
        def fit_all(mixtures, x1, x0, *numbers, run=run, settings=settings):
            """One mixture after the other."""

            def one(args):
                mixture, x, goal, *numbers = args
                width = 2 * scored(mixture, run(mixture, x, *numbers), goal)[0]

                def residuals(*numbers):
                    return bounded(run(mixture, x, *numbers) - goal, width)

                fitted = optimal_grids.fit_grid(residuals, *numbers, steps=settings.fit_steps)
                return fitted.ts, fitted.numbers

            return jax.lax.map(one, (mixtures, x1, x0, *numbers))

        for nfe in settings.nfe:
            n = steps_of(name, nfe)
            if not n:
                continue
            chosen = {grid: jnp.tile(published_grid(grid, n), (seeds, 1)) for grid in PUBLISHED}
            if n <= most:
                chosen |= {grid: programmed[grid][n] for grid in FOUND[:2]}
                chosen["DP solver error"] = programmed["DP solver error", TABLE_OF.get(name, "DPM-Solver++ 2S")][n]
            if name in LEARNED and nfe in settings.learned_nfe:
                on_first = {grid: np.median(score(*first, times)[0]) for grid, times in chosen.items()}
                best = min(on_first, key=on_first.get)
                begin = time.perf_counter()
                chosen["learned"], _ = jax.block_until_ready(fit_all(*first, chosen[best]))
                costs[name, nfe] = time.perf_counter() - begin
                if name == WITH_GAINS:
                    begin = time.perf_counter()
                    ones = jnp.ones((seeds, n, 2))
                    with_gains = jax.block_until_ready(fit_all(*first, chosen["learned"], ones))
                    costs[name + " with gains", nfe] = time.perf_counter() - begin
                    record((name, "learned with gains", nfe), score(*second, *with_gains))
            for grid, times in chosen.items():
                record((name, grid, nfe), score(*second, times))
        for grid in ("uniform log-SNR", "learned", "learned with gains"):
            line = {k: f"{np.median(v[0]):.1e}" for (s, g, k), v in results.items() if (s, g) == (name, grid)}
            if line:
                print(f"  {name:17s} {grid:18s} {line}", flush=True)
    results |= fast_and_adaptive(*second, settings)
    return results, costs


DIFFRAX = {  # a solver, and its evaluations a step: the last one serves the next step. Two choose the first step's length.
    "Bogacki-Shampine 3(2)": (diffrax.Bosh3(), 3),
    "Tsitouras 5(4)": (diffrax.Tsit5(), 6),
}


def fast_and_adaptive(mixtures, x1, x0, settings):
    """DPM-Solver-fast at every K, and the adaptive solvers at several tolerances, with the evaluations that they took."""
    results = {}
    for nfe in settings.nfe:

        def fast(mixture, x, goal, nfe=nfe):
            return scored(mixture, dj.solve.dpm_solver_fast(denoiser_of(mixture), SCHEDULE, x, nfe, START, END), goal)

        scores = jax.jit(jax.vmap(fast))(mixtures, x1, x0)
        results["DPM-Solver-fast", "uniform log-SNR", nfe] = tuple(np.asarray(s) for s in scores)
    for name, pair in (("DPM-Solver-12", dj.solve.DPM_SOLVER_12), ("DPM-Solver-23", dj.solve.DPM_SOLVER_23)):

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
        def adaptive(mixture, x, goal, tolerance, pair=pair):
            def one(x):
                denoise = denoiser_of(mixture)
                return dj.solve.dpm_solver_adaptive(denoise, SCHEDULE, x, START, END, pair, tolerance, tolerance)

            ends, evaluations = jax.vmap(one)(x)
            return *scored(mixture, ends, goal), jnp.mean(evaluations)

        for tolerance in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3):
            errors, flips, evaluations = (np.asarray(s) for s in adaptive(mixtures, x1, x0, tolerance))
            results[name, "adaptive", round(float(np.median(evaluations)), 1)] = errors, flips
    for name, (solver, stages) in DIFFRAX.items():

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
        def on_the_linear_path(mixture, x, goal, tolerance, solver=solver):
            linear, places = dj.linear(), []
            for t in (START, END):  # where the linear path has this log-SNR, and the factor between the two x
                alpha, sigma = SCHEDULE(t)
                places.append((sigma / (alpha + sigma), alpha + sigma))
            (start, scale), (end, scale_end) = places
            flow = probability_flow(dj.reschedule(denoiser_of(mixture), SCHEDULE, linear), linear)

            def one(y):
                controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
                term = diffrax.ODETerm(flow)
                return diffrax.diffeqsolve(term, solver, start, end, None, y, stepsize_controller=controller)

            solution = jax.vmap(one)(x / scale)
            ends, steps = scale_end * solution.ys[:, -1], solution.stats["num_steps"]
            return *scored(mixture, ends, goal), jnp.mean(steps)

        for tolerance in (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1.3e-4, 1e-4):
            errors, flips, steps = (np.asarray(s) for s in on_the_linear_path(mixtures, x1, x0, tolerance))
            results[name, "adaptive", round(float(np.median(steps)) * stages + 2, 1)] = errors, flips
    return results


# ---- (b) trained models ----------------------------------------------------------------------------------------------

LINEAR = images.SCHEDULE
IMAGE_PUBLISHED, IMAGE_LEARNED = PUBLISHED[:3], ("learned", "learned with gains")


class Model(NamedTuple):
    """A trained model, and how much of the experiment it can pay for."""

    title: str
    apply: Callable
    params: Any
    data: images.Images
    event: tuple[int, ...]
    samples: int
    few: int
    """start points to learn on: others than those that are scored"""
    accurate_steps: int
    """of Heun's method, for the accurate ends"""
    nfe: tuple[int, ...]


def digits_model(settings: Settings) -> Model:
    own = dataclasses.replace(digits.Settings(), out=settings.digits_out)
    data = digits.load(own.seed)
    network = MLP(64, width=own.width, depth=own.depth, num_classes=10, rngs=nnx.Rngs(own.seed))
    own.out.mkdir(parents=True, exist_ok=True)
    apply, params, _ = images.train(network, data, (64,), own, own.out)
    return Model("digits", apply, jax.device_put(params), data, (64,), 1400, 200, 200, settings.nfe)


def fashion_model(settings: Settings) -> Model:
    own = dataclasses.replace(fashion_mnist.Settings(), out=settings.fashion_out, data_dir=settings.fashion_data)
    data = fashion_mnist.load(own.data_dir)
    own.out.mkdir(parents=True, exist_ok=True)
    apply, params, _ = images.train(fashion_mnist.make_network(own), data, fashion_mnist.EVENT, own, own.out)
    samples, few = settings.fashion_samples, 16
    return Model(
        "Fashion-MNIST",
        apply,
        jax.device_put(params),
        data,
        fashion_mnist.EVENT,
        samples,
        few,
        40,
        settings.fashion_nfe,
    )


def image_grid(name: str, n: int):
    """A grid from 1 to 0."""
    if name == "uniform log-SNR":
        return dj.uniform_log_snr(LINEAR, n, end=0.0)
    return {"uniform t": dj.uniform, "quadratic t": dj.quadratic}[name](n)


def on_images(model: Model, settings: Settings):
    """{(solver, grid, nfe): (Fréchet distance, distance to the accurate end)}; the former of the accurate ends; seconds."""
    data, n_few = model.data, model.few
    held_out = images.pixels(data.held_out, data)
    labels = jnp.resize(jnp.arange(data.classes), model.samples)
    x1 = jax.random.normal(jax.random.key(1), (model.samples, *model.event))
    x1_few = jax.random.normal(jax.random.key(2), (n_few, *model.event))

    @functools.partial(jax.jit, static_argnames="make")
    def run(params, labels, x, ts, make, gains=None):
        options = {} if gains is None else {"gains": gains}
        sampler = make(images.denoiser(model.apply, params, labels), LINEAR, **options)
        return dj.sample(jax.random.key(0), sampler, x, ts)

    def run_all(ts, make, gains=None):
        def chunk(labels, x):
            return run(model.params, labels, x, ts, make, gains)

        return images.in_chunks(chunk, min(200, model.samples), labels, x1)

    def distance(x) -> float:
        return frechet_distance(images.pixels(images.to_images(x, data), data), held_out, allow_few=True)

    accurate = dj.quadratic(model.accurate_steps)
    x0 = run_all(accurate, samplers.heun)
    x0_few = run(model.params, labels[:n_few], x1_few, accurate, samplers.heun)
    frechet = distance(x0)
    print(f"{model.title}: Fréchet distance of the accurate ends {frechet:.3f}", flush=True)

    @functools.partial(jax.jit, static_argnames="make")
    def error_of_few(params, ts, make, gains=None):
        return jnp.mean((run(params, labels[:n_few], x1_few, ts, make, gains) - x0_few) ** 2)

    @functools.partial(jax.jit, static_argnames=("make", "with_gains"))
    def learn(params, ts, make, with_gains):
        def loss(ts, gains=None):
            return jnp.log(error_of_few(params, ts, make, gains))

        rate = optax.cosine_decay_schedule(settings.learning_rate, settings.learning_steps)
        gains = jnp.ones((ts.size - 1, 2)) if with_gains else None
        return optimal_grids.learn_grid(loss, ts, optax.adam(rate), settings.learning_steps, gains)

    candidates = dj.uniform_log_snr(LINEAR, settings.candidates, 0.999, 0.001)
    batch = jnp.asarray(images.pixels(data.train[:n_few], data), jnp.float32).reshape(n_few, *model.event)
    denoise = images.denoiser(model.apply, model.params, jnp.asarray(data.train_labels[:n_few]))
    klub = optimal_grids.klub_table(jax.random.key(3), denoise, LINEAR, candidates, batch)
    programmed = programmed_grids(candidates, klub[None], min(max(model.nfe), settings.candidates))

    results, costs = {}, {}
    for name, (make, *_) in SOLVERS.items():
        for nfe in model.nfe:
            n = steps_of(name, nfe)
            if not n:
                continue
            chosen = {grid: (image_grid(grid, n), None) for grid in IMAGE_PUBLISHED}
            chosen["DP KLUB"] = programmed[n][0].at[0].set(1.0).at[-1].set(0.0), None
            if name in LEARNED and nfe in settings.learned_nfe:
                begin = time.perf_counter()
                with_gains = name == WITH_GAINS
                grids = [ts for ts, _ in chosen.values()]
                best = min(grids, key=lambda ts, make=make: float(error_of_few(model.params, ts, make)))
                learned = learn(model.params, best, make, with_gains)[:2]
                chosen["learned with gains" if with_gains else "learned"] = jax.block_until_ready(learned)
                costs[name, nfe] = time.perf_counter() - begin
            for grid, (times, gains) in chosen.items():
                x = run_all(times, make, gains)
                results[name, grid, nfe] = distance(x), float(np.sqrt(np.mean((x - x0) ** 2)))
        line = {k: f"{v[1]:.1e}" for (s, g, k), v in results.items() if (s, g) == (name, "quadratic t")}
        print(f"  {name:17s} quadratic t {line}", flush=True)
    return results, frechet, costs


# ---- figures ---------------------------------------------------------------------------------------------------------

NAMES = (*SOLVERS, "DPM-Solver-fast", "DPM-Solver-12", "DPM-Solver-23", *DIFFRAX)
STYLES = {  # a colour and a marker each; dashed where a step takes several evaluations
    name: {
        "color": plt.get_cmap("tab20")(i),
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
    kind = "best found" if len(found) > 2 else "learned"
    titles = "best published grid of each solver", f"{kind} grid of each solver"
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
    low, high = axes[0].get_ylim()
    if high < 30 * low:
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    best = [(k, value(results[best_of(results, published, k, value)])) for k in nfe]
    axes[1].plot(*zip(*best, strict=True), "k:", lw=2, label="best of all published")
    axes[0].set_ylabel(ylabel)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def table(results, nfes, value, published, found, worst=None) -> str:
    """Markdown: the best published and the best found at each NFE, and DPM-Solver-2 and -3 on both."""

    def row(title, names, solvers=None, number=True):
        cells = []
        for nfe in nfes:
            some = {k: v for k, v in results.items() if solvers is None or k[0] in solvers}
            key = best_of(some, names, nfe, value)
            cells.append(
                ""
                if key is None
                else f"{value(results[key]):.1e}" + ("" if solvers or not number else f" ({key[0]}, {key[1]})")
            )
        return f"| {title} | " + " | ".join(cells) + " |"

    def ratio(names, of):
        cells = []
        for nfe in nfes:
            keys = [best_of(results, names, nfe, value) for names in names]
            cells.append("" if None in keys else of(*(results[key] for key in keys)))
        return " | ".join(cells)

    lines = ["| | " + " | ".join(str(k) for k in nfes) + " |", "|---" * (len(nfes) + 1) + "|"]
    lines.append(row("best published", published))
    lines.append(row("best found", found))
    both = published, found
    lines.append(f"| found / published | {ratio(both, lambda a, b: f'{value(b) / value(a):.2f}')} |")
    if worst is not None:
        lines.append(f"| worst, published | {ratio(both, lambda a, b: f'{worst(a):.1e}')} |")
        lines.append(f"| worst, found | {ratio(both, lambda a, b: f'{worst(b):.1e}')} |")
        flips = ratio(both, lambda a, b: f"{100 * np.median(a[1]):.1f} / {100 * np.median(b[1]):.1f}")
        lines.append(f"| flips, %, published / found | {flips} |")
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
    record = {"settings": {k: str(v) for k, v in dataclasses.asdict(settings).items()}, "results": {}, "costs": {}}

    def median(result):
        return float(np.median(result[0]))

    def worst(result):
        return float(np.max(result[0]))

    for dim in settings.dims:
        results, costs = on_mixtures(dim, settings)
        ylabel = f"RMS error a dimension (d = {dim}, median of {settings.seeds} mixtures)"
        figure(results, median, ylabel, settings.out / f"mixture_{dim}d.png", settings.nfe, PUBLISHED, FOUND)
        report += [f"## Mixtures in {dim} dimensions\n", table(results, settings.nfe, median, PUBLISHED, FOUND, worst)]
        for solver in ("DPM-Solver-2", "DPM-Solver-3"):
            saved = {k: round(n, 1) for k, n in saved_evaluations(results, median, solver, FOUND).items()}
            report.append(
                f"{solver}, evaluations on uniform log-SNR for the error of the best found grid of K: {saved}"
            )
        adaptive = {k: f"{median(v):.1e}" for k, v in results.items() if k[1] == "adaptive"}
        report.append(f"adaptive: {adaptive}")
        report.append(
            f"seconds to find the grids of {settings.seeds} mixtures: { {k: round(v) for k, v in costs.items()} }"
        )
        record["costs"][f"mixture_{dim}d"] = {str(key): cost for key, cost in costs.items()}
        record["results"][f"mixture_{dim}d"] = [
            {
                "solver": s,
                "grid": g,
                "nfe": k,
                "error_median": median(v),
                "error_worst": worst(v),
                "flips_median": float(np.median(v[1])),
                "flips_worst": float(np.max(v[1])),
            }
            for (s, g, k), v in results.items()
        ]
    models = [digits_model] * settings.digits + [fashion_model] * (settings.fashion_data is not None)
    for make_model in models:
        model = make_model(settings)
        results, accurate, costs = on_images(model, settings)
        file = model.title.lower().replace("-", "_")
        for index, name, ylabel in (
            (0, "frechet", "Fréchet distance to held-out (pixels)"),
            (1, "distance", "RMS distance to the accurate end (a pixel)"),
        ):
            value = operator.itemgetter(index)
            title, path = f"{model.title}: {ylabel}", settings.out / f"{file}_{name}.png"
            figure(results, value, title, path, model.nfe, IMAGE_PUBLISHED, IMAGE_LEARNED)
            report += [f"## {title}\n", table(results, model.nfe, value, IMAGE_PUBLISHED, ("DP KLUB", *IMAGE_LEARNED))]
        report.append(f"Fréchet distance of the accurate ends: {accurate:.3f}")
        report.append(f"seconds to learn a grid: { {k: round(v) for k, v in costs.items()} }")
        record["costs"][file] = {str(key): cost for key, cost in costs.items()}
        record["results"][file] = [
            {"solver": s, "grid": g, "nfe": k, "frechet": v[0], "distance": v[1]} for (s, g, k), v in results.items()
        ]
    record["seconds"] = time.perf_counter() - begin
    write_results(settings.out / "metrics.json", record)
    (settings.out / "report.md").write_text("\n\n".join(report) + "\n")
    print("\n\n".join(report))
    return record


if __name__ == "__main__":
    main(tyro.cli(Settings))
