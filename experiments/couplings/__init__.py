"""Couplings: how pairing data and prior straightens the paths, on two pairs of distributions.

    python -m experiments.couplings        # figures and a table in runs/couplings/

A velocity network is trained by conditional flow matching (1.17) on pairs that are independent,
optimal in each minibatch, or entropic; the last as a Schrodinger bridge with its score, sampled as
an ODE and as an SDE. The study measures, on fresh start points, the length and curvature of the
paths, and the 2-Wasserstein distance to fresh data at few steps.
"""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the couplings experiment."""

    out: pathlib.Path = pathlib.Path("runs/couplings")
    """where figures and scores go"""
    steps: int = 3000
    """training steps of each network"""
    batch: int = 256
    """pairs a step"""
    width: int = 64
    """of the networks"""
    learning_rate: float = 2e-3
    """the peak, before cosine decay"""
    amplitude: float = 1.0
    """of the bridge's noise"""
    nfe: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Euler steps"""
    points: int = 2000
    """start points that are scored"""
    seeds: int = 3
    """networks of each kind, over which means and standard deviations are taken"""
