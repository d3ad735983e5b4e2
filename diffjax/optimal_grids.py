r"""Time grids that are found: the best K steps for a denoiser, by dynamic programming or by gradient.

Dynamic programming. If the cost of a grid is a sum over its steps,

    L(t_0 ... t_K) = sum_i L(t_{i-1}, t_i)                                                                       (1.57)

then `C[k, j] = min_i C[k-1, i] + L[i, j]` finds the best grid of every number of steps k at once, in a scan of (min, +)
products of a vector with the table of all L. (Dijkstra's algorithm, which the chapter names, has no budget of steps.) The
tables, on candidate times that descend from the prior to the data:

    elbo_table           KL(q(x_s | x_t, x_0) || p(x_s | x_t)): the bound on the likelihood        Watson et al. 2021, (1.58)
    klub_table           the bound on the KL of the discretised SDE                                 Align Your Steps
    solver_error_table   the error of one step of a solver, against an accurate trajectory

Gradient. `learn_grid` descends any loss of the result of a K-step sampler over the grid itself, through the sampler, and
over the numbers of the sampler if asked.

All give plain arrays, for any sampler. `save_grid` and `load_grid` keep them with the schedule that they were found for.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._math import as_float, check_that
from .process import Transition, transition
from .schedules import coefficients, half_log_snr
from .typing import Denoiser, Sampler, Schedule, Time

__all__ = [
    "Budgets",
    "LearnedGrid",
    "cheapest_paths",
    "elbo_table",
    "from_increments",
    "increments",
    "klub_table",
    "learn_grid",
    "load_grid",
    "save_grid",
    "solver_error_table",
]


# ---- dynamic programming ---------------------------------------------------------------------------------------------


class Budgets(NamedTuple):
    """The cheapest paths of 1 ... K steps through a table of costs."""

    costs: Float[Array, " K"]
    """The cost of the cheapest path of k + 1 steps: infinite where there is none, and then its path means nothing."""
    paths: Int[Array, "K K+1"]
    """Its k + 2 candidates, from the first to the last; filled up with the last."""

    def grid(self, ts: Float[Array, " n+1"], steps: int) -> Float[Array, " steps+1"]:
        """The times of the cheapest path of that many steps."""
        if not 1 <= steps <= len(self.costs):
            raise ValueError(f"steps: expected from 1 to {len(self.costs)}, got {steps}")
        return ts[self.paths[steps - 1, : steps + 1]]


def cheapest_paths(table: Float[Array, "n n"], steps: int) -> Budgets:
    """The cheapest paths from the first candidate to the last in exactly 1, 2 ... K steps, all in one run.

    `C[k, j] = min_i C[k-1, i] + L[i, j]`: O(K n^2), a scan of (min, +) products.

    Args:
        table: the cost of going from candidate i straight to candidate j; infinite where that is not allowed (j <= i).
        steps: K, from 1 to n - 1.

    Returns:
        `Budgets(costs, paths)`; `budgets.grid(ts, k)` is the grid of k steps.

    Raises:
        ValueError: if the table is not square, or steps is not in [1, n - 1].

    Reference: Watson et al. 2021 (arXiv 2106.03802), algorithm 1; (1.57).

    >>> inf = jnp.inf
    >>> table = jnp.array([[inf, 1.0, 9.0], [inf, inf, 2.0], [inf, inf, inf]])
    >>> budgets = cheapest_paths(table, 2)
    >>> budgets.costs, budgets.grid(jnp.array([1.0, 0.4, 0.0]), 2)
    (Array([9., 3.], dtype=float32), Array([1. , 0.4, 0. ], dtype=float32))
    """
    table = as_float(table, "table")
    n = len(table) if table.ndim else 0
    if table.shape != (n, n):
        raise ValueError(f"table: expected a square matrix, got shape {table.shape}")
    if not 1 <= steps < n:
        raise ValueError(f"steps: expected from 1 to {n - 1} for {n} candidates, got {steps}")

    def extend(costs, _):
        through = costs[:, None] + table
        best = jnp.argmin(through, axis=0)
        costs = jnp.min(through, axis=0)
        return costs, (costs[-1], best)

    start = jnp.where(jnp.arange(n) == 0, 0.0, jnp.inf).astype(table.dtype)
    _, (costs, best) = jax.lax.scan(extend, start, length=steps)

    def walk_back(k):
        def back(j, level):
            before = jnp.where(level <= k, best[level, j], j)
            return before, before

        _, path = jax.lax.scan(back, jnp.array(n - 1), jnp.arange(steps)[::-1])
        path = jnp.append(path[::-1], n - 1)  # where the path has fewer steps its last candidate is repeated
        return path

    return Budgets(costs, jax.vmap(walk_back)(jnp.arange(steps)))


def elbo_table(
    key: PRNGKeyArray,
    denoise: Denoiser,
    schedule: Schedule,
    ts: Float[Array, " n"],
    x0: Float[Array, "batch *event"],
) -> Float[Array, "n n"]:
    """The terms of the evidence lower bound between any two times, in nats an example (1.58).

    With the variances of q and p matched,
    `L(t, s) = E KL(q(x_s | x_t, x_0) || p(x_s | x_t)) = (e^(2 (lambda_s - lambda_t)) - 1) / 2 E |eps - eps_hat(x_t, t)|^2`,
    so the whole table takes one mean squared error a time. At a last time with sigma = 0 stands
    `-E log p(x_0 | x_t)`, with a Gaussian of the estimate's own noise, `p = N(x0_hat, (sigma_t / alpha_t)^2 I)`.

    Args:
        key: a PRNG key, of the noise.
        denoise: the denoiser.
        schedule: its path.
        ts: the candidates, descending; alpha may be 0 at the first of them, sigma at the last.
        x0: data examples.

    Returns:
        The table, infinite on and below the diagonal.

    Raises:
        ValueError: if ts is not a descending vector of at least 2 times in [0, 1], or concrete log-SNRs do not increase
            along it.

    Reference: Watson et al. 2021 (arXiv 2106.03802), section 3; Kingma et al. 2021 (arXiv 2107.00630), eq. 13-14; (1.58).

    >>> schedule = linear_vp()
    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), schedule)
    >>> x0 = jax.random.normal(jax.random.key(0), (1000, 1))
    >>> elbo_table(jax.random.key(1), denoise, schedule, jnp.array([1.0, 0.5, 0.1]), x0).shape
    (3, 3)
    """
    ts, lambdas = _candidates(schedule, ts)
    dims = x0[0].size

    def mean_errors(key, t):
        alpha, sigma, *_ = coefficients(schedule, t)
        eps = jax.random.normal(key, x0.shape, x0.dtype)
        estimate = denoise(alpha * x0 + sigma * eps, t)
        return [jnp.sum(error**2) / len(x0) for error in (eps - estimate.eps, x0 - estimate.x0)]

    keys = jax.random.split(key, len(ts) - 1)
    errors, data_errors = jax.lax.map(lambda inputs: mean_errors(*inputs), (keys, ts[:-1]))
    gains = lambdas[None, :] - lambdas[:-1, None]
    table = 0.5 * jnp.expm1(2 * jnp.where(jnp.isfinite(gains), gains, 0.0)) * errors[:, None]
    from_nothing = 0.5 * jnp.exp(2 * lambdas)[None, :] * data_errors[:, None]  # the same where alpha_t = 0
    table = jnp.where(jnp.isfinite(lambdas)[:-1, None], table, from_nothing)
    decoder = 0.5 * dims * jnp.log(2 * jnp.pi) - dims * lambdas[:-1] + 0.5 * errors
    table = jnp.where(jnp.isfinite(lambdas)[None, :], table, decoder[:, None])
    return _upper(table)


def klub_table(
    key: PRNGKeyArray,
    denoise: Denoiser,
    schedule: Schedule,
    ts: Float[Array, " n"],
    x0: Float[Array, "batch *event"],
) -> Float[Array, "n n"]:
    """The bound on the KL divergence that one step of the discretised reverse SDE adds: the objective of Align Your Steps.

    `L(t, s) = 1/2 int_{SNR_t}^{SNR_s} E |x0_hat(x_u, u) - x0_hat(x_t, t)|^2 dSNR_u`, where x_u and x_t are on one forward
    path: what it costs to hold the estimate of t until s. The integral is a sum over the candidates, so it is as fine
    as they are; one evaluation a candidate.

    Args:
        key: a PRNG key, of the forward paths.
        denoise: the denoiser.
        schedule: its path.
        ts: the candidates, descending; alpha > 0 and sigma > 0 at all of them.
        x0: data examples.

    Returns:
        The table, in nats an example, infinite on and below the diagonal.

    Raises:
        ValueError: as `elbo_table`, or if a concrete log-SNR is infinite.

    Reference: Sabour et al. 2024 (Align Your Steps, arXiv 2404.14507), section 3: their KLUB, there in sigma / alpha.

    >>> schedule = linear_vp()
    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), schedule)
    >>> x0 = jax.random.normal(jax.random.key(0), (1000, 1))
    >>> ts = uniform_log_snr(schedule, 10)
    >>> jax.jit(klub_table)(jax.random.key(1), denoise, schedule, ts, x0).shape
    (11, 11)
    """
    ts, lambdas = _candidates(schedule, ts)
    check_that(jnp.isfinite, f"ts: expected times of finite log-SNR, got log-SNRs {2 * lambdas}", lambdas)

    def forward(x, inputs):  # from the data to the prior
        key, t, scale, std = inputs
        x = scale * x + std * jax.random.normal(key, x.shape, x.dtype)
        return x, denoise(x, t).x0

    back = ts[::-1]
    first = Transition(*coefficients(schedule, back[0])[:2])
    later = jax.vmap(lambda s, t: transition(schedule, s, t))(back[:-1], back[1:])
    steps = jax.tree.map(lambda a, b: jnp.append(a, b), first, later)
    _, estimates = jax.lax.scan(forward, x0, (jax.random.split(key, len(ts)), back, *steps))
    estimates = estimates[::-1].reshape(len(ts), len(x0), -1)
    distances = jax.lax.map(lambda a: jnp.sum((estimates - a[None]) ** 2, (1, 2)) / len(x0), estimates)
    snr = jnp.exp(2 * lambdas)
    middle = 0.5 * (distances[:, 1:] + distances[:, :-1])
    parts = (
        0.5
        * jnp.diff(snr)[None, :]
        * jnp.where(jnp.arange(len(ts) - 1)[None, :] >= jnp.arange(len(ts))[:, None], middle, 0.0)
    )
    return _upper(jnp.concatenate([jnp.zeros((len(ts), 1)), jnp.cumsum(parts, 1)], 1))


def solver_error_table(
    sampler: Sampler, schedule: Schedule, ts: Float[Array, " n"], xs: Float[Array, "n batch *event"]
) -> Float[Array, "n n"]:
    """The error of one step of a solver from any candidate to any later one, against an accurate trajectory.

    `L(t, s) = sqrt(mean |step(x_t; t -> s) - x_s|^2 / (alpha_s^2 + sigma_s^2))`. The step begins with an empty memory: of a
    multistep method it is the first one, so take the table of a singlestep method of its order.

    Args:
        sampler: a deterministic sampler.
        schedule: its path.
        ts: the candidates, descending.
        xs: an accurate trajectory of the probability flow at these times, of a batch: `trajectory` of a fine grid, or
            `solve_flow` from one candidate to the next.

    Returns:
        The table, infinite on and below the diagonal. It takes one step a pair; a step of one evaluation (DDIM) shares it
        between all s.

    Raises:
        ValueError: if ts is not a descending vector, or xs has another length.

    Reference: the dynamic program of Watson et al. 2021 (arXiv 2106.03802) on the local error of a solver.

    >>> schedule = linear_vp()
    >>> sampler = ddim(gaussian(jnp.zeros(1), jnp.eye(1), schedule), schedule)
    >>> ts = uniform_log_snr(schedule, 4)
    >>> xs = trajectory(jax.random.key(0), sampler, jnp.ones((3, 1)), ts)
    >>> solver_error_table(sampler, schedule, ts, xs)[0, 1]  # the step that made xs has no error against it
    Array(0., dtype=float32)
    """
    ts, _ = _candidates(schedule, ts)
    if len(xs) != len(ts):
        raise ValueError(f"xs: expected one batch for each of the {len(ts)} times, got {len(xs)}")
    alphas, sigmas, *_ = jax.vmap(lambda t: coefficients(schedule, t))(ts)
    scales = jnp.hypot(alphas, sigmas)

    def from_one(inputs):
        t, x = inputs

        def error(s, goal, scale):
            reached = sampler.step(jax.random.key(0), sampler.init(x, t), t, jnp.minimum(s, t)).x
            return jnp.sqrt(jnp.mean((reached - goal) ** 2)) / scale

        return jax.vmap(error)(ts, xs, scales)

    return _upper(jax.lax.map(from_one, (ts, xs)))


def _candidates(schedule, ts):
    ts = as_float(ts, "ts")
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"ts: expected a vector of at least 2 candidate times, got shape {ts.shape}")
    check_that(lambda ts: (ts >= 0) & (ts <= 1), f"ts: expected times in [0, 1], got {ts}", ts)
    check_that(lambda ts: ts[1:] < ts[:-1], f"ts: expected times that descend, got {ts}", ts)
    lambdas = jax.vmap(lambda t: half_log_snr(schedule, t))(ts)
    message = f"schedule: expected a log-SNR that increases along ts, got {2 * lambdas}"
    check_that(lambda v: v[1:] > v[:-1], message, lambdas)
    return ts, lambdas


def _upper(table):
    """The table, infinite on and below the diagonal; its last row is added where it lacks one."""
    n = table.shape[1]
    table = jnp.concatenate([table, jnp.full((n - len(table), n), jnp.inf, table.dtype)])
    return jnp.where(jnp.arange(n)[:, None] < jnp.arange(n)[None, :], table, jnp.inf)


# ---- by gradient -----------------------------------------------------------------------------------------------------


def increments(ts: Float[Array, " n+1"]) -> Float[Array, " n"]:
    """A grid as unconstrained numbers: the logarithms of its steps in t. The inverse of `from_increments`.

    Args:
        ts: a grid.

    Returns:
        n numbers.

    >>> from_increments(increments(jnp.array([1.0, 0.5, 0.125])), 1.0, 0.125)
    Array([1.   , 0.5  , 0.125], dtype=float32)
    """
    return jnp.log(-jnp.diff(as_float(ts, "ts")))


def from_increments(z: Float[Array, " n"], start: Time, end: Time) -> Float[Array, " n+1"]:
    """The grid from start to end whose steps are in proportion to `exp(z)`: it ascends for no z.

    Args:
        z: n numbers; a constant added to all of them changes nothing.
        start: the first time.
        end: the last time.

    Returns:
        n + 1 descending times, exactly start and end at the ends.

    >>> from_increments(jnp.zeros(4), 1.0, 0.0)
    Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    # summed from the data's end, where the times are small: accurate to relative precision there
    shares = jax.lax.cummax(jnp.minimum(jnp.cumsum(jax.nn.softmax(z)[::-1]), 1.0))  # no rounding may turn it back
    inner = end + (start - end) * shares[:-1][::-1]
    return jnp.concatenate([jnp.full_like(inner, start, shape=1), inner, jnp.full_like(inner, end, shape=1)])


class LearnedGrid(NamedTuple):
    """The best grid that a descent has met."""

    ts: Float[Array, " n+1"]
    """The grid."""
    numbers: Any
    """The numbers of the sampler that were learned with it."""
    losses: Float[Array, " steps"]
    """The loss at every iterate."""


def learn_grid(
    loss: Callable[..., Float[Array, ""]], ts: Float[Array, " n+1"], optimizer: Any, steps: int, numbers: Any = None
) -> LearnedGrid:
    """Descends a loss over the steps of a grid, its ends fixed, and over numbers of the sampler if there are any.

    For the distance to accurate end points x0 of the same x1:
    `loss = lambda ts: jnp.mean((sample(key, sampler, x1, ts) - x0) ** 2)`; with numbers,
    `loss = lambda ts, r: jnp.mean((sample(key, dpm_solver_2(denoise, schedule, r), x1, ts) - x0) ** 2)`.

    Args:
        loss: `loss(ts)`, or `loss(ts, numbers)`.
        ts: the grid to begin with.
        optimizer: a pair (init, update) of optax, such as `optax.adam(0.03)`.
        steps: how many steps of it, at least 1.
        numbers: a pytree of floating-point numbers to learn, too.

    Returns:
        `LearnedGrid(ts, numbers, losses)`, the iterate of the smallest loss.

    Raises:
        ValueError: if ts does not descend or steps < 1.

    Reference: Watson et al. 2022 (arXiv 2202.05830) descend a sample-quality loss over the coefficients of a sampler;
    Tong et al. 2025 (LD3, arXiv 2405.15506) the distance to the teacher over the time steps.

    >>> import optax
    >>> schedule = linear_vp()
    >>> sampler = ddim(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> def loss(ts):
    ...     return jnp.mean((sample(jax.random.key(0), sampler, jnp.array([1.0]), ts) - 0.5) ** 2)
    >>> learned = learn_grid(loss, uniform(5, end=1e-3), optax.adam(0.1), 50)
    >>> bool(loss(learned.ts) < 0.25 * loss(uniform(5, end=1e-3)))
    True
    """
    ts = as_float(ts, "ts")
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"ts: expected a vector of at least 2 times, got shape {ts.shape}")
    check_that(lambda ts: ts[1:] < ts[:-1], f"ts: expected times that descend, got {ts}", ts)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")

    def objective(params):
        z, numbers = params
        grid = from_increments(z, ts[0], ts[-1])
        value = loss(grid) if numbers is None else loss(grid, numbers)
        return value.astype(ts.dtype)

    def descend(carry, _):
        params, state, best, best_loss = carry
        value, gradient = jax.value_and_grad(objective)(params)
        better = value < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        return (params, state, best, jnp.minimum(value, best_loss)), value

    params = increments(ts), jax.tree.map(lambda n: as_float(n, "numbers"), numbers)
    carry = params, optimizer.init(params), params, jnp.full((), jnp.inf, ts.dtype)
    (_, _, (z, numbers), _), losses = jax.lax.scan(descend, carry, length=steps)
    return LearnedGrid(from_increments(z, ts[0], ts[-1]), numbers, losses)


# ---- files -----------------------------------------------------------------------------------------------------------


def save_grid(path: str | pathlib.Path, ts: Float[Array, " n+1"], schedule: Schedule) -> None:
    """Writes a grid as JSON, with the name and numbers of the schedule it was found for, and its log-SNR at the times.

    Args:
        path: the file.
        ts: the grid.
        schedule: its schedule.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, uniform(2, end=0.5), linear_vp())
    >>> load_grid(path, linear_vp())
    Array([1.  , 0.75, 0.5 ], dtype=float32)
    """
    ts = as_float(ts, "ts")
    pathlib.Path(path).write_text(json.dumps({"ts": ts.tolist(), "schedule": _describe(schedule, ts)}, indent=1) + "\n")


def load_grid(path: str | pathlib.Path, schedule: Schedule) -> Float[Array, " n+1"]:
    """Reads a grid of `save_grid`, for the schedule that it was found for.

    Args:
        path: the file.
        schedule: the schedule to use it with.

    Returns:
        The grid.

    Raises:
        ValueError: if the file holds no grid, or the schedule is another one; it says what differs.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.json"
    >>> save_grid(path, uniform(2, end=0.5), linear_vp(0.1, 20.0))
    >>> load_grid(path, linear_vp(0.1, 10.0))
    Traceback (most recent call last):
    ValueError: schedule: the grid in ... was found for another one: numbers [0.1..., 20.0], expected [0.1..., 10.0]
    """
    try:
        record = json.loads(pathlib.Path(path).read_text())
        saved = {field: record["schedule"][field] for field in ("name", "numbers", "half_log_snr")}
        ts = jnp.asarray(record["ts"], float)
        if ts.ndim != 1:
            raise ValueError(f"ts of shape {ts.shape}")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected a grid of save_grid in {path}, got {error!r}") from error
    given = _describe(schedule, ts)
    for field, tolerance in (("name", None), ("numbers", 1e-6), ("half_log_snr", 1e-3)):
        a, b = saved[field], given[field]
        same = a == b if tolerance is None else len(a) == len(b) and np.allclose(a, b, rtol=tolerance, atol=tolerance)
        if not same:
            raise ValueError(f"schedule: the grid in {path} was found for another one: {field} {a}, expected {b}")
    return ts


def _describe(schedule, ts):
    """What tells a schedule from others: its function, its numbers, and (for closures) its log-SNR at the grid."""
    fn = schedule.func if isinstance(schedule, Partial) else schedule
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"
    numbers = [float(n) for leaf in jax.tree.leaves(schedule) if not callable(leaf) for n in np.ravel(leaf)]
    values = jax.vmap(lambda t: half_log_snr(schedule, t))(ts)
    return {"name": name, "numbers": numbers, "half_log_snr": [float(v) for v in values]}
