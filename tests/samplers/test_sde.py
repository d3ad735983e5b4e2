"""Euler-Maruyama, the bridge and Langevin corrections: mean and variance, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from on_gaussians import (
    X1,
    affine,
    check_finite_gradients,
    check_that_moments_converge,
    data,
    errors_of,
    moments,
    sigma_of,
)

from diffjax.grids import uniform
from diffjax.samplers import bridge_sampler, euler_maruyama, predictor_corrector, sample
from diffjax.schedules import diffusion, linear, linear_vp


def half_diffusion(schedule, t):
    return 0.5 * diffusion(schedule, t)


STOCHASTIC = {
    "euler_maruyama": euler_maruyama,
    "euler_maruyama half": functools.partial(euler_maruyama, amplitude=half_diffusion),
    "euler_maruyama sigma": functools.partial(euler_maruyama, amplitude=sigma_of),
}


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
@pytest.mark.parametrize("method", STOCHASTIC)
def test_mean_and_variance_converge_to_the_datas(monkeypatch, method, path):
    start = 0.9 if path == "linear" else 1.0  # g is infinite where alpha is 0
    check_that_moments_converge(monkeypatch, STOCHASTIC[method], path, start)


def test_the_bridge_sampler_converges_to_the_data(monkeypatch):
    """Between N(m1, v1) and N(m0, v0), with the marginals' velocity and score, at the bridge's own
    amplitude and others.
    """
    (m0, m1), (v0, v1), c, a = (0.4, -1.0), (0.5, 1.3), 0.3, 0.8

    def marginal(t):
        cross = t * (1 - t)
        variance = (1 - t) ** 2 * v0 + t**2 * v1 + cross * (2 * c + a**2)
        slope = -2 * (1 - t) * v0 + 2 * t * v1 + (1 - 2 * t) * (2 * c + a**2)
        return (1 - t) * m0 + t * m1, variance, slope / (2 * variance)

    def flow(x, t):
        mean, _, slope = marginal(t)
        return m1 - m0 + slope * (x - mean)

    def score_of(x, t):
        mean, variance, _ = marginal(t)
        return -(x - mean) / variance

    steps = np.array([32, 64, 128])
    for amplitude in (0.0, a, 1.5):
        errors, grids = [], [np.linspace(1, 0, n + 1) for n in steps]
        for each in affine(monkeypatch, bridge_sampler(flow, score_of, amplitude), grids):
            mean, variance = m1, v1
            for slope, offset, noise in each.T:
                mean, variance = slope * mean + offset, slope**2 * variance + noise
            errors.append(abs(mean - m0) + abs(variance - v0))
        assert errors[-1] < 0.02 and abs(oracles.fitted_order(steps, errors) - 1) < 0.2, (
            amplitude,
            errors,
        )


def stay(denoise, schedule):
    return lambda x, t, s: (x, 0.0)


def test_the_corrector_leaves_the_marginal_alone(monkeypatch):
    # Langevin with step h keeps the mean and adds h^2 / V to the variance V; h is proportional to
    # snr^2
    schedule, m, v, t = linear_vp(), 0.7, 0.3, 0.3
    exact, added = moments(schedule, t, m, v), []
    snrs = np.array([0.02, 0.04, 0.08])
    for snr in snrs:
        sampler = predictor_corrector(data(schedule, [m], [v]), schedule, stay, snr)
        a, b, c2 = affine(monkeypatch, sampler, [np.array([0.4, t])])[0][:, 0]
        assert a < 1 - snr**2 * 0.1  # it does move x
        np.testing.assert_allclose(a * exact[0] + b, exact[0], rtol=1e-12)
        added.append(a**2 * exact[1] + c2 - exact[1])
    assert abs(oracles.fitted_order(1 / snrs, added) - 4) < 1e-6 and np.all(np.array(added) > 0)


def test_each_correction_is_a_draw_of_its_own(monkeypatch):
    # an affine step x -> a x + b + c z, repeated
    schedule, m, v = linear_vp(), 0.7, 0.3
    once, twice = (
        affine(
            monkeypatch,
            predictor_corrector(data(schedule, [m], [v]), schedule, stay, 0.1, n),
            [np.array([0.4, 0.3])],
        )
        for n in (1, 2)
    )
    a, b, c2 = once[0][:, 0]
    np.testing.assert_allclose(twice[0][:, 0], [a**2, (a + 1) * b, (a**2 + 1) * c2], rtol=1e-12)


def test_a_predictor_of_two_evaluations_is_refused():
    def midpoint(denoise, schedule):
        def kernel(x, t, s):
            middle = x + 0.5 * (s - t) * denoise(x, t).eps
            return x + (s - t) * denoise(middle, 0.5 * (t + s)).eps, 0.0

        return kernel

    sampler = predictor_corrector(data(linear()), linear(), midpoint)
    with pytest.raises(
        ValueError,
        match="predictor: expected a method that evaluates the denoiser once a step, at its own x",
    ):
        sample(jax.random.key(0), sampler, jnp.asarray(X1), uniform(2, end=0.1))


def test_predictor_corrector_converges_to_the_data(monkeypatch):
    # the bias of its Langevin step is of order snr^2: 2e-3 at snr = 0.05
    schedule, m, v = linear_vp(), 0.7, 0.3
    denoise = data(schedule, [m], [v])
    sampler = predictor_corrector(denoise, schedule, snr=0.05)
    errors = errors_of(
        monkeypatch, sampler, schedule, [np.linspace(1, 0.05, n + 1) for n in (128, 512)], m, v
    )
    assert errors[1] < 5e-3 < 2 * errors[0]


def test_finite_with_finite_gradients_on_the_whole_path():
    make = functools.partial(euler_maruyama, amplitude=sigma_of)
    check_finite_gradients(make, ["linear", "gvp", "edm"])
