"""Classifier-free guidance of Gaussians: the guided score is that of a Gaussian again (1.39)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind, schedules
from diffjax.exact import gaussian
from diffjax.guidance import cfg, composed, interval
from diffjax.parametrizations import EPS, X0, as_denoiser, score

PATH = schedules.linear(), X0


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


def _conditional(w, x, t, cond):
    network = bind(lambda w, x, t: jnp.tanh(w @ x) + cond["shift"].sum() - cond["label"], w)
    return as_denoiser(network, schedules.linear(), X0)(x, t)


def test_denoisers_that_differ_in_the_condition_are_called_once():
    w, x = 0.1 * jnp.eye(3), jnp.arange(3.0)
    cond, null = {"label": 3, "shift": jnp.ones(2)}, {"label": 10, "shift": jnp.zeros(2)}
    once = cfg(*(bind(_conditional, w, cond=c) for c in (cond, null)), 1.7)
    # equal, but not the same array: for all that is known, two networks
    twice = cfg(bind(_conditional, w, cond=cond), bind(_conditional, w + 0, cond=null), 1.7)
    chex.assert_trees_all_close(once(x, 0.4), twice(x, 0.4), rtol=1e-12)
    assert [str(jax.make_jaxpr(f)(x, 0.4)).count("dot_general") for f in (once, twice)] == [1, 2]


def test_the_condition_of_a_network_within_a_denoiser_counts_as_well():
    def network(w, x, t, cond):
        return jnp.tanh(w @ x) + cond

    def guided(w, x):
        labels = 3, 10
        denoisers = (
            as_denoiser(bind(network, w, cond=c), schedules.linear_vp(), EPS) for c in labels
        )
        return cfg(*denoisers, 2.0)(x, 0.5)

    assert str(jax.make_jaxpr(guided)(jnp.eye(3), jnp.ones(3))).count("dot_general") == 1


@pytest.mark.parametrize(
    "null",
    [{"label": np.zeros(2)}, {"label": 3, "shift": 1.0}, {"label": np.float32(3.0)}],
    ids=["shape", "structure", "dtype"],
)
def test_conditions_of_another_shape_structure_or_dtype_are_called_in_turn(null):
    def denoise(w, x, t, cond):
        return as_denoiser(lambda x, t: w @ x + sum(map(jnp.sum, cond.values())), *PATH)(x, t)

    w, x = jnp.eye(3), jnp.arange(3.0)
    c, u = (bind(denoise, w, cond=c) for c in ({"label": 3}, null))
    assert str(jax.make_jaxpr(cfg(c, u, 2.0))(x, 0.4)).count("dot_general") == 2
    chex.assert_trees_all_close(
        cfg(c, u, 2.0)(x, 0.4), jax.tree.map(lambda c, u: 2 * c - u, c(x, 0.4), u(x, 0.4))
    )


def test_several_conditions_are_composed():
    schedule, x = schedules.linear(), jnp.arange(3.0)
    several = [gaussian(mean * jnp.ones(3), jnp.eye(3), schedule) for mean in (1.0, -2.0, 0.5)]
    *conditionals, u = [denoise(x, 0.3) for denoise in several]
    expected = jax.tree.map(lambda u, a, b: u + 2.0 * (a - u) - 0.7 * (b - u), u, *conditionals)
    got = composed(several[:2], several[2], [2.0, -0.7])(x, 0.3)
    chex.assert_trees_all_close(got, expected, rtol=1e-14)
    one = composed(several[:1], several[2], [2.0])
    chex.assert_trees_all_equal(one(x, 0.3), cfg(several[0], several[2], 2.0)(x, 0.3))


def test_independent_conditions_compose_to_their_product_at_clean_data_only():
    # p(x | a, b) ~ p(x | a) p(x | b) / p(x): variances 1/a = 1/va + 1/vb - 1
    schedule, x = schedules.linear_vp(), jnp.array([0.4])
    (ma, va), (mb, vb) = (0.8, 0.3), (-0.5, 0.6)
    v = 1 / (1 / va + 1 / vb - 1)
    m = v * (ma / va + mb / vb)

    def one(m, v):
        return gaussian(jnp.array([m]), jnp.array([[v]]), schedule)

    got = composed([one(ma, va), one(mb, vb)], one(0.0, 1.0), [1.0, 1.0])
    errors = [
        abs(float((score(got, schedule, x, t) - score(one(m, v), schedule, x, t))[0]))
        for t in (1e-3, 1e-4, 0.5)
    ]
    assert errors[1] < 1e-4 and errors[0] / errors[1] > 5 and errors[2] > 0.02


@pytest.mark.parametrize("scales", [[], [1.0], [1.0, 2.0, 3.0]])
def test_one_scale_for_each_condition(scales):
    c, u = _two(schedules.linear())
    with pytest.raises(ValueError, match="scales: expected one for each of the conditionals"):
        composed([] if not scales else [c, c], u, scales)


def test_a_scale_may_be_a_function_of_time():
    schedule, x = schedules.linear(), jnp.arange(3.0)
    guided = cfg(*_two(schedule), bind(lambda a, t: 1 + a * t, 4.0))
    for t in (0.2, 0.7):
        chex.assert_trees_all_close(guided(x, t), cfg(*_two(schedule), 1 + 4 * t)(x, t), rtol=1e-14)
    slope = jax.grad(lambda guided: guided(x, 0.5).x0.sum())(guided)
    c, u = (denoise(x, 0.5).x0.sum() for denoise in _two(schedule))
    assert any(np.isclose(g, 0.5 * (c - u)) for g in jax.tree.leaves(slope) if jnp.ndim(g) == 0)


def test_guidance_in_an_interval_evaluates_one_side():
    schedule, x = schedules.linear(), jnp.arange(3.0)
    calls = []

    def counted(name, denoise):
        def call(x, t):
            jax.debug.callback(lambda: calls.append(name))
            return denoise(x, t)

        return call

    c, u = _two(schedule)
    denoise = jax.jit(
        interval(counted("cfg", cfg(c, u, 3.0)), counted("c", c), schedule, -1.0, 1.0)
    )
    # log(alpha / sigma) = log((1 - t) / t): 2.2, 0.85, 0, -1.4; 1 itself is inside, -1 is not
    at = {0.1: "c", 0.3: "cfg", 0.5: "cfg", 0.8: "c"}
    for t, name in at.items():
        expected = (cfg(c, u, 3.0) if name == "cfg" else c)(x, t)
        chex.assert_trees_all_close(denoise(x, t), expected, rtol=1e-14)
    jax.effects_barrier()
    assert calls == list(at.values())


def test_the_ends_of_the_interval():
    schedule, x = schedules.gvp(), jnp.arange(3.0)
    c, u = _two(schedule)
    level = float(schedules.half_log_snr(schedule, 0.4))
    for low, high, guided in ((level, level + 1, False), (level - 1, level, True)):
        denoise = interval(cfg(c, u, 3.0), c, schedule, low, high)
        chex.assert_trees_all_close(denoise(x, 0.4), (cfg(c, u, 3.0) if guided else c)(x, 0.4))
    everywhere = interval(cfg(c, u, 3.0), c, schedule, -jnp.inf, jnp.inf)
    for t in (0.0, 1.0):
        chex.assert_trees_all_close(everywhere(x, t), cfg(c, u, 3.0)(x, t))


def test_bounds_of_the_interval_are_ordered_numbers():
    c, u = _two(schedules.linear())
    with pytest.raises(ValueError, match=r"low, high: expected low < high, got low=2.0, high=-2.0"):
        interval(c, u, schedules.linear(), 2.0, -2.0)
    with pytest.raises(ValueError, match=r"low: expected a scalar, got shape \(2,\)"):
        interval(c, u, schedules.linear(), -jnp.ones(2), 2.0)(jnp.zeros(3), 0.5)


# (3,) would broadcast to x, along the wrong axis
@pytest.mark.parametrize(
    ("shape", "x"), [((3,), (2, 3)), ((2, 3, 1), (2, 3)), ((2, 3), (2, 3)), ((3,), (3,))]
)
def test_a_scale_that_does_not_fit_x_is_an_error(shape, x):
    guided = cfg(*_two(schedules.linear()), jnp.ones(shape))
    with pytest.raises(ValueError, match=r"scale: expected a scalar.*got shape.*vmap"):
        jax.jit(guided)(jnp.zeros(x), 0.5)
