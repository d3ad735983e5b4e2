"""Bad input: what is wrong with the structure is named at trace time, what is wrong with a concrete
value at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import (
    divergence,
    exact,
    grids,
    likelihood,
    losses,
    process,
    samplers,
    schedules,
    solve,
    times,
    weightings,
)
from diffjax.parametrizations import EPS, as_denoiser, edm_preconditioning
from diffjax.typing import Estimate

pytestmark = pytest.mark.usefixtures("without_type_checks")  # the errors are the library's own
KEY_0 = jax.random.key(0)
KEY = 0  # no key is looked at before the error
LINEAR = schedules.linear()
nan, inf = np.nan, np.inf


def sampler():
    return samplers.ddim(exact.gaussian(jnp.zeros(2), jnp.eye(2), LINEAR), LINEAR)


def narrow(x, t):
    return x[..., :1]


def run(x, ts):
    return samplers.sample(KEY, sampler(), x, ts)


x2 = np.zeros(2)
ones2 = np.ones(2)


def run_with(make, *args, **kwargs):
    """A sampler made with the given numbers, run on two samples that a vector of two would be
    spread over.
    """
    denoise = exact.gaussian(jnp.zeros(2), jnp.eye(2), LINEAR)
    return samplers.sample(
        KEY_0, make(denoise, LINEAR, *args, **kwargs), jnp.zeros((2, 2)), grids.uniform(2, 0.9)
    )


def corrector(denoise, schedule, snr):
    return samplers.predictor_corrector(denoise, schedule, snr=snr)


def bridge(denoise, schedule, amplitude):
    return samplers.bridge_sampler(lambda x, t: x, lambda x, t: -x, amplitude)


VALUES = {  # (call, what the message must say)
    "negative beta": (lambda: schedules.linear_vp(-0.1, 20.0), r"beta_min.*got -0.1"),
    "nan beta": (lambda: schedules.linear_vp(0.1, nan), r"beta_max.*finite.*got nan"),
    "descending beta": (lambda: schedules.linear_vp(3.0, 2.0), r"beta_min=3.0, beta_max=2.0"),
    "sub_vp": (lambda: schedules.sub_vp(0.1, inf), r"beta_max.*got inf"),
    "sigmas": (
        lambda: schedules.ve(50.0, 0.01),
        r"0 < sigma_min < sigma_max, got sigma_min=50.0, sigma_max=0.01",
    ),
    "equal sigmas": (lambda: schedules.ve(1.0, 1.0), r"sigma_min < sigma_max"),
    "edm": (lambda: schedules.edm(-1.0), r"sigma_max.*got -1.0"),
    "cosine": (lambda: schedules.cosine(-0.1), r"s: expected.*got -0.1"),
    "a batch of betas": (
        lambda: schedules.linear_vp(np.array([0.1, -1.0]), np.array([1.0, 1.0])),
        r"beta_min",
    ),
    "a beta of one before the last": (
        lambda: schedules.from_betas(np.array([1.0, 0.1])),
        r"betas: expected finite values in \[0, 1\)",
    ),
    "betas that are alphas_cumprod": (
        lambda: schedules.from_betas(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
        r"(?s)betas: expected the variances.{,200}alphas_cumprod.*1 - a /",
    ),
    "betas of nan": (lambda: schedules.from_betas(np.array([0.1, nan])), r"betas"),
    "a schedule that is not called": (
        lambda: schedules.half_log_snr(schedules.linear_vp, 0.5),
        r"schedule: expected a schedule, got linear_vp, the function that makes one; call it, "
        r"as in linear_vp\(\)",
    ),
    "bound, and at its end": (
        lambda: samplers.sample(
            KEY_0, samplers.ddim(lambda x, t: Estimate(x, x), schedules.edm), x2, grids.uniform(2)
        ),
        r"schedule: expected a schedule, got edm",
    ),
    "of no numbers": (
        lambda: process.perturb(schedules.linear, x2, x2, 0.5),
        r"schedule: .* got linear,",
    ),
    "a sampler that is not called": (
        lambda: samplers.sample(KEY, samplers.ddim, x2, grids.uniform(2)),
        r"sampler: expected a Sampler\(init, step\), such as the result of ddim\(denoise, "
        r"schedule\), got ddim",
    ),
    "a parametrization by name": (
        lambda: as_denoiser(lambda x, t: x, LINEAR, "eps"),
        r"parametrization: expected X0, EPS, .* diffjax.EPS, got 'eps'",
    ),
    "in a loss": (
        lambda: losses.denoising(KEY_0, lambda x, t: x, LINEAR, "eps", x2, 0.5),
        r"parametrization: expected X0, EPS, .* got 'eps'",
    ),
    "many eta": (
        lambda: run_with(samplers.ddim, ones2),
        r"eta: expected a scalar, got shape \(2,\); .* vmap",
    ),
    "many churn": (
        lambda: run_with(samplers.edm_sampler, 0.1 * ones2),
        r"churn: expected a scalar, got shape \(2,\)",
    ),
    "many scales of noise": (
        lambda: run_with(samplers.edm_sampler, 0.1, noise_scale=ones2),
        r"noise_scale: expected a scalar, got shape \(2,\)",
    ),
    "many tau": (
        lambda: run_with(samplers.sde_dpm_solver_2m, ones2),
        r"tau: expected a scalar, got shape \(2,\)",
    ),
    "many tau of SA": (
        lambda: run_with(samplers.sa_solver, 2, ones2),
        r"tau: expected a scalar, got shape \(2,\)",
    ),
    "many snr": (
        lambda: run_with(corrector, 0.1 * ones2),
        r"snr: expected a scalar, got shape \(2,\)",
    ),
    "many amplitudes": (
        lambda: run_with(bridge, ones2),
        r"amplitude: expected a scalar, got shape \(2,\)",
    ),
    "many gammas": (
        lambda: weightings.min_snr(ones2)(LINEAR, EPS, 0.5),
        r"gamma: expected a scalar, got shape \(2,\)",
    ),
    "many gammas of P2": (
        lambda: weightings.p2(ones2)(LINEAR, EPS, 0.5),
        r"gamma: expected a scalar, got shape",
    ),
    "many k": (
        lambda: weightings.p2(1.0, ones2)(LINEAR, EPS, 0.5),
        r"k: expected a scalar, got shape \(2,\)",
    ),
    "many deviations of the data": (
        lambda: as_denoiser(lambda x, t: x, LINEAR, edm_preconditioning(ones2))(jnp.zeros(2), 0.5),
        r"sigma_data: expected a scalar, got shape \(2,\)",
    ),
    "many deviations of a weighting": (
        lambda: weightings.edm_weighting(ones2)(LINEAR, EPS, 0.5),
        r"sigma_data: expected a scalar, got shape \(2,\)",
    ),
    "a number as the amplitude": (
        lambda: run_with(samplers.euler_maruyama, 0.5),
        r"amplitude: expected a function \(schedule, t\) -> a, got 0.5; a constant one is lambda",
    ),
    "amplitudes": (
        lambda: run_with(samplers.euler_maruyama, lambda schedule, t: ones2),
        r"amplitude: expected a scalar, got shape \(2,\)",
    ),
    "a long grid": (lambda: run(x2, np.linspace(0, 1, 500)), r"got \[0\. .* \.\.\. .* 1\. *\]$"),
    "not vp": (
        lambda: schedules.to_betas(LINEAR, 3),
        r"schedule: expected a variance-preserving path",
    ),
    "ascending grid": (
        lambda: run(x2, np.array([0.0, 1.0])),
        r"ts: expected times that descend.*got \[0. 1.\]",
    ),
    "standing grid": (
        lambda: run(x2, np.array([1.0, 0.5, 0.5])),
        r"ts: expected times that descend",
    ),
    "grid beyond 1": (
        lambda: run(x2, np.array([1.1, 0.5])),
        r"ts: expected times in \[0, 1\], got \[1.1 0.5\]",
    ),
    "grid of nan": (lambda: run(x2, np.array([1.0, nan])), r"ts: expected times in \[0, 1\]"),
    "uniform": (
        lambda: grids.uniform(3, 0.1, 0.9),
        r"0 <= end < start <= 1, got start=0.1, end=0.9",
    ),
    "infinite log-SNR": (
        lambda: grids.karras(LINEAR, 3, end=0.0),
        r"end: expected a time with a finite.* end=0.0 .*inf",
    ),
    "eta": (lambda: samplers.ddim(None, LINEAR, 1.5), r"eta.*\[0, 1\], got 1.5"),
    "churn": (lambda: samplers.edm_sampler(None, LINEAR, -0.1), r"churn.*got -0.1"),
    "snr": (lambda: samplers.predictor_corrector(None, LINEAR, snr=nan), r"snr.*got nan"),
    "corrections": (
        lambda: samplers.predictor_corrector(None, LINEAR, corrections=0),
        r"corrections: .* 1, got 0",
    ),
    "sigma_data": (lambda: edm_preconditioning(0.0), r"sigma_data.*got 0.0"),
    "gamma": (lambda: weightings.min_snr(-5.0), r"gamma.*got -5.0"),
    "times": (lambda: times.uniform_times(KEY, 3, 0.9, 0.1), r"low=0.9, high=0.1"),
    "infinite times": (
        lambda: times.log_snr_times(KEY, 3, LINEAR),
        r"low, high: expected times of finite log-SNR.*-inf",
    ),
    "many times": (
        lambda: losses.conditional_flow_matching(lambda x, t: x, x2, x2, np.ones(2)),
        r"t: expected a scalar.*\(2,\)",
    ),
    "bridge of shapes": (
        lambda: process.brownian_bridge(x2, x2[:, None], x2, 0.5, 1.0),
        r"x0, x1, eps, t: expected three arrays of one shape",
    ),
    "a target of another shape": (
        lambda: losses.flow_matching(lambda x, t: x, lambda x, t: x[:1], x2, 0.5),
        r"target: expected .* of the shape of x, \(2,\), got \(1,\)",
    ),
    "asymmetric": (
        lambda: exact.gaussian(x2, np.array([[1.0, 0.5], [0.0, 1.0]]), LINEAR),
        r"cov: expected symmetric",
    ),
    "indefinite": (
        lambda: exact.gaussian(x2, np.diag([1.0, -1.0]), LINEAR),
        r"cov: expected no negative eigenvalue",
    ),
    "weights": (
        lambda: exact.gaussian_mixture(np.ones(2), np.zeros((2, 1)), np.ones((2, 1, 1)), LINEAR),
        r"weights: .*sum 1",
    ),
    "a large covariance": (
        lambda: exact.gaussian(np.zeros(500), np.diag(-np.ones(500)), LINEAR),
        r"(?s)cov: expected no negative eigenvalue, got \[\[.{,400}$",
    ),
    "nan in data": (
        lambda: exact.empirical(np.array([[1.0], [nan]]), LINEAR),
        r"data: expected finite values, got 1",
    ),
    "levels": (
        lambda: likelihood.dequantize(KEY, np.array([256]), 256),
        r"values: expected integers in \[0, 256\)",
    ),
    "scale of the noise": (
        lambda: likelihood.variational_dequantize(KEY, np.array([3]), 256, 0.0, 0.0),
        r"scale: expected positive numbers, got 0.0",
    ),
    "solve_flow": (
        lambda: solve.solve_flow(None, LINEAR, x2, 1.5, 0.0),
        r"t: expected a time in \[0, 1\], got 1.5",
    ),
    "solve_sde": (
        lambda: solve.solve_sde(KEY, None, LINEAR, x2, 0.2, 0.5),
        r"s: expected a time before t=0.2, got s=0.5",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_named_at_once(name):
    call, message = VALUES[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_values_are_not_looked_at():
    alpha, _ = jax.jit(lambda beta: schedules.linear_vp(beta, 20.0)(0.5))(-0.1)
    assert np.isfinite(alpha)


STRUCTURE = {  # raised under jit, too
    "a network's shape": (
        lambda x: as_denoiser(narrow, LINEAR, EPS)(x, 0.5),
        r"network: it returned \(1,\) for x of shape \(2,\)",
    ),
    "in the loss": (
        lambda x: losses.denoising(jax.random.key(0), narrow, LINEAR, EPS, x, 0.5),
        r"network: it returned \(1,\) for x of shape \(2,\)",
    ),
    "in flow matching": (
        lambda x: losses.conditional_flow_matching(narrow, x, x, 0.5),
        r"network: it returned \(1,\)",
    ),
    "shapes of a pair": (
        lambda x: losses.conditional_flow_matching(narrow, x, x[:1], 0.5),
        r"x1: expected.*\(2,\), got \(1,\)",
    ),
    "noise": (
        lambda x: process.perturb(LINEAR, x, x[:1], 0.5),
        r"eps: expected the shape of x0, \(2,\), got \(1,\)",
    ),
    "a vector of times": (
        lambda x: process.perturb(LINEAR, x, x, x),
        r"t: expected a scalar.*got shape \(2,\)",
    ),
    "integer time": (
        lambda x: schedules.coefficients(LINEAR, 1),
        r"t: expected a floating-point dtype, got int",
    ),
    "integer x": (
        lambda x: run(x.astype(int), grids.uniform(2)),
        r"x: expected a floating-point dtype, got int",
    ),
    "scalar grid": (
        lambda x: run(x, x[0]),
        r"ts: expected a vector of at least 2 times, got shape \(\)",
    ),
    "grid of one": (
        lambda x: run(x, x[:1]),
        r"ts: expected a vector of at least 2 times, got shape \(1,\)",
    ),
    "a schedule of one": (
        lambda x: schedules.drift(lambda t: t, 0.5),
        r"schedule: expected it to return two scalars",
    ),
    "a schedule of vectors": (
        lambda x: schedules.drift(lambda t: (x, x), 0.5),
        r"two scalars.*\(2,\)",
    ),
    "value": (
        lambda x: schedules.half_log_snr_inverse(LINEAR, x),
        r"value: expected a scalar.*\(2,\)",
    ),
    "no betas": (
        lambda x: schedules.from_betas(x[:0]),
        r"betas: expected a non-empty vector, got shape \(0,\)",
    ),
    "no data": (
        lambda x: exact.empirical(jnp.zeros((0, 2)), LINEAR),
        r"data: expected at least one point.*\(0, 2\)",
    ),
    "cov": (
        lambda x: exact.gaussian(x, jnp.eye(3), LINEAR),
        r"cov: expected shape \(2, 2\).*got \(3, 3\)",
    ),
    "means": (
        lambda x: exact.gaussian_mixture(x, x, x, LINEAR),
        r"means: expected shape \(k, d\), got \(2,\)",
    ),
    "x of another dimension": (
        lambda x: exact.gaussian(x, jnp.eye(2), LINEAR)(jnp.zeros(3), 0.5),
        r"x: expected.*2.*\(3,\)",
    ),
    "probes": (
        lambda x: divergence.divergence(lambda x: x, x, jnp.ones((1, 3))),
        r"probes: expected shape \(n, 2\).*\(1, 3\)",
    ),
    "float values": (
        lambda x: likelihood.dequantize(KEY, x, 256),
        r"values: expected integers, got dtype float64",
    ),
    "one level": (
        lambda x: likelihood.bits_per_dim(x, 2, levels=1),
        r"levels: expected at least 2, got 1",
    ),
    "mean of the noise": (
        lambda x: likelihood.variational_dequantize(KEY, jnp.array([3, 5, 7]), 256, x, 1.0),
        r"mean: expected a scalar or the shape of values, \(3,\), got \(2,\)",
    ),
    "no weights": (
        lambda x: likelihood.importance_weighted_bound(x[:0]),
        r"log_weights: expected.*got \(0,\)",
    ),
    "one probe": (
        lambda x: likelihood.standard_errors(x[:, None]),
        r"values: expected.*m >= 2, got \(2, 1\)",
    ),
    "no dimension": (lambda x: likelihood.bits_per_dim(x, 0), r"dims: expected at least 1, got 0"),
    "no steps": (lambda x: grids.uniform(0), r"n: expected at least 1 step, got 0"),
    "one Karras step": (lambda x: grids.karras(LINEAR, 1), r"n: expected at least 2 steps, got 1"),
    "no times": (lambda x: times.uniform_times(KEY, 0), r"n: expected at least 1, got 0"),
    "negative truncation": (lambda x: samplers.truncated_scan(-1), r"last: expected.*got -1"),
    "no nodes": (
        lambda x: schedules.from_sde(jnp.cos, jnp.cos, 0),
        r"nodes: expected at least 1, got 0",
    ),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_wrong_structure_is_named_while_tracing(name):
    call, message = STRUCTURE[name]
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda x: jax.tree.leaves(call(x)))(jnp.asarray(x2))
