"""A class-conditional U-Net or DiT on Fashion-MNIST, 70,000 real 28x28 images of clothes.

    apt-get install dataset-fashion-mnist    # on Debian; or the four idx .gz files from anywhere
    # ten minutes on a CPU
    python -m experiments.image_models.fashion_mnist --data-dir /usr/share/datasets/fashion-mnist
    # on a GPU
    python -m experiments.image_models.fashion_mnist --data-dir ... --model unet --width 128 \
        --depth 3 --steps 50000 --batch 256 --dtype bfloat16 --samples 10000

`--data-dir` or the environment variable DIFFJAX_DATA names the folder. Everything goes to
runs/fashion_mnist/.
"""

import dataclasses
import gzip
import os
import pathlib
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from diffjax.networks import DiT, UNet
from experiments import image_models
from experiments.image_models import Images, study

NAMES = tuple("T-shirt trousers pullover dress coat sandal shirt sneaker bag boot".split())
EVENT = (28, 28, 1)
FILES = {  # the idx files and the shapes of their arrays
    "train-images-idx3-ubyte.gz": (60_000, 28, 28),
    "train-labels-idx1-ubyte.gz": (60_000,),
    "t10k-images-idx3-ubyte.gz": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10_000,),
}


@dataclasses.dataclass(frozen=True)
class Settings(image_models.Settings):
    """Settings of the Fashion-MNIST experiment."""

    data_dir: pathlib.Path | None = None
    """folder of the four idx .gz files; by default the environment variable DIFFJAX_DATA"""
    model: Literal["dit", "unet"] = "dit"
    """the network"""
    patch: int = 4
    """side of the DiT's patches"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the network's computations; parameters and sampler stay float32"""
    out: pathlib.Path = pathlib.Path("runs/fashion_mnist")
    steps: int = 1800
    batch: int = 64
    every: int = 900
    width: int = 128
    depth: int = 4
    sampling_steps: int = 12
    samples: int = 1000
    nfe: tuple[int, ...] = (4, 8, 16)
    likelihood_images: int = 64
    exact_images: int = 1
    tolerance: float = 1e-3


def read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an idx file of bytes: a magic number, the shape in big-endian int32, and the data."""
    how = (
        "On Debian `apt-get install dataset-fashion-mnist` puts the files into "
        "/usr/share/datasets/fashion-mnist."
    )
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


def load(directory: pathlib.Path | None) -> Images:
    named = directory or os.environ.get("DIFFJAX_DATA")
    if not named:
        raise ValueError(
            "data-dir: expected the folder of the four idx .gz files, got none; "
            "set --data-dir or the environment variable DIFFJAX_DATA"
        )
    train, train_labels, held_out, held_out_labels = (
        read_idx(pathlib.Path(named) / name, shape) for name, shape in FILES.items()
    )
    return Images(
        train[..., None], train_labels, held_out[..., None], held_out_labels, 256, NAMES, (28, 28)
    )


def make_network(settings: Settings) -> DiT | UNet:
    common: dict[str, Any] = dict(
        num_classes=10, dtype=jnp.dtype(settings.dtype), rngs=nnx.Rngs(settings.seed)
    )
    if settings.model == "unet":
        return UNet(EVENT, width=settings.width, blocks=settings.depth, attention=(7,), **common)
    heads = max(settings.width // 32, 1)
    return DiT(
        EVENT,
        patch=settings.patch,
        width=settings.width,
        depth=settings.depth,
        heads=heads,
        expansion=4,
        **common,
    )


def main(settings: Settings) -> dict:
    return study.run("Fashion-MNIST", make_network(settings), load(settings.data_dir), settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
