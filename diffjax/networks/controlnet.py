"""ControlNet: a trainable copy of a U-Net's way down adds a control to the frozen network."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

from .._bind import bind
from .._checks import described
from ..typing import Network
from ._layers import apply_flat, check_settings, keys_from
from .unet import Residuals, UNet, encode

__all__ = ["ControlNet", "controlled", "guess_weights"]


class ControlNet(nnx.Module):
    """The control of a trained U-Net by an image of the same size, such as edges or a mask.

    It holds a trainable copy of the U-Net's way down and middle. A small convolutional network
    takes the hint to the width of the first level, and its output is added after the first
    convolution. Each activation that the U-Net stores, and the output of the middle, passes a 1x1
    convolution `Z` and is added to that of the U-Net:

        y_c = F(x; Theta) + Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)

    All Z, and the last convolution of the hint's network, start at zero, so that the controlled
    network begins as the U-Net, bitwise. The first step of training therefore moves the 1x1
    convolutions alone, the second one also the copy and the hint's last convolution, and the third
    one the rest.

    Args:
        unet: the trained U-Net. Its parameters are copied: training changes the copy alone.
        channels: channels of the hint.
        widths: channels of the hint's hidden convolutions.
        rngs: the source of the hint network's initial parameters.

    Call with x, t and cond as for the U-Net, and the hint: (..., *sizes of x, channels), of x's
    leading axes or one for all. Returns `Residuals`, which the U-Net takes. `controlled` makes a
    network of both.

    Raises:
        ValueError: if `unet` is no UNet, `rngs` is a key or a size is not positive; if the hint has
            another shape.

    Reference: Zhang et al. 2023 (ControlNet, arXiv 2302.05543); (1.43), (1.44).

    >>> unet = UNet((8, 8, 1), width=8, multipliers=(1,), blocks=1, rngs=nnx.Rngs(0))
    >>> control = ControlNet(unet, 3, rngs=nnx.Rngs(1))
    >>> network = controlled(unet, [(control, jnp.ones((8, 8, 3)), 1.0)])
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> bool((jax.jit(network)(x, 0.5) == jax.jit(unet)(x, 0.5)).all())
    True
    """

    def __init__(
        self, unet: UNet, channels: int, *, widths: Sequence[int] = (16, 32), rngs: nnx.Rngs
    ):
        if not isinstance(unet, UNet):
            raise ValueError(f"unet: expected a UNet, got {described(unet)}")
        sizes = {f"widths[{i}]": width for i, width in enumerate(widths)}
        check_settings(rngs, channels=channels, **sizes)
        self.shape, self.hint_shape = unet.shape, (*unet.shape[:-1], channels)
        self.dropout, self.dtype = unet.dropout, unet.dtype
        parts = unet.embed, unet.condition, unet.inputs, unet.down, unet.middle
        parts = jax.tree.map(jnp.copy, parts)
        self.embed, self.condition, self.inputs, self.down, self.middle = parts
        dims, width = len(unet.shape) - 1, unet.inputs.out_features
        inputs = (channels, *widths)
        self.hint = nnx.List(
            [nnx.Conv(a, b, (3,) * dims, rngs=rngs) for a, b in zip(inputs, widths, strict=False)]
        )
        zeros = {"kernel_init": nnx.initializers.zeros, "rngs": rngs}
        self.hint_out = nnx.Conv(inputs[-1], width, (3,) * dims, **zeros)
        stored, h = nnx.eval_shape(lambda unet: _activations(unet), unet)
        self.stored_out = nnx.List([nnx.Linear(a.shape[-1], a.shape[-1], **zeros) for a in stored])
        self.middle_out = nnx.Linear(h.shape[-1], h.shape[-1], **zeros)

    def __call__(self, x: Array, t, hint: ArrayLike, cond=None, key=None) -> Residuals:
        """What the hint adds to the activations of the U-Net for x (..., *shape) at time t."""
        lead, rank = jnp.shape(x)[: jnp.ndim(x) - len(self.shape)], len(self.shape)
        shape = jnp.shape(hint)
        if shape[-rank:] != self.hint_shape or shape[:-rank] not in ((), lead):
            raise ValueError(
                f"hint: expected shape {self.hint_shape}, or that after x's leading axes {lead}, "
                f"got {shape}"
            )
        hint = jnp.asarray(hint, jnp.result_type(x))
        return apply_flat(ControlNet._forward, self, self.shape, x, t, cond, key, hint)

    def _forward(self, x: Array, embedding: Array, key: Array | None, hint: Array) -> Residuals:
        for conv in self.hint:
            hint = jax.nn.silu(conv(hint))
        h = self.inputs(x) + self.hint_out(hint)
        stored, h = encode(self, h, embedding, keys_from(key))
        out = [conv(a) for conv, a in zip(self.stored_out, stored, strict=True)]
        return Residuals(tuple(out), self.middle_out(h))


def _activations(unet):
    x = jnp.zeros((1, *unet.shape))
    embedding = jnp.zeros((1, unet.inputs.out_features))
    return encode(unet, unet.inputs(x), embedding, keys_from(None))


def controlled(unet: Callable[..., Array], controls: Sequence[tuple]) -> Network:
    """A U-Net with one or several controls, `network(x, t, cond=None, key=None)`.

    The residuals of the controls are multiplied by their weights and added up. The result is a
    pytree of the networks, the hints and the weights: all may be differentiated and mapped.

    Args:
        unet: the U-Net, or one with the same activations; one of Stable Diffusion, too.
        controls: for each control `(net, hint, weight)`: a `ControlNet`; its hint; and a scalar, a
            function of time, or one number for each activation, the middle last, such as
            `guess_weights(net)`.

    Returns:
        The network. `bind(network, cond=label)` makes what `as_denoiser` takes.

    Raises:
        ValueError: if a control is not a triple; when it is called, if a hint or a weight has
            another shape.

    Reference: Zhang et al. 2023 (ControlNet, arXiv 2302.05543); (1.44).

    >>> unet = UNet((8, 8, 1), width=8, multipliers=(1,), blocks=1, rngs=nnx.Rngs(0))
    >>> edges, mask = (ControlNet(unet, 1, rngs=nnx.Rngs(i)) for i in (1, 2))
    >>> hint = jnp.ones((8, 8, 1))
    >>> network = controlled(unet, [(edges, hint, 1.0), (mask, hint, lambda t: 1.0 - t)])
    >>> jax.jit(network)(jnp.ones((2, 8, 8, 1)), 0.5).shape
    (2, 8, 8, 1)
    """
    for i, control in enumerate(controls):
        if not (isinstance(control, tuple) and len(control) == 3):
            raise ValueError(
                f"controls[{i}]: expected (net, hint, weight), got {described(control)}"
            )
    return bind(_controlled, unet, list(controls))


def _controlled(unet, controls, x, t, cond=None, key=None):
    parts = [
        _weighted(net(x, t, hint, cond, key), weight(t) if callable(weight) else weight)
        for net, hint, weight in controls
    ]
    residuals = jax.tree.map(lambda *a: sum(a), *parts) if parts else None
    return unet(x, t, cond, key, residuals=residuals)


def _weighted(residuals: Residuals, weight) -> Residuals:
    leaves, structure = jax.tree.flatten(residuals)
    weight = jnp.asarray(weight, leaves[0].dtype)
    if weight.shape not in ((), (len(leaves),)):
        raise ValueError(
            f"weight: expected a scalar, or one for each of the {len(leaves)} activations, "
            f"got shape {weight.shape}"
        )
    weights = jnp.broadcast_to(weight, (len(leaves),))
    return structure.unflatten([weights[i] * a for i, a in enumerate(leaves)])


def guess_weights(net: Any) -> Array:
    """The weights of guess mode, in which the control must do without a condition.

    They are spaced evenly in the logarithm, from 0.1 for the first stored activation to 1 for the
    middle: a control of a U-Net's coarse levels guides the content, and the fine levels are free.

    Args:
        net: a `ControlNet`, also one of Stable Diffusion.

    Returns:
        One weight for each stored activation, and one for the middle.

    Reference: Zhang et al. 2023 (ControlNet, arXiv 2302.05543), as in the released code.

    >>> unet = UNet((8, 8, 1), width=8, multipliers=(1,), blocks=1, rngs=nnx.Rngs(0))
    >>> guess_weights(ControlNet(unet, 1, rngs=nnx.Rngs(1))).round(3)
    Array([0.1  , 0.316, 1.   ], dtype=float32)
    """
    return jnp.logspace(-1.0, 0.0, len(net.stored_out) + 1)
