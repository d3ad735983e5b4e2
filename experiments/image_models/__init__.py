"""Class-conditional models of small images: trained, sampled, scored and shown.

    python -m experiments.image_models.digits
    python -m experiments.image_models.fashion_mnist --data-dir ...
    python -m experiments.image_models.image_quality --weights ... --fashion.data-dir ...

Images are integers in [0, levels). A model sees them dequantized to [-1, 1)
(`likelihood.dequantize`), and its samples are quantized back before they are compared with data.
The path is linear and the network predicts the velocity.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every image model is trained and scored with."""

    out: pathlib.Path
    """where figures, scores and checkpoints go; a run in a folder that holds one continues it"""
    steps: int
    """training steps"""
    batch: int
    """images a step"""
    every: int
    """steps between two pictures, and between two checkpoints"""
    width: int
    """channels of the network"""
    depth: int
    """blocks of the network; residual blocks a level of a U-Net"""
    sampling_steps: int
    """Heun steps of the scored samples, two evaluations each"""
    samples: int
    """how many samples are scored, and the same number of training images for comparison"""
    nfe: tuple[int, ...]
    """network evaluations of the points of the quality curve"""
    likelihood_images: int
    """held-out images whose likelihood is estimated"""
    exact_images: int
    """held-out images whose likelihood is computed with the exact trace, too"""
    tolerance: float
    """of the ODE solver for the likelihood"""
    learning_rate: float = 1e-3
    """the peak, after warm-up and before cosine decay"""
    weight_decay: float = 0.01
    """of AdamW"""
    label_dropout: float = 0.1
    """share of labels replaced by the null label"""
    guidance: float = 1.5
    """guidance scale of the guided samples; 1 is none"""
    seed: int = 0
    """of everything random"""
    tensorboard: bool = False
    """also write the loss for TensorBoard"""


class Images(NamedTuple):
    """A labelled data set, split. Images are integers of shape (n, *x), as the network sees them."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    levels: int
    names: tuple[str, ...]
    """of the classes"""
    shape: tuple[int, int]
    """height and width"""


def pixels(images: np.ndarray, data: Images) -> np.ndarray:
    """Integer images as vectors in [-1, 1]."""
    return images.reshape(len(images), -1) * (2.0 / (data.levels - 1)) - 1
