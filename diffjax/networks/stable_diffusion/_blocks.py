"""The blocks of the U-Net, the autoencoder and the control. Attributes bear the files' names."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from .._layers import attend, cast, with_auto_axes

# Convolutions of stride 2 pad alike on both sides in the U-Net, and only behind in the autoencoder.
BOTH_SIDES, BEHIND = ((1, 1), (1, 1)), ((0, 1), (0, 1))


def conv(inputs: int, outputs: int, *, stride: int = 1, padding=BOTH_SIDES, rngs) -> nnx.Conv:
    """A 3x3 convolution."""
    return nnx.Conv(inputs, outputs, (3, 3), strides=stride, padding=padding, rngs=rngs)


def group_norm(width: int, groups: int, epsilon: float, *, rngs) -> nnx.GroupNorm:
    """A group norm with scale and bias."""
    return nnx.GroupNorm(width, groups, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def layer_norm(width: int, *, rngs) -> nnx.LayerNorm:
    """A layer norm with scale and bias."""
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class ResnetBlock(nnx.Module):
    """Two convolutions and a shortcut; the embedding of the time is added between them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        epsilon: float,
        embedding: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm1 = group_norm(inputs, groups, epsilon, rngs=rngs)
        self.conv1 = conv(inputs, outputs, rngs=rngs)
        self.time_emb_proj = nnx.Linear(embedding, outputs, rngs=rngs) if embedding else None
        self.norm2 = group_norm(outputs, groups, epsilon, rngs=rngs)
        self.conv2 = conv(outputs, outputs, rngs=rngs)
        change = inputs != outputs
        self.conv_shortcut = nnx.Conv(inputs, outputs, (1, 1), rngs=rngs) if change else None

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        """(n, h, w, inputs) -> (n, h, w, outputs), given the embedding (n or 1, width)."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None and embedding is not None:
            h = h + self.time_emb_proj(jax.nn.silu(embedding))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Attention of tokens over themselves or over a context."""

    def __init__(
        self, width: int, heads: int, context: int | None = None, bias: bool = False, *, rngs
    ):
        context, self.heads = context or width, heads
        self.to_q = nnx.Linear(width, width, use_bias=bias, rngs=rngs)
        self.to_k = nnx.Linear(context, width, use_bias=bias, rngs=rngs)
        self.to_v = nnx.Linear(context, width, use_bias=bias, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(width, width, rngs=rngs)])

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """X (n, tokens, width), context (n or 1, tokens of the context, channels)."""
        context = x if context is None else context
        q, k, v = (
            split_heads(a, self.heads)
            for a in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attend(q, k, v).reshape(x.shape))


def split_heads(x: Array, heads: int) -> Array:
    """(n, tokens, width) -> (n, tokens, heads, width / heads)."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)


class SpatialAttention(Attention):
    """The autoencoder's self-attention of one head over the pixels, with its norm and residual."""

    def __init__(self, width: int, groups: int, epsilon: float, *, rngs: nnx.Rngs):
        super().__init__(width, 1, bias=True, rngs=rngs)
        self.group_norm = group_norm(width, groups, epsilon, rngs=rngs)

    def __call__(self, x: Array) -> Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(n, h, w, width) -> (n, h, w, width)."""
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(tokens).reshape(x.shape)


class GEGLU(nnx.Module):
    """`h gelu(gate)`, both halves linear in x; the exact gelu."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(width, 2 * hidden, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(..., width) -> (..., hidden)."""
        h, gate = jnp.split(self.proj(x), 2, axis=-1)
        return h * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU and a linear layer. The files call them 0 and 2; 1 is a dropout of rate 0."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        last = nnx.Linear(4 * width, width, rngs=rngs)
        self.net = nnx.Dict({"0": GEGLU(width, 4 * width, rngs=rngs), "2": last})

    def __call__(self, x: Array) -> Array:
        """(..., width) -> (..., width)."""
        return self.net["2"](self.net["0"](x))


class TransformerBlock(nnx.Module):
    """Self-attention, attention over the text, and the feed-forward network."""

    def __init__(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2, self.norm3 = (layer_norm(width, rngs=rngs) for _ in range(3))
        self.attn1 = Attention(width, heads, rngs=rngs)
        self.attn2 = Attention(width, heads, context, rngs=rngs)
        self.ff = FeedForward(width, rngs=rngs)

    def __call__(self, x: Array, text: Array) -> Array:
        """X (n, tokens, width), text (n or 1, tokens of the text, context)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """A transformer block over the pixels, between two projections."""

    def __init__(
        self, width: int, heads: int, context: int, groups: int, linear: bool, *, rngs: nnx.Rngs
    ):
        def projection():
            size = () if linear else ((1, 1),)
            return (nnx.Linear if linear else nnx.Conv)(width, width, *size, rngs=rngs)

        self.norm = group_norm(width, groups, 1e-6, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List([TransformerBlock(width, heads, context, rngs=rngs)])
        self.proj_out = projection()

    def __call__(self, x: Array, text: Array) -> Array:
        """(n, h, w, width) -> (n, h, w, width)."""
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return x + self.proj_out(tokens.reshape(x.shape))


class Downsample(nnx.Module):
    """A convolution of stride 2."""

    def __init__(self, width: int, padding=BOTH_SIDES, *, rngs: nnx.Rngs):
        self.conv = conv(width, width, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, h, w, width) -> (n, h / 2, w / 2, width)."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the size by nearest neighbours, and a convolution."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = conv(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, h, w, width) -> (n, 2 h, 2 w, width)."""
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Level(nnx.Module):
    """The parts of one resolution, or of the middle."""

    def __init__(
        self,
        resnets: Sequence,
        attentions: Sequence = (),
        *,
        down: Sequence = (),
        up: Sequence = (),
    ):
        self.resnets, self.attentions = nnx.List(resnets), nnx.List(attentions)
        self.downsamplers, self.upsamplers = nnx.List(down), nnx.List(up)


def over_images(forward: Callable[..., Array], network: Any, x: Array, rank: int = 3) -> Array:
    """`forward(network, x)` with the leading axes of x made one, computed in `network.dtype`."""

    def flat(network, x):
        network, h = cast((network, x), network.dtype)
        out = forward(network, h.reshape(-1, *h.shape[h.ndim - rank :]))
        return out.reshape(*x.shape[: x.ndim - rank], *out.shape[1:])

    return with_auto_axes(flat, network, x)
