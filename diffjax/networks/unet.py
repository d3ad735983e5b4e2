"""A U-Net for images, sequences and volumes, in the manner of ADM."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ._layers import (
    Attention,
    Embedding,
    apply_flat,
    check_grid_shape,
    check_settings,
    condition_of,
    dropout,
    group_norm,
    keys_from,
    modulate,
)

__all__ = ["Residuals", "UNet"]


class Residuals(NamedTuple):
    """What a control adds to the activations of a U-Net."""

    stored: tuple[Array, ...]
    """for each stored activation, in the order in which they are stored"""
    middle: Array
    """for the output of the middle"""


class UNet(nnx.Module):
    """The U-Net of ADM for images, sequences and volumes, channels last.

    The data are images, sequences or volumes of any size. Level i works at 1 / 2^i of the
    resolution, rounded up, with `width * multipliers[i]` channels. It has `blocks` residual blocks
    on the way down and `blocks + 1` on the way up, where each takes in one stored activation. A
    residual block is `skip(h) + conv(silu(GN(conv(silu(GN(h)))) (1 + scale) + shift))` with scale
    and shift linear in the embedding of (t, cond). Levels are joined by strided convolutions down
    and nearest-neighbour upsampling, cropped to the size of the stored activations, with a
    convolution up. The last convolution of every branch, and the output layer, start at zero.

    Args:
        shape: of one sample: (height, width, channels), (length, channels) or (depth, height,
            width, channels).
        width: channels of the first level, and of the embedding. A multiple of 4.
        multipliers: channels of each level, in units of `width`.
        blocks: residual blocks a level.
        attention: the resolutions, as sizes of the first axis, whose blocks are followed by
            self-attention. The middle always has it.
        head_width: channels of an attention head, where the level has as many.
        num_classes: the number K of class labels; None for no labels.
        condition: instead of num_classes, a function or module that embeds any pytree:
            `condition(cond)` of shape (width,), or (..., width) for a batch. It also decides what
            cond=None means.
        dropout: the probability with which a call with a `key` sets each hidden unit of a block to
            zero.
        dtype: the dtype in which the layers compute, such as `jnp.bfloat16`; None for that of x.
            Parameters, and the embedding of t and cond, are float32.
        rngs: the source of the initial parameters.

    Attributes:
        null: the label K that means "no class", the same as `cond=None`; None without classes.

    Call with x (..., *shape), t a scalar or of the leading shape, cond None, or integer labels or
    what `condition` takes, of one sample or of the leading shape. Returns an array of the shape of
    x, at least float32. `residuals` are added to the stored activations and to the output of the
    middle, such as those of a `ControlNet`.

    Dropout acts only in a call with `key=`, one key for all of x. Without a key the network is
    deterministic. The parameters hold no random state. A label outside [0, K] that jax traces
    cannot raise an error; its output is NaN.

    Raises:
        ValueError: if a setting is out of its range, the channels come first, no level has a
            resolution in `attention`, or `rngs` is a key; if x, t or cond has another shape; if a
            label is outside [0, K], or the network has no classes; if `key` is not one key.

    Reference: Dhariwal and Nichol 2021 (ADM, arXiv 2105.05233).

    >>> settings = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
    >>> network = UNet((8, 8, 1), **settings, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((3, 8, 8, 1)), jnp.array([0.1, 0.5, 0.9])).shape
    (3, 8, 8, 1)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        head_width: int = 64,
        num_classes: int | None = None,
        condition: Callable[..., Array] | None = None,
        dropout: float = 0.0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        check_settings(
            rngs,
            num_classes=num_classes,
            dropout=dropout,
            width=width,
            blocks=blocks,
            head_width=head_width,
            **{f"multipliers[{i}]": m for i, m in enumerate(multipliers)},
        )
        self.shape, self.null = check_grid_shape(shape, (1, 2, 3)), num_classes
        self.dropout, self.dtype = dropout, dtype
        if not multipliers:
            raise ValueError("multipliers: expected at least one level, got none")
        dims, resolutions = len(shape) - 1, [-(-shape[0] // 2**i) for i in range(len(multipliers))]
        if not set(attention) <= set(resolutions):
            raise ValueError(
                f"attention: expected resolutions among {resolutions}, got {tuple(attention)}"
            )
        if width % 4:
            raise ValueError(f"width: expected a multiple of 4, got {width}")

        def block(inputs: int, outputs: int, attend: bool) -> Block:
            heads = max(1, outputs // head_width) if attend else 0
            if heads and outputs % heads:
                raise ValueError(
                    f"head_width: expected a width that cuts {outputs} channels into equal heads, "
                    f"got {head_width}, which makes {heads} heads"
                )
            settings = {"dropout": dropout, "rngs": rngs}
            return Block(dims, inputs, outputs, width, heads, **settings)

        def conv(inputs: int, outputs: int, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (3,) * dims, strides=stride, rngs=rngs)

        levels = [
            (width * m, r in attention) for m, r in zip(multipliers, resolutions, strict=True)
        ]
        self.embed = Embedding(width, rngs=rngs)
        self.condition = condition_of(num_classes, condition, width, rngs)
        self.inputs = conv(shape[-1], width)

        c, stored, down, up = width, [width], [], []
        for i, (channels, attend) in enumerate(levels):
            if i > 0:
                down.append(nnx.List([conv(c, c, stride=2)]))
                stored.append(c)
            for _ in range(blocks):
                down.append(nnx.List([block(c, channels, attend)]))
                c = channels
                stored.append(c)
        self.middle = nnx.List([block(c, c, True), block(c, c, False)])
        for i, (channels, attend) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                up.append(nnx.List([block(c + stored.pop(), channels, attend)]))
                c = channels
            if i > 0:
                up[-1].append(conv(c, c))
        self.down, self.up = nnx.List(down), nnx.List(up)
        self.norm = group_norm(c, rngs=rngs)
        self.outputs = _zero_conv(dims, c, shape[-1], rngs=rngs)

    def __call__(
        self, x: Array, t, cond=None, key=None, residuals: Residuals | None = None
    ) -> Array:
        """The raw output for x (..., *shape) at time t."""
        return apply_flat(UNet._forward, self, self.shape, x, t, cond, key, residuals)

    def _forward(
        self, x: Array, embedding: Array, key: Array | None, residuals: Residuals | None
    ) -> Array:
        keys = keys_from(key)
        stored, h = encode(self, self.inputs(x), embedding, keys)
        if residuals is not None:
            stored = [a + b for a, b in zip(stored, residuals.stored, strict=True)]
            h = h + residuals.middle
        for layers in self.up:
            h = layers[0](jnp.concatenate([h, stored.pop()], axis=-1), embedding, next(keys))
            if len(layers) > 1:
                h = layers[1](_upsample(h, stored[-1].shape))
        return self.outputs(jax.nn.silu(self.norm(h)))


def encode(
    network, h: Array, embedding: Array, keys: Iterator[Array | None]
) -> tuple[list[Array], Array]:
    """The stored activations of a U-Net's way down, and the output of its middle."""
    stored = [h]
    for layers in network.down:
        for layer in layers:
            h = layer(h, embedding, next(keys)) if isinstance(layer, Block) else layer(h)
        stored.append(h)
    for block in network.middle:
        h = block(h, embedding, next(keys))
    return stored, h


class Block(nnx.Module):
    """A residual block, followed by self-attention where `heads` > 0."""

    def __init__(
        self,
        dims: int,
        inputs: int,
        outputs: int,
        embedding: int,
        heads: int,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.norm1 = group_norm(inputs, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, outputs, (3,) * dims, rngs=rngs)
        self.modulation = nnx.Linear(embedding, 2 * outputs, rngs=rngs)
        self.norm2 = group_norm(outputs, rngs=rngs)
        self.conv2 = _zero_conv(dims, outputs, outputs, rngs=rngs)
        self.skip = nnx.Linear(inputs, outputs, rngs=rngs) if inputs != outputs else None
        self.norm3 = group_norm(outputs, rngs=rngs) if heads else None
        zeros = nnx.initializers.zeros
        self.attention = Attention(outputs, heads, out_init=zeros, rngs=rngs) if heads else None

    def __call__(self, x: Array, embedding: Array, key: Array | None = None) -> Array:
        """(n, *sizes, inputs) -> (n, *sizes, outputs), given the embedding (n or 1, width)."""
        scale, shift = jnp.split(self.modulation(embedding), 2, axis=-1)
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = jax.nn.silu(modulate(self.norm2(h), scale, shift))
        h = self.conv2(dropout(h, self.dropout, key))
        x = h + (x if self.skip is None else self.skip(x))
        if self.attention is not None and self.norm3 is not None:
            tokens = self.norm3(x).reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
            x = x + self.attention(tokens).reshape(x.shape)
        return x


def _upsample(x: Array, shape: tuple[int, ...]) -> Array:
    """Nearest neighbour, twice the size, cropped to the sizes in `shape`."""
    for axis, size in enumerate(shape[1:-1], 1):
        x = jax.lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, size, axis=axis)
    return x


def _zero_conv(dims: int, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (3,) * dims, kernel_init=nnx.initializers.zeros, rngs=rngs)
