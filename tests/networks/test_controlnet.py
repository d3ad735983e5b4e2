"""ControlNet: the base at first, a timetable of gradients, a base that training leaves alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_networks import random_like

import diffjax as dj
from diffjax import guidance, training
from diffjax.networks import ControlNet, Residuals, UNet, controlled, guess_weights

SHAPE, CHANNELS = (6, 6, 1), 2
SETTINGS = {"width": 8, "multipliers": (1, 2), "blocks": 1, "num_classes": 3}


@functools.cache
def base():
    return random_like(nnx.eval_shape(lambda: UNet(SHAPE, **SETTINGS, rngs=nnx.Rngs(0))))


@functools.cache
def fresh():
    return ControlNet(base(), CHANNELS, widths=(4,), rngs=nnx.Rngs(1))


@functools.cache
def trained():
    return random_like(fresh())


def data(n=3):
    rng = np.random.default_rng(0)
    shapes = (n, *SHAPE), (n, *SHAPE[:-1], CHANNELS)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


@jax.jit
def run(network, x, t, cond=None, **residuals):
    return network(x, t, cond, **residuals)


@jax.jit
def residuals_of(control, x, t, hint, cond=None):
    return control(x, t, hint, cond)


def test_a_new_control_is_the_base_bitwise_and_a_trained_one_is_not():
    x, hint = data()
    plain = run(base(), x, 0.3, 2)
    np.testing.assert_array_equal(run(controlled(base(), [(fresh(), hint, 1.0)]), x, 0.3, 2), plain)
    np.testing.assert_array_equal(run(controlled(base(), []), x, 0.3, 2), plain)
    moved = run(controlled(base(), [(trained(), hint, 1.0)]), x, 0.3, 2)
    assert abs(moved - plain).min() > 1e-6
    np.testing.assert_array_equal(
        run(controlled(base(), [(trained(), hint, 0.0)]), x, 0.3, 2), plain
    )


def test_the_copy_has_the_values_of_the_base_and_arrays_of_its_own():
    for name in ("embed", "condition", "inputs", "down", "middle"):
        copied, source = getattr(fresh(), name), getattr(base(), name)
        chex.assert_trees_all_equal(*(nnx.state(part) for part in (copied, source)))
        arrays = [jax.tree.leaves(part) for part in (copied, source)]
        assert all(a is not b for a, b in zip(*arrays, strict=True))


def test_the_residuals_are_one_by_one_convolutions_of_the_copys_activations():
    """With unit 1x1 convolutions and no hint they are the activations of the base themselves."""
    x, hint = data()
    control = nnx.clone(fresh())
    for conv in (*control.stored_out, control.middle_out):
        conv.kernel[...] = jnp.eye(conv.in_features, dtype=jnp.float32)
    residuals = residuals_of(control, x, 0.3, hint, 2)
    assert len(residuals.stored) == 4 and residuals.stored[-1].shape == (3, 3, 3, 16)
    # the base, its activations doubled, is the base with these residuals
    twice = run(controlled(base(), [(control, hint, 1.0)]), x, 0.3, 2)
    np.testing.assert_allclose(run(base(), x, 0.3, 2, residuals=residuals), twice, rtol=1e-6)
    # an activation that the way up does not see is not there: each one matters
    for i in range(len(residuals.stored)):
        one = residuals._replace(stored=tuple(a * (j != i) for j, a in enumerate(residuals.stored)))
        assert abs(run(base(), x, 0.3, 2, residuals=one) - twice).max() > 1e-6


def loss(control, x, hint):
    network = controlled(base(), [(control, hint, 1.0)])
    return jnp.mean((network(x, 0.3, 2) - 1.0) ** 2)


def moved_parts(before, after):
    """The parts of a control of which any array, and of which every array, has moved."""
    flat = [nnx.to_flat_state(nnx.state(net)) for net in (before, after)]
    moved = {}
    for (path, a), (_, b) in zip(*flat, strict=True):
        moved.setdefault(path[0], []).append(bool(jnp.any(a[...] != b[...])))
    return {part for part, flags in moved.items() if any(flags)}


def test_the_timetable_of_the_first_three_steps():
    x, hint = data()
    step = jax.jit(
        lambda net: jax.tree.map(lambda p, g: p - 0.1 * g, net, jax.grad(loss)(net, x, hint))
    )
    nets = [fresh()]
    for _ in range(3):
        nets.append(step(nets[-1]))
    zeros = {"stored_out", "middle_out"}
    copy = {"embed", "condition", "inputs", "down", "middle"}
    assert moved_parts(nets[0], nets[1]) == zeros
    assert moved_parts(nets[1], nets[2]) == zeros | copy | {"hint_out"}
    assert moved_parts(nets[2], nets[3]) == zeros | copy | {"hint_out", "hint"}


def test_training_leaves_the_base_alone_and_has_state_for_the_copy_only():
    x, hint = data(4)
    before = jax.tree.map(np.array, nnx.state(base()))
    apply, params = training.functional(fresh())

    def batch_loss(params, key, batch):
        return loss(dj.bind(apply, params), *batch)

    optimizer = optax.adam(1e-2)
    state = training.init_state(jax.random.key(0), params, optimizer)
    step = jax.jit(training.make_train_step(batch_loss, optimizer), donate_argnums=0)
    losses = []
    for _ in range(20):
        state, metrics = step(state, (x, hint))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    chex.assert_trees_all_equal(jax.tree.map(np.array, nnx.state(base())), before)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(state.opt_state) == 2 * count(params) + 1  # two moments, and the step


def test_several_controls_add_up_with_their_weights():
    x, hint = data()
    residuals = [residuals_of(trained(), x, 0.3, h, 2) for h in (hint, -2 * hint)]
    total = jax.tree.map(lambda a, b: 0.5 * a - 0.7 * b, *residuals)
    controls = [(trained(), hint, 0.5), (trained(), -2 * hint, lambda t: -1.0 + t)]
    np.testing.assert_allclose(
        run(controlled(base(), controls), x, 0.3, 2),
        run(base(), x, 0.3, 2, residuals=total),
        rtol=1e-5,
        atol=1e-6,
    )


def test_guess_mode_weighs_the_middle_most():
    x, hint = data()
    weights = np.array([10 ** (-1 + i / 4) for i in range(5)])
    np.testing.assert_allclose(guess_weights(trained()), weights, rtol=1e-6)
    stored, middle = residuals_of(trained(), x, 0.3, hint)
    residuals = Residuals(
        tuple(w * a for w, a in zip(weights, stored, strict=False)), weights[-1] * middle
    )
    network = controlled(base(), [(trained(), hint, guess_weights(trained()))])
    np.testing.assert_allclose(
        run(network, x, 0.3), run(base(), x, 0.3, residuals=residuals), rtol=1e-5, atol=1e-6
    )


def test_a_batch_is_the_mapped_call_and_one_hint_serves_all():
    x, hint = data()
    net = jax.jit(lambda x, hint: controlled(base(), [(trained(), hint, 1.0)])(x, 0.3, 2))
    each = jax.jit(jax.vmap(net))(x, hint)
    np.testing.assert_allclose(net(x, hint), each, rtol=1e-5, atol=1e-6)
    shared = net(x, hint[0])
    np.testing.assert_allclose(shared[0], net(x[0], hint[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shared[1], net(x[1], hint[0]), rtol=1e-5, atol=1e-6)


def test_weights_are_mapped_and_hints_are_differentiated():
    x, hint = data()

    def first(hint, weight):
        return controlled(base(), [(trained(), hint, weight)])(x[0], 0.3, 2).sum()

    weights = jnp.array([0.0, 0.5, 1.0])
    mapped = jax.jit(jax.vmap(first, (None, 0)))(hint[0], weights)
    np.testing.assert_allclose(mapped[1], jax.jit(first)(hint[0], 0.5), rtol=1e-5)
    slope = jax.jit(jax.grad(first))(hint[0], 1.0)
    assert slope.shape == hint[0].shape and abs(slope).max() > 0


def test_guided_the_controlled_network_is_called_once():
    x, hint = data()
    network = controlled(base(), [(trained(), jnp.asarray(hint[0]), 1.0)])

    def denoiser(cond):
        return dj.as_denoiser(dj.bind(network, cond=cond), dj.linear(), dj.V)

    def operations(denoise):
        return jax.jit(denoise).lower(x[0], 0.5).compile().cost_analysis()["flops"]

    guided = guidance.cfg(denoiser(1), denoiser(3), 2.0)
    assert operations(guided) < 1.98 * operations(denoiser(1))


def test_on_a_mesh_with_explicit_axes():
    x, hint = data(4)
    mesh = jax.make_mesh((4,), ("n",), axis_types=(AxisType.Explicit,))
    expected = run(controlled(base(), [(trained(), hint, 1.0)]), x, 0.3, 2)
    with jax.sharding.use_mesh(mesh) if hasattr(jax.sharding, "use_mesh") else jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("n"))) for a in (x, hint)]
        got = jax.jit(lambda x, h: controlled(base(), [(trained(), h, 1.0)])(x, 0.3, 2))(*placed)
    assert got.sharding.spec[0] == "n"
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("without_type_checks")
def test_wrong_arguments_are_named():
    x, hint = data()
    with pytest.raises(ValueError, match="unet: expected a UNet, got"):
        ControlNet(lambda x, t: x, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="channels: expected a positive integer, got 0"):
        ControlNet(base(), 0, rngs=nnx.Rngs(0))
    for wrong in (hint[..., :1], hint[:2], hint[:, :5]):
        with pytest.raises(ValueError, match=r"hint: expected shape \(6, 6, 2\), or that after"):
            trained()(x, 0.3, wrong)
    with pytest.raises(ValueError, match=r"controls\[0\]: expected \(net, hint, weight\)"):
        controlled(base(), [trained()])
    with pytest.raises(ValueError, match="weight: expected a scalar, or one for each of the 5"):
        controlled(base(), [(trained(), hint, jnp.ones(3))])(x, 0.3)
