"""Classifier-free guidance of Gaussians: the guided score is that of a Gaussian again (1.39)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind, schedules
from diffjax.exact import gaussian
from diffjax.guidance import cfg, clip_x0, conditional_cfg
from diffjax.parametrizations import X0, as_denoiser, score


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guided_score_is_the_sum_of_1_42(scale):
    schedule, t, x = schedules.linear_vp(), 0.4, np.array([0.3, -0.8])
    (mc, vc), (mu, vu) = (np.array([1.0, 0.5]), np.array([0.5, 0.2])), (np.zeros(2), np.ones(2))
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    guided = cfg(
        *(
            gaussian(jnp.asarray(m), jnp.diag(jnp.asarray(v)), schedule)
            for m, v in ((mc, vc), (mu, vu))
        ),
        scale,
    )
    c, u = (
        oracles.gaussian_score(mc, vc, alpha, sigma, x),
        oracles.gaussian_score(mu, vu, alpha, sigma, x),
    )
    np.testing.assert_allclose(
        score(guided, schedule, jnp.asarray(x), t), (1 - scale) * u + scale * c, rtol=1e-10
    )
    x0, eps = guided(jnp.asarray(x), t)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x, rtol=1e-12)


def _two(schedule):
    return [gaussian(mean * jnp.ones(3), jnp.eye(3), schedule) for mean in (1.0, 0.0)]


def test_one_scale_a_sample_is_the_scalar_scale_of_each():
    schedule, xs = schedules.linear(), jnp.arange(6.0).reshape(2, 3)
    scales = jnp.array([1.0, 4.0])
    together = cfg(*_two(schedule), scales[:, None])(xs, 0.5)
    for i in range(2):
        alone = cfg(*_two(schedule), scales[i])(xs[i], 0.5)
        np.testing.assert_allclose(together.x0[i], alone.x0, rtol=1e-14)


def test_one_conditional_denoiser_is_guided_as_two():
    schedule, x = schedules.linear(), jnp.arange(3.0)

    def denoise(w, x, t, cond):
        return as_denoiser(
            lambda x, t: jnp.tanh(w @ x + cond["shift"].sum() - cond["label"]), schedule, X0
        )(x, t)

    bound = bind(denoise, 0.1 * jnp.eye(3))
    cond, null = {"label": 3, "shift": jnp.ones(2)}, {"label": 10, "shift": jnp.zeros(2)}
    two = cfg(*(bind(denoise, 0.1 * jnp.eye(3), cond=c) for c in (cond, null)), 1.7)
    for scale in (1.7, jnp.array(1.7)):
        guided = conditional_cfg(bound, cond, null, scale)
        chex.assert_trees_all_close(guided(x, 0.4), two(x, 0.4), rtol=1e-12)
    assert str(jax.make_jaxpr(guided)(x, 0.4)).count("dot_general") == 1
    assert str(jax.make_jaxpr(two)(x, 0.4)).count("dot_general") == 2


def test_conditions_of_another_structure_are_refused():
    for null in (jnp.zeros(2), {"label": 3}):
        with pytest.raises(ValueError, match="null: expected the structure and shapes of cond"):
            conditional_cfg(lambda x, t, c: None, 3, null, 2.0)


# (3,) would broadcast to x, along the wrong axis
@pytest.mark.parametrize("shape", [(3,), (2, 3, 1)])
def test_a_scale_that_does_not_fit_x_is_an_error(shape):
    guided = cfg(*_two(schedules.linear()), jnp.ones(shape))
    with pytest.raises(ValueError, match=r"scale: expected a scalar.*got shape.*vmap"):
        jax.jit(guided)(jnp.zeros((2, 3)), 0.5)


@pytest.mark.parametrize("t", [1e-6, 0.3, 1.0])
def test_clipped_estimates_lie_in_the_range_and_still_add_up_to_x(t):
    schedule, x = schedules.linear(), jnp.array([0.4, 5.0, -7.0])
    raw = gaussian(jnp.zeros(3), 4 * jnp.eye(3), schedule)
    x0, eps = clip_x0(raw, schedule)(x, t)
    np.testing.assert_allclose(x0, np.clip(raw(x, t).x0, -1.0, 1.0), rtol=0)
    alpha, sigma = schedule(t)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x, rtol=1e-9)


def test_what_needs_no_clipping_is_left_alone_also_at_sigma_0():
    schedule, x = schedules.linear(), jnp.array([0.4, -0.2, 0.1])
    raw = gaussian(jnp.zeros(3), jnp.eye(3), schedule)
    for t in (0.0, 0.5, 1.0):
        chex.assert_trees_all_equal(clip_x0(raw, schedule)(x, t), raw(x, t))


def test_bounds_of_the_data_are_ordered():
    with pytest.raises(ValueError, match=r"low, high: expected low < high, got low=1.0, high=-1.0"):
        clip_x0(_two(schedules.linear())[0], schedules.linear(), 1.0, -1.0)
