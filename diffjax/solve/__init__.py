"""Solvers that run from start to end in one call: diffrax, and DPM-Solver with its own steps."""

from .dpm_solver import (
    DPM_SOLVER_12,
    DPM_SOLVER_23,
    AdaptiveSolution,
    EmbeddedPair,
    dpm_solver_adaptive,
    dpm_solver_fast,
)
from .equations import integrate, solve_flow, solve_sde

__all__ = [
    "DPM_SOLVER_12",
    "DPM_SOLVER_23",
    "AdaptiveSolution",
    "EmbeddedPair",
    "dpm_solver_adaptive",
    "dpm_solver_fast",
    "integrate",
    "solve_flow",
    "solve_sde",
]
