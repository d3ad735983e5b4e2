"""Clipped estimates of the data."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import schedules
from diffjax.exact import gaussian
from diffjax.guidance import clip_x0, dynamic_threshold


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
        clip_x0(lambda x, t: x, schedules.linear(), 1.0, -1.0)


def test_a_dynamic_threshold_is_that_of_each_sample():
    schedule, t = schedules.linear(), 0.4
    x = jnp.array([[0.1, -0.2, 0.3, 0.2], [8.0, -4.0, 1.0, 2.0]])
    raw = gaussian(jnp.zeros(4), 4 * jnp.eye(4), schedule)
    got = dynamic_threshold(raw, schedule, 75.0, event_ndim=1)(x, t)
    x0 = np.asarray(raw(x, t).x0)
    # the 75th percentile of 4 numbers lies a quarter of the way from the third to the fourth
    q = np.sort(abs(x0), -1) @ np.array([0, 0, 0.75, 0.25])
    q = np.maximum(q, 1.0)[:, None]
    np.testing.assert_allclose(got.x0, np.clip(x0, -q, q) / q, rtol=1e-12)
    alpha, sigma = schedule(t)
    np.testing.assert_allclose(alpha * got.x0 + sigma * got.eps, x, rtol=1e-12)
    alone = dynamic_threshold(raw, schedule, 75.0, event_ndim=1)(x[1], t)
    np.testing.assert_allclose(got.x0[1], alone.x0, rtol=1e-14)


def test_a_sample_within_the_bound_is_not_moved():
    schedule, x = schedules.linear(), jnp.array([0.1, -0.2])
    raw = gaussian(jnp.zeros(2), jnp.eye(2), schedule)
    chex.assert_trees_all_equal(dynamic_threshold(raw, schedule, event_ndim=1)(x, 0.5), raw(x, 0.5))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("ndim", [-1, True, 1.0])
def test_a_number_of_axes_is_an_integer(ndim):
    with pytest.raises(ValueError, match="event_ndim: expected the number of axes of one sample"):
        dynamic_threshold(lambda x, t: x, schedules.linear(), event_ndim=ndim)


def test_a_sample_has_at_most_the_axes_of_x():
    schedule = schedules.linear()
    denoise = gaussian(jnp.zeros(2), jnp.eye(2), schedule)
    with pytest.raises(ValueError, match=r"event_ndim: expected at most the 1 axes of x"):
        dynamic_threshold(denoise, schedule, event_ndim=3)(jnp.zeros(2), 0.5)
