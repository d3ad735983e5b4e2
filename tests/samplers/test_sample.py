"""The engine: a sample and its batch, a trajectory and its end, and what reverse mode keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_gaussians import X1, data

from diffjax import bind
from diffjax.grids import uniform
from diffjax.parametrizations import X0, as_denoiser
from diffjax.samplers import (
    checkpointed_scan,
    ddim,
    ddpm,
    edm_sampler,
    euler,
    euler_maruyama,
    heun,
    predictor_corrector,
    sample,
    trajectory,
    truncated_scan,
)
from diffjax.schedules import linear, linear_vp


def stochastic_samplers(schedule):
    denoise = data(schedule)
    return {
        "ddpm": ddpm(denoise, schedule),
        "ddim": ddim(denoise, schedule, 0.5),
        "euler_maruyama": euler_maruyama(denoise, schedule),
        "edm": edm_sampler(denoise, schedule, 0.3),
        "predictor_corrector": predictor_corrector(denoise, schedule),
    }


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler_maruyama", "edm", "predictor_corrector"])
def test_a_sample_does_not_depend_on_its_batch(name):
    # one key a sample: alone or among others, to the last digits of a differently vectorised
    # program
    schedule = linear_vp()
    sampler, ts = stochastic_samplers(schedule)[name], uniform(4, end=0.05)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(sample, in_axes=(0, None, 0, None)))(keys, sampler, xs, ts)
    with jax.debug_key_reuse(False):
        alone = jax.jit(jax.vmap(sample, in_axes=(0, None, 0, None)))(
            keys[1:2], sampler, xs[1:2], ts
        )
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-10)


@pytest.mark.parametrize("make", [ddim, euler, heun, edm_sampler])
def test_a_deterministic_batch_is_its_samples(make):
    schedule = linear_vp()
    sampler, ts = make(data(schedule), schedule), uniform(4, end=0.05)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    run = jax.jit(sample)
    together = run(jax.random.key(0), sampler, xs, ts)
    np.testing.assert_allclose(
        together, [run(jax.random.key(0), sampler, x, ts) for x in xs], rtol=1e-12
    )


@pytest.mark.parametrize("scan", [jax.lax.scan, checkpointed_scan, truncated_scan(2)])
def test_the_last_point_of_a_trajectory_is_the_sample(scan):
    schedule, ts = linear_vp(), uniform(7, end=0.05)
    sampler = ddpm(data(schedule), schedule)
    xs = jax.jit(lambda key: trajectory(key, sampler, jnp.asarray(X1), ts, scan))(jax.random.key(0))
    x = jax.jit(lambda key: sample(key, sampler, jnp.asarray(X1), ts, scan))(jax.random.key(0))
    plain = jax.jit(lambda key: sample(key, sampler, jnp.asarray(X1), ts))(jax.random.key(0))
    assert xs.shape == (8, 2)
    np.testing.assert_array_equal(xs[0], X1)
    np.testing.assert_allclose(xs[-1], x, rtol=1e-12)
    np.testing.assert_allclose(x, plain, rtol=1e-12)


def linear_network(w, x, t):
    return w * x * t


def loss_of(scan, w, x, ts):
    schedule = linear()
    sampler = ddim(as_denoiser(bind(linear_network, w), schedule, X0), schedule)
    return jnp.sum(sample(jax.random.key(0), sampler, x, ts, scan) ** 2)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9, 12])
def test_checkpointing_does_not_change_gradients(n):
    ts = uniform(n, end=0.1)
    full, checkpointed = (
        jax.jit(jax.grad(functools.partial(loss_of, scan), argnums=(0, 1, 2)))(
            0.3, jnp.asarray(X1), ts
        )
        for scan in (jax.lax.scan, checkpointed_scan)
    )
    for a, b in zip(full, checkpointed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("last", [0, 2, 9])
def test_truncation_is_the_gradient_of_the_last_steps(last):
    ts = uniform(6, end=0.1)
    first = max(6 - last, 0)
    middle = loss_free = jnp.asarray(X1)
    if first:
        sampler = ddim(as_denoiser(bind(linear_network, 0.3), linear(), X0), linear())
        middle = sample(jax.random.key(0), sampler, loss_free, ts[: first + 1])

    def rest(w):
        return loss_of(jax.lax.scan, w, middle, ts[first:]) if last else jnp.sum(middle**2)

    value, gradient = jax.value_and_grad(
        functools.partial(loss_of, truncated_scan(last)), argnums=(0, 1)
    )(0.3, jnp.asarray(X1), ts)
    np.testing.assert_allclose(value, rest(0.3), rtol=1e-12)
    np.testing.assert_allclose(gradient[0], jax.grad(rest)(0.3), rtol=1e-12, atol=0)
    if last < 6:
        np.testing.assert_array_equal(gradient[1], 0.0)
    else:
        assert np.all(np.asarray(gradient[1]) != 0)


def temporary_bytes(scan, n):
    x, ts = jax.ShapeDtypeStruct((4096,), np.float64), jax.ShapeDtypeStruct((n + 1,), np.float64)
    compiled = (
        jax.jit(jax.grad(functools.partial(loss_of, scan))).lower(jnp.asarray(0.3), x, ts).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_reverse_mode():
    # in states of 4096 numbers: n of them, about 2 sqrt(n), and the last k; other buffers are a few
    # states
    growth = {
        name: temporary_bytes(scan, 1024) / temporary_bytes(scan, 256)
        for name, scan in (
            ("full", jax.lax.scan),
            ("checkpointed", checkpointed_scan),
            ("truncated", truncated_scan(4)),
        )
    }
    assert 3.5 < growth["full"] < 4.2, growth
    assert 1.5 < growth["checkpointed"] < 2.3, growth
    assert growth["truncated"] < 1.3, growth
