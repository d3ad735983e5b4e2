"""The training loop: how a run stops, resumes, and tells what it finds."""

import json
import logging
import os
import signal
import threading
import time

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from linear_regression import new_state, regression, squared_error

from diffjax.training import fit, in_memory, init_state, make_train_step

DATA = np.random.default_rng(0).normal(size=(20, 3))
SGD = optax.sgd(0.01)


def loss(params, key, batch):
    return jnp.mean((batch @ params["w"] - 1.0) ** 2)


STEP = jax.jit(make_train_step(loss, SGD))


def new(optimizer=SGD):
    return init_state(jax.random.key(0), {"w": jnp.zeros(3)}, optimizer)


def run(directory, steps=4, *, state=None, step=STEP, batches=None, **settings):
    settings = {"progress": False, "checkpoint_every": 2, "log_every": 1, **settings}
    batches = in_memory(DATA, 5) if batches is None else batches
    return fit(
        new() if state is None else state, step, batches, steps, directory=directory, **settings
    )


def saved_steps(directory):
    return sorted(
        int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()
    )


def logged_steps(directory):
    return [
        json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "broken", ["", "nonsense", '{"loss": 1}', "3", '{"step": "2"}', "\xff\x00"]
)
def test_a_broken_line_of_the_log_is_dropped_and_told(tmp_path, caplog, broken):
    run(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f'{first}\n{broken}\n{second}\n{{"step": 3, "lo')
    with caplog.at_level(logging.WARNING, "diffjax"):
        run(tmp_path, 4)
    assert logged_steps(tmp_path) == [1, 2, 3, 4]
    assert f"with a step: {'2, 4' if broken else '4'}" in caplog.text


def test_fits_in_threads_with_folders_of_their_own(tmp_path):
    results = {}

    def one(name):
        try:
            results[name] = run(tmp_path / name, 40)
        except BaseException as error:
            results[name] = error

    threads = [threading.Thread(target=one, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with jax.enable_x64(False):
        assert {
            name: int(getattr(result, "step", -1)) for name, result in results.items()
        } == dict.fromkeys("abc", 40)


def test_a_second_fit_in_the_same_folder_names_the_first(tmp_path):
    def again(step, state):
        with pytest.raises(
            RuntimeError,
            match=rf"got {tmp_path}/checkpoints, in use by this process \({os.getpid()}\)",
        ):
            run(tmp_path)

    run(tmp_path, 1, callback=again, callback_every=1)
    run(tmp_path, 2)  # the first one has ended


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "number, error", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_is_honoured_while_a_batch_is_awaited(tmp_path, number, error):
    """The third batch never comes. The state after two steps is saved, and the run goes on from
    there.
    """

    class Batches:
        def __init__(self, stuck):
            self.drawn, self.stuck = 0, stuck

        def __next__(self):
            self.drawn += 1
            if self.stuck and self.drawn == 3:
                threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
                time.sleep(30)
                raise AssertionError("the signal was ignored")
            return in_memory(DATA, 5)(self.drawn - 1)

        def get_state(self):
            return {"drawn": self.drawn}

        def set_state(self, state):
            self.drawn = state["drawn"]

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(error) as stopped:
        run(tmp_path, 4, batches=Batches(True), checkpoint_every=100)
    assert error is KeyboardInterrupt or stopped.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert saved_steps(tmp_path) == [2]
    found = run(tmp_path, 4, batches=Batches(False))
    assert np.array_equal(found.params["w"], run(None, 4).params["w"])


def test_ctrl_c_saves_the_step_that_was_taken(tmp_path):
    def press(step, state):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 50, checkpoint_every=100, callback=press, callback_every=1)
    assert saved_steps(tmp_path) == [3]


def numbers(seed=0, size=4, n=12):
    data = (
        grain.MapDataset.source(np.random.default_rng(0).normal(size=(n, 3)))
        .seed(seed)
        .shuffle()
        .repeat()
    )
    return iter(
        data.batch(size).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    )


@pytest.mark.parametrize(
    "before, after, message",
    [
        (
            lambda: in_memory(DATA, 5),
            lambda: in_memory(DATA, 4),
            r"\(5, 3\) float64 then, \(4, 3\) float64 now",
        ),
        (
            lambda: in_memory(DATA, 5),
            lambda: in_memory(DATA, 5, seed=1),
            "that of step 2 has other values",
        ),
        (
            lambda: in_memory(DATA, 5),
            lambda: in_memory(DATA + 1, 5),
            "that of step 2 has other values",
        ),
        (
            lambda: numbers(),
            lambda: numbers(size=6),
            r"\(4, 3\) float64 then, \(6, 3\) float64 now",
        ),
        (lambda: numbers(), lambda: numbers(seed=1), "that of step 2 has other values"),
    ],
    ids=["batch size", "seed", "data", "iterator's batch size", "iterator's seed"],
)
def test_other_batches_at_resume_are_told(tmp_path, before, after, message):
    run(tmp_path, 2, batches=before())
    with pytest.warns(UserWarning, match=message):
        run(tmp_path, 4, batches=after())
    run(tmp_path, 6, batches=after())  # what the run has by now


def test_another_x64_at_resume_is_told(tmp_path):
    state32 = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, new())
    data = DATA.astype(np.float32)
    run(tmp_path, 2, state=state32, batches=in_memory(data, 5))
    with (
        jax.enable_x64(False),
        pytest.warns(UserWarning, match="jax_enable_x64 False, and was saved with True"),
    ):
        run(tmp_path, 4, batches=in_memory(data, 5))
    with pytest.raises(ValueError, match="jax_enable_x64 was False when it was saved, and is True"):
        run(tmp_path, 6)


def test_resuming_says_from_where(tmp_path, capsys, caplog):
    run(tmp_path, 2, progress=True)
    assert "resumes" not in capsys.readouterr().err
    run(tmp_path, 4, progress=True)
    assert f"fit: resumes at step 2, from {tmp_path}/checkpoints/2" in capsys.readouterr().err
    with caplog.at_level(logging.INFO, "diffjax"):
        run(tmp_path, 4)
    assert "resumes at step 4" in caplog.text and "nothing to do" in caplog.text
    assert capsys.readouterr().err == ""


def spoil(part, at):
    """A step that puts a NaN into a part of the state at one step, while loss and gradient stay
    finite.
    """
    optimizer = optax.sgd(0.0, momentum=0.9)
    inner = make_train_step(loss, optimizer)

    def step(state, batch):
        state, metrics = inner(state, batch)
        bad = jnp.where(state.step == at, jnp.nan, 0.0)
        spoilt = jax.tree.map(lambda x: x + bad.astype(x.dtype), getattr(state, part))
        return state._replace(**{part: spoilt}), metrics

    return jax.jit(step), new(optimizer)


@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
@pytest.mark.parametrize("in_folder", [True, False])
def test_every_part_of_the_state_is_checked_with_and_without_a_folder(tmp_path, part, in_folder):
    step, state = spoil(part, at=3)
    directory = tmp_path if in_folder else None
    with pytest.raises(FloatingPointError, match=f"{part}: not finite after step 3; "):
        run(directory, 3, state=state, step=step)


def test_an_infinite_scalar_of_the_optimizer_is_no_fault(tmp_path):
    optimizer = optax.chain(
        optax.sgd(0.1), optax.GradientTransformation(lambda p: jnp.inf, lambda g, s, p: (g, s))
    )
    run(tmp_path, 2, state=new(optimizer), step=jax.jit(make_train_step(loss, optimizer)))


def test_a_run_that_skips_every_step_fails(tmp_path):
    step = jax.jit(make_train_step(loss, SGD, skip_nonfinite=True))
    nans = lambda first: lambda i: DATA[:5] * (np.nan if i >= first else 1.0)  # noqa: E731
    with pytest.raises(
        FloatingPointError, match="not finite in any step from 1 to 4, so all of them were skipped"
    ):
        run(None, 4, step=step, batches=nans(0))
    assert int(run(None, 4, step=step, batches=nans(1)).step) == 4
    with pytest.raises(FloatingPointError, match="not finite in any step from 2 to 1001"):
        run(None, 2000, step=step, batches=nans(1), checkpoint_every=1001, log_every=500)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ["log_every", "checkpoint_every", "callback_every"])
@pytest.mark.parametrize("value", [0, -5])
def test_intervals_are_at_least_one_step(name, value):
    with pytest.raises(
        ValueError,
        match=f"{name}: expected a number of steps of at least 1, got {value}; to switch",
    ):
        run(None, **{name: value})


@pytest.mark.usefixtures("without_type_checks")
def test_arguments_in_another_order_are_named():
    with pytest.raises(
        ValueError,
        match=r"state: expected a TrainState .*, got .*; fit\(state, step, batches, num_st",
    ):
        fit(STEP, new(), in_memory(DATA, 5), 2)
    with pytest.raises(
        ValueError, match=r"step: expected a function .*, got int; fit\(state, step"
    ):
        fit(new(), 3, in_memory(DATA, 5), 2)  # pyright: ignore


def test_a_run_on_a_mesh_resumes_from_a_state_that_was_never_placed(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    batches = lambda i: jax.device_put(in_memory(DATA, 8)(i), place)  # noqa: E731
    never = run(None, 4, batches=batches)
    run(tmp_path, 2, batches=batches)
    assert np.array_equal(run(tmp_path, 4, batches=batches).params["w"], never.params["w"])


MESHES = {"2": (2,), "4": (4,), "2x2": (2, 2)}


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_training_does_not_depend_on_the_mesh(shape, sharded):
    """Five steps: loss and parameters are those of one device, with the parameters replicated or
    sharded.
    """
    optimizer = optax.adam(0.1)
    mesh = jax.make_mesh(shape, tuple("ab"[: len(shape)]), axis_types=(AxisType.Auto,) * len(shape))
    where = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    data = np.random.default_rng(0).normal(size=(5, 8, 4))
    state = init_state(jax.random.key(0), {"w": jnp.ones((4, 4))}, optimizer)

    def noisy(params, key, batch):
        return jnp.mean(
            (jnp.tanh((batch + jax.random.normal(key, batch.shape)) @ params["w"]) - batch) ** 2
        )

    def train(state, place):
        losses, inner = [], jax.jit(make_train_step(noisy, optimizer))

        def step(state, batch):
            state, metrics = inner(state, batch)
            losses.append(metrics["loss"])
            return state, metrics

        state = fit(state, step, lambda i: place(data[i]), 5, progress=False)
        return np.array(losses), np.asarray(state.params["w"]), np.asarray(state.ema["w"])

    names = mesh.axis_names
    state_shardings = jax.tree.map(
        lambda x: where(names) if sharded and x.ndim == 2 else where(), state
    )
    found = train(jax.device_put(state, state_shardings), lambda x: jax.device_put(x, where(names)))
    chex.assert_trees_all_close(found, train(state, jnp.asarray), rtol=1e-12)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fail_at(number, loss=squared_error):
    """A jitted step whose loss is NaN at one step."""
    optimizer = optax.sgd(0.01)

    def wrong(params, key, batch):
        return loss(params, key, batch) * jnp.where(batch["i"] == number - 1, jnp.nan, 1.0)

    return (
        jax.jit(make_train_step(wrong, optimizer)),
        new_state(optimizer),
        lambda i: {**regression(), "i": i},
    )


def test_a_nan_stops_the_run_with_its_step_and_the_last_good_checkpoint(tmp_path):
    step, state, batches = fail_at(27)
    settings = {"log_every": 7, "checkpoint_every": 10, "progress": False}
    with pytest.raises(FloatingPointError) as error:
        fit(state, step, batches, 40, directory=tmp_path, **settings)
    assert "at step 27: loss = nan" in str(error.value)
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '20'}" in str(error.value)
    assert sorted(
        path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()
    ) == ["10", "20"]
    with pytest.raises(
        FloatingPointError, match=r"at step 27: loss = nan.*no checkpoint was saved before it"
    ):
        fit(state, step, batches, 40, log_every=40, progress=False)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    optimizer = optax.GradientTransformation(
        lambda p: jnp.zeros((), int),
        lambda g, s, p: (jax.tree.map(lambda x: x * jnp.where(s == 14, jnp.inf, 0.0), g), s + 1),
    )
    step = jax.jit(make_train_step(squared_error, optimizer))
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 15; .* is .*checkpoints/10$"
    ):
        fit(
            new_state(optimizer),
            step,
            lambda i: regression(),
            15,
            directory=tmp_path,
            checkpoint_every=10,
            progress=False,
        )


def test_skipped_steps_do_not_stop_the_run():
    optimizer = optax.sgd(0.01)
    step = make_train_step(
        lambda p, k, b: squared_error(p, k, b) * b["factor"], optimizer, skip_nonfinite=True
    )
    batches = lambda i: {**regression(), "factor": np.nan if i == 3 else 1.0}  # noqa: E731
    state = fit(new_state(optimizer), jax.jit(step), batches, 10, progress=False)
    assert int(state.step) == 10 and np.isfinite(state.params["w"]).all()


def test_the_log_has_means_and_no_line_twice_after_resuming(tmp_path):
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(lambda p, k, b: 0.0 * p["w"].sum() + b, optimizer))
    batches, settings = (
        (lambda i: jnp.float64(i)),
        {"log_every": 4, "checkpoint_every": 10, "progress": False},
    )
    called = []
    fit(
        new_state(optimizer), step, batches, 20, directory=tmp_path, tensorboard=True,
        callback=lambda number, state: called.append((number, int(state.step))), callback_every=8,
        **settings,
    )  # fmt: skip
    logged = {line["step"]: line["loss"] for line in lines(tmp_path)}
    assert logged == {4: 1.5, 8: 5.5, 10: 8.5, 12: 10.5, 16: 13.5, 20: 17.5}  # loss k - 1 at step k
    assert called == [(8, 8), (16, 16)]
    assert any((tmp_path / "tensorboard").iterdir())

    # as if killed before it was written
    (tmp_path / "checkpoints" / "20").rename(tmp_path / "gone")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "lo')
    fit(new_state(optimizer), step, batches, 24, directory=tmp_path, **settings)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10, 12, 16, 20, 24]


def test_sigterm_saves_where_it_came_and_the_old_handler_returns(tmp_path):
    optimizer = optax.sgd(0.01)
    step = jax.jit(make_train_step(squared_error, optimizer))
    handler = signal.getsignal(signal.SIGTERM)
    settings = {"directory": tmp_path, "progress": False, "callback_every": 1}
    with pytest.raises(SystemExit) as stopped:
        kill = lambda number, state: os.kill(os.getpid(), signal.SIGTERM) if number == 5 else None  # noqa: E731
        fit(new_state(optimizer), step, lambda i: regression(), 50, callback=kill, **settings)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    seen = []
    fit(
        new_state(optimizer),
        step,
        lambda i: regression(),
        8,
        callback=lambda number, state: seen.append(number),
        **settings,
    )
    assert seen in ([6, 7, 8], [7, 8])  # the signal may be seen one step later


@pytest.mark.usefixtures("without_type_checks")
def test_batches_that_cannot_be_resumed_or_end_early(tmp_path):
    optimizer = optax.sgd(0.01)
    step = jax.jit(make_train_step(squared_error, optimizer))
    run = lambda batches, n, folder=None: fit(  # noqa: E731
        new_state(optimizer), step, batches, n, directory=folder, progress=False
    )
    with pytest.raises(
        ValueError, match="a function of the step or an iterator with get_state and"
    ):
        run(iter([regression()]), 1, tmp_path)
    with pytest.raises(
        ValueError,
        match="batches: expected a function of the step or an iterator, got <class 'list'>",
    ):
        run([regression()], 1)
    with pytest.raises(ValueError, match="batches: expected num_steps batches, got 2"):
        run(iter([regression()] * 2), 3)
    assert int(run(iter([regression()] * 2), 2).step) == 2
    with pytest.raises(ValueError, match="directory: expected a folder for tensorboard=True"):
        fit(new_state(optimizer), step, lambda i: regression(), 1, tensorboard=True)

    import grain

    run(lambda i: regression(), 1, tmp_path)
    with pytest.raises(ValueError, match="batches: expected a function of the step, as in the run"):
        run(iter(grain.MapDataset.source([regression()]).repeat().to_iter_dataset()), 2, tmp_path)


def test_the_progress_bar_shows_the_loss(capsys):
    optimizer = optax.sgd(0.01)
    fit(
        new_state(optimizer),
        jax.jit(make_train_step(squared_error, optimizer)),
        lambda i: regression(),
        5,
        log_every=1,
    )
    err = capsys.readouterr().err
    assert "5/5" in err and "loss" in err and "step/s" in err
