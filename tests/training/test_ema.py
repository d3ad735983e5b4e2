"""Averages of the parameters against their closed forms, in every precision."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from diffjax.training import constant_ema, init_state, make_train_step, power_ema


def averaged(ema, steps=12):
    """The average of params 1, 2, 3, ..., starting at 0, after each step."""
    count = optax.GradientTransformation(
        lambda p: optax.EmptyState(), lambda g, s, p: (jax.tree.map(jnp.ones_like, g), s)
    )
    step = jax.jit(make_train_step(lambda p, k, b: jnp.sum(p), count, ema=ema))
    state, seen = init_state(jax.random.key(0), jnp.zeros(()), count), []
    for _ in range(steps):
        state, _ = step(state, None)
        seen.append(float(state.ema))
    return np.array(seen)


def test_constant_average():
    n = np.arange(1, 13)  # the sum of (1 - d) d^(n - k) k over k = 1..n
    d = 0.8
    np.testing.assert_allclose(averaged(constant_ema(d)), n - d / (1 - d) * (1 - d**n), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_power_average_has_the_weights_of_its_closed_form(gamma):
    """For integer gamma + 1 = g the weight of step k among n is (k^g - (k-1)^g) / n^g, which
    telescopes to 1.
    """
    n, g = 12, gamma + 1
    k = np.arange(1, n + 1.0)
    weights = (1 - (1 - 1 / k) ** g) * np.array(
        [np.prod((1 - 1 / k[i + 1 :]) ** g) for i in range(n)]
    )
    np.testing.assert_allclose(weights, (k**g - (k - 1) ** g) / n**g)  # the closed form is right
    np.testing.assert_allclose(
        averaged(power_ema(gamma), n)[-1], np.sum(k * (k**g - (k - 1) ** g)) / n**g, rtol=1e-6
    )


@pytest.mark.parametrize(("gamma", "std"), [(6.94, 0.10), (16.97, 0.05)])
def test_power_average_has_the_width_of_the_paper(gamma, std):
    n = 4000
    k = np.arange(1, n + 1.0)
    # 1 - decay
    weights = np.array(power_ema(gamma)(jnp.zeros(n), jnp.ones(n), jnp.arange(1, n + 1)))
    weights *= np.append(np.cumprod((1 - weights)[:0:-1])[::-1], 1.0)
    np.testing.assert_allclose(weights.sum(), 1)
    mean = np.sum(weights * k / n)
    np.testing.assert_allclose(np.sqrt(np.sum(weights * (k / n - mean) ** 2)), std, rtol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_half_precision_parameters_follows_the_exact_recursion(dtype):
    """The parameters are 2 from the first step on, the average starts at 0."""
    jump = optax.stateless(lambda g, p: jax.tree.map(lambda x: 2 - x, p))
    step = make_train_step(lambda p, k, b: jnp.sum(p["w"]), jump, ema=constant_ema(0.999))
    start = init_state(jax.random.key(0), {"w": jnp.zeros(2, dtype)}, jump)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=3000))(start)
    np.testing.assert_array_equal(state.params["w"], 2)
    assert state.params["w"].dtype == dtype and state.ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.ema["w"], 2 * (1 - 0.999**3000), rtol=1e-5)  # 1.9006


def test_an_average_that_came_in_half_precision_goes_on_in_float32():
    optimizer = optax.sgd(0.0)
    state = init_state(jax.random.key(0), jnp.full(2, 2, jnp.bfloat16), optimizer)
    state = state._replace(ema=jnp.zeros(2, jnp.bfloat16))
    state, _ = make_train_step(lambda p, k, b: jnp.sum(p), optimizer, ema=constant_ema(0.999))(
        state, None
    )
    assert state.ema.dtype == jnp.float32
    np.testing.assert_allclose(state.ema, 0.002, rtol=1e-6)


@pytest.mark.parametrize("gamma", [6.94, 16.97])
def test_the_power_average_keeps_the_digits_of_its_weight_in_float32(gamma):
    """The weight of the new parameters is `1 - (1 - 1 / k)^(gamma + 1)`."""
    steps = [1, 2, 3, 10, 1000, 10**5, 2_500_000, 5_000_000, 10**7]
    with mpmath.workdps(50), jax.enable_x64(False):
        exact = [float(1 - (1 - mpmath.mpf(1) / k) ** (mpmath.mpf(gamma) + 1)) for k in steps]
        optimizer = optax.sgd(0.0)
        step = jax.jit(make_train_step(lambda p, k, b: 0 * p, optimizer, ema=power_ema(gamma)))
        state = init_state(jax.random.key(0), jnp.ones(()), optimizer)._replace(ema=jnp.zeros(()))
        weights = [step(state._replace(step=jnp.int32(k - 1)), None)[0].ema for k in steps]
    np.testing.assert_allclose(weights, exact, rtol=1e-6)


def test_averages_refuse_what_is_none():
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay: expected a finite number in \[0, 1\], got"):
            constant_ema(decay)
    with pytest.raises(ValueError, match=r"gamma: expected a number above -1, got -1.0"):
        power_ema(-1.0)
