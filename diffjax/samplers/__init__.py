"""Samplers: published methods, one short function each, and the scan that runs them.

A sampler is a pair of pure functions, `init(x, t) -> state` and `step(key, state, t, s) -> state`.
Its denoiser and schedule are bound, so it is a pytree. To add a method, write its update and wrap
it in `one_step`. A method that interpolates earlier predictions only names what it interpolates
(`_interpolation`).
"""

from ._sample import checkpointed_scan, one_step, sample, trajectory, truncated_scan
from .ddim import ddim, ddpm
from .dpm_solver import dpm_solver_2, dpm_solver_2s, dpm_solver_3
from .edm import edm_sampler
from .kernels import (
    ddim_kernel,
    ddpm_kernel,
    euler_maruyama_kernel,
    kernel_sampler,
    log_transition,
    sde_dpm_solver_kernel,
)
from .multistep import (
    bh1,
    bh2,
    data_adams,
    deis,
    dpm_solver_2m,
    dpm_solver_3m,
    noise_adams,
    sa_solver,
    sde_dpm_solver_2m,
    unipc,
    velocity_adams,
)
from .ode import euler, heun
from .sde import bridge_sampler, euler_maruyama, predictor_corrector

__all__ = [
    "bh1",
    "bh2",
    "bridge_sampler",
    "checkpointed_scan",
    "data_adams",
    "ddim",
    "ddim_kernel",
    "ddpm",
    "ddpm_kernel",
    "deis",
    "dpm_solver_2",
    "dpm_solver_2m",
    "dpm_solver_2s",
    "dpm_solver_3",
    "dpm_solver_3m",
    "edm_sampler",
    "euler",
    "euler_maruyama",
    "euler_maruyama_kernel",
    "heun",
    "kernel_sampler",
    "log_transition",
    "noise_adams",
    "one_step",
    "predictor_corrector",
    "sa_solver",
    "sample",
    "sde_dpm_solver_2m",
    "sde_dpm_solver_kernel",
    "trajectory",
    "truncated_scan",
    "unipc",
    "velocity_adams",
]
