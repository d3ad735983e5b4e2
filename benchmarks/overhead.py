"""The cost of the library over a program that a careful user would write by hand.

    python -m benchmarks.overhead [--repeats 25] [--output benchmarks/results/overhead.json]

Every row but two is a ratio of two programs that do the same mathematics, timed in turns in one
process:

    measured     the median over rounds of the ratio within a round, with its quartiles; the aim is
                 for this number
    best         the ratio of the shortest times, more reliable on a machine that has other work
    operations   the ratio of the floating-point operations that XLA counts, without noise

`A against A` is the hand-written scan against itself, which shows the error of the method. These
are the hand-written programs:

    sampling     one `lax.scan` of DDIM's step (1.56), batched. The step computes alpha and sigma of
                 (1.35) at t and s from the arguments beta_min and beta_max. There is no key, no
                 `Estimate` and no derivative of the schedule.
    training     the batched loss |network(x_t, t) - eps|^2 with one time per example,
                 `value_and_grad`, `optimizer.update` and `apply_updates`. Noise and times come from
                 a folded key. There is no average of the parameters and no metric. The second row
                 adds the average and the gradient norm, so that both programs do the same work.
    Hutchinson   one forward pass of the network on the same batch

Both programs get the parameters as the same dict of arrays, and each call waits for its result.
No compilation cache is used.
"""

import dataclasses
import functools
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from diffjax import (
    EPS,
    VELOCITY,
    as_denoiser,
    bind,
    cfg,
    ddim,
    denoising,
    linear,
    linear_vp,
    sample,
    uniform,
)
from diffjax.divergence import divergence, rademacher_probes
from diffjax.dynamics import probability_flow
from diffjax.networks import MLP, UNet
from diffjax.times import uniform_times
from diffjax.training import functional, init_state, make_train_step
from experiments.results import write_record


@dataclasses.dataclass(frozen=True)
class Settings:
    repeats: int = 25
    """rounds of every timed pair"""
    compilations: int = 7
    """rounds of every pair of compilations"""
    imports: int = 7
    """interpreters in which the import is timed"""
    unet_steps: int = 3
    """sampling steps of the U-Net, about 1M parameters at batch 16"""
    mlp_steps: int = 50
    """sampling steps of the MLP, 64 dimensions and 64 wide at batch 256"""
    output: pathlib.Path = pathlib.Path("benchmarks/results/overhead.json")
    """file of the record"""


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    measured: float
    aim: float | None = None
    unit: str = "x"
    low: float | None = None
    high: float | None = None
    best: float | None = None
    operations: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the measured value reaches its aim."""
        return None if self.aim is None else self.measured <= self.aim


class Case:
    """A network as a function and its parameters, a batch of noise, and a number of steps."""

    def __init__(self, network: nnx.Module, batch: int, steps: int):
        self.apply, params = functional(network)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        # The output layer is initialized to zero. Noise makes the output nonzero.
        noisy = [
            leaf + 0.02 * jax.random.normal(key, leaf.shape)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        self.params = jax.tree.unflatten(structure, noisy)
        event = getattr(network, "shape", None) or (network.dim,)
        self.x = jax.random.normal(jax.random.key(2), (batch, *event))
        self.ts = uniform(steps, end=1e-3)
        self.size = sum(leaf.size for leaf in leaves)


def cases(settings: Settings) -> dict[str, Case]:
    unet = UNet((16, 16, 3), width=32, multipliers=(1, 2, 2), blocks=1, rngs=nnx.Rngs(0))
    mlp = MLP(64, width=64, depth=4, rngs=nnx.Rngs(0))
    return {"U-Net": Case(unet, 16, settings.unet_steps), "MLP": Case(mlp, 256, settings.mlp_steps)}


# ---- the hand-written programs -------------------------------------------------------------------


def marginal(betas, t):
    low, high = betas
    log_alpha = -0.5 * t * (low + 0.5 * t * (high - low))
    return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))


def bare_sample(apply, params, betas, x, ts):
    def step(x, times):
        t, s = times
        (alpha_t, sigma_t), (alpha_s, sigma_s) = marginal(betas, t), marginal(betas, s)
        eps = apply(params, x, t)
        return alpha_s * (x - sigma_t * eps) / alpha_t + sigma_s * eps, None

    return jax.lax.scan(step, x, (ts[:-1], ts[1:]))[0]


def bare_loss(apply, params, key, x0):
    key_t, key_eps = jax.random.split(key)
    t = jax.random.uniform(key_t, x0.shape[:1], minval=1e-5)
    eps = jax.random.normal(key_eps, x0.shape)
    alpha, sigma = (c.reshape(-1, *(1,) * (x0.ndim - 1)) for c in marginal((0.1, 20.0), t))
    return jnp.mean((apply(params, alpha * x0 + sigma * eps, t) - eps) ** 2)


def bare_train_step(loss, optimizer, same_work, state, batch):
    params, ema, opt_state, step, key = state
    value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(key, step), batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    norm = None
    if same_work:
        ema = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * p, ema, params)
        norm = optax.tree.norm(grads)
    return type(state)(params, ema, opt_state, step + 1, key), (value, norm)


# ---- the same with the library -------------------------------------------------------------------


def ddim_of(apply, params, beta_min=0.1, beta_max=20.0):
    schedule = linear_vp(beta_min, beta_max)
    return ddim(as_denoiser(bind(apply, params), schedule, EPS), schedule)


def library_loss(apply, params, key, x0):
    n = len(x0)
    key_t, key_eps = jax.random.split(key)
    per_example = jax.vmap(denoising, in_axes=(0, None, None, None, 0, 0))
    keys, (ts, _) = jax.random.split(key_eps, n), uniform_times(key_t, n)
    return jnp.mean(per_example(keys, bind(apply, params), linear_vp(), EPS, x0, ts))


def hutchinson(apply, params, x, probes):
    flow = probability_flow(as_denoiser(bind(apply, params), linear(), VELOCITY), linear())
    return jax.vmap(lambda x, z: divergence(lambda x: flow(0.5, x, None), x, z))(x, probes)


# ---- measuring -----------------------------------------------------------------------------------


def in_turns(
    name: str, aim: float | None, ours: Callable, theirs: Callable, repeats: int, **more
) -> Row:
    """The ratio of the seconds that two functions return, called in alternating order."""
    pairs = []
    for i in range(repeats):
        pairs.append((ours(), theirs()) if i % 2 else (theirs(), ours())[::-1])
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    best = min(a for a, _ in pairs) / min(b for _, b in pairs)
    return Row(name, middle, aim, low=low, high=high, best=best, **more)


def seconds(call: Callable, loops: int = 1) -> float:
    """The mean time of a call, over consecutive calls."""
    start = time.perf_counter()
    for _ in range(loops):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / loops


def compile_seconds(fn: Callable, args: tuple) -> float:
    """The time to trace, lower and compile, with empty caches."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(lambda *args: fn(*args)).lower(*args).compile()
    return time.perf_counter() - start


def run_ratio(name: str, aim: float | None, ours: tuple, theirs: tuple, repeats: int) -> Row:
    """The ratio of the run times of two programs (fn, args), each called for at least 30 ms."""
    calls = [functools.partial(jax.jit(fn), *args) for fn, args in (ours, theirs)]
    loops = max(1, math.ceil(0.03 / min(seconds(call) for call in calls * 2)))
    counts = [call.func.lower(*call.args).compile().cost_analysis().get("flops") for call in calls]
    operations = None if None in counts else counts[0] / counts[1]
    timed = [functools.partial(seconds, call, loops) for call in calls]
    return in_turns(name, aim, *timed, repeats, operations=operations)


def compile_ratio(name: str, aim: float, ours: tuple, theirs: tuple, repeats: int) -> Row:
    """The ratio of the compile times of two programs (fn, args)."""
    timed = [functools.partial(compile_seconds, *program) for program in (ours, theirs)]
    return in_turns(name, aim, *timed, repeats)


def sampling(name: str, case: Case, aim: float, settings: Settings) -> list[Row]:
    ours = (sample, (jax.random.key(0), ddim_of(case.apply, case.params), case.x, case.ts))
    betas = (jnp.array(0.1), jnp.array(20.0))
    args = case.params, betas, case.x, case.ts
    theirs, again = ((functools.partial(bare_sample, case.apply), args) for _ in range(2))
    difference = jnp.abs(jax.jit(ours[0])(*ours[1]) - jax.jit(theirs[0])(*theirs[1])).max()
    if not difference < 1e-3:
        raise RuntimeError(
            f"sample {name}: expected equal samples, got a difference of {difference}"
        )
    return [
        run_ratio(f"sample {name}: A against A", None, again, theirs, settings.repeats),
        run_ratio(f"sample {name}: run time", aim, ours, theirs, settings.repeats),
        compile_ratio(f"sample {name}: compile time", 1.5, ours, theirs, settings.compilations),
    ]


def traces(case: Case) -> Row:
    """The traces of `sample` while weights, scale, schedule, times, noise and key change."""
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        return sample(*args)

    jitted = jax.jit(counted)
    for i in range(1, 4):
        params = jax.tree.map(lambda p, i=i: i * p, case.params)
        schedule = linear_vp(0.1 * i, 20.0 + i)
        denoise = as_denoiser(bind(case.apply, params), schedule, EPS)
        null = as_denoiser(bind(case.apply, case.params), schedule, EPS)
        sampler = ddim(cfg(denoise, null, 1.5 * i), schedule)
        jitted(jax.random.key(i), sampler, i * case.x, uniform(len(case.ts) - 1, end=1e-3 * i))
    return Row("traces of sample over changing weights, scale, schedule", count, 1, unit="")


def more_steps(case: Case, settings: Settings) -> Row:
    def program(n):
        sampler = ddim_of(case.apply, case.params)
        return sample, (jax.random.key(0), sampler, case.x, uniform(n, end=1e-3))

    name = "compile time of sample MLP: 1000 steps against 10"
    return compile_ratio(name, 1.2, program(1000), program(10), settings.compilations)


def training(name: str, case: Case, settings: Settings) -> list[Row]:
    optimizer = optax.adamw(1e-4)
    state = init_state(jax.random.key(0), case.params, optimizer)
    batch = case.x  # the values do not matter
    step = make_train_step(functools.partial(library_loss, case.apply), optimizer)

    def compared(title, aim, loss, same_work):
        bare = functools.partial(
            bare_train_step, functools.partial(loss, case.apply), optimizer, same_work
        )
        programs = (step, (state, batch)), (bare, (state, batch))
        return run_ratio(f"train step {name}: {title}", aim, *programs, settings.repeats)

    return [
        compared("no average by hand", 1.05, bare_loss, False),
        compared("average by hand", None, bare_loss, True),
        compared("same loss, average", None, library_loss, True),
    ]


def right_hand_sides(name: str, case: Case, settings: Settings) -> list[Row]:
    t = jnp.array(0.5)
    forward = (lambda params, x: case.apply(params, x, t), (case.params, case.x))
    rows = []
    for k in (1, 4):
        keys = jax.random.split(jax.random.key(0), len(case.x))
        probes = jax.vmap(functools.partial(rademacher_probes, n=k))(keys, case.x)
        ours = (functools.partial(hutchinson, case.apply), (case.params, case.x, probes))
        title = f"Hutchinson, K = {k}, {name}: against a forward pass"
        rows.append(run_ratio(title, round(1.1 * (1 + k), 2), ours, forward, settings.repeats))
    return rows


def import_time(settings: Settings) -> Row:
    program = (
        "import time, jax, diffrax; start = time.perf_counter(); "
        "import diffjax; print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", program]
    runs = [
        subprocess.run(command, capture_output=True, check=True) for _ in range(settings.imports)
    ]
    times = [float(run.stdout) for run in runs]
    low, middle, high = statistics.quantiles(times, n=4)
    return Row("import diffjax, after jax and diffrax", middle, 0.3, "s", low, high)


# ---- the report ----------------------------------------------------------------------------------


HEADER = f"{'':<56} {'measured':>8}   {'quartiles':<14} {'best':>6} {'operations':>10}  aim"


def show(row: Row) -> str:
    spread = "" if row.low is None or row.high is None else f"{row.low:.3f}-{row.high:.3f}"
    best, operations = ("" if v is None else f"{v:.3f}" for v in (row.best, row.operations))
    aim = "" if row.aim is None else f"{row.aim:g} {'met' if row.met else 'MISSED'}"
    measured = f"{row.measured:8.3f} {row.unit:<1}"
    return f"{row.name:<56} {measured} {spread:<14} {best:>6} {operations:>10}  {aim}"


class Rows:
    """The rows so far, and the load of the machine before them."""

    def __init__(self) -> None:
        self.rows, self.load, self.start = [], os.getloadavg()[0], time.perf_counter()
        print(HEADER)

    def add(self, *rows: Row) -> None:
        """Prints and keeps rows."""
        for row in rows:
            print(show(row), flush=True)
            self.rows.append({**dataclasses.asdict(row), "met": row.met})

    def write(self, settings: Any) -> None:
        """Writes the record to the output file of the settings."""
        write_rows(settings, self.rows, self.load, self.start)


def write_rows(
    settings: Any, rows: list[dict], load: float, start: float, packages: Iterable[str] = ()
) -> None:
    """Writes a benchmark's record: the rows, and the machine's load before and after them."""
    scores = {"rows": rows, "load_before_and_after": [load, os.getloadavg()[0]]}
    write_record(settings.output, settings, scores, time.perf_counter() - start, packages)


def main(settings: Settings) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    networks = cases(settings)
    unet, mlp = networks["U-Net"], networks["MLP"]
    print(
        f"U-Net {unet.size:,} parameters, batch {len(unet.x)}; MLP {mlp.size:,}, batch {len(mlp.x)}"
    )
    record = Rows()
    record.add(*sampling("U-Net", unet, 1.03, settings))
    record.add(*sampling("MLP", mlp, 1.1, settings))
    record.add(traces(mlp), more_steps(mlp, settings))
    record.add(*training("U-Net", unet, settings))
    record.add(*right_hand_sides("U-Net", unet, settings), *right_hand_sides("MLP", mlp, settings))
    record.add(import_time(settings))
    record.write(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
