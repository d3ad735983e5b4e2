"""A class-conditional model of handwritten digits, 8x8: training, samples, scores and figures.

    # about 3 minutes on two CPU cores
    python -m experiments.image_models.digits
    # a quick look
    python -m experiments.image_models.digits --steps 40 --samples 100 --out /tmp/digits

The data are scikit-learn's 1797 digits (UCI optical recognition). A fifth of them is held out.
Everything goes to runs/digits/.
"""

import dataclasses
import pathlib

import numpy as np
import tyro
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from diffjax.networks import MLP
from experiments import image_models
from experiments.image_models import Images, study


@dataclasses.dataclass(frozen=True)
class Settings(image_models.Settings):
    """Settings of the digits experiment."""

    out: pathlib.Path = pathlib.Path("runs/digits")
    steps: int = 2500
    batch: int = 128
    every: int = 1250
    width: int = 256
    depth: int = 4
    sampling_steps: int = 25
    samples: int = 1400
    nfe: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    likelihood_images: int = 360
    exact_images: int = 32
    tolerance: float = 1e-4


def load(seed: int) -> Images:
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(
        pixels.astype(np.int32), labels, test_size=0.2, random_state=seed, stratify=labels
    )
    train, held_out, train_labels, held_out_labels = map(np.asarray, split)
    names = tuple(map(str, range(10)))
    return Images(train, train_labels, held_out, held_out_labels, 17, names, (8, 8))


def make_network(settings: Settings) -> MLP:
    return MLP(
        64, width=settings.width, depth=settings.depth, num_classes=10, rngs=nnx.Rngs(settings.seed)
    )


def main(settings: Settings) -> dict:
    network, data = make_network(settings), load(settings.seed)
    return study.run("Handwritten digits, 8x8", network, data, settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
