"""Networks: a batched call is the mapped call, labels and the null token, dtypes, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax import networks
from diffjax._bind import bind
from diffjax.networks import MLP, DiT, UNet
from diffjax.networks._layers import time_features
from diffjax.networks.dit import patchify, positions, unpatchify
from diffjax.training import functional

SHAPES = {MLP: (5,), UNet: (8, 4, 2), DiT: (4, 8, 2)}
KINDS = pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
CLASSES = 3


def build(kind, num_classes=CLASSES, dtype=None):
    rngs, settings = nnx.Rngs(0), {"width": 8, "num_classes": num_classes, "dtype": dtype}
    if kind is MLP:
        return MLP(5, depth=2, **settings, rngs=rngs)
    if kind is UNet:
        return UNet(SHAPES[UNet], multipliers=(1, 2), blocks=1, attention=(4,), **settings, rngs=rngs)
    return DiT(SHAPES[DiT], depth=2, heads=2, **settings, rngs=rngs)


@functools.cache
def trained(kind):
    """As if trained: no layer is zero."""
    leaves, structure = jax.tree.flatten(nnx.eval_shape(lambda: build(kind)))
    random = np.random.default_rng(0)
    values = [random.normal(0, 1 / np.sqrt(leaf.size // leaf.shape[-1] + 1), leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(
        structure, [jnp.asarray(value, leaf.dtype) for value, leaf in zip(values, leaves, strict=True)]
    )


NETWORKS = [kind for kind in map(networks.__dict__.get, networks.__all__) if isinstance(kind, type)]


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_every_norm_has_unit_output_where_the_mean_is_3000_standard_deviations(kind):
    network = nnx.eval_shape(lambda: build(kind) if kind in SHAPES else kind(rngs=nnx.Rngs(0)))
    norms = [module for _, module in nnx.iter_modules(network) if hasattr(module, "use_fast_variance")]
    assert norms
    initial = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
    normalize = jax.jit(lambda norm, x, **settings: norm(x, **settings), static_argnames="use_running_average")
    for norm in norms:
        norm = jax.tree.map_with_path(lambda path, leaf: jnp.full(leaf.shape, initial[path[0].name], leaf.dtype), norm)
        grouped = isinstance(norm, nnx.GroupNorm)
        width = norm.num_groups * norm.group_size if grouped else norm.num_features
        training = {"use_running_average": False} if isinstance(norm, nnx.BatchNorm) else {}
        x = jnp.asarray(np.random.default_rng(0).normal(3000, 1, (4, 4, 4, width)), jnp.float32)
        assert np.asarray(normalize(norm, x, **training), float).std() == pytest.approx(1, rel=0.01)


@jax.jit
def call(network, x, t, cond=None):
    return network(x, t, cond)


def inputs(kind):
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(2, 3, *SHAPES[kind])))
    return x, jnp.asarray(random.uniform(size=(2, 3))), jnp.array([[0, 1, 2], [3, 2, 1]])


@KINDS
def test_batched_is_mapped_is_one_by_one(kind):
    x, t, cond = inputs(kind)
    network = trained(kind)
    batched = call(network, x, t, cond)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda x, t, c: network(x, t, c))))(x, t, cond)
    single = [[call(network, x[i, j], t[i, j], cond[i, j]) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(mapped, batched, atol=1e-12)
    np.testing.assert_allclose(np.array(single), batched, atol=1e-12)
    assert float(jnp.std(batched)) > 0.01  # something was compared


@KINDS
def test_scalars_broadcast_and_every_argument_matters(kind):
    x, t, cond = inputs(kind)
    network = trained(kind)
    full = call(network, x, jnp.full_like(t, 0.3), jnp.full_like(cond, 2))
    np.testing.assert_allclose(call(network, x, 0.3, 2), full, atol=1e-12)
    assert float(abs(call(network, x, 0.31, 2) - full).max()) > 1e-4
    assert float(abs(call(network, x, 0.3, 1) - full).max()) > 1e-4


@KINDS
def test_no_class_is_the_null_label(kind):
    x, network = inputs(kind)[0], trained(kind)
    assert network.null == CLASSES
    np.testing.assert_array_equal(call(network, x, 0.3), call(network, x, 0.3, network.null))


@KINDS
def test_a_new_network_returns_zero_and_its_blocks_are_the_identity(kind):
    network = build(kind)
    assert not np.any(call(network, *inputs(kind)))
    block, shape = {
        MLP: lambda: (network.blocks[0], (2, 8)),
        UNet: lambda: (network.middle[0], (2, 4, 2, 16)),
        DiT: lambda: (network.blocks[0], (2, 8, 8)),
    }[kind]()
    random = np.random.default_rng(0)
    h, embedding = (jnp.asarray(random.normal(size=size)) for size in (shape, (2, 8)))
    np.testing.assert_array_equal(jax.jit(lambda b, *args: b(*args))(block, h, embedding), h)


@KINDS
def test_the_gradient_reaches_every_unit_of_every_layer(kind):
    x, t, cond = inputs(kind)  # all labels, the null one included
    gradient = jax.jit(jax.grad(lambda network: jnp.sum(network(x, t, cond) ** 2)))(
        trained(kind)
    )  # of the module itself
    for path, leaf in jax.tree.leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        units = np.abs(leaf).reshape(-1, leaf.shape[-1]).max(0)
        if "qkv" in name and "bias" in name:
            units = np.delete(
                units, np.s_[len(units) // 3 : 2 * len(units) // 3]
            )  # softmax ignores a shift of the keys
        assert np.isfinite(units).all() and units.min() > 1e-6, name


@KINDS
def test_directional_derivative_against_finite_differences(kind):
    x, t, cond = inputs(kind)
    network = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), trained(kind))
    direction = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    _, slope = jax.jit(lambda x: jax.jvp(lambda x, t: network(x, t, cond), (x, t), (direction, t)))(x)
    ahead, behind = (call(network, x + h * direction, t + h * t, cond) for h in (1e-7, -1e-7))
    # The fastest time feature turns 256 radians a unit: the difference is off by (256 h)^2 / 6 = 1e-10, rounding by 1e-8.
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-7, atol=1e-6 * float(abs(slope).max()))


@KINDS
def test_bfloat16_computes_near_float32_and_keeps_float32_outside(kind):
    x, t, cond = (a.astype(jnp.float32) if a.dtype == jnp.float64 else a for a in inputs(kind))
    half = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(kind, dtype=jnp.bfloat16))), nnx.state(trained(kind)))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    dots = [e for e in jax.make_jaxpr(call)(half, x, t, cond).eqns[0].params["jaxpr"].eqns if "dot" in e.primitive.name]
    assert dots and all(e.invars[0].aval.dtype == jnp.bfloat16 for e in dots)
    out, exact = call(half, x, t, cond), call(trained(kind), x, t, cond)
    assert out.dtype == jnp.float32
    error = float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))
    assert 1e-5 < error < 0.05  # bfloat16 has 8 bits: 2^-9 a rounding, of which there are tens in a row


@KINDS
def test_the_output_is_at_least_float32(kind):
    x, t, cond = inputs(kind)
    for given, returned in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        out = jax.eval_shape(call, trained(kind), jax.ShapeDtypeStruct(x.shape, jnp.dtype(given)), t, cond)
        assert (out.shape, out.dtype) == (x.shape, jnp.dtype(returned))


@KINDS
def test_an_empty_batch(kind):
    out = jax.eval_shape(call, trained(kind), jnp.zeros((0, *SHAPES[kind])), 0.5)
    assert out.shape == (0, *SHAPES[kind])


@KINDS
def test_bound_split_and_merged_it_is_the_same_function(kind):
    x, t, cond = inputs(kind)
    network = trained(kind)
    apply, params = functional(network)
    assert type(params) is dict
    np.testing.assert_array_equal(call(bind(apply, params), x, t, cond), call(network, x, t, cond))


@KINDS
def test_refusals(kind):
    x, t, cond = inputs(kind)
    network, shape = trained(kind), SHAPES[kind]
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., .*got \(7,\)"):
        jax.eval_shape(network, jnp.zeros(7), 0.5)
    with pytest.raises(ValueError, match="x must be floating-point, got int"):
        jax.eval_shape(network, jnp.zeros(shape, int), 0.5)
    with pytest.raises(ValueError, match=r"t must be a scalar or have x's leading shape \(2, 3\), got shape \(3,\)"):
        jax.eval_shape(network, x, t[0])
    with pytest.raises(ValueError, match=r"cond must be a scalar or have x's leading shape \(2, 3\), got shape \(2,\)"):
        jax.eval_shape(network, x, t, cond[:, 0])
    with pytest.raises(ValueError, match="cond must be integer labels, got dtype float"):
        jax.eval_shape(network, x, t, t)
    for label in (-1, CLASSES + 1):
        with pytest.raises(ValueError, match=rf"cond must lie in \[0, 3\].*got {label}"):
            jax.eval_shape(lambda x, label=label: network(x, 0.5, label), x)
    plain = nnx.eval_shape(lambda: build(kind, num_classes=None))
    assert plain.null is None
    with pytest.raises(ValueError, match="cond was given, but the network was built without num_classes"):
        jax.eval_shape(plain, x, t, cond)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        nnx.eval_shape(lambda: build(kind, num_classes=0))


def test_sizes_that_do_not_divide():
    for shape, settings, message in (
        ((6, 8, 1), {"multipliers": (1, 1, 1)}, "cannot be halved for 3 levels"),
        ((8, 8, 1), {"attention": (7,)}, r"attention must name resolutions among \[8, 4, 2\], got \(7,\)"),
        ((8, 8, 1), {"width": 6}, "width must be a multiple of 4, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            UNet(shape, **settings, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="patch must divide"):
        DiT((8, 7, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="heads must divide the width 16, got 3"):
        nnx.eval_shape(lambda: DiT((8, 8, 1), width=16, heads=3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="width must be even"):
        MLP(2, width=5, rngs=nnx.Rngs(0))


def test_attention_only_where_asked():
    def attending(attention):
        network = nnx.eval_shape(lambda: UNet((8, 8, 1), width=8, blocks=1, attention=attention, rngs=nnx.Rngs(0)))
        return [
            layers[0].attention is not None for layers in (*network.down, *network.up) if hasattr(layers[0], "conv1")
        ]

    # Down: one block at each of 8, 4, 2. Up: two at each of 2, 4, 8.
    assert attending(()) == [False] * 9
    assert attending((4,)) == [False, True, False, False, False, True, True, False, False]


def test_patches_are_a_permutation_of_the_pixels():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].ravel())  # the second patch of the second row of three
    np.testing.assert_array_equal(unpatchify(tokens, 2, (4, 6, 3)), x)


def test_attention_moves_information_between_patches():
    x, t, _ = (a[0, 0] for a in inputs(DiT))
    other = x.at[0, 0].add(1.0)  # the first patch
    change = abs(call(trained(DiT), other, t) - call(trained(DiT), x, t))
    assert float(change[2:, 6:].min()) > 1e-6


def test_positions_tell_patches_apart():
    table = positions(8, 8, 16)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1) + 9 * np.eye(64)
    assert distance.min() > 0.4


def test_time_features_are_smooth_and_tell_times_apart():
    t = jnp.linspace(-3.0, 3.0, 601)
    features = time_features(t, 32)
    distance = jnp.linalg.norm(features[:, None] - features[None], axis=-1) + 9 * jnp.eye(601)
    assert float(distance.min()) > 0.5  # neighbours are 0.01 apart
    slope = jax.vmap(jax.jacfwd(lambda t: time_features(t[None], 32)[0]))(t)
    assert float(abs(slope).max()) <= 256
