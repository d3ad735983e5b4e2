"""diffrax for a path's equations: the probability flow in either direction, and the reverse SDE.

For dense output, statistics or events, pass `probability_flow(denoise, schedule)` or
`reverse_sde(denoise, schedule)` to `diffrax.diffeqsolve` yourself. The functions here do no more
than that.
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
    stepsize_controller: diffrax.AbstractStepSizeController = diffrax.PIDController(
        rtol=1e-5, atol=1e-5
    ),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    dt0: float | Array | None = None,
    max_steps: int = 4096,
    with_steps: bool = False,
) -> Any:
    """Solves from y at time t to time s by `diffrax.diffeqsolve`, in either direction.

    Args:
        terms: a vector field `(t, y, args) -> dy/dt`, or diffrax's terms.
        y: the state at time t, a pytree of arrays.
        t: the time of y, a scalar.
        s: the time to stop at.
        solver: any diffrax solver that fits the terms.
        stepsize_controller: any diffrax controller.
        adjoint: how to differentiate through the solve, e.g. `diffrax.BacksolveAdjoint()` or
            `diffrax.DirectAdjoint()`.
        dt0: the first step, with the sign of s - t; None lets an adaptive controller choose it.
        max_steps: the maximum number of steps, accepted or rejected.
        with_steps: whether to return the number of steps as well.

    Returns:
        y at time s or, if with_steps, the pair of y and the number of steps, accepted or rejected.

    Raises:
        ValueError: if the velocity is not finite on the way; this is not checked under jit.
        RuntimeError: if max_steps is too small. Within `shard_map`, where jax cannot raise, y is
            NaN instead.
        TypeError: within `shard_map` without check_vma=False, because diffrax's loops start from
            constants.

    Reference: Kidger 2022 (arXiv 2202.02435), chapter 5.

    >>> float(integrate(lambda t, y, args: -y, jnp.array(1.0), 0.0, 1.0))  # exp(-1)
    0.3678...
    """
    terms = terms if isinstance(terms, diffrax.AbstractTerm) else diffrax.ODETerm(bind(terms))
    start, end = jnp.asarray(t, float), jnp.asarray(s, float)
    try:
        y, last, steps, result = _integrate(
            terms, y, start, end, solver, stepsize_controller, adjoint, dt0, max_steps
        )
    except Exception as error:  # TypeError, ValueError or ShardingTypeError, by the version of jax
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.manual_axes or mesh.explicit_axes:
            error.add_note(
                "diffrax's loops start from constants: give `jax.shard_map` check_vma=False, "
                "and map over axes of a mesh with axis_types=(jax.sharding.AxisType.Auto, ...) "
                "(https://github.com/patrick-kidger/diffrax/issues/735)"
            )
        raise
    failed = result != diffrax.RESULTS.successful
    message = (
        f"max_steps: expected enough steps to go from t to s, got {max_steps}. "
        "If the velocity is finite on the way, give more steps, or larger tolerances"
    )
    if not is_concrete(failed, terms, y):
        y = error_if(y, failed, message)
    elif failed:
        _check_field(terms, y, last, end)
        raise RuntimeError(message)
    return (y, steps) if with_steps else y


@once
def _integrate(terms, y, start, end, solver, stepsize_controller, adjoint, dt0, max_steps):
    """The last y, its time, the number of steps, and diffrax's result code."""
    # diffrax compiles a function once, even if what the function reads has changed. A new function
    # is compiled anew.
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
    """Raises ValueError if dy/dt at the last y is not finite at a time from the last to the end."""
    for t in last + (end - last) * jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-6, 1.0, 13)]):
        slope = jax.tree.leaves(terms.vf(t, y, None))
        if not all(jnp.all(jnp.isfinite(leaf)) for leaf in slope if isinstance(leaf, jax.Array)):
            raise ValueError(
                f"velocity: expected finite values, got others at t={t} after reaching t={last}. "
                "If alpha or sigma is 0 there, keep away from that end, as from 0.999 to 1e-3. "
                "Otherwise look at what the network returns there"
            )


def solve_flow(
    denoise: Denoiser,
    schedule: Schedule,
    x: Float[ArrayLike, "*x"],
    t: Time,
    s: Time,
    **options: Any,
) -> Float[Array, "*x"]:
    """Solves the probability-flow ODE adaptively: s < t generates, s > t encodes data (1.18).

    Args:
        denoise: the denoiser.
        schedule: its path.
        x: the state at time t: one sample, or a batch that shares its step sizes (with vmap, each
            sample has its own).
        t: the time of x, a scalar in [0, 1].
        s: the time to stop at. If the velocity is infinite at an end of the path (t = 0 of a VP
            path with a network), keep away from it.
        **options: solver, stepsize_controller, adjoint, dt0, max_steps of `integrate`.

    Returns:
        x at time s.

    Raises:
        ValueError: for concrete times outside [0, 1].
        RuntimeError: if max_steps is too small.

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
    """Solves the reverse SDE of any noise amplitude from time t to s < t by diffrax (1.19), (1.20).

    It is solved in tau = 1 - t, in which diffrax runs forward.

    Args:
        key: a PRNG key, for the Brownian path.
        denoise: the denoiser.
        schedule: its path.
        x: the state at time t: one sample, or a batch that shares its step sizes, with independent
            noise.
        t: the time of x, in (0, 1].
        s: the time to stop at, in [0, t).
        amplitude: `(schedule, t) -> a`, finite from s to t; `diffusion` is g, Anderson's SDE.
        solver: any diffrax SDE solver for additive noise, e.g. `ShARK()`, `SRA1()`, `Euler()`.
        stepsize_controller: any diffrax controller.
        dt0: the (first) step in tau, positive.
        **options: adjoint, max_steps of `integrate`.

    Returns:
        x at time s.

    Raises:
        ValueError: for concrete times outside [0, 1], s >= t, or an amplitude that is not finite at
            t.
        RuntimeError: if max_steps is too small.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 6; Foster et al. 2023 (arXiv 2210.11160) for
    ShARK; (1.19), (1.20).

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
    return integrate(
        terms,
        x,
        tau0,
        tau1,
        solver=solver,
        stepsize_controller=stepsize_controller,
        dt0=dt0,
        **options,
    )


def _check_span(t, s):
    for name, time in (("t", t), ("s", s)):
        check_that(
            lambda v: (v >= 0) & (v <= 1), f"{name}: expected a time in [0, 1], got {{}}", time
        )
