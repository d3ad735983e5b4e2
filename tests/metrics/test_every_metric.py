"""What all metrics of two sets of points have in common, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from point_sets import kernel, normal, on_grid, rbf, sliced

from diffjax import couplings
from diffjax.metrics import (
    _features,
    curvature,
    density_coverage,
    energy_distance,
    inception_score,
    mmd,
    precision_recall,
    wasserstein,
)

PAIRS = {
    "mmd": functools.partial(mmd, rbf),
    "energy_distance": energy_distance,
    "sliced_wasserstein": functools.partial(sliced, projections=4),
    "kernel_distance": functools.partial(kernel, size=3),
    "precision_recall": functools.partial(precision_recall, k=2),
    "density_coverage": functools.partial(density_coverage, k=2),
}


JITTED = {name: jax.jit(function) for name, function in PAIRS.items()}
LOSSES = ["mmd", "energy_distance", "sliced_wasserstein"]


@pytest.mark.parametrize("name", PAIRS)
def test_jit_and_vmap_are_the_loop(name):
    x, y = normal(0, 2, 7, 2), 0.5 + normal(1, 2, 6, 2)
    eager = [PAIRS[name](a, b) for a, b in zip(x, y, strict=True)]
    expected = jax.tree.map(lambda *values: np.stack(values), *eager)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10),
        jax.jit(jax.vmap(PAIRS[name]))(x, y),
        expected,
    )


@pytest.mark.parametrize("name", PAIRS)
def test_traced_nan_comes_out_as_nan(name):
    x, y = normal(0, 7, 2), normal(1, 6, 2)
    for pair in (
        (x, np.where(np.arange(6)[:, None] == 2, np.nan, y)),
        (np.where(np.arange(7)[:, None] == 2, np.nan, x), y),
    ):
        result = jax.tree.leaves(JITTED[name](*pair))
        assert np.isnan(result[0]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(monkeypatch, name):
    x, y, step = normal(0, 5, 2), 0.5 + normal(1, 4, 2), 1e-5
    direction = normal(2, 5, 2), normal(3, 4, 2)
    ahead, behind = (
        JITTED[name](x + s * direction[0], y + s * direction[1]) for s in (step, -step)
    )
    # at once; up to two rows at a time and one left over
    for elements in (_features._ELEMENTS, 16):
        monkeypatch.setattr(_features, "_ELEMENTS", elements)
        gradient = jax.jit(jax.grad(lambda xy: PAIRS[name](*xy)))((x, y))
        slope = sum(np.vdot(g, v) for g, v in zip(gradient, direction, strict=True))
        # central differences: step^2 = 1e-10, and 1e-16 / step = 1e-11 of rounding
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_at_equal_samples(name):
    x = jnp.asarray(normal(0, 3, 2), jnp.float32)[jnp.array([0, 0, 1, 2])]
    value, gradients = jax.jit(jax.value_and_grad(PAIRS[name], (0, 1)))(x, x)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("mmd", "kernel_distance")])
def test_a_large_common_offset_costs_nothing(name):
    """Differences of float32 numbers so close are exact; |x|^2 + |y|^2 - 2 x.y would have an error
    of 6e-8 * 1e8 = 6.
    """
    x, y = jnp.asarray(on_grid(0, 40, 3)), jnp.asarray(2 * on_grid(1, 30, 3))
    near, far = JITTED[name](x, y), JITTED[name](x + 10000, y + 10000)
    # the projections' origin is rounded: 1e-3 of units of a standard deviation, alike for x and y
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), far, near)


@pytest.mark.parametrize("name", PAIRS)
def test_order_does_not_matter_and_half_precision_is_raised(name):
    # which samples share a block is random
    one_block = {"kernel_distance": jax.jit(functools.partial(kernel, size=9))}
    function = (JITTED | one_block)[name]
    x, y = jnp.asarray(on_grid(0, 9, 2), jnp.bfloat16), jnp.asarray(on_grid(1, 9, 2), jnp.bfloat16)
    value = function(x, y)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(value))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), function(x[::-1], y[::-1]), value
    )


@pytest.mark.parametrize("name", PAIRS)
def test_no_array_of_all_differences_is_built(name):
    """Of 10,000 x 2048 features, 80 MB, all differences would be 800 GB. Compiled, not run."""
    features = jax.ShapeDtypeStruct((10_000, 2048), jnp.float32)
    function = jax.grad(PAIRS[name], (0, 1)) if name in LOSSES else PAIRS[name]
    assert (
        jax.jit(function).lower(features, features).compile().memory_analysis().temp_size_in_bytes
        < 1.5e9
    )


X = normal(0, 6, 3)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("use", "message"),
    [
        *[
            (
                lambda f=f: f(X, X[:, :2]),
                r"expected samples of the shape of \w+, \(3,\), got \(2,\)",
            )
            for f in PAIRS.values()
        ],
        *[
            (lambda f=f: f(X[:0], X), r"expected at least . samples, .* got shape \(0, 3\)")
            for f in PAIRS.values()
        ],
        *[
            (lambda f=f: f(X, X[:, :0]), r"expected at least . samples, .* got shape \(6, 0\)")
            for f in PAIRS.values()
        ],
        *[
            (lambda f=f: f(X, X / (X > X.min())), "finite features, got 1 of 6 rows")
            for f in PAIRS.values()
        ],
        *[
            (lambda f=f: f(X.astype(int), X), "expected a floating-point dtype, got int64")
            for f in PAIRS.values()
        ],
        (lambda: energy_distance(X[:1], X), r"x: expected at least 2 samples"),
        (
            lambda: precision_recall(X, X[:3], k=3),
            "k: expected 0 < k < 3, the number of generated samples, got 3",
        ),
        (
            lambda: precision_recall(X, X, k=0),
            "k: expected 0 < k < 6, the number of real samples, got 0",
        ),
        (
            lambda: density_coverage(X[:4], X, k=5),
            "k: expected 0 < k < 4, the number of real samples, got 5",
        ),
        (
            lambda: kernel(X, X, size=1),
            "size: expected blocks of at least 2 samples of each set, got 1",
        ),
        (lambda: kernel(X, X[:3], size=3), "got 3 for 6 and 3 samples"),
        (lambda: sliced(X, X, projections=0), "projections: expected at least 1, got 0"),
        (lambda: sliced(X, X, p=0.5), r"p: expected a finite number in \[1, inf\], got 0.5"),
        (lambda: wasserstein(X, X, p=0.5), r"p: expected a finite number in \[1, inf\], got 0.5"),
        (lambda: wasserstein(X, X[:4]), "y: expected as many samples as x, 6, got 4"),
        (lambda: wasserstein(X, X[:, :2]), "y: expected samples of the shape of x"),
        (
            lambda: wasserstein(X, np.nan * X),
            "y: expected finite features, got 6 of 6 rows that are not",
        ),
    ],
)
def test_refusals(use, message):
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(ValueError, match=message):
        use()


def test_a_second_call_of_the_same_shapes_compiles_nothing(caplog):
    x, y = (jnp.asarray(normal(seed, 30, 3)) for seed in (0, 1))
    calls = (
        lambda: precision_recall(x, y),
        lambda: density_coverage(x, y),
        lambda: sliced(x, y),
        lambda: inception_score(jax.nn.softmax(x)),
        lambda: curvature(jnp.arange(30.0), x),
        lambda: mmd(rbf, x, y),
        lambda: energy_distance(x, y),
        lambda: kernel(x, y, size=10),
        lambda: couplings.optimal(None, x, y),
        lambda: couplings.optimal(jax.random.key(0), x[:15], y),
        lambda: couplings.optimal(None, x, y, labels=jnp.arange(30) % 2),
        lambda: couplings.sinkhorn(couplings.squared_distances(x, y), 1.0),
        lambda: couplings.entropic(1.0)(jax.random.key(0), x, y),
    )
    for call in calls:
        call()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for call in calls:
            call()
    assert [m for m in caplog.messages if m.startswith("Compiling")] == []
