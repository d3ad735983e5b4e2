"""Every training objective on every path: one network and one budget of steps, what each reaches, and what it costs.

    python -m experiments.objectives                       # hours on two CPU cores; runs/objectives/
    python -m experiments.objectives --data moons --seeds 0 --steps 300 --paths linear   # a look
    python -m experiments.objectives --efficientnet .../efficientnet-lite0-57934424.pth   # its features for the digits, too

A run in a folder that holds one continues it.

In the plane (moons, or a mixture) and on the 8x8 digits. Scores of every model: held-out negative log-likelihood (the exact
trace in the plane, Hutchinson's on the digits) and the variational bound beside it; the distances of its samples to
held-out data (sliced 1-Wasserstein and 2-Wasserstein in the plane; on the digits Fréchet, in pixels and in the features of a
small classifier, and KID in those of EfficientNet-Lite0); the network evaluations after which the first distance stays
within 1% of its limit; the seconds of training. For the likelihood weighting, also the variance of the loss by how the
times are drawn, and on the digits the bits/dim of one model by how its data are dequantized.

Every path is used between the same two noise levels, sigma / alpha = 0.02 and 10 (those of the VE path), in training,
sampling and scoring: outside this range the path's end amplifies each parametrization's error, so that ends and not
objectives would be compared. Inputs and targets have unit variance on every path, for data of unit variance (`normalized`).
"""

import dataclasses
import functools
import json
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
from sklearn.neural_network import MLPClassifier

import diffjax as dj
from diffjax import couplings, divergence, likelihood, losses, schedules, times, training, weightings
from diffjax.features import efficientnet_lite0
from diffjax.metrics import frechet_distance, kernel_distance, sliced_wasserstein, wasserstein
from diffjax.networks import MLP
from diffjax.process import log_prior
from experiments import digits, image_quality, images, toy2d
from experiments.results import write_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the objectives experiment."""

    out: pathlib.Path = pathlib.Path("runs/objectives")
    """where tables and figures go"""
    data: tuple[str, ...] = ("moons", "digits")
    """which of moons, mixture, rings and digits"""
    paths: tuple[str, ...] = ("linear VP", "VE", "linear", "GVP")
    """of the objectives that any path can have"""
    objectives: tuple[str, ...] = ()
    """some of them; all unless given"""
    steps: int = 2000
    """training steps of each network in the plane"""
    digits_steps: int = 1000
    """training steps of each network on the digits"""
    simulated_steps: int = 500
    """training steps of maximum likelihood, which solves the flow and its adjoint in every one"""
    simulated_batch: int = 64
    """points a step of it"""
    batch: int = 256
    """points a step"""
    learning_rate: float = 2e-3
    """the peak, before cosine decay"""
    held_out: int = 500
    """points whose likelihood is computed in the plane"""
    digits_held_out: int = 180
    """images whose likelihood is computed"""
    samples: int = 1000
    """samples of a model that are scored"""
    nfe: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    """network evaluations of Heun's method; the limit takes 200"""
    seeds: tuple[int, ...] = (0, 1)
    """of networks, batches, and what is drawn in training: a row each, and their mean and spread in the tables; of those
    that simulate the first alone"""
    efficientnet: pathlib.Path | None = None
    """the file of EfficientNet-Lite0's weights"""


LEAST, MOST = 0.02, 10.0  # of sigma / alpha


class Path(NamedTuple):
    """A schedule, and the times between which it is used."""

    schedule: Callable
    low: jax.Array
    high: jax.Array


def path_of(schedule) -> Path:
    low, high = (schedules.half_log_snr_inverse(schedule, -float(np.log(level))) for level in (LEAST, MOST))
    return Path(schedule, low, high)


def at_low(path: Path, x0) -> tuple[jax.Array, jax.Array]:
    """Data as they are at the path's low end, but for its noise: alpha x0, and the log volume that this scaling takes."""
    alpha = schedules.coefficients(path.schedule, path.low).alpha
    return alpha * x0, x0.size * jnp.log(alpha)


def learned_path(params) -> Path:
    return Path(schedules.monotone_vp(*params), jnp.zeros(()), jnp.ones(()))


PATHS = {name: path_of(schedule) for name, schedule in toy2d.PATHS.items()}


class Kind(NamedTuple):
    """A kind of data: how to draw a network, what is scored."""

    train: np.ndarray
    labels: np.ndarray | None
    held_out: np.ndarray
    held_out_labels: np.ndarray | None
    network: Callable
    steps: int
    levels: int | None = None


# ---- objectives ------------------------------------------------------------------------------------------------------


def normalized(parametrization):
    """The parametrization with inputs and target of unit variance, for data of unit variance."""
    return parametrization._replace(row=dj.bind(_unit_row, parametrization.row), inputs=dj.bind(_unit_inputs))


def _unit_row(row, schedule, t):
    a, b, _ = row(schedule, t)
    return a, b, jnp.hypot(a, b)


def _unit_inputs(schedule, t):
    return 1 / jnp.hypot(*schedule(t)), t


X0, EPS, V, VELOCITY = map(normalized, (dj.X0, dj.EPS, dj.V, dj.VELOCITY))


def uniform_t(key, n, path):
    return times.stratified_times(key, n, path.low, path.high)


def log_snr_t(key, n, path):
    return times.log_snr_times(key, n, *path)


def log_normal_t(key, n, path):
    ts, weights = times.log_normal_times(key, n, path.schedule, *toy2d.LOG_NOISE)
    return ts.clip(path.low, path.high), weights


class Objective(NamedTuple):
    """A loss of one example, `(key, model, path, x0, x1, t, weight) -> loss`, over times that are drawn somehow."""

    loss: Callable
    parametrization: Any
    times: Callable = uniform_t
    of_network: bool = False
    """whether the model is the network; its denoiser unless so"""
    any_path: bool = True
    pairs: bool = False
    """whether x1 is given"""
    simulates: bool = False
    """whether a step of training solves the flow"""


def denoising(parametrization, weighting, draw=uniform_t):
    def loss(key, network, path, x0, x1, t, weight):
        return weight * losses.denoising(key, network, path.schedule, parametrization, x0, t, weighting)

    return Objective(loss, parametrization, draw, of_network=True)


def score_matching(of_point, probes):
    """Losses that need the samples x_t alone, weighted by sigma^2."""

    def loss(key, denoise, path, x0, x1, t, weight):
        noise_key, probe_key = jax.random.split(key)
        x = dj.perturb(path.schedule, x0, jax.random.normal(noise_key, x0.shape), t)
        of_score = of_point(dj.bind(dj.score, denoise, path.schedule), x, t, probes(probe_key, x))
        return weight * path.schedule(t)[1] ** 2 * of_score

    return Objective(loss, EPS)


def pair(key, denoise, path, x0, x1, t, weight):
    return weight * losses.conditional_flow_matching(dj.bind(dj.velocity, denoise, path.schedule), x0, x1, t)


def maximum_likelihood(kinetic_weight, jacobian_weight):
    def loss(key, denoise, path, x0, x1, t, weight):
        x, log_volume = at_low(path, x0)
        flow = losses.maximum_likelihood(
            key,
            dj.bind(dj.velocity, denoise, path.schedule),
            x,
            kinetic_weight=kinetic_weight,
            jacobian_weight=jacobian_weight,
            log_prior=lambda x: log_prior(path.schedule, x, path.high),
            start=path.low,
            end=path.high,
            solver=diffrax.Bosh3(),
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2),
            max_steps=256,
        )
        return flow.loss - log_volume

    return Objective(loss, VELOCITY, any_path=False, simulates=True)


def bound(key, denoise, path, x0, x1, t, weight):
    """The variational bound, a dimension; its schedule is learned along."""
    return variational_bound(key, denoise, path, x0, t, weight) / x0.size


def variational_bound(key, denoise, path, x0, t, weight):
    schedule, low, high = path
    return losses.variational_bound(key, denoise, schedule, x0, t, start=low, end=high, weight=weight)


def batch_loss(objective: Objective, apply, params, path, key, x0s, labels):
    """The mean of an objective over a batch."""
    time_key, pair_key, noise_key = jax.random.split(key, 3)
    ts, weights = objective.times(time_key, len(x0s), path)
    keys = jax.random.split(noise_key, len(x0s))
    x1s = couplings.optimal(None, x0s, jax.random.normal(pair_key, x0s.shape)) if objective.pairs else None

    def one(key, x0, x1, t, weight, label):
        network = dj.bind(apply, params, cond=label)
        model = network if objective.of_network else dj.as_denoiser(network, path.schedule, objective.parametrization)
        return objective.loss(key, model, path, x0, x1, t, weight)

    return jnp.mean(jax.vmap(one)(keys, x0s, x1s, ts, weights, labels))


OBJECTIVES = {
    "noise (DDPM)": denoising(EPS, weightings.snr),
    "noise, min-SNR": denoising(EPS, weightings.min_snr(5.0)),
    "noise, P2": denoising(EPS, weightings.p2()),
    "noise, g^2, uniform t": denoising(EPS, weightings.likelihood),
    "noise, g^2, importance t": denoising(EPS, weightings.likelihood, log_snr_t),
    "data": denoising(X0, weightings.unweighted),
    "v": denoising(V, weightings.unweighted),
    "velocity (flow matching)": denoising(VELOCITY, weightings.unweighted),
    "EDM": denoising(dj.edm_preconditioning(0.7), weightings.edm_weighting(0.7), log_normal_t),
    "score, implicit": score_matching(losses.implicit_score_matching, divergence.exact_probes),
    "score, sliced": score_matching(losses.implicit_score_matching, divergence.rademacher_probes),
    "score, sliced, no variance reduction": score_matching(losses.sliced_score_matching, divergence.gaussian_probes),
    "flow matching, optimal pairs": Objective(pair, VELOCITY, any_path=False, pairs=True),
    "maximum likelihood": maximum_likelihood(0.0, 0.0),
    "maximum likelihood, regularized": maximum_likelihood(0.05, 0.05),
    "variational bound, learned schedule": Objective(bound, EPS, log_snr_t),
}
LEARNED_SCHEDULE = "variational bound, learned schedule"
# The costs of these grow with the dimension; and optimal pairs of labelled data would bend each class's prior.
PLANE_ALONE = ("score, implicit", "score, sliced", "maximum likelihood", "flow matching, optimal pairs")


def kind_of(name: str, settings: Settings) -> Kind:
    if name == "digits":
        data = digits.load(0)
        network = functools.partial(MLP, 64, width=256, depth=4, num_classes=10)
        labels = data.train_labels.astype(np.int32), data.held_out_labels.astype(np.int32)
        return Kind(data.train, labels[0], data.held_out, labels[1], network, settings.digits_steps, data.levels)
    points = [toy2d.points(name, n, i).astype(np.float32) for i, n in enumerate((20_000, 2000))]
    network = functools.partial(MLP, 2, width=64, depth=3)
    return Kind(points[0], None, points[1], None, network, settings.steps)


def train(objective: Objective, path: Path | None, kind: Kind, settings: Settings, seed: int):
    """The network's function, its averaged parameters, the path that it ended with, and the seconds."""
    apply, network = training.functional(kind.network(rngs=nnx.Rngs(seed)))
    params = {"network": network}
    learned = path is None
    if learned:  # ends of half the log-SNR, beside the numbers between them
        ends = (-jnp.log(jnp.asarray(level)) for level in (LEAST, MOST))
        params["schedule"] = schedules.init_monotone(jax.random.key(seed)), *ends

    def loss(params, key, batch):
        x0s, labels = batch if kind.labels is not None else (batch, None)
        if kind.levels is not None:
            key, pixel_key = jax.random.split(key)
            x0s = likelihood.dequantize(pixel_key, x0s, kind.levels).reshape(len(x0s), -1)
        used = learned_path(params["schedule"]) if learned else path
        return batch_loss(objective, apply, params["network"], used, key, x0s, labels)

    steps, batch = (
        (settings.simulated_steps, settings.simulated_batch) if objective.simulates else (kind.steps, settings.batch)
    )
    rate = optax.cosine_decay_schedule(settings.learning_rate, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    step = jax.jit(training.make_train_step(loss, optimizer, ema=training.power_ema()), donate_argnums=0)
    data = kind.train if kind.labels is None else (kind.train.astype(np.int32), kind.labels)
    batches = training.in_memory(data, batch, seed=seed)
    state = training.init_state(jax.random.key(seed), params, optimizer)
    state = training.fit(state, step, batches, 2, progress=False)  # compiles
    begin = time.perf_counter()
    state = jax.block_until_ready(training.fit(state, step, batches, steps, progress=False))
    seconds = (time.perf_counter() - begin) * steps / (steps - 2)
    ema = jax.device_get(state.ema)
    return apply, ema["network"], learned_path(ema["schedule"]) if learned else path, seconds


# ---- scores ----------------------------------------------------------------------------------------------------------


def denoiser(apply, params, path, parametrization, label):
    return dj.as_denoiser(dj.bind(apply, params, cond=label), path.schedule, parametrization)


@functools.partial(jax.jit, static_argnames="apply")
def generate(apply, params, path, parametrization, x1, labels, ts):
    denoise = denoiser(apply, params, path, parametrization, labels)
    x1 = schedules.coefficients(path.schedule, path.high).sigma * x1
    x = dj.sample(jax.random.key(0), dj.heun(denoise, path.schedule), x1, ts)
    return x / schedules.coefficients(path.schedule, path.low).alpha


@functools.partial(jax.jit, static_argnames=("apply", "probes", "levels"))
def log_densities(apply, params, path, parametrization, xs, labels, seed, probes, levels, tolerance=1e-3):
    def one(key, x, label):
        pixel_key, probe_key = jax.random.split(key)
        if levels is not None:
            x = likelihood.dequantize(pixel_key, x, levels).ravel()
        return log_density(probe_key, denoiser(apply, params, path, parametrization, label), path, x, probes, tolerance)

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), len(xs)), xs, labels)


def log_density(key, denoise, path, x0, probes, tolerance=1e-3):
    """Of one data point, by the flow between the path's two ends."""
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    options = {"start": path.low, "end": path.high, "stepsize_controller": controller}
    return dj.log_likelihood(key, denoise, path.schedule, x0, probes=probes, **options)


def or_nan(log_densities, n: int):
    """The log densities; NaN for all if the solver gives up on one: the network then is far from smooth."""
    try:
        return np.asarray(log_densities(), np.float64)
    except RuntimeError as error:
        if "solver steps" not in str(error):
            raise
        return np.full(n, np.nan)


def or_none(value) -> float | None:
    return float(value) if np.isfinite(value) else None


@functools.partial(jax.jit, static_argnames=("apply", "levels", "times_each"))
def bounds(apply, params, path, parametrization, xs, labels, seed, levels, times_each=64):
    """The variational bound of every example, from times that are stratified in the log-SNR."""

    def one(key, x, label):
        pixel_key, time_key, noise_key = jax.random.split(key, 3)
        if levels is not None:
            x = likelihood.dequantize(pixel_key, x, levels).ravel()
        ts, weights = log_snr_t(time_key, times_each, path)
        denoise = denoiser(apply, params, path, parametrization, label)

        def at(key, t, weight):
            return variational_bound(key, denoise, path, x, t, weight)

        return jnp.mean(jax.vmap(at)(jax.random.split(noise_key, times_each), ts, weights))

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), len(xs)), xs, labels)


GRIDS = ("uniform t", "quadratic t", "uniform log-SNR")


def grid(name, path, steps):
    if name == "uniform log-SNR":
        return dj.uniform_log_snr(path.schedule, steps, path.high, path.low)
    return {"uniform t": dj.uniform, "quadratic t": dj.quadratic}[name](steps, path.high, path.low)


def score(kind: Kind, distances, apply, params, path, objective: Objective, settings: Settings):
    """Likelihood; the distances at the limit; how many evaluations the first distance needs to stay within 1% of that."""
    model = apply, params, path, objective.parametrization
    if kind.levels is None:
        held_out, labels, dims = kind.held_out[: settings.held_out], None, 2
        scored = held_out, labels, 1, divergence.exact_probes, None
        tolerance = (
            1e-5 if objective.simulates else 1e-3
        )  # a flow that was trained through a solver fits its errors, too
        log_p = or_nan(lambda: log_densities(*model, *scored, tolerance), len(held_out))
        nll, bound = (np.asarray(a, np.float64) for a in (-log_p, bounds(*model, held_out, labels, 1, None)))
    else:
        n, dims = settings.digits_held_out, kind.held_out[0].size
        held_out, labels = kind.held_out[:n], kind.held_out_labels[:n]
        log_p = or_nan(lambda: log_densities(*model, held_out, labels, 1, divergence.rademacher_probes, kind.levels), n)
        both = log_p, -bounds(*model, held_out, labels, 1, kind.levels)
        nll, bound = (np.asarray(likelihood.bits_per_dim(a, dims, kind.levels), np.float64) for a in both)
    labels = None if kind.labels is None else jnp.arange(settings.samples) % 10
    x1 = jax.random.normal(jax.random.key(2), (settings.samples, dims))

    def sampled(ts):
        return np.asarray(generate(*model, x1, labels, ts))

    final = sampled(grid("uniform log-SNR", path, 100))
    limits = {name: distance(final) for name, distance in distances.items()}
    first = next(iter(distances))
    curves = {name: {n: distances[first](sampled(grid(name, path, n // 2))) for n in settings.nfe} for name in GRIDS}
    needed = {name: settles(curve, limits[first]) for name, curve in curves.items()}
    return {
        "nll": or_none(nll.mean()),
        "nll_standard_error": or_none(nll.std(ddof=1) / np.sqrt(len(nll))),
        "bound": None if objective.simulates or objective.pairs else float(bound.mean()),
        "distances": limits,
        "nfe_to_1%": min((n for n in needed.values() if n is not None), default=None),
        "curves": curves,
    }


def settles(curve: dict[int, float], limit: float, tolerance: float = 0.01) -> int | None:
    """The first evaluations from which on the values stay within a share of the limit; None if the last one does not."""
    needed = None
    for n, value in sorted(curve.items(), reverse=True):
        if abs(value - limit) > tolerance * limit:
            break
        needed = n
    return needed


def distances_of(name: str, kind: Kind, settings: Settings):
    """The sample distances of one kind of data by name, the first of them cheap, and what they are between data."""
    if kind.levels is None:
        data = kind.held_out[: settings.samples]

        def sliced(x):
            return float(sliced_wasserstein(jax.random.key(0), jnp.asarray(x), jnp.asarray(data), p=1))

        functions = {"sliced 1-Wasserstein": sliced, "2-Wasserstein": lambda x: wasserstein(x, data, 2)}
        others = kind.held_out[settings.samples :][: len(data)]
        return functions, {name: distance(others) for name, distance in functions.items()}
    data = digits.load(0)
    held_out, own = images.pixels(data.held_out, data), images.pixels(data.train, data)
    classifier = MLPClassifier((64, 32), max_iter=400, random_state=0).fit(own, data.train_labels)

    def features(x):
        for weights, bias in list(zip(classifier.coefs_, classifier.intercepts_, strict=True))[:-1]:
            x = np.maximum(x @ weights + bias, 0)
        return x

    def as_pixels(x):
        return images.pixels(images.to_images(x, data), data)

    functions = {
        "Fréchet (pixels)": lambda x: frechet_distance(as_pixels(x), held_out),
        "Fréchet (classifier)": lambda x: frechet_distance(features(as_pixels(x)), features(held_out)),
    }
    between = {
        "Fréchet (pixels)": frechet_distance(own[: settings.samples], held_out),
        "Fréchet (classifier)": frechet_distance(features(own[: settings.samples]), features(held_out)),
        "classifier's accuracy": float(classifier.score(held_out, data.held_out_labels)),
    }
    if settings.efficientnet is not None:  # 360 images are too few for a Fréchet distance of 1280 features
        network = efficientnet_lite0(settings.efficientnet)

        def seen(values):
            return jnp.asarray(image_quality.features(network, values, data.levels, chunk=100))

        reference = seen(data.held_out)

        def kid(x):
            return float(kernel_distance(jax.random.key(0), x, reference, size=len(reference)).value)

        functions["KID (EfficientNet)"] = lambda x: kid(seen(images.to_images(x, data)))
        between["KID (EfficientNet)"] = kid(seen(data.train[: settings.samples]))
    return functions, between


def variance_of_times(apply, params, path, parametrization, kind: Kind, settings: Settings, batches: int = 400):
    """Mean and variance of a batch's likelihood-weighted loss, by how its times are drawn."""
    draws = {
        "independent": lambda key, n, path: times.uniform_times(key, n, path.low, path.high),
        "antithetic": lambda key, n, path: times.antithetic_times(key, n, path.low, path.high),
        "stratified": uniform_t,
        "importance": log_snr_t,
    }
    x0s = jnp.asarray(kind.train[: settings.batch])
    out = {}
    for name, draw in draws.items():
        objective = denoising(parametrization, weightings.likelihood, draw)

        @jax.jit
        def of_batches(keys, x0s, params, objective=objective):
            def of_batch(key):
                return batch_loss(objective, apply, params, path, key, x0s, None)

            return jax.lax.map(of_batch, keys)

        values = np.asarray(of_batches(jax.random.split(jax.random.key(7), batches), x0s, params), np.float64)
        out[name] = {"mean": values.mean(), "variance": values.var(ddof=1)}
    return out


# ---- dequantization --------------------------------------------------------------------------------------------------


def dequantization(kind: Kind, apply, params, path, parametrization, settings: Settings, n: int = 16, k: int = 8):
    """Bits/dim of n held-out images under one model, exact trace, by the way that they are dequantized.

    The variational q is a network that sees the image; it is fitted to the variational bound, which is cheap to
    differentiate, on the training images.
    """
    dims, levels = kind.held_out[0].size, kind.levels
    new, q0 = training.functional(MLP(dims, width=128, depth=2, rngs=nnx.Rngs(1)))
    q0 = {"mean": q0, "log_scale": jax.tree.map(jnp.copy, q0)}

    def draw(q, key, image):
        centred = (2.0 * image.ravel() + 1) / levels - 1
        mean, log_scale = (new(q[name], centred, 0.0) for name in ("mean", "log_scale"))
        return likelihood.variational_dequantize(key, image.ravel(), levels, mean, jnp.exp(0.5 + log_scale))

    def loss(q, key, batch):
        images, labels = batch
        time_key, key = jax.random.split(key)
        ts, weights = log_snr_t(time_key, len(images), path)

        def one(key, image, label, t, weight):
            pixel_key, noise_key = jax.random.split(key)
            x, log_q = draw(q, pixel_key, image)
            denoise = denoiser(apply, params, path, parametrization, label)
            bound = variational_bound(noise_key, denoise, path, x, t, weight)
            return (bound + log_q) / dims

        return jnp.mean(jax.vmap(one)(jax.random.split(key, len(images)), images, labels, ts, weights))

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, 1000))
    step = jax.jit(training.make_train_step(loss, optimizer, ema=training.power_ema()), donate_argnums=0)
    batches = training.in_memory((kind.train.astype(np.int32), kind.labels), settings.batch, seed=0)
    state = training.init_state(jax.random.key(5), q0, optimizer)
    q = training.fit(state, step, batches, 1000, progress=False).ema

    @functools.partial(jax.jit, static_argnames="variational")
    def log_weights(q, key, images, labels, variational):
        def one(key, image, label):
            if variational:
                x, log_q = draw(q, key, image)
            else:
                x, log_q = likelihood.dequantize(key, image, levels).ravel(), 0.0
            denoise = denoiser(apply, params, path, parametrization, label)
            return log_density(None, denoise, path, x, divergence.exact_probes) - log_q

        return jax.vmap(one)(jax.random.split(key, n), images, labels)

    each = {}
    for name, variational in (("uniform", False), ("variational", True)):
        arrays = kind.held_out[:n], kind.held_out_labels[:n]
        weights = jnp.stack([log_weights(q, jax.random.key(10 + i), *arrays, variational) for i in range(k)])
        each[name] = likelihood.bits_per_dim(jnp.mean(weights, 0), dims, levels)
        weighted = likelihood.importance_weighted_bound(weights)
        each[f"{name}, {k} importance-weighted"] = likelihood.bits_per_dim(weighted, dims, levels)
    less = {name: np.asarray(bits - each["uniform"], np.float64) for name, bits in each.items()}
    return {
        name: {
            "bits_per_dim": float(bits.mean()),
            "less_than_uniform": float(-less[name].mean()),
            "standard_error_of_that": float(less[name].std(ddof=1) / np.sqrt(n)),
        }
        for name, bits in each.items()
    }


# ---- the experiment --------------------------------------------------------------------------------------------------


def rows_of(name: str, settings: Settings):
    """(objective, path, seed) of every row, the first seed of all before the others."""
    for seed in settings.seeds:
        for objective_name, objective in OBJECTIVES.items():
            if settings.objectives and objective_name not in settings.objectives:
                continue
            if name == "digits" and objective_name.startswith(PLANE_ALONE):
                continue
            if objective.simulates and seed != settings.seeds[0]:
                continue
            if objective_name == LEARNED_SCHEDULE:
                yield objective_name, "learned VP", seed
            else:
                for path in settings.paths if objective.any_path else ("linear",):
                    yield objective_name, path, seed


def by_model(rows) -> dict[tuple[str, str], list[dict]]:
    """The rows of every objective and path, over the seeds."""
    out: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        out.setdefault((row["objective"], row["path"]), []).append(row)
    return out


def spread(values, digits: int = 3) -> str:
    """The mean, and the standard deviation if there are several."""
    if any(value is None for value in values):
        return "solver gave up" if all(value is None for value in values) else "solver gave up on some"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def table(rows) -> str:
    names = list(rows[0]["distances"])
    head = ["objective", "path", "seeds", "held-out NLL", "bound of the SDE", *names, "NFE to 1%", "training, s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (objective, path), several in by_model(rows).items():
        needed = sorted(row["nfe_to_1%"] or np.inf for row in several)
        needed = ["more than 64" if np.isinf(n) else f"{n:.0f}" for n in needed]
        cells = [objective, path, str(len(several)), spread([row["nll"] for row in several])]
        cells.append("" if several[0]["bound"] is None else spread([row["bound"] for row in several]))
        cells += [spread([row["distances"][name] for row in several]) for name in names]
        cells += [", ".join(needed), f"{np.median([row['seconds'] for row in several]):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(report, settings: Settings, path: pathlib.Path) -> None:
    """Likelihood against the first distance, means over seeds, a panel a data set: colours are objectives, markers paths."""
    fig, axes = plt.subplots(
        1, len(report), figsize=(4.6 * len(report) + 2.6, 4.4), layout="constrained", squeeze=False
    )
    colours = {name: plt.get_cmap("tab20")(i) for i, name in enumerate(OBJECTIVES)}
    markers = dict(zip((*PATHS, "learned VP"), "os^vD", strict=True))
    for ax, (name, result) in zip(axes[0], report.items(), strict=True):
        first = next(iter(result["rows"][0]["distances"]))
        models = by_model(result["rows"])
        nlls = [np.mean([np.inf if row["nll"] is None else row["nll"] for row in rows]) for rows in models.values()]
        distances = [np.mean([row["distances"][first] for row in rows]) for rows in models.values()]
        # Worse models are drawn at the edge.
        most = np.median(nlls) + 0.25, 2 * np.median(distances)
        for (objective, path_name), *point in zip(models, nlls, distances, strict=True):
            style = {"color": colours[objective], "marker": markers[path_name], "clip_on": False, "zorder": 3}
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
    shown = {row["objective"] for result in report.values() for row in result["rows"]}
    handles = [
        plt.Line2D([], [], ls="", marker="o", color=c, mec="k", mew=0.3, label=n)
        for n, c in colours.items()
        if n in shown
    ]
    handles += [plt.Line2D([], [], ls="", marker=m, color="w", mec="k", label=n) for n, m in markers.items()]
    handles.append(plt.Line2D([], [], ls=":", color="k", lw=1, label="between data"))
    fig.legend(handles=handles, loc="outside right center", fontsize=7.5)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def begin_or_continue(settings: Settings) -> dict:
    """The report so far, by data set; empty unless the folder holds one of the same settings."""
    free = {"out", "data", "paths", "objectives", "seeds", "efficientnet"}
    own = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    own = json.loads(json.dumps(own | {"efficientnet": settings.efficientnet is not None}))
    path = settings.out / "metrics.json"
    if not path.exists():
        return {"settings": own}
    report = json.loads(path.read_text())
    differ = [name for name, value in own.items() if report["settings"].get(name) != value]
    if differ:
        raise ValueError(f"{path}: it was begun with another value of {', '.join(differ)}; choose another --out")
    return report


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    report = begin_or_continue(settings)
    for name in settings.data:
        kind = kind_of(name, settings)
        distances, between_data = distances_of(name, kind, settings)
        result = report.setdefault(name, {"rows": []})
        result["between_data"] = between_data
        done = {(row["objective"], row["path"], row["seed"]) for row in result["rows"]}
        for objective_name, path, seed in rows_of(name, settings):
            if (objective_name, path, seed) in done:
                continue
            objective = OBJECTIVES[objective_name]
            apply, params, used, seconds = train(objective, PATHS.get(path), kind, settings, seed)
            scores = score(kind, distances, apply, params, used, objective, settings)
            row = {"objective": objective_name, "path": path, "seed": seed, "seconds": seconds} | scores
            print(name, table([row]).splitlines()[-1], flush=True)
            first = seed == settings.seeds[0]
            if first and objective_name == "noise (DDPM)" and name != "digits":
                variances = variance_of_times(apply, params, used, objective.parametrization, kind, settings)
                result.setdefault("variance_of_times", {})[path] = variances
                base = variances["independent"]["variance"]
                ratios = {draw: round(float(v["variance"] / base), 3) for draw, v in variances.items()}
                print(f"  variance of the likelihood-weighted loss by the draw of the times: {ratios}", flush=True)
            if first and (objective_name, path) == ("velocity (flow matching)", "linear") and name == "digits":
                model = apply, params, used, objective.parametrization
                result["dequantization"] = dequantization(kind, *model, settings)
                print(f"  bits/dim by dequantization: {result['dequantization']}", flush=True)
            result["rows"].append(row)
            write_results(settings.out / "metrics.json", report)
            jax.clear_caches()  # the programs of one model after the other would fill the memory
    results = {name: report[name] for name in settings.data}
    text = []
    for name, result in results.items():
        scored = f"{settings.samples} samples; {settings.held_out} held-out points for the likelihood."
        if name == "digits":
            scored = f"{settings.samples} samples; {settings.digits_held_out} held-out images for the likelihood. "
            scored += "Features: 64 pixels, 32 of the classifier, 1280 of EfficientNet-Lite0."
        text += [f"## {name}\n", table(result["rows"]), f"\n{scored} Between data: {result['between_data']}\n"]
    (settings.out / "report.md").write_text("\n".join(text) + "\n")
    figure(results, settings, settings.out / "objectives.png")
    print("\n".join(text))
    return report


if __name__ == "__main__":
    main(tyro.cli(Settings))
