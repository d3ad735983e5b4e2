"""DPM-Solver from start to end: with adaptive steps, or with exactly K evaluations."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from .._checks import as_float, check_that
from .._once import once
from .._varying import error_if, varying_carry
from ..grids import uniform_log_snr
from ..samplers._interpolation import predict_eps
from ..samplers._singlestep import Stages, run_stages
from ..samplers.dpm_solver import stages_1, stages_2, stages_3
from ..samplers.kernels import towards
from ..schedules import alpha_sigma, half_log_snr, half_log_snr_inverse
from ..typing import Denoiser, Schedule, Time

__all__ = [
    "DPM_SOLVER_12",
    "DPM_SOLVER_23",
    "AdaptiveSolution",
    "EmbeddedPair",
    "dpm_solver_adaptive",
    "dpm_solver_fast",
]


class AdaptiveSolution(NamedTuple):
    """The result of an adaptive solver."""

    x: Array
    """x at the last time."""
    evaluations: Int[Array, ""]
    """The number of calls of the denoiser, including those of rejected steps."""


def _lower_1(schedule, t, s, start, differences):
    return towards(start, *alpha_sigma(schedule, s))


def _lower_2(schedule, t, s, start, differences):
    weight = stages_2(schedule, t, s, 1 / 3).weights[1]
    return _lower_1(schedule, t, s, start, differences) + weight * differences[1]


class EmbeddedPair(NamedTuple):
    """A solver and, from the same evaluations, one of lower order that estimates its error."""

    order: int
    """The order of the solver; that of the other one is `order - 1`."""
    stages: Callable[[Schedule, Time, Time], Stages]
    """`stages(schedule, t, s)`: the solver's evaluations between t and s."""
    lower: Callable[..., Array]
    """`lower(schedule, t, s, start, differences) -> x_s`: the step of lower order."""


DPM_SOLVER_12 = EmbeddedPair(2, stages_2, _lower_1)
"""DPM-Solver-2, with DPM-Solver-1 for the error estimate."""
DPM_SOLVER_23 = EmbeddedPair(3, stages_3, _lower_2)
"""DPM-Solver-3, with DPM-Solver-2 (r1 = 1/3) for the error estimate."""


def dpm_solver_adaptive(
    denoise: Denoiser,
    schedule: Schedule,
    x: Float[ArrayLike, "*x"],
    t: Time = 1.0,
    s: Time = 1e-3,
    pair: EmbeddedPair = DPM_SOLVER_23,
    rtol: float | Array = 0.05,
    atol: float | Array = 0.0078,
    first_step: float | Array = 0.05,
    safety: float | Array = 0.9,
    max_steps: int = 1000,
) -> AdaptiveSolution:
    """DPM-Solver-12 and -23: adaptive steps in log-SNR, from a pair of solvers.

    With x_high of order q and x_low of order q - 1, a step h is accepted if E <= 1,

        E = |(x_high - x_low) / max(atol, rtol max(|x_low|, |x_before|))|_2 / sqrt(d),

    and the next one is `safety h E^(-1/q)`. x is one sample; under vmap every sample has its own
    steps. Reverse mode is not available.

    Args:
        denoise: the denoiser.
        schedule: its path.
        x: one sample at time t.
        t: the time of x; its log-SNR must be finite.
        s: the time to stop at, s < t; its log-SNR must be finite.
        pair: DPM_SOLVER_12 (2 evaluations per step) or DPM_SOLVER_23 (3).
        rtol: the relative tolerance of a step.
        atol: the absolute tolerance of a step, in units of x.
        first_step: the first h, in nats of half log-SNR.
        safety: how much of the estimated best step to take, in (0, 1).
        max_steps: the maximum number of steps, accepted or rejected.

    Returns:
        `AdaptiveSolution(x, evaluations)`.

    Raises:
        ValueError: for concrete times that are not 0 <= s < t <= 1 or have no finite log-SNR, or
            concrete tolerances that are not positive.
        RuntimeError: if max_steps is too small, or if x or an output of the denoiser is not finite.
            Within `shard_map`, where jax cannot raise, x is NaN instead.

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), appendix C.

    >>> schedule = linear_vp()
    >>> denoise = gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule)
    >>> solution = dpm_solver_adaptive(denoise, schedule, jnp.array([1.0]), rtol=1e-3, atol=1e-3)
    >>> solution.x.round(2)
    Array([0.5], dtype=float32)
    """
    x, t, s = as_float(x, "x"), jnp.asarray(t, float), jnp.asarray(s, float)
    _check_adaptive(schedule, t, s, rtol, atol, first_step)
    numbers = jax.tree.map(jnp.asarray, (rtol, atol, first_step, safety))
    return _adapt(denoise, schedule, x, t, s, pair, *numbers, max_steps)


@once
def _adapt(denoise, schedule, x, t, s, pair, rtol, atol, first_step, safety, max_steps):
    end = half_log_snr(schedule, s)

    def unfinished(carry):
        return (carry[1] > s) & (carry[-1] < max_steps) & jnp.isfinite(carry[3])

    def attempt(carry):
        x, t, before, h, tried = carry
        now = half_log_snr(schedule, t)
        last = h >= end - now
        target = jnp.where(last, s, half_log_snr_inverse(schedule, jnp.where(last, end, now + h)))
        stages = pair.stages(schedule, t, target)
        (high, start), differences = run_stages(denoise, predict_eps, x, stages)
        low = pair.lower(schedule, t, target, start, differences)
        scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low), jnp.abs(before)))
        error = jnp.sqrt(jnp.mean(((high - low) / scale) ** 2))
        taken = error <= 1
        h = safety * jnp.minimum(h, end - now) * jnp.maximum(error, 1e-6) ** (-1 / pair.order)
        x, before, t = jax.tree.map(
            lambda a, b: jnp.where(taken, a, b), (high, low, target), (x, before, t)
        )
        return x, t, before, h, tried + 1

    carry = (x, t, x, first_step.astype(end.dtype), jnp.zeros((), jnp.int32))
    x, t, _, h, tried = jax.lax.while_loop(unfinished, attempt, varying_carry(attempt, carry))
    not_finite = "x: expected finite values of x and the denoiser from t to s, got others"
    too_few = (
        f"max_steps: expected enough steps to go from t to s, got {max_steps}. "
        "Give more steps, or larger tolerances"
    )
    x = error_if(x, ~jnp.isfinite(h), not_finite)
    x = error_if(x, t > s, too_few)
    return AdaptiveSolution(x, pair.order * tried)


def _check_adaptive(schedule, t, s, rtol, atol, first_step):
    check_that(
        lambda t, s: (0 <= s) & (s < t) & (t <= 1),
        "t, s: expected 0 <= s < t <= 1, got t={}, s={}",
        t,
        s,
    )
    for name, time in (("t", t), ("s", s)):
        value = half_log_snr(schedule, time)
        check_that(
            jnp.isfinite,
            f"{name}: expected a time of finite log-SNR, got {name}={time} with {{}}",
            value,
        )
    for name, value in (("rtol", rtol), ("atol", atol), ("first_step", first_step)):
        check_that(lambda v: v > 0, f"{name}: expected a positive number, got {{}}", value)


def dpm_solver_fast(
    denoise: Denoiser,
    schedule: Schedule,
    x: Float[ArrayLike, "*x"],
    evaluations: int,
    start: Time = 1.0,
    end: Time = 1e-3,
) -> Float[Array, "*x"]:
    """DPM-Solver-fast: exactly K evaluations, in steps of order 3, and the rest of order 2 and 1.

        K mod 3 = 0    K/3 - 1 steps of order 3, one of order 2, one of order 1
        K mod 3 = 1    floor(K/3) steps of order 3, one of order 1
        K mod 3 = 2    floor(K/3) steps of order 3, one of order 2

    The steps are uniform in the log-SNR.

    Args:
        denoise: the denoiser.
        schedule: its path.
        x: the start: one sample, or a batch.
        evaluations: K, at least 1.
        start: the time of x.
        end: the last time; 0 ends at the data themselves.

    Returns:
        x at the last time, of the shape of x.

    Raises:
        ValueError: if evaluations < 1, x is not floating-point, or a concrete result is not finite;
            and as for `uniform_log_snr`.

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), section 3.4; Fig. 1.4.

    >>> schedule = linear_vp()
    >>> denoise = gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule)
    >>> dpm_solver_fast(denoise, schedule, jnp.array([1.0]), 20).round(2)
    Array([0.5], dtype=float32)
    """
    if evaluations < 1:
        raise ValueError(f"evaluations: expected at least 1, got {evaluations}")
    threes, rest = divmod(evaluations, 3)
    orders = [3] * threes + [rest] if rest else [3] * (threes - 1) + [2, 1]
    outer = uniform_log_snr(schedule, len(orders), start, end)
    make = {1: stages_1, 2: stages_2, 3: stages_3}
    steps, done = [], 0
    for order, group in itertools.groupby(orders):
        n = done + len(list(group))
        make_group = jax.vmap(functools.partial(make[order], schedule))
        stages = make_group(outer[done:n], outer[done + 1 : n + 1])
        steps.append(jax.tree.map(jnp.ravel, stages))
        done = n
    stages = jax.tree.map(lambda *parts: jnp.concatenate(parts), *steps)
    first = jnp.concatenate([jnp.arange(order) == 0 for order in orders])
    (last, _), _ = run_stages(denoise, predict_eps, as_float(x, "x"), stages, first)
    check_that(
        np.isfinite,
        "denoise: expected finite values at all times from start to end, got x={} at the end",
        last,
    )
    return last
