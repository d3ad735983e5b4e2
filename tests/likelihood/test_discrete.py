"""Bits per dimension and dequantization of discrete data against known probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax.likelihood import (
    bits_per_dim,
    dequantize,
    importance_weighted_bound,
    quantize,
    variational_dequantize,
)


def test_bits_per_dim_of_uniform_data_is_the_number_of_bits():
    for levels in (2, 17, 256):
        log_density = -5 * np.log(2.0)  # uniform on [-1, 1]^5
        np.testing.assert_allclose(
            bits_per_dim(log_density, 5, levels), np.log2(levels), rtol=1e-14
        )
    np.testing.assert_allclose(bits_per_dim(jnp.array([-3 * np.log(2.0), 0.0]), 3), [1.0, 0.0])


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantized_values_stay_in_their_bins(levels):
    values = jnp.tile(jnp.arange(levels), 50)
    x = dequantize(jax.random.key(0), values, levels)
    np.testing.assert_array_equal(np.floor((np.asarray(x) + 1) / 2 * levels), values)
    np.testing.assert_array_equal(quantize(x, levels), values)
    u = (np.asarray(x) + 1) / 2 * levels - np.asarray(values)
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size) and 0 <= u.min() and u.max() < 1


@pytest.mark.parametrize("levels", [17, 256, 65536])
def test_float32_does_not_leave_the_bins(levels):
    # value + u rounds up into the next bin for 1 - u < 2^-17 at 8 bits, 8 of a million draws; a
    # saturated sigmoid is 0 or 1
    inside = jnp.tile(jnp.arange(levels, dtype=jnp.int32), 10**6 // levels)
    with jax.enable_x64(False):
        uniform = dequantize(jax.random.key(0), inside, levels)
        assert np.array_equal(quantize(uniform, levels), inside)
        ends = jnp.arange(levels, dtype=jnp.int32)
        low, high = (
            variational_dequantize(jax.random.key(0), ends, levels, m, 1.0)[0]
            for m in (-200.0, 200.0)
        )
        assert uniform.dtype == low.dtype == jnp.float32
    for values, x in ((inside, uniform), (ends, low), (ends, high)):
        np.testing.assert_array_equal(np.floor((np.asarray(x, float) + 1) / 2 * levels), values)


W, MODES, STDS = np.array([0.4, 0.6]), np.array([-0.5, 0.3]), np.array([0.2, 0.35])


def density(x):
    return W @ scipy.stats.norm.pdf(np.asarray(x)[None], MODES[:, None], STDS[:, None])


@pytest.mark.parametrize("value", [0, 1, 2])
def test_uniform_and_importance_weighted_bounds_of_a_known_bin(value):
    # K-fold Gauss-Legendre quadrature in place of the draws: 12 nodes are exact to about 1e-9 on
    # these densities
    levels, edges = 3, -1 + 2 / 3 * np.array([value, value + 1])
    exact = W @ np.diff(scipy.stats.norm.cdf(edges[None], MODES[:, None], STDS[:, None]))[:, 0]
    nodes, weights = np.polynomial.legendre.leggauss(12)
    log_densities = np.log(density(2 * (value + (nodes + 1) / 2) / levels - 1))
    bits = []
    for k in (1, 2, 4):
        draws = np.stack([axis.ravel() for axis in np.meshgrid(*[log_densities] * k)])
        probabilities = np.prod([axis.ravel() for axis in np.meshgrid(*[weights / 2] * k)], axis=0)
        bounds = np.asarray(bits_per_dim(importance_weighted_bound(draws), 1, levels))
        # the mean of K weights is unbiased, whatever K
        np.testing.assert_allclose(probabilities @ 2.0**-bounds, exact, rtol=1e-8)
        bits.append(probabilities @ bounds)
    gaps = np.array(bits) + np.log2(exact)
    assert (gaps > 0).all() and (np.diff(gaps) < 0).all()
    # to first order in 1/K the gap is that of the delta method, var(w) / (2 K mean(w)^2): twice as
    # many, half of it
    assert 0.4 < gaps[2] / gaps[1] < 0.6


PROBABILITY, LEVELS, VALUES = 0.2, 5, np.array([0, 3])
MEAN, SCALE = np.array([-0.8, 1.5]), np.array([0.6, 1.4])


def model_log_density(x):
    """Of a model whose dequantization noise is logit-normal: the derivative by x of a distribution
    function on one bin.
    """

    def distribution(x, value, mean, scale):
        u = (x + 1) * LEVELS / 2 - value
        return jax.scipy.stats.norm.cdf((jnp.log(u) - jnp.log1p(-u)) / scale - mean / scale)

    slopes = jax.vmap(jax.grad(distribution))(x, VALUES, MEAN, SCALE)
    return jnp.log(PROBABILITY) + jnp.sum(jnp.log(slopes))


def log_weights(mean, scale):
    def one(key):
        x, log_q = variational_dequantize(key, VALUES, LEVELS, mean, scale)
        return model_log_density(x) - log_q

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20000))


def test_the_variational_bound_is_exact_with_the_right_noise():
    # log p - log q is the log probability for every single draw; rounding of u next to 0 and 1
    # costs some digits
    bits = bits_per_dim(log_weights(MEAN, SCALE), 2, LEVELS)
    np.testing.assert_allclose(bits, -np.log2(PROBABILITY) / 2, rtol=1e-8)


def test_the_variational_bound_is_off_by_the_divergence_of_the_noise():
    # sigmoid keeps the Kullback-Leibler divergence, so it is that of two normals
    mean, scale = np.array([-0.5, 1.0]), np.array([0.8, 1.1])
    gap = np.sum(np.log(SCALE / scale) + (scale**2 + (mean - MEAN) ** 2) / (2 * SCALE**2) - 0.5)
    exact = np.log(PROBABILITY / (2 / LEVELS) ** 2)
    values = np.asarray(log_weights(mean, scale))
    error = values.std() / np.sqrt(values.size)
    assert abs(values.mean() - (exact - gap)) < 5 * error < gap / 4
    # of 100 draws each
    assert abs(importance_weighted_bound(values.reshape(100, 200)).mean() - exact) < 0.1 * gap


def test_saturated_noise_has_finite_gradients():
    def f(mean, scale):
        x, log_q = variational_dequantize(jax.random.key(0), jnp.array([0, 255]), 256, mean, scale)
        return jnp.sum(x) - log_q

    with jax.enable_x64(False):
        compiled = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
        for mean in (-1e4, -200.0, 200.0, 1e4):
            value, gradients = compiled(mean, 1.0)
            assert np.isfinite([value, *gradients]).all()
            # log q = -log u (1 - u) + ... there, whose slope by the logit is 1 or -1
            np.testing.assert_allclose(gradients[0], -2 * np.sign(mean), atol=1e-6)
