"""Fashion-MNIST, 70,000 real 28x28 images of clothes: a class-conditional U-Net or DiT, with the report of `digits`.

    apt-get install dataset-fashion-mnist        # on Debian; or the four idx .gz files from anywhere
    python -m experiments.fashion_mnist --data-dir /usr/share/datasets/fashion-mnist             # ten minutes on a CPU
    python -m experiments.fashion_mnist --data-dir ... --model unet --width 128 --depth 3 --steps 50000 --batch 256 \
        --dtype bfloat16 --samples 10000                                                         # on a GPU

`--data-dir` or the environment variable DIFFJAX_DATA names the folder. Everything goes to runs/fashion_mnist/.
"""

import dataclasses
import gzip
import os
import pathlib
from typing import Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from diffjax.networks import DiT, UNet
from experiments import images

NAMES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
EVENT = (28, 28, 1)
FILES = {  # the idx files, and the shapes that they must hold
    "train-images-idx3-ubyte.gz": (60_000, 28, 28),
    "train-labels-idx1-ubyte.gz": (60_000,),
    "t10k-images-idx3-ubyte.gz": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10_000,),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the Fashion-MNIST experiment."""

    data_dir: pathlib.Path | None = None
    """the folder of the four idx .gz files; the environment variable DIFFJAX_DATA unless given"""
    out: pathlib.Path = pathlib.Path("runs/fashion_mnist")
    """where figures, scores and checkpoints go; a run in a folder that holds one continues it"""
    model: Literal["dit", "unet"] = "dit"
    """the network"""
    width: int = 128
    """channels of the network"""
    depth: int = 4
    """blocks of the DiT, or residual blocks a level of the U-Net"""
    patch: int = 4
    """side of the DiT's patches"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the network computes in; parameters and sampler stay float32"""
    steps: int = 1800
    """training steps"""
    batch: int = 64
    """images a step"""
    learning_rate: float = 1e-3
    """the peak, after warm-up and before cosine decay"""
    weight_decay: float = 0.01
    """of AdamW"""
    label_dropout: float = 0.1
    """share of labels replaced by the null label"""
    guidance: float = 1.5
    """guidance scale of the guided samples; 1 is none"""
    sampling_steps: int = 12
    """Heun steps of the scored samples, two evaluations each"""
    samples: int = 1000
    """how many samples are scored, the same number of training images beside them"""
    nfe: tuple[int, ...] = (4, 8, 16)
    """network evaluations of the points of the quality curve"""
    likelihood_images: int = 64
    """held-out images whose likelihood is estimated"""
    exact_images: int = 1
    """held-out images whose likelihood is computed with the exact trace (784 products an evaluation), too"""
    tolerance: float = 1e-3
    """of the ODE solver for the likelihood"""
    seed: int = 0
    """of everything random"""
    tensorboard: bool = False
    """also write the loss for TensorBoard"""


def read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """One idx file of unsigned bytes: a magic number, the shape as big-endian int32, and the data."""
    how = "On Debian `apt-get install dataset-fashion-mnist` puts the files into /usr/share/datasets/fashion-mnist."
    if not path.is_file():
        raise FileNotFoundError(f"data-dir: {path} is missing. {how}")
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError) as error:
        raise ValueError(f"data-dir: {path} is truncated or damaged ({error}). {how}") from error
    header = 4 + 4 * len(shape)
    expected = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    if content[:header] != expected or len(content) != header + int(np.prod(shape)):
        raise ValueError(f"data-dir: {path} does not hold unsigned bytes of shape {shape}. {how}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load(directory: pathlib.Path | None) -> images.Images:
    directory = directory or os.environ.get("DIFFJAX_DATA")
    if not directory:
        raise ValueError(
            "data-dir: expected the folder of the four idx .gz files, by --data-dir or DIFFJAX_DATA; got none"
        )
    train, train_labels, held_out, held_out_labels = (
        read_idx(pathlib.Path(directory) / name, shape) for name, shape in FILES.items()
    )
    return images.Images(train, train_labels, held_out, held_out_labels, levels=256, classes=10)


def make_network(settings: Settings) -> DiT | UNet:
    common = dict(num_classes=10, dtype=jnp.dtype(settings.dtype), rngs=nnx.Rngs(settings.seed))
    if settings.model == "unet":
        return UNet(EVENT, width=settings.width, blocks=settings.depth, attention=(7,), **common)
    heads = max(settings.width // 32, 1)
    return DiT(
        EVENT, patch=settings.patch, width=settings.width, depth=settings.depth, heads=heads, expansion=4, **common
    )


def main(settings: Settings) -> dict:
    data = load(settings.data_dir)
    return images.run("Fashion-MNIST", make_network(settings), data, EVENT, settings, NAMES)


if __name__ == "__main__":
    main(tyro.cli(Settings))
