"""Weighted particles: the evidence by quadrature, and the tilted density by exact moments."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats

from diffjax import grids
from diffjax.exact import conditioned_mixture, gaussian, gaussian_mixture
from diffjax.guidance import tweedie_twist
from diffjax.samplers import (
    Particles,
    ddpm_kernel,
    effective_sample_size,
    final_state,
    log_evidence,
    resample,
    sample,
    tilted_cfg,
    twisted,
)
from diffjax.schedules import linear, linear_vp
from diffjax.typing import State


def with_noise(monkeypatch, sampler, log_weight=0.0):
    """`(x, z, t, s) -> (x_s, log weight)` of a step of one particle in one dimension."""

    def step(x, z, t, s):
        with monkeypatch.context() as patch:
            patch.setattr(
                jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(z, shape)
            )
            state = sampler.init(x[None, None], t)
            start = state.memory.log_weights[0]
            state = sampler.step(jax.random.key(0), state, t, s)
        return state.x[0, 0], state.memory.log_weights[0] - start

    return step


# ---- weights, resampling -------------------------------------------------------------------------


def test_the_effective_sample_size_of_equal_and_of_one():
    def weigh(w):
        return effective_sample_size(State(jnp.zeros(4), Particles(jnp.log(jnp.array(w)))))

    np.testing.assert_allclose(weigh([3.0] * 4), 4)
    np.testing.assert_allclose(weigh([0.0, 2.0, 0.0, 0.0]), 1)
    np.testing.assert_allclose(weigh([1.0, 2.0, 3.0, 4.0]), 100 / 30)


def test_a_particle_is_drawn_as_often_as_its_weight_says():
    weights = np.array([0.05, 0.3, 0.0, 0.45, 0.2])
    state = State(jnp.arange(5.0), Particles(jnp.log(jnp.asarray(7 * weights))))
    draws = jax.vmap(resample, in_axes=(0, None))(jax.random.split(jax.random.key(0), 2000), state)
    counts = np.stack([(draws == i).sum(1) for i in range(5)], 1)
    assert (counts >= np.floor(5 * weights)).all() and (counts <= np.ceil(5 * weights)).all()
    # each count has two values: the standard error of its mean is at most 1/2 over root n
    assert abs(counts.mean(0) - 5 * weights).max() < 4 * 0.5 / np.sqrt(2000)


def test_resampling_in_a_step_keeps_the_mean_of_the_weights():
    # a step without noise, guidance or gain of weight: only the drawing anew is left
    schedule = linear()
    point = gaussian(jnp.zeros(1), jnp.zeros((1, 1)), schedule)
    sampler = twisted(point, schedule, lambda x, t: 0.0 * x.sum(), 2.0)
    state = sampler.init(jnp.array([[1.0], [2.0], [3.0], [4.0]]), 0.5)
    weights = jnp.log(jnp.array([1.0, 2.0, 3.0, 10.0]))
    state = State(state.x, state.memory._replace(log_weights=weights))
    after = sampler.step(jax.random.key(0), state, 0.5, 0.0)
    np.testing.assert_allclose(jnp.exp(after.memory.log_weights), 4.0, rtol=1e-12)
    np.testing.assert_allclose(log_evidence(after), np.log(4.0), rtol=1e-12)
    kept = twisted(point, schedule, lambda x, t: 0.0 * x.sum(), 0.0).step(
        jax.random.key(0), state, 0.5, 0.0
    )
    np.testing.assert_allclose(kept.memory.log_weights, weights)


# ---- twisted sequential Monte Carlo --------------------------------------------------------------

NOISE, OBSERVED = 0.5, 1.0


def prior_of(schedule):
    return gaussian(jnp.zeros(1), jnp.eye(1), schedule)


def chain_evidence(ts, alpha_sigma):
    """p(y) under the discrete ancestral chain of N(0, 1), whose marginals are Gaussian."""
    mean, var = 0.0, alpha_sigma(ts[0])[1] ** 2
    for t, s in itertools.pairwise(ts):
        (a, b), (a_s, b_s) = alpha_sigma(t), alpha_sigma(s)
        rest = 1 - (a * b_s / (b * a_s)) ** 2
        slope = a / a_s * (b_s / b) ** 2 + a_s * rest * a / (a**2 + b**2)
        mean, var = slope * mean, slope**2 * var + b_s**2 * rest
    return scipy.stats.norm.pdf(OBSERVED, mean, np.sqrt(var + NOISE**2))


def log_twists(schedule):
    prior = prior_of(schedule)
    tweedie = tweedie_twist(prior, schedule, lambda x: x, jnp.array([OBSERVED]), NOISE)

    def crude(x, t):  # half of the likelihood's logarithm, at the data all of it
        return tweedie(x, t) * jnp.where(t > 0, 0.5, 1.0)

    return {
        "tweedie": tweedie,
        "crude": crude,
        "none": lambda x, t: jnp.where(
            t > 0, 0.0 * x[0], jax.scipy.stats.norm.logpdf(OBSERVED, x[0], NOISE)
        ),
    }


@pytest.mark.parametrize(
    ("name", "start"), [("tweedie", 1.0), ("tweedie", 0.95), ("crude", 0.95), ("none", 1.0)]
)
def test_the_evidence_is_unbiased_by_quadrature(monkeypatch, name, start):
    """E[product of the weights] of one particle, from the end backward. Each conditional
    expectation is an exponential of a quadratic polynomial of x, as the data are Gaussian.
    """
    schedule, ts = linear(), np.linspace(start, 0.0, 6)
    log_twist = log_twists(schedule)[name]
    step = with_noise(monkeypatch, twisted(prior_of(schedule), schedule, log_twist, 0.0))
    nodes, masses = np.polynomial.hermite_e.hermegauss(60)
    masses = masses / masses.sum()
    points = np.array([-1.0, 0.0, 1.0])
    step = jax.jit(jax.vmap(jax.vmap(step, (None, 0, None, None)), (0, None, None, None)))
    log_value = np.poly1d([0.0])
    for t, s in zip(ts[-2::-1], ts[:0:-1], strict=True):
        x, log_weight = step(points, nodes, t, s)
        log_value = np.poly1d(
            np.polyfit(points, np.log(np.exp(log_weight + log_value(x)) @ masses), 2)
        )
    x = start * nodes  # the prior N(0, sigma^2)
    begin = np.array([float(log_twist(jnp.array([v]), start)) for v in x])
    expected = chain_evidence(ts, lambda t: (1 - t, t))
    np.testing.assert_allclose(np.exp(begin + log_value(x)) @ masses, expected, rtol=1e-6)


def test_the_particles_follow_the_posterior_of_a_mixture():
    schedule = linear()
    weights, means = jnp.array([0.3, 0.7]), jnp.array([[1.0, 0.5], [-1.0, 0.0]])
    covs = jnp.stack([0.2 * jnp.eye(2), jnp.array([[0.3, 0.1], [0.1, 0.2]])])
    prior = gaussian_mixture(weights, means, covs, schedule)
    y = jnp.array([0.3])
    log_twist = tweedie_twist(prior, schedule, lambda x: x[:1], y, 0.4)
    x = jax.random.normal(jax.random.key(0), (4000, 2))
    state = final_state(
        jax.random.key(1), twisted(prior, schedule, log_twist), x, grids.uniform(80)
    )
    (w, m, c), log_p = conditioned_mixture(
        weights, means, covs, np.array([[1.0, 0.0]]), y, 0.16 * np.eye(1)
    )
    mean = w @ m
    second = jnp.einsum("k,kij->ij", w, c + m[:, :, None] * m[:, None])
    cov = second - jnp.outer(mean, mean)
    share = jax.nn.softmax(state.memory.log_weights)
    size = float(effective_sample_size(state))
    assert size > 500
    got = share @ state.x
    error = np.sqrt(np.diag(cov) / size)
    # 5 standard errors, and a bias of the grid of at most 0.02
    assert (abs(got - mean) < 5 * error + 0.02).all()
    off = np.asarray(state.x) - np.asarray(got)
    got_cov = jnp.einsum("p,pi,pj->ij", share, off, off)
    assert abs(got_cov - cov).max() < 0.05
    assert abs(log_evidence(state) - log_p) < 0.05


def test_without_a_twist_a_step_is_ancestral(monkeypatch):
    schedule, t, s = linear(), 0.7, 0.4
    sampler = twisted(prior_of(schedule), schedule, lambda x, t: 0.0 * x[0])
    mean, std = ddpm_kernel(prior_of(schedule), schedule)(jnp.array([0.3]), t, s)
    for z in (0.0, 1.0, -2.0):
        x, log_weight = with_noise(monkeypatch, sampler)(jnp.array(0.3), z, t, s)
        np.testing.assert_allclose(x, mean[0] + std * z, rtol=1e-12)
        assert log_weight == 0


def test_a_particle_at_which_the_twist_is_0_keeps_the_weight_0():
    schedule = linear()
    ts, x = grids.uniform(5), jax.random.normal(jax.random.key(0), (1000, 1))

    def positive(x, t):
        return jnp.where(x[0] > 0, 0.0, -jnp.inf)

    state = final_state(
        jax.random.key(0), twisted(prior_of(schedule), schedule, positive, 0.0), x, ts
    )
    log_weights = np.asarray(state.memory.log_weights)
    assert not np.isnan(log_weights).any() and np.isneginf(log_weights).any()
    assert (resample(jax.random.key(1), state) > 0).all()


def test_weights_that_are_all_0_are_an_error():
    state = State(jnp.zeros((3, 1)), Particles(jnp.full(3, -jnp.inf)))
    for read in (effective_sample_size, log_evidence, lambda s: resample(jax.random.key(0), s)):
        with pytest.raises(ValueError, match="log_weights: expected numbers, and at least one"):
            read(state)


@pytest.mark.usefixtures("without_type_checks")
def test_particles_have_an_axis_of_their_own():
    schedule = linear()
    pair = prior_of(schedule), prior_of(schedule)
    for sampler in (twisted(pair[0], schedule, lambda x, t: 0.0), tilted_cfg(*pair, schedule, 2.0)):
        with pytest.raises(ValueError, match=r"x: expected shape \(p, \*event\) for p particles"):
            sampler.init(jnp.zeros(1), 1.0)
    with pytest.raises(ValueError, match="scale: expected a number, got a function"):
        tilted_cfg(*pair, schedule, lambda t: 3.0)


def test_a_twist_of_a_wrong_shape_is_an_error():
    schedule = linear()
    sampler = twisted(prior_of(schedule), schedule, lambda x, t: x)
    with pytest.raises(ValueError, match="log_twist: expected a scalar for one particle of shape"):
        sample(jax.random.key(0), sampler, jnp.zeros((4, 1)), grids.uniform(4))
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        twisted(prior_of(schedule), schedule, lambda x, t: 0.0, -1.0)


# ---- Feynman-Kac weights -------------------------------------------------------------------------

M, V, W = 1.0, 0.25, 3.0


def tilted(mean, var, m, v, w):
    """N(mean, var)^w N(m, v)^(1 - w), normalized."""
    precision = w / var + (1 - w) / v
    return (w * mean / var + (1 - w) * m / v) / precision, 1 / precision


def test_the_weighted_particles_of_cfg_follow_the_tilted_density(monkeypatch):
    schedule = linear_vp()

    def normal(m, v):
        return gaussian(jnp.array([m]), jnp.array([[v]]), schedule)

    step = with_noise(monkeypatch, tilted_cfg(normal(M, V), normal(0.0, 1.0), schedule, W))
    each = jax.jit(jax.vmap(jax.vmap(step, (0, 0, None, None)), (None, None, 0, 0)))
    points = np.array([-1.0, 0.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0])

    def end(n):
        """The weighted law stays Gaussian: a weight exp(q x^2 + r x) changes its precision by -2q,
        then x -> A x + B + C z.
        """
        alpha, sigma = oracles.alpha_sigma("linear_vp", 1.0)

        def total(v):
            return alpha**2 * v + sigma**2

        mean, var = tilted(alpha * M, total(V), 0.0, total(1.0), W)
        ts = np.linspace(1.0, 0.0, n + 1)
        xs, weights = each(*points, ts[:-1], ts[1:])
        for (low, middle, high, noisy), log_weights in zip(
            np.asarray(xs), np.asarray(weights), strict=True
        ):
            q, r, _ = np.polyfit(points[0][:3], log_weights[:3], 2)
            precision = 1 / var - 2 * q
            mean, var = (mean / var + r) / precision, 1 / precision
            slope = (high - low) / 2
            mean, var = slope * mean + middle, slope**2 * var + (noisy - middle) ** 2
        return np.array([mean, var])

    ends = {n: end(n) for n in (500, 1000, 2000, 4000)}
    expected = np.array(tilted(M, V, 0.0, 1.0, W))
    np.testing.assert_allclose(expected, (1.2, 0.1))
    errors = [abs(ends[n] - expected).max() for n in ends]
    assert abs(oracles.fitted_order(list(ends), errors) - 1) < 0.1, errors
    # Richardson's extrapolation of an error in powers of 1 / n
    table = list(ends.values())
    for k in (1, 2, 3):
        table = [(2**k * b - a) / (2**k - 1) for a, b in itertools.pairwise(table)]
    np.testing.assert_allclose(table[0], expected, atol=1e-6)


def test_scales_0_and_1_need_no_weights():
    schedule, x = linear_vp(), jax.random.normal(jax.random.key(0), (6, 1))

    def normal(m, v):
        return gaussian(jnp.array([m]), jnp.array([[v]]), schedule)

    for scale in (0.0, 1.0):
        sampler = tilted_cfg(normal(M, V), normal(0.0, 1.0), schedule, scale)
        state = final_state(jax.random.key(0), sampler, x, grids.uniform(5))
        np.testing.assert_array_equal(state.memory.log_weights, 0.0)


def test_particles_are_mapped_over_scales_and_differentiated():
    schedule, x, ts = linear_vp(), jax.random.normal(jax.random.key(0), (6, 1)), grids.uniform(5)

    def normal(m, v):
        return gaussian(jnp.array([m]), jnp.array([[v]]), schedule)

    def end(scale):
        sampler = tilted_cfg(normal(M, V), normal(0.0, 1.0), schedule, scale, 0.0)
        return final_state(jax.random.key(0), sampler, x, ts)

    scales = jnp.array([1.5, 3.0])
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[1], jax.vmap(end)(scales)), end(scales[1]), rtol=1e-10
    )

    def log_z(scale):
        return log_evidence(end(scale))

    slope = (log_z(2.0 + 1e-5) - log_z(2.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(log_z)(2.0), slope, rtol=1e-6)
