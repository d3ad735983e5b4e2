"""Neural networks as Flax NNX modules: `network(x, t, cond=None, key=None) -> out`, of the shape of x.

They take one sample or any leading batch axes, and without dropout a batched call equals the mapped
one. An NNX module is a pytree, so a network goes through `jit`, `grad` and `vmap`, and into `bind`, as
it is. A network draws random numbers only for dropout, from the key of the call. On a mesh with
explicit axes the output is sharded as x. The guide is `docs/networks.md`.

`inception_v3` and `efficientnet_lite0` map images to the features whose Fréchet distance (`metrics`)
compares sets of them.
"""

from diffjax.networks.dit import DiT
from diffjax.networks.efficientnet import EfficientNetLite0, efficientnet_lite0
from diffjax.networks.inception import InceptionV3, inception_v3
from diffjax.networks.mlp import MLP
from diffjax.networks.unet import UNet

__all__ = ["MLP", "DiT", "EfficientNetLite0", "InceptionV3", "UNet", "efficientnet_lite0", "inception_v3"]
