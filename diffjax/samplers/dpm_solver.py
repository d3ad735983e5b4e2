"""DPM-Solver, singlestep: intermediate evaluations at free places within a step, of fixed or of adaptive length.

The evaluations of a step differ by numbers alone, so a step is a scan over its stages: a compiled sampler holds the network
once. Every stage goes from the beginning of its step, where (x0, eps) and its prediction p are known, to a later time by

    x = alpha x0 + sigma eps + w (p_now - p),

with w = 0 for the first stage: DDIM. The rows of Fig. 1.4 are the times of the stages and their w.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import equinox
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._bind import bind
from .._math import as_float, check_number, check_that, phi
from ..grids import uniform_log_snr
from ..schedules import coefficients, half_log_snr, half_log_snr_inverse
from ..typing import Denoiser, Estimate, Sampler, Schedule, State, Time
from ._exponential import eps_of, x0_of
from ._sample import one_step
from .ddim import towards

__all__ = [
    "DPM_SOLVER_12",
    "DPM_SOLVER_23",
    "AdaptiveSolution",
    "EmbeddedPair",
    "dpm_solver_2",
    "dpm_solver_2s",
    "dpm_solver_3",
    "dpm_solver_adaptive",
    "dpm_solver_fast",
]


class Stages(NamedTuple):
    """The evaluations of a step: when, where to from there, and by which w."""

    times: Float[Array, " n"]
    targets: Float[Array, " n"]
    weights: Float[Array, " n"]


def _stages(schedule, t, s, ratios):
    """The times at `lambda_t + r h` of ratios r < 1, sigma_s and alpha_s there, and h; t itself if h is infinite."""
    start, end = half_log_snr(schedule, t), half_log_snr(schedule, s)
    finite = jnp.isfinite(end - start)
    start, h = jnp.where(finite, start, 0.0), jnp.where(finite, end - start, 1.0)
    inner = [jnp.where(finite, half_log_snr_inverse(schedule, start + r * h), t) for r in ratios]
    times, targets = jnp.stack([t, *inner]), jnp.stack([*inner, s])
    alphas, sigmas, *_ = jax.vmap(lambda t: coefficients(schedule, t))(targets)

    def stages(weights):
        return Stages(times, targets, jnp.where(finite, jnp.stack([jnp.zeros_like(h), *weights]), 0.0))

    return h, alphas, sigmas, stages


def _stages_1(schedule, t, s):
    return Stages(*(jnp.asarray(a)[None] for a in (t, s, jnp.zeros_like(t))))


def _stages_2(schedule, t, s, r1=0.5):
    h, _, sigmas, stages = _stages(schedule, t, s, (r1,))
    return stages([-sigmas[1] * jnp.expm1(h) / (2 * r1)])


def _stages_2s(schedule, t, s, r1=0.5):
    h, alphas, _, stages = _stages(schedule, t, s, (r1,))
    return stages([-alphas[1] * jnp.expm1(-h) / (2 * r1)])


def _stages_3(schedule, t, s, r1=1 / 3, r2=2 / 3):
    h, _, sigmas, stages = _stages(schedule, t, s, (r1, r2))
    return stages([-sigmas[1] * r2 / r1 * r2 * h * phi(2, r2 * h), -sigmas[2] / r2 * h * phi(2, h)])


def _stage(denoise, schedule, predict, x, start, first, time, target, weight):
    """One stage: x at the target, and the estimate at the beginning of its step."""
    estimate = denoise(x, time)
    start = jax.tree.map(lambda new, old: jnp.where(first, new, old), estimate, start)
    difference = predict(estimate) - predict(start)
    return towards(start, schedule, target) + weight * difference, start, difference


def _run_stages(denoise, schedule, predict, x, stages):
    def body(carry, inputs):
        x, start, difference = _stage(denoise, schedule, predict, *carry, *inputs)
        return (x, start), difference

    first = jnp.arange(stages.times.size) == 0
    return jax.lax.scan(body, (x, Estimate(jnp.zeros_like(x), jnp.zeros_like(x))), (first, *stages))


def _singlestep(denoise, schedule, predict, make_stages, ratios, key, x, t, s):
    t, s = jnp.asarray(t), jnp.asarray(s)
    return _run_stages(denoise, schedule, predict, x, make_stages(schedule, t, s, *ratios))[0][0]


def dpm_solver_2(denoise: Denoiser, schedule: Schedule, r1: float | Array = 0.5) -> Sampler:
    """DPM-Solver-2: noise prediction, one intermediate time at `lambda_t + r1 h`. Second order; 2 evaluations a step.

    `u = alpha_r / alpha_t x - sigma_r (e^(r1 h) - 1) eps`,
    `x_s = alpha_s / alpha_t x - sigma_s (e^h - 1) (eps + (eps_u - eps) / (2 r1))` (Fig. 1.4).

    Args:
        denoise: the denoiser.
        schedule: its path, any; a step to or from an infinite log-SNR is DDIM.
        r1: where the intermediate time lies, in (0, 1].

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete r1 outside (0, 1].

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), algorithms 1 and 4; Fig. 1.4, (1.55).

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_2(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 20)).round(1)
    Array([0.5], dtype=float32)
    """
    _check_ratios(r1)
    return one_step(bind(_singlestep, denoise, schedule, eps_of, _stages_2, (r1,)))


def dpm_solver_2s(denoise: Denoiser, schedule: Schedule, r1: float | Array = 0.5) -> Sampler:
    """DPM-Solver++(2S): as `dpm_solver_2` with data prediction. Second order; 2 evaluations a step.

    `u = sigma_r / sigma_t x + alpha_r (1 - e^(-r1 h)) x0`,
    `x_s = sigma_s / sigma_t x + alpha_s (1 - e^-h) (x0 + (x0_u - x0) / (2 r1))`.

    Args:
        denoise: the denoiser.
        schedule: its path, any; a step to or from an infinite log-SNR is DDIM.
        r1: where the intermediate time lies, in (0, 1].

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete r1 outside (0, 1].

    Reference: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 1.

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_2s(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 20)).round(1)
    Array([0.5], dtype=float32)
    """
    _check_ratios(r1)
    return one_step(bind(_singlestep, denoise, schedule, x0_of, _stages_2s, (r1,)))


def dpm_solver_3(
    denoise: Denoiser, schedule: Schedule, r1: float | Array = 1 / 3, r2: float | Array = 2 / 3
) -> Sampler:
    """DPM-Solver-3: noise prediction, two intermediate times. Third order; 3 evaluations a step.

    `u1` as in `dpm_solver_2`; with `D1 = eps_u1 - eps` and `D2 = eps_u2 - eps`,
    `u2 = alpha_r2 / alpha_t x - sigma_r2 (e^(r2 h) - 1) eps - sigma_r2 (r2 / r1) ((e^(r2 h) - 1) / (r2 h) - 1) D1`,
    `x_s = alpha_s / alpha_t x - sigma_s (e^h - 1) eps - (sigma_s / r2) ((e^h - 1) / h - 1) D2` (Fig. 1.4).

    Args:
        denoise: the denoiser.
        schedule: its path, any; a step to or from an infinite log-SNR is DDIM.
        r1: where the first intermediate time lies, in (0, 1]. Third order needs r2 = 2/3.
        r2: where the second one lies.

    Returns:
        The sampler.

    Raises:
        ValueError: for concrete ratios outside (0, 1], or r2 <= r1.

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), algorithms 2 and 5; Fig. 1.4, (1.55).

    >>> schedule = linear_vp()
    >>> sampler = dpm_solver_3(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), uniform_log_snr(schedule, 10)).round(2)
    Array([0.5], dtype=float32)
    """
    _check_ratios(r1, r2)
    return one_step(bind(_singlestep, denoise, schedule, eps_of, _stages_3, (r1, r2)))


# ---- exactly K evaluations -------------------------------------------------------------------------------------------


def dpm_solver_fast(
    denoise: Denoiser, schedule: Schedule, evaluations: int, start: Time = 1.0, end: Time = 1e-3
) -> tuple[Sampler, Float[Array, " n+1"]]:
    """DPM-Solver-fast: exactly K evaluations, in steps of order 3 and, for the rest of K, of order 2 and 1.

    K mod 3 = 0: K/3 - 1 steps of order 3, one of 2, one of 1; 1: floor(K/3) of order 3, one of 1; 2: floor(K/3) of order 3,
    one of 2. The steps are uniform in the log-SNR.

    Args:
        denoise: the denoiser.
        schedule: its path.
        evaluations: K, at least 1.
        start: the first time, of finite log-SNR.
        end: the last time, of finite log-SNR.

    Returns:
        The sampler, and the grid of its K evaluations for `sample`. (On another grid than its own it returns NaN.)

    Raises:
        ValueError: if evaluations < 1; and as `uniform_log_snr`.

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), section 3.4; the rule of the chapter's Fig. 1.4.

    >>> schedule = linear_vp()
    >>> sampler, ts = dpm_solver_fast(gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule), schedule, 20)
    >>> sample(jax.random.key(0), sampler, jnp.array([1.0]), ts).round(2), ts.size
    (Array([0.5], dtype=float32), 21)
    """
    if evaluations < 1:
        raise ValueError(f"evaluations: expected at least 1, got {evaluations}")
    threes, rest = divmod(evaluations, 3)
    orders = [3] * threes + [rest] if rest else [3] * (threes - 1) + [2, 1]
    outer = uniform_log_snr(schedule, len(orders), start, end)
    make = {1: _stages_1, 2: _stages_2, 3: _stages_3}
    steps, done = [], 0
    for order, group in itertools.groupby(orders):
        n = done + len(list(group))
        of_order = jax.vmap(functools.partial(make[order], schedule))(outer[done:n], outer[done + 1 : n + 1])
        steps.append(jax.tree.map(jnp.ravel, of_order))
        done = n
    stages = Stages(*map(jnp.concatenate, zip(*steps, strict=True)))
    first = jnp.concatenate([jnp.arange(order) == 0 for order in orders])
    sampler = Sampler(bind(_planned_init), bind(_planned_step, denoise, schedule, first, stages))
    return sampler, jnp.append(stages.times, outer[-1])


def _planned_init(x, t):
    return State(x, (jnp.zeros((), jnp.int32), Estimate(jnp.zeros_like(x), jnp.zeros_like(x))))


def _planned_step(denoise, schedule, first, stages, key, state, t, s):
    i, start = state.memory
    planned = jax.tree.map(lambda a: a[i], (first, *stages))
    x, start, _ = _stage(denoise, schedule, eps_of, state.x, start, *planned)
    on_plan = (i < stages.times.size) & (t == planned[1]) & (s == planned[2])
    return State(jnp.where(on_plan, x, jnp.nan), (i + 1, start))


# ---- adaptive steps --------------------------------------------------------------------------------------------------


class AdaptiveSolution(NamedTuple):
    """What an adaptive solver returns."""

    x: Array
    """x at the last time."""
    evaluations: Int[Array, ""]
    """How often the denoiser was called, rejected steps included."""


def _lower_1(schedule, t, s, start, differences):
    return towards(start, schedule, s)


def _lower_2(schedule, t, s, start, differences):
    return towards(start, schedule, s) + _stages_2(schedule, t, s, 1 / 3).weights[1] * differences[1]


class EmbeddedPair(NamedTuple):
    """A solver, and one of an order less on the same evaluations to tell its error by."""

    order: int
    stages: Callable[[Schedule, Time, Time], Stages]
    lower: Callable[..., Array]


DPM_SOLVER_12 = EmbeddedPair(2, _stages_2, _lower_1)
"""DPM-Solver-2 beside DPM-Solver-1."""
DPM_SOLVER_23 = EmbeddedPair(3, _stages_3, _lower_2)
"""DPM-Solver-3 beside DPM-Solver-2 of r1 = 1/3."""


def dpm_solver_adaptive(
    denoise: Denoiser,
    schedule: Schedule,
    x: Array,
    t: Time = 1.0,
    s: Time = 1e-3,
    pair: EmbeddedPair = DPM_SOLVER_23,
    rtol: float | Array = 0.05,
    atol: float | Array = 0.0078,
    first_step: float | Array = 0.05,
    safety: float | Array = 0.9,
    max_steps: int = 1000,
) -> AdaptiveSolution:
    """DPM-Solver-12 and -23: steps in log-SNR of a length that keeps a solver within the tolerance of a lower one.

    With x_high of order q and x_low of order q - 1, a step h is taken if
    `E = |(x_high - x_low) / max(atol, rtol max(|x_low|, |x_before|))|_2 / sqrt(d) <= 1`, and the next one is
    `safety h E^(-1/q)`. x is one sample: under vmap every sample has steps of its own. No reverse mode.

    Args:
        denoise: the denoiser.
        schedule: its path.
        x: one sample at time t.
        t: the time of x; its log-SNR must be finite.
        s: the time to stop at, s < t; its log-SNR must be finite.
        pair: DPM_SOLVER_12 (2 evaluations a step) or DPM_SOLVER_23 (3).
        rtol: the relative tolerance of a step.
        atol: the absolute tolerance of a step, in units of x.
        first_step: the first h, in nats of half log-SNR.
        safety: how much of the estimated best step to take, in (0, 1).
        max_steps: after how many tried steps to give up.

    Returns:
        `AdaptiveSolution(x, evaluations)`.

    Raises:
        ValueError: for concrete times that are not 0 <= s < t <= 1 or have no finite log-SNR, or concrete tolerances that
            are not positive.
        RuntimeError: if max_steps do not suffice.

    Reference: Lu et al. 2022 (DPM-Solver, arXiv 2206.00927), appendix C.

    >>> schedule = linear_vp()
    >>> denoise = gaussian(jnp.zeros(1), 0.25 * jnp.eye(1), schedule)
    >>> solution = dpm_solver_adaptive(denoise, schedule, jnp.array([1.0]), rtol=1e-3, atol=1e-3)
    >>> solution.x.round(2)
    Array([0.5], dtype=float32)
    """
    x, t, s = as_float(x, "x"), jnp.asarray(t, float), jnp.asarray(s, float)
    end = half_log_snr(schedule, s)
    _check_adaptive(schedule, t, s, rtol, atol, first_step)

    def unfinished(carry):
        return (carry[1] > s) & (carry[-1] < max_steps)

    def attempt(carry):
        x, t, before, h, tried = carry
        now = half_log_snr(schedule, t)
        last = h >= end - now
        target = jnp.where(last, s, half_log_snr_inverse(schedule, jnp.where(last, end, now + h)))
        (high, start), differences = _run_stages(denoise, schedule, eps_of, x, pair.stages(schedule, t, target))
        low = pair.lower(schedule, t, target, start, differences)
        scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low), jnp.abs(before)))
        error = jnp.sqrt(jnp.mean(((high - low) / scale) ** 2))
        taken = error <= 1
        h = safety * jnp.minimum(h, end - now) * jnp.maximum(error, 1e-6) ** (-1 / pair.order)
        x, before, t = jax.tree.map(lambda a, b: jnp.where(taken, a, b), (high, low, target), (x, before, t))
        return x, t, before, h, tried + 1

    carry = (x, t, x, jnp.asarray(first_step, end.dtype), jnp.zeros((), jnp.int32))
    x, t, _, _, tried = jax.lax.while_loop(unfinished, attempt, carry)
    x = equinox.error_if(x, t > s, f"the adaptive DPM-Solver did not reach its end within max_steps = {max_steps}")
    return AdaptiveSolution(x, pair.order * tried)


def _check_adaptive(schedule, t, s, rtol, atol, first_step):
    check_that(lambda t, s: (0 <= s) & (s < t) & (t <= 1), f"t, s: expected 0 <= s < t <= 1, got t={t}, s={s}", t, s)
    for name, time in (("t", t), ("s", s)):
        value = half_log_snr(schedule, time)
        check_that(jnp.isfinite, f"{name}: expected a time of finite log-SNR, got {name}={time} with {value}", value)
    for name, value in (("rtol", rtol), ("atol", atol), ("first_step", first_step)):
        check_that(lambda v: v > 0, f"{name}: expected a positive number, got {value}", value)


def _check_ratios(*ratios):
    for i, r in enumerate(ratios):
        check_number(r, f"r{i + 1}", 0, 1)
        check_that(lambda r: r > 0, f"r{i + 1}: expected a number in (0, 1], got {r}", r)
    if len(ratios) == 2:
        check_that(lambda a, b: a < b, f"r1, r2: expected r1 < r2, got r1={ratios[0]}, r2={ratios[1]}", *ratios)
