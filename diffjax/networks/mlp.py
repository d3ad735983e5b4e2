"""A residual multilayer perceptron for vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ._layers import (
    Embedding,
    apply_polymorphic,
    check_settings,
    condition_of,
    dropout,
    keys_from,
    layer_norm,
    modulate,
    zero_linear,
)

__all__ = ["MLP"]


class MLP(nnx.Module):
    """A residual MLP for vectors, modulated by time and class.

    Each of `depth` blocks is `h + W2 silu(W1 (LN(h) (1 + scale) + shift))`, with scale and shift
    linear in the embedding of (t, cond): FiLM in the pre-norm residual form of DiT. W2 and the
    output layer start at zero, so a new network returns zero.

    Args:
        dim: the length of x.
        width: channels of the residual stream and of the embedding. Even.
        depth: number of blocks.
        expansion: hidden units of a block, in units of `width`.
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

    Call with x (..., dim), t a scalar or of the leading shape, cond None, or integer labels or what
    `condition` takes, of one sample or of the leading shape. Returns an array of the shape of x, at
    least float32.

    Dropout acts only in a call with `key=`, one key for all of x. Without a key the network is
    deterministic. The parameters hold no random state. A label outside [0, K] that jax traces
    cannot raise an error; its output is NaN.

    Raises:
        ValueError: if a setting is out of its range, or `rngs` is a key; if x, t or cond has
            another shape; if a label is outside [0, K], or the network has no classes; if `key` is
            not one key.

    Reference: Perez et al. 2018 (FiLM, arXiv 1709.07871); Peebles and Xie 2023 (DiT, arXiv
    2212.09748).

    >>> network = MLP(2, width=16, num_classes=10, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((8, 5, 2)), 0.5, cond=3).shape
    (8, 5, 2)
    >>> network(jnp.ones(2), 0.5, network.null)  # one sample, no class
    Array([0., 0.], dtype=float32)
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 256,
        depth: int = 4,
        expansion: int = 2,
        num_classes: int | None = None,
        condition: Callable[..., Array] | None = None,
        dropout: float = 0.0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        sizes = {"dim": dim, "width": width, "depth": depth, "expansion": expansion}
        check_settings(rngs, num_classes=num_classes, dropout=dropout, **sizes)
        self.dim, self.null, self.dropout, self.dtype = dim, num_classes, dropout, dtype
        self.embed = Embedding(width, rngs=rngs)
        self.condition = condition_of(num_classes, condition, width, rngs)
        self.inputs = nnx.Linear(dim, width, rngs=rngs)
        settings = {"dropout": dropout, "rngs": rngs}
        self.blocks = nnx.List([Block(width, expansion, **settings) for _ in range(depth)])
        self.modulation = nnx.Linear(width, 2 * width, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)
        self.outputs = zero_linear(width, dim, rngs=rngs)

    def __call__(self, x: Array, t, cond=None, key=None) -> Array:
        """The raw output for x (..., dim) at time t."""
        return apply_polymorphic(MLP._forward, self, (self.dim,), x, t, cond, key)

    def _forward(self, x: Array, embedding: Array, key: Array | None) -> Array:
        h = self.inputs(x)
        for block, key_i in zip(self.blocks, keys_from(key), strict=False):
            h = block(h, embedding, key_i)
        scale, shift = jnp.split(self.modulation(embedding), 2, axis=-1)
        return self.outputs(modulate(self.norm(h), scale, shift))


class Block(nnx.Module):
    """`h + W2 drop(silu(W1 (LN(h) (1 + scale) + shift)))`."""

    def __init__(self, width: int, expansion: int, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.dropout = dropout
        self.modulation = nnx.Linear(width, 2 * width, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, expansion * width, rngs=rngs)
        self.out = zero_linear(expansion * width, width, rngs=rngs)

    def __call__(self, h: Array, embedding: Array, key: Array | None = None) -> Array:
        """One residual step of h (..., width). The embedding's leading axes may have length 1."""
        scale, shift = jnp.split(self.modulation(embedding), 2, axis=-1)
        hidden = jax.nn.silu(self.hidden(modulate(self.norm(h), scale, shift)))
        return h + self.out(dropout(hidden, self.dropout, key))
