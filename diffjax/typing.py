"""The contracts: what a schedule, a network, a denoiser and a sampler are.

Each is an ordinary function or a pair of functions. Nothing needs to be subclassed or registered:
any function with the signature will do.
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
    "Scale",
    "Schedule",
    "State",
    "Time",
    "Times",
    "Weighting",
]

Time: TypeAlias = Float[Array, ""] | float
"""A scalar time in [0, 1]: 0 is data, 1 the prior."""

Schedule: TypeAlias = Callable[[Time], tuple[Array, Array]]
"""`schedule(t) -> (alpha, sigma)`, with `x_t = alpha x0 + sigma eps` (1.3)."""

Network: TypeAlias = Callable[..., Array]
"""`network(x, t, ...) -> out`: the raw output, of the shape of x, in any parametrization."""

Amplitude: TypeAlias = Callable[[Schedule, Time], Array]
"""`amplitude(schedule, t) -> a`: a reverse SDE adds noise `a dw`; `schedules.diffusion` is g."""

Weighting: TypeAlias = Callable[[Schedule, Any, Time], Array]
"""`weighting(schedule, parametrization, t) -> w`: the weight of the network's loss at time t."""

Coupling: TypeAlias = Callable[[Any, Array, Array], Array]
"""`coupling(key, x0, x1) -> x1`: the partner of each point of x0 among the points of x1."""

Probes: TypeAlias = Callable[[Any, Array], Array]
"""`probes(key, x) -> vs`, of shape (n, *x.shape): vectors for a trace estimate, E v v^T = I."""

Reconstruction: TypeAlias = Callable[[Any, Array, Array, Array], Array]
"""`reconstruction(key, x0, alpha, sigma) -> nats`: a reconstruction term of a variational bound."""

Times: TypeAlias = Callable[[PRNGKeyArray, int], tuple[Array, Array]]
"""`times(key, n) -> (ts, weights)`: the times of n examples, and the weights of their losses."""


class Estimate(NamedTuple):
    """What a denoiser returns: both posterior means given x_t = x, with `alpha x0 + sigma eps = x`.

    Both are kept, because eps does not follow from x0 where sigma = 0, nor x0 from eps where
    alpha = 0. A velocity is regular at both ends of the linear path, but computed from x0 alone it
    would be 0/0 at t = 0.
    """

    x0: Array
    """`E[x0 | x_t = x]`, of the shape of x."""
    eps: Array
    """`E[eps | x_t = x] = -sigma score`, of the shape of x."""


Denoiser: TypeAlias = Callable[[Array, Time], Estimate]
"""`denoise(x, t) -> Estimate(x0, eps)`, for one sample or a batch that shares the time."""

Scale: TypeAlias = float | Array | Callable[[Time], Array | float]
"""A guidance scale: a number, or a function of time."""


class State(NamedTuple):
    """What a sampler carries from step to step."""

    x: Array
    """The current sample, or batch of samples."""
    memory: Any = ()
    """A pytree of fixed structure: what a multistep method remembers."""


Kernel: TypeAlias = Callable[[Array, Time, Time], tuple[Array, Array]]
"""`kernel(x, t, s) -> (mean, std)`: a step from x at t to s < t draws from N(mean, std^2 I)."""


class Sampler(NamedTuple):
    """A sampling method: a pair of pure functions, like an optax optimizer."""

    init: Callable[[Array, Time], State]
    """`init(x, t) -> state` at the first time of the grid."""
    step: Callable[[PRNGKeyArray, State, Time, Time], State]
    """`step(key, state, t, s) -> state` from time t to the next time s < t."""
