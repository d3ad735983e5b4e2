"""Guidance that is a sampler: CFG++, and projected guidance with momentum."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import bind, grids, schedules
from diffjax.exact import gaussian
from diffjax.guidance import cfg, projected
from diffjax.samplers import (
    cfg_plus_plus,
    ddim,
    ddpm,
    dpm_solver_2m,
    heun,
    projected_with_momentum,
    sample,
    unipc,
)

PATHS = {name: getattr(schedules, name)() for name in ("linear", "linear_vp", "gvp")}
X = np.array([0.3, -0.7])


def run(*args):
    return sample(jax.random.key(0), *args)


def pair(schedule):
    return [
        gaussian(jnp.array(m), v * jnp.eye(2), schedule)
        for m, v in (([1.0, -0.5], 0.3), ([0.0, 0.0], 1.0))
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.7), (0.5, 0.1), (0.2, 0.19)])
def test_a_step_of_cfg_plus_plus_is_one_of_cfg_at_a_scale_that_depends_on_the_step(path, t, s):
    schedule = PATHS[path]
    h = schedules.half_log_snr(schedule, s) - schedules.half_log_snr(schedule, t)

    def step(sampler):
        return sampler.step(jax.random.key(0), sampler.init(X, t), t, s).x

    guided = ddim(cfg(*pair(schedule), 0.6 / (1 - jnp.exp(-h))), schedule)
    np.testing.assert_allclose(
        step(cfg_plus_plus(*pair(schedule), schedule, 0.6)), step(guided), rtol=1e-12
    )


def test_cfg_plus_plus_between_no_guidance_and_the_condition():
    schedule, ts = PATHS["linear"], grids.uniform(10)
    c, u = pair(schedule)

    np.testing.assert_allclose(
        run(cfg_plus_plus(c, u, schedule, 0.0), X, ts), run(ddim(u, schedule), X, ts)
    )
    # the last step goes to the estimate of the data
    last = cfg_plus_plus(c, u, schedule, 1.0)
    got = last.step(jax.random.key(0), last.init(X, 0.3), 0.3, 0.0).x
    np.testing.assert_allclose(got, c(X, 0.3).x0, rtol=1e-14)


@pytest.mark.usefixtures("without_type_checks")
def test_cfg_plus_plus_is_no_denoiser():
    schedule = PATHS["linear"]
    sampler = cfg_plus_plus(*pair(schedule), schedule)
    with pytest.raises(ValueError, match=r"denoise: expected a denoiser.*A Sampler is no denoiser"):
        run(dpm_solver_2m(sampler, schedule), X, grids.uniform(3))


@pytest.mark.parametrize("method", [ddim, dpm_solver_2m, unipc, bind(ddim, eta=1.0), ddpm])
def test_without_momentum_it_is_the_method_under_projected_guidance(method):
    schedule, ts = PATHS["linear"], grids.uniform(10, end=0.05)
    numbers = 2.5, 0.3, 0.7
    guided = projected(*pair(schedule), schedule, *numbers, event_ndim=1)
    got = projected_with_momentum(method, *pair(schedule), schedule, *numbers, 0.0, event_ndim=1)
    np.testing.assert_allclose(
        run(got, X, ts),
        run(method(guided, schedule), X, ts),
        rtol=1e-12,
    )


def test_the_momentum_is_that_of_the_paper():
    schedule, ts, beta = PATHS["linear"], [0.9, 0.6, 0.3, 0.0], -0.5
    c, u = pair(schedule)
    got = projected_with_momentum(ddim, c, u, schedule, 3.0, 0.0, jnp.inf, beta, event_ndim=1)
    x, d = np.asarray(X), np.zeros(2)
    for t, s in itertools.pairwise(ts):
        x0, other = (np.asarray(f(jnp.asarray(x), t).x0) for f in (c, u))
        d = x0 - other + beta * d
        x0 = x0 + 2 * (d - (d @ x0) / (x0 @ x0) * x0)
        eps = (x - (1 - t) * x0) / t
        x = (1 - s) * x0 + s * eps
    np.testing.assert_allclose(run(got, X, jnp.array(ts)), x, rtol=1e-12)


def test_a_method_that_evaluates_elsewhere_is_refused():
    schedule = PATHS["linear"]
    sampler = projected_with_momentum(heun, *pair(schedule), schedule, 3.0, event_ndim=1)
    with pytest.raises(ValueError, match="method: expected a method that evaluates the denoiser"):
        run(sampler, X, grids.uniform(4, end=0.1))


def test_scales_and_momenta_are_mapped():
    schedule, ts = PATHS["linear"], grids.uniform(6)

    @functools.partial(jax.vmap, in_axes=(0, 0))
    def ends(scale, beta):
        sampler = projected_with_momentum(
            ddim, *pair(schedule), schedule, scale, beta=beta, event_ndim=1
        )
        return run(sampler, X, ts)

    each = [ends(jnp.array([s]), jnp.array([b]))[0] for s, b in ((1.5, -0.5), (3.0, 0.0))]
    got = ends(jnp.array([1.5, 3.0]), jnp.array([-0.5, 0.0]))
    np.testing.assert_allclose(got, np.stack(each), rtol=1e-12)
