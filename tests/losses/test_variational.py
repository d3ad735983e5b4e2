"""The variational bound against entropies and divergences."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
import scipy.stats

from diffjax import exact, losses, schedules
from diffjax.times import log_snr_times

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(7)  # exact for polynomials of degree 13
WEIGHTS = WEIGHTS / WEIGHTS.sum()
START, END, MEAN, VARIANCE = 0.02, 0.9, 0.7, 0.3


def expected_bound(schedule, denoise, start, end):
    """The bound's mean over N(MEAN, VARIANCE) in 1-D and the noise, by Gauss-Hermite, and over t,
    by Gauss-Legendre.

    The latter in t^(1/4), which flattens what is steep near 0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(60)
    low, high = start**0.25, end**0.25
    roots = low + (high - low) * (nodes + 1) / 2
    ts, weights = roots**4, weights / 2 * (high - low) * 4 * roots**3 / (end - start)

    def at(t):
        def one(z, eps):
            x0 = MEAN + np.sqrt(VARIANCE) * z[None]
            return losses.variational_bound(eps, denoise, schedule, x0, t, start=start, end=end)

        return (
            WEIGHTS
            @ jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.asarray(NODES), jnp.asarray(NODES))
            @ WEIGHTS
        )

    return weights @ jax.vmap(at)(jnp.asarray(ts))


@pytest.fixture
def _noise_is_its_key(monkeypatch):
    monkeypatch.setattr(jax.random, "split", lambda key: (key, key))
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape)
    )


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm", "gvp"])
@pytest.mark.usefixtures("_noise_is_its_key")
def test_the_bound_of_the_exact_denoiser(path):
    """With the exact denoiser it is h(x_s) - log alpha_s + KL(q(x_1) | prior): of a Gaussian, all
    in closed form.

    (The path's relative entropy is I(x_0; x_s) + KL(q(x_1) | prior), and the decoder adds h(x_s |
    x_0) - log alpha_s.)
    """
    schedule = getattr(schedules, path)()
    denoise = exact.gaussian(jnp.array([MEAN]), VARIANCE * jnp.eye(1), schedule)
    (a0, s0), (a1, s1) = (oracles.alpha_sigma(path, t) for t in (START, END))
    entropy = 0.5 * np.log(2 * np.pi * np.e * (VARIANCE + (s0 / a0) ** 2))
    v1 = (a1**2 * VARIANCE + s1**2) / s1**2
    divergence = 0.5 * (v1 + (a1 * MEAN / s1) ** 2 - 1 - np.log(v1))
    bound = jax.jit(expected_bound, static_argnums=(2, 3))(schedule, denoise, START, END)
    np.testing.assert_allclose(bound, entropy + divergence, rtol=1e-8)  # 60 nodes: rounding
    nll = 0.5 * np.log(2 * np.pi * np.e * VARIANCE)
    assert nll < bound  # it bounds the entropy of the data


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
@pytest.mark.usefixtures("_noise_is_its_key")
def test_a_wrong_denoiser_pays_for_its_error():
    """The exact denoiser's bound, and the time's integral of g^2 / (2 sigma^2) times the squared
    error, here sigma^2 c^2.
    """
    schedule, c = schedules.linear_vp(), 0.4
    right = exact.gaussian(jnp.array([MEAN]), VARIANCE * jnp.eye(1), schedule)

    def wrong(x, t):
        estimate = right(x, t)
        return estimate._replace(eps=estimate.eps + c * schedule(t)[1])

    each = jax.jit(
        lambda: [expected_bound(schedule, denoise, START, END) for denoise in (right, wrong)]
    )()
    beta = oracles.TABLE["linear_vp"][3]
    extra = c**2 / 2 * float(oracles.mp.quad(beta, [START, END]))
    np.testing.assert_allclose(each[1] - each[0], extra, rtol=1e-8)


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
@pytest.mark.usefixtures("_noise_is_its_key")
def test_a_learned_schedule_matters_at_its_ends_alone():
    """The bound's gradient by the network between is 0 (VDM, section 5.1), and by the ends that of
    the closed form.
    """
    numbers = 0.5, [2.0, -5.0, 1.0], [-1.0, 3.0, 0.2], [0.7, -0.4, 0.1]
    network = schedules.MonotoneNetwork(*map(jnp.asarray, numbers))

    def bound(network, high, low):
        schedule = schedules.monotone_vp(network, high, low)
        denoise = exact.gaussian(jnp.array([MEAN]), VARIANCE * jnp.eye(1), schedule)
        return expected_bound(schedule, denoise, 0.0, 1.0)

    def closed_form(high, low):
        noise = jnp.exp(-2 * high)
        signal = jnp.exp(2 * low)
        v1 = signal * VARIANCE + 1
        divergence = 0.5 * (v1 + signal * MEAN**2 - 1 - jnp.log(v1))
        return 0.5 * jnp.log(2 * jnp.pi * jnp.e * (VARIANCE + noise)) + divergence

    ends = 1.5, -0.7
    value, gradients = jax.jit(jax.value_and_grad(bound, (0, 1, 2)))(
        network, *map(jnp.asarray, ends)
    )
    np.testing.assert_allclose(value, closed_form(*ends), rtol=1e-8)
    np.testing.assert_allclose(gradients[1:], jax.grad(closed_form, (0, 1))(*ends), rtol=1e-6)
    assert max(float(jnp.abs(g).max()) for g in gradients[0]) < 1e-7


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
@pytest.mark.parametrize("path", ["linear_vp", "linear"])
def test_importance_weighted_times_give_the_same_bound(monkeypatch, path):
    """The mean over 400 stratified times, uniform in the log-SNR, with their weights: of an error
    of order 400^-1.5.
    """
    schedule = getattr(schedules, path)()
    denoise = exact.gaussian(jnp.array([MEAN]), VARIANCE * jnp.eye(1), schedule)
    ts, weights = jax.jit(lambda: log_snr_times(jax.random.key(0), 400, schedule, START, END))()
    monkeypatch.setattr(jax.random, "split", lambda key: (key, key))
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, dtype=float: jnp.broadcast_to(key, shape)
    )

    def one(t, weight, z, eps):
        x0 = MEAN + np.sqrt(VARIANCE) * z[None]
        return losses.variational_bound(
            eps, denoise, schedule, x0, t, start=START, end=END, weight=weight
        )

    over_noise = jax.vmap(jax.vmap(one, (None, None, None, 0)), (None, None, 0, None))
    values = jax.jit(jax.vmap(over_noise, (0, 0, None, None)))(ts, weights, NODES, NODES)
    by_importance = np.mean(values @ WEIGHTS @ WEIGHTS)
    expected = jax.jit(lambda: expected_bound(schedule, denoise, START, END))()
    np.testing.assert_allclose(by_importance, expected, rtol=1e-3)


@pytest.mark.usefixtures("without_type_checks")  # a number stands for the key
@pytest.mark.usefixtures("_noise_is_its_key")
@pytest.mark.parametrize("levels", [2, 3])
def test_the_bound_of_discrete_data_is_their_entropy_and_the_prior_s_divergence(levels):
    """With the exact denoiser of k equally likely levels: log k + KL(q(x_1) | prior), the latter by
    quadrature.

    (The path's relative entropy is I(x_0; x_s) + KL, and the decoder, by Bayes, adds H(x_0 | x_s).)
    """
    values = (2 * np.arange(levels) + 1) / levels - 1
    schedule, (a1, s1) = schedules.linear(), oracles.alpha_sigma("linear", END)
    denoise = exact.empirical(jnp.asarray(values)[:, None], schedule)
    nodes, weights = np.polynomial.legendre.leggauss(100)
    ts, weights = START + (END - START) * (nodes + 1) / 2, weights / 2
    noises = np.linspace(
        -8, 8, 321
    )  # the trapezoidal rule, geometric in the step for what is smooth and ends in nothing
    masses = scipy.stats.norm.pdf(noises)

    @jax.jit
    def over_all(ts, values, noises):
        def one(t, value, eps):
            reconstruction = losses.discrete_reconstruction(levels)
            options = {"start": START, "end": END, "reconstruction": reconstruction}
            return losses.variational_bound(eps, denoise, schedule, value[None], t, **options)

        over_noise = jax.vmap(
            jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None)
        )
        return over_noise(ts, values, noises)

    bounds = np.asarray(over_all(ts, values, noises))
    bound = weights @ (bounds @ (masses / masses.sum())).mean(1)

    def integrand(x):
        density = np.mean(scipy.stats.norm.pdf(x, a1 * values, s1))
        return density * (np.log(density) - scipy.stats.norm.logpdf(x, 0, s1))

    divergence = scipy.integrate.quad(integrand, -8, 8, epsabs=1e-12)[0]
    np.testing.assert_allclose(bound, np.log(levels) + divergence, rtol=1e-6)  # of the quadratures


def test_the_discrete_reconstruction_is_a_distribution_over_the_levels(monkeypatch):
    """At one x_s the probabilities of all levels add up to one, in every element; the nearest has
    the largest.
    """
    levels, alpha, sigma = 5, 0.8, 0.3
    values = jnp.asarray((2 * np.arange(levels) + 1) / levels - 1)
    noises = (0.4 - alpha * values) / sigma  # all at x_s = 0.4
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, dtype: jnp.broadcast_to(key, shape)
    )
    reconstruct = losses.discrete_reconstruction(levels)
    each = jnp.exp(
        -jnp.stack(
            [reconstruct(z, v[None], alpha, sigma) for z, v in zip(noises, values, strict=True)]
        )
    )
    np.testing.assert_allclose(each.sum(), 1.0, rtol=1e-12)
    assert int(jnp.argmax(each)) == int(jnp.argmin(jnp.abs(noises)))
    # anywhere in its bin: the same level, less likely where x_s is farther
    inside = values[2] + 0.9 / levels
    np.testing.assert_allclose(
        reconstruct((0.4 - alpha * inside) / sigma, inside[None], alpha, sigma), -jnp.log(each[2])
    )
    odds = (noises[1] ** 2 - noises[3] ** 2) / 2  # Bayes
    np.testing.assert_allclose(jnp.log(each[3] / each[1]), odds, rtol=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="levels: expected at least 2, got 1"):
        losses.discrete_reconstruction(1)
    with pytest.raises(
        ValueError, match=r"high, low: expected .* low < high, got high=1\.0, low=2\.0"
    ):
        schedules.monotone_vp(schedules.init_monotone(jax.random.key(0)), 1.0, 2.0)
    with pytest.raises(ValueError, match="units: expected at least 1, got 0"):
        schedules.init_monotone(jax.random.key(0), 0)
