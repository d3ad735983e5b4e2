"""The work and the error of a log density on every path.

    python -m benchmarks.likelihood [--points 64 16] [--output benchmarks/results/likelihood.json]

The data are Gaussian mixtures in 2 and 64 dimensions with their exact denoiser. The points are
drawn from them. The solver is the default of `log_likelihood`, in float32, with rtol = atol. The
truth is the density of the *model*, the prior N(0, sigma(1)^2 I) pushed through the flow:

    log p(x) = log p_start(x) - log p_1(x1) + log N(x1; 0, sigma(1)^2 I)

with the mixture's marginals p_t and the end x1 of the flow in float64 at a tolerance of 1e-10.
Errors are in bits/dim. The columns are:

    evaluations    mean number of evaluations of the denoiser for one point, each with its product
                   for the divergence
    exact          root mean square error over the points, with the exact trace
    one probe      the same for Hutchinson's estimate with one probe of random signs
    of probes      standard error, from one probe per point, of the mean over the points
                   (`standard_errors`)
    deviation      mean of all Hutchinson estimates minus mean of the exact ones, in units of its
                   standard error: within about 3 where the integrator's error is small
"""

import dataclasses
import functools
import os
import pathlib
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import overhead
from diffjax import cosine, edm, gvp, linear, linear_vp, sub_vp, ve
from diffjax.divergence import divergence, exact_probes, rademacher_probes
from diffjax.dynamics import probability_flow
from diffjax.exact import gaussian_mixture
from diffjax.likelihood import bits_per_dim, log_likelihood, standard_errors
from diffjax.process import log_prior
from diffjax.solve import solve_flow

PATHS = {
    "linear_vp": linear_vp,
    "sub_vp": sub_vp,
    "ve": ve,
    "edm": edm,
    "linear": linear,
    "gvp": gvp,
    "cosine": cosine,
}
START = 1e-5


@dataclasses.dataclass(frozen=True)
class Settings:
    dims: tuple[int, ...] = (2, 64)
    """dimensions of the mixtures, of 8 components each"""
    points: tuple[int, ...] = (64, 16)
    """points in each dimension"""
    probes: int = 8
    """Hutchinson estimates for every point, with one probe each"""
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """rtol = atol of the controller"""
    paths: tuple[str, ...] = tuple(PATHS)
    """names of the schedules"""
    output: pathlib.Path = pathlib.Path("benchmarks/results/likelihood.json")
    """file of the record"""


# ---- the data ------------------------------------------------------------------------------------


def mixture(dim: int, components: int = 8):
    """Weights, means and covariances: deviations 0.05 to 0.3, total variance about 1."""
    rng = np.random.default_rng(dim)
    rotations = np.linalg.qr(rng.normal(size=(components, dim, dim)))[0]
    variances = rng.uniform(0.05, 0.3, (components, 1, dim)) ** 2
    covs = (rotations * variances) @ rotations.swapaxes(1, 2)
    return (
        rng.dirichlet(np.full(components, 5.0)),
        rng.normal(size=(components, dim)),
        (covs + covs.swapaxes(1, 2)) / 2,
    )


def draw(data, alpha, sigma, n: int):
    """Draws n points of the marginal `alpha x0 + sigma noise`."""
    weights, means, covs = data
    rng = np.random.default_rng(0)
    which = rng.choice(len(weights), n, p=weights)
    x0 = np.stack([rng.multivariate_normal(means[k], covs[k]) for k in which])
    return alpha * x0 + sigma * rng.normal(size=x0.shape)


def log_marginal(data, alpha, sigma, x):
    """The log density of the marginal at one x."""
    weights, means, covs = data
    total = alpha**2 * covs + sigma**2 * jnp.eye(x.size)
    log_densities = jax.vmap(jax.scipy.stats.multivariate_normal.logpdf, in_axes=(None, 0, 0))
    logs = log_densities(x, alpha * means, total)
    return jax.nn.logsumexp(logs + jnp.log(weights))


@functools.partial(jax.jit, static_argnames="path")
def truth(data, x, path: str):
    """The model's log density at one x."""
    schedule = PATHS[path]()
    denoise = gaussian_mixture(*data, schedule)
    precise = diffrax.PIDController(rtol=1e-10, atol=1e-10)
    x1 = solve_flow(denoise, schedule, x, START, 1.0, stepsize_controller=precise)
    start, end = schedule(START), schedule(1.0)
    return log_marginal(data, *start, x) - log_marginal(data, *end, x1) + log_prior(schedule, x1)


# ---- the estimates -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("path", "probes"))
def estimates(data, keys, xs, tolerance, path: str, probes):
    """The log densities of `log_likelihood`, and the number of evaluations that each one took."""
    schedule = PATHS[path]()
    flow = probability_flow(gaussian_mixture(*data, schedule), schedule)
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)

    def one(key, x):
        z = probes(key, x)
        terms = diffrax.ODETerm(
            lambda t, state, args: divergence(lambda x: flow(t, x, args), state[0], z)
        )
        start, end = jnp.asarray(START, float), jnp.asarray(1.0, float)
        state = x, jnp.zeros((), x.dtype)
        with jax.default_matmul_precision("highest"):
            solution = diffrax.diffeqsolve(
                terms, diffrax.Tsit5(), start, end, None, state, stepsize_controller=controller
            )
        x1, integral = jax.tree.map(lambda y: y[-1], solution.ys)
        # The last of a step's seven stages is the first of the next step.
        evaluations = 6 * solution.stats["num_steps"] + 1
        return log_prior(schedule, x1) + integral, evaluations

    return jax.vmap(one)(keys, xs)


def check(data, x, path: str) -> None:
    """Raises unless `log_likelihood` agrees with `estimates`."""
    schedule, key = PATHS[path](), jax.random.key(0)
    (estimate,), _ = estimates(data, key[None], x[None], 1e-5, path, rademacher_probes)
    expected = log_likelihood(key, gaussian_mixture(*data, schedule), schedule, x, start=START)
    if not abs(expected - estimate) < 1e-3 * x.size:
        raise RuntimeError(f"{path}: expected {expected} (log_likelihood), got {estimate}")


# ---- the table -----------------------------------------------------------------------------------


def rows(path: str, dim: int, points: int, settings: Settings) -> list[dict]:
    """Measures and prints the rows of one path in one dimension."""
    with jax.enable_x64(True):
        xs = draw(mixture(dim), *map(float, PATHS[path]()(START)), points)
        one = functools.partial(truth, mixture(dim), path=path)
        true = np.asarray(jax.vmap(one)(jnp.asarray(xs)))
    data, xs = tuple(map(jnp.asarray, mixture(dim))), jnp.asarray(xs)
    check(data, xs[0], path)
    keys = jax.random.split(jax.random.key(0), (settings.probes, points))
    out = []
    for tolerance in settings.tolerances:
        run = functools.partial(estimates, data, xs=xs, tolerance=jnp.asarray(tolerance), path=path)
        log_densities, counts = run(keys=keys[0], probes=exact_probes)
        hutchinson = np.stack([run(keys=k, probes=rademacher_probes)[0] for k in keys], 1)
        exact, probed, true_bits = (
            np.asarray(bits_per_dim(a, dim)) for a in (log_densities, hutchinson, true)
        )
        of_probes = float(standard_errors(jnp.asarray(probed)).of_probes)
        row = {
            "path": path,
            "dims": dim,
            "tolerance": tolerance,
            "evaluations": float(np.mean(counts)),
            "exact": root_mean_square(exact - true_bits),
            "one_probe": root_mean_square(probed - true_bits[:, None]),
            "of_probes": of_probes * settings.probes**0.5,
            "deviation": float(probed.mean() - exact.mean()) / of_probes,
        }
        print(show(row), flush=True)
        out.append(row)
    return out


def root_mean_square(errors) -> float:
    return float(np.sqrt(np.mean(errors**2)))


HEADER = "path       dims tolerance evaluations    exact one probe of probes deviation"


def show(row: dict) -> str:
    """A row as text."""
    return (
        f"{row['path']:<10} {row['dims']:4d} {row['tolerance']:9.0e} {row['evaluations']:11.1f} "
        f"{row['exact']:8.1e} {row['one_probe']:9.1e} {row['of_probes']:9.1e} "
        f"{row['deviation']:9.1f}"
    )


def main(settings: Settings) -> None:
    load, start = os.getloadavg()[0], time.perf_counter()
    print(HEADER)
    table = []
    for dim, points in zip(settings.dims, settings.points, strict=True):
        for path in settings.paths:
            table += rows(path, dim, points, settings)
    overhead.write_rows(settings, table, load, start)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
