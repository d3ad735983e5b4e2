"""Probes, and the divergence that they estimate."""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.divergence import divergence, exact_probes, gaussian_probes, rademacher_probes


def field(x):
    return jnp.stack([jnp.sin(x[0]) * x[1], x[0] ** 2 * x[1] + jnp.cos(x[1])])


def test_hutchinson_over_all_signs_is_the_trace():
    x = jnp.array([0.3, -1.2])
    trace = np.cos(0.3) * -1.2 + 0.3**2 - np.sin(-1.2)  # by hand
    signs = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    for probes in (signs, exact_probes(None, x), jnp.sqrt(2) * jnp.eye(2)):
        value, estimate = divergence(field, x, probes)
        np.testing.assert_allclose(estimate, trace, rtol=1e-13)
        np.testing.assert_allclose(value, field(x))
    # one probe alone is off by the antisymmetric rest: z^T J z = trace + z_0 z_1 (J_01 + J_10)
    off = np.sin(0.3) + 2 * 0.3 * -1.2
    np.testing.assert_allclose(divergence(field, x, signs[:1])[1], trace + off, rtol=1e-13)


def test_divergence_of_a_linear_map_of_any_shape():
    a = np.random.default_rng(0).normal(size=(2, 3, 2, 3))
    x = jnp.ones((2, 3))
    estimate = divergence(lambda x: jnp.einsum("ijkl,kl->ij", a, x), x, exact_probes(None, x))[1]
    np.testing.assert_allclose(estimate, np.einsum("ijij", a), rtol=1e-12)


def test_probes_are_unit_and_as_many_as_asked():
    x = jnp.zeros((2, 2))
    signs = rademacher_probes(jax.random.key(0), x, n=64)
    assert signs.shape == (64, 2, 2) and set(np.unique(signs)) == {-1.0, 1.0}
    # the mean square of 4 * 4096 normals is 1 within five standard errors, sqrt(2 / 16384) each
    assert abs(
        float(jnp.mean(gaussian_probes(jax.random.key(0), x, n=4096) ** 2)) - 1
    ) < 5 * np.sqrt(2 / 16384)
