"""Guidance by observations: exact where it is, and its own biased law where it is not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
from guided_gaussians import errors, limit

from diffjax import bind, schedules
from diffjax.exact import conditioned_gaussian, gaussian
from diffjax.guidance import diffpir, dps, mmps, pigdm, tweedie_twist
from diffjax.samplers import ddim_kernel, ddpm_kernel

A = np.array([[1.0, 0.5, 0.0, -0.3], [0.2, -1.0, 0.7, 0.0]])
Y, NOISE = np.array([0.7, -0.4]), 0.3
ROOT = np.array([[1.0, 0, 0, 0], [0.4, 0.8, 0, 0], [-0.3, 0.2, 0.5, 0], [0.1, 0.6, -0.2, 0.9]])
MEAN, COV = np.array([0.5, -0.2, 0.0, 1.0]), ROOT @ ROOT.T
PATHS = ["linear", "linear_vp", "gvp", "edm"]
X = np.array([0.9, -0.1, 0.4, 1.3])


def observe(x):
    return jnp.asarray(A) @ x


def posterior_mean(x, alpha, sigma, mean=MEAN, cov=COV):
    """E[x0 | x_t = x, y], both taken for observations of x0 at once."""
    both = np.vstack([alpha * np.eye(4), A])
    noise = np.diag([sigma**2] * 4 + [NOISE**2] * 2)
    gain = cov @ both.T @ np.linalg.inv(both @ cov @ both.T + noise)
    return mean + gain @ (np.concatenate([x, Y]) - both @ mean)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_mmps_is_exact_for_every_gaussian_prior(path, t):
    schedule = getattr(schedules, path)()
    alpha, sigma = oracles.alpha_sigma(path, t)
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    x0, eps = mmps(prior, schedule, observe, jnp.asarray(Y), NOISE, 2)(X, t)
    expected = posterior_mean(np.asarray(X), alpha, sigma)
    np.testing.assert_allclose(x0, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, X, rtol=1e-10)
    # and the exact posterior's denoiser is the same
    exact = gaussian(*conditioned_gaussian(MEAN, COV, A, Y, NOISE**2 * np.eye(2)), schedule)
    np.testing.assert_allclose(exact(X, t).x0, expected, rtol=1e-8, atol=1e-8)


def test_fewer_iterations_are_not_enough():
    schedule = schedules.linear()
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    one = mmps(prior, schedule, observe, jnp.asarray(Y), NOISE, 1)(X, 0.5).x0
    assert abs(one - posterior_mean(np.asarray(X), 0.5, 0.5)).max() > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_pigdm_is_exact_for_an_isotropic_prior_and_for_no_other(path):
    schedule, t, s = getattr(schedules, path)(), 0.4, 0.7
    alpha, sigma = oracles.alpha_sigma(path, t)

    def guided(cov):
        prior = gaussian(jnp.asarray(MEAN), jnp.asarray(cov), schedule)
        return pigdm(prior, schedule, observe, jnp.asarray(Y), NOISE, s)(X, t).x0

    isotropic = s**2 * np.eye(4)
    expected = posterior_mean(np.asarray(X), alpha, sigma, cov=isotropic)
    np.testing.assert_allclose(guided(isotropic), expected, rtol=1e-9, atol=1e-9)
    assert abs(guided(COV) - posterior_mean(np.asarray(X), alpha, sigma)).max() > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_diffpir_is_exact_for_a_flat_prior(path):
    schedule, t = getattr(schedules, path)(), 0.4
    alpha, sigma = oracles.alpha_sigma(path, t)
    flat = 1e9 * np.eye(4)
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(flat), schedule)
    got = diffpir(prior, schedule, observe, jnp.asarray(Y), NOISE)(X, t)
    expected = posterior_mean(np.asarray(X), alpha, sigma, cov=flat)
    np.testing.assert_allclose(got.x0, expected, rtol=1e-5, atol=1e-5)


def test_diffpir_is_a_proximal_point():
    schedule, t, weight = schedules.linear(), 0.4, 3.0
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    z = diffpir(prior, schedule, observe, jnp.asarray(Y), NOISE, weight)(X, t).x0
    r2 = (0.4 / 0.6) ** 2 / weight
    slope = jax.grad(
        lambda z: (
            jnp.sum((Y - observe(z)) ** 2) / NOISE**2 + jnp.sum((z - prior(X, t).x0) ** 2) / r2
        )
    )(z)
    np.testing.assert_allclose(slope, 0, atol=1e-9)


def test_dps_is_guided_by_the_likelihood_of_the_estimate():
    schedule, t = schedules.linear(), 0.4
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    got = dps(prior, schedule, observe, jnp.asarray(Y), NOISE)(X, t)

    def log_likelihood(x):
        return -0.5 * jnp.sum((Y - observe(prior(x, t).x0)) ** 2) / NOISE**2

    expected = prior(X, t).eps - 0.4 * jax.grad(log_likelihood)(X)
    np.testing.assert_allclose(got.eps, expected, rtol=1e-10)


# ---- the laws at the end, on N(0, C) with y an observation of the first number -------------------

PRIOR_COV = np.array([[1.0, 0.6], [0.6, 0.8]])
FIRST = np.array([[1.0, 0.0]])
STD = 0.5
START, END = 0.98, 0.02


def tweedie(alpha, sigma):
    """x0 = P x, and V = sigma^2 / alpha P."""
    p = alpha * PRIOR_COV @ np.linalg.inv(alpha**2 * PRIOR_COV + sigma**2 * np.eye(2))
    return p, sigma**2 / alpha * p


def moved(left, inner, alpha, sigma):
    """(P, q) of x0' = x0 + L A^T (A W A^T + R)^-1 (y - A x0)."""
    p, _ = tweedie(alpha, sigma)
    gain = left @ FIRST.T @ np.linalg.inv(FIRST @ inner @ FIRST.T + STD**2 * np.eye(1))
    return p - gain @ FIRST @ p, gain @ np.ones(1)


def isotropic(alpha, sigma):
    return sigma**2 / (alpha**2 + sigma**2) * np.eye(2)


METHODS = {  # the method, and the covariances on the left and inside
    "mmps": (mmps, lambda a, s: (tweedie(a, s)[1], tweedie(a, s)[1])),
    "pigdm": (pigdm, lambda a, s: (tweedie(a, s)[1], isotropic(a, s))),
    "diffpir": (diffpir, lambda a, s: 2 * ((s / a) ** 2 * np.eye(2),)),
    "dps": (dps, lambda a, s: (tweedie(a, s)[1], 0 * np.eye(2))),
}
KERNELS = {"flow": (bind(ddim_kernel, eta=0.0), 0.0), "sde": (ddpm_kernel, 1.0)}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", METHODS)
def test_samplers_reach_the_law_of_their_method(name, kind):
    method, covariances = METHODS[name]
    make, noise = KERNELS[kind]
    schedule, steps = schedules.gvp(), [64, 128, 256, 512]
    prior = gaussian(jnp.zeros(2), jnp.asarray(PRIOR_COV), schedule)
    guided = method(prior, schedule, lambda x: x[:1], jnp.ones(1), STD)
    mean, cov = np.zeros(2), np.eye(2)
    expected = limit(
        lambda a, s: moved(*covariances(a, s), a, s), schedule, noise, mean, cov, START, END
    )
    found = errors(make(guided, schedule), expected, steps, mean, cov, START, END)
    assert found[-1] < 0.02
    assert abs(oracles.fitted_order(steps, found) - 1) < 0.2, found


def test_the_law_of_dps_in_closed_form():
    # prior N(0, 1), noise s^2, on a variance-preserving path
    s2, y = 0.25, 1.0
    k = 1 / (2 * s2)
    flow = y * 2 * np.sqrt(k) * scipy.special.dawsn(np.sqrt(k)), np.exp(-1 / s2)
    sde = y * (1 - np.exp(-1 / s2)), s2 / 2 * (1 - np.exp(-2 / s2))
    np.testing.assert_allclose((*flow, *sde), (1.27998, 0.01832, 0.98168, 0.12496), atol=1e-5)
    schedule, steps = schedules.gvp(), [64, 128, 256, 512]
    prior = gaussian(jnp.zeros(1), jnp.eye(1), schedule)
    guided = dps(prior, schedule, lambda x: x, jnp.array([y]), np.sqrt(s2))
    for kind, (mean, var) in {"flow": flow, "sde": sde}.items():
        kernel = KERNELS[kind][0](guided, schedule)
        expected = np.array([mean]), np.array([[var]])
        # from just below t = 1, where x is N(0, 1) up to 1e-5 whatever the observation is
        found = errors(kernel, expected, steps, np.zeros(1), np.eye(1), 1 - 1e-5)
        assert found[-1] < 0.02
        assert abs(oracles.fitted_order(steps, found) - 1) < 0.2, (kind, found)


# ---- the twist, and what is refused --------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_twist_is_the_likelihood_of_x_t_for_a_gaussian_prior(path):
    schedule = getattr(schedules, path)()
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    log_twist = tweedie_twist(prior, schedule, observe, jnp.asarray(Y), NOISE)
    for t in (0.1, 0.8):
        alpha, sigma = oracles.alpha_sigma(path, t)
        gain = alpha * COV @ np.linalg.inv(alpha**2 * COV + sigma**2 * np.eye(4))
        mean = MEAN + gain @ (np.asarray(X) - alpha * MEAN)
        cov = COV - alpha * gain @ COV
        expected = scipy.stats.multivariate_normal.logpdf(
            Y, A @ mean, A @ cov @ A.T + NOISE**2 * np.eye(2)
        )
        np.testing.assert_allclose(log_twist(X, t), expected, rtol=1e-9)
        gradient = jax.grad(log_twist)(X, t)
        guided = mmps(prior, schedule, observe, jnp.asarray(Y), NOISE, 2)
        expected = (prior(X, t).eps - guided(X, t).eps) / sigma
        np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-10)


def test_the_twist_at_the_data_is_the_likelihood():
    schedule = schedules.linear()

    # a network that has no noise estimate there
    def network(x, t):
        return jnp.where(t > 0, x, jnp.nan)

    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    for denoise in (prior, lambda x, t: jax.tree.map(lambda e: network(e, t), prior(x, t))):
        log_twist = tweedie_twist(denoise, schedule, observe, jnp.asarray(Y), NOISE)
        expected = scipy.stats.norm.logpdf(Y, A @ np.asarray(X), NOISE).sum()
        np.testing.assert_allclose(log_twist(X, 0.0), expected, rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_guided_by_vmap(name):
    schedule = schedules.linear()
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    guided = METHODS[name][0](prior, schedule, lambda x: 2 * x, jnp.ones(4), 0.5)
    xs = jnp.asarray(np.stack([X, 2 * X]))
    with pytest.raises(ValueError, match=r"y: expected the shape of observe\(x\).*vmap"):
        guided(xs, 0.5)
    each = jax.vmap(guided, in_axes=(0, None))(xs, 0.5)
    chex.assert_trees_all_close(each.x0[1], guided(xs[1], 0.5).x0, rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_with_respect_to_the_observation(name):
    schedule = schedules.linear()
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)

    def first(y):
        return METHODS[name][0](prior, schedule, observe, y, NOISE)(X, 0.5).x0[0]

    slope = jax.grad(first)(jnp.asarray(Y))
    for i in range(2):
        step = 1e-5 * np.eye(2)[i]
        difference = (first(Y + step) - first(Y - step)) / 2e-5
        np.testing.assert_allclose(slope[i], difference, rtol=1e-6)


def test_without_noise_the_observation_is_met():
    schedule = schedules.linear()
    prior = gaussian(jnp.asarray(MEAN), jnp.asarray(COV), schedule)
    isotropic = gaussian(jnp.asarray(MEAN), jnp.eye(4), schedule)
    for method, denoise in ((mmps, prior), (diffpir, prior), (pigdm, isotropic)):
        x0 = method(denoise, schedule, observe, jnp.asarray(Y), 0.0, iterations=2)(X, 0.5).x0
        np.testing.assert_allclose(observe(x0), Y, rtol=1e-8)


@pytest.mark.parametrize("iterations", [5, 20])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_inpainting_in_single_precision(noise, iterations):
    """Every second number of 16, of which those that are not observed are 0 in y."""
    rng, schedule = np.random.default_rng(0), schedules.linear()
    root = rng.normal(size=(16, 16)) / 4
    cov = root @ root.T + 0.1 * np.eye(16)
    mask, data, x = np.arange(16) % 2, root @ rng.normal(size=16), rng.normal(size=16)
    a = np.eye(16)[mask == 1]
    both = np.vstack([0.5 * np.eye(16), a])
    spread = np.diag([0.25] * 16 + [noise**2] * 8)
    gain = cov @ both.T @ np.linalg.inv(both @ cov @ both.T + spread)
    expected = gain @ np.concatenate([x, a @ data])
    prior = gaussian(np.zeros(16, np.float32), np.float32(cov), schedule)
    mask = jnp.asarray(mask, jnp.float32)
    y = jnp.asarray(mask * data, jnp.float32)
    guided = mmps(prior, schedule, lambda x: mask * x, y, noise, iterations)
    error = abs(guided(jnp.asarray(x, jnp.float32), 0.5).x0 - expected).max()
    assert error < (0.1 if iterations == 5 else 1e-4)


@pytest.mark.parametrize("iterations", [5, 20, 100])
def test_an_observation_that_no_data_have_does_not_diverge(iterations):
    """The image in place of mask * image: the residual grows, and the best iterate is kept."""
    rng, schedule = np.random.default_rng(0), schedules.linear()
    root = rng.normal(size=(16, 16)) / 4
    prior = gaussian(np.zeros(16, np.float32), np.float32(root @ root.T), schedule)
    mask = jnp.asarray(np.arange(16) % 2, jnp.float32)
    y = jnp.asarray(root @ rng.normal(size=16), jnp.float32)
    x = jnp.asarray(rng.normal(size=16), jnp.float32)
    for method in (mmps, pigdm, diffpir):
        guided = method(prior, schedule, lambda x: mask * x, y, 0.0, iterations=iterations)
        assert abs(guided(x, 0.5).x0).max() < 10


def test_the_precision_of_y_is_that_of_the_prediction():
    schedule = schedules.linear()
    prior = gaussian(np.zeros(4, np.float32), np.eye(4, dtype=np.float32), schedule)
    matrix, x = jnp.asarray(A, jnp.float32), jnp.asarray(X, jnp.float32)
    for method in (mmps, pigdm, diffpir, dps):
        x0 = method(prior, schedule, lambda x: matrix @ x, Y, 0.5)(x, 0.5).x0
        assert x0.dtype == jnp.float32


@pytest.mark.usefixtures("without_type_checks")
def test_wrong_arguments_are_named():
    schedule = schedules.linear()
    prior = gaussian(jnp.zeros(4), jnp.eye(4), schedule)
    with pytest.raises(ValueError, match=r"noise: expected a finite number in \[0, inf\]"):
        mmps(prior, schedule, observe, jnp.asarray(Y), -1.0)
    for method in (dps, tweedie_twist):
        with pytest.raises(ValueError, match="noise: expected a finite number"):
            method(prior, schedule, observe, jnp.asarray(Y), 0.0)
    for iterations in (0, 2.5):
        with pytest.raises(ValueError, match="iterations: expected an integer of at least 1, got"):
            mmps(prior, schedule, observe, jnp.asarray(Y), 1.0, iterations)
    with pytest.raises(ValueError, match=r"noise: expected a shape that broadcasts to y, \(2,\)"):
        mmps(prior, schedule, observe, jnp.asarray(Y), jnp.ones(3))
    with pytest.raises(ValueError, match=r"observe: expected a function of one sample"):
        mmps(prior, schedule, A, jnp.asarray(Y), 1.0)
    with pytest.raises(ValueError, match=r"y: expected the shape of observe\(x\), None"):
        mmps(prior, schedule, lambda x: (x[:2], x[2:]), jnp.asarray(Y), 1.0)(X, 0.5)
    with pytest.raises(ValueError, match="t: expected a time with alpha > 0"):
        mmps(prior, schedule, observe, jnp.asarray(Y), 1.0)(X, 1.0)
    # without the derivative of the network there is a limit
    assert jnp.isfinite(diffpir(prior, schedule, observe, jnp.asarray(Y), 1.0)(X, 1.0).x0).all()
