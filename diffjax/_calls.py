"""Calls of the user's denoisers and networks, with a check of what they return."""

import jax.numpy as jnp

from .typing import Estimate


def call_denoiser(denoise, x, t, name: str = "denoise") -> Estimate:
    """`denoise(x, t)`, which must be an `Estimate` of two arrays of the shape of x."""
    if not callable(denoise):
        raise ValueError(
            f"{name}: expected a denoiser, (x, t) -> Estimate, got an instance of "
            f"{type(denoise).__name__}. A Sampler is no denoiser: give it to diffjax.sample"
        )
    out, shape = denoise(x, t), jnp.shape(x)
    if not (isinstance(out, Estimate) and all(_is_array(a) and jnp.shape(a) == shape for a in out)):
        raise ValueError(
            f"{name}: expected a denoiser, which returns an Estimate(x0, eps) of two arrays of "
            f"shape {shape}, got {_described(out)}. "
            "as_denoiser(network, schedule, parametrization) makes a denoiser of a network"
        )
    return out


def call_network(network, x, t, name: str = "network"):
    """`network(x, t)`, which must be an array of the shape of x."""
    out, shape = network(x, t), jnp.shape(x)
    if not _is_array(out):
        raise ValueError(
            f"{name}: expected it to return an array of shape {shape}, got {_described(out)}; "
            "give a function that returns the array alone, such as lambda x, t: network(x, t)[0]"
        )
    if jnp.shape(out) != shape:
        raise ValueError(
            f"{name}: it returned {jnp.shape(out)} for x of shape {shape}; expected the same shape"
        )
    return out


def reuse(name: str, estimate, x, at, t) -> Estimate:
    """A denoiser that knows its estimate at x, and is asked nowhere else."""
    if at is not x:
        raise ValueError(
            f"{name}: expected a method that evaluates the denoiser once a step, at its own x and "
            "t, got one that evaluates it elsewhere. Choose another, such as ddpm_kernel, or ddim "
            "for a sampler"
        )
    return estimate


def _is_array(value) -> bool:
    return hasattr(value, "shape") or isinstance(value, float | int)


def _described(value) -> str:
    if _is_array(value):
        return f"an array of shape {jnp.shape(value)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    return type(value).__name__
