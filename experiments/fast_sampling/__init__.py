"""Fast sampling: every solver on every grid, and what an optimized grid saves.

    python -m experiments.fast_sampling        # mixtures and digits
    # with Fashion-MNIST
    python -m experiments.fast_sampling --models digits fashion \
        --fashion.data-dir /usr/share/datasets/fashion-mnist
    # a quick look
    python -m experiments.fast_sampling --seeds 2 --dims 2 --points 400 --nfe 5 10 \
        --learned-nfe 5 --models

(a) `mixtures`: Gaussian mixtures in 2 and 64 dimensions with their exact denoiser on linear VP, t
    from 1 to 1e-3. The error is the root mean square distance per dimension to the end of the exact
    flow (float64), over the samples that end in the same component as the flow. The share of the
    other samples ("flips") is a separate score. Grids are found on one half of the start points and
    scored on the other half. The figures show medians over mixtures.
(b) `images`: the trained models of digits and Fashion-MNIST. The scores are the Fréchet distance
    and the distance to the ends of the model's own accurate trajectories.

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
    """folder of figures and scores"""
    nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20, 30, 50)
    """numbers of network evaluations"""
    learned_nfe: tuple[int, ...] = (4, 5, 6, 8, 10, 15, 20)
    """numbers of network evaluations for which grids are learned"""
    dims: tuple[int, ...] = (2, 64)
    """dimensions of the mixtures"""
    seeds: int = 10
    """mixtures in each dimension"""
    points: tuple[int, ...] = (1500, 192)
    """start points of a mixture in each of `dims`; grids are found on one half of them"""
    candidates: int = 64
    """candidate times of the dynamic programs"""
    fit_steps: int = 40
    """maximum number of Levenberg-Marquardt steps for the grid of a mixture"""
    learning_steps: int = 60
    """steps of Adam for the grid of a trained model, whose Jacobians would cost more"""
    learning_rate: float = 0.03
    """learning rate of Adam, on the logarithms of the grid's steps"""
    models: tuple[Literal["digits", "fashion"], ...] = ("digits",)
    """the trained models to sample"""
    digits: DigitsSettings = dataclasses.field(default_factory=DigitsSettings)
    """the digits experiment; its checkpoint is used, or the model is trained if there is none"""
    fashion: FashionSettings = dataclasses.field(default_factory=FashionSettings)
    """the Fashion-MNIST experiment, used in the same way"""
    fashion_nfe: tuple[int, ...] = (5, 6, 10, 20)
    """numbers of network evaluations of the Fashion-MNIST model"""
    fashion_samples: int = 400
    """scored samples of the Fashion-MNIST model"""
