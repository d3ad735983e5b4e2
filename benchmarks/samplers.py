"""What the samplers cost: to run, over a bare scan of DDIM's step with as many network evaluations;
to compile, over DDIM.

    python -m benchmarks.samplers [--repeats 15] [--output benchmarks/results/samplers.json]

The rows are those of `benchmarks.overhead`, whose measuring and whose hand-written scan they use:
run time of the fast samplers against the bare scan, compile time of every sampler against `sample`
with `ddim` on the same network, the compile time of many steps against few, and how often `sample`
is traced while weights, guidance scale, schedule and grid change.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import tyro

from benchmarks import overhead
from diffjax import EPS, as_denoiser, bind, cfg, linear_vp, sample, samplers, solve, uniform_log_snr

FAST = {  # name: (constructor, evaluations a step)
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


def drawn_from(kernel):
    return lambda denoise, schedule: samplers.kernel_sampler(kernel(denoise, schedule))


OTHERS = {
    "ddim(eta)": functools.partial(samplers.ddim, eta=0.5),
    "ddpm": samplers.ddpm,
    "euler": samplers.euler,
    "heun": samplers.heun,
    "edm_sampler": samplers.edm_sampler,
    "edm_sampler(churn)": functools.partial(samplers.edm_sampler, churn=0.2),
    "euler_maruyama": samplers.euler_maruyama,
    # the other kernels are samplers above
    "sde_dpm_solver_kernel": drawn_from(samplers.sde_dpm_solver_kernel),
    "predictor_corrector": samplers.predictor_corrector,
    "sde_dpm_solver_2m": samplers.sde_dpm_solver_2m,
    "sa_solver(3)": samplers.sa_solver,
}
START, END = 0.999, 1e-3
TO_THE_END = {  # functions of (key, denoiser, schedule, x)
    "bridge_sampler": lambda key, denoise, schedule, x: sample(
        key,
        samplers.bridge_sampler(lambda x, t: denoise(x, t).eps, lambda x, t: -x, 0.5),
        x,
        uniform_log_snr(schedule, 6),
    ),
    "dpm_solver_fast": lambda key, denoise, schedule, x: solve.dpm_solver_fast(
        denoise, schedule, x, 6
    ),
    "dpm_solver_adaptive": lambda key, denoise, schedule, x: (
        solve.dpm_solver_adaptive(denoise, schedule, x).x
    ),
    "solve_flow": lambda key, denoise, schedule, x: solve.solve_flow(
        denoise, schedule, x, START, END
    ),
    "solve_sde": lambda key, denoise, schedule, x: solve.solve_sde(
        key, denoise, schedule, x, START, END
    ),
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
    """where to write the rows"""


def denoiser(case):
    """With its schedule, both a pytree of arrays."""
    schedule = linear_vp(jnp.array(0.1), jnp.array(20.0))
    return as_denoiser(bind(case.apply, case.params), schedule, EPS), schedule


def program(case, make, steps: int):
    """`sample` with its arguments."""
    denoise, schedule = denoiser(case)
    return sample, (
        jax.random.key(0),
        make(denoise, schedule),
        case.x,
        uniform_log_snr(schedule, steps),
    )


def every_program(case) -> dict:
    """By name, each sampler but `ddim` with its arguments."""
    makers = {name: make for name, (make, _) in FAST.items()} | OTHERS
    sampled = {name: program(case, make, 6) for name, make in makers.items()}
    return sampled | {
        name: (run, (jax.random.key(0), *denoiser(case), case.x))
        for name, run in TO_THE_END.items()
    }


def bare(case, evaluations: int):
    """The bare scan of as many evaluations."""
    betas = (jnp.array(0.1), jnp.array(20.0))
    ts = uniform_log_snr(linear_vp(), evaluations)
    return functools.partial(overhead.bare_sample, case.apply), (case.params, betas, case.x, ts)


def traces(case, make) -> int:
    """How often `sample` is traced while weights, guidance scale, schedule and grid change."""
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
        again = overhead.run_ratio(
            f"{network}: A against A", None, bare(case, evaluations), bare(case, evaluations), 9
        )
        record.add(again)
        for name, (make, each) in FAST.items():
            ours, theirs = program(case, make, evaluations // each), bare(case, evaluations)
            record.add(
                overhead.run_ratio(
                    f"{name}, {network}: run time", aim, ours, theirs, settings.repeats
                )
            )
    for network, case in networks.items():
        of_ddim = program(case, samplers.ddim, 6)
        for name, each in every_program(case).items():
            title = f"{name}, {network}: compile time over ddim's"
            record.add(overhead.compile_ratio(title, 1.5, each, of_ddim, settings.compilations))
    case = networks["MLP"]
    for name in ("dpm_solver_3", "unipc(3)"):
        make = FAST[name][0]
        title = f"{name}, MLP: compile time of N = 1000 against 10"
        many, few = program(case, make, 1000), program(case, make, 10)
        record.add(overhead.compile_ratio(title, 1.2, many, few, settings.compilations))
    most = max(traces(case, make) for make, _ in FAST.values())
    record.add(overhead.Row("traces of sample, the most of any sampler", most, 1, unit=""))
    record.write(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
