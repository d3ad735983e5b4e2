"""The Inception-v3 of the Fréchet Inception distance."""

import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ..networks._layers import apply_images, batch_norm, check_settings
from ..torch_files import load_tensors, read_tensors

__all__ = ["InceptionV3", "inception_v3"]


def inception_v3(path: str | pathlib.Path) -> "InceptionV3":
    """The `InceptionV3` with the weights of a file.

    The FID's published file is `pt_inception-2015-12-05-6726825d.pth`.

    Args:
        path: a state dict, safetensors or torch's.

    Returns:
        The network.

    Raises:
        ValueError: if the file cannot be read (`read_tensors`) or does not fit (`load_tensors`).

    >>> inception_v3("README.md")
    Traceback (most recent call last):
    ValueError: path: expected a file of safetensors or a state dict of torch.save, got README.md,
    ...
    """
    tensors = read_tensors(path)
    return load_tensors(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))), tensors)


class InceptionV3(nnx.Module):
    """Inception-v3 as the FID uses it, for inference.

    It is the network of 2015 on which the FID is defined. It differs from the paper's in three
    places: it has 1008 classes, average pools that do not count the padding, and a max pool in the
    last block. Batch norms use their running statistics. Images of any size are resized to
    299 x 299, bilinearly without antialiasing, and scaled to [-1, 1]. Convolutions run in full
    float32 precision, so that an FID can be compared across devices.

    Args:
        rngs: the source of the initial parameters; the published ones come with `inception_v3`.

    Attributes:
        fc: the last layer: `network.fc(network(x))` are the logits (..., 1008), for the Inception
            score.

    Call with images (..., height, width, 3) in [0, 1]. Returns the features (..., 2048) of the last
    average pool.

    Raises:
        ValueError: if x has another shape, the dtype is not floating-point, or values are outside
            [0, 1] (checked unless traced).

    Reference: Szegedy et al. 2016 (arXiv 1512.00567); Heusel et al. 2017 (arXiv 1706.08500) for the
    FID.

    >>> network = nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0)))  # its structure alone
    >>> jax.eval_shape(lambda network: network(jnp.ones((8, 32, 32, 3))), network).shape
    (8, 2048)
    """

    def __init__(self, *, rngs: nnx.Rngs):
        check_settings(rngs)
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, strides=2, padding="VALID", rngs=rngs)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding="VALID", rngs=rngs)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, rngs=rngs)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding="VALID", rngs=rngs)
        self.Mixed_5b = BlockA(192, 32, rngs=rngs)
        self.Mixed_5c = BlockA(256, 64, rngs=rngs)
        self.Mixed_5d = BlockA(288, 64, rngs=rngs)
        self.Mixed_6a = BlockB(288, rngs=rngs)
        self.Mixed_6b = BlockC(768, 128, rngs=rngs)
        self.Mixed_6c = BlockC(768, 160, rngs=rngs)
        self.Mixed_6d = BlockC(768, 160, rngs=rngs)
        self.Mixed_6e = BlockC(768, 192, rngs=rngs)
        self.Mixed_7a = BlockD(768, rngs=rngs)
        self.Mixed_7b = BlockE(1280, _mean_pool, rngs=rngs)
        self.Mixed_7c = BlockE(2048, _max_pool, rngs=rngs)
        self.fc = nnx.Linear(2048, 1008, precision="highest", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """The features (..., 2048) of images (..., height, width, 3) in [0, 1]."""
        return apply_images(InceptionV3._forward, self, 299, x)

    def _forward(self, x: Array) -> Array:
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(h)))
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(h))))
        h = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h))).mean((1, 2))


class ConvNorm(nnx.Module):
    """`relu(BN(conv(x)))`."""

    def __init__(
        self, inputs: int, outputs: int, kernel, *, strides=1, padding="SAME", rngs: nnx.Rngs
    ):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        settings = {
            "strides": strides,
            "padding": padding,
            "use_bias": False,
            "precision": "highest",
        }
        self.conv = nnx.Conv(inputs, outputs, kernel, **settings, rngs=rngs)
        self.bn = batch_norm(outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, height, width, inputs) -> (n, height', width', outputs)."""
        return jax.nn.relu(self.bn(self.conv(x)))


class BlockA(nnx.Module):
    """Parallel branches of 1 x 1, 5 x 5, two 3 x 3, and a pool: 224 + `pooled` channels."""

    def __init__(self, inputs: int, pooled: int, *, rngs: nnx.Rngs):
        self.branch1x1 = ConvNorm(inputs, 64, 1, rngs=rngs)
        self.branch5x5_1 = ConvNorm(inputs, 48, 1, rngs=rngs)
        self.branch5x5_2 = ConvNorm(48, 64, 5, rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, rngs=rngs)
        self.branch_pool = ConvNorm(inputs, pooled, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, height, width, inputs) -> (n, height, width, outputs)."""
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_mean_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nnx.Module):
    """Halves the size by parallel 3 x 3, two 3 x 3, and a max pool; adds 480 channels."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3 = ConvNorm(inputs, 384, 3, strides=2, padding="VALID", rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, strides=2, padding="VALID", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, height, width, inputs) -> (n, height', width', outputs)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, _halve(x)], axis=-1)


class BlockC(nnx.Module):
    """Parallel branches of 1 x 1, one and two 7 x 7, and a pool: 768 channels.

    A 7 x 7 convolution is factored into 1 x 7 and 7 x 1 of `width` channels.
    """

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.branch1x1 = ConvNorm(inputs, 192, 1, rngs=rngs)
        self.branch7x7_1 = ConvNorm(inputs, width, 1, rngs=rngs)
        self.branch7x7_2 = ConvNorm(width, width, (1, 7), rngs=rngs)
        self.branch7x7_3 = ConvNorm(width, 192, (7, 1), rngs=rngs)
        self.branch7x7dbl_1 = ConvNorm(inputs, width, 1, rngs=rngs)
        self.branch7x7dbl_2 = ConvNorm(width, width, (7, 1), rngs=rngs)
        self.branch7x7dbl_3 = ConvNorm(width, width, (1, 7), rngs=rngs)
        self.branch7x7dbl_4 = ConvNorm(width, width, (7, 1), rngs=rngs)
        self.branch7x7dbl_5 = ConvNorm(width, 192, (1, 7), rngs=rngs)
        self.branch_pool = ConvNorm(inputs, 192, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, height, width, inputs) -> (n, height, width, outputs)."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_mean_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nnx.Module):
    """Halves the size by parallel 3 x 3, 7 x 7 with 3 x 3, and a max pool; adds 512 channels."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = ConvNorm(inputs, 192, 1, rngs=rngs)
        self.branch3x3_2 = ConvNorm(192, 320, 3, strides=2, padding="VALID", rngs=rngs)
        self.branch7x7x3_1 = ConvNorm(inputs, 192, 1, rngs=rngs)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), rngs=rngs)
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), rngs=rngs)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, strides=2, padding="VALID", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, height, width, inputs) -> (n, height', width', outputs)."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), _halve(x)]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nnx.Module):
    """1 x 3 beside 3 x 1, after a 1 x 1 and after a 3 x 3, a 1 x 1, and a pool: 2048 channels."""

    def __init__(self, inputs: int, pool, *, rngs: nnx.Rngs):
        self.pool = pool
        self.branch1x1 = ConvNorm(inputs, 320, 1, rngs=rngs)
        self.branch3x3_1 = ConvNorm(inputs, 384, 1, rngs=rngs)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), rngs=rngs)
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, rngs=rngs)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), rngs=rngs)
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), rngs=rngs)
        self.branch_pool = ConvNorm(inputs, 192, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(n, height, width, inputs) -> (n, height, width, outputs)."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


def _halve(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


def _mean_pool(x: Array) -> Array:
    means = nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
    return means.astype(x.dtype)  # the count of NNX has jax's default dtype


def _max_pool(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), padding="SAME")
