"""Samplers on Gaussian data, whose flow map and whose mean and variance at every time are known in
closed form.

Stochastic steps are affine in x and in their noise there, so mean and variance are propagated
exactly: the noise is replaced by a variable, the coefficients read off by a Jacobian, and no sample
is ever drawn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind
from diffjax.exact import gaussian
from diffjax.grids import uniform
from diffjax.guidance import cfg
from diffjax.parametrizations import X0, as_denoiser
from diffjax.samplers import (
    bridge_sampler,
    checkpointed_scan,
    ddim,
    ddpm,
    edm_sampler,
    euler,
    euler_maruyama,
    heun,
    predictor_corrector,
    sample,
    trajectory,
    truncated_scan,
)
from diffjax.schedules import (
    coefficients,
    diffusion,
    edm,
    gvp,
    half_log_snr,
    half_log_snr_inverse,
    linear,
    linear_vp,
    ve,
)
from diffjax.typing import State

M, V = np.array([0.7, -0.4]), np.array([0.3, 2.0])
X1 = np.array([0.9, -1.3])
PATHS = {
    "linear_vp": linear_vp,
    "linear": linear,
    "gvp": gvp,
    "edm": lambda: edm(4.0),
    "ve": lambda: ve(0.1, 4.0),
}


def data(schedule, m=M, v=V):
    return gaussian(jnp.asarray(m), jnp.diag(jnp.asarray(v)), schedule)


def ends(schedule, ts):
    return tuple(tuple(float(c) for c in coefficients(schedule, t)[:2]) for t in (ts[0], ts[-1]))


# ---- deterministic samplers ----------------------------------------------------------------------

DETERMINISTIC = {
    "ddim": (ddim, 1),
    "euler": (euler, 1),
    "heun": (heun, 2),
    "edm_sampler": (edm_sampler, 2),
}
# The first time is below 1 where alpha must not vanish, the last above 0 where sigma ~ sqrt(t) is
# not smooth in t.
SPANS = {
    "linear_vp": (1.0, 0.05),
    "linear": (1.0, 0.0),
    "gvp": (1.0, 0.0),
    "edm": (1.0, 0.0),
    "ve": (1.0, 0.0),
}


@jax.jit
def run_all(sampler, x, grids):
    return jax.vmap(lambda ts: sample(jax.random.key(0), sampler, x, ts))(grids)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_order_and_limit_of_deterministic_samplers(method, path):
    make, order = DETERMINISTIC[method]
    start, end = SPANS[path]
    if method == "edm_sampler" and path in ("linear", "gvp"):
        start = 0.9
    schedule = PATHS[path]()
    steps = np.array([64, 128, 256])
    # one program: the shorter grids stand still at their end, where a step from t to t is the
    # identity
    grids = np.stack(
        [np.pad(np.linspace(start, end, n + 1), (0, steps[-1] - n), mode="edge") for n in steps]
    )
    sampler = make(data(schedule), schedule)
    results = np.asarray(run_all(sampler, jnp.asarray(X1), grids))
    exact = oracles.gaussian_flow(M, V, *ends(schedule, grids[0]), X1)
    errors = np.linalg.norm(results - exact, axis=1)
    # steps of 1/64 to 1/256 are small enough for the leading term to show the order within 0.15
    assert abs(oracles.fitted_order(steps, errors) - order) < 0.15, errors
    assert errors[-1] < {1: 3e-2, 2: 2e-3}[order]


def test_on_a_single_point_ddim_is_exact_in_one_step():
    # a point stays a point: its flow is a straight line in (alpha, sigma)
    for make in (linear_vp, linear, gvp, functools.partial(edm, 80.0)):
        schedule = make()
        x = sample(
            jax.random.key(0),
            ddim(data(schedule, v=np.zeros(2)), schedule),
            jnp.asarray(X1),
            jnp.array([1.0, 0.0]),
        )
        np.testing.assert_allclose(x, M, rtol=1e-12)


def test_ddim_on_the_linear_path_is_euler():
    schedule, ts = linear(), uniform(5)
    by_ddim, by_euler = (
        trajectory(jax.random.key(0), make(data(schedule), schedule), jnp.asarray(X1), ts)
        for make in (ddim, euler)
    )
    np.testing.assert_allclose(by_ddim, by_euler, rtol=1e-12)


def test_ddim_is_dpm_solver_1():
    # (1.56) in its own variables: (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps
    schedule, t, s = linear_vp(), 0.7, 0.4
    denoise = data(schedule)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        oracles.alpha_sigma("linear_vp", t),
        oracles.alpha_sigma("linear_vp", s),
    )
    h = np.log(alpha_s / sigma_s) - np.log(alpha_t / sigma_t)
    eps = -sigma_t * oracles.gaussian_score(M, V, alpha_t, sigma_t, X1)
    expected = alpha_s / alpha_t * X1 - sigma_s * np.expm1(h) * eps
    sampler = ddim(denoise, schedule)
    np.testing.assert_allclose(
        sampler.step(None, sampler.init(jnp.asarray(X1), t), t, s).x, expected, rtol=1e-11
    )


@pytest.mark.parametrize("make", [ddim, edm_sampler])
def test_vp_and_ve_runs_are_one_run_rescaled(make):
    # at equal log-SNR the noisy data of two paths differ by the factor alpha alone
    vp, other = linear_vp(), edm(200.0)
    ts = uniform(6, end=0.01)
    match = jax.jit(jax.vmap(lambda t: half_log_snr_inverse(other, half_log_snr(vp, t))))(ts)
    alphas = np.asarray(jax.vmap(vp)(ts)[0])[:, None]
    on_vp = trajectory(jax.random.key(0), make(data(vp), vp), jnp.asarray(X1), ts)
    on_edm = trajectory(
        jax.random.key(0), make(data(other), other), jnp.asarray(X1 / alphas[0]), match
    )
    np.testing.assert_allclose(np.asarray(on_vp) / alphas, on_edm, rtol=1e-9)


def test_guidance_of_scale_one_is_conditional_and_zero_unconditional():
    schedule, ts = linear(), uniform(4)
    conditional, unconditional = data(schedule), data(schedule, m=-M)

    def run(denoise):
        return sample(jax.random.key(0), ddim(denoise, schedule), jnp.asarray(X1), ts)

    np.testing.assert_allclose(
        run(cfg(conditional, unconditional, 1.0)), run(conditional), rtol=1e-13
    )
    np.testing.assert_allclose(
        run(cfg(conditional, unconditional, 0.0)), run(unconditional), rtol=1e-13
    )


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_deterministic_samplers_draw_no_noise(method):
    schedule = linear_vp()
    sampler, ts = DETERMINISTIC[method][0](data(schedule), schedule), uniform(3, end=0.1)
    traced = jax.jit(sample).trace(jax.random.key(0), sampler, jnp.asarray(X1), ts)
    assert "random_bits" not in str(traced.jaxpr)
    compiled = traced.lower().compile().as_text()
    # nor does fold_in survive compilation
    assert " xor(" not in compiled and "threefry" not in compiled


def test_a_compiled_sampler_holds_the_network_once():
    def network(w, x, t):
        return w @ x

    schedule, w = linear(), jnp.eye(2)
    churned = functools.partial(edm_sampler, churn=0.2)
    for make in (
        ddim,
        functools.partial(ddim, eta=0.5),
        ddpm,
        euler,
        euler_maruyama,
        heun,
        edm_sampler,
        churned,
    ):
        sampler = make(as_denoiser(bind(network, w), schedule, X0), schedule)
        jaxpr = str(
            jax.make_jaxpr(sample)(
                jax.random.key(0), sampler, jnp.asarray(X1), uniform(50, start=0.9)
            )
        )
        assert jaxpr.count("dot_general") == 1


# ---- stochastic samplers: mean and variance, exactly ---------------------------------------------


def affine(monkeypatch, sampler, grids):
    """Of the step x_s = A x + B + C z on one-dimensional data: A, B, |C|^2 for every step of every
    grid.
    """

    def step(inputs, t, s):
        x, zs = inputs
        with monkeypatch.context() as patch:  # the noise in place of its keys
            patch.setattr(jax.random, "fold_in", lambda zs, i: zs[i])
            patch.setattr(
                jax.random,
                "normal",
                lambda z, shape, dtype=float: jnp.broadcast_to(jnp.ravel(z)[0], shape),
            )
            return sampler.step(zs, sampler.init(x, t), t, s).x

    @jax.jit
    @jax.vmap
    def coefficients_of(t, s):
        zero = jnp.zeros(1), jnp.zeros(3)
        slope, noise = jax.jacfwd(step)(zero, t, s)
        return slope[0, 0], step(zero, t, s)[0], jnp.sum(noise[0] ** 2)

    pairs = [np.stack([ts[:-1], ts[1:]]) for ts in grids]
    flat = np.asarray(coefficients_of(*map(jnp.asarray, np.concatenate(pairs, axis=1))))
    return np.split(flat, np.cumsum([p.shape[1] for p in pairs])[:-1], axis=1)


def moments(schedule, t, m, v):
    alpha, sigma = (float(c) for c in schedule(jnp.asarray(t)))
    mean, variance = oracles.gaussian_marginal(m, v, alpha, sigma)
    return np.array([mean, variance])


def errors_of(monkeypatch, sampler, schedule, grids, m, v):
    errors = []
    for ts, steps in zip(grids, affine(monkeypatch, sampler, grids), strict=True):
        mean, variance = moments(schedule, ts[0], m, v)
        for a, b, c2 in steps.T:
            mean, variance = a * mean + b, a**2 * variance + c2
        errors.append(np.abs(np.array([mean, variance]) - moments(schedule, ts[-1], m, v)).sum())
    return np.array(errors)


def half_diffusion(schedule, t):
    return 0.5 * diffusion(schedule, t)


def sigma_of(schedule, t):
    return schedule(t)[1]


STOCHASTIC = {
    "ddpm": ddpm,
    "ddim(1)": functools.partial(ddim, eta=1.0),
    "ddim(0.4)": functools.partial(ddim, eta=0.4),
    "euler_maruyama": euler_maruyama,
    "euler_maruyama half": functools.partial(euler_maruyama, amplitude=half_diffusion),
    "euler_maruyama sigma": functools.partial(euler_maruyama, amplitude=sigma_of),
}


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
@pytest.mark.parametrize("method", STOCHASTIC)
def test_mean_and_variance_converge_to_the_datas(monkeypatch, method, path):
    schedule = PATHS[path]()
    # g is infinite where alpha is 0
    start = 0.9 if path == "linear" and method.startswith("euler") else 1.0
    # on edm with a = g the first order vanishes at t = 0
    end = {"linear_vp": 0.05, "linear": 0.0, "edm": 0.25}[path]
    m, v = 0.7, 0.3
    steps = np.array([128, 256, 512, 1024])
    grids = [np.linspace(start, end, n + 1) for n in steps]
    sampler = STOCHASTIC[method](data(schedule, [m], [v]), schedule)
    errors = errors_of(monkeypatch, sampler, schedule, grids, m, v)
    assert errors[-1] < 0.02
    # weak order 1: at these steps the next term moves the slope by at most 0.2
    assert abs(oracles.fitted_order(steps, errors) - 1) < 0.2, errors


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
        match="predictor: expected a kernel that evaluates the denoiser only at its own x",
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


def test_ddim_of_eta_one_is_ddpm():
    schedule = linear_vp()
    for t, s in ((1.0, 0.6), (0.3, 0.1), (0.1, 0.0)):
        a, b = (
            sampler.step(jax.random.key(7), sampler.init(jnp.asarray(X1), t), t, s).x
            for sampler in (ddim(data(schedule), schedule, eta=1.0), ddpm(data(schedule), schedule))
        )
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_ddim_of_a_traced_zero_is_the_deterministic_one():
    schedule = linear_vp()
    step = ddim(data(schedule), schedule).step(None, State(jnp.asarray(X1)), 0.5, 0.3).x
    for eta in (jnp.zeros(()), 0.0):
        traced = jax.jit(
            lambda e: (
                ddim(data(schedule), schedule, e)
                .step(jax.random.key(0), State(jnp.asarray(X1)), 0.5, 0.3)
                .x
            )
        )(eta)
        np.testing.assert_allclose(traced, step, rtol=1e-12)


def test_eta_shrinks_the_deterministic_noise(monkeypatch):
    # the total noise at s is sigma_s for every eta: on data of one point m, x_s ~ N(alpha_s m,
    # sigma_s^2) exactly
    schedule, m = linear_vp(), 0.7
    for eta in (0.0, 0.3, 1.0):
        sampler = (
            ddim(data(schedule, [m], [0.0]), schedule, jnp.asarray(eta))
            if eta
            else ddim(data(schedule, [m], [0.0]), schedule)
        )
        assert (
            errors_of(monkeypatch, sampler, schedule, [np.array([0.9, 0.6, 0.2])], m, 0.0)[0]
            < 1e-12
        )


# ---- the engine ----------------------------------------------------------------------------------


def stochastic_samplers(schedule):
    denoise = data(schedule)
    return {
        "ddpm": ddpm(denoise, schedule),
        "ddim": ddim(denoise, schedule, 0.5),
        "euler_maruyama": euler_maruyama(denoise, schedule),
        "edm": edm_sampler(denoise, schedule, 0.3),
        "predictor_corrector": predictor_corrector(denoise, schedule),
    }


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler_maruyama", "edm", "predictor_corrector"])
def test_a_sample_does_not_depend_on_its_batch(name):
    # one key a sample: alone or among others, to the last digits of a differently vectorised
    # program
    schedule = linear_vp()
    sampler, ts = stochastic_samplers(schedule)[name], uniform(4, end=0.05)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(sample, in_axes=(0, None, 0, None)))(keys, sampler, xs, ts)
    with jax.debug_key_reuse(False):
        alone = jax.jit(jax.vmap(sample, in_axes=(0, None, 0, None)))(
            keys[1:2], sampler, xs[1:2], ts
        )
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-10)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_a_deterministic_batch_is_its_samples(method):
    schedule = linear_vp()
    sampler, ts = DETERMINISTIC[method][0](data(schedule), schedule), uniform(4, end=0.05)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    run = jax.jit(sample)
    together = run(jax.random.key(0), sampler, xs, ts)
    np.testing.assert_allclose(
        together, [run(jax.random.key(0), sampler, x, ts) for x in xs], rtol=1e-12
    )


@pytest.mark.parametrize("scan", [jax.lax.scan, checkpointed_scan, truncated_scan(2)])
def test_the_last_point_of_a_trajectory_is_the_sample(scan):
    schedule, ts = linear_vp(), uniform(7, end=0.05)
    sampler = ddpm(data(schedule), schedule)
    xs = jax.jit(lambda key: trajectory(key, sampler, jnp.asarray(X1), ts, scan))(jax.random.key(0))
    x = jax.jit(lambda key: sample(key, sampler, jnp.asarray(X1), ts, scan))(jax.random.key(0))
    plain = jax.jit(lambda key: sample(key, sampler, jnp.asarray(X1), ts))(jax.random.key(0))
    assert xs.shape == (8, 2)
    np.testing.assert_array_equal(xs[0], X1)
    np.testing.assert_allclose(xs[-1], x, rtol=1e-12)
    np.testing.assert_allclose(x, plain, rtol=1e-12)


ENDS = {
    "ddim": (ddim, ["linear_vp", "linear", "gvp", "edm"]),
    "ddim(0.5)": (functools.partial(ddim, eta=0.5), ["linear_vp", "linear", "gvp", "edm"]),
    "ddpm": (ddpm, ["linear_vp", "linear", "gvp", "edm"]),
    "euler": (euler, ["linear", "gvp", "edm"]),
    "heun": (heun, ["linear", "gvp", "edm"]),
    "edm_sampler": (edm_sampler, ["linear_vp", "edm"]),
    "edm_sampler(0.2)": (functools.partial(edm_sampler, churn=0.2), ["linear_vp", "edm"]),
    "euler_maruyama": (
        functools.partial(euler_maruyama, amplitude=sigma_of),
        ["linear", "gvp", "edm"],
    ),
}


@pytest.mark.parametrize(
    ("method", "path"), [(m, p) for m, (_, paths) in ENDS.items() for p in paths]
)
@pytest.mark.parametrize("dtype", [np.float32])
def test_finite_with_finite_gradients_on_the_whole_path(method, path, dtype):
    # from t = 1, where alpha may be 0, to t = 0, where sigma is 0: values and gradients by x, the
    # path, and the grid
    def loss(schedule, x, inner):
        ts = jnp.concatenate([jnp.ones(1, dtype), inner, jnp.zeros(1, dtype)])
        denoise = gaussian(jnp.asarray(M, dtype), jnp.diag(jnp.asarray(V, dtype)), schedule)
        return jnp.sum(sample(jax.random.key(0), ENDS[method][0](denoise, schedule), x, ts))

    schedule = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PATHS[path]())
    values = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
        schedule, jnp.asarray(X1, dtype), jnp.array([0.7, 0.3], dtype)
    )
    assert all(
        leaf.dtype == dtype and np.isfinite(leaf).all() for leaf in jax.tree.leaves(values)
    ), values


def linear_network(w, x, t):
    return w * x * t


def loss_of(scan, w, x, ts):
    schedule = linear()
    sampler = ddim(as_denoiser(bind(linear_network, w), schedule, X0), schedule)
    return jnp.sum(sample(jax.random.key(0), sampler, x, ts, scan) ** 2)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9, 12])
def test_checkpointing_does_not_change_gradients(n):
    ts = uniform(n, end=0.1)
    full, checkpointed = (
        jax.jit(jax.grad(functools.partial(loss_of, scan), argnums=(0, 1, 2)))(
            0.3, jnp.asarray(X1), ts
        )
        for scan in (jax.lax.scan, checkpointed_scan)
    )
    for a, b in zip(full, checkpointed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("last", [0, 2, 9])
def test_truncation_is_the_gradient_of_the_last_steps(last):
    ts = uniform(6, end=0.1)
    first = max(6 - last, 0)
    middle = loss_free = jnp.asarray(X1)
    if first:
        sampler = ddim(as_denoiser(bind(linear_network, 0.3), linear(), X0), linear())
        middle = sample(jax.random.key(0), sampler, loss_free, ts[: first + 1])

    def rest(w):
        return loss_of(jax.lax.scan, w, middle, ts[first:]) if last else jnp.sum(middle**2)

    value, gradient = jax.value_and_grad(
        functools.partial(loss_of, truncated_scan(last)), argnums=(0, 1)
    )(0.3, jnp.asarray(X1), ts)
    np.testing.assert_allclose(value, rest(0.3), rtol=1e-12)
    np.testing.assert_allclose(gradient[0], jax.grad(rest)(0.3), rtol=1e-12, atol=0)
    if last < 6:
        np.testing.assert_array_equal(gradient[1], 0.0)
    else:
        assert np.all(np.asarray(gradient[1]) != 0)


def temporary_bytes(scan, n):
    x, ts = jax.ShapeDtypeStruct((4096,), np.float64), jax.ShapeDtypeStruct((n + 1,), np.float64)
    compiled = (
        jax.jit(jax.grad(functools.partial(loss_of, scan))).lower(jnp.asarray(0.3), x, ts).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_reverse_mode():
    # in states of 4096 numbers: n of them, about 2 sqrt(n), and the last k; other buffers are a few
    # states
    growth = {
        name: temporary_bytes(scan, 1024) / temporary_bytes(scan, 256)
        for name, scan in (
            ("full", jax.lax.scan),
            ("checkpointed", checkpointed_scan),
            ("truncated", truncated_scan(4)),
        )
    }
    assert 3.5 < growth["full"] < 4.2, growth
    assert 1.5 < growth["checkpointed"] < 2.3, growth
    assert growth["truncated"] < 1.3, growth
