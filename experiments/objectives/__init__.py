"""Every training objective on every path: scores and cost, with one network and budget.

    # hours on two CPU cores; results in runs/objectives/
    python -m experiments.objectives
    # a quick look
    python -m experiments.objectives --data moons --seeds 0 --steps 300 --paths linear
    # with the features of EfficientNet-Lite0 for the digits
    python -m experiments.objectives --efficientnet .../efficientnet-lite0-57934424.pth

A run in the folder is continued.

The data are points in the plane (moons, or a mixture) or the 8x8 digits. The scores of every model
are its held-out negative log-likelihood (with the exact trace in the plane, with Hutchinson's on
the digits) and variational bound; the distances of its samples to held-out data; the network
evaluations after which the first distance stays within 1% of its limit; and the seconds of
training. The study also compares ways to draw the times, by the variance of the likelihood-weighted
loss. On the digits it compares ways to dequantize the data, by the bits/dim of one model.

Training, sampling and scoring use every path between the same two noise levels, sigma / alpha =
0.02 and 10 (those of the VE path). Outside this range the path's end amplifies each
parametrization's error, which would compare end points, not objectives. Inputs and targets have
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
    """folder of tables and figures"""
    data: tuple[str, ...] = ("moons", "digits")
    """any of moons, mixture, rings and digits"""
    paths: tuple[str, ...] = ("linear VP", "VE", "linear", "GVP")
    """paths of the objectives that can use any path"""
    objectives: tuple[str, ...] = ()
    """names of the objectives to train; all by default"""
    steps: int = 2000
    """training steps of each network in the plane"""
    digits_steps: int = 1000
    """training steps of each network on the digits"""
    simulated_steps: int = 500
    """training steps of maximum likelihood, each of which solves the flow and its adjoint"""
    simulated_batch: int = 64
    """points per step of maximum likelihood"""
    batch: int = 256
    """points per step"""
    learning_rate: float = 2e-3
    """peak learning rate, before cosine decay"""
    held_out: int = 500
    """held-out points whose likelihood is computed in the plane"""
    digits_held_out: int = 180
    """held-out digits whose likelihood is computed"""
    samples: int = 1000
    """scored samples of each model"""
    nfe: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    """numbers of network evaluations of Heun's method; the limit uses 200"""
    seeds: tuple[int, ...] = (0, 1)
    """seeds of networks, batches and training noise; maximum likelihood uses only the first"""
    efficientnet: pathlib.Path | None = None
    """file of EfficientNet-Lite0's weights"""


MIN_NOISE, MAX_NOISE = 0.02, 10.0  # of sigma / alpha


class Path(NamedTuple):
    """A schedule, and the times between which it is used."""

    schedule: dj.typing.Schedule
    low: jax.Array
    high: jax.Array


def path_of(schedule: dj.typing.Schedule) -> Path:
    low, high = (
        schedules.half_log_snr_inverse(schedule, -float(np.log(noise)))
        for noise in (MIN_NOISE, MAX_NOISE)
    )
    return Path(schedule, low, high)


PATHS = {name: path_of(schedule) for name, schedule in small_models.PATHS.items()}


def at_low(path: Path, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns alpha x0 at the path's low end, without noise, and the log volume of the scaling."""
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
