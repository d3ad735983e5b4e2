"""How couplings of data and prior straighten the paths, on two pairs of distributions.

    python -m experiments.couplings        # figures and a table in runs/couplings/

A velocity network is trained by conditional flow matching (1.17) on independent pairs, on optimal
pairs within each minibatch, and on entropic pairs. The entropic model is a Schrödinger bridge: it
also learns the score, and is sampled as an ODE and as an SDE. On fresh start points the study
measures the length and curvature of the paths, and the 2-Wasserstein distance of samples to fresh
data after a small number of steps.
"""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the couplings experiment."""

    out: pathlib.Path = pathlib.Path("runs/couplings")
    """folder of figures and scores"""
    steps: int = 3000
    """training steps of each network"""
    batch: int = 256
    """pairs per step"""
    width: int = 64
    """width of the networks' layers"""
    learning_rate: float = 2e-3
    """peak learning rate, before cosine decay"""
    amplitude: float = 1.0
    """amplitude of the bridge's noise"""
    nfe: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """numbers of Euler steps"""
    points: int = 2000
    """start points whose samples are scored"""
    seeds: int = 3
    """networks of each kind, for means and standard deviations"""
