"""The text encoder of CLIP."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

from ..._checks import check_that
from .._layers import attend, cast, check_settings, with_auto_axes
from ._blocks import layer_norm, split_heads

__all__ = ["CLIPText"]


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}


class Embeddings(nnx.Module):
    """The sum of a token's vector and its position's."""

    def __init__(self, vocabulary: int, tokens: int, width: int, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position_embedding = nnx.Embed(tokens, width, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """(n, tokens) -> (n, tokens, width)."""
        positions = self.position_embedding.embedding[...][: tokens.shape[-1]]
        return self.token_embedding(tokens) + positions[None]


class CausalAttention(nnx.Module):
    """Self-attention of each token over those before it and itself."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nnx.Linear(width, width, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Array) -> Array:
        """(n, tokens, width) -> (n, tokens, width)."""
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, causal=True).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers."""

    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(..., width) -> (..., width)."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width, heads, hidden, activation, *, rngs: nnx.Rngs):
        self.layer_norm1, self.layer_norm2 = (layer_norm(width, rngs=rngs) for _ in range(2))
        self.self_attn = CausalAttention(width, heads, rngs=rngs)
        self.mlp = MLP(width, hidden, activation, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, tokens, width) -> (n, tokens, width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The layers."""

    def __init__(self, layers: int, *sizes, rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(*sizes, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: Array) -> Array:
        """(n, tokens, width) -> (n, tokens, width)."""
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPText(nnx.Module):
    """CLIP's text encoder, in the layout of its published weights; Stable Diffusion's by default.

    Args:
        vocabulary: number of tokens in the vocabulary.
        tokens: the largest number of tokens in a text.
        width: channels of the embedding.
        layers: number of layers.
        heads: number of heads, a divisor of `width`.
        hidden: channels of the hidden layers.
        activation: "quick_gelu" or "gelu".
        dtype: of the computations; None for that of the parameters.
        rngs: the source of the initial parameters.

    Call with integer tokens (..., n), n at most `tokens`. Returns the last hidden states behind the
    final norm, (..., n, width).

    Raises:
        ValueError: if a size is not positive or the activation unknown; if tokens are not integers
            of the vocabulary, or too many.

    Reference: Radford et al. 2021 (CLIP, arXiv 2103.00020), section 2.4.

    >>> text = CLIPText(vocabulary=9, tokens=7, width=8, layers=1, heads=2, hidden=16,
    ...     rngs=nnx.Rngs(0))
    >>> text(jnp.array([3, 1, 4])).shape
    (3, 8)
    """

    def __init__(
        self,
        *,
        vocabulary: int = 49408,
        tokens: int = 77,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        activation: str = "quick_gelu",
        dtype=None,
        rngs: nnx.Rngs,
    ):
        check_settings(rngs, vocabulary=vocabulary, tokens=tokens, layers=layers, heads=heads)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {[*ACTIVATIONS]}, got {activation!r}")
        self.dtype, self.vocabulary, self.tokens = dtype, vocabulary, tokens
        self.embeddings = Embeddings(vocabulary, tokens, width, rngs=rngs)
        self.encoder = Encoder(layers, width, heads, hidden, activation, rngs=rngs)
        self.final_layer_norm = layer_norm(width, rngs=rngs)

    def __call__(self, tokens: ArrayLike) -> Array:
        """(..., n) -> (..., n, width)."""
        tokens = jnp.asarray(tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.ndim:
            raise ValueError(
                f"tokens: expected integers (..., n), got {tokens.dtype} {tokens.shape}"
            )
        if tokens.shape[-1] > self.tokens:
            raise ValueError(f"tokens: expected at most {self.tokens}, got {tokens.shape[-1]}")
        message = "tokens: expected numbers of the vocabulary, got {}"
        check_that(lambda t: (t >= 0) & (t < self.vocabulary), message, tokens)

        def forward(network, tokens):
            network = cast(network, network.dtype)
            flat = network.embeddings(tokens.reshape(-1, tokens.shape[-1]))
            out = network.final_layer_norm(network.encoder(flat))
            return out.reshape(*tokens.shape, out.shape[-1])

        return with_auto_axes(forward, self, tokens)
