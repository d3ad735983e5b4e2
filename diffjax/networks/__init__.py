"""Neural networks as Flax NNX modules: `network(x, t, cond=None) -> out`, of the shape of x.

They take one sample or any leading batch axes, and a batched call equals the mapped one. An NNX module is a pytree, so a
network goes through `jit`, `grad` and `vmap`, and into `bind`, as it is. There is no dropout: a network draws no noise.
"""

from diffjax.networks.dit import DiT
from diffjax.networks.mlp import MLP
from diffjax.networks.unet import UNet

__all__ = ["MLP", "DiT", "UNet"]
