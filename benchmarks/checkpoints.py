"""How long `checkpoints.save` blocks the training loop, against Orbax alone.

    python -m benchmarks.checkpoints [--repeats 9] [--megabytes 256]

Both save the same float32 arrays, in turns, in one process for each number of devices. A save is
begun when the one before it is complete. The aim is a ratio of 2 for the median times: ours also
computes the checksums, and sets the newer steps of an abandoned run aside.

    one device       everything is on the host's only device
    eight devices    every array is sharded over eight devices, which XLA simulates on the host
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import orbax.checkpoint as ocp
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.overhead import seconds, write_rows
from diffjax.training import checkpoints


@dataclasses.dataclass(frozen=True)
class Settings:
    repeats: int = 9
    """timed saves for each row"""
    megabytes: int = 256
    """size of the state"""
    output: pathlib.Path = pathlib.Path("benchmarks/results/checkpoints.json")
    """file of the record"""
    devices: int | None = None
    """the number of devices that this process has; it prints its rows and writes no record"""


def state(count: int, megabytes: int) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    shape = megabytes * 2**18 // (count * 512), 512
    arrays = {str(i): jax.random.normal(jax.random.key(i), shape) for i in range(count)}
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))


def measure(count: int, settings: Settings) -> dict:
    arrays, times = state(count, settings.megabytes), {"ours": [], "orbax": []}
    options = ocp.CheckpointManagerOptions(max_to_keep=1, lightweight_initialize=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoints.manager(pathlib.Path(folder, "ours"), keep=1) as ours,
        ocp.CheckpointManager(pathlib.Path(folder, "orbax"), options=options) as orbax,
    ):
        for step in range(settings.repeats + 1):
            calls = {
                "ours": lambda step=step: checkpoints.save(ours, step, arrays),
                "orbax": lambda step=step: orbax.save(
                    step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays))
                ),
            }
            for name, call in calls.items():
                times[name].append(seconds(call))
                ours.wait_until_finished()
                orbax.wait_until_finished()
    # the first save compiles
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    name = f"devices: {jax.device_count()}, arrays: {count}"
    return {"name": name, "seconds": medians, "ratio": medians["ours"] / medians["orbax"]}


def main(settings: Settings) -> None:
    if settings.devices:
        for count in (16, 256):
            print(json.dumps(measure(count, settings)), flush=True)
        return
    load, start, rows = os.getloadavg()[0], time.perf_counter(), []
    for devices in (1, 8):
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", "benchmarks.checkpoints", "--devices", str(devices)]
        command += ["--repeats", str(settings.repeats), "--megabytes", str(settings.megabytes)]
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
        rows += map(json.loads, output.decode().splitlines())
    for row in rows:
        ours, orbax = row["seconds"]["ours"], row["seconds"]["orbax"]
        missed = " MISSED" * (row["ratio"] > 2)
        print(f"{row['name']:<24} {ours:8.3f} s  {orbax:8.3f} s  ratio {row['ratio']:.2f}{missed}")
    write_rows(settings, rows, load, start, ("orbax-checkpoint",))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
