"""A diffusion transformer for images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
    keys_from,
    layer_norm,
    modulate,
    zero_linear,
)

__all__ = ["DiT", "patchify", "unpatchify"]


class DiT(nnx.Module):
    """A diffusion transformer for images, channels last.

    The image is cut into patches, each a token with a fixed 2-D sine-cosine position. Each of
    `depth` adaLN-Zero blocks is

        h = h + gate1 attention(LN(h) (1 + scale1) + shift1)
        h = h + gate2 mlp(LN(h) (1 + scale2) + shift2)

    Gates, scales and shifts are linear in the embedding of (t, cond). This linear layer starts at
    zero, so a new block is the identity, and a new network returns zero.

    Args:
        shape: (height, width, channels) of one image.
        patch: side of a patch, which must divide height and width.
        width: channels of a token, and of the embedding. A multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        expansion: hidden units of a block's MLP, in units of `width`.
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

    Call with x (..., height, width, channels), t a scalar or of the leading shape, cond None, or
    integer labels or what `condition` takes, of one sample or of the leading shape. Returns an
    array of the shape of x, at least float32.

    Dropout acts only in a call with `key=`, one key for all of x. Without a key the network is
    deterministic. The parameters hold no random state. A label outside [0, K] that jax traces
    cannot raise an error; its output is NaN.

    Raises:
        ValueError: if a setting is out of its range, patch or heads is not the divisor that it
            should be, or `rngs` is a key; if x, t or cond has another shape; if a label is outside
            [0, K], or the network has no classes; if `key` is not one key.

    Reference: Peebles and Xie 2023 (DiT, arXiv 2212.09748).

    >>> network = DiT((8, 8, 1), width=16, depth=1, heads=2, num_classes=10, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((3, 8, 8, 1)), 0.5, cond=jnp.array([1, 7, network.null])).shape
    (3, 8, 8, 1)
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        expansion: int = 4,
        num_classes: int | None = None,
        condition: Callable[..., Array] | None = None,
        dropout: float = 0.0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads}
        check_settings(rngs, num_classes=num_classes, dropout=dropout, expansion=expansion, **sizes)
        height, breadth, channels = self.shape = check_grid_shape(shape)
        if height % patch or breadth % patch:
            raise ValueError(
                f"patch: expected a divisor of the height and width of shape {shape}, got {patch}"
            )
        if width % 4:
            raise ValueError(f"width: expected a multiple of 4, got {width}")
        inputs = patch * patch * channels
        self.patch, self.null = patch, num_classes
        self.dropout, self.dtype = dropout, dtype
        self.embed = Embedding(width, rngs=rngs)
        self.condition = condition_of(num_classes, condition, width, rngs)
        self.inputs = nnx.Linear(inputs, width, rngs=rngs)
        settings = {"dropout": dropout, "rngs": rngs}
        self.blocks = nnx.List([Block(width, heads, expansion, **settings) for _ in range(depth)])
        self.modulation = zero_linear(width, 2 * width, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)
        self.outputs = zero_linear(width, inputs, rngs=rngs)

    def __call__(self, x: Array, t, cond=None, key=None) -> Array:
        """The raw output for x (..., height, width, channels) at time t."""
        return apply_flat(DiT._forward, self, self.shape, x, t, cond, key)

    def _forward(self, x: Array, embedding: Array, key: Array | None) -> Array:
        h = self.inputs(patchify(x, self.patch))
        grid = (self.shape[0] // self.patch, self.shape[1] // self.patch)
        h = h + jnp.asarray(positions(*grid, h.shape[-1]), h.dtype)[None]
        for block, key_i in zip(self.blocks, keys_from(key), strict=False):
            h = block(h, embedding, key_i)
        scale, shift = jnp.split(self.modulation(embedding), 2, axis=-1)
        tokens = self.outputs(modulate(self.norm(h), scale, shift))
        return unpatchify(tokens, self.patch, self.shape)


class Block(nnx.Module):
    """An adaLN-Zero transformer block."""

    def __init__(
        self,
        width: int,
        heads: int,
        expansion: int,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.modulation = zero_linear(width, 6 * width, rngs=rngs)
        self.norm1 = layer_norm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, expansion * width, rngs=rngs)
        self.out = nnx.Linear(expansion * width, width, rngs=rngs)

    def __call__(self, h: Array, embedding: Array, key: Array | None = None) -> Array:
        """(n, tokens, width) -> the same, given the embedding (n or 1, width)."""
        modulation = jnp.split(self.modulation(embedding), 6, axis=-1)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation
        keys = keys_from(key)
        attended = self.attention(modulate(self.norm1(h), scale1, shift1))
        h = h + gate1[:, None] * dropout(attended, self.dropout, next(keys))
        hidden = jax.nn.gelu(self.hidden(modulate(self.norm2(h), scale2, shift2)))
        return h + gate2[:, None] * dropout(self.out(hidden), self.dropout, next(keys))


def patchify(x: Array, patch: int) -> Array:
    """Cuts images into patches, row by row.

    Args:
        x: images (n, height, width, channels).
        patch: the side of a patch, a divisor of height and width.

    Returns:
        The patches (n, tokens, patch^2 channels), with `tokens = height width / patch^2`.

    >>> patchify(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0, 1]
    Array([2, 3, 6, 7], dtype=int32)
    """
    n, height, width, channels = x.shape
    x = x.reshape(n, height // patch, patch, width // patch, patch, channels).swapaxes(2, 3)
    return x.reshape(n, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(tokens: Array, patch: int, shape: tuple[int, ...]) -> Array:
    """The inverse of `patchify`.

    Args:
        tokens: patches (n, tokens, patch^2 channels).
        patch: the side of a patch.
        shape: (height, width, channels) of one image.

    Returns:
        The images (n, *shape).

    >>> x = jnp.arange(16).reshape(1, 4, 4, 1)
    >>> bool((unpatchify(patchify(x, 2), 2, (4, 4, 1)) == x).all())
    True
    """
    height, width, channels = shape
    x = tokens.reshape(-1, height // patch, width // patch, patch, patch, channels).swapaxes(2, 3)
    return x.reshape(-1, height, width, channels)


def positions(height: int, width: int, dim: int) -> np.ndarray:
    """Sines and cosines of row and column at `dim / 4` frequencies from 1 down to 1e-4: (height *
    width, dim).

    >>> positions(2, 3, 8).shape
    (6, 8)
    """
    frequencies = 10_000.0 ** -(np.arange(dim // 4) / (dim // 4))
    row, column = (
        a.reshape(-1, 1) * frequencies.reshape(1, -1) for a in np.indices((height, width))
    )
    return np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=-1)
