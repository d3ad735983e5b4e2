"""Neural networks as Flax NNX modules: `network(x, t, cond=None, key=None)`, of the shape of x.

They take one sample or any leading batch axes. Without dropout a batched call equals the mapped
one. An NNX module is a pytree, so `jit`, `grad`, `vmap` and `bind` take a network as it is. A
network draws random numbers only for dropout, from the key of the call. On a mesh with explicit
axes the output is sharded as x. The guide is `docs/networks.md`.
"""

from ._layers import Attention, ClassEmbedding
from .controlnet import ControlNet, controlled, guess_weights
from .dit import DiT
from .mlp import MLP
from .unet import Residuals, UNet

__all__ = [
    "MLP",
    "Attention",
    "ClassEmbedding",
    "ControlNet",
    "DiT",
    "Residuals",
    "UNet",
    "controlled",
    "guess_weights",
]
