"""Where the mathematics is singular (alpha = 0, sigma = 0, the ends of a path): the limit, or an
error that says so.

Data are N(0, 1) in the tests of samplers, so the exact networks and the flow's map are known in
closed form.
"""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
import pytest

from diffjax import (
    bind,
    exact,
    losses,
    optimal_grids,
    parametrizations,
    process,
    samplers,
    schedules,
    solve,
    weightings,
)
from diffjax.dynamics import reverse_sde
from diffjax.grids import karras, uniform
from diffjax.guidance import clip_x0
from diffjax.parametrizations import (
    EPS,
    SCORE,
    VELOCITY,
    X0,
    V,
    as_denoiser,
    edm_preconditioning,
    score,
    velocity,
)
from diffjax.schedules import coefficients, cosine, edm, gvp, linear

KINDS = {
    "X0": X0,
    "EPS": EPS,
    "SCORE": SCORE,
    "V": V,
    "VELOCITY": VELOCITY,
    "edm": edm_preconditioning(0.5),
}
PATHS = {name: getattr(schedules, name)() for name in oracles.TABLE}
NOISE_ONLY = {"linear", "gvp", "cosine"}  # alpha(1) = 0
KEY = jax.random.key(0)


def exact_network(schedule, kind, x, t):
    """What a network learns from data of N(0, 1): x0 = alpha x / (alpha^2 + sigma^2), eps = sigma x
    / (...).
    """
    alpha, sigma, dalpha, dsigma = coefficients(schedule, t)
    x0, eps = alpha * x / (alpha**2 + sigma**2), sigma * x / (alpha**2 + sigma**2)
    return {
        "X0": lambda: x0,
        "EPS": lambda: eps,
        "SCORE": lambda: -eps / sigma,
        "V": lambda: alpha * eps - sigma * x0,
        "VELOCITY": lambda: dalpha * x0 + dsigma * eps,
    }[kind]()


def fitted(schedule, kind):
    return as_denoiser(functools.partial(exact_network, schedule, kind), schedule, KINDS[kind])


# ---- the last step, to sigma = 0 -----------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "edm", "linear_vp", "cosine", "gvp"])
def test_heun_ends_at_the_data_with_an_exact_x0_network(path):
    schedule = PATHS[path] if path != "edm" else edm(4.0)
    start = coefficients(schedule, 1.0)
    x1 = (np.linspace(-2.7, 2.7, 7) * float(start.sigma)).astype(np.float32)
    right = x1 / np.hypot(start.alpha, start.sigma)  # the flow of N(0, 1) keeps its quantiles

    # exact but for a rounding, which (x - alpha x0) / sigma would multiply by 1 / sigma
    def network(x, t):
        return exact_network(schedule, "X0", x, t) * np.float32(1 + 2**-23)

    sampler, errors = samplers.heun(as_denoiser(network, schedule, X0), schedule), []
    for n in (20, 40):
        x0 = samplers.sample(KEY, sampler, x1, uniform(n).astype(jnp.float32))
        assert x0.dtype == np.float32
        errors.append(np.abs(x0 - right).max())
    assert errors[0] < 0.12 and errors[1] < 0.06


def test_samplers_end_at_a_point_of_a_finite_data_set():
    data = np.array([[-1.0], [1.0]])
    for path in ("linear", "edm", "linear_vp"):
        schedule, x1 = (
            PATHS[path],
            np.array([[2.0], [-0.5]]) * float(PATHS[path](jnp.asarray(1.0))[1]),
        )
        denoise = exact.empirical(data, schedule)
        ts = uniform(20, start=0.99) if path != "edm" else karras(schedule, 20)
        by_heun, by_edm = (
            samplers.sample(KEY, make(denoise, schedule), x1, ts)
            for make in (samplers.heun, samplers.edm_sampler)
        )
        np.testing.assert_allclose(by_edm, data[::-1], atol=1e-6)
        # Heun's last step takes sigma as a straight line in t, which it is not on the VP path:
        # sigma(0.05) is 0.17
        np.testing.assert_allclose(by_heun, data[::-1], atol=0.05 if path == "linear_vp" else 1e-6)


def test_a_finite_data_set_has_its_noise_estimate_at_t_0():
    # (x - x0) / sigma at the nearest point x0: 0 on the point, infinite beside it
    eps = exact.empirical(np.array([[-1.0], [1.0]]), linear())(
        jnp.array([[1.0], [1.5], [-1.5]]), 0.0
    ).eps
    np.testing.assert_array_equal(eps, [[0.0], [np.inf], [-np.inf]])


def test_langevin_corrections_evaluate_where_the_predictor_does():
    seen = []

    def network(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return 0.0 * x

    schedule = linear()
    denoise = as_denoiser(network, schedule, edm_preconditioning(0.5))
    sampler = samplers.predictor_corrector(denoise, schedule, bind(samplers.ddim_kernel, eta=0.0))
    state = sampler.init(jnp.ones(2), 0.5)
    ended = sampler.step(jax.random.key(0), state, 0.5, 0.0).x
    jax.effects_barrier()
    assert np.isfinite(seen).all() and len(seen) == 2 and len(set(seen)) == 1
    # at sigma = 0 the correction is none: x is that of the predictor
    np.testing.assert_allclose(
        ended, samplers.ddim(denoise, schedule).step(KEY, state, 0.5, 0.0).x, rtol=1e-15
    )


# ---- the first step, from alpha = 0 --------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(NOISE_ONLY))
@pytest.mark.parametrize("churn", [0.0, 0.4])
def test_edm_sampler_starts_from_pure_noise_with_a_step_of_ddim(path, churn):
    schedule, x1 = PATHS[path], np.array([0.9, -1.3])
    denoise = fitted(schedule, "VELOCITY")
    by_edm, by_ddim = (
        make.step(jax.random.key(0), make.init(x1, 1.0), 1.0, 0.7).x
        for make in (
            samplers.edm_sampler(denoise, schedule, churn),
            samplers.ddim(denoise, schedule),
        )
    )
    np.testing.assert_allclose(by_edm, by_ddim, rtol=1e-13)
    x0 = samplers.sample(KEY, samplers.edm_sampler(denoise, schedule), x1, uniform(40))
    np.testing.assert_allclose(x0, x1, atol=0.05)  # the flow of N(0, 1) to N(0, 1) is the identity


MAKERS = {
    **{
        name: getattr(samplers, name)
        for name in (
            *("ddim", "ddpm", "euler", "heun", "edm_sampler", "euler_maruyama"),
            *("dpm_solver_2", "dpm_solver_2s", "dpm_solver_3", "dpm_solver_2m", "dpm_solver_3m"),
            *("sde_dpm_solver_2m", "sa_solver", "unipc", "deis"),
            *("data_adams", "noise_adams", "velocity_adams"),
        )
    },
    "edm_sampler, churn": lambda d, s: samplers.edm_sampler(d, s, 0.4),
    "predictor_corrector": samplers.predictor_corrector,
}


@pytest.mark.parametrize("name", MAKERS)
def test_samplers_from_pure_noise_name_alpha_if_the_network_predicts_the_noise(name):
    schedule = cosine()
    sampler = MAKERS[name](fitted(schedule, "EPS"), schedule)
    with pytest.raises(
        ValueError, match=r"(?s)got .*t=1\.0.*alpha = 0.*uniform\(20, start=0\.999\)"
    ):
        samplers.sample(KEY, sampler, np.ones(2), uniform(4))
    samplers.sample(KEY, sampler, np.ones(2), uniform(4, start=0.999))  # the way out


@pytest.mark.parametrize("kind", ["EPS", "SCORE"])
def test_a_denoiser_of_pure_noise_has_no_x0(kind):
    denoise, schedule = fitted(gvp(), kind), gvp()
    for call in (
        denoise,
        clip_x0(denoise, schedule),
        functools.partial(velocity, denoise, schedule),
    ):
        with pytest.raises(ValueError, match=r"^t: expected a time with alpha > 0, got t=1\.0"):
            call(jnp.ones(2), 1.0)
        # under jit no number can be looked at: NaN, and not an infinity that a clip would take for
        # data
        assert np.isnan(jax.tree.leaves(jax.jit(call)(jnp.ones(2), 1.0))[0]).all()
    # the noise itself is known: eps = x
    np.testing.assert_allclose(score(denoise, schedule, jnp.ones(2), 1.0), -1.0, rtol=1e-6)


@pytest.mark.parametrize("path", ["linear", "linear_vp", "cosine", "sub_vp"])
def test_a_denoiser_of_clean_data_has_no_noise_estimate_if_the_network_predicts_x0(path):
    denoise, schedule = fitted(PATHS[path], "X0"), PATHS[path]
    for call in (denoise, *(functools.partial(f, denoise, schedule) for f in (velocity, score))):
        with pytest.raises(ValueError, match=r"^t: expected a time with sigma > 0, got t="):
            call(jnp.ones(2), 0.0)


def test_preconditioning_names_the_time_variable_that_its_network_cannot_take():
    denoise = as_denoiser(lambda x, t: x * jnp.cos(t), linear(), edm_preconditioning(0.5))
    with pytest.raises(
        ValueError,
        match=r"expected a time with alpha > 0 and sigma > 0, got t=1.0.*time variable inf",
    ):
        denoise(jnp.ones(2), 1.0)
    unmoved = as_denoiser(lambda x, t: 0 * x, linear(), edm_preconditioning(0.5))  # takes any time
    np.testing.assert_allclose(unmoved(jnp.ones(2), 1.0).eps, 1.0)


def test_an_infinite_noise_amplitude_is_named():
    denoise, schedule, message = (
        fitted(linear(), "V"),
        linear(),
        r"amplitude: expected a finite number, got inf at t=1",
    )
    sampler = samplers.euler_maruyama(denoise, schedule)
    with pytest.raises(ValueError, match=message):
        samplers.sample(KEY, sampler, np.ones(2), uniform(4))
    with pytest.raises(ValueError, match=message):
        reverse_sde(denoise, schedule).drift(0.0, jnp.ones(2), None)
    with pytest.raises(ValueError, match=message):
        solve.solve_sde(KEY, denoise, schedule, np.ones(2), 1.0, 0.1)


SINGULAR = {  # calls at times where no value exists
    "transition": (
        lambda: process.transition(linear(), 1.0, 1.0),
        r"s: expected a time with alpha > 0, got s=1.0",
    ),
    "posterior from 0": (
        lambda: process.posterior(linear(), 0.0, 0.0),
        r"t: expected .* sigma > 0, got t=0.0",
    ),
    "posterior to 1": (
        lambda: process.posterior(linear(), 1.0, 1.0),
        r"s: expected .* alpha > 0, got s=1.0",
    ),
    "bound at 1": (
        lambda: losses.variational_bound(KEY, fitted(linear(), "V"), linear(), np.ones(2), 1.0),
        r"t: expected a time with alpha > 0 and sigma > 0, got t=1.0",
    ),
    "bound from 0": (
        lambda: losses.variational_bound(
            KEY, fitted(linear(), "V"), linear(), np.ones(2), 0.5, start=0.0
        ),
        r"start: expected a time with sigma > 0, got start=0.0",
    ),
    "table from 1": (
        lambda: optimal_grids.elbo_table(
            KEY, fitted(linear(), "EPS"), linear(), uniform(4), np.ones((3, 2))
        ),
        r"denoise: expected no NaN.*where alpha = 0",
    ),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_calls_without_a_value_name_the_time(name):
    call, message = SINGULAR[name]
    with pytest.raises(ValueError, match=message), jax.debug_key_reuse(False):
        call()


def test_values_that_are_not_finite_are_named_by_the_step_that_makes_them():
    def network(x, t):
        return jnp.where(t < 0.5, jnp.nan, x)

    schedule = linear()
    sampler = samplers.unipc(as_denoiser(network, schedule, V), schedule)
    for run in (samplers.sample, samplers.trajectory):
        with pytest.raises(
            ValueError,
            match=r"x: expected finite values after the step from t=0.4 to s=0.2, got \[nan",
        ):
            run(KEY, sampler, np.ones(2), jnp.array([0.9, 0.6, 0.4, 0.2, 0.1]))
    with pytest.raises(ValueError, match=r"x: expected finite values, got \[ 1. nan\]"):
        samplers.sample(
            KEY, samplers.ddim(fitted(schedule, "V"), schedule), np.array([1, np.nan]), uniform(4)
        )
    with pytest.raises(
        ValueError, match=r"denoise: expected finite values at all times.*got x=\[nan"
    ):
        solve.dpm_solver_fast(as_denoiser(network, schedule, V), schedule, np.ones(2), 5, 0.9, 0.1)


@pytest.mark.parametrize("schedule", [linear(), schedules.gvp()], ids=["linear", "gvp"])
def test_dpm_solver_fast_goes_from_pure_noise_to_the_data(schedule):
    # the flow of N(m, s^2) maps N(0, 1) to it affinely: x0 = m + s x1
    denoise = exact.gaussian(jnp.array([0.7]), jnp.array([[0.36]]), schedule)
    x0 = solve.dpm_solver_fast(denoise, schedule, jnp.array([1.5]), 160, 1.0, 0.0)
    np.testing.assert_allclose(x0, 0.7 + 0.6 * 1.5, atol=5e-5)


# ---- every sampler, path, parametrization and end ------------------------------------------------

ENDS = [(1.0, 0.0), (1.0, 0.02), (0.98, 0.0), (0.98, 0.02)]


# Jitted, so that it is traced once and not at each of its calls.
@jax.jit
def switched_schedule(i, t):
    return jax.lax.switch(
        i, [lambda t, s=s: tuple(jnp.asarray(c, t.dtype) for c in s(t)) for s in PATHS.values()], t
    )


def switched_row(j, schedule, t):
    rows = [kind.row(schedule, t) for kind in KINDS.values()]
    return tuple(
        jnp.stack([jnp.asarray(c, jnp.result_type(t)) for c in column])[j]
        for column in zip(*rows, strict=True)
    )


def switched_inputs(j, schedule, t):
    inputs = [kind.inputs(schedule, t) for kind in KINDS.values()]
    return tuple(
        jnp.stack([jnp.asarray(c, jnp.float32) for c in column])[j]
        for column in zip(*inputs, strict=True)
    )


def bounded_network(x, t):
    return jnp.sin(3 * x + t)


@pytest.mark.parametrize("name", MAKERS)
def test_no_nan_but_where_the_network_or_the_amplitude_has_no_value(name):
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    @functools.partial(jax.vmap, in_axes=(None, 0, None))
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def run(i, j, ts):
        schedule = jax.tree_util.Partial(switched_schedule, i)
        kind = parametrizations.Parametrization(
            *(jax.tree_util.Partial(f, j) for f in (switched_row, switched_inputs))
        )
        sampler = MAKERS[name](as_denoiser(bounded_network, schedule, kind), schedule)
        return samplers.sample(
            KEY, sampler, schedule(ts[0])[1] * jnp.array([0.9, -1.3], jnp.float32), ts
        )

    grids = jnp.stack([uniform(4, *ends) for ends in ENDS]).astype(jnp.float32)
    xs = np.asarray(run(jnp.arange(len(PATHS)), jnp.arange(len(KINDS)), grids))
    assert xs.dtype == np.float32
    for i, path in enumerate(PATHS):
        for j, kind in enumerate(KINDS):
            for x, ends in zip(xs[i, j], ENDS, strict=True):
                no_value = kind in ("EPS", "SCORE", "edm") or name == "euler_maruyama"
                if no_value and path in NOISE_ONLY and ends[0] == 1:
                    assert np.isnan(x).all(), (path, kind, ends, x)
                else:
                    assert np.abs(x).max() < 1e8, (path, kind, ends, x)


# ---- weightings at the ends ----------------------------------------------------------------------

WEIGHTINGS = {  # the weighting, and what it puts on the error of the noise
    "inverse_variance": (weightings.inverse_variance, lambda a, s, g2: 1 / s**2),
    "likelihood": (weightings.likelihood, lambda a, s, g2: g2 / s**2),
    "snr": (weightings.snr, lambda a, s, g2: 1),
    "p2": (weightings.p2(1.0, 1.0), lambda a, s, g2: 1 / (1 + (a / s) ** 2)),
    "p2 of gamma 1/2": (
        weightings.p2(0.5, 1.0),
        lambda a, s, g2: (1 + (a / s) ** 2) ** mp.mpf(-0.5),
    ),
    "min_snr": (weightings.min_snr(5.0), lambda a, s, g2: min((a / s) ** 2, 5) * (s / a) ** 2),
    "edm": (
        weightings.edm_weighting(0.5),
        lambda a, s, g2: ((s / a) ** 2 + 0.25) / (s / a * 0.5) ** 2 * (s / a) ** 2,
    ),
}
SLOPES = {  # d target / d eps at a given x, where x0 moves by -sigma / alpha
    "X0": lambda a, s, f, g2: -s / a,
    "EPS": lambda a, s, f, g2: 1,
    "SCORE": lambda a, s, f, g2: -1 / s,
    "V": lambda a, s, f, g2: a + s**2 / a,
    # alpha' = f alpha, sigma' from g^2 (1.25)
    "VELOCITY": lambda a, s, f, g2: f * a * (-s / a) + g2 / (2 * s) + f * s,
    "edm": lambda a, s, f, g2: (s / 0.5 * (-s / a) - a * 0.5) / mp.sqrt(s**2 + a**2 / 4),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_have_their_limits_at_the_ends(name, dtype):
    weighting, on_noise = WEIGHTINGS[name]
    ts = [0.0, 0.3, 1.0]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    @functools.partial(jax.vmap, in_axes=(None, 0, None))
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def weights(i, j, t):
        kind = parametrizations.Parametrization(jax.tree_util.Partial(switched_row, j))
        return weighting(jax.tree_util.Partial(switched_schedule, i), kind, t)

    values = weights(jnp.arange(len(PATHS)), jnp.arange(len(KINDS)), np.asarray(ts, dtype))
    near = [mp.mpf(10) ** -30, mp.mpf(float(dtype(0.3))), 1 - mp.mpf(10) ** -30]
    with mp.workdps(80):
        for path, of_path in zip(PATHS, np.asarray(values), strict=True):
            for i, t in enumerate(near):
                a, s, f, g2 = (column(t) for column in oracles.TABLE[path][:4])
                for kind, value in zip(KINDS, of_path[:, i], strict=True):
                    exact_weight = on_noise(a, s, g2) / SLOPES[kind](a, s, f, g2) ** 2
                    if exact_weight > 1e12:
                        assert value == np.inf, (path, kind, ts[i], value)
                    else:
                        message = f"{path} {kind} {ts[i]}"
                        np.testing.assert_allclose(
                            value, float(exact_weight), 1e-5, 1e-6, err_msg=message
                        )
