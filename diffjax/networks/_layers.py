"""What the networks share: flattening of batch axes, the time and class embedding, self-attention."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from diffjax._math import check_that

__all__ = [
    "Attention",
    "Embedding",
    "apply_flat",
    "apply_images",
    "apply_polymorphic",
    "batch_norm",
    "group_norm",
    "layer_norm",
    "modulate",
    "time_features",
    "zero_linear",
]

_FREQUENCIES = (
    1.0,
    256.0,
)  # radians per unit of t: slow enough for t in [-3, 3], fine enough to resolve 1/256 of [0, 1]


def apply_polymorphic(forward: Callable[..., Array], shape: tuple[int, ...], x, t, cond) -> Array:
    """`forward(x, t, cond)` for x of any leading axes, in x's dtype but at least float32.

    `forward` gets t and cond either with x's leading axes or, where they were scalars, with axes of length 1 in their
    place: an embedding shared by the batch is computed once.
    """
    x = jnp.asarray(x)
    split = x.ndim - len(shape)
    if split < 0 or x.shape[split:] != shape:
        raise ValueError(f"x must have shape (..., {', '.join(map(str, shape))}), got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating-point, got {x.dtype}")
    lead, dtype = x.shape[:split], jnp.promote_types(x.dtype, jnp.float32)

    def aligned(name: str, value):
        if value.shape not in ((), lead):
            raise ValueError(f"{name} must be a scalar or have x's leading shape {lead}, got shape {value.shape}")
        return value.reshape(value.shape or (1,) * split)

    t = aligned("t", jnp.asarray(t, dtype))
    if cond is not None:  # numbers stay concrete under jit, so that they can be checked
        cond = aligned("cond", cond if isinstance(cond, jax.Array) else np.asarray(cond))
    return forward(x, t, cond).astype(dtype)


def apply_flat(forward: Callable[..., Array], shape: tuple[int, ...], x, t, cond) -> Array:
    """As `apply_polymorphic`, for a `forward` that wants one batch axis (convolutions do)."""

    def flat(x, t, cond):
        rows = [None if value is None else value.reshape(value.size) for value in (t, cond)]
        return forward(x.reshape(-1, *shape), *rows).reshape(x.shape)

    return apply_polymorphic(flat, shape, x, t, cond)


def apply_images(forward: Callable[[Array], Array], size: int, x) -> Array:
    """`forward` of images (..., height, width, 3) in [0, 1], resized to (n, size, size, 3), in at least float32."""
    x = jnp.asarray(x)
    if x.ndim < 3 or x.shape[-1] != 3:
        raise ValueError(f"x must be images (..., height, width, 3), got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating-point, with values in [0, 1], got {x.dtype}")
    check_that(lambda x: (x >= 0) & (x <= 1), "x must have values in [0, 1]", x)
    flat = x.reshape(-1, *x.shape[-3:]).astype(jnp.promote_types(x.dtype, jnp.float32))
    flat = jax.image.resize(flat, (len(flat), size, size, 3), "bilinear", antialias=False)
    features = forward(flat)
    return features.reshape(*x.shape[:-3], features.shape[-1])


def time_features(t: Array, dim: int) -> Array:
    """Sines and cosines of t at `dim / 2` frequencies, geometric from 1 to 256 radians: (...) -> (..., dim).

    >>> time_features(jnp.zeros(2), 4)
    Array([[0., 0., 1., 1.],
           [0., 0., 1., 1.]], dtype=float32)
    """
    frequencies = jnp.geomspace(*_FREQUENCIES, dim // 2, dtype=t.dtype)
    phase = t[..., None] * frequencies.reshape(*(1,) * t.ndim, -1)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class Embedding(nnx.Module):
    """`silu(MLP(features(t) + table[cond]))`: (...) times and labels to (..., width), as in EDM's networks.

    Row `num_classes` of the table is the null token.
    """

    def __init__(self, width: int, num_classes: int | None, *, dtype=None, rngs: nnx.Rngs):
        if width < 4 or width % 2:
            raise ValueError(f"width must be even and at least 4, got {width}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, or None, got {num_classes}")
        self.width, self.num_classes = width, num_classes
        self.hidden = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        if num_classes is not None:  # rows as large as the time features
            init = nnx.initializers.normal(math.sqrt(0.5))
            self.table = nnx.Embed(num_classes + 1, width, embedding_init=init, rngs=rngs)

    def __call__(self, t: Array, cond: Array | None = None) -> Array:
        """The embedding of times and labels of one rank, where an axis of either may have length 1."""
        features = time_features(t, self.width)
        if self.num_classes is None:
            if cond is not None:
                raise ValueError("cond was given, but the network was built without num_classes")
        else:
            labels = jnp.full((1,) * t.ndim, self.num_classes) if cond is None else _checked(cond, self.num_classes)
            features = features + self.table(labels).astype(features.dtype)
        return jax.nn.silu(self.out(jax.nn.silu(self.hidden(features))))


def _checked(cond, num_classes: int) -> Array:
    if not jnp.issubdtype(cond.dtype, jnp.integer):
        raise ValueError(f"cond must be integer labels, got dtype {cond.dtype}")
    if not isinstance(cond, Tracer):
        labels = np.asarray(cond)
        if labels.size and (labels.min() < 0 or labels.max() > num_classes):
            bad = labels[(labels < 0) | (labels > num_classes)][0]
            raise ValueError(f"cond must lie in [0, {num_classes}] ({num_classes} is the null label), got {bad}")
    return jnp.asarray(cond)


class Attention(nnx.Module):
    """Multi-head self-attention over tokens, (n, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int, *, out_init=None, dtype=None, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        kernel_init = out_init or nnx.initializers.lecun_normal()
        self.out = nnx.Linear(width, width, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Attends over the second axis."""
        n, tokens, width = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(n, tokens, 3 * self.heads, width // self.heads), 3, axis=2)
        # Not jax.nn.dot_product_attention: its logits are float32 even where the network computes in float64.
        exact = jnp.promote_types(q.dtype, jnp.float32)
        logits = jnp.einsum("nqhc,nkhc->nhqk", q, k, preferred_element_type=exact) / math.sqrt(q.shape[-1])
        weights = jax.nn.softmax(logits).astype(v.dtype)
        return self.out(jnp.einsum("nhqk,nkhc->nqhc", weights, v).reshape(n, tokens, width))


# The norms compute the variance as E (x - E x)^2. NNX's default, E x^2 - (E x)^2, is wrong by about
# (mean / std)^2 roundings: by a thousandfold for a mean of 3000 standard deviations in float32.


def layer_norm(width: int, *, dtype=None, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm without scale and bias."""
    settings = {"use_bias": False, "use_scale": False, "use_fast_variance": False}
    return nnx.LayerNorm(width, **settings, dtype=dtype, rngs=rngs)


def group_norm(channels: int, *, dtype=None, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """A group norm of at most 32 groups of at least 4 channels."""
    groups = math.gcd(channels, min(32, channels // 4))
    return nnx.GroupNorm(channels, groups, use_fast_variance=False, dtype=dtype, rngs=rngs)


def batch_norm(channels: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """A batch norm that uses its running statistics."""
    settings = {"epsilon": 1e-3, "use_running_average": True, "use_fast_variance": False}
    return nnx.BatchNorm(channels, **settings, rngs=rngs)


def zero_linear(inputs: int, outputs: int, *, dtype=None, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer whose kernel and bias start at zero."""
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)


def modulate(x: Array, scale: Array, shift: Array) -> Array:
    """`x (1 + scale) + shift`, with scale and shift (*batch, channels) for x (*batch, ..., channels)."""
    middle = (1,) * (x.ndim - scale.ndim)
    scale, shift = (a.reshape(*a.shape[:-1], *middle, a.shape[-1]) for a in (scale, shift))
    return x * (1 + scale) + shift
