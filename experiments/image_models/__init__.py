"""Class-conditional models of small images: training, samples, scores and figures.

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
    """Settings of the training and the scores of an image model."""

    out: pathlib.Path
    """folder of figures, scores and checkpoints; a run in it is continued"""
    steps: int
    """training steps"""
    batch: int
    """images per step"""
    every: int
    """steps between two pictures, and between two checkpoints"""
    width: int
    """channels of the network"""
    depth: int
    """blocks of the network; residual blocks per level of a U-Net"""
    sampling_steps: int
    """Heun steps of the scored samples, two evaluations each"""
    samples: int
    """number of scored samples, and of training images for comparison"""
    nfe: tuple[int, ...]
    """numbers of network evaluations on the quality curve"""
    likelihood_images: int
    """held-out images whose likelihood is estimated"""
    exact_images: int
    """held-out images whose likelihood is also computed with the exact trace"""
    tolerance: float
    """tolerance of the ODE solver for the likelihood"""
    learning_rate: float = 1e-3
    """peak learning rate, after warm-up and before cosine decay"""
    weight_decay: float = 0.01
    """weight decay of AdamW"""
    label_dropout: float = 0.1
    """share of the labels that the null label replaces"""
    guidance: float = 1.5
    """guidance scale of the guided samples; 1 is no guidance"""
    seed: int = 0
    """seed of all random numbers"""
    tensorboard: bool = False
    """also write the loss for TensorBoard"""


class Images(NamedTuple):
    """A labelled data set. Images are integers (n, *x), where x is the network's input shape."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    levels: int
    names: tuple[str, ...]
    """names of the classes"""
    shape: tuple[int, int]
    """height and width"""


def pixels(images: np.ndarray, data: Images) -> np.ndarray:
    """Integer images as vectors in [-1, 1]."""
    return images.reshape(len(images), -1) * (2.0 / (data.levels - 1)) - 1
