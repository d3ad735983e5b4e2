"""Which law does a guided sampler draw from? On Gaussian data, exactly.

Every step of a guided sampler on Gaussian data is affine, so its law stays Gaussian, and mean and
covariance follow without a random number. RePaint draws noise within its step, and is sampled.

    python -m experiments.guidance_laws
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import diffjax as dj
from diffjax import guidance, samplers
from diffjax.exact import conditioned_gaussian, gaussian
from experiments.results import Score, table, write_record, write_report


@dataclasses.dataclass(frozen=True)
class Settings:
    out: pathlib.Path = pathlib.Path("runs/guidance_laws")
    """folder of the record and the report"""
    steps: int = 2000
    """of a uniform grid, for the laws that are computed"""
    noise: float = 0.5
    """the standard deviation of the observation"""
    samples: int = 20_000
    """of RePaint"""
    seed: int = 0


SCHEDULE = dj.gvp()  # alpha(1) = 0: the prior is N(0, I)
COV = np.array([[1.0, 0.8], [0.8, 1.0]])
KERNELS = {
    "flow": lambda denoise: samplers.ddim_kernel(denoise, SCHEDULE, 0.0),
    "SDE": lambda denoise: samplers.ddpm_kernel(denoise, SCHEDULE),
}
SCORES = {
    "mean": Score("The mean of the samples: of the only number, or of the two numbers of x."),
    "variance": Score("The variances of the same numbers."),
    "steps": Score("Steps of the grid; the computed laws are those of that grid, not a limit."),
}


def law(kernel: Callable, ts, mean, cov) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance at the end of the chain of an affine kernel, from N(mean, cov).

    A step is x -> A x + b + std z, so the law stays Gaussian.
    """

    @jax.jit
    def run(ts, mean, cov):
        def step(law, times):
            mean, cov = law
            slope = jax.jacfwd(lambda x: kernel(x, *times)[0])(mean)
            moved, std = kernel(mean, *times)
            return (moved, slope @ cov @ slope.T + std**2 * jnp.eye(len(mean))), None

        return jax.lax.scan(step, (mean, cov), (ts[:-1], ts[1:]))[0]

    mean, cov = run(*map(jnp.asarray, (ts, mean, cov)))
    return np.asarray(mean), np.asarray(cov)


def numbers(kernel: Callable, ts, dimension: int) -> list[tuple[float, float]]:
    """Mean and variance of each number of the samples, from N(0, I)."""
    mean, cov = law(kernel, ts, np.zeros(dimension), np.eye(dimension))
    return list(zip(mean, np.diagonal(cov), strict=True))


def classifier_free(settings: Settings) -> dict:
    """Unconditional N(0, 1), conditional N(1, 1/4), scale 3; they are guided towards 1.2."""
    c, u = (
        gaussian(jnp.array([m]), jnp.array([[v]]), SCHEDULE) for m, v in ((1.0, 0.25), (0.0, 1.0))
    )
    precision = 3 / 0.25 - 2
    rows: dict = {
        "the density p(x given c)^3 / p(x)^2, normalized": [((3 / 0.25) / precision, 1 / precision)]
    }
    ts = dj.uniform(settings.steps)
    for kind, kernel in KERNELS.items():
        rows[f"`cfg`, {kind}"] = numbers(kernel(guidance.cfg(c, u, 3.0)), ts, 1)
    return rows


def observed(settings: Settings) -> dict:
    """The prior N(0, COV), the first number observed as 1."""
    prior = gaussian(jnp.zeros(2), jnp.asarray(COV), SCHEDULE)
    first = np.array([[1.0, 0.0]]), np.ones(1)
    mean, cov = conditioned_gaussian(np.zeros(2), COV, *first, settings.noise**2 * np.eye(1))
    rows = {"the posterior": list(zip(mean, np.diagonal(cov), strict=True))}
    ts = dj.uniform(settings.steps, start=0.9999)
    for method in (guidance.mmps, guidance.pigdm, guidance.diffpir, guidance.dps):
        guided = method(prior, SCHEDULE, lambda x: x[:1], jnp.ones(1), settings.noise)
        for kind, kernel in KERNELS.items():
            rows[f"`{method.__name__}`, {kind}"] = numbers(kernel(guided), ts, 2)
    return rows


def inpainted(settings: Settings) -> dict:
    """The same prior, the first number known to be 1."""
    prior = gaussian(jnp.zeros(2), jnp.asarray(COV), SCHEDULE)
    first = np.array([[1.0, 0.0]]), np.ones(1)
    mean, cov = conditioned_gaussian(np.zeros(2), COV, *first, np.zeros((1, 1)))
    rows = {"the posterior": [(float(mean[1]), float(cov[1, 1]))]}
    known, mask = jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])
    start_key, key = jax.random.split(jax.random.key(settings.seed))
    x1 = jax.random.normal(start_key, (settings.samples, 2))
    for method, n, resamples in (
        (samplers.ddim, 1000, 1),
        (samplers.ddpm, 1000, 1),
        (samplers.ddpm, 1000, 10),
        (samplers.ddpm, 50, 100),
    ):
        sampler = samplers.repaint(method(prior, SCHEDULE), SCHEDULE, known, mask, resamples)
        x0 = np.asarray(dj.sample(key, sampler, x1, dj.uniform(n)))[:, 1]
        label = f"`repaint({method.__name__}, resamples={resamples})`, {n} steps"
        rows[label] = [(x0.mean(), x0.var())]
    return rows


def shown(rows: dict) -> str:
    def joined(numbers):
        return ", ".join(f"{x:.4f}" for x in numbers)

    return table(
        ("law", "mean", "variance"),
        ((label, *map(joined, zip(*row, strict=True))) for label, row in rows.items()),
    )


def main(settings: Settings) -> dict:
    begin = time.perf_counter()
    with jax.enable_x64():
        studies = {
            "Classifier-free guidance": classifier_free(settings),
            "An observation with noise": observed(settings),
            "Inpainting": inpainted(settings),
        }
    scores = {
        heading: {
            label: [{"mean": float(mean), "variance": float(var)} for mean, var in row]
            for label, row in rows.items()
        }
        for heading, rows in studies.items()
    }
    seconds = time.perf_counter() - begin
    record = write_record(settings.out / "result.json", settings, scores, seconds)
    tables = {heading: shown(rows) for heading, rows in studies.items()}
    write_report(settings.out, "Laws of guided samplers", record, SCORES, tables, {})
    return scores


if __name__ == "__main__":
    main(tyro.cli(Settings))
