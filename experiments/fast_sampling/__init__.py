"""Fast sampling: every solver x every grid, and what a grid that is found saves.

    python -m experiments.fast_sampling        # mixtures and digits
    # Fashion-MNIST as well
    python -m experiments.fast_sampling --models digits fashion \
        --fashion.data-dir /usr/share/datasets/fashion-mnist
    # a look
    python -m experiments.fast_sampling --seeds 2 --dims 2 --points 400 --nfe 5 10 \
        --learned-nfe 5 --models

(a) `mixtures`: Gaussian mixtures in 2 and 64 dimensions with their exact denoiser on linear VP, t
from 1 to 1e-3. The
    error is the root mean square distance, a dimension, to the end of the exact flow (float64),
    over the samples that end in the component where the flow ends. The share of the others
    ("flips") is counted apart. Grids are found on one half of the start points and scored on the
    other half. The figures are medians over mixtures.
(b) `images`: the trained digits model, and the Fashion-MNIST one. The scores are the Fréchet
distance, and the distance to
    the end of the model's own accurate trajectories.

Everything goes to runs/fast_sampling/.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.image_models.digits import Settings as DigitsSettings
from experiments.image_models.fashion_mnist import Settings as FashionSettings


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the fast-sampling experiment."""

    out: pathlib.Path = pathlib.Path("runs/fast_sampling")
    """where figures and scores go"""
    nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20, 30, 50)
    """network evaluations"""
    learned_nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20)
    """network evaluations for which grids are learned"""
    dims: tuple[int, ...] = (2, 64)
    """dimensions of the mixtures"""
    seeds: int = 10
    """mixtures in each dimension"""
    points: tuple[int, ...] = (1500, 192)
    """start points of a mixture in each dimension, half of them to find grids on"""
    candidates: int = 64
    """candidate times of the dynamic programs"""
    fit_steps: int = 40
    """steps of Levenberg-Marquardt on a grid of a mixture, at most"""
    learning_steps: int = 60
    """steps of Adam on a grid of a trained model, whose Jacobians would cost more"""
    learning_rate: float = 0.03
    """of Adam on the logarithms of the grid's steps"""
    models: tuple[Literal["digits", "fashion"], ...] = ("digits",)
    """the trained models to sample"""
    digits: DigitsSettings = dataclasses.field(default_factory=DigitsSettings)
    """the digits experiment, whose checkpoint is used; it is trained if there is none"""
    fashion: FashionSettings = dataclasses.field(default_factory=FashionSettings)
    """the Fashion-MNIST experiment, as above"""
    fashion_nfe: tuple[int, ...] = (5, 6, 10, 20)
    """network evaluations of the Fashion-MNIST model"""
    fashion_samples: int = 400
    """scored samples of the Fashion-MNIST model"""
