"""Rescaled guidance, projected guidance and CFG-Zero*: their identities."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import schedules
from diffjax.exact import gaussian
from diffjax.guidance import cfg, projected, rescaled, zero_star
from diffjax.parametrizations import EPS, VELOCITY, X0, V, target, velocity

PATHS = {name: getattr(schedules, name)() for name in ("linear", "linear_vp", "gvp")}
EACH_PATH = pytest.mark.parametrize("path", PATHS)
X = np.array([[0.3, -0.7, 1.1, 0.2], [2.0, 0.1, -0.4, -1.5]])
T = 0.6


def pair(schedule):
    means = jnp.array([1.0, -0.5, 0.2, 2.0]), 0.1 * jnp.ones(4)
    # not N(0, I), whose estimate of v is 0
    covs = jnp.diag(jnp.array([0.2, 0.5, 1.0, 0.1])), 1.7 * jnp.eye(4)
    return [gaussian(m, c, schedule) for m, c in zip(means, covs, strict=True)]


def check_estimate(estimate, schedule, x=X, t=T):
    alpha, sigma = schedule(t)
    np.testing.assert_allclose(alpha * estimate.x0 + sigma * estimate.eps, x, rtol=1e-12)


@EACH_PATH
@pytest.mark.parametrize("parametrization", [EPS, V, VELOCITY], ids=["EPS", "V", "VELOCITY"])
def test_rescaling_restores_the_deviation_of_each_sample(path, parametrization):
    schedule = PATHS[path]
    c, u = pair(schedule)

    def output(estimate):
        return target(schedule, parametrization, *estimate, T)

    def guided(scale, phi):
        return rescaled(c, u, schedule, parametrization, scale, phi, event_ndim=1)(X, T)

    check_estimate(guided(3.0, 0.7), schedule)
    full = output(guided(3.0, 1.0))
    np.testing.assert_allclose(full.std(-1), output(c(X, T)).std(-1), rtol=1e-12)
    chex.assert_trees_all_close(guided(3.0, 0.0), cfg(c, u, 3.0)(X, T), rtol=1e-11)
    chex.assert_trees_all_close(guided(1.0, 0.7), c(X, T), rtol=1e-11)
    # the mixture of the paper's eq. 16
    half = 0.5 * full + 0.5 * output(cfg(c, u, 3.0)(X, T))
    np.testing.assert_allclose(output(guided(3.0, 0.5)), half, rtol=1e-11)


@EACH_PATH
def test_projected_guidance_keeps_what_is_orthogonal(path):
    schedule = PATHS[path]
    c, u = pair(schedule)

    def guided(scale, eta=0.0, norm=jnp.inf):
        return projected(c, u, schedule, scale, eta, norm, event_ndim=1)(X, T)

    x0 = c(X, T).x0
    check_estimate(guided(3.0), schedule)
    moved = np.asarray(guided(3.0).x0 - x0)
    np.testing.assert_allclose((moved * x0).sum(-1), 0, atol=1e-12)
    # of all vectors orthogonal to c it is the nearest to 2 (c - u)
    rest = 2 * np.asarray(x0 - u(X, T).x0) - moved
    np.testing.assert_allclose((moved * rest).sum(-1), 0, atol=1e-12)
    chex.assert_trees_all_close(guided(3.0, 1.0), cfg(c, u, 3.0)(X, T), rtol=1e-11)
    chex.assert_trees_all_close(guided(1.0), c(X, T), rtol=1e-12)
    lengths = np.linalg.norm(guided(3.0, 1.0, 0.5).x0 - x0, axis=-1)
    np.testing.assert_allclose(lengths, 2 * 0.5, rtol=1e-12)


@EACH_PATH
def test_zero_star_scales_the_unconditional_velocity_to_fit(path):
    schedule = PATHS[path]
    c, u = pair(schedule)

    def guided(scale, c=c, u=u, still_from=1.0):
        return zero_star(c, u, schedule, scale, still_from, event_ndim=1)

    check_estimate(guided(3.0)(X, T), schedule)
    vc, vu = (np.asarray(velocity(d, schedule, jnp.asarray(X), T)) for d in (c, u))
    pairs = zip(vc, vu, strict=True)
    s = np.array([np.linalg.lstsq(b[:, None], a, rcond=None)[0] for a, b in pairs])
    np.testing.assert_allclose(
        velocity(guided(3.0), schedule, jnp.asarray(X), T), s * vu + 3.0 * (vc - s * vu), rtol=1e-10
    )
    chex.assert_trees_all_close(guided(1.0)(X, T), c(X, T), rtol=1e-11)
    chex.assert_trees_all_close(guided(4.0, u=c)(X, T), c(X, T), rtol=1e-11)
    np.testing.assert_allclose(
        velocity(guided(3.0, still_from=0.5), schedule, jnp.asarray(X), T), 0, atol=1e-14
    )


def test_zero_star_stands_still_in_the_first_step():
    schedule = schedules.linear()
    guided = zero_star(*pair(schedule), schedule, 3.0, event_ndim=1)
    np.testing.assert_array_equal(velocity(guided, schedule, jnp.asarray(X), 1.0), 0)
    assert np.abs(velocity(guided, schedule, jnp.asarray(X), 0.999)).min() > 0


@pytest.mark.parametrize("name", ["rescaled", "projected", "zero_star"])
def test_a_batch_is_guided_sample_by_sample(name):
    schedule = schedules.linear()
    c, u = pair(schedule)
    guided = {
        "rescaled": rescaled(c, u, schedule, V, 3.0, event_ndim=1),
        "projected": projected(c, u, schedule, 3.0, 0.2, 0.4, event_ndim=1),
        "zero_star": zero_star(c, u, schedule, 3.0, event_ndim=1),
    }[name]
    chex.assert_trees_all_close(guided(X, T), jax.vmap(guided, in_axes=(0, None))(X, T), rtol=1e-13)


def test_a_constant_output_is_not_rescaled_and_one_number_cannot_be():
    schedule = schedules.linear()
    point = gaussian(jnp.ones(4), jnp.zeros((4, 4)), schedule)
    still = rescaled(point, point, schedule, X0, 3.0, event_ndim=1)(X, T)
    chex.assert_trees_all_close(still, point(X, T), rtol=1e-12)
    one = gaussian(jnp.zeros(1), jnp.eye(1), schedule)
    with pytest.raises(ValueError, match="event_ndim: expected samples of several numbers"):
        rescaled(one, one, schedule, V, 3.0, event_ndim=1)(jnp.zeros((5, 1)), T)


def test_phi_is_a_share():
    schedule = schedules.linear()
    with pytest.raises(ValueError, match=r"phi: expected a finite number in \[0, 1\], got 1.5"):
        rescaled(*pair(schedule), schedule, V, 3.0, 1.5, event_ndim=1)
