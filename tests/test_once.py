"""Equal calls without jit compile once, and what a function reads is never stale."""

import dataclasses

import beartype
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, jaxtyped

from diffjax import grids, parametrizations, samplers, schedules, solve
from diffjax._once import once

SCALE = 2.0
X = np.ones(3)


@once
def apply_twice(fn, x):
    """A loop that jax compiles at every call."""
    return jax.lax.scan(lambda carry, _: (fn(carry), None), x, None, length=2)[0]


def plain(x):
    return x * SCALE


def nested(x):
    return (lambda y: y * SCALE)(x)


def calls(x):
    return plain(x)


@jax.custom_jvp
def custom(x):
    return x * SCALE


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0] * SCALE))


@dataclasses.dataclass(frozen=True)
class Frozen:
    weight: float

    def __call__(self, x):
        return x * self.weight * SCALE


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    weight: jax.Array

    def __call__(self, x):
        return x * self.weight * SCALE


class Settings:
    scale = 2.0


def of_a_class(x):
    return x * Settings.scale


frozen, node = Frozen(1.0), Node(jnp.array(1.0))
READERS = {
    "a global": plain,
    "a global in an inner function": nested,
    "the global of a function that it calls": calls,
    "custom_jvp": custom,
    "custom_jvp that it calls": lambda x: custom(x),
    "a frozen dataclass": frozen,
    "a frozen dataclass that it calls": lambda x: frozen(x),
    "a pytree class": node,
    "a pytree class that it calls": lambda x: node(x),
    "the attribute of a class": of_a_class,
}


@pytest.mark.parametrize("name", READERS)
def test_a_changed_global_is_seen(name, monkeypatch):
    fn = READERS[name]
    np.testing.assert_allclose(apply_twice(fn, X), 4.0)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    monkeypatch.setattr(Settings, "scale", 3.0)
    np.testing.assert_allclose(apply_twice(fn, X), 9.0)


def test_a_changed_closure_is_seen():
    scale = 2.0

    def fn(x):
        return x * scale

    np.testing.assert_allclose(apply_twice(fn, X), 4.0)
    scale = 3.0
    np.testing.assert_allclose(apply_twice(fn, X), 9.0)


def test_a_host_array_that_changes_in_place_is_seen():
    scale = np.array(2.0)

    def fn(x):
        return x * scale

    np.testing.assert_allclose(apply_twice(fn, X), 4.0)
    scale[...] = 3.0
    np.testing.assert_allclose(apply_twice(fn, X), 9.0)


def test_a_function_whose_types_are_checked_compiles_once():
    traces, scale = [], 2.0
    record = traces.append  # a built-in function: what it does is not part of the key

    @jaxtyped(typechecker=beartype.beartype)
    def fn(x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        record(x)
        return x * scale

    np.testing.assert_allclose(apply_twice(fn, X), 4.0)
    first = len(traces)
    np.testing.assert_allclose(apply_twice(fn, X), 4.0)
    assert len(traces) == first
    scale = 3.0
    np.testing.assert_allclose(apply_twice(fn, X), 9.0)


def test_a_dict_that_is_no_pytree_is_seen():
    scales = {1: 2.0, "two": 0.0}  # jax cannot sort its keys

    def fn(x):
        return x * scales[1]

    np.testing.assert_allclose(apply_twice(fn, X), 4.0)
    scales[1] = 3.0
    np.testing.assert_allclose(apply_twice(fn, X), 9.0)


class Network(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, x, t):
        return self.weight[...] * x


@pytest.mark.parametrize("run", ["sample", "solve_flow"])
def test_a_model_that_is_trained_in_place_gives_fresh_samples(run):
    # On the linear path dx/dt = w x, so x(0) = x(1) exp(-w); Euler's 100 steps are near it.
    model, schedule = Network(), schedules.linear()
    denoise = parametrizations.as_denoiser(
        lambda x, t: model(x, t), schedule, parametrizations.VELOCITY
    )
    sampler = samplers.euler(denoise, schedule)

    def call():
        if run == "sample":
            return samplers.sample(jax.random.key(0), sampler, X, grids.uniform(100))
        return solve.solve_flow(denoise, schedule, X, 1.0, 0.0)

    for weight in (1.0, 0.5):
        model.weight[...] = jnp.asarray(weight)
        np.testing.assert_allclose(call(), np.exp(-weight), rtol=1e-2)


def test_a_vector_field_that_changes_gives_fresh_solutions():
    # dy/dt = -rate y: y(1) = y(0) exp(-rate), though diffrax itself looks at a function only once
    rate = 1.0

    def field(t, y, args):
        return -rate * y

    for terms in (field, diffrax.ODETerm(field)):
        for rate in (1.0, 0.5):
            np.testing.assert_allclose(
                solve.integrate(terms, X, 0.0, 1.0), np.exp(-rate), rtol=1e-3
            )


def test_few_programs_are_kept():
    def close_over(i):
        held = jnp.full(12_345, float(i))
        return lambda x: x + held[0]

    for i in range(30):
        np.testing.assert_allclose(apply_twice(close_over(i), X), 1 + 2 * i)
    assert sum(array.shape == (12_345,) for array in jax.live_arrays()) <= 2 * 16
