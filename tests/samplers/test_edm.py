"""EDM's sampler on Gaussian data: order, limit, and what churn adds."""

import functools

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from on_gaussians import (
    PATHS,
    affine,
    check_finite_gradients,
    check_order_and_limit,
    data,
    errors_by_path,
    errors_of,
)

from diffjax.samplers import edm_sampler
from diffjax.schedules import edm


@pytest.mark.parametrize("path", PATHS)
def test_order_and_limit(path):
    check_order_and_limit(errors_by_path(edm_sampler, (("linear", 0.9), ("gvp", 0.9)))[path], 2)


@pytest.mark.parametrize("path", ["edm", "linear_vp"])
def test_churn_converges_with_the_order_of_heun(monkeypatch, path):
    schedule, m, v = PATHS[path](), 0.7, 0.3
    steps, errors = np.array([32, 64, 128]), []
    for n in steps:  # in all, a given amount of churn: S_churn = 4
        ts = np.linspace(0.9, 0.05, n + 1)
        sampler = edm_sampler(data(schedule, [m], [v]), schedule, churn=jnp.asarray(4.0 / n))
        errors.append(errors_of(monkeypatch, sampler, schedule, [ts], m, v)[0])
    assert errors[-1] < 1e-3 and abs(oracles.fitted_order(steps, errors) - 2) < 0.3, errors


def test_churn_adds_the_noise_it_says(monkeypatch):
    # noise_scale = 0 adds none; outside [noise_min, noise_max] neither does churn; and the largest
    # level is not exceeded
    schedule, m, v = edm(4.0), 0.7, 0.3
    denoise, ts = data(schedule, [m], [v]), [np.array([0.5, 0.4])]
    plain = affine(monkeypatch, edm_sampler(denoise, schedule), ts)[0]
    assert plain[2, 0] == 0
    for settings in ({"noise_min": 2.1}, {"noise_max": 1.9}):
        np.testing.assert_allclose(
            affine(monkeypatch, edm_sampler(denoise, schedule, 0.2, **settings), ts)[0], plain
        )
    assert (
        affine(monkeypatch, edm_sampler(denoise, schedule, 0.2, noise_scale=0.0), ts)[0][2, 0] == 0
    )
    assert affine(monkeypatch, edm_sampler(denoise, schedule, 0.2), ts)[0][2, 0] > 0.1
    assert (
        affine(monkeypatch, edm_sampler(denoise, schedule, 0.2), [np.array([1.0, 0.9])])[0][2, 0]
        == 0
    )


@pytest.mark.parametrize("churn", [None, 0.2])
def test_finite_with_finite_gradients_on_the_whole_path(churn):
    check_finite_gradients(functools.partial(edm_sampler, churn=churn), ["linear_vp", "edm"])
