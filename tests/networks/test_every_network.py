"""Networks: a batched call is the mapped call, labels and the null token, dtypes, dropout, meshes,
refusals.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_networks import CLASSES, SHAPES, build, call, inputs, random_like, trained

import diffjax as dj
from diffjax._bind import bind
from diffjax.networks import MLP, ClassEmbedding, DiT, UNet
from diffjax.training import functional, init_state, make_train_step

KINDS = pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
NETWORKS = [MLP, UNet, DiT]


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_every_norm_has_unit_output_where_the_mean_is_3000_standard_deviations(kind):
    network = nnx.eval_shape(lambda: build(kind) if kind in SHAPES else kind(rngs=nnx.Rngs(0)))
    norms = [
        module for _, module in nnx.iter_modules(network) if hasattr(module, "use_fast_variance")
    ]
    assert norms
    initial = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
    normalize = jax.jit(
        lambda norm, x, **settings: norm(x, **settings), static_argnames="use_running_average"
    )
    for norm in norms:
        norm = jax.tree.map_with_path(
            lambda path, leaf: jnp.full(leaf.shape, initial[path[0].name], leaf.dtype), norm
        )
        grouped = isinstance(norm, nnx.GroupNorm)
        width = norm.num_groups * norm.group_size if grouped else norm.num_features
        training = {"use_running_average": False} if isinstance(norm, nnx.BatchNorm) else {}
        x = jnp.asarray(np.random.default_rng(0).normal(3000, 1, (4, 4, 4, width)), jnp.float32)
        assert np.asarray(normalize(norm, x, **training), float).std() == pytest.approx(1, rel=0.01)


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
    _, slope = jax.jit(lambda x: jax.jvp(lambda x, t: network(x, t, cond), (x, t), (direction, t)))(
        x
    )
    ahead, behind = (call(network, x + h * direction, t + h * t, cond) for h in (1e-7, -1e-7))
    # The fastest time feature turns 256 radians a unit: the difference is off by (256 h)^2 / 6 =
    # 1e-10, rounding by 1e-8.
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-7, atol=1e-6 * float(abs(slope).max()))


@KINDS
def test_bfloat16_computes_near_float32_and_keeps_float32_outside(kind):
    x, t, cond = (a.astype(jnp.float32) if a.dtype == jnp.float64 else a for a in inputs(kind))
    half = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: build(kind, dtype=jnp.bfloat16))),
        nnx.state(trained(kind)),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    dots = [
        e
        for e in jax.make_jaxpr(call)(half, x, t, cond).eqns[0].params["jaxpr"].eqns
        if "dot" in e.primitive.name
    ]
    # the embedding of the time is two layers in float32; all others compute in bfloat16
    assert [e.invars[0].aval.dtype for e in dots] == [jnp.float32] * 2 + [jnp.bfloat16] * (
        len(dots) - 2
    )
    assert len(dots) > 4
    out, exact = call(half, x, t, cond), call(trained(kind), x, t, cond)
    assert out.dtype == jnp.float32
    error = float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))
    # bfloat16 has 8 bits: 2^-9 a rounding, of which there are tens in a row
    assert 1e-5 < error < 0.05


@KINDS
def test_the_output_is_at_least_float32(kind):
    x, t, cond = inputs(kind)
    for given, returned in (
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ):
        out = jax.eval_shape(
            call, trained(kind), jax.ShapeDtypeStruct(x.shape, jnp.dtype(given)), t, cond
        )
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
def test_parameters_of_numpy_are_the_same(kind):
    x, t, cond = inputs(kind)
    apply, params = functional(trained(kind))
    host = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(apply(host, x, t, cond), call(trained(kind), x, t, cond), rtol=1e-9)


@KINDS
def test_refusals(kind):
    x, t, cond = inputs(kind)
    network, shape = trained(kind), SHAPES[kind]
    built_for = (
        r"x: expected shape \(\.\.\., " + ", ".join(map(str, shape)) + r"\), .* built for, got "
    )
    for wrong in ((32,), (8, 8, 8, 1)):
        with pytest.raises(ValueError, match=built_for + re.escape(str(wrong))):
            jax.eval_shape(network, jnp.zeros(wrong), 0.5)
        with pytest.raises(ValueError, match=built_for + re.escape(str(wrong))):
            jax.eval_shape(jax.vmap(lambda x: network(x, 0.5)), jnp.zeros((3, *wrong)))
    with pytest.raises(ValueError, match="x: expected a floating-point dtype, got int"):
        jax.eval_shape(network, jnp.zeros(shape, int), 0.5)
    with pytest.raises(
        ValueError, match=r"t: expected a scalar or x's leading shape \(2, 3\), got shape \(3,\)"
    ):
        jax.eval_shape(network, x, t[0])
    with pytest.raises(
        ValueError,
        match=(
            r"cond: expected that of one sample or of x's leading shape \(2, 3\), got one "
            r"of shape \(2,\)"
        ),
    ):
        jax.eval_shape(network, x, t, cond[:, 0])
    with pytest.raises(ValueError, match="cond: expected integer labels, got dtype float"):
        jax.eval_shape(network, x, t, t)
    for label in (-1, CLASSES + 1):
        with pytest.raises(ValueError, match=rf"cond: expected labels in \[0, 3\].*got {label}"):
            jax.eval_shape(lambda x, label=label: network(x, 0.5, label), x)
    plain = nnx.eval_shape(lambda: build(kind, num_classes=None))
    assert plain.null is None
    with pytest.raises(
        ValueError, match="cond: expected None, because the network was built without num_classes"
    ):
        jax.eval_shape(plain, x, t, cond)
    with pytest.raises(ValueError, match="num_classes: expected a positive integer, got 0"):
        nnx.eval_shape(lambda: build(kind, num_classes=0))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_a_key_in_place_of_rngs_is_an_error_that_shows_how_to_use_it(kind):
    shape = {MLP: (2,), UNet: ((8, 8, 1),), DiT: ((8, 8, 1),)}.get(kind, ())
    with pytest.raises(ValueError, match=r"rngs: expected .*nnx.Rngs\(key\), got key<fry>\[\]"):
        kind(*shape, rngs=jax.random.key(0))


@pytest.mark.usefixtures("without_type_checks")
def test_what_a_constructor_refuses():
    for make, message in (
        (
            lambda: MLP(2, rngs=jax.random.key(0)),
            r"rngs: expected a flax.nnx.Rngs, such as nnx.Rngs\(0\) or nnx.Rngs\(key\)",
        ),
        (lambda: UNet((8, 8, 1), rngs=0), "rngs: expected a flax.nnx.Rngs.*got int"),
        (lambda: DiT((8, 8, 1), rngs=None), "rngs: expected a flax.nnx.Rngs.*got NoneType"),
        (
            lambda: UNet((32,), rngs=nnx.Rngs(0)),
            r"shape: expected .*\(height, width, channels\).*got \(32,\).* MLP",
        ),
        (lambda: DiT((8, 8, 8, 1), rngs=nnx.Rngs(0)), r"shape: expected .*, got \(8, 8, 8, 1\)"),
        (lambda: DiT(32, rngs=nnx.Rngs(0)), r"shape: expected .*, got 32"),
        (lambda: MLP(0, rngs=nnx.Rngs(0)), "dim: expected a positive integer, got 0"),
        (lambda: MLP(2.0, rngs=nnx.Rngs(0)), "dim: expected a positive integer, got 2.0"),
        (
            lambda: MLP(2, dropout=1.0, rngs=nnx.Rngs(0)),
            r"dropout: expected a probability in \[0, 1\), got 1.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(make)


@KINDS
def test_a_traced_label_outside_the_table_gives_nan(kind):
    x, network = inputs(kind)[0], trained(kind)
    out = call(network, x, 0.3, jnp.array([[0, -1, 2], [CLASSES, CLASSES + 1, 1]]))
    bad = np.array([[False, True, False], [False, True, False]])
    np.testing.assert_array_equal(np.isnan(out).reshape(2, 3, -1).all(-1), bad)
    np.testing.assert_array_equal(np.isfinite(out).reshape(2, 3, -1).all(-1), ~bad)


@pytest.mark.parametrize(
    "kind", [MLP, pytest.param(UNet, marks=pytest.mark.slow), DiT], ids=lambda kind: kind.__name__
)
def test_explicit_axes_and_checked_shards_are_the_plain_call(kind):
    x, t, cond = inputs(kind)
    x, t, cond = (jnp.concatenate([a, a]).reshape(4, 3, *a.shape[2:]) for a in (x, t, cond))
    network, spec = trained(kind), PartitionSpec("data")

    def loss(network, x, t, cond):
        return jnp.mean(network(x, t, cond) ** 2)

    plain = jax.jit(jax.value_and_grad(loss))(network, x, t, cond)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, t, cond)]
        held = jax.device_put(network, NamedSharding(mesh, PartitionSpec()))
        out = call(held, *sharded)
        assert jax.typeof(out).sharding.spec[0] == "data"
        np.testing.assert_allclose(out, call(network, x, t, cond), atol=1e-12)
        explicit = jax.jit(jax.value_and_grad(loss))(held, *sharded)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def shard(network, x, t, cond):
        varying = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), network)
        return jax.lax.pmean(jax.value_and_grad(loss)(varying, x, t, cond), "data")

    mapped = jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(PartitionSpec(), spec, spec, spec),
            out_specs=PartitionSpec(),
        )
    )
    for other in (explicit, mapped(network, x, t, cond)):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)  # float32 parameters


@KINDS
def test_without_a_key_nothing_is_dropped(kind):
    x, t, cond = inputs(kind)
    dropping, plain = trained(kind, dropout=0.5), trained(kind)

    def program(network, key=None):
        return str(jax.make_jaxpr(lambda network: network(x, t, cond, key))(network))

    key = jax.random.key(0)
    assert program(dropping) == program(plain) == program(plain, key)  # with a rate of 0, too
    assert program(dropping, key) != program(plain)
    with pytest.raises(ValueError, match=r"key: expected one jax.random.key"):
        jax.eval_shape(lambda x: plain(x, t, cond, 0), x)
    # no state of its own
    assert jax.tree.structure(nnx.state(dropping)) == jax.tree.structure(nnx.state(plain))


@KINDS
def test_each_key_drops_others(kind):
    x, network = inputs(kind)[0], trained(kind, dropout=0.5)
    keyed = jax.jit(lambda key, x: network(x, 0.3, 1, key))
    one, two = (jax.random.key(seed) for seed in (0, 1))
    np.testing.assert_array_equal(keyed(one, x[0]), keyed(one, x[0]))
    assert np.mean(np.abs(keyed(one, x[0]) - keyed(two, x[0]))) > 1e-3
    # the entries of a batch are dropped independently
    rows = jnp.broadcast_to(x[:1, 0], x[0].shape)
    assert np.std(keyed(one, rows), axis=0).mean() > 1e-3
    keys = [jax.random.key(seed) for seed in (2, 3)]
    mapped = jax.jit(jax.vmap(keyed))(jnp.stack(keys), x)
    np.testing.assert_allclose(mapped[1], keyed(jax.random.key(3), x[1]), atol=1e-12)


@KINDS
def test_a_training_step_carries_a_key_to_the_network(kind):
    schedule, optimizer = dj.linear(), optax.sgd(0.1)
    apply, params = functional(trained(kind, dropout=0.5))
    x0 = inputs(kind)[0][0]

    def loss(params, key, x0, *, drop=True):
        def one(key, x0):
            key_t, key_noise, key_drop = jax.random.split(key, 3)
            network = functools.partial(apply, params, key=key_drop if drop else None)
            t = jax.random.uniform(key_t)
            return dj.losses.denoising(key_noise, network, schedule, dj.VELOCITY, x0, t)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, len(x0)), x0))

    state = jax.jit(functools.partial(init_state, optimizer=optimizer))(jax.random.key(0), params)
    after, metrics = jax.jit(make_train_step(loss, optimizer))(state, x0)
    # The step's loss is the mean of the losses with the dropout that the step's own key gives.
    key = jax.random.fold_in(jax.random.key(0), 0)
    both = jax.jit(
        lambda params, key: [
            loss(params, jax.random.clone(key), x0, drop=drop) for drop in (True, False)
        ]
    )
    dropped, undropped = map(float, both(params, key))
    np.testing.assert_allclose(metrics["loss"], dropped, rtol=1e-9)
    assert abs(dropped - undropped) > 1e-3
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), state.params, after.params
    )
    assert max(jax.tree.leaves(moved)) > 0


def test_shapes_and_sizes_that_are_refused():
    for shape, settings, message in (
        (
            (3, 32, 32),
            {},
            r"channels last, .* got \(3, 32, 32\), which looks like channels first; give "
            r"\(32, 32, 3\)",
        ),
        (
            (2, 2, 2, 2, 2),
            {},
            r"shape: expected positive integers \(length, channels\) or \(height, width, "
            r"channels\) or",
        ),
        (
            (8, 8, 1),
            {"attention": (7,)},
            r"attention: expected resolutions among \[8, 4, 2\], got \(7,\)",
        ),
        ((8, 8, 1), {"width": 6}, "width: expected a multiple of 4, got 6"),
        ((8, 8, 1), {"multipliers": ()}, "multipliers: expected at least one level"),
        ((8, 8, 1), {"width": 40, "head_width": 12}, "head_width: expected a width that cuts 80"),
    ):
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(
                lambda shape=shape, settings=settings: UNet(shape, **settings, rngs=nnx.Rngs(0))
            )
    with pytest.raises(ValueError, match="patch: expected a divisor"):
        DiT((8, 7, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 16, got 3"):
        nnx.eval_shape(lambda: DiT((8, 8, 1), width=16, heads=3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="width: expected an even number"):
        MLP(2, width=5, rngs=nnx.Rngs(0))


class Described(nnx.Module):
    """A condition of two parts: a label, and a vector that is optional."""

    def __init__(self, rngs):
        self.label = ClassEmbedding(CLASSES, 8, rngs=rngs)
        self.vector = nnx.Linear(4, 8, use_bias=False, rngs=rngs)

    def __call__(self, cond):
        if cond is None:
            return self.label(None)
        return self.label(cond["label"]) + self.vector(cond["vector"])


@KINDS
def test_conditions_are_any_pytree(kind):
    make = {
        MLP: lambda **settings: MLP(5, depth=2, **settings),
        UNet: lambda **settings: UNet(SHAPES[UNet], multipliers=(1,), blocks=1, **settings),
        DiT: lambda **settings: DiT(SHAPES[DiT], depth=1, heads=2, **settings),
    }[kind]
    network = random_like(
        nnx.eval_shape(lambda: make(width=8, condition=Described(nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    )
    x, t, labels = inputs(kind)
    cond = {"label": labels, "vector": jax.random.normal(jax.random.key(3), (*labels.shape, 4))}
    full = call(network, x, t, cond)
    one_by_one = jax.jit(jax.vmap(jax.vmap(lambda x, t, cond: network(x, t, cond))))(x, t, cond)
    np.testing.assert_allclose(full, one_by_one, atol=1e-12)
    first = jax.tree.map(lambda leaf: leaf[0, 0], cond)
    np.testing.assert_allclose(call(network, x, t, first)[0, 0], full[0, 0], atol=1e-12)
    none = {"label": CLASSES, "vector": jnp.zeros(4)}
    np.testing.assert_allclose(call(network, x, t), call(network, x, t, none), atol=1e-12)
    moved = call(network, x, t, {**cond, "vector": cond["vector"] + 1})
    assert float(abs(moved - full).max()) > 1e-4
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
        held = jax.device_put(network, NamedSharding(mesh, PartitionSpec()))
        np.testing.assert_allclose(call(held, *jax.tree.map(place, (x, t, cond))), full, atol=1e-12)
