"""The scores of a model: likelihood, bound, distances of samples, network evaluations."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax import divergence, likelihood
from experiments.objectives import Data, Path, Settings
from experiments.objectives.distances import Distances
from experiments.objectives.objectives import Objective, log_snr_t, variational_bound
from experiments.train_images import Model

GRIDS = ("uniform t", "quadratic t", "uniform log-SNR")


@jax.jit
def generate(
    model: Model, path: Path, x1: jax.Array, labels: jax.Array | None, ts: jax.Array
) -> jax.Array:
    (_, sigma), (alpha, _) = path.schedule(path.high), path.schedule(path.low)
    sampler = dj.heun(model.denoiser(labels), model.schedule)
    return dj.sample(jax.random.key(0), sampler, sigma * x1, ts) / alpha


@functools.partial(jax.jit, static_argnames=("probes", "levels"))
def log_densities(
    model: Model, path: Path, xs, labels, seed, probes, levels, tolerance=1e-3
) -> jax.Array:
    def one(key, x, label):
        pixel_key, probe_key = jax.random.split(key)
        if levels is not None:
            x = likelihood.dequantize(pixel_key, x, levels)
        return log_density(probe_key, model.denoiser(label), path, x, probes, tolerance)

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), len(xs)), xs, labels)


def log_density(key, denoise, path, x0, probes, tolerance=1e-3):
    """The log density of one data point, by the flow between the path's two ends."""
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    options = {"start": path.low, "end": path.high, "stepsize_controller": controller}
    return dj.log_likelihood(key, denoise, path.schedule, x0, probes=probes, **options)


def or_nan(log_densities, n: int):
    """The log densities; all are NaN if the solver gives up on one (a network far from smooth)."""
    try:
        return np.asarray(log_densities(), np.float64)
    except RuntimeError as error:
        if "solver steps" not in str(error):
            raise
        return np.full(n, np.nan)


def or_none(value) -> float | None:
    return float(value) if np.isfinite(value) else None


@functools.partial(jax.jit, static_argnames=("levels", "times_each"))
def bounds(model: Model, path: Path, xs, labels, seed, levels, times_each=64) -> jax.Array:
    """The variational bound of every example, with times that are stratified in the log-SNR."""

    def one(key, x, label):
        pixel_key, time_key, noise_key = jax.random.split(key, 3)
        if levels is not None:
            x = likelihood.dequantize(pixel_key, x, levels)
        ts, weights = log_snr_t(time_key, times_each, path)

        def at(key, t, weight):
            return variational_bound(key, model.denoiser(label), path, x, t, weight)

        return jnp.mean(jax.vmap(at)(jax.random.split(noise_key, times_each), ts, weights))

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), len(xs)), xs, labels)


def grid(name, path, steps):
    if name == "uniform log-SNR":
        return dj.uniform_log_snr(path.schedule, steps, path.high, path.low)
    return {"uniform t": dj.uniform, "quadratic t": dj.quadratic}[name](steps, path.high, path.low)


def likelihoods(model: Model, path: Path, data: Data, objective: Objective, settings: Settings):
    """Negative log-likelihoods and bounds of held-out data, in nats (bits/dim for integers)."""
    n = settings.held_out if data.levels is None else settings.digits_held_out
    held_out = data.held_out[:n]
    labels = None if data.held_out_labels is None else data.held_out_labels[:n]
    probes = divergence.exact_probes if data.levels is None else divergence.rademacher_probes
    # A flow that was trained through a solver fits the solver's errors, too.
    tolerance = 1e-5 if objective.simulates else 1e-3
    args = model, path, held_out, labels, 1, probes, data.levels, tolerance
    log_p = or_nan(lambda: log_densities(*args), n)
    both = -log_p, np.asarray(bounds(model, path, held_out, labels, 1, data.levels))
    if data.levels is None:
        return [x.astype(np.float64) for x in both]
    dims = held_out[0].size
    bits = (likelihood.bits_per_dim(jnp.asarray(-x), dims, data.levels) for x in both)
    return [np.asarray(x, np.float64) for x in bits]


def score(
    model: Model,
    path: Path,
    data: Data,
    distances: Distances,
    objective: Objective,
    settings: Settings,
) -> dict:
    """The scores of a model. Its distances use 200 evaluations, its curves each of `nfe`."""
    nll, bound = likelihoods(model, path, data, objective, settings)
    labels = None if data.labels is None else jnp.arange(settings.samples) % 10
    x1 = jax.random.normal(jax.random.key(2), (settings.samples, *data.train.shape[1:]))

    def sampled(ts):
        return np.asarray(generate(model, path, x1, labels, ts))

    final = sampled(grid("uniform log-SNR", path, 100))
    limits = {name: distance(final) for name, distance in distances.items()}
    first = next(iter(distances))
    curves = {
        name: {n: distances[first](sampled(grid(name, path, n // 2))) for n in settings.nfe}
        for name in GRIDS
    }
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
    """The evaluations from which on values stay within a share of the limit, or None."""
    needed = None
    for n, value in sorted(curve.items(), reverse=True):
        if abs(value - limit) > tolerance * limit:
            break
        needed = n
    return needed
