"""Classifier-free guidance, of one or several conditions, and guidance in an interval of time."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bind import bind
from .._calls import call_denoiser
from .._checks import as_scalar, broadcasts_to, check_that, described
from .._once import once
from .._varying import vary_alike
from ..schedules import half_log_snr
from ..typing import Denoiser, Estimate, Scale, Schedule
from ._together import together

__all__ = ["cfg", "composed", "interval"]


def cfg(conditional: Denoiser, unconditional: Denoiser, scale: Scale) -> Denoiser:
    """Classifier-free guidance: `unconditional + scale (conditional - unconditional)` (1.42).

    Two denoisers that differ only in what is bound as `cond` are evaluated in one call of the
    network, by `vmap` over the two conditions: `as_denoiser(bind(network, cond=c), ...)` for two
    conditions c. With a strong and a weak network in their places it is autoguidance.

    The result is not the denoiser of the density that is proportional to `p(x) p(c | x)^scale`, and
    the probability flow and the reverse SDE end in two different laws. docs/guidance.md has both in
    closed form; `samplers.tilted_cfg` reaches that density.

    Args:
        conditional: the denoiser given the condition.
        unconditional: the denoiser given no condition (or, for a negative prompt, the condition to
            move away from).
        scale: 0 is unconditional, 1 conditional, above 1 guided. (Where a paper writes
            `(1 + w) c - w u`, it is 1 + w.) A scalar, or a function of time that returns one; vmap
            for many. For one scale per sample of a batch, give it as many axes as x has, such as
            (n, 1, 1, 1).

    Returns:
        The guided denoiser.

    Raises:
        ValueError: when the denoiser is called, if the scale is no scalar and does not fit x.

    Reference: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6; (1.39), (1.41). Karras et al. 2024
    (arXiv 2406.02507) for autoguidance.

    >>> import jax.numpy as jnp
    >>> towards = lambda mean: gaussian(jnp.array([mean]), 0.1 * jnp.eye(1), linear())
    >>> guided = cfg(towards(1.0), towards(0.0), 2.0)
    >>> guided(jnp.zeros(1), 1.0).x0
    Array([2.], dtype=float32)
    """
    return bind(_composed, together(conditional, unconditional), (scale,))


def composed(
    conditionals: Sequence[Denoiser], unconditional: Denoiser, scales: Sequence[Scale]
) -> Denoiser:
    """Guidance by several conditions, `u + sum_i scale_i (c_i - u)` with u the unconditional one.

    With one condition it is `cfg`. For conditions that are independent given x, and scales 1, the
    sum is the score of all conditions where x is clean, but not where it is noisy.

    Args:
        conditionals: the denoisers given each condition.
        unconditional: the denoiser given no condition.
        scales: one scale for each condition, each as for `cfg`; a negative one moves away.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if there are not as many scales as conditions, at least one; see also `cfg`.

    Reference: Liu et al. 2022 (Composable Diffusion, arXiv 2206.01714).

    >>> import jax.numpy as jnp
    >>> towards = lambda mean: gaussian(jnp.array(mean), 0.1 * jnp.eye(2), linear())
    >>> conditionals = [towards([1.0, 0.0]), towards([0.0, 1.0])]
    >>> guided = composed(conditionals, towards([0.0, 0.0]), [2.0, 3.0])
    >>> guided(jnp.zeros(2), 1.0).x0
    Array([2., 3.], dtype=float32)
    """
    for name, value in (("conditionals", conditionals), ("scales", scales)):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: expected a list, got {described(value)}")
    if not 0 < len(conditionals) == len(scales):
        raise ValueError(
            "scales: expected one for each of the conditionals, at least one, got "
            f"{len(scales)} for {len(conditionals)}"
        )
    return bind(_composed, together(*conditionals, unconditional), tuple(scales))


def _composed(denoisers, scales, x, t) -> Estimate:
    scales = [scale_at(scale, x, t) for scale in scales]
    *conditionals, unconditional = denoisers(x, t)
    return jax.tree.map(
        lambda u, *cs: u + sum(scale * (c - u) for scale, c in zip(scales, cs, strict=True)),
        unconditional,
        *conditionals,
    )


def scale_at(scale: Any, x, t):
    """The scale at time t, which must be a scalar or fit x."""
    scale = scale(t) if callable(scale) else scale
    shape = jnp.shape(scale)
    each = len(shape) == x.ndim > 1 and shape[-1] == 1 and broadcasts_to(shape, x.shape)
    fits = shape == () or each
    if not fits:
        raise ValueError(
            "scale: expected a scalar, or one scale per sample with as many axes as x of shape "
            f"{x.shape}, got shape {shape}; to try many scales, vmap over them"
        )
    return scale


def interval(
    guided: Denoiser,
    otherwise: Denoiser,
    schedule: Schedule,
    low: float | Array,
    high: float | Array,
) -> Denoiser:
    """A denoiser in an interval of noise levels, and another one outside.

    It is `guided` where `low < log(alpha / sigma) <= high` (from pure noise on, if low is -inf),
    and `otherwise` elsewhere. Only one of the two is evaluated (under `vmap` over the time, both
    are).

    Args:
        guided: the denoiser inside, such as `cfg(...)`.
        otherwise: the denoiser outside, such as the conditional one.
        schedule: their path.
        low: the half log-SNR where guidance begins; sampling goes from low to high. In Karras'
            sigma it is `-log(sigma_high)`.
        high: the half log-SNR where it ends.

    Returns:
        The denoiser.

    Raises:
        ValueError: unless concrete bounds satisfy low < high; when it is called, if one is not a
            scalar.

    Reference: Kynkäänniemi et al. 2024 (arXiv 2404.07724).

    >>> import jax.numpy as jnp
    >>> towards = lambda mean: gaussian(jnp.array([mean]), 0.1 * jnp.eye(1), linear())
    >>> denoise = interval(towards(1.0), towards(0.0), linear(), -2.0, 2.0)
    >>> [float(denoise(jnp.zeros(1), t).x0[0]) for t in (0.999, 0.5, 0.001)]
    [0.0, 0.909..., 0.0]
    """
    message = "low, high: expected low < high, got low={}, high={}"
    check_that(lambda low, high: low < high, message, low, high)
    return bind(_interval, guided, otherwise, schedule, low, high)


@once
def _interval(guided, otherwise, schedule, low, high, x, t) -> Estimate:
    level = half_log_snr(schedule, t)
    low, high = as_scalar(low, "low"), as_scalar(high, "high")
    inside = ((low < level) | (low == -jnp.inf)) & (level <= high)
    # what varies over a mesh must do so before the branches
    guided, otherwise, x, t = vary_alike(guided, otherwise, x, t)
    return jax.lax.cond(
        inside,
        lambda: call_denoiser(guided, x, t, "guided"),
        lambda: call_denoiser(otherwise, x, t, "otherwise"),
    )
