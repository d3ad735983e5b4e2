"""Shared parts of the networks: checks, batch axes, embeddings, norms, dropout, attention."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from .._checks import as_float, check_that, is_concrete

__all__ = [
    "Attention",
    "ClassEmbedding",
    "Embedding",
    "apply_flat",
    "apply_images",
    "apply_polymorphic",
    "attend",
    "batch_norm",
    "cast",
    "check_grid_shape",
    "check_settings",
    "condition_of",
    "dropout",
    "group_norm",
    "keys_from",
    "layer_norm",
    "modulate",
    "time_features",
    "with_auto_axes",
    "zero_linear",
]

# Radians per unit of t: slow enough for t in [-3, 3], fine enough to resolve 1/256 of [0, 1].
_FREQUENCIES = (1.0, 256.0)


def check_settings(
    rngs, *, num_classes: int | None = None, dropout: float = 0.0, **sizes: int
) -> None:
    """Raises ValueError if a setting that the constructors share is wrong."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"rngs: expected a flax.nnx.Rngs, such as nnx.Rngs(0) or nnx.Rngs(key), "
            f"got {_kind(rngs)}"
        )
    if num_classes is not None:
        sizes["num_classes"] = num_classes
    for name, size in sizes.items():
        if not (isinstance(size, int | np.integer) and size >= 1):
            raise ValueError(f"{name}: expected a positive integer, got {size!r}")
    if not (isinstance(dropout, float | int | np.number) and 0 <= dropout < 1):
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")


def check_grid_shape(shape, dims: Sequence[int] = (2,)) -> tuple[int, ...]:
    """The shape as a tuple. ValueError unless it has an admitted rank and channels last."""
    sizes = tuple(shape) if np.ndim(shape) else (shape,)
    positive = all(isinstance(size, int | np.integer) and size >= 1 for size in sizes)
    if len(sizes) - 1 not in dims or not positive:
        names = [("length",), ("height", "width"), ("depth", "height", "width")]
        expected = " or ".join(f"({', '.join(names[n - 1])}, channels)" for n in dims)
        raise ValueError(
            f"shape: expected positive integers {expected}, the sizes of one sample without batch "
            f"axes, got {shape}; MLP is the network for vectors"
        )
    if len(sizes) == 3 and sizes[0] in (1, 3, 4) and sizes[1] == sizes[2] > 4:
        raise ValueError(
            f"shape: expected channels last, (height, width, channels), got {shape}, which looks "
            f"like channels first; give {(*sizes[1:], sizes[0])}, and images by "
            f"jnp.moveaxis(images, -3, -1)"
        )
    return sizes


def apply_polymorphic(
    forward: Callable[..., Any], network, shape: tuple[int, ...], x, t, cond, key, *others
) -> Any:
    """`forward(network, x, embedding, key, *others)` for x of any leading axes.

    The embedding of t and cond has x's leading axes, or axes of length 1 in their place where t and
    cond are those of one sample: an embedding shared by the batch is computed once.

    The others are pytrees of arrays. The result is a pytree of arrays with x's leading axes.

    The precision is decided here. Input, output and embedding are float32, or what x is if that is
    more precise. `forward` gets everything in `network.dtype`, including a copy of the parameters.
    The norms and the softmax always compute in at least float32.
    """
    x = as_float(jnp.asarray(x), "x")
    split = x.ndim - len(shape)
    if split < 0 or x.shape[split:] != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(
            f"x: expected shape (..., {expected}), any batch axes before the shape that the "
            f"network was built for, got {x.shape}"
        )
    lead = x.shape[:split]
    t = jnp.asarray(t, x.dtype)
    if t.shape not in ((), lead):
        raise ValueError(f"t: expected a scalar or x's leading shape {lead}, got shape {t.shape}")
    if network.condition is None and cond is not None:
        raise ValueError(
            f"cond: expected None, because the network was built without num_classes and "
            f"condition, got {_kind(cond)}"
        )
    if isinstance(network.condition, ClassEmbedding):
        cond = network.condition.check(cond)
    if key is not None:
        _check_key(key)

    def embedded(network, x, t, cond, key, others):
        rows = None
        if network.condition is not None:
            rows = _embed_condition(network.condition, cond, lead, x.dtype)
        embedding = network.embed(t.reshape(t.shape or (1,) * split), rows)
        (network, x, embedding), others = cast(((network, x, embedding), others), network.dtype)
        return forward(network, x, embedding, key, *others)

    key = key if network.dropout else None
    return cast(with_auto_axes(embedded, network, x, t, cond, key, others), x.dtype)


def cast(tree, dtype):
    """The tree with its floating-point arrays in a dtype; the tree itself if that is None."""

    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return tree if dtype is None else jax.tree.map(cast, tree)


def _embed_condition(condition, cond, lead: tuple[int, ...], dtype) -> Array:
    """`condition(cond)`. That of one sample gets axes of length 1 for x's leading axes."""
    rows = condition(cond)
    if rows.shape[:-1] not in ((), lead):
        raise ValueError(
            f"cond: expected that of one sample or of x's leading shape {lead}, "
            f"got one of shape {rows.shape[:-1]}"
        )
    return rows.reshape(*(rows.shape[:-1] or (1,) * len(lead)), rows.shape[-1]).astype(dtype)


def apply_flat(
    forward: Callable[..., Any], network, shape: tuple[int, ...], x, t, cond, key, *others
) -> Any:
    """As `apply_polymorphic`, for a `forward` that needs one batch axis, as convolutions do.

    The others have as many axes of one sample as x has, after x's leading axes or none.
    """

    def flat(network, x, embedding, key, *others):
        lead, rank = x.shape[: -len(shape)], len(shape)
        embedding = embedding.reshape(-1, embedding.shape[-1])
        others = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-rank:]), others)
        out = forward(network, x.reshape(-1, *shape), embedding, key, *others)
        return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), out)

    return apply_polymorphic(flat, network, shape, x, t, cond, key, *others)


def apply_images(forward: Callable[..., Array], network, size: int, x) -> Array:
    """`forward(network, images)` for images (..., height, width, 3) in [0, 1].

    `forward` gets them as (n, size, size, 3), in at least float32.
    """
    x = jnp.asarray(x)
    if x.ndim < 3 or x.shape[-1] != 3:
        raise ValueError(f"x: expected images (..., height, width, 3), got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x: expected a floating-point dtype, with values in [0, 1], got {x.dtype}"
        )
    check_that(lambda x: (x >= 0) & (x <= 1), "x: expected values in [0, 1]", x)
    x = as_float(x, "x")

    def resized(network, x):
        flat = x.reshape(-1, *x.shape[-3:])
        flat = jax.image.resize(flat, (len(flat), size, size, 3), "bilinear", antialias=False)
        features = forward(network, flat)
        return features.reshape(*x.shape[:-3], features.shape[-1])

    return with_auto_axes(resized, network, x)


def with_auto_axes(forward: Callable[..., Any], network, x, *args) -> Any:
    """`forward(network, x, *args)`, whose leading axes are sharded as those of x.

    On a mesh with explicit axes a reshape or a gather needs a sharding where several are possible.
    Inside a network the compiler chooses them.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves((x, args, network))]
    mesh = next((s.mesh for s in shardings if s.mesh.explicit_axes), None)
    if mesh is None:
        return forward(network, x, *args)
    out = NamedSharding(mesh, jax.typeof(x).sharding.spec)
    with_auto_axes: Any = jax.sharding.auto_axes(
        forward, axes=tuple(mesh.explicit_axes), out_sharding=out
    )
    return with_auto_axes(network, x, *args)


def _check_key(key) -> None:
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32
    if not ((typed and key.ndim == 0) or (raw and key.ndim == 1)):
        raise ValueError(
            "key: expected one jax.random.key for the whole call, or None for no dropout, "
            f"got {_kind(key)}; jax.vmap over the call gives each sample its own key"
        )


def _kind(value) -> str:
    """What a value is, for a message: an array's dtype and shape, or the type."""
    return str(jax.typeof(value)) if isinstance(value, jax.Array) else type(value).__name__


def keys_from(key: Array | None) -> Iterator[Array | None]:
    """Yields different keys made of one key, without end. Without a key, it yields None."""
    return (None if key is None else jax.random.fold_in(key, i) for i in itertools.count())


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Sets each entry to 0 with probability `rate`, and divides the others by `1 - rate`.

    The expectation of the result is x. Without a key it is x itself.

    Reference: Srivastava et al. 2014 (JMLR 15), section 10, for the scaling in training.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def time_features(t: Array, dim: int) -> Array:
    """Sines and cosines of t at `dim / 2` frequencies: (...) -> (..., dim).

    The frequencies are a geometric sequence from 1 to 256 radians.

    >>> time_features(jnp.zeros(2), 4)
    Array([[0., 0., 1., 1.],
           [0., 0., 1., 1.]], dtype=float32)
    """
    frequencies = jnp.geomspace(*_FREQUENCIES, dim // 2, dtype=t.dtype)
    phase = t[..., None] * frequencies.reshape(*(1,) * t.ndim, -1)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class Embedding(nnx.Module):
    """`silu(MLP(features(t) + condition))`, as in EDM's networks."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        if width < 4 or width % 2:
            raise ValueError(f"width: expected an even number of at least 4, got {width}")
        self.width = width
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, t: Array, condition: Array | None = None) -> Array:
        """The embedding (..., width). Axes of t (...) and of condition (..., width) broadcast."""
        features = time_features(t, self.width)
        if condition is not None:
            if condition.shape[-1] != self.width:
                raise ValueError(
                    f"condition: expected vectors of the network's width {self.width}, "
                    f"got {condition.shape[-1]} channels"
                )
            features = features + condition
        return jax.nn.silu(self.out(jax.nn.silu(self.hidden(features))))


class ClassEmbedding(nnx.Module):
    """Class labels as vectors: `condition(cond) = table[cond]`, with a last row for "no class".

    A network with `num_classes=` uses it. It can also be one part of a condition of your own.

    Args:
        num_classes: the number K of class labels.
        width: channels of a vector: the width of the network.
        rngs: the source of the initial table. Its standard deviation is `sqrt(1/2)`, as that of the
            time features.

    Attributes:
        null: K, the label that means "no class".

    Call with integer labels in [0, K] of any shape (...), or None for no class. Returns
    (..., width). A label outside [0, K] that jax traces cannot raise an error; its vector is NaN.

    Raises:
        ValueError: if num_classes or width is not a positive integer, or `rngs` is a key; if labels
            are not integers in [0, K].

    >>> embed = ClassEmbedding(10, 4, rngs=nnx.Rngs(0))
    >>> embed(jnp.array([3, 7])).shape, bool((embed(None) == embed(embed.null)).all())
    ((2, 4), True)
    """

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        check_settings(rngs, num_classes=num_classes, width=width)
        self.null = num_classes
        init = nnx.initializers.normal(math.sqrt(0.5))
        self.table = nnx.Embed(num_classes + 1, width, embedding_init=init, rngs=rngs)

    def __call__(self, cond) -> Array:
        """The vectors (..., width) of the labels (...)."""
        rows = jnp.asarray(self.table.embedding[...]).at[self.check(cond)]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def check(self, cond):
        """The labels as an array; numbers stay concrete under jit, so that they can be checked."""
        if cond is None:
            return np.asarray(self.null)
        cond = cond if isinstance(cond, jax.Array) else np.asarray(cond)
        if not jnp.issubdtype(cond.dtype, jnp.integer):
            raise ValueError(f"cond: expected integer labels, got dtype {cond.dtype}")
        if is_concrete(cond):
            labels = np.asarray(cond)
            bad = labels[(labels < 0) | (labels > self.null)]
            if bad.size:
                raise ValueError(
                    f"cond: expected labels in [0, {self.null}], where {self.null} means no class, "
                    f"got {bad[0]}"
                )
        return cond


def condition_of(num_classes: int | None, condition, width: int, rngs: nnx.Rngs):
    """The embedding of a network's conditions: a table of classes, the user's function, or None."""
    if num_classes is None:
        return condition
    if condition is not None:
        raise ValueError(
            f"condition: expected None beside num_classes={num_classes}; "
            f"a condition of your own can hold a ClassEmbedding"
        )
    return ClassEmbedding(num_classes, width, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention of tokens over themselves, or over the tokens of a context.

    `concat_h softmax(q_h k_h^T / sqrt(width / heads)) v_h`, then a linear layer, with q linear in
    x, and k and v linear in x or in the context.

    Args:
        width: channels of a token of x.
        heads: number of heads, a divisor of `width`.
        context: channels of a token of the context; None for self-attention.
        out_init: the initializer of the last layer's kernel; `nnx.initializers.zeros` makes a new
            branch zero.
        rngs: the source of the initial parameters.

    Call with x (n, tokens, width) and, for cross-attention, context (n, tokens of the context,
    channels). Returns an array of the shape of x.

    Raises:
        ValueError: if heads does not divide width; if a context is given without `context=`, or is
            missing; if x or the context has another shape.

    Reference: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.

    >>> attend = Attention(8, 2, context=5, rngs=nnx.Rngs(0))
    >>> attend(jnp.ones((3, 4, 8)), jnp.ones((3, 7, 5))).shape
    (3, 4, 8)
    """

    def __init__(
        self, width: int, heads: int, *, context: int | None = None, out_init=None, rngs: nnx.Rngs
    ):
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.heads, self.context = heads, context
        if context is None:
            self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        else:
            self.q = nnx.Linear(width, width, rngs=rngs)
            self.kv = nnx.Linear(context, 2 * width, rngs=rngs)
        kernel_init = out_init or nnx.initializers.lecun_normal()
        self.out = nnx.Linear(width, width, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Attends over the second axis, of x or of the context."""
        if (context is None) != (self.context is None):
            tokens = f"tokens of {self.context} channels"
            expected = "None, for self-attention" if self.context is None else tokens
            raise ValueError(f"context: expected {expected}, got {_kind(context)}")
        _check_tokens("x", x, self.out.in_features)
        if context is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            _check_tokens("context", context, self.context)
            (q,), (k, v) = self._heads(self.q(x), 1), self._heads(self.kv(context), 2)
        return self.out(attend(q, k, v).reshape(x.shape))

    def _heads(self, x: Array, parts: int) -> list[Array]:
        """Splits (n, tokens, parts * width) into parts (n, tokens, heads, width / heads)."""
        n, tokens, channels = x.shape
        heads = parts * self.heads
        return jnp.split(x.reshape(n, tokens, heads, channels // heads), parts, axis=2)


def attend(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    """`softmax(q k^T / sqrt(c)) v` for q (n, tokens, heads, c), k and v (n or 1, others, heads, c).

    With `causal`, a token sees itself and those before it.
    """
    k, v = (jnp.broadcast_to(a, (q.shape[0], *a.shape[1:])) for a in (k, v))
    # The logits of jax.nn.dot_product_attention are float32 even if the inputs are float64.
    exact = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("nqhc,nkhc->nhqk", q, k, preferred_element_type=exact)
    logits = logits / math.sqrt(q.shape[-1])
    if causal:
        seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("nhqk,nkhc->nqhc", weights, v)


def _check_tokens(name: str, tokens: Array, channels: int | None) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != channels:
        raise ValueError(f"{name}: expected shape (n, tokens, {channels}), got {tokens.shape}")


# The norms compute the variance as E (x - E x)^2. The error of NNX's default, E x^2 - (E x)^2, is
# about (mean / std)^2 roundings: in float32 a factor of 1000 where the mean is 3000 deviations.


def layer_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm without scale and bias."""
    return nnx.LayerNorm(width, use_bias=False, use_scale=False, use_fast_variance=False, rngs=rngs)


def group_norm(channels: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """A group norm of at most 32 groups of at least 4 channels."""
    groups = math.gcd(channels, min(32, channels // 4))
    return nnx.GroupNorm(channels, groups, use_fast_variance=False, rngs=rngs)


def batch_norm(channels: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """A batch norm that uses its running statistics."""
    return nnx.BatchNorm(
        channels, epsilon=1e-3, use_running_average=True, use_fast_variance=False, rngs=rngs
    )


def zero_linear(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer whose kernel and bias start at zero."""
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.zeros, rngs=rngs)


def modulate(x: Array, scale: Array, shift: Array) -> Array:
    """`x (1 + scale) + shift` for x (*batch, ..., channels), scale and shift (*batch, channels)."""
    middle = (1,) * (x.ndim - scale.ndim)
    scale, shift = (a.reshape(*a.shape[:-1], *middle, a.shape[-1]) for a in (scale, shift))
    return x * (1 + scale) + shift
