"""What runs to the end in one call: diffrax for the equations of a path, and DPM-Solver with steps
of its own choice.
"""

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
