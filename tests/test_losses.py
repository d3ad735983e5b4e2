"""Losses: their minimisers in closed form, and each weighting against what its paper weights."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind, schedules
from diffjax.divergence import exact_probes
from diffjax.exact import gaussian_mixture
from diffjax.losses import (
    bridge_matching,
    conditional_flow_matching,
    denoising,
    explicit_score_matching,
    flow_matching,
    implicit_score_matching,
    over_batch,
    sliced_score_matching,
)
from diffjax.parametrizations import EPS, SCORE, VELOCITY, X0, V, as_denoiser, edm_preconditioning, score
from diffjax.process import brownian_bridge
from diffjax.times import antithetic_times, log_normal_times, log_snr_times, stratified_times, uniform_times
from diffjax.weightings import edm_weighting, inverse_variance, likelihood, min_snr, p2, snr, unweighted

KINDS = {"X0": X0, "EPS": EPS, "SCORE": SCORE, "V": V, "VELOCITY": VELOCITY, "edm": edm_preconditioning(0.5)}


def affine(params, x, t):
    return params[0] * x + params[1]


def bent(params, x, t):
    return params[0] * jnp.tanh(params[1] * x + t) + params[2] * x


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
def test_score_matching_losses_differ_by_their_constants():
    # Data of two Gaussians in 1-D, t = 0.4 on linear VP, a network that is no score. Expectations by trapezoids over x, and
    # over x0 and eps, in steps of a tenth of a deviation or less: exact to rounding for such functions.
    weights, means, stds, t = np.array([0.3, 0.7]), np.array([-1.0, 1.5]), np.array([0.5, 0.8]), 0.4
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    schedule = schedules.linear_vp()
    denoise = gaussian_mixture(weights, means[:, None], stds[:, None, None] ** 2, schedule)

    def density(x, mean, std):
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))

    x = np.linspace(-9, 9, 601)
    std_t = np.sqrt(alpha**2 * stds**2 + sigma**2)
    parts = weights * density(x[:, None], alpha * means, std_t)
    p = parts.sum(1) * (x[1] - x[0])
    score_t = (parts * -(x[:, None] - alpha * means) / std_t**2).sum(1) / parts.sum(1)
    xs = jnp.asarray(x)[:, None]

    def explicit(network):
        exact = bind(score, denoise, schedule)
        return p @ jax.vmap(lambda x: explicit_score_matching(network, exact, x, t))(xs)

    def implicit(network):
        return p @ jax.vmap(lambda x: implicit_score_matching(network, x, t, exact_probes(None, x)))(xs)

    def sliced(network):
        return p @ jax.vmap(lambda x: sliced_score_matching(network, x, t, exact_probes(None, x)))(xs)

    def by_denoising(network):  # the mean over eps and x0, by the weight 1 on the score error, with normal() = its key
        eps = np.linspace(-9, 9, 301)
        weight = density(eps, 0, 1) * (eps[1] - eps[0])
        x0 = np.linspace(-6, 7, 301)
        prior = (weights * density(x0[:, None], means, stds)).sum(1) * (x0[1] - x0[0])

        def one(x0, eps):
            return denoising(eps, network, schedule, SCORE, x0[None], t)

        return prior @ jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.asarray(x0), jnp.asarray(eps)) @ weight

    values, gradients = {}, {}
    params = jnp.array([0.7, -1.3, -0.4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape))
        for loss in (explicit, implicit, sliced, by_denoising):
            value = jax.jit(jax.value_and_grad(lambda params, loss=loss: loss(bind(bent, params))))
            values[loss], gradients[loss] = value(params)
    information = p @ score_t**2
    assert information > 0.3
    np.testing.assert_allclose(values[implicit], values[explicit] - information, rtol=1e-10)
    np.testing.assert_allclose(values[sliced], values[implicit], rtol=1e-12)
    np.testing.assert_allclose(values[by_denoising], values[explicit] - information + 1 / sigma**2, rtol=1e-10)
    for loss in (implicit, sliced, by_denoising):
        np.testing.assert_allclose(gradients[loss], gradients[explicit], rtol=1e-9)


def test_slices_over_all_signs_are_the_trace():
    x, t = jnp.array([0.3, -1.2, 0.8]), 0.5
    network = lambda x, t: jnp.tanh(jnp.array([[1.0, 2.0, -1.0], [0.5, -0.3, 0.2], [-0.7, 0.1, 1.1]]) @ x)  # noqa: E731
    signs = jnp.asarray(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(-1, 3))  # the mean of z z^T is 1 exactly
    by_trace = implicit_score_matching(network, x, t, exact_probes(None, x))
    s, jacobian = network(x, t), jax.jacfwd(network)(x, t)
    np.testing.assert_allclose(by_trace, (s @ s + 2 * jnp.trace(jacobian)) / 3, rtol=1e-12)
    np.testing.assert_allclose(implicit_score_matching(network, x, t, signs), by_trace, rtol=1e-12)
    np.testing.assert_allclose(sliced_score_matching(network, x, t, signs), by_trace, rtol=1e-12)
    one = signs[:1]
    expected = ((one[0] @ s) ** 2 + 2 * one[0] @ jacobian @ one[0]) / 3
    np.testing.assert_allclose(sliced_score_matching(network, x, t, one), expected, rtol=1e-12)


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
def test_the_flow_and_score_of_a_mixture_of_bridges(monkeypatch):
    """Gaussian pairs: p_t is N(m_t, V_t), whose score is -(x - m_t) / V_t and whose flow m_t' + V_t' / (2 V_t) (x - m_t).

    The loss is quadratic in an affine network: its mean over 5-point Gauss-Hermite nodes is exact, and its gradient at the
    marginal's velocity and score must vanish.
    """
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape))
    (m0, m1), (v0, v1), c, a, t = (0.4, -1.0), (0.5, 1.3), 0.3, 0.8, 0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    z0, z1, eps = (jnp.asarray(n.ravel()) for n in np.meshgrid(nodes, nodes, nodes))
    weights = np.prod(np.meshgrid(*[weights / weights.sum()] * 3), 0).ravel()
    x0 = m0 + np.sqrt(v0) * z0
    x1 = m1 + c / np.sqrt(v0) * z0 + np.sqrt(v1 - c**2 / v0) * z1

    def mean_loss(params):
        def one(x0, x1, eps):
            networks = bind(affine, params[0]), bind(affine, params[1])
            return bridge_matching(eps, *networks, x0[None], x1[None], t, a)

        return weights @ jax.vmap(one)(x0, x1, eps)

    mean = (1 - t) * m0 + t * m1
    variance = (1 - t) ** 2 * v0 + t**2 * v1 + 2 * t * (1 - t) * c + a**2 * t * (1 - t)
    slope = (-2 * (1 - t) * v0 + 2 * t * v1 + (1 - 2 * t) * (2 * c + a**2)) / (2 * variance)
    right = jnp.array([[slope, m1 - m0 - slope * mean], [-1 / variance, mean / variance]])
    np.testing.assert_allclose(jax.grad(mean_loss)(right), 0, atol=1e-12)
    assert np.linalg.eigvalsh(jax.hessian(mean_loss)(right).reshape(4, 4)).min() > 0.01
    # the points have the marginal's mean and variance
    x, *_ = brownian_bridge(x0, x1, eps, t, a)
    np.testing.assert_allclose((weights @ x, weights @ (x - mean) ** 2), (mean, variance), rtol=1e-12)
    # and the score's error weighs as that of unit noise: with the velocity right, a score of 0 costs E[eps^2] = 1 more
    networks = (lambda x, t: jnp.zeros_like(x)), (lambda x, t: jnp.zeros_like(x))
    point = jnp.ones(1), jnp.ones(1)
    each = [float(bridge_matching(eps, *networks, *point, 0.5, a)) for eps in (0.0, 1.0)]
    np.testing.assert_allclose(each, [0.0, 1.0], atol=1e-12)  # at t = 1/2 the bridge's own velocity is x1 - x0 = 0
    _, velocity_there, _ = brownian_bridge(*point, jnp.ones(1), t, a)  # and at another time, with that velocity given
    moving = bridge_matching(1.0, lambda x, t: velocity_there, networks[1], *point, t, a)
    np.testing.assert_allclose(moving, 1.0, rtol=1e-12)


def test_denoising_a_velocity_on_the_linear_path_is_flow_matching():
    network, x0, t = bind(affine, jnp.array([0.3, -0.2])), jnp.array([0.5, -1.0, 2.0]), 0.35
    eps = jax.random.normal(jax.random.key(1), (3,))
    loss = denoising(jax.random.key(1), network, schedules.linear(), VELOCITY, x0, t)
    np.testing.assert_allclose(loss, conditional_flow_matching(network, x0, eps, t), rtol=1e-13)
    # by hand: |a x_t + b - (eps - x0)|^2, a mean over the elements
    x = (1 - t) * np.asarray(x0) + t * np.asarray(eps)
    np.testing.assert_allclose(loss, np.mean((0.3 * x - 0.2 - (np.asarray(eps) - np.asarray(x0))) ** 2), rtol=1e-13)
    np.testing.assert_allclose(flow_matching(network, lambda x, t: -x, jnp.ones(3), t), 1.1**2, rtol=1e-13)


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
@pytest.mark.parametrize("name", KINDS)
def test_the_exact_denoiser_minimises_the_expected_loss(monkeypatch, name, path):
    # Data N(m, v) in 1-D and an affine network: the expectation over (x0, eps) of a quadratic is exact with 5-point
    # Gauss-Hermite rules. Its Newton minimiser must be the exact posterior mean.
    schedule, t, m, v = getattr(schedules, path)(), 0.4, 0.7, 0.3
    points, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape))

    def expected(params):
        def at(z, eps):
            return denoising(eps, bind(affine, params), schedule, KINDS[name], (m + np.sqrt(v) * z)[None], t)

        values = jax.vmap(jax.vmap(at, (None, 0)), (0, None))(jnp.asarray(points), jnp.asarray(points))
        return weights @ values @ weights

    zero = jnp.zeros(2)
    gradient, hessian = jax.jit(lambda p: (jax.grad(expected)(p), jax.hessian(expected)(p)))(zero)
    best = np.linalg.solve(hessian, -gradient)
    x = np.array([1.1])
    alpha, sigma = oracles.alpha_sigma(path, t)
    denoised = as_denoiser(bind(affine, jnp.asarray(best)), schedule, KINDS[name])(jnp.asarray(x), t)
    exact = oracles.gaussian_score(m, v, alpha, sigma, x)
    np.testing.assert_allclose(denoised.eps, -sigma * exact, rtol=1e-7)
    np.testing.assert_allclose(denoised.x0, (x + sigma**2 * exact) / alpha, rtol=1e-7)  # Tweedie


def test_weightings_on_the_error_that_they_speak_of():
    for path in ("linear_vp", "linear", "gvp"):
        schedule = getattr(schedules, path)()
        for t in (0.05, 0.3, 0.9):
            alpha, sigma = oracles.alpha_sigma(path, t)
            g2 = float(oracles.TABLE[path][3](oracles.mp.mpf(t)))
            s, sd, ratio = sigma / alpha, 0.5, (alpha / sigma) ** 2
            for weighting, kind, value in (
                (unweighted, V, 1.0),
                (inverse_variance, SCORE, 1.0),
                (inverse_variance, EPS, sigma**-2),
                (likelihood, SCORE, g2),
                (min_snr(5.0), X0, min(ratio, 5.0)),
                (min_snr(5.0), EPS, min(ratio, 5.0) / ratio),
                (snr, X0, ratio),
                (snr, EPS, 1.0),
                (p2(0.5, 2.0), EPS, (2 + ratio) ** -0.5),
                (p2(1.0), X0, ratio / (1 + ratio)),
                (edm_weighting(sd), X0, (s**2 + sd**2) / (s * sd) ** 2),
                (edm_weighting(sd), edm_preconditioning(sd), 1.0),
            ):
                np.testing.assert_allclose(weighting(schedule, kind, t), value, rtol=1e-9)


@pytest.mark.parametrize("weighting", [inverse_variance, likelihood, snr, min_snr(5.0), p2(1.0), edm_weighting(0.5)])
def test_a_weighted_loss_does_not_depend_on_the_parametrization(weighting):
    # one denoiser, wrong in a known way, as a network of each parametrization: the same loss
    schedule, x0, t = schedules.linear_vp(), jnp.array([0.5, -1.0]), 0.35
    alpha, sigma = oracles.alpha_sigma("linear_vp", t)
    f, g2 = (float(oracles.TABLE["linear_vp"][k](oracles.mp.mpf(t))) for k in (2, 3))

    def wrong(x):
        return jnp.tanh(x)  # its estimate of eps

    def x0_of(x):
        return (x - sigma * wrong(x)) / alpha

    networks = {
        "X0": lambda x, t: x0_of(x),
        "EPS": lambda x, t: wrong(x),
        "SCORE": lambda x, t: -wrong(x) / sigma,
        "V": lambda x, t: alpha * wrong(x) - sigma * x0_of(x),
        "VELOCITY": lambda x, t: f * x + g2 / (2 * sigma) * wrong(x),
    }
    values = [denoising(jax.random.key(0), n, schedule, KINDS[k], x0, t, weighting) for k, n in networks.items()]
    np.testing.assert_allclose(values, values[0], rtol=1e-9)


def test_time_samplers():
    n, low, high = 4000, 0.2, 0.9
    for times in (uniform_times, stratified_times, antithetic_times):
        ts, weights = times(jax.random.key(0), n, low, high)
        assert np.all(weights == 1) and weights.shape == (n,)
        assert low <= float(ts.min()) and float(ts.max()) < high
        # mean and second moment of U[low, high) within five standard errors of independent times
        assert abs(float(ts.mean()) - 0.55) < 5 * 0.7 / np.sqrt(12 * n)
        second, fourth = ((high**k - low**k) / (k * (high - low)) for k in (3, 5))
        assert abs(float((ts**2).mean()) - second) < 5 * np.sqrt((fourth - second**2) / n)
    part = np.floor((np.asarray(stratified_times(jax.random.key(1), 7, low, high)[0]) - low) / (high - low) * 7)
    np.testing.assert_array_equal(part, np.arange(7))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])  # the ends of float32's uniform numbers
@pytest.mark.parametrize("times", [uniform_times, stratified_times, antithetic_times])
def test_rounding_does_not_leave_the_interval(monkeypatch, times, u):
    """(n - 1 + u) / n rounds to 1 for n = 4096, where many a weighting is infinite."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u, jnp.float32))
    with jax.enable_x64(False):
        ts = np.asarray(times(jax.random.key(0), 4096, 1e-5, 1.0)[0])
    assert ts.dtype == np.float32 and ts.min() >= np.float32(1e-5) and ts.max() < 1


def test_antithetic_times_cancel_what_is_odd():
    for n in (6, 7):
        ts = np.asarray(antithetic_times(jax.random.key(0), n, 0.2, 0.9)[0])
        assert len(ts) == n
        np.testing.assert_allclose(ts[: n // 2] + ts[n - n // 2 :], 1.1, rtol=1e-12)


@pytest.mark.parametrize("path", ["linear_vp", "edm", "linear"])
def test_log_snr_times_have_a_uniform_log_snr_and_weigh_as_uniform_times(path):
    schedule, n, low, high = getattr(schedules, path)(), 1000, 0.02, 0.97
    ts, weights = log_snr_times(jax.random.key(0), n, schedule, low, high)
    alpha, sigma = np.array([oracles.alpha_sigma(path, float(t)) for t in ts]).T
    a, b = (np.log(np.divide(*oracles.alpha_sigma(path, t))) for t in (low, high))
    np.testing.assert_array_equal(np.floor((np.log(alpha / sigma) - b) / (a - b) * n), np.arange(n))
    # a stratified mean of n times has an error of order n^(-3/2): the mean of 1, t, t^2 over uniform times
    for power in range(3):
        exact = (high ** (power + 1) - low ** (power + 1)) / ((power + 1) * (high - low))
        np.testing.assert_allclose(np.mean(weights * ts**power), exact, rtol=2e-3)
    # and with the likelihood weighting on the noise's error every time weighs the same
    weighed = weights * jax.vmap(lambda t: likelihood(schedule, EPS, t))(ts)
    np.testing.assert_allclose(weighed, 2 * (a - b) / (high - low), rtol=1e-9)


@pytest.mark.parametrize("path", ["edm", "linear_vp"])
def test_log_normal_times_through_their_quantiles(monkeypatch, path):
    # with z in place of the normal draw, log(sigma / alpha) must be mean + std z
    z = np.array([-1.3, 0.0, 0.7])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(z))
    ts, weights = log_normal_times(jax.random.key(0), 3, getattr(schedules, path)(), mean=-0.5, std=0.8)
    assert np.all(weights == 1)
    alpha, sigma = np.array([oracles.alpha_sigma(path, float(t)) for t in ts]).T
    np.testing.assert_allclose(np.log(sigma / alpha), -0.5 + 0.8 * z, rtol=1e-9, atol=1e-12)


# ---- over a batch ----------------------------------------------------------------------------------------------------


def test_the_loss_over_a_batch_is_the_weighted_mean():
    """With a loss that returns its arguments: times and weights of the batch as a whole, examples and conditions."""
    xs, labels = jnp.arange(6.0), jnp.array([3, 1, 4, 1, 5, 9])
    times = lambda key, n: (jnp.arange(n) / 10, 1.0 + jnp.arange(n))  # noqa: E731
    loss = lambda key, x, t, label: 100 * x + t + 0.001 * label  # noqa: E731
    expected = np.mean((1 + np.arange(6)) * (100 * np.arange(6) + np.arange(6) / 10 + 0.001 * np.asarray(labels)))
    np.testing.assert_allclose(over_batch(jax.random.key(0), loss, xs, labels, times=times), expected, rtol=1e-12)
    pairs = over_batch(jax.random.key(0), lambda key, pair, t: pair[0] * pair[1], (xs, xs), times=times)
    np.testing.assert_allclose(pairs, np.mean((1 + np.arange(6)) * np.arange(6) ** 2), rtol=1e-12)


def test_each_example_has_a_key_and_conditions_drop_on_their_own():
    n, rate = 4000, 0.2
    noise = lambda key, x, t: jax.random.normal(key) ** 2  # noqa: E731
    # chi-squared: mean 1, variance 2 / n of independent keys
    assert abs(over_batch(jax.random.key(0), noise, jnp.zeros(n)) - 1) < 5 * np.sqrt(2 / n)
    cond = {"label": jnp.arange(n) % 3, "text": jnp.ones((n, 2))}
    null = {"label": 3, "text": jnp.zeros(2)}
    both = lambda key, x, t, c: jnp.where(c["label"] == 3, 1.0 - c["text"].sum(), c["text"].sum() - 2)  # noqa: E731
    # the leaves of a condition drop together: a kept one counts 0, a dropped one 1
    for drop in (rate, jnp.asarray(rate)):
        value = over_batch(jax.random.key(1), both, jnp.zeros(n), cond, drop=drop, null=null)
        assert abs(value - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
    always = over_batch(jax.random.key(1), both, jnp.zeros(n), cond, drop=1.0, null=null)
    assert always == 1


def test_what_over_batch_refuses():
    loss = lambda key, x, t, *c: x  # noqa: E731
    for arguments, message in (
        ((jnp.zeros(3), jnp.zeros(2)), r"examples, cond: expected arrays of one leading size"),
        ((jnp.zeros(0),), r"at least 1, got \[\(0,\)\]"),
        ((jnp.zeros(()),), r"at least 1, got \[\(\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            over_batch(jax.random.key(0), loss, *arguments)
    with pytest.raises(ValueError, match="drop, null: expected both or none, and cond beside them"):
        over_batch(jax.random.key(0), loss, jnp.zeros(3), jnp.zeros(3), drop=0.1)
    with pytest.raises(ValueError, match=r"drop: expected a finite number in \[0, 1\], got 1.5"):
        over_batch(jax.random.key(0), loss, jnp.zeros(3), jnp.zeros(3), drop=1.5, null=1)
