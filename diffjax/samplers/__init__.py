"""Samplers: published methods, one short function each, and the scan that runs them.

A sampler is a pair of pure functions, `init(x, t) -> state` and `step(key, state, t, s) -> state`.
Its denoiser and schedule are bound, so it is a pytree. To add a method, write its update and wrap
it in `one_step`. A method that interpolates earlier predictions only names what it interpolates
(`_interpolation`).
"""

from ._sample import (
    checkpointed_scan,
    final_state,
    one_step,
    sample,
    trajectory,
    truncated_scan,
)
from .ddim import ddim, ddpm
from .dpm_solver import dpm_solver_2, dpm_solver_2s, dpm_solver_3
from .edm import edm_sampler
from .guided import cfg_plus_plus, projected_with_momentum
from .inpainting import repaint
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
from .particles import (
    Particles,
    effective_sample_size,
    log_evidence,
    resample,
    tilted_cfg,
    twisted,
)
from .sde import bridge_sampler, euler_maruyama, predictor_corrector

__all__ = [
    "Particles",
    "bh1",
    "bh2",
    "bridge_sampler",
    "cfg_plus_plus",
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
    "effective_sample_size",
    "euler",
    "euler_maruyama",
    "euler_maruyama_kernel",
    "final_state",
    "heun",
    "kernel_sampler",
    "log_evidence",
    "log_transition",
    "noise_adams",
    "one_step",
    "predictor_corrector",
    "projected_with_momentum",
    "repaint",
    "resample",
    "sa_solver",
    "sample",
    "sde_dpm_solver_2m",
    "sde_dpm_solver_kernel",
    "tilted_cfg",
    "trajectory",
    "truncated_scan",
    "twisted",
    "unipc",
    "velocity_adams",
]
