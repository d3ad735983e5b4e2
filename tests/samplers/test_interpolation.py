"""The weights of the exponential integrators: phi-functions, moments, and limits."""

import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

from diffjax._numerics import phis
from diffjax.samplers._interpolation import lagrange_weights, limited_weights

NEAR_ONE = [1 - 1e-7, 1.0, 1 + 1e-7]
ZS = np.array(
    [-100.0, -31.4, -5.0, -2.0, -0.5, -1e-3, -1e-8, 0.0, 1e-8, 1e-3, 0.7, 1.5, 4.0, 20.0, 100.0]
)
ZS = np.sort(np.concatenate([ZS, NEAR_ONE, np.negative(NEAR_ONE)]))


def exact_phi(k, z):
    """Its definition as an integral, in 20 digits."""
    with mp.workdps(20):
        z = mp.mpf(float(z))
        return mp.quad(
            lambda v: mp.exp((1 - v) * z) * v ** (k - 1) / mp.factorial(k - 1),
            np.linspace(0, 1, 6).tolist(),
        )


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k):
    for dtype in (np.float64, np.float32):
        # without e^100, which float32 does not hold
        zs = ZS.astype(dtype)[: -1 if dtype == np.float32 else None]
        exact = np.array([float(exact_phi(k, z)) for z in zs])
        # first and last of several
        ours = np.array(jax.jit(lambda z: [phis(n, z)[k - 1] for n in range(k, 5)])(zs))
        assert ours.dtype == dtype
        error = np.abs(ours / exact - 1).max(0) / np.finfo(dtype).eps
        # the series has terms of one sign or falls fast: a few roundings; the recurrence loses a
        # digit or two per subtraction near |z| = 1, where phi_4 = 0.03 comes from differences of
        # numbers of order one
        assert error[np.abs(zs) < 1].max() < 4, (zs, error)
        assert error.max() < 100, (zs, error)


def test_phi_has_its_derivatives():
    # at 0 the integral of (1 - v) v^(k-1) / (k-1)!, which is 1/(k+1)!
    for k in (1, 2, 3, 4):
        gradient = jax.jit(jax.vmap(jax.grad(lambda z, k=k: phis(k, z)[-1])))(
            jnp.array([0.0, -0.3, 2.0, -30.0])
        )
        assert gradient[0] == pytest.approx(1 / math.factorial(k + 1), rel=1e-15)
        for z, ours in zip((-0.3, 2.0, -30.0), gradient[1:], strict=True):
            with mp.workdps(30):
                # Kummer's function
                exact = mp.diff(lambda z, k=k: mp.hyp1f1(1, k + 1, z) / mp.factorial(k), z)
            # two digits lost to the recurrence
            assert float(ours) == pytest.approx(float(exact), rel=1e-13)


def vandermonde(nodes):
    return np.array([np.asarray(nodes) ** k for k in range(1, len(nodes) + 1)])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_lagrange_weights_have_their_moments(n):
    random = np.random.default_rng(n)
    for _ in range(5):
        nodes = random.permutation(
            np.arange(1, n + 1) * random.choice([-1, 1], n)
        ) * 0.7 + random.uniform(-0.2, 0.2, n)
        moments = random.normal(size=n)
        weights = lagrange_weights(jnp.asarray(nodes), list(moments), 5.0 if n > 1 else None)
        # nodes at least 0.3 apart: the conditioning is below 1e3
        np.testing.assert_allclose(vandermonde(nodes) @ weights, moments, rtol=1e-12, atol=1e-12)


def test_lagrange_weights_leave_out_what_is_not_a_node():
    a, b, inf, nan = -0.7, 1.1, np.inf, np.nan
    moments = [0.3, -0.8, 2.0]
    two = np.linalg.solve(vandermonde([a, b]), moments[:2])
    for other in (inf, -inf, nan, 0.0):
        for place in (0, 1, 2):
            nodes = np.insert([a, b], place, other)
            weights = lagrange_weights(jnp.asarray(nodes), moments, 5.0)
            np.testing.assert_allclose(weights, np.insert(two, place, 0.0), rtol=1e-14)
    for repeated, expected in (
        ([a, a, b], [two[0], 0, two[1]]),
        ([a, b, a], [*two, 0]),
        ([a, b, b], [*two, 0]),
    ):
        np.testing.assert_allclose(
            lagrange_weights(jnp.array(repeated), moments, 5.0), expected, rtol=1e-14
        )
    for nodes in ([inf, b, inf], [b, 0.0, inf], [b, b, b], [nan, b, 0.0]):
        weights = np.asarray(lagrange_weights(jnp.array(nodes), moments))
        assert (
            weights[nodes.index(b)] == pytest.approx(moments[0] / b, rel=1e-15)
            and np.sum(weights != 0) == 1
        )
        weights = np.asarray(lagrange_weights(jnp.array(nodes), moments, 5.0))
        assert (
            weights[nodes.index(b)] == pytest.approx(5.0 / b, rel=1e-15)
            and np.sum(weights != 0) == 1
        )
    for nodes in ([inf, -inf], [0.0, inf], [nan, nan]):
        np.testing.assert_array_equal(lagrange_weights(jnp.array(nodes), moments[:2], 5.0), 0.0)
        jacobian = jax.jacobian(lambda nodes: lagrange_weights(nodes, moments[:2], 5.0))(
            jnp.array(nodes)
        )
        np.testing.assert_array_equal(jacobian, 0.0)


def test_the_order_falls_where_a_step_is_too_long():
    moments = [1.0, 0.5, 1 / 3]  # of a step of length 1 under an even kernel
    even = jnp.array([-1.0, -2.0])
    np.testing.assert_allclose(limited_weights(even, moments, (0.75, 2.625)), [-4 / 3, 5 / 12])
    one = limited_weights(jnp.array([-0.7, -0.9]), moments, (0.75, 2.625))
    np.testing.assert_allclose(one, [-0.5 / 0.7, 0.0])
    np.testing.assert_array_equal(
        limited_weights(jnp.array([-0.6, -2.0]), moments, (0.75, 1.0)), 0.0
    )
    # what is no node does not count: a memory that is not full
    np.testing.assert_allclose(
        limited_weights(jnp.array([-1.0, -jnp.inf]), moments, (0.75, 9.0)), [-0.5, 0.0]
    )
    np.testing.assert_array_equal(
        limited_weights(jnp.array([-0.5, -jnp.inf]), moments, (0.75, 9.0)), 0.0
    )
    everything = limited_weights(jnp.array([-0.1, -0.2]), moments, (np.inf, np.inf))
    np.testing.assert_allclose(everything, lagrange_weights(jnp.array([-0.1, -0.2]), moments[1:]))
