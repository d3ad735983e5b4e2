"""The contracts: what a schedule, a network, a denoiser and a sampler are.

Every one of them is an ordinary function, or a pair of functions. Nothing needs to be subclassed or registered:
whatever has the signature is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Float, PRNGKeyArray

__all__ = [
    "Amplitude",
    "Coupling",
    "Denoiser",
    "Estimate",
    "Kernel",
    "Network",
    "Probes",
    "Reconstruction",
    "Sampler",
    "Schedule",
    "State",
    "Time",
    "Times",
    "Weighting",
]

Time: TypeAlias = Float[Array, ""] | float
"""A scalar time in [0, 1]: 0 is data, 1 the prior."""

Schedule: TypeAlias = Callable[[Time], tuple[Array, Array]]
"""`schedule(t) -> (alpha, sigma)` with `x_t = alpha x0 + sigma eps`; t = 0 is data, t = 1 the prior (1.3)."""

Network: TypeAlias = Callable[..., Array]
"""`network(x, t, ...) -> out`: the raw output, of the shape of x, in any parametrization."""

Amplitude: TypeAlias = Callable[[Schedule, Time], Array]
"""`amplitude(schedule, t) -> a`: how much noise a reverse SDE adds, `a dw`; `schedules.diffusion` is g."""

Weighting: TypeAlias = Callable[[Schedule, Any, Time], Array]
"""`weighting(schedule, parametrization, t) -> w`: the weight of the loss of a network with that parametrization."""

Coupling: TypeAlias = Callable[[Any, Array, Array], Array]
"""`coupling(key, x0, x1) -> x1`: the n points of x1 in the order in which they are the partners of those of x0."""

Probes: TypeAlias = Callable[[Any, Array], Array]
"""`probes(key, x) -> vs`, of shape (n, *x.shape): the vectors of a trace estimate, with E v v^T = I."""

Reconstruction: TypeAlias = Callable[[Any, Array, Array, Array], Array]
"""`reconstruction(key, x0, alpha, sigma) -> nats`: the reconstruction term of a variational bound."""

Times: TypeAlias = Callable[[PRNGKeyArray, int], tuple[Array, Array]]
"""`times(key, n) -> (ts, weights)`: the times of a batch of n examples, and the weights of their losses."""


class Estimate(NamedTuple):
    """What a denoiser knows of x at time t: both posterior means, with `alpha x0 + sigma eps = x`.

    Two, because each alone loses the other where its coefficient vanishes: a velocity is regular at both ends of the
    linear path, but through x0 alone it would become 0/0 at t = 0.
    """

    x0: Array
    """`E[x0 | x_t = x]`, of the shape of x."""
    eps: Array
    """`E[eps | x_t = x] = -sigma score`, of the shape of x."""


Denoiser: TypeAlias = Callable[[Array, Time], Estimate]
"""`denoise(x, t) -> Estimate(x0, eps)`, for one sample or a batch that shares the time."""


class State(NamedTuple):
    """What a sampler carries from step to step."""

    x: Array
    """The current sample, or batch of samples."""
    memory: Any = ()
    """A pytree of fixed structure: what a multistep method remembers."""


Kernel: TypeAlias = Callable[[Array, Time, Time], tuple[Array, Array]]
"""`kernel(x, t, s) -> (mean, std)`: a step from x at time t to time s < t draws from N(mean, std^2 I)."""


class Sampler(NamedTuple):
    """A sampling method: a pair of pure functions, like an optax optimizer."""

    init: Callable[[Array, Time], State]
    """`init(x, t) -> state` at the first time of the grid."""
    step: Callable[[PRNGKeyArray, State, Time, Time], State]
    """`step(key, state, t, s) -> state` from time t to the next time s < t."""
