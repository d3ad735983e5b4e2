"""Solvers that run to the end in one call: DPM-Solver-fast and adaptive solvers."""

import functools
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax.dynamics import probability_flow
from experiments.fast_sampling.comparison import Results, Run
from experiments.fast_sampling.mixtures import END, SCHEDULE, START, Mixture, denoiser_of, scored

PAIRS = {"DPM-Solver-12": dj.solve.DPM_SOLVER_12, "DPM-Solver-23": dj.solve.DPM_SOLVER_23}
# Solvers and their evaluations per step: the last stage of a step is the first of the next one.
# Choosing the length of the first step takes two more.
DIFFRAX = {"Bogacki-Shampine 3(2)": (diffrax.Bosh3(), 3), "Tsitouras 5(4)": (diffrax.Tsit5(), 6)}


def fast_and_adaptive(
    mixtures: Mixture, x1: jax.Array, x0: jax.Array, nfes: tuple[int, ...]
) -> Results:
    """Errors and flips of DPM-Solver-fast at each NFE, and of the adaptive solvers."""
    results: Results = {}
    for nfe in nfes:

        def fast(mixture, x, goal, nfe=nfe):
            denoise = denoiser_of(mixture)
            end = dj.solve.dpm_solver_fast(denoise, SCHEDULE, x, nfe, START, END)
            return scored(mixture, end, goal)

        run = Run("DPM-Solver-fast", "uniform log-SNR", nfe)
        results[run] = jax.device_get(jax.jit(jax.vmap(fast))(mixtures, x1, x0))
    solvers = {
        name: (dpm_solver, pair, (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)) for name, pair in PAIRS.items()
    }
    solvers |= {
        name: (embedded, method, (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1.3e-4, 1e-4))
        for name, method in DIFFRAX.items()
    }
    for name, (solve, method, tolerances) in solvers.items():
        measured = _measured(solve, method)
        for tolerance in tolerances:
            errors, flips, evaluations = jax.device_get(measured(mixtures, x1, x0, tolerance))
            results[Run(name, "adaptive", round(float(np.median(evaluations)), 1))] = errors, flips
    return results


def _measured(solve: Callable, method) -> Callable:
    """A function of errors, flips and mean evaluations of each mixture at a tolerance."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
    def measured(mixture, x, goal, tolerance):
        ends, evaluations = jax.vmap(lambda x: solve(mixture, x, tolerance, method))(x)
        return *scored(mixture, ends, goal), jnp.mean(evaluations)

    return measured


def dpm_solver(mixture: Mixture, x: jax.Array, tolerance: float, pair):
    """The end of the flow from x, and the evaluations."""
    return dj.solve.dpm_solver_adaptive(
        denoiser_of(mixture), SCHEDULE, x, START, END, pair, tolerance, tolerance
    )


def embedded(mixture: Mixture, x: jax.Array, tolerance: float, method):
    """The same with diffrax, on the linear path between the log-SNRs of START and END."""
    linear, (solver, stages) = dj.linear(), method
    (start, scale), (end, scale_end) = (
        (sigma / (alpha + sigma), alpha + sigma)
        for alpha, sigma in (SCHEDULE(START), SCHEDULE(END))
    )
    denoise = dj.reschedule(denoiser_of(mixture), SCHEDULE, linear)
    term = diffrax.ODETerm(probability_flow(denoise, linear))
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    solution = diffrax.diffeqsolve(
        term, solver, start, end, None, x / scale, stepsize_controller=controller
    )
    assert solution.ys is not None
    return scale_end * solution.ys[-1], solution.stats["num_steps"] * stages + 2
