r"""Time grids that are optimized for a denoiser, by dynamic programming or gradient descent.

Dynamic programming. If the cost of a grid is a sum over its steps,

    L(t_0 ... t_K) = sum_i L(t_{i-1}, t_i)                                                    (1.57)

then `C[k, j] = min_i C[k-1, i] + L[i, j]` finds the best grids for all numbers of steps k at once,
in a scan of (min, +) products of a vector with the table of all L. Dijkstra's algorithm cannot fix
the number of steps. The tables are over candidate times that descend from the prior to the data:

    elbo_table           the likelihood bound, KL(q(x_s | x_t, x_0) || p(x_s | x_t))          (1.58)
    klub_table           the bound on the KL of the discretised SDE (Align Your Steps)
    solver_error_table   the error of one step of a solver, against an accurate trajectory

Descent. `fit_grid` fits a K-step sampler to accurate results by least squares, over the grid and,
if asked, over numbers of the sampler. `learn_grid` minimizes any other loss by gradient descent.

All grids are plain arrays, for any sampler. `save_grid` writes a grid with the log-SNRs that it
visits, and `load_grid` gives the times at which a schedule has them.
"""

from .files import load_grid, save_grid
from .learning import LearnedGrid, fit_grid, from_increments, increments, learn_grid
from .programming import Budgets, cheapest_paths
from .tables import elbo_table, klub_table, solver_error_table

__all__ = [
    "Budgets",
    "LearnedGrid",
    "cheapest_paths",
    "elbo_table",
    "fit_grid",
    "from_increments",
    "increments",
    "klub_table",
    "learn_grid",
    "load_grid",
    "save_grid",
    "solver_error_table",
]
