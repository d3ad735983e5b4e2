"""Samplers: published methods, one short function each, and the scan that runs them.

A sampler is a pair of pure functions, `init(x, t) -> state` and `step(key, state, t, s) -> state`, with its denoiser and
schedule bound: a pytree. One step is a few lines; to add a method, write its update and wrap it in `one_step`.
"""

from ._sample import checkpointed_scan, one_step, sample, trajectory, truncated_scan
from .ddim import ddim, ddpm
from .edm import edm_sampler
from .ode import euler, heun
from .sde import euler_maruyama, predictor_corrector

__all__ = [
    "checkpointed_scan",
    "ddim",
    "ddpm",
    "edm_sampler",
    "euler",
    "euler_maruyama",
    "heun",
    "one_step",
    "predictor_corrector",
    "sample",
    "trajectory",
    "truncated_scan",
]
