"""Length, energy and curvature of paths in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.metrics import curvature, path_energy, path_length


def test_a_circle_and_a_straight_line():
    """A quarter circle at constant speed: length and speed pi/2, energy (pi/2)^2, chord sqrt(2).
    Chords: O(1/n^2) below.
    """
    ts = jnp.linspace(1, 0, 401)
    circle = jnp.stack([jnp.cos(jnp.pi / 2 * ts), jnp.sin(jnp.pi / 2 * ts)], 1)
    np.testing.assert_allclose(path_length(circle), np.pi / 2, rtol=1e-5)
    np.testing.assert_allclose(path_energy(ts, circle), np.pi**2 / 4, rtol=1e-5)
    np.testing.assert_allclose(curvature(ts, circle), np.pi**2 / 4 - 2, rtol=1e-4)
    line = jnp.array([[1.0, 2.0]]) + ts[:, None] * jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(
        [path_length(line), path_energy(ts, line), curvature(ts, line)], [5, 25, 0], atol=1e-12
    )
    uneven = line[jnp.array([0, 1, 7, 100, 400])]  # constant speed: no matter where it is looked at
    np.testing.assert_allclose(curvature(ts[jnp.array([0, 1, 7, 100, 400])], uneven), 0, atol=1e-12)


def test_a_path_that_rests_has_a_finite_gradient():
    still = jnp.array([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(jax.grad(path_length)(still)[2], [1.0, 0.0], atol=1e-12)
    assert np.isfinite(jax.grad(path_length)(still)).all()


@pytest.mark.usefixtures("without_type_checks")
def test_paths_refuse():
    with pytest.raises(
        ValueError, match=r"xs: expected at least two points \(times, \*x\), got shape \(1, 2\)"
    ):
        path_length(jnp.ones((1, 2)))
    with pytest.raises(
        ValueError, match=r"ts: expected a time for each of the 3 points, got shape \(2,\)"
    ):
        path_energy(jnp.ones(2), jnp.ones((3, 2)))
