"""Grids in files, with the schedule that they were found for."""

import json

import numpy as np
import pytest

from diffjax import bind, schedules
from diffjax.optimal_grids import load_grid, save_grid


def power(exponent, t):
    return 1 - t**exponent, t**exponent


def closure(exponent):
    return lambda t: power(exponent, t)


SAVED = {
    "linear_vp": schedules.linear_vp,
    "linear": schedules.linear,  # with log-SNRs of -inf and inf at its ends
    "edm": schedules.edm,
    "betas": lambda: schedules.from_betas(np.linspace(1e-4, 0.02, 50)),
    "bound": lambda: bind(power, 1.5),
    "closure": lambda: closure(1.5),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_grid_comes_back(tmp_path, name):
    ts = np.array([1.0, 0.7, 1 / 3, 1e-7, 0.0])
    save_grid(tmp_path / "grid.json", ts, SAVED[name]())
    np.testing.assert_array_equal(load_grid(str(tmp_path / "grid.json"), SAVED[name]()), ts)


OTHERS = {  # (saved for, used with, what the message must say)
    "constructor": (schedules.linear_vp, schedules.sub_vp, r"name \S*_linear_vp, expected \S*_sub_vp"),
    "no numbers": (schedules.linear, schedules.gvp, r"name \S*_linear, expected \S*_gvp"),
    "numbers": (schedules.edm, lambda: schedules.edm(40.0), r"numbers \[80.0\], expected \[40.0\]"),
    "how many": (SAVED["betas"], lambda: schedules.from_betas(np.full(51, 0.01)), r"numbers"),
    "bound": (lambda: bind(power, 1.5), lambda: bind(power, 1.6), r"numbers \[1.5\], expected \[1.6\]"),
    "closure": (lambda: closure(1.5), lambda: closure(1.6), r"half_log_snr \[.*\], expected \["),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_grid_of_another_schedule_is_refused(tmp_path, name):
    saved, used, message = OTHERS[name]
    save_grid(tmp_path / "grid.json", np.array([1.0, 0.5, 0.0]), saved())
    with pytest.raises(ValueError, match=r"schedule: the grid in .*grid.json was found for another one: " + message):
        load_grid(tmp_path / "grid.json", used())


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"ts": [1.0, 0.',
        '{"schedule": {}}',
        '{"ts": [1.0, 0.5]}',
        "[1.0, 0.5]",
        "0.5",
        '{"ts": ["a"]}',
        b"\xff\x00",
        "[" * 10**5,
    ],
)
def test_a_file_without_a_grid_is_named(tmp_path, text):
    path = tmp_path / "grid.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"path: expected a grid of save_grid in .*grid.json"):
        load_grid(path, schedules.linear())


LINEAR_RECORD = {"name": "diffjax.schedules.paths._linear", "numbers": [], "half_log_snr": ["-inf", 0.0]}
RECORDS = {  # (changes to the record of the grid [1, 1/2] of `linear`, what the message must say)
    "no description": ({"schedule": None}, "TypeError"),
    "half a description": ({"schedule": {"name": "diffjax.schedules.paths._linear"}}, "KeyError"),
    "text for numbers": ({"schedule": LINEAR_RECORD | {"numbers": "10"}}, "expected a list of numbers, got '10'"),
    "no numbers": ({"schedule": LINEAR_RECORD | {"numbers": None}}, "expected a list of numbers, got None"),
    "a number": ({"ts": 0.5}, "expected a list of numbers, got 0.5"),
    "a matrix": ({"ts": [[1.0, 0.5]]}, "TypeError"),
    "beyond floats": ({"ts": [10**400, 0.5]}, "OverflowError"),
    "empty": ({"ts": []}, r"ts: expected a vector of at least 2 times, got shape \(0,\)"),
    "one time": ({"ts": [1.0]}, r"ts: expected a vector of at least 2 times, got shape \(1,\)"),
    "ascending": ({"ts": [0.5, 1.0]}, r"ts: expected times that descend .*, got \[0.5 1. *\]"),
    "repeated": ({"ts": [1.0, 1.0]}, r"ts: expected times that descend .*, got \[1. 1.\]"),
    "beyond 1": ({"ts": [1.5, 0.5]}, r"ts: expected times in \[0, 1\], got \[1.5 0.5\]"),
    "not a number": ({"ts": [1.0, float("nan")]}, r"ts: expected times in \[0, 1\], got \[ *1. nan\]"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_with_a_bad_record_is_named(tmp_path, name):
    changes, message = RECORDS[name]
    path = tmp_path / "grid.json"
    good = {"ts": [1.0, 0.5], "schedule": LINEAR_RECORD}
    path.write_text(json.dumps(good))
    assert load_grid(path, schedules.linear()).tolist() == [1.0, 0.5]
    path.write_text(json.dumps(good | changes))
    with pytest.raises(ValueError, match=rf"path: expected a grid of save_grid in .*grid\.json, got {message}"):
        load_grid(path, schedules.linear())


@pytest.mark.parametrize("ts", [[], [0.5], [0.5, 1.0], [1.5, 0.5], [1.0, np.nan], [[1.0, 0.5]]])
def test_only_a_grid_is_saved(tmp_path, ts):
    with pytest.raises(ValueError, match="ts: expected"):
        save_grid(tmp_path / "grid.json", np.array(ts), schedules.linear())
    with pytest.raises(ValueError, match=r"schedule: expected a log-SNR at every time of the grid, got \[nan"):
        save_grid(tmp_path / "grid.json", np.array([1.0, 0.5]), lambda t: (t * np.nan, t))
    assert not (tmp_path / "grid.json").exists()


def test_a_grid_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_grid(tmp_path / "grid.json", schedules.linear())


def test_infinite_log_snrs_are_strings_in_the_file(tmp_path):
    """JSON has no infinity: RFC 8259, section 6."""

    def no_json(constant):
        raise AssertionError(constant)

    save_grid(tmp_path / "grid.json", np.array([1.0, 0.5, 0.0]), schedules.linear())
    record = json.loads((tmp_path / "grid.json").read_text(), parse_constant=no_json)
    assert record["schedule"]["half_log_snr"] == ["-inf", 0.0, "inf"]


def test_a_saved_grid_is_plain_json(tmp_path):
    save_grid(tmp_path / "grid.json", np.array([1.0, 0.25]), schedules.edm(40.0))
    record = json.loads((tmp_path / "grid.json").read_text())
    assert record["ts"] == [1.0, 0.25] and record["schedule"]["numbers"] == [40.0]
    # lambda = -log(t sigma_max), by hand, to rounding
    np.testing.assert_allclose(record["schedule"]["half_log_snr"], [-np.log(40.0), -np.log(10.0)], rtol=1e-14)
