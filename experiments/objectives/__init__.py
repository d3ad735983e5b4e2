"""Every training objective on every path: what each reaches with one network and budget, and its
cost.

    python -m experiments.objectives                       # hours on two CPU cores; runs/objectives/
    python -m experiments.objectives --data moons --seeds 0 --steps 300 --paths linear   # a look
    # features of EfficientNet-Lite0 for the digits, too
    python -m experiments.objectives --efficientnet .../efficientnet-lite0-57934424.pth

A run in a folder that holds one continues it.

The data are in the plane (moons, or a mixture) or the 8x8 digits. The scores of every model are its
held-out negative log-likelihood (the exact trace in the plane, Hutchinson's on the digits) and
variational bound; the distances of its samples to held-out data; the network evaluations after
which the first distance stays within 1% of its limit; and the seconds of training. The study also
measures, for the likelihood weighting, the variance of the loss by how the times are drawn, and on
the digits the bits/dim of one model by how its data are dequantized.

Every path is used between the same two noise levels, sigma / alpha = 0.02 and 10 (those of the VE
path), in training, sampling and scoring. Outside this range the path's end amplifies each
parametrization's error, so that ends and not objectives would be compared. Inputs and targets have
unit variance on every path, for data of unit variance (`small_models.normalized`).
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax import schedules
from experiments import small_models


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the objectives experiment."""

    out: pathlib.Path = pathlib.Path("runs/objectives")
    """where tables and figures go"""
    data: tuple[str, ...] = ("moons", "digits")
    """which of moons, mixture, rings and digits"""
    paths: tuple[str, ...] = ("linear VP", "VE", "linear", "GVP")
    """of the objectives that any path can have"""
    objectives: tuple[str, ...] = ()
    """some of them; all unless given"""
    steps: int = 2000
    """training steps of each network in the plane"""
    digits_steps: int = 1000
    """training steps of each network on the digits"""
    simulated_steps: int = 500
    """training steps of maximum likelihood, which solves the flow and its adjoint in every one"""
    simulated_batch: int = 64
    """points a step of it"""
    batch: int = 256
    """points a step"""
    learning_rate: float = 2e-3
    """the peak, before cosine decay"""
    held_out: int = 500
    """points whose likelihood is computed in the plane"""
    digits_held_out: int = 180
    """images whose likelihood is computed"""
    samples: int = 1000
    """samples of a model that are scored"""
    nfe: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    """network evaluations of Heun's method; the limit takes 200"""
    seeds: tuple[int, ...] = (0, 1)
    """of networks, batches, and what is drawn in training. Objectives that simulate use the first
    alone
    """
    efficientnet: pathlib.Path | None = None
    """the file of EfficientNet-Lite0's weights"""


LEAST, MOST = 0.02, 10.0  # of sigma / alpha


class Path(NamedTuple):
    """A schedule, and the times between which it is used."""

    schedule: dj.typing.Schedule
    low: jax.Array
    high: jax.Array


def path_of(schedule: dj.typing.Schedule) -> Path:
    low, high = (
        schedules.half_log_snr_inverse(schedule, -float(np.log(level))) for level in (LEAST, MOST)
    )
    return Path(schedule, low, high)


PATHS = {name: path_of(schedule) for name, schedule in small_models.PATHS.items()}


def at_low(path: Path, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Data at the path's low end, without its noise: alpha x0, and the scaling's log volume."""
    alpha, _ = path.schedule(path.low)
    return alpha * x0, x0.size * jnp.log(alpha)


class Data(NamedTuple):
    """A data set, its network, and the levels of its values if they are integers."""

    train: np.ndarray
    labels: np.ndarray | None
    held_out: np.ndarray
    held_out_labels: np.ndarray | None
    network: Callable[..., Any]
    steps: int
    levels: int | None = None
