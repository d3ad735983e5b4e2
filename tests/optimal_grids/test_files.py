"""Grids in files: they come back for their schedule, and for every other by their log-SNRs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import bind, exact, grids, samplers, schedules
from diffjax.optimal_grids import load_grid, save_grid


def power(exponent, t):
    return 1 - t**exponent, t**exponent


SAVED = {
    "linear_vp": schedules.linear_vp,
    "linear": schedules.linear,  # with log-SNRs of -inf and inf at its ends
    "edm": schedules.edm,
    "betas": lambda: schedules.from_betas(np.linspace(1e-4, 0.02, 50)),
    "bound": lambda: bind(power, 1.5),
    "closure": lambda: lambda t: power(1.5, t),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_grid_comes_back(tmp_path, name):
    ts = np.array([1.0, 0.7, 1 / 3, 1e-7, 0.0])
    save_grid(tmp_path / "grid.json", ts, SAVED[name]())
    np.testing.assert_array_equal(load_grid(str(tmp_path / "grid.json"), SAVED[name]()), ts)


OTHERS = {  # (saved for, used with, the time there of sigma / alpha = r, solved by hand)
    "linear to edm": (schedules.linear(), schedules.edm(20.0), lambda r: r / 20),
    "edm to linear": (schedules.edm(20.0), schedules.linear(), lambda r: r / (1 + r)),
    "linear_vp to gvp": (
        schedules.linear_vp(),
        schedules.gvp(),
        lambda r: 2 / np.pi * np.arctan(r),
    ),
    "another number": (schedules.edm(20.0), schedules.edm(80.0), lambda r: r / 80),
    "another clock": (schedules.linear(), bind(power, 2.0), lambda r: np.sqrt(r / (1 + r))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_schedule_gets_the_times_of_the_same_log_snrs(tmp_path, name):
    saved, used, time = OTHERS[name]
    ts = np.array([0.9, 0.5, 0.3, 1e-3, 0.0])
    save_grid(tmp_path / "grid.json", ts, saved)
    alpha, sigma = jax.vmap(saved)(jnp.asarray(ts))
    # The bisection ends at neighbouring floats, and the log-SNR has a few roundings.
    np.testing.assert_allclose(
        load_grid(tmp_path / "grid.json", used), time(np.asarray(sigma / alpha)), rtol=1e-13
    )


def test_a_run_on_another_path_is_the_same_run(tmp_path):
    """DDIM on two paths of equal log-SNR has the same x / alpha at every time; at the end alpha is
    1.
    """
    vp, linear = schedules.linear_vp(), schedules.linear()
    mean, cov = jnp.array([0.7, -0.4]), jnp.diag(jnp.array([0.3, 2.0]))
    ts = grids.uniform(7, start=0.9)
    save_grid(tmp_path / "grid.json", ts, vp)
    others = load_grid(tmp_path / "grid.json", linear)
    x = jnp.array([1.0, -2.0])

    def run(schedule, ts):
        sampler = samplers.ddim(exact.gaussian(mean, cov, schedule), schedule)
        return samplers.sample(jax.random.key(0), sampler, schedule(ts[0])[0] * x, ts)

    np.testing.assert_allclose(run(vp, ts), run(linear, others), rtol=1e-11)


UNREACHED = {  # (saved for, used with, the missing half log-SNRs, those at the nearest times)
    # -log 20
    "no pure noise": (schedules.linear(), schedules.edm(20.0), r"\[-inf\]", r"\[-2.99573227\]"),
    # -log 0.01
    "noise in the data": (
        schedules.edm(4.0),
        schedules.ve(0.01, 4.0),
        r"\[inf\]",
        r"\[4.60517019\]",
    ),
    "both ends": (
        schedules.linear(),
        schedules.ve(0.01, 4.0),
        r"\[-inf +inf\]",
        r"\[-1.38629436 +4.60517019\]",
    ),
    "too little noise": (
        schedules.edm(40.0),
        schedules.edm(20.0),
        r"\[-3.68887945\]",
        r"\[-2.99573227\]",
    ),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_log_snrs_that_a_schedule_does_not_reach(tmp_path, name):
    saved, used, missing, nearest = UNREACHED[name]
    save_grid(tmp_path / "grid.json", np.array([1.0, 0.25, 0.0]), saved)
    message = rf"schedule: expected one with half log-SNRs of {missing}, .* visits, got {nearest}"
    with pytest.raises(ValueError, match=message):
        load_grid(tmp_path / "grid.json", used)


def test_a_grid_of_float64_is_read_in_float32(tmp_path):
    ts = np.array([1.0, 1 - 1e-4, 0.7, 1e-7, 0.0])
    save_grid(tmp_path / "grid.json", ts, schedules.linear())
    with jax.enable_x64(False):
        loaded = load_grid(tmp_path / "grid.json", schedules.linear())
    assert loaded.dtype == "float32"
    np.testing.assert_array_equal(loaded, ts.astype("f4"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"ts": [1.0, 0.',
        '{"half_log_snr": [0.0, 1.0]}',
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


GOOD = {"ts": [1.0, 0.5], "half_log_snr": ["-inf", 0.0]}  # of `linear`
RECORDS = {  # (changes to the record, what the message must say)
    "text for numbers": ({"half_log_snr": "10"}, "expected a list of numbers, got '10'"),
    "no numbers": ({"half_log_snr": None}, "expected a list of numbers, got None"),
    "too few": (
        {"half_log_snr": [0.0]},
        r"half_log_snr: expected 2 numbers that increase, got \[0.\]",
    ),
    "descending": (
        {"half_log_snr": [0.0, -1.0]},
        r"half_log_snr: expected 2 numbers that increase, got \[ 0. -1.\]",
    ),
    "no log-SNR": (
        {"half_log_snr": [0.0, "nan"]},
        r"half_log_snr: expected 2 numbers that increase, got \[ 0. nan\]",
    ),
    "a number": ({"ts": 0.5}, "expected a list of numbers, got 0.5"),
    "a matrix": ({"ts": [[1.0, 0.5]]}, "TypeError"),
    "beyond floats": ({"ts": [10**400, 0.5]}, "OverflowError"),
    "empty": ({"ts": []}, r"ts: expected a vector of at least 2 times, got shape \(0,\)"),
    "one time": ({"ts": [1.0]}, r"ts: expected a vector of at least 2 times, got shape \(1,\)"),
    "ascending": ({"ts": [0.5, 1.0]}, r"ts: expected times that descend .*, got \[0.5 1. *\]"),
    "repeated": ({"ts": [1.0, 1.0]}, r"ts: expected times that descend .*, got \[1. 1.\]"),
    "beyond 1": ({"ts": [1.5, 0.5]}, r"ts: expected times in \[0, 1\], got \[1.5 0.5\]"),
    "not a number": (
        {"ts": [1.0, float("nan")]},
        r"ts: expected times in \[0, 1\], got \[ *1. nan\]",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_with_a_bad_record_is_named(tmp_path, name):
    changes, message = RECORDS[name]
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(GOOD))
    assert load_grid(path, schedules.linear()).tolist() == [1.0, 0.5]
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(
        ValueError, match=rf"path: expected a grid of save_grid in .*grid\.json, got {message}"
    ):
        load_grid(path, schedules.linear())


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("ts", [[], [0.5], [0.5, 1.0], [1.5, 0.5], [1.0, np.nan], [[1.0, 0.5]]])
def test_only_a_grid_is_saved(tmp_path, ts):
    with pytest.raises(ValueError, match="ts: expected"):
        save_grid(tmp_path / "grid.json", np.array(ts), schedules.linear())
    assert not (tmp_path / "grid.json").exists()


@pytest.mark.parametrize(
    "schedule", [lambda t: (t * np.nan, t), lambda t: (t, 1 - t)], ids=["nan", "backward"]
)
def test_only_log_snrs_that_increase_are_saved(tmp_path, schedule):
    with pytest.raises(
        ValueError,
        match=r"schedule: expected a log-SNR that increases along ts, got half log-SNRs \[",
    ):
        save_grid(tmp_path / "grid.json", np.array([1.0, 0.5]), schedule)
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
    assert record == {"ts": [1.0, 0.5, 0.0], "half_log_snr": ["-inf", 0.0, "inf"]}


def test_a_saved_grid_is_plain_json(tmp_path):
    save_grid(tmp_path / "grid.json", np.array([1.0, 0.25]), schedules.edm(40.0))
    record = json.loads((tmp_path / "grid.json").read_text())
    assert record["ts"] == [1.0, 0.25]
    # lambda = -log(t sigma_max), by hand, to rounding
    np.testing.assert_allclose(record["half_log_snr"], [-np.log(40.0), -np.log(10.0)], rtol=1e-14)
