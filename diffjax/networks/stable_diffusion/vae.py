"""Stable Diffusion's autoencoder between images and latents."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

from ..._checks import as_float, check_that
from .._layers import check_settings
from ._blocks import (
    BEHIND,
    Downsample,
    Level,
    ResnetBlock,
    SpatialAttention,
    Upsample,
    conv,
    group_norm,
    over_images,
)

__all__ = ["AutoencoderKL"]

_EPSILON = 1e-6


def _resnets(inputs: int, width: int, n: int, groups: int, rngs: nnx.Rngs) -> list[ResnetBlock]:
    sizes = (inputs, *(width,) * (n - 1))
    return [ResnetBlock(size, width, groups, _EPSILON, rngs=rngs) for size in sizes]


def _middle(width: int, groups: int, rngs: nnx.Rngs) -> Level:
    attention = SpatialAttention(width, groups, _EPSILON, rngs=rngs)
    return Level(_resnets(width, width, 2, groups, rngs), [attention])


def _through(level: Level, h: Array) -> Array:
    for resnet in level.resnets:
        h = resnet(h)
    for layer in (*level.downsamplers, *level.upsamplers):
        h = layer(h)
    return h


def _through_middle(level: Level, h: Array) -> Array:
    first, last = level.resnets
    return last(level.attentions[0](first(h)))


class Encoder(nnx.Module):
    """Images to the mean and the log variance of latents."""

    def __init__(self, channels, latents, widths, blocks, groups, *, rngs: nnx.Rngs):
        self.conv_in = conv(channels, widths[0], rngs=rngs)
        levels = []
        for i, width in enumerate(widths):
            down = [Downsample(width, BEHIND, rngs=rngs)] if i < len(widths) - 1 else ()
            resnets = _resnets(widths[max(i - 1, 0)], width, blocks, groups, rngs)
            levels.append(Level(resnets, down=down))
        self.down_blocks = nnx.List(levels)
        self.mid_block = _middle(widths[-1], groups, rngs)
        self.conv_norm_out = group_norm(widths[-1], groups, _EPSILON, rngs=rngs)
        self.conv_out = conv(widths[-1], 2 * latents, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, s h, s w, channels) -> (n, h, w, 2 * latents)."""
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = _through(level, h)
        h = _through_middle(self.mid_block, h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class Decoder(nnx.Module):
    """Latents to images."""

    def __init__(self, channels, latents, widths, blocks, groups, *, rngs: nnx.Rngs):
        self.conv_in = conv(latents, widths[-1], rngs=rngs)
        self.mid_block = _middle(widths[-1], groups, rngs)
        levels, below = [], widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            up = [Upsample(width, rngs=rngs)] if i > 0 else ()
            levels.append(Level(_resnets(below, width, blocks + 1, groups, rngs), up=up))
            below = width
        self.up_blocks = nnx.List(levels)
        self.conv_norm_out = group_norm(widths[0], groups, _EPSILON, rngs=rngs)
        self.conv_out = conv(widths[0], channels, rngs=rngs)

    def __call__(self, z: Array) -> Array:
        """(n, h, w, latents) -> (n, s h, s w, channels)."""
        h = _through_middle(self.mid_block, self.conv_in(z))
        for level in self.up_blocks:
            h = _through(level, h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class AutoencoderKL(nnx.Module):
    """Stable Diffusion's autoencoder, in the layout of its published weights.

    Latents are scaled to about unit variance: `z = scaling (mean + std eps)`, with the mean and the
    standard deviation that the encoder gives. It has two functions and no call of its own.

    Args:
        channels: of the images.
        latents: channels of the latents.
        widths: channels of each level; each but the first halves the sizes.
        blocks: residual blocks of a level of the encoder; the decoder has one more.
        groups: groups of the group norms.
        scaling: the factor of the latents.
        dtype: of the computations; None for that of the parameters and of the input.
        rngs: the source of the initial parameters.

    Call with `encode(images)` or `decode(latents)`. Returns mean and standard deviation, or images.

    Raises:
        ValueError: if an image or a latent has another shape.

    Reference: Rombach et al. 2022 (arXiv 2112.10752), section 3.1.

    >>> vae = AutoencoderKL(widths=(8, 16), blocks=1, groups=4, rngs=nnx.Rngs(0))
    >>> mean, std = jax.jit(AutoencoderKL.encode)(vae, jnp.ones((2, 16, 16, 3)))
    >>> mean.shape, jax.jit(AutoencoderKL.decode)(vae, mean).shape
    ((2, 8, 8, 4), (2, 16, 16, 3))
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        latents: int = 4,
        widths: tuple[int, ...] = (128, 256, 512, 512),
        blocks: int = 2,
        groups: int = 32,
        scaling: float = 0.18215,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        check_settings(rngs, channels=channels, latents=latents, blocks=blocks, groups=groups)
        self.channels, self.latents, self.scaling, self.dtype = channels, latents, scaling, dtype
        self.factor = 2 ** (len(widths) - 1)
        sizes = channels, latents, widths, blocks, groups
        self.encoder, self.decoder = Encoder(*sizes, rngs=rngs), Decoder(*sizes, rngs=rngs)
        self.quant_conv = nnx.Conv(2 * latents, 2 * latents, (1, 1), rngs=rngs)
        self.post_quant_conv = nnx.Conv(latents, latents, (1, 1), rngs=rngs)

    def encode(self, images: ArrayLike) -> tuple[Array, Array]:
        """The mean and the standard deviation of the scaled latents of images.

        Images are (..., height, width, channels) in [-1, 1], with sizes that are multiples of 8.
        Returns two arrays (..., height / 8, width / 8, latents).
        """
        shape = jnp.shape(images)
        bad = any(n % self.factor for n in shape[-3:-1])
        if len(shape) < 3 or shape[-1] != self.channels or bad:
            raise ValueError(
                f"images: expected shape (..., height, width, {self.channels}) with sizes that are "
                f"multiples of {self.factor}, got {shape}"
            )

        def moments(vae, x):
            return vae.quant_conv(vae.encoder(x))

        images = as_float(images, "images")
        check_that(
            lambda low, high: (low >= -1.001) & (high <= 1.001),
            "images: expected values in [-1, 1], got values from {} to {}; from 0 to 255 take "
            "images / 127.5 - 1",
            jnp.min(images),
            jnp.max(images),
        )
        out = over_images(moments, self, images).astype(jnp.result_type(images))
        mean, log_variance = jnp.split(out, 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return self.scaling * mean, self.scaling * std

    def decode(self, latents: ArrayLike) -> Array:
        """Images in about [-1, 1] of scaled latents (..., height, width, latents).

        Returns (..., 8 height, 8 width, channels).
        """
        shape = jnp.shape(latents)
        if len(shape) < 3 or shape[-1] != self.latents:
            raise ValueError(
                f"latents: expected shape (..., height, width, {self.latents}), got {shape}"
            )

        def images(vae, z):
            return vae.decoder(vae.post_quant_conv(z))

        latents = as_float(latents, "latents")
        out = over_images(images, self, latents / self.scaling)
        return out.astype(jnp.result_type(latents))
