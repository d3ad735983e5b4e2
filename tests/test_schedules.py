"""Schedules against Table 1.1 in 40 digits, and against the identities that hold on every path."""

import chex
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import schedules
from diffjax.process import log_prior, sample_prior
from diffjax.schedules import (
    coefficients,
    cosine,
    diffusion_squared,
    drift,
    from_betas,
    from_sde,
    half_log_snr,
    half_log_snr_inverse,
    linear_vp,
    to_betas,
)

ROWS = pytest.mark.parametrize("name", oracles.TABLE)
TIMES = [1e-8, 1e-6, 1e-4, 1e-3, 0.03, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0]
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
unit = st.floats(1e-6, 1 - 1e-6)


def make(name):
    return getattr(schedules, name)()


def at(f, ts):
    return jax.jit(jax.vmap(f))(jnp.asarray(ts))


@ROWS
def test_alpha_and_sigma_have_relative_precision_in_float32(name):
    # a few roundings of 6e-8 each, and those of an exponent of at most 10 = log(sigma_max /
    # sigma_min) + ...
    ts = np.asarray(TIMES, np.float32)
    alpha, sigma = at(make(name), ts)
    assert alpha.dtype == sigma.dtype == jnp.float32
    for i, t in enumerate(ts):
        expected = [oracles.TABLE[name][k](mp.mpf(float(t))) for k in (0, 1)]
        for value, exact in zip((alpha[i], sigma[i]), expected, strict=True):
            if abs(exact) < 1e-30:  # cos(pi / 2), which is exactly 0 at t = 1
                assert float(value) == 0.0
            else:
                assert abs(mp.mpf(float(value)) / exact - 1) < 3e-6, (t, value, exact)


@ROWS
def test_drift_and_diffusion_are_those_of_the_table(name):
    # in float64 every formula keeps about 13 digits; at t = 0.9 the gvp row is pi tan(0.45 pi)
    ts = [t for t in TIMES if t < 1]
    f, g2 = (
        at(lambda t: drift(make(name), t), ts),
        at(lambda t: diffusion_squared(make(name), t), ts),
    )
    _, _, exact_f, exact_g2, _ = oracles.TABLE[name]
    np.testing.assert_allclose(f, [float(exact_f(mp.mpf(t))) for t in ts], rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(g2, [float(exact_g2(mp.mpf(t))) for t in ts], rtol=1e-10)


NEAR = np.logspace(-7, -0.31, 27).astype(np.float32)
NEAR_THE_ENDS = np.concatenate([NEAR, 1 - NEAR])


@ROWS
def test_drift_diffusion_and_log_snr_keep_their_digits_near_both_ends_in_float32(name):
    # A few roundings of 6e-8 each. The log-SNR crosses 0, so its error is measured against 1 there.
    schedule, (alpha, sigma, exact_f, exact_g2, _) = make(name), oracles.TABLE[name]
    values = at(
        lambda t: (drift(schedule, t), diffusion_squared(schedule, t), half_log_snr(schedule, t)),
        NEAR_THE_ENDS,
    )
    assert {v.dtype for v in values} == {jnp.dtype(np.float32)}
    times = [mp.mpf(float(t)) for t in NEAR_THE_ENDS]
    for value, exact, floor in zip(
        values, (exact_f, exact_g2, lambda t: mp.log(alpha(t) / sigma(t))), (0, 0, 1), strict=True
    ):
        expected = [exact(t) for t in times]
        errors = [
            abs(mp.mpf(float(v)) - e) / (abs(e) + floor + 1e-30)
            for v, e in zip(value, expected, strict=True)
        ]
        assert max(errors) < 1e-6, NEAR_THE_ENDS[np.argmax(errors)]


@pytest.mark.parametrize("betas", [np.linspace(1e-4, 0.02, 1000), np.array([1e-6, 0.9, 0.01])])
def test_the_drift_of_given_betas_keeps_its_digits_in_float32(betas):
    # Within step i, log alpha is a straight line that falls by -log(1 - beta_i) / 2 in a time of 1
    # / n.
    n = len(betas)
    ts = ((np.arange(n) + 0.37) / n).astype(np.float32)
    schedule = from_betas(jnp.asarray(betas, jnp.float32))
    f, g2 = at(lambda t: (drift(schedule, t), diffusion_squared(schedule, t)), ts)
    np.testing.assert_allclose(f, 0.5 * n * np.log1p(-betas), rtol=1e-6)
    np.testing.assert_allclose(g2, -n * np.log1p(-betas), rtol=1e-6)


@ROWS
def test_the_ends(name):
    schedule = make(name)
    alpha, sigma = np.asarray(at(schedule, [0.0, 1.0]))
    assert abs(alpha[0] - 1) < 1e-15 and sigma[0] == (0.01 if name == "ve" else 0.0)
    if name in ("linear", "gvp", "cosine"):
        assert alpha[1] == 0.0 and abs(sigma[1] - 1) < 1e-15
        assert at(lambda t: half_log_snr(schedule, t), [1.0])[0] == -np.inf
        assert at(lambda t: drift(schedule, t), [1.0])[0] == -np.inf
    exact = float(oracles.TABLE[name][3](mp.mpf(0)))  # beta_min on VP, 0 on linear
    for dtype in (np.float32, np.float64):
        g2, slope = at(
            jax.value_and_grad(lambda t: diffusion_squared(schedule, t)), np.zeros(1, dtype)
        )
        np.testing.assert_allclose(g2, exact, rtol=1e-5 if dtype == np.float32 else 1e-9, atol=1e-9)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", [name for name, row in oracles.TABLE.items() if row[4]])
def test_inverse_is_that_of_the_table(name):
    ts = np.array([1e-3, 0.03, 0.3, 0.5, 0.77, 0.95])
    values = [
        float(mp.log(oracles.TABLE[name][0](mp.mpf(t)) / oracles.TABLE[name][1](mp.mpf(t))))
        for t in ts
    ]
    expected = [float(oracles.TABLE[name][4](mp.mpf(v))) for v in values]
    np.testing.assert_allclose(expected, ts, rtol=1e-9)  # the table agrees with itself
    inverse = at(lambda v: half_log_snr_inverse(make(name), v), values)
    np.testing.assert_allclose(inverse, expected, rtol=1e-11)
    np.testing.assert_allclose(
        at(lambda t: half_log_snr(make(name), t), ts), values, rtol=1e-11, atol=1e-13
    )


@ROWS
def test_inverse_at_and_beyond_the_ends(name):
    inverse = jax.value_and_grad(lambda v: half_log_snr_inverse(make(name), v))
    times, slopes = at(inverse, [np.inf, 800.0, 0.3, -800.0, -np.inf])
    np.testing.assert_allclose(times[:2], 0.0, atol=1e-30)
    np.testing.assert_allclose(times[3:], 1.0, atol=1e-15)
    assert np.isfinite(slopes).all()


@ROWS
def test_inverse_derivative_is_that_of_the_implicit_function(name):
    # central differences of h = 1e-4: h^2 times a third derivative of order 10 on values of order
    # 0.1
    numbers, structure = jax.tree.flatten(make(name))

    def inverse(arguments):
        return half_log_snr_inverse(
            jax.tree.unflatten(structure, list(arguments[:-1])), arguments[-1]
        )

    points = np.array([[*numbers, 0.7], [*numbers, -1.1]])
    shift = 1e-4 * points[:, None, :] * np.eye(len(numbers) + 1)
    low, high = points[:, None, :] - shift, points[:, None, :] + shift
    exact = at(jax.grad(inverse), points)
    high, low = at(inverse, np.stack([high, low]).reshape(-1, points.shape[-1])).reshape(
        2, *points.shape
    )
    np.testing.assert_allclose(exact, (high - low) / (2e-4 * points), rtol=1e-6, atol=1e-9)


@jax.jit
def properties(schedule, s, t):
    return (
        half_log_snr(schedule, s),
        half_log_snr(schedule, t),
        half_log_snr_inverse(schedule, half_log_snr(schedule, t)),
        coefficients(schedule, t),
        drift(schedule, t),
        diffusion_squared(schedule, t),
    )


def check_properties(schedule, s, t, vp):
    s, t = min(s, t), max(s, t)
    at_s, at_t, back, (alpha, sigma, dalpha, dsigma), f, g2 = jax.tree.map(
        float, properties(schedule, s, t)
    )
    assert at_t <= at_s
    slope = abs(dalpha / alpha - dsigma / sigma) if sigma > 0 else 0.0
    if slope > 1e-6:  # else lambda is flat to the last digit
        assert abs(back - t) <= 1e-12 * t + 1e-14 * (1 + abs(at_t)) / slope
    assert g2 >= 0
    if vp:
        assert abs(alpha**2 + sigma**2 - 1) < 1e-14
        np.testing.assert_allclose(g2, -2 * f, rtol=1e-9, atol=1e-12)


@few
@given(unit, unit, st.floats(0, 5), st.floats(0.1, 30))
def test_properties_of_linear_vp_and_sub_vp(s, t, beta_min, more):
    check_properties(linear_vp(beta_min, beta_min + more), s, t, vp=True)
    check_properties(schedules.sub_vp(beta_min, beta_min + more), s, t, vp=False)


@few
@given(unit, unit, st.floats(0, 0.3))
def test_properties_of_cosine(s, t, offset):
    check_properties(cosine(offset), s, t, vp=True)


@few
@given(unit, unit, st.floats(1e-3, 1.0), st.floats(1.5, 1e4))
def test_properties_of_the_others(s, t, low, ratio):
    check_properties(schedules.ve(low, low * ratio), s, t, vp=False)
    check_properties(schedules.edm(low * ratio), s, t, vp=False)
    check_properties(schedules.linear(), s, t, vp=False)
    check_properties(schedules.gvp(), s, t, vp=True)


def test_cosine_has_its_limits():
    # s = 0 is gvp, and DDPM's cosine in its own words: alpha_bar(t) / alpha_bar(0), alpha_bar =
    # cos^2((t + s)/(1 + s) pi/2)
    ts = np.linspace(0, 1, 11)
    chex.assert_trees_all_close(at(cosine(0.0), ts), at(schedules.gvp(), ts), rtol=1e-7, atol=1e-15)
    bar = np.cos((ts + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(at(cosine(0.008), ts)[0] ** 2, bar / bar[0], atol=1e-15)


def test_from_betas_is_ddpm_at_its_points():
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = mp.mpf(1)
    alphas, sigmas = np.asarray(at(from_betas(jnp.asarray(betas)), np.arange(1001) / 1000))
    assert float(alphas[0]) == 1.0 and float(sigmas[0]) == 0.0
    for i, beta in enumerate(betas):
        bar *= 1 - mp.mpf(float(beta))
        # 1000 additions of 1e-16, in an exponent of 5
        assert abs(mp.mpf(float(alphas[i + 1])) / mp.sqrt(bar) - 1) < 1e-12
        assert abs(mp.mpf(float(sigmas[i + 1])) / mp.sqrt(1 - bar) - 1) < 1e-11


def test_to_betas_is_its_inverse():
    betas = jnp.asarray(np.random.default_rng(0).uniform(0, 0.5, 50))
    np.testing.assert_allclose(to_betas(from_betas(betas), 50), betas, rtol=1e-9, atol=1e-12)
    # and of the continuous path: beta_i = 1 - exp(-int beta), by hand for linear beta
    edges = np.linspace(0, 1, 101)
    integral = 0.1 * edges + 19.9 * edges**2 / 2
    np.testing.assert_allclose(to_betas(linear_vp(), 100), -np.expm1(-np.diff(integral)), rtol=1e-9)


def test_from_betas_moves_with_its_betas():
    betas = jnp.asarray([0.1, 0.2, 0.3])

    def alpha_bar(betas):
        return from_betas(betas)(jnp.asarray(2 / 3))[0] ** 2

    # d/d beta_1 of (1 - beta_1)(1 - beta_2) = -(1 - beta_2), and nothing of beta_3
    np.testing.assert_allclose(jax.grad(alpha_bar)(betas), [-0.8, -0.9, 0.0], rtol=1e-12)


def test_a_chain_without_signal_at_its_end():
    """Algorithm 1 of Lin et al. 2023, in mpmath; alpha is linear on the last step."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots, bar = [], mp.mpf(1)
    for beta in betas:
        bar *= 1 - mp.mpf(float(beta))
        roots.append(mp.sqrt(bar))
    expected = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
    new = schedules.zero_terminal_snr(jnp.asarray(betas))
    schedule = from_betas(new)
    alphas, sigmas = np.asarray(at(schedule, np.arange(1, 1001) / 1000))
    np.testing.assert_allclose(alphas, np.array(expected, float), rtol=1e-11, atol=0)
    np.testing.assert_allclose(alphas**2 + sigmas**2, 1, rtol=1e-13)
    assert float(new[0]) == pytest.approx(betas[0], rel=1e-12) and float(new[-1]) == 1.0
    half = np.asarray(at(schedule, np.array([0.9995])))[0]
    np.testing.assert_allclose(half, alphas[-2] / 2, rtol=1e-9)
    slope = jax.jacfwd(lambda t: jnp.stack(schedule(t)))(1.0)
    np.testing.assert_allclose(slope, [-1000 * alphas[-2], 0.0], rtol=1e-9, atol=1e-12)


SDES = {  # f and g of paths whose alpha and sigma are known
    "linear_vp": (lambda t: -0.5 * (0.1 + 19.9 * t), lambda t: jnp.sqrt(0.1 + 19.9 * t)),
    "linear": (lambda t: -1 / (1 - t), lambda t: jnp.sqrt(2 * t / (1 - t))),
    "edm": (lambda t: 0.0 * t, lambda t: 80.0 * jnp.sqrt(2 * t)),
}


@pytest.mark.parametrize("name", SDES)
def test_from_sde_by_quadrature(name):
    schedule = from_sde(*SDES[name])
    ts = np.array([1e-6, 1e-3, 0.1, 0.4, 0.6])
    alpha, sigma = at(schedule, ts)
    exact = np.array([oracles.alpha_sigma(name, t) for t in ts])
    # spectral: both integrands are analytic on [0, 0.6]
    np.testing.assert_allclose(alpha, exact[:, 0], rtol=1e-9)
    np.testing.assert_allclose(sigma, exact[:, 1], rtol=1e-9)
    f, g = SDES[name]
    np.testing.assert_allclose(at(lambda t: drift(schedule, t), ts), jax.vmap(f)(ts), rtol=1e-8)
    np.testing.assert_allclose(
        at(lambda t: diffusion_squared(schedule, t), ts), jax.vmap(g)(ts) ** 2, rtol=1e-8
    )


def test_from_sde_keeps_its_numbers():
    def slope(beta):
        return from_sde(
            jax.tree_util.Partial(lambda b, t: -0.5 * b + 0 * t, beta), lambda t: 1.0 + 0 * t
        )(jnp.asarray(0.5))[0]

    # d/d beta exp(-beta t / 2)
    np.testing.assert_allclose(jax.grad(slope)(2.0), -0.25 * np.exp(-0.5), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "std"), [("ve", 50.0), ("edm", 80.0), ("linear", 1.0), ("gvp", 1.0)]
)
def test_the_prior_has_the_std_of_the_path(name, std):
    with jax.debug_key_reuse(False):
        key = jax.random.key(3)
        z = jax.random.normal(key, (5,))
        np.testing.assert_allclose(sample_prior(key, make(name), (5,)), std * z, rtol=1e-12)
    x = np.array([1.0, -2.0, 0.5])
    expected = oracles.gaussian_log_density(np.zeros(3), np.zeros(3), 0.0, std, x)
    np.testing.assert_allclose(log_prior(make(name), jnp.asarray(x)), expected, rtol=1e-12)


def test_the_log_snr_has_its_derivatives_where_sigma_is_tiny_and_in_mixed_precision():
    slope = jax.grad(lambda t: half_log_snr(schedules.linear(), t))(jnp.float32(1e-20))
    np.testing.assert_allclose(slope, -1e20, rtol=1e-6)  # -1/t - 1/(1 - t)
    slope = jax.grad(lambda v: half_log_snr_inverse(schedules.linear(), v))(jnp.float32(30.0))
    np.testing.assert_allclose(slope, -np.exp(-30.0), rtol=1e-5)  # t = 1 / (1 + e^v)
    schedule = schedules.from_betas(jnp.linspace(1e-4, 0.02, 100))  # double precision
    slope = jax.grad(lambda v: half_log_snr_inverse(schedule, v))(jnp.float32(1.0))
    exact = jax.grad(lambda v: half_log_snr_inverse(schedule, v))(jnp.float64(1.0))
    assert slope.dtype == jnp.float32
    np.testing.assert_allclose(slope, exact, rtol=1e-3)  # t itself is a single-precision number
