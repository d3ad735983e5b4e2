"""Real handwritten digits, 8x8: trains a class-conditional model, samples it, scores it, and leaves a report.

    python -m experiments.digits                # about 3 minutes on two CPU cores
    python -m experiments.digits --steps 40 --samples 100 --out /tmp/digits    # a look

scikit-learn's 1797 digits (UCI optical recognition), a fifth held out. Everything goes to runs/digits/.
"""

import dataclasses
import pathlib

import numpy as np
import tyro
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from diffjax.networks import MLP
from experiments import images


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the digits experiment."""

    out: pathlib.Path = pathlib.Path("runs/digits")
    """where figures, scores and checkpoints go; a run in a folder that holds one continues it"""
    steps: int = 2500
    """training steps"""
    batch: int = 128
    """images a step"""
    width: int = 256
    """of the network"""
    depth: int = 4
    """residual blocks of the network"""
    learning_rate: float = 1e-3
    """the peak, after warm-up and before cosine decay"""
    weight_decay: float = 0.01
    """of AdamW"""
    label_dropout: float = 0.1
    """share of labels replaced by the null label"""
    guidance: float = 1.5
    """guidance scale of the guided samples; 1 is none"""
    sampling_steps: int = 25
    """Heun steps of the scored samples, two evaluations each"""
    samples: int = 1400
    """how many samples are scored, the same number of training images beside them"""
    nfe: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """network evaluations of the points of the quality curve"""
    likelihood_images: int = 360
    """held-out images whose likelihood is estimated"""
    exact_images: int = 32
    """held-out images whose likelihood is computed with the exact trace, too"""
    tolerance: float = 1e-4
    """of the ODE solver for the likelihood"""
    seed: int = 0
    """of everything random"""
    tensorboard: bool = False
    """also write the loss for TensorBoard"""


def load(seed: int) -> images.Images:
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8).astype(np.int32)
    split = train_test_split(pixels, labels, test_size=0.2, random_state=seed, stratify=labels)
    train, held_out, train_labels, held_out_labels = split
    return images.Images(train, train_labels, held_out, held_out_labels, levels=17, classes=10)


def main(settings: Settings) -> dict:
    data = load(settings.seed)
    network = MLP(64, width=settings.width, depth=settings.depth, num_classes=10, rngs=nnx.Rngs(settings.seed))
    names = [str(i) for i in range(10)]
    return images.run("Handwritten digits, 8x8", network, data, (64,), settings, names)


if __name__ == "__main__":
    main(tyro.cli(Settings))
