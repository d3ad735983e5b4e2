"""The engine of the singlestep methods: a scan over the evaluations of a step.

The evaluations differ only in numbers, so a compiled sampler holds the network once. Every stage
goes from the beginning of its step, where the estimate (x0, eps) and the prediction p are known, to
a later time:

    x = alpha x0 + sigma eps + w (p_now - p).

The first stage has w = 0: it is DDIM.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._calls import call_denoiser
from .._once import once
from .._varying import varying_scan, zeros_of
from ..typing import Estimate
from ._interpolation import Place
from .kernels import towards


class Stages(NamedTuple):
    """The evaluations of a step: the time of each, where it leads, and its weight w."""

    times: Float[Array, " n"]
    targets: Place
    weights: Float[Array, " n"]


@once
def run_stages(denoise, predict, x, stages, first=None):
    """Runs the stages of one or more steps; `first` marks the stages that begin a step.

    Returns `((x, start), differences)`: x after the last stage, the estimate at the beginning of
    its step, and the difference of each prediction from that at the beginning of its step.
    """
    if first is None:
        first = jnp.arange(stages.times.size) == 0

    def body(carry, inputs):
        x, start = carry
        first, time, target, weight = inputs
        estimate = call_denoiser(denoise, x, time)
        start = jax.tree.map(lambda new, old: jnp.where(first, new, old), estimate, start)
        difference = predict(estimate) - predict(start)
        return (towards(start, target.alpha, target.sigma) + weight * difference, start), difference

    return varying_scan(body, (x, Estimate(zeros_of(x), zeros_of(x))), (first, *stages))
