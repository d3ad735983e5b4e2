"""Guidance that no denoiser can express, because it breaks `alpha x0 + sigma eps = x` or needs
memory.
"""

from collections.abc import Callable

from jaxtyping import Array

from .._bind import bind
from .._calls import reuse
from .._varying import zeros_of
from ..guidance._moves import event_of
from ..guidance._together import together
from ..guidance.classifier_free import scale_at
from ..guidance.projected import project
from ..typing import Denoiser, Estimate, Sampler, Scale, Schedule, State
from .ddim import ddim

__all__ = ["cfg_plus_plus", "projected_with_momentum"]


def cfg_plus_plus(
    conditional: Denoiser,
    unconditional: Denoiser,
    schedule: Schedule,
    scale: Scale = 0.6,
    eta: float | Array | None = None,
) -> Sampler:
    """CFG++: DDIM from the guided data and the unconditional noise.

    `x_s = alpha_s (u.x0 + scale (c.x0 - u.x0)) + sigma_s u.eps`. A step is that of DDIM with `cfg`
    of scale `scale / (1 - e^-h)`, where h is the step in half log-SNR. So it has no limit as the
    steps get shorter, and the number of steps is part of the method.

    It is a sampler and not a denoiser, because its estimates do not add up to x. Other samplers
    would use one of them only.

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition.
        schedule: the path.
        scale: from 0, unconditional, to 1; a scalar, or as for `guidance.cfg`.
        eta: the stochasticity, as for `ddim`.

    Returns:
        The sampler.

    Raises:
        ValueError: for a concrete eta outside [0, 1]; at the first step, if the scale does not fit
            x.

    Reference: Chung et al. 2024 (CFG++, arXiv 2406.08070).

    >>> towards = lambda mean: gaussian(jnp.array([mean]), jnp.zeros((1, 1)), linear())
    >>> sampler = cfg_plus_plus(towards(1.0), towards(0.0), linear(), 0.6)
    >>> sampler.step(None, sampler.init(jnp.array([1.0]), 1.0), 1.0, 0.0).x
    Array([0.6], dtype=float32)
    """
    return ddim(bind(_cfg_plus_plus, together(conditional, unconditional), scale), schedule, eta)


def _cfg_plus_plus(pair, scale, x, t) -> Estimate:
    c, u = pair(x, t)
    return Estimate(u.x0 + scale_at(scale, x, t) * (c.x0 - u.x0), u.eps)


def projected_with_momentum(
    method: Callable[[Denoiser, Schedule], Sampler],
    conditional: Denoiser,
    unconditional: Denoiser,
    schedule: Schedule,
    scale: Scale,
    eta: float | Array = 0.0,
    norm: float | Array = float("inf"),
    beta: float | Array = -0.5,
    *,
    event_ndim: int,
) -> Sampler:
    """A sampler under adaptive projected guidance with its momentum.

    `guidance.projected` along `d_n = c - u + beta d_(n-1)`, which remembers the steps before. A
    negative beta damps what all steps have in common.

    Args:
        method: makes the sampler, such as `ddim`, `dpm_solver_2m` or `bind(ddim, eta=1.0)`. It must
            evaluate the denoiser once a step, at its beginning.
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition.
        schedule: the path.
        scale: as for `guidance.projected`, likewise eta, norm and event_ndim.
        eta: the share of the parallel part.
        norm: the greatest length of d.
        beta: the momentum, 0 for none; -0.5 in the paper.
        event_ndim: the number of axes of one sample, such as 3 for (h, w, c).

    Returns:
        The sampler.

    Raises:
        ValueError: if event_ndim is not a number of axes; at the first step, if the method
            evaluates the denoiser elsewhere, as `heun` does.

    Reference: Sadat et al. 2024 (APG, arXiv 2410.02416).

    >>> towards = lambda mean: gaussian(jnp.array(mean), 0.1 * jnp.eye(2), linear())
    >>> pair = towards([2.0, 0.0]), towards([0.0, 1.0])
    >>> sampler = projected_with_momentum(ddim, *pair, linear(), 3.0, event_ndim=1)
    >>> sampler.step(None, sampler.init(jnp.zeros(2), 1.0), 1.0, 0.0).x
    Array([ 2., -2.], dtype=float32)
    """
    numbers = scale, eta, norm, beta, event_of(event_ndim)
    return Sampler(
        bind(_momentum_init, method, schedule),
        bind(_momentum_step, method, together(conditional, unconditional), schedule, numbers),
    )


def _unevaluated(x, t):
    raise ValueError("method: expected a sampler that evaluates the denoiser in its steps only")


def _momentum_init(method, schedule, x, t):
    state = method(bind(_unevaluated), schedule).init(x, t)
    return State(state.x, (state.memory, zeros_of(x)))


def _momentum_step(method, pair, schedule, numbers, key, state, t, s):
    scale, eta, norm, beta, event = numbers
    memory, d = state.memory
    c, u = pair(state.x, t)
    d = (c.x0 - u.x0 + beta * d).astype(d.dtype)
    estimate = project(c, d, schedule, scale_at(scale, state.x, t), eta, norm, event, t)
    sampler = method(bind(reuse, "method", estimate, state.x), schedule)
    x, memory = sampler.step(key, State(state.x, memory), t, s)
    return State(x, (memory, d))
