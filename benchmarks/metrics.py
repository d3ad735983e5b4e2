"""The time of the metrics and the couplings, against the library that a user would take instead.

    # Python Optimal Transport; the other libraries come with the extra `dev`
    pip install POT
    python -m benchmarks.metrics [--repeats 5] [--only optimal]

Every row has the median seconds of one call. The calls are timed in turns, in one process, on the
same float32 numbers:

    jit         ours, compiled by `jax.jit` (except for the metrics on the host)
    plain       ours, called directly
    theirs      the other library

Both of ours should take at most the time of the other library. The results are compared before
they are timed.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import ot  # pyright: ignore[reportMissingImports]
import scipy.linalg
import scipy.stats
import tyro
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import polynomial_kernel as sklearn_polynomial
from sklearn.metrics.pairwise import rbf_kernel

from benchmarks.overhead import seconds, write_rows
from diffjax import couplings, metrics


@dataclasses.dataclass(frozen=True)
class Settings:
    repeats: int = 5
    """timed calls for each row"""
    only: str = ""
    """measure only the rows whose names contain this, and write no record"""
    output: pathlib.Path = pathlib.Path("benchmarks/results/metrics.json")
    """file of the record"""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    ours: Callable
    library: str
    theirs: Callable
    args: tuple
    key: bool = False
    """whether our function takes a key as its first argument"""
    host: bool = False
    """whether our function runs on the host"""
    rtol: float | None = 1e-3
    """tolerance between the results; None if they are random"""


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cases() -> Iterator[Case]:
    x, y = normal(0, 2000, 64), normal(1, 2000, 64) + 0.1
    images = normal(0, 256, 32, 32, 3), normal(1, 256, 32, 32, 3)
    yield Case(
        "squared_distances, 256 x 3072",
        couplings.squared_distances,
        "scipy",
        scipy_squared_distances,
        images,
    )
    yield Case("optimal, 256 x 3072", couplings.optimal, "scipy", scipy_optimal, images, key=True)
    yield Case(
        "optimal, 1024 x 64",
        couplings.optimal,
        "scipy",
        scipy_optimal,
        (x[:1024], y[:1024]),
        key=True,
    )
    cost = cdist(x[:512], y[:512], "sqeuclidean").astype(np.float32)
    yield Case(
        "sinkhorn, 512 x 512, 100 iterations",
        our_plan,
        "POT, log domain",
        pot_plan,
        (cost,),
        rtol=1e-2,
    )
    yield Case(
        "entropic, 512 x 64",
        our_entropic,
        "POT, log domain",
        pot_entropic,
        (x[:512], y[:512]),
        True,
        rtol=None,
    )
    yield Case(
        "mmd, Gaussian kernel, 2000 x 64", our_mmd, "scikit-learn", sklearn_mmd, (x, y), rtol=1e-2
    )
    large = normal(0, 2000, 2048), normal(1, 2000, 2048) + 0.1
    one_block = functools.partial(metrics.kernel_distance, size=2000)
    yield Case(
        "kernel_distance, 2000 x 2048",
        one_block,
        "scikit-learn",
        sklearn_kernel_distance,
        large,
        True,
        rtol=0.05,
    )
    yield Case(
        "energy_distance, 2000 x 64",
        metrics.energy_distance,
        "scipy",
        scipy_energy_distance,
        (x, y),
        rtol=0.05,
    )
    yield Case(
        "wasserstein, 1000 x 64",
        metrics.wasserstein,
        "POT",
        pot_wasserstein,
        (x[:1000], y[:1000]),
        host=True,
    )
    sliced = functools.partial(metrics.sliced_wasserstein, projections=100)
    yield Case(
        "sliced_wasserstein, 2000 x 64, 100 lines",
        sliced,
        "POT",
        pot_sliced,
        (x, y),
        True,
        rtol=None,
    )
    many = normal(0, 10_000, 64), normal(1, 10_000, 64) + 0.1
    yield Case(
        "precision_recall, 10,000 x 64",
        metrics.precision_recall,
        "scikit-learn",
        sklearn_precision_recall,
        many,
    )
    wide = normal(0, 2000, 2048), normal(1, 2000, 2048) + 0.02
    yield Case(
        "precision_recall, 2000 x 2048",
        metrics.precision_recall,
        "scikit-learn",
        sklearn_precision_recall,
        wide,
    )
    yield Case(
        "density_coverage, 10,000 x 64",
        metrics.density_coverage,
        "scikit-learn",
        sklearn_density_coverage,
        many,
    )
    features = normal(0, 2000, 512), normal(1, 2000, 512) + 0.1
    yield Case(
        "frechet_distance, 2000 x 512",
        metrics.frechet_distance,
        "scipy",
        scipy_frechet_distance,
        features,
        host=True,
    )
    logits = (5 * normal(0, 10_000, 100),)
    yield Case(
        "inception_score, 10,000 x 100", our_inception_score, "scipy", scipy_inception_score, logits
    )


# ---- ours, where the other library's default differs ---------------------------------------------


def our_plan(cost):
    return jnp.exp(couplings.sinkhorn(cost, 5.0, 0.0, 100).log_plan)


def our_entropic(key, x, y):
    return couplings.entropic(20.0, 1e-3)(key, x, y)


def our_mmd(x, y):
    return metrics.mmd(_gaussian, x, y)


def _gaussian(x, y):
    return jnp.exp(-jnp.sum((x - y) ** 2) / 64)


def our_inception_score(logits):
    return metrics.inception_score(jax.nn.softmax(logits))


# ---- the other libraries -------------------------------------------------------------------------


def scipy_squared_distances(x, y):
    return cdist(x.reshape(len(x), -1), y.reshape(len(y), -1), "sqeuclidean")


def scipy_optimal(x, y):
    return y[linear_sum_assignment(scipy_squared_distances(x, y))[1]]


def pot_plan(cost):
    weights = np.full(len(cost), 1 / len(cost), cost.dtype)
    return ot.sinkhorn(
        weights, weights, cost, 5.0, "sinkhorn_log", numItermax=100, stopThr=0.0, warn=False
    )


def pot_entropic(x, y):
    """POT's error is the 2-norm of the columns' errors, ours the 1-norm: hence the tolerance."""
    cost, weights = ot.dist(x, y), np.full(len(x), 1 / len(x), x.dtype)
    plan = ot.sinkhorn(weights, weights, cost, 20.0, "sinkhorn_log", stopThr=1e-3 / len(x) ** 0.5)
    cumulative = np.cumsum(plan, 1)
    drawn = np.random.default_rng(0).uniform(size=(len(x), 1)) * cumulative[:, -1:]
    return y[np.minimum((cumulative < drawn).sum(1), len(x) - 1)]


def _unbiased(within_x, within_y, across):
    n, m = len(within_x), len(within_y)
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (within_x, within_y)]
    return means[0] + means[1] - 2 * across.sum() / (n * m)


def sklearn_mmd(x, y):
    return _unbiased(*(rbf_kernel(a, b, 1 / 64) for a, b in ((x, x), (y, y), (x, y))))


def sklearn_kernel_distance(x, y):
    return _unbiased(*(sklearn_polynomial(a, b) for a, b in ((x, x), (y, y), (x, y))))


def scipy_energy_distance(x, y):
    return -_unbiased(*(cdist(a, b) for a, b in ((x, x), (y, y), (x, y))))


def pot_wasserstein(x, y):
    return ot.emd2([], [], ot.dist(x, y)) ** 0.5


def pot_sliced(x, y):
    return ot.sliced_wasserstein_distance(x, y, n_projections=100, seed=0)


def _radii(x, k):
    return np.partition(pairwise_distances(x), k, axis=1)[:, k]


def sklearn_precision_recall(real, generated):
    across = pairwise_distances(real, generated)
    precision = (across <= _radii(real, 3)[:, None]).any(0).mean()
    return precision, (across <= _radii(generated, 3)[None]).any(1).mean()


def sklearn_density_coverage(real, generated):
    inside = pairwise_distances(real, generated) <= _radii(real, 5)[:, None]
    return inside.sum() / (5 * len(generated)), inside.any(1).mean()


def scipy_frechet_distance(x, y):
    """The usual FID: a matrix square root of the product of the covariances, in float64."""
    x, y = (a.astype(np.float64) for a in (x, y))
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(cov_x @ cov_y))
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root)


def scipy_inception_score(logits):
    p = scipy.special.softmax(logits, axis=1)
    return np.exp(scipy.stats.entropy(p, p.mean(0, keepdims=True), axis=1).mean())


# ---- measuring -----------------------------------------------------------------------------------


def measure(case: Case, repeats: int) -> dict:
    arrays = case.args if case.host else tuple(map(jnp.asarray, case.args))
    ours = (jax.random.key(0), *arrays) if case.key else arrays
    calls = {
        "plain": functools.partial(case.ours, *ours),
        "theirs": functools.partial(case.theirs, *case.args),
    }
    if not case.host:
        calls = {"jit": functools.partial(jax.jit(case.ours), *ours)} | calls
    # The first calls also compile.
    results = {name: jax.tree.leaves(call())[0] for name, call in calls.items()}
    expected, rtol = results["theirs"], case.rtol
    for name, result in results.items():
        if rtol is not None and not np.allclose(result, expected, rtol, rtol * 1e-3):
            raise RuntimeError(
                f"{case.name}: expected {expected} ({case.library}), got {result} ({name})"
            )
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[name] / medians["theirs"] for name in medians if name != "theirs"}
    return {"name": case.name, "library": case.library, "seconds": medians, "ratios": ratios}


def main(settings: Settings) -> None:
    load, start, rows = os.getloadavg()[0], time.perf_counter(), []
    print(f"{'':<42} {'library':<16} {'jit':>8} {'plain':>8} {'theirs':>8}   aim: 1")
    for case in cases():
        if settings.only in case.name:
            row = measure(case, settings.repeats)
            rows.append(row)
            medians = [row["seconds"].get(name, np.nan) for name in ("jit", "plain", "theirs")]
            times = " ".join(f"{median:8.4f}" for median in medians)
            ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
            missed = " MISSED" * (max(row["ratios"].values()) > 1)
            print(f"{case.name:<42} {case.library:<16} {times}   {ratios}{missed}", flush=True)
    if not settings.only:
        write_rows(settings, rows, load, start, ("numpy", "scipy", "scikit-learn", "POT"))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
