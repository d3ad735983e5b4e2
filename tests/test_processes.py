"""Programs of several processes on this machine, joined by `jax.distributed` over Gloo."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "process_worker.py"


def start(job, directory, count=2, devices=1):
    """The processes of a program, each with its own devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_ENABLE_X64": "0"}
    command = [sys.executable, str(WORKER), job, str(directory)]
    return [
        subprocess.Popen(
            [*command, str(index), str(count), port], env=env, stderr=subprocess.PIPE, text=True
        )
        for index in range(count)
    ]


def finish(processes, timeout=120):
    """The exit codes, and what was written to stderr."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def succeed(processes):
    codes, errors = finish(processes)
    assert codes == [0] * len(codes), "\n".join(error[-3000:] for error in errors)


def log(directory, name):
    return [
        json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()
    ]


def steps_in(directory, name):
    return sorted(
        int(path.name)
        for path in (directory / name / "checkpoints").iterdir()
        if path.name.isdecimal()
    )


def checksums(directory, name, step):
    """The checksums of all arrays of a checkpoint: equal if the arrays are equal bitwise."""
    manifest = json.loads(
        (directory / name / "checkpoints" / str(step) / "manifest" / "metadata").read_text()
    )
    return manifest["arrays"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What two processes with two devices each save."""
    directory = tmp_path_factory.mktemp("processes")
    succeed(start("save", directory, 2, devices=2))
    return directory


def test_a_run_in_two_calls_ends_bitwise_as_one(saved):
    assert checksums(saved, "again", 12) == checksums(saved, "never", 12)
    assert steps_in(saved, "local") == [6, 12]  # from a state that was never placed


def test_steps_are_set_aside_once(saved):
    aside = sorted(path.name for path in (saved / "tree").iterdir() if not path.name.isdecimal())
    assert aside == ["lock", "replaced-1", "replaced-1-2", "replaced-2", "replaced-2-2"]


def test_the_log_is_that_of_one_process(saved):
    for name in ("never", "again", "local"):
        assert [line["step"] for line in log(saved, name)] == (
            [3, 6, 7, 9, 12] if name == "again" else [3, 6, 9, 12]
        )


def test_others_restore_and_train_alike(saved):
    """Saved by 2 processes of 2 devices; restored and continued by 1 of 4, then by 4 of 1. The
    losses agree.
    """
    for count, devices in ((1, 4), (4, 1)):
        succeed(start("restore", saved, count, devices))
        alone = [line["loss"] for line in log(saved, f"alone-{count}")]
        np.testing.assert_allclose(
            alone, [line["loss"] for line in log(saved, "never")][:4], rtol=1e-6
        )
        assert [line["step"] for line in log(saved, "never")] == [3, 6, 9, 12, 15, 18]


def wait_for(paths, processes, seconds=120):
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end and all(process.poll() is None for process in processes), (
            finish(processes, 1)
        )
        time.sleep(0.05)


def test_one_stops_or_dies_and_the_run_resumes(tmp_path):
    """Three programs at once: SIGTERM or Ctrl-C to one process stops both at one step; a dead one
    ends the other.
    """
    jobs = ("wait", "interrupt", "die")
    terminated, interrupted, killed = (start(job, tmp_path) for job in jobs)
    ready = [tmp_path / f"ready-{job}-{index}" for job in jobs for index in range(2)]
    wait_for(ready, terminated + interrupted + killed)
    terminated[1].send_signal(signal.SIGTERM)
    interrupted[1].send_signal(signal.SIGINT)
    killed[1].kill()
    codes, errors = finish(terminated, 30)
    assert codes == [143, 143], errors
    assert len(steps_in(tmp_path, "wait")) == 1
    codes, errors = finish(interrupted, 30)
    assert codes == [143, -signal.SIGINT] and "KeyboardInterrupt" in errors[1], (codes, errors)
    assert len(steps_in(tmp_path, "interrupt")) == 1
    codes, errors = finish(killed, 40)  # the heartbeat's timeout is 10 s
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL), (codes, errors)
    succeed(start("on", tmp_path))
