"""Stable Diffusion's U-Net, and the ControlNet that steers it."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

from ..._checks import check_that
from .._layers import apply_polymorphic, check_settings
from ..unet import Residuals
from ._blocks import Downsample, Level, ResnetBlock, Transformer, Upsample, conv, group_norm

__all__ = ["ControlNet", "UNet", "UNetConfig"]


class UNetConfig(NamedTuple):
    """The sizes of a U-Net and of its ControlNet; those of Stable Diffusion 1.5 by default."""

    inputs: int = 4
    """channels of x; inpainting models have more"""
    outputs: int = 4
    """channels of the output"""
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    """channels of each level"""
    attention: tuple[bool, ...] = (True, True, True, False)
    """whether a level has transformers"""
    heads: tuple[int, ...] = (8, 8, 8, 8)
    """number of heads of each level"""
    blocks: int = 2
    """residual blocks of a level on the way down; one more on the way up"""
    context: int = 768
    """channels of the text's embedding"""
    groups: int = 32
    """groups of the group norms"""
    epsilon: float = 1e-5
    """of the group norms of the residual blocks"""
    linear_projection: bool = False
    """whether the transformers project by linear layers (2.x), or by 1x1 convolutions (1.x)"""


SD15 = UNetConfig()


class TimeEmbedding(nnx.Module):
    """Two linear layers over cosines and sines of the time."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(inputs, width, rngs=rngs)
        self.linear_2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, t: Array) -> Array:
        """(...) -> (..., width)."""
        half = self.linear_1.in_features // 2
        frequencies = 10_000.0 ** (-jnp.arange(half, dtype=t.dtype) / half)
        phases = t[..., None] * frequencies.reshape(*(1,) * t.ndim, half)
        features = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class _Parts:
    """Makes the parts of a U-Net."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        check_settings(rngs)
        if not len(config.widths) == len(config.attention) == len(config.heads) > 0:
            raise ValueError(
                f"widths, attention, heads: expected as many of each, got {len(config.widths)}, "
                f"{len(config.attention)} and {len(config.heads)}"
            )
        for i, (width, heads) in enumerate(zip(config.widths, config.heads, strict=True)):
            if width % heads or width % config.groups:
                raise ValueError(
                    f"widths[{i}]: expected a multiple of {heads} heads and of {config.groups} "
                    f"groups, got {width}"
                )
        self.config, self.rngs = config, rngs
        self.embedding = 4 * config.widths[0]

    def resnet(self, inputs: int, outputs: int) -> ResnetBlock:
        sizes = self.config.groups, self.config.epsilon, self.embedding
        return ResnetBlock(inputs, outputs, *sizes, rngs=self.rngs)

    def transformer(self, i: int) -> Transformer:
        c = self.config
        sizes = c.widths[i], c.heads[i], c.context, c.groups, c.linear_projection
        return Transformer(*sizes, rngs=self.rngs)

    def down(self, i: int) -> Level:
        c, width = self.config, self.config.widths[i]
        inputs = (c.widths[max(i - 1, 0)], *(width,) * (c.blocks - 1))
        last = i == len(c.widths) - 1
        return Level(
            [self.resnet(n, width) for n in inputs],
            [self.transformer(i) for _ in inputs if c.attention[i]],
            down=() if last else [Downsample(width, rngs=self.rngs)],
        )

    def middle(self) -> Level:
        width = self.config.widths[-1]
        resnets = [self.resnet(width, width) for _ in range(2)]
        return Level(resnets, [self.transformer(-1)])

    def up(self, i: int) -> Level:
        """Its inputs: what comes from below beside what was stored, the last one first."""
        c, width = self.config, self.config.widths[i]
        below = (c.widths[min(i + 1, len(c.widths) - 1)], *(width,) * c.blocks)
        stored = (*(width,) * c.blocks, c.widths[max(i - 1, 0)])
        return Level(
            [self.resnet(a + b, width) for a, b in zip(below, stored, strict=True)],
            [self.transformer(i) for _ in below if c.attention[i]],
            up=[Upsample(width, rngs=self.rngs)] if i > 0 else (),
        )

    def encoder(self) -> tuple:
        widths = self.config.widths
        return (
            conv(self.config.inputs, widths[0], rngs=self.rngs),
            TimeEmbedding(widths[0], self.embedding, rngs=self.rngs),
            nnx.List([self.down(i) for i in range(len(widths))]),
            self.middle(),
        )

    def stored(self) -> list[int]:
        """The channels of the activations that the way down stores."""
        c = self.config
        levels = [
            (*(w,) * c.blocks, *(w,) * (i < len(c.widths) - 1)) for i, w in enumerate(c.widths)
        ]
        return [c.widths[0], *(w for level in levels for w in level)]


class _Network(nnx.Module):
    """What a U-Net and its control share."""

    config: UNetConfig
    time_embedding: TimeEmbedding
    # for `apply_polymorphic`: the text has its own way, beside the embedding of the time
    condition, dropout = None, 0.0

    def embed(self, t, rows):
        return self.time_embedding(t)

    def _apply(self, forward, x, t, cond, *others):
        config, shape = self.config, jnp.shape(x)
        multiple = 2 ** (len(config.widths) - 1)
        sizes = shape[-3:-1]
        if len(shape) < 3 or shape[-1] != config.inputs or any(n % multiple for n in sizes):
            raise ValueError(
                f"x: expected shape (..., height, width, {config.inputs}) with sizes that are "
                f"multiples of {multiple}, got {shape}"
            )
        lead, text = shape[:-3], () if cond is None else jnp.shape(cond)
        if (
            cond is None
            or len(text) < 2
            or text[-1] != config.context
            or text[:-2] not in ((), lead)
        ):
            raise ValueError(
                f"cond: expected the embedding of a text, (tokens, {config.context}), or one for "
                f"each x with leading axes {lead}, got {None if cond is None else text}"
            )
        cond = jnp.asarray(cond, jnp.result_type(x))
        return apply_polymorphic(forward, self, shape[-3:], x, t, None, None, cond, *others)


def _encode(network, h: Array, embedding: Array, text: Array) -> tuple[list[Array], Array]:
    """The activations that the way down stores, and the output of the middle."""
    stored = [h]
    for level in network.down_blocks:
        for i, resnet in enumerate(level.resnets):
            h = resnet(h, embedding)
            h = level.attentions[i](h, text) if level.attentions else h
            stored.append(h)
        for layer in level.downsamplers:
            h = layer(h)
            stored.append(h)
    first, last = network.mid_block.resnets
    h = network.mid_block.attentions[0](first(h, embedding), text)
    return stored, last(h, embedding)


def _flat(x: Array, embedding: Array, text: Array, *images):
    """Everything with one batch axis: of x's length, or 1 for what all share."""
    images = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-3:]), (x, *images))
    embedding = embedding.reshape(-1, embedding.shape[-1])
    return images[0], embedding, text.reshape(-1, *text.shape[-2:]), *images[1:]


class UNet(_Network):
    """Stable Diffusion's U-Net of latents, in the layout of its published weights.

    The network is one of this library: `bind(unet, cond=text)` makes what `as_denoiser` takes. It
    sees `c_noise`, the index of the discrete chain from 0 to 999, which the parametrization of
    `read_model` gives it. The attributes bear the names of the files, so that `load_tensors` fills
    them.

    Args:
        config: the sizes.
        dtype: of the computations; None for that of the parameters and of x.
        rngs: the source of the initial parameters.

    Call with x (..., height, width, inputs), whose sizes are multiples of `2 ** (levels - 1)`; the
    index t, of x's leading axes or one for all; and cond, the embedding of the text,
    (..., tokens, context), likewise. `residuals` of a `ControlNet` are added to the activations.
    Returns (..., height, width, outputs).

    Raises:
        ValueError: if the sizes do not fit; if x or cond has another shape.

    Reference: Rombach et al. 2022 (arXiv 2112.10752), section 3.

    >>> from diffjax.networks.stable_diffusion import UNet, UNetConfig
    >>> config = UNetConfig(widths=(8, 16), attention=(True, False), heads=(2, 2), context=6,
    ...     groups=4)
    >>> unet = UNet(config, rngs=nnx.Rngs(0))
    >>> jax.jit(unet)(jnp.ones((2, 8, 8, 4)), 999.0, jnp.ones((5, 6))).shape
    (2, 8, 8, 4)
    """

    def __init__(self, config: UNetConfig = SD15, *, dtype=None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        parts, width = _Parts(config, rngs), config.widths[0]
        self.conv_in, self.time_embedding, self.down_blocks, self.mid_block = parts.encoder()
        self.up_blocks = nnx.List([parts.up(i) for i in reversed(range(len(config.widths)))])
        self.conv_norm_out = group_norm(width, config.groups, config.epsilon, rngs=rngs)
        self.conv_out = conv(width, config.outputs, rngs=rngs)

    def __call__(
        self, x: Array, t, cond=None, key=None, residuals: Residuals | None = None
    ) -> Array:
        """The raw output for x at index t, given the text."""
        return self._apply(UNet._forward, x, t, cond, residuals)

    def _forward(self, x, embedding, key, text, residuals):
        lead = x.shape[:-3]
        x, embedding, text, residuals = _flat(x, embedding, text, residuals)
        stored, h = _encode(self, self.conv_in(x), embedding, text)
        if residuals is not None:
            stored = [a + b for a, b in zip(stored, residuals.stored, strict=True)]
            h = h + residuals.middle
        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                h = resnet(jnp.concatenate([h, stored.pop()], axis=-1), embedding)
                h = level.attentions[i](h, text) if level.attentions else h
            for layer in level.upsamplers:
                h = layer(h)
        out = self.conv_out(jax.nn.silu(self.conv_norm_out(h)))
        return out.reshape(*lead, *out.shape[1:])


class HintNetwork(nnx.Module):
    """Convolutions that take an image to the size and width of the first level; the last is 0."""

    def __init__(self, channels: int, widths: tuple[int, ...], outputs: int, *, rngs: nnx.Rngs):
        self.conv_in = conv(channels, widths[0], rngs=rngs)
        blocks = []
        for a, b in itertools.pairwise(widths):
            blocks += [conv(a, a, rngs=rngs), conv(a, b, stride=2, rngs=rngs)]
        self.blocks = nnx.List(blocks)
        zeros = nnx.initializers.zeros
        size = {"kernel_size": (3, 3), "padding": 1}
        self.conv_out = nnx.Conv(widths[-1], outputs, kernel_init=zeros, **size, rngs=rngs)

    def __call__(self, hint: Array) -> Array:
        """(n, s h, s w, channels) -> (n, h, w, outputs), s = 2 ** (len(widths) - 1)."""
        h = jax.nn.silu(self.conv_in(hint))
        for layer in self.blocks:
            h = jax.nn.silu(layer(h))
        return self.conv_out(h)


class ControlNet(_Network):
    """The control of a `UNet` by an image, in the layout of the published weights.

    `controlled(unet, [(control, hint, weight)])` makes a network of both, and
    `guess_weights(control)` are the weights of guess mode.

    Args:
        config: the sizes of the U-Net.
        hint_widths: channels of the hint's convolutions. Each but the first halves the sizes, so
            four of them make 8 pixels of the hint one of x.
        dtype: as for the U-Net.
        rngs: the source of the initial parameters. The last convolutions are zero.

    Call with x and t as for the U-Net, the hint, and cond. The hint is an image in [0, 1] (not in
    [-1, 1]; -1 marks what is inpainted), (..., 8 height, 8 width, 3), of x's leading axes or one
    for all. Returns `Residuals`.

    Raises:
        ValueError: if x, cond or the hint has another shape, or concrete values of the hint lie
            outside [0, 1].

    Reference: Zhang et al. 2023 (ControlNet, arXiv 2302.05543); (1.43), (1.44).

    >>> from diffjax.networks import controlled
    >>> from diffjax.networks.stable_diffusion import ControlNet, UNet, UNetConfig
    >>> config = UNetConfig(widths=(8, 16), attention=(True, False), heads=(2, 2), context=6,
    ...     groups=4)
    >>> unet = UNet(config, rngs=nnx.Rngs(0))
    >>> control = ControlNet.of(unet, (4, 8), rngs=nnx.Rngs(1))
    >>> network = controlled(unet, [(control, jnp.ones((16, 16, 3)), 1.0)])
    >>> jax.jit(network)(jnp.ones((8, 8, 4)), 999.0, jnp.ones((5, 6))).shape
    (8, 8, 4)
    """

    def __init__(
        self,
        config: UNetConfig = SD15,
        hint_widths: Sequence[int] = (16, 32, 96, 256),
        *,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        parts = _Parts(config, rngs)
        self.conv_in, self.time_embedding, self.down_blocks, self.mid_block = parts.encoder()
        hint = HintNetwork(3, tuple(hint_widths), config.widths[0], rngs=rngs)
        self.controlnet_cond_embedding = hint

        def zero_conv(width):
            zeros = nnx.initializers.zeros
            return nnx.Conv(width, width, (1, 1), kernel_init=zeros, rngs=rngs)

        self.controlnet_down_blocks = nnx.List([zero_conv(width) for width in parts.stored()])
        self.controlnet_mid_block = zero_conv(config.widths[-1])

    @classmethod
    def of(
        cls, unet: UNet, hint_widths: Sequence[int] = (16, 32, 96, 256), *, rngs: nnx.Rngs
    ) -> "ControlNet":
        """A new control: the way down and the middle are copies of the U-Net's."""
        control = cls(unet.config, hint_widths, dtype=unet.dtype, rngs=rngs)
        for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            setattr(control, name, jax.tree.map(jnp.copy, getattr(unet, name)))
        return control

    @property
    def stored_out(self) -> Sequence[nnx.Conv]:
        """The convolutions of the stored activations."""
        return self.controlnet_down_blocks

    def __call__(self, x: Array, t, hint: ArrayLike, cond=None, key=None) -> Residuals:
        """What the hint adds to the activations of the U-Net."""
        factor = 2 ** (len(self.controlnet_cond_embedding.blocks) // 2)
        lead, sizes = jnp.shape(x)[:-3], tuple(factor * n for n in jnp.shape(x)[-3:-1])
        channels = self.controlnet_cond_embedding.conv_in.in_features
        shape = jnp.shape(hint)
        if shape[-3:] != (*sizes, channels) or shape[:-3] not in ((), lead):
            raise ValueError(
                f"hint: expected shape {(*sizes, channels)}, {factor} pixels for each of x, or "
                f"that after x's leading axes {lead}, got {shape}"
            )
        hint = jnp.asarray(hint, jnp.result_type(x))
        seen = jnp.where(hint == -1, 0.0, hint)
        check_that(
            lambda low, high: (low >= 0) & (high <= 1),
            "hint: expected values in [0, 1], or -1 for what is to be inpainted, got values from "
            "{} to {}; from [-1, 1] take (hint + 1) / 2",
            jnp.min(seen),
            jnp.max(seen),
        )
        return self._apply(ControlNet._forward, x, t, cond, hint)

    def _forward(self, x, embedding, key, text, hint):
        lead = x.shape[:-3]
        x, embedding, text, hint = _flat(x, embedding, text, hint)
        h = self.conv_in(x) + self.controlnet_cond_embedding(hint)
        stored, h = _encode(self, h, embedding, text)
        stored = [conv(a) for conv, a in zip(self.controlnet_down_blocks, stored, strict=True)]
        residuals = Residuals(tuple(stored), self.controlnet_mid_block(h))
        return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), residuals)
