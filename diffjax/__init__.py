"""Diffusion models as pure functions in JAX.

Every capability is a plain function. A configured capability is that function with its data bound
(`bind`), a pytree that crosses `jit`, `vmap`, `grad`, `scan`, `pmap` and `shard_map` as an ordinary
argument. Time runs from the data, t = 0, to the prior, t = 1, and
`x_t = alpha(t) x0 + sigma(t) eps`. A number such as (1.18) refers to an equation of the book
chapter that this library implements; docs/equations.md lists them all.

The names below are enough for a first program. Everything else is in the modules `schedules`,
`grids`, `times`, `process`, `parametrizations`, `exact`, `dynamics`, `divergence`, `guidance`,
`losses`, `weightings`, `samplers`, `optimal_grids`, `solve` and `likelihood`. The modules
`couplings`, `networks`, `features`, `training`, `metrics` and `torch_files` are imported on first
use, because they need SciPy, Flax, Optax or Orbax.
"""

import importlib
from typing import TYPE_CHECKING

from . import (
    divergence,
    dynamics,
    exact,
    grids,
    guidance,
    likelihood,
    losses,
    optimal_grids,
    parametrizations,
    process,
    samplers,
    schedules,
    solve,
    times,
    weightings,
)
from ._bind import bind
from .grids import karras, quadratic, uniform, uniform_log_snr
from .guidance import cfg, clip_x0
from .likelihood import bits_per_dim, log_likelihood
from .losses import conditional_flow_matching, denoising
from .parametrizations import (
    EPS,
    SCORE,
    VELOCITY,
    X0,
    V,
    as_denoiser,
    edm_preconditioning,
    reschedule,
    score,
    velocity,
)
from .process import perturb, sample_prior
from .samplers import (
    ddim,
    ddpm,
    dpm_solver_2m,
    dpm_solver_3,
    edm_sampler,
    euler,
    euler_maruyama,
    heun,
    one_step,
    predictor_corrector,
    sample,
    trajectory,
    unipc,
)
from .schedules import (
    cosine,
    edm,
    from_betas,
    from_sde,
    gvp,
    half_log_snr,
    linear,
    linear_vp,
    sub_vp,
    ve,
)
from .solve import solve_flow, solve_sde
from .typing import Estimate, Sampler, State

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import couplings as couplings
    from . import features as features
    from . import metrics as metrics
    from . import networks as networks
    from . import torch_files as torch_files
    from . import training as training

_LAZY = ("couplings", "features", "metrics", "networks", "torch_files", "training")


def __getattr__(name):
    """Imports the modules that need Flax, Optax, Orbax or SciPy on first use."""
    if name in _LAZY:
        return importlib.import_module(f"diffjax.{name}")
    raise AttributeError(f"module 'diffjax' has no attribute {name!r}")


def __dir__():
    return [*globals(), *_LAZY]


__all__ = [
    "EPS",
    "SCORE",
    "VELOCITY",
    "X0",
    "Estimate",
    "Sampler",
    "State",
    "V",
    "as_denoiser",
    "bind",
    "bits_per_dim",
    "cfg",
    "clip_x0",
    "conditional_flow_matching",
    "cosine",
    "ddim",
    "ddpm",
    "denoising",
    "divergence",
    "dpm_solver_2m",
    "dpm_solver_3",
    "dynamics",
    "edm",
    "edm_preconditioning",
    "edm_sampler",
    "euler",
    "euler_maruyama",
    "exact",
    "from_betas",
    "from_sde",
    "grids",
    "guidance",
    "gvp",
    "half_log_snr",
    "heun",
    "karras",
    "likelihood",
    "linear",
    "linear_vp",
    "log_likelihood",
    "losses",
    "one_step",
    "optimal_grids",
    "parametrizations",
    "perturb",
    "predictor_corrector",
    "process",
    "quadratic",
    "reschedule",
    "sample",
    "sample_prior",
    "samplers",
    "schedules",
    "score",
    "solve",
    "solve_flow",
    "solve_sde",
    "sub_vp",
    "times",
    "trajectory",
    "uniform",
    "uniform_log_snr",
    "unipc",
    "ve",
    "velocity",
    "weightings",
]
