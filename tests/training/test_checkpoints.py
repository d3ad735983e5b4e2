"""Checkpoints: round trips, damage, other architectures, and runs stopped by real signals."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_worker

from diffjax.training import _fingerprint, checkpoints, init_state
from diffjax.training._fingerprint import fingerprint

# Of tensorstore, for each array that it could not read: some of them come only in the next test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def state(value: float = 1.0):
    layers = {0: {"w": jnp.full((3, 4), value)}, 1: {"w": jnp.full(2, value, jnp.bfloat16)}}
    # compresses badly: it gets a file of its own
    noise = np.random.default_rng(int(value)).normal(size=2000)
    params = {"layers": layers, "b": jnp.float32(value), "noise": jnp.asarray(noise)}
    return init_state(jax.random.key(5), params, optax.adam(1e-3))


def assert_same(left, right):
    chex.assert_trees_all_equal_shapes_and_dtypes(left, right)
    chex.assert_trees_all_equal(left, right)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    with jax.enable_x64(True), checkpoints.manager(folder) as manager:
        for step in (1, 2):
            checkpoints.save(manager, step, state(float(step)), {"place": [step, "ü"]})
    return folder


def test_round_trip(two):
    found = checkpoints.restore(two, state())
    assert (found.step, found.data) == (2, {"place": [2, "ü"]})
    assert_same(found.state, state(2.0))
    jax.random.normal(found.state.key)  # a usable key


def test_arrays_return_to_the_devices_of_the_template(two):
    mesh = jax.make_mesh(
        (2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = checkpoints.restore(two, jax.device_put(state(), everywhere))
    assert all(
        leaf.sharding.device_set == set(jax.devices()[:2]) for leaf in jax.tree.leaves(found.state)
    )
    assert_same(found.state, state(2.0))


def test_no_checkpoint(tmp_path):
    assert checkpoints.restore(tmp_path / "absent", state()) is None
    assert checkpoints.restore(tmp_path, state()) is None


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    change = jax.jit(lambda x: x + 1, donate_argnums=0)
    rows = jax.sharding.NamedSharding(jax.make_mesh((4,), ("a",)), jax.sharding.PartitionSpec("a"))
    x = {"jax": jnp.zeros(300_000), "sharded": jax.device_put(jnp.zeros((4, 10**6)), rows)}
    on_host, data = np.zeros(300_000), {"epoch": 0}
    with checkpoints.manager(tmp_path) as manager:
        checkpoints.save(manager, 1, x | {"numpy": on_host}, data)
        data["epoch"] = 1
        for _ in range(20):
            x = jax.tree.map(change, x)  # reuses the memory while the write is on its way
            on_host += 1
    found = checkpoints.restore(tmp_path, x | {"numpy": on_host})
    assert not any(map(np.any, found.state.values())) and found.data == {"epoch": 0}


def test_only_the_newest_are_kept_and_an_abandoned_future_is_set_aside(tmp_path):
    with checkpoints.manager(tmp_path, keep=2) as manager:
        for step in (1, 2, 3, 2):  # as a run resumed from 1, because 2 and 3 were damaged
            checkpoints.save(manager, step, {"w": np.full(2, step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "2",
        "lock",
        "replaced-2",
        "replaced-3",
    ]
    assert checkpoints.restore(tmp_path, {"w": np.zeros(2, int)}).step == 2
    with pytest.raises(ValueError, match="keep: expected at least 1 checkpoint, got 0"):
        checkpoints.manager(tmp_path, keep=0)


def test_setting_a_step_aside_works_any_number_of_times(tmp_path):
    with checkpoints.manager(tmp_path) as manager:
        for value, step in enumerate((1, 2, 3, 2, 3, 2, 2)):
            checkpoints.save(manager, step, {"w": np.full(2, value)})
    found = checkpoints.restore(tmp_path, {"w": np.zeros(2, int)})
    assert found.step == 2 and found.state["w"].tolist() == [6, 6]
    aside = sorted(path.name for path in tmp_path.iterdir() if "replaced" in path.name)
    assert aside == ["replaced-2", "replaced-2-2", "replaced-2-3", "replaced-3", "replaced-3-2"]


def test_names_never_collide_and_arrays_without_elements_return(tmp_path):
    tree = {
        "a.b": np.ones(1),
        "a": {"b": np.full(1, 2.0), "c": np.zeros((0, 3))},
        "a%2Eb": jnp.zeros((2, 0), jnp.int8),
    }
    with checkpoints.manager(tmp_path) as manager:
        checkpoints.save(manager, 1, tree)
    assert_same(checkpoints.restore(tmp_path, jax.tree.map(jnp.zeros_like, tree)).state, tree)


@pytest.mark.parametrize("tree", [{}, {"none": np.zeros((0, 2))}, np.arange(3)])
def test_small_trees(tmp_path, tree):
    with checkpoints.manager(tmp_path) as manager:
        checkpoints.save(manager, 1, tree)
    assert_same(checkpoints.restore(tmp_path, tree).state, tree)


def test_every_dtype_returns(tmp_path):
    names = (
        "bool int4 int8 uint16 int32 int64 float16 bfloat16 float8_e4m3fn float32 float64 "
        "complex64 complex128"
    )
    tree = {name: jnp.asarray([0, 1, 1, 0]).astype(name) for name in names.split()}
    with checkpoints.manager(tmp_path) as manager:
        checkpoints.save(manager, 1, tree)
    assert_same(checkpoints.restore(tmp_path, tree).state, tree)
    on_host = jax.tree.map(np.asarray, tree)
    assert_same(checkpoints.restore(tmp_path, on_host).state, on_host)


def test_what_is_no_array_is_named(tmp_path):
    with (
        checkpoints.manager(tmp_path) as manager,
        pytest.raises(ValueError, match=r"a.b: expected an array.*, got str"),
    ):
        checkpoints.save(manager, 1, {"a": {"b": "text"}})
    with (
        checkpoints.manager(tmp_path) as manager,
        pytest.raises(ValueError, match=r"data: expected what JSON can hold, got .*ArrayImpl"),
    ):
        checkpoints.save(manager, 1, {"a": np.ones(1)}, data=jnp.ones(1))


@pytest.mark.parametrize("file", ["manifest/metadata", "state/manifest.ocdbt", "state/d"])
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(two, tmp_path, capfd, file):
    """A link to itself stands for a file that the system refuses to read: permissions bind no root
    user.
    """
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    path = folder / "2" / file
    path = max(path.iterdir(), key=lambda p: p.stat().st_size) if path.is_dir() else path
    path.unlink()
    path.symlink_to(path)
    names = sorted(found.name for found in folder.iterdir())
    with pytest.raises(
        OSError, match=rf"could not read the checkpoint {folder}/2, which may be intact: .*; repair"
    ):
        checkpoints.restore(folder, state())
    assert sorted(found.name for found in folder.iterdir()) == names
    capfd.readouterr()


def test_a_part_is_read_without_a_target_for_the_rest(two):
    saved = state(2.0)
    assert_same(checkpoints.restore(two, saved.params, part="params").state, saved.params)
    assert_same(
        checkpoints.restore(two, saved.ema["layers"], part="ema.layers").state, saved.ema["layers"]
    )
    assert_same(checkpoints.restore(two, saved.key, part="key").state, saved.key)
    with pytest.raises(
        ValueError, match=r"part: expected one of \['ema', 'key', 'opt_state', .*\], got 'emma'"
    ):
        checkpoints.restore(two, saved.params, part="emma")
    with pytest.raises(ValueError, match=r'to read a part of it: restore\(..., part="ema"\)'):
        checkpoints.restore(two, saved.params)


def shardings(mesh, tree):
    """The first axis that the mesh divides is sharded over all of its axes; other leaves are
    replicated.
    """

    def one(leaf):
        axes = [None] * leaf.ndim
        for i, size in enumerate(leaf.shape):
            if size % mesh.size == 0:
                axes[i] = mesh.axis_names
                break
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    return jax.tree.map(one, tree)


def test_any_mesh_restores_what_any_other_saved(tmp_path):
    keys = jax.random.split(jax.random.key(3), 4)
    tree = {
        "w": jnp.arange(4096.0).reshape(8, 512),
        "b": jnp.arange(4, dtype=jnp.bfloat16),
        "keys": keys,
        "n": jnp.int8(3),
    }

    def make_mesh(shape):
        devices = jax.devices()[: np.prod(shape)]
        return jax.make_mesh(shape, tuple("ab"[: len(shape)]), devices=devices)

    def target(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    meshes = [make_mesh(shape) for shape in [(4,), (2, 2), (2,), (1,)]]
    like = [jax.tree.map(target, tree, shardings(mesh, tree)) for mesh in meshes]
    placed = jax.device_put(tree, shardings(meshes[0], tree))
    with checkpoints.manager(tmp_path) as manager:
        for i, target in enumerate([*like[1:], like[0]]):
            checkpoints.save(manager, i, placed)
            checkpoints.wait(manager)
            placed = checkpoints.restore(tmp_path, target).state
            assert all(
                jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s.sharding, placed, target))
            )
            assert_same(placed, tree)


def checksum(array):
    """Every word and its place, mixed as at the end of MurmurHash3, in Python's integers."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    words = array.ravel().view(np.uint32).tolist()
    return sum(mix(word ^ mix(place)) for place, word in enumerate(words, 1)) % 2**32


@pytest.mark.parametrize(
    "spec", [(), ("a",), ("b", "a"), (None, "b"), (("b", "a"),), None], ids=str
)
def test_checksums_do_not_depend_on_the_sharding_and_need_no_communication(spec):
    # collectives of many arrays at once have stopped each other on CPU devices: no save returned
    array = np.random.default_rng(0).normal(size=(4, 6, 3))
    assert fingerprint({"x": array})()["x"] == [[4, 6, 3], "float64", checksum(array)]
    x = jnp.asarray(array)
    if spec is not None:
        mesh, spec = jax.make_mesh((2, 2), ("a", "b")), jax.sharding.PartitionSpec(*spec)
        x = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        program = _fingerprint._sums_of_shards.lower(x, mesh, spec).compile().as_text()
        assert not re.search("all-reduce|all-gather|collective", program)
    assert fingerprint({"x": x})() == fingerprint({"x": array})()


def test_checksums_of_numpy_arrays_are_those_of_the_call():
    array = np.zeros(10**6)
    checksums = fingerprint({"x": array})
    array += 1  # XLA reads the memory of a numpy array in place
    assert checksums() == fingerprint({"x": np.zeros(10**6)})()


def test_checksums_that_fail_in_the_background_are_told_and_leave_the_earlier_checkpoints(
    tmp_path, monkeypatch
):
    def fails():
        raise RuntimeError("the device is lost")

    with checkpoints.manager(tmp_path) as manager:
        checkpoints.save(manager, 1, {"w": np.ones(1)})
        checkpoints.wait(manager)
        monkeypatch.setattr(checkpoints, "fingerprint", lambda leaves: fails)
        checkpoints.save(manager, 2, {"w": np.zeros(1)})
        with pytest.raises(OSError, match=r"the device is lost; the complete ones are \[1\]"):
            checkpoints.wait(manager)
        monkeypatch.undo()
        checkpoints.save(manager, 3, {"w": np.full(1, 3.0)})
        checkpoints.wait(manager)
    assert checkpoints.restore(tmp_path, {"w": np.ones(1)}).step == 3


def test_no_leaf_is_fetched_whole(tmp_path, monkeypatch):
    mesh = jax.make_mesh((4,), ("a",))
    tree = {"w": jnp.arange(4096.0).reshape(8, 512), "key": jax.random.key(0)}
    tree = jax.device_put(tree, shardings(mesh, tree))
    shard, fetched = tree["w"].nbytes // 4, []
    get = jax.device_get

    def spy(x):
        fetched.extend(leaf.nbytes for leaf in jax.tree.leaves(x))
        return get(x)

    kind = type(tree["w"])
    value = kind._value
    monkeypatch.setattr(
        kind, "_value", property(lambda x: (fetched.append(x.nbytes), value.fget(x))[1])
    )
    monkeypatch.setattr(jax, "device_get", spy)
    with checkpoints.manager(tmp_path) as manager:
        checkpoints.save(manager, 1, tree)
    found = checkpoints.restore(tmp_path, tree).state
    assert max(fetched) <= shard
    monkeypatch.undo()
    assert_same(found, tree)


def test_structs_without_a_sharding_return_on_the_default_device(two):
    like = jax.eval_shape(lambda: state())
    found = checkpoints.restore(two, like).state
    assert_same(found, state(2.0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def hold(folder):
    """A process that holds the folder, and says so."""
    code = (
        "import sys, time; from diffjax.training import checkpoints; m = "
        "checkpoints.manager(sys.argv[1]);"
        "print('held', flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_names_its_holder_and_a_killed_holder_does_not_block(tmp_path):
    with hold(tmp_path) as process:
        with pytest.raises(
            RuntimeError,
            match=rf"got {tmp_path}, in use by process {process.pid} on {socket.gethostname()}",
        ):
            checkpoints.manager(tmp_path)
        process.kill()
        process.wait()
        with checkpoints.manager(tmp_path) as manager:
            with pytest.raises(RuntimeError, match=rf"in use by this process \({os.getpid()}\)"):
                checkpoints.manager(tmp_path)
            checkpoints.save(manager, 1, {"w": np.ones(2)})
    checkpoints.manager(tmp_path).close()


def test_any_damaged_file_of_the_newest(two, tmp_path, capfd):
    """Each file in turn is removed, cut, or has a bit flipped. The result is the saved state of
    step 2, or of step 1 with a warning that names the damaged checkpoint: nothing else.
    """
    files = [path.relative_to(two) for path in sorted((two / "2").rglob("*")) if path.is_file()]
    assert len(files) > 5
    used = []
    for file in files:
        for damage in ("missing", "cut", "flipped"):
            folder = tmp_path / "copy"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(two, folder)
            content = bytearray((folder / file).read_bytes())
            content[len(content) // 2] ^= 8
            (folder / file).unlink()
            if damage == "flipped":
                (folder / file).write_bytes(content)
            if damage == "cut":
                (folder / file).write_bytes(content[: len(content) // 2])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = checkpoints.restore(folder, state())
            assert_same(found.state, state(float(found.step)))
            assert found.data == {"place": [found.step, "ü"]}
            named = [str(w.message) for w in caught if "damaged checkpoint" in str(w.message)]
            if found.step == 1:
                assert (
                    len(named) == 1
                    and str(folder / "2") in named[0]
                    and f"{folder / '1'} is used" in named[0]
                )
            else:
                assert found.step == 2 and not named
            used.append(found.step)
    assert used.count(1) > len(files) // 2  # most files matter
    capfd.readouterr()  # tensorstore complains on stderr, too


def test_all_damaged(two, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    for step in "12":
        shutil.rmtree(folder / step / "manifest")
    with pytest.raises(
        OSError, match=rf"every checkpoint in {folder} is damaged: {folder}/2 .*; {folder}/1 "
    ):
        checkpoints.restore(folder, state())


def test_another_architecture_is_refused_with_what_differs(two):
    other = state()
    other.params["layers"][0] = {"w": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}
    other.params["b"] = jnp.zeros((), jnp.int32)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(two, other)
    first, *lines = str(error.value).splitlines()
    assert str(two / "2") in first and "another architecture" in first
    assert lines == [
        "  params.b: expected () int32, the checkpoint has () float32",
        "  params.layers.0.bias: expected (5,) float64, the checkpoint has none",
        "  params.layers.0.w: expected (3, 5) float64, the checkpoint has (3, 4) float64",
    ]
    rbg = state()._replace(key=jax.random.key(0, impl="rbg"))
    with pytest.raises(
        ValueError, match=r"key: expected \(\) key<rbg>, the checkpoint has \(\) key<fry>"
    ):
        checkpoints.restore(two, rbg)


def start(directory, how):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", train_worker.__file__, str(directory), how]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def finish(process, code):
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return err


def steps_in(directory):
    return sorted(
        int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()
    )


@pytest.mark.slow
def test_a_stopped_run_ends_bitwise_as_one_never_stopped(tmp_path):
    """Real processes: SIGTERM, and SIGKILL in the middle of a write; this process then goes on with
    each.
    """
    never, terminated, killed = (tmp_path / name for name in ("never", "terminated", "killed"))
    runs = [start(terminated, "terminate"), start(killed, "kill")]
    for process, code in zip(runs, (128 + signal.SIGTERM, -signal.SIGKILL), strict=True):
        finish(process, code)
    assert steps_in(terminated)[-1] in (23, 24)  # the signal may be seen one step later
    unfinished = [path.name for path in (killed / "checkpoints").iterdir() if "tmp" in path.name]
    assert len(unfinished) == 1 and steps_in(killed)[-1] < train_worker.STEPS

    with jax.enable_x64(False):
        for directory in (never, terminated, killed):
            train_worker.run(directory, "run")
        like, _, batches = train_worker.new()
        expected = checkpoints.restore(never / "checkpoints", like)
        assert expected.step == train_worker.STEPS
        assert np.any(expected.state.params["w3"] != like.params["w3"])
        for directory in (terminated, killed):
            found = checkpoints.restore(directory / "checkpoints", like)
            assert_same(found.state, expected.state)
            assert (found.step, found.data) == (expected.step, expected.data)
        for _ in range(train_worker.STEPS):
            next(batches)
        assert batches.get_state() == expected.data["processes"][0]["place"]


def test_a_full_disk_is_named_and_harms_no_earlier_checkpoint(tmp_path):
    err = finish(start(tmp_path, "full"), 1)  # from step 25 on, no file may exceed 100 kB
    assert f"OSError: could not save a checkpoint in {tmp_path / 'checkpoints'}" in err
    assert "the complete ones are [10, 20]" in err
    assert steps_in(tmp_path) == [10, 20]
    with jax.enable_x64(False):
        assert checkpoints.restore(tmp_path / "checkpoints", train_worker.new()[0]).step == 20
