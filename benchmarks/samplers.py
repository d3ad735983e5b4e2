"""The cost of the fast samplers over a bare scan of DDIM's step with as many network evaluations.

    python -m benchmarks.samplers [--repeats 15] [--output benchmarks/results/samplers.json]

The measurements and the bare scan are those of `benchmarks.overhead`. The rows are the run time and
compile time against the bare scan, the compile time of 1000 steps against 10, and the number of
traces of `sample` while weights, guidance scale, schedule and grid change.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import tyro

from benchmarks import overhead
from diffjax import EPS, as_denoiser, bind, cfg, linear_vp, sample, samplers, uniform_log_snr

MAKERS = {  # name: (constructor, evaluations per step)
    "dpm_solver_2": (samplers.dpm_solver_2, 2),
    "dpm_solver_2s": (samplers.dpm_solver_2s, 2),
    "dpm_solver_3": (samplers.dpm_solver_3, 3),
    "dpm_solver_2m": (samplers.dpm_solver_2m, 1),
    "dpm_solver_3m": (samplers.dpm_solver_3m, 1),
    "unipc(2)": (functools.partial(samplers.unipc, order=2), 1),
    "unipc(3)": (samplers.unipc, 1),
    "deis(3)": (samplers.deis, 1),
    "data_adams(3)": (samplers.data_adams, 1),
    "noise_adams(3)": (samplers.noise_adams, 1),
    "velocity_adams(3)": (samplers.velocity_adams, 1),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    repeats: int = 15
    """rounds of every timed pair"""
    compilations: int = 5
    """rounds of every pair of compilations"""
    unet_evaluations: int = 6
    """network evaluations of the U-Net, about 1M parameters at batch 16"""
    mlp_evaluations: int = 48
    """network evaluations of the MLP, 64 dimensions and 64 wide at batch 256"""
    output: pathlib.Path = pathlib.Path("benchmarks/results/samplers.json")
    """file of the record"""


def program(case, make, steps: int):
    """`sample` with its arguments."""
    schedule = linear_vp(jnp.array(0.1), jnp.array(20.0))
    sampler = make(as_denoiser(bind(case.apply, case.params), schedule, EPS), schedule)
    return sample, (jax.random.key(0), sampler, case.x, uniform_log_snr(schedule, steps))


def bare(case, evaluations: int):
    """The bare scan of DDIM's step, with its arguments."""
    betas = (jnp.array(0.1), jnp.array(20.0))
    ts = uniform_log_snr(linear_vp(), evaluations)
    return functools.partial(overhead.bare_sample, case.apply), (case.params, betas, case.x, ts)


def traces(case, make) -> int:
    """The traces of `sample` while weights, guidance scale, schedule and grid change."""
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        return sample(*args)

    jitted = jax.jit(counted)
    for i in range(1, 4):
        schedule = linear_vp(0.1 * i, 20.0 + i)
        params = jax.tree.map(lambda p, i=i: i * p, case.params)
        conditional, null = (
            as_denoiser(bind(case.apply, p), schedule, EPS) for p in (params, case.params)
        )
        sampler = make(cfg(conditional, null, 1.5 * i), schedule)
        jitted(jax.random.key(i), sampler, case.x, uniform_log_snr(schedule, 6, end=1e-3 * i))
    return count


def main(settings: Settings) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    record = overhead.Rows()
    networks = overhead.cases(overhead.Settings())
    for network, evaluations, aim in (
        ("U-Net", settings.unet_evaluations, 1.03),
        ("MLP", settings.mlp_evaluations, 1.1),
    ):
        case = networks[network]
        ours, theirs = bare(case, evaluations), bare(case, evaluations)
        record.add(overhead.run_ratio(f"{network}: A against A", None, ours, theirs, 9))
        for name, (make, per_step) in MAKERS.items():
            ours, theirs = program(case, make, evaluations // per_step), bare(case, evaluations)
            title = f"{name}, {network}: run time"
            record.add(overhead.run_ratio(title, aim, ours, theirs, settings.repeats))
    compiled = {"U-Net": ("dpm_solver_3", "dpm_solver_2m", "unipc(3)"), "MLP": MAKERS}
    for network, names in compiled.items():
        case = networks[network]
        for name in names:
            ours, theirs = program(case, MAKERS[name][0], 6), bare(case, 6)
            title = f"{name}, {network}: compile time"
            record.add(overhead.compile_ratio(title, 1.5, ours, theirs, settings.compilations))
    case = networks["MLP"]
    for name in ("dpm_solver_3", "unipc(3)"):
        make = MAKERS[name][0]
        title = f"{name}, MLP: compile time of 1000 steps against 10"
        ours, theirs = program(case, make, 1000), program(case, make, 10)
        record.add(overhead.compile_ratio(title, 1.2, ours, theirs, settings.compilations))
    most = max(traces(case, make) for make, _ in MAKERS.values())
    record.add(overhead.Row("traces of sample, maximum over the samplers", most, 1, unit=""))
    record.write(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
