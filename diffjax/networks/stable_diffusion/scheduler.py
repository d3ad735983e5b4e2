"""The noise schedule, the parametrization and the time grids of a model folder."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..._bind import bind
from ...parametrizations import EPS, X0, Parametrization, V
from ...schedules import from_betas, zero_terminal_snr
from ...typing import Schedule

__all__ = ["Scheduler", "read_scheduler"]

_ROWS = {"epsilon": EPS, "sample": X0, "v_prediction": V}
# The samplers of the torch library that share one chain of betas.
_CLASSES = {
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDPM",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "LMSDiscrete",
        "PNDM",
        "UniPCMultistep",
    )
}
_SPACINGS = ("leading", "trailing", "linspace")
# Keys that change the chain or its times, and their defaults.
_USED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": None,  # "leading" of DDIM and "linspace" of DPM-Solver
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
}
# Keys with one admitted value, and what to do instead.
_ONLY = {
    "clip_sample": (False, "use guidance.clip_x0"),
    "thresholding": (False, "use guidance.dynamic_threshold"),
    "use_karras_sigmas": (False, "use grids.karras"),
    "use_exponential_sigmas": (False, "use grids.uniform_log_snr"),
    "use_beta_sigmas": (False, "give a grid of your own"),
    "use_lu_lambdas": (False, "use grids.uniform_log_snr"),
    "use_flow_sigmas": (False, "flow matching has another path"),
}
# Keys that choose among samplers, which a caller chooses here, or belong to what is off above.
_IGNORED = {
    "skip_prk_steps",
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "euler_at_final",
    "variance_type",
    "lambda_min_clipped",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "interpolation_type",
    "use_dynamic_shifting",
    "time_shift_type",
    "sigma_min",
    "sigma_max",
    "solver_p",
    "disable_corrector",
    "predict_x0",
    "timestep_type",
}


class Scheduler(NamedTuple):
    """What a scheduler's file says; `read_scheduler` makes one.

    The discrete chain's index i, from 0 to n - 1, is the time t = (i + 1) / n.
    """

    schedule: Schedule
    """the path"""
    parametrization: Parametrization
    """what the network predicts; it sees the index as `c_noise`"""
    ddim_times: Callable[[int], Array]
    """the times of the torch library's DDIM with so many steps, descending, (steps + 1,)"""
    dpm_solver_times: Callable[[int], Array]
    """the times of the torch library's multistep DPM-Solver, likewise"""


def _ddim_times(config: Mapping[str, Any], steps: int) -> Array:
    """Leading indices are `offset + k (n // steps)`, trailing ones count from the last one.

    The last time is 0, or that of index 0 where the file sets `set_alpha_to_one` to false.
    (diffusers steps from an index to the one `n // steps` below, which is the next of the grid if
    the spacing is leading or n is a multiple of the steps.)
    """
    n, offset = config["num_train_timesteps"], config["steps_offset"]
    _check_steps(steps, n)
    indices = {
        "leading": np.arange(steps)[::-1] * (n // steps) + offset,
        "trailing": np.round(n - np.arange(steps) * (n / steps)) - 1,
        "linspace": np.round(np.linspace(0, n - 1, steps))[::-1],
    }[config["timestep_spacing"] or "leading"]
    return _times(config, indices, -1 if config["set_alpha_to_one"] else 0)


def _dpm_solver_times(config: Mapping[str, Any], steps: int) -> Array:
    """Leading indices divide the chain by `steps + 1`, not by `steps`.

    The last time is 0, or that of index 0 where the file sets `final_sigmas_type` to "sigma_min".
    """
    n, offset = config["num_train_timesteps"], config["steps_offset"]
    _check_steps(steps, n)
    indices = {
        "leading": np.arange(steps + 1)[:0:-1] * (n // (steps + 1)) + offset,
        "trailing": np.round(n - np.arange(steps) * (n / steps)) - 1,
        "linspace": np.round(np.linspace(0, n - 1, steps + 1))[:0:-1],
    }[config["timestep_spacing"] or "linspace"]
    return _times(config, indices, -1 if config["final_sigmas_type"] == "zero" else 0)


def _check_steps(steps: int, n: int) -> None:
    if not 1 <= steps < n:
        raise ValueError(f"steps: expected a number in [1, {n - 1}], got {steps}")


def _times(config: Mapping[str, Any], indices: np.ndarray, last: int) -> Array:
    n = config["num_train_timesteps"]
    if indices[-1] != last:  # else the last step would go from a time to itself
        indices = np.append(indices, last)
    if indices[0] >= n or (np.diff(indices) >= 0).any():
        raise ValueError(
            f"steps: the grid of {len(indices) - 1} steps with offset {config['steps_offset']} "
            f"leaves the chain of {n} steps or repeats a time"
        )
    return jnp.asarray((indices + 1) / n, jnp.result_type(float))


def _index(n, schedule, t):
    return 1.0, n * t - 1.0


def read_scheduler(folder: str | pathlib.Path) -> Scheduler:
    """Reads the scheduler of a model folder: schedule, parametrization and grids.

    The file names a sampler, too, but the caller chooses that here: `ddim` on `ddim_times`, and
    `dpm_solver_2m` on `dpm_solver_times`, for example. Each is spaced as the file says, or as
    diffusers does by default: DDIM's indices are leading, and DPM-Solver's divide the whole chain
    evenly.

    Args:
        folder: the model's folder, its `scheduler` subfolder, or the JSON file.

    Returns:
        The scheduler.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: naming a scheduler or a key that is unknown, or whose value has no counterpart
            here, with the way out.

    Reference: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 4; Lin et al. 2023 (arXiv 2305.08891),
    section 3.

    >>> import json, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "scheduler_config.json"
    >>> config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    ...     "steps_offset": 1, "set_alpha_to_one": False}
    >>> _ = path.write_text(json.dumps(config))
    >>> scheduler = read_scheduler(path)
    >>> [round(1000 * float(t)) - 1 for t in scheduler.ddim_times(4)]
    [751, 501, 251, 1, 0]
    >>> float(scheduler.schedule(1.0)[0])
    0.0682...
    """
    path = pathlib.Path(folder)
    for name in ("scheduler", "scheduler_config.json"):
        path = path / name if (path / name).exists() else path
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected scheduler_config.json in {path}")
    content = json.loads(path.read_text())
    kind = content.get("_class_name", "DDIMScheduler")
    if kind not in _CLASSES:
        raise ValueError(
            f"{path.name}: expected a scheduler of a chain of betas, one of "
            f"{', '.join(sorted(_CLASSES))}, got {kind}"
        )
    given = {k: v for k, v in content.items() if not k.startswith("_")}
    if unknown := sorted(given.keys() - _USED.keys() - _ONLY.keys() - _IGNORED):
        raise ValueError(f"{path.name}: expected known keys, got {', '.join(unknown)}")
    for key, (only, instead) in _ONLY.items():
        if given.get(key, only) not in (only, None):
            raise ValueError(f"{key}: expected {only}, got {given[key]}; {instead}")
    config = _USED | {key: value for key, value in given.items() if key in _USED}
    choices = {
        "prediction_type": tuple(_ROWS),
        "timestep_spacing": (None, *_SPACINGS),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    for key, admitted in choices.items():
        if config[key] not in admitted:
            raise ValueError(
                f"{key}: expected one of {', '.join(filter(None, admitted))}, got {config[key]!r}"
            )
    betas = _betas(config)
    betas = zero_terminal_snr(betas) if config["rescale_betas_zero_snr"] else jnp.asarray(betas)
    row = _ROWS[config["prediction_type"]].row
    parametrization = Parametrization(row, bind(_index, config["num_train_timesteps"]))
    times = (functools.partial(times, config) for times in (_ddim_times, _dpm_solver_times))
    return Scheduler(from_betas(betas), parametrization, *times)


def _betas(config: dict[str, Any]) -> np.ndarray:
    n, low, high = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if config["trained_betas"] is not None:
        return np.asarray(config["trained_betas"])
    if config["beta_schedule"] == "linear":
        return np.linspace(low, high, n)
    if config["beta_schedule"] == "scaled_linear":
        return np.linspace(low**0.5, high**0.5, n) ** 2
    if config["beta_schedule"] == "squaredcos_cap_v2":
        squared = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - squared[1:] / squared[:-1], 0.999)
    raise ValueError(
        f"beta_schedule: expected linear, scaled_linear or squaredcos_cap_v2, "
        f"got {config['beta_schedule']!r}"
    )
