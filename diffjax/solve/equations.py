"""diffrax for the equations of a path: the probability flow in either direction, and the reverse SDE.

For dense output, statistics or events, give `probability_flow(denoise, schedule)` or `reverse_sde(denoise, schedule)` to
`diffrax.diffeqsolve` yourself: the functions here do no more than that.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._bind import bind
from .._checks import as_float, check_that, is_concrete
from .._once import once
from .._varying import error_if
from ..dynamics import noise_amplitude, probability_flow, reverse_sde
from ..schedules import diffusion
from ..typing import Amplitude, Denoiser, Schedule, Time

__all__ = ["integrate", "solve_flow", "solve_sde"]


def integrate(
    terms: diffrax.AbstractTerm | Callable[..., Any],
    y: Any,
    t: Time,
    s: Time,
    *,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    stepsize_controller: diffrax.AbstractStepSizeController = diffrax.PIDController(rtol=1e-5, atol=1e-5),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    dt0: float | Array | None = None,
    max_steps: int = 4096,
    with_steps: bool = False,
) -> Any:
    """`diffrax.diffeqsolve` from y at time t to time s, in either direction; returns the last y.

    Args:
        terms: a vector field `(t, y, args) -> dy/dt`, or diffrax's terms.
        y: the state at time t, a pytree of arrays.
        t: the time of y, a scalar.
        s: the time to go to.
        solver: any diffrax solver that fits the terms.
        stepsize_controller: any diffrax controller.
        adjoint: how to differentiate through the solve, e.g. `diffrax.BacksolveAdjoint()`, `diffrax.DirectAdjoint()`.
        dt0: the first step, signed as s - t; None lets an adaptive controller choose it.
        max_steps: after how many steps to give up.
        with_steps: whether to return the number of steps, too.

    Returns:
        y at time s; with_steps, a pair of it and the number of steps that were tried.

    Raises:
        ValueError: if the velocity is not finite on the way, where that can be seen: not under jit.
        RuntimeError: if max_steps do not suffice. Within `shard_map`, where jax cannot raise, y is NaN instead.
        TypeError: within `shard_map`, unless that has check_vma=False: diffrax's loops start from constants.

    Reference: Kidger 2022 (arXiv 2202.02435), chapter 5.

    >>> float(integrate(lambda t, y, args: -y, jnp.array(1.0), 0.0, 1.0))  # exp(-1)
    0.3678...
    """
    terms = terms if isinstance(terms, diffrax.AbstractTerm) else diffrax.ODETerm(bind(terms))
    start, end = jnp.asarray(t, float), jnp.asarray(s, float)
    try:
        y, last, steps, result = _integrate(terms, y, start, end, solver, stepsize_controller, adjoint, dt0, max_steps)
    except (TypeError, ValueError) as error:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.manual_axes or mesh.explicit_axes:
            error.add_note(
                "diffrax's loops start from constants: give `jax.shard_map` check_vma=False, and map over axes of a mesh "
                "with axis_types=(jax.sharding.AxisType.Auto, ...) (https://github.com/patrick-kidger/diffrax/issues/735)"
            )
        raise
    failed = result != diffrax.RESULTS.successful
    message = (
        f"max_steps: expected enough steps to go from t to s, got {max_steps}. Is the velocity finite on the way? "
        "Then give more steps, or wider tolerances"
    )
    if not is_concrete(failed, terms, y):
        y = error_if(y, failed, message)
    elif failed:
        _check_field(terms, y, last, end)
        raise RuntimeError(message)
    return (y, steps) if with_steps else y


@once
def _integrate(terms, y, start, end, solver, stepsize_controller, adjoint, dt0, max_steps):
    """The last y, its time, the number of steps, and diffrax's verdict."""
    # diffrax compiles a function once, whatever it reads later; a new one is compiled anew.
    terms = jax.tree.map(
        lambda leaf: bind(lambda f, *args: f(*args), leaf) if callable(leaf) else leaf,
        terms,
        is_leaf=lambda leaf: isinstance(leaf, Partial),
    )
    solution = diffrax.diffeqsolve(
        terms,
        solver,
        start,
        end,
        dt0,
        y,
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=False,
    )
    y, last = jax.tree.map(lambda a: a[-1], (solution.ys, solution.ts))
    return y, last, solution.stats["num_steps"], solution.result


def _check_field(terms, y, last, end):
    """Raises ValueError if dy/dt is not finite at the y that was reached, now or later on the way to the end."""
    for t in last + (end - last) * jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-6, 1.0, 13)]):
        slope = jax.tree.leaves(terms.vf(t, y, None))
        if not all(jnp.all(jnp.isfinite(leaf)) for leaf in slope if isinstance(leaf, jax.Array)):
            raise ValueError(
                f"velocity: expected finite values, got others at t={t}, having reached t={last}. Is alpha or sigma 0 "
                "there? Then stay off that end, as from 0.999 to 1e-3. Else see what the network returns there"
            )


def solve_flow(
    denoise: Denoiser, schedule: Schedule, x: Float[ArrayLike, "*x"], t: Time, s: Time, **options: Any
) -> Float[Array, "*x"]:
    """The probability-flow ODE from time t to time s, adaptively: s < t generates, s > t encodes data (1.18).

    Args:
        denoise: the denoiser.
        schedule: its path.
        x: the state at time t: one sample, or a batch, which then shares its step sizes (vmap for steps of their own).
        t: the time of x, a scalar in [0, 1].
        s: the time to go to. Where the velocity is infinite at an end (VP paths at t = 0 with a network) stay off it.
        **options: solver, stepsize_controller, adjoint, dt0, max_steps of `integrate`.

    Returns:
        x at time s.

    Raises:
        ValueError: for concrete times outside [0, 1].
        RuntimeError: if max_steps do not suffice.

    Reference: Song et al. 2021 (arXiv 2011.13456), section 4.3 and appendix D.2; (1.18).

    >>> denoise = gaussian(jnp.zeros(1), 4 * jnp.eye(1), linear())
    >>> x0 = solve_flow(denoise, linear(), jnp.array([0.5]), 1.0, 0.0)  # N(0, 1) -> N(0, 4)
    >>> x1 = solve_flow(denoise, linear(), x0, 0.0, 1.0)
    >>> x0.round(3), x1.round(3)
    (Array([1.], dtype=float32), Array([0.5], dtype=float32))
    """
    _check_span(t, s)
    return integrate(probability_flow(denoise, schedule), as_float(x, "x"), t, s, **options)


def solve_sde(
    key: PRNGKeyArray,
    denoise: Denoiser,
    schedule: Schedule,
    x: Float[ArrayLike, "*x"],
    t: Time,
    s: Time,
    *,
    amplitude: Amplitude = diffusion,
    solver: diffrax.AbstractSolver = diffrax.ShARK(),
    stepsize_controller: diffrax.AbstractStepSizeController = diffrax.ConstantStepSize(),
    dt0: float | Array | None = 1e-2,
    **options: Any,
) -> Float[Array, "*x"]:
    """The reverse SDE of any noise amplitude from time t to an earlier time s, by a diffrax solver (1.19), (1.20).

    Integrated in tau = 1 - t, in which diffrax runs forward.

    Args:
        key: a PRNG key, of the Brownian path.
        denoise: the denoiser.
        schedule: its path.
        x: the state at time t: one sample, or a batch that shares its step sizes (its noise is independent).
        t: the time of x, in (0, 1].
        s: the time to stop at, in [0, t).
        amplitude: `(schedule, t) -> a`; `diffusion` is g, Anderson's SDE. It must be finite on [s, t].
        solver: any diffrax SDE solver for additive noise, e.g. `ShARK()`, `SRA1()`, `Euler()`.
        stepsize_controller: any diffrax controller.
        dt0: the (first) step in tau, positive.
        **options: adjoint, max_steps of `integrate`.

    Returns:
        x at time s.

    Raises:
        ValueError: for concrete times outside [0, 1], or s >= t, or of an amplitude that is not finite at t.
        RuntimeError: if max_steps do not suffice.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 6; Foster et al. 2023 (arXiv 2210.11160) for ShARK.

    >>> denoise = gaussian(jnp.zeros(1), 4 * jnp.eye(1), linear_vp())
    >>> x0 = solve_sde(jax.random.key(0), denoise, linear_vp(), jnp.zeros((1000, 1)), 1.0, 1e-3)
    >>> 1.9 < float(x0.std()) < 2.1
    True
    """
    _check_span(t, s)
    check_that(lambda t, s: s < t, "s: expected a time before t={}, got s={}", t, s)
    noise_amplitude(amplitude, schedule, t)  # raises where it is infinite
    x = as_float(x, "x")
    tau0, tau1 = 1 - jnp.asarray(t, float), 1 - jnp.asarray(s, float)
    noise = diffrax.VirtualBrownianTree(
        tau0, tau1, 1e-4, jax.eval_shape(lambda: x), key, levy_area=diffrax.SpaceTimeLevyArea
    )
    sde = reverse_sde(denoise, schedule, amplitude)
    terms = diffrax.MultiTerm(diffrax.ODETerm(sde.drift), diffrax.ControlTerm(sde.diffusion, noise))
    return integrate(terms, x, tau0, tau1, solver=solver, stepsize_controller=stepsize_controller, dt0=dt0, **options)


def _check_span(t, s):
    for name, time in (("t", t), ("s", s)):
        check_that(lambda v: (v >= 0) & (v <= 1), f"{name}: expected a time in [0, 1], got {{}}", time)
