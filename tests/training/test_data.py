"""Batches of arrays in memory, and the data that are refused."""

import numpy as np
import pytest

from diffjax.training import check_labels, in_memory


def test_batches_in_memory_are_epochs_without_gaps():
    data = {"x": np.arange(10), "twice": 2 * np.arange(10)}
    batches = in_memory(data, 4, seed=1)
    drawn = [batches(i) for i in range(10)]
    assert all(
        batch["x"].shape == (4,) and np.array_equal(2 * batch["x"], batch["twice"])
        for batch in drawn
    )
    epochs = np.concatenate([batch["x"] for batch in drawn]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # a pure function of the step: in any order, in another process
    again = in_memory(data, 4, seed=1)
    assert all(np.array_equal(again(i)["x"], drawn[i]["x"]) for i in (7, 0, 3))
    assert not np.array_equal(in_memory(data, 10, seed=2)(0)["x"], epochs[0])


def test_bad_data_is_refused():
    x = np.ones((4, 2))
    for arrays, message in (
        (np.ones((0, 2)), r"arrays: expected at least one example, got shape \(0, 2\)"),
        (np.float32(1), r"arrays: expected at least one example, got shape \(\)"),
        ({}, "same leading size, got no array"),
        (
            {"x": x, "y": np.ones(3)},
            r"same leading size, got \{\"arrays\['x'\]\": 4, \"arrays\['y'\]\": 3\}",
        ),
        (
            {"x": x, "y": np.array([1.0, 2.0, np.nan, 0.0])},
            r"arrays\['y'\]: expected finite numbers, got nan at \(2,\)",
        ),
        (
            np.where(np.eye(4, 2) > 0, -np.inf, 0.0),
            r"arrays: expected finite numbers, got -inf at \(0, 0\)",
        ),
        (np.array(["a", "b"]), "arrays: expected numbers, got dtype <U1"),
        (np.array([None, 1]), "arrays: expected numbers, got dtype object"),
    ):
        with pytest.raises(ValueError, match=message):
            in_memory(arrays, 2)
    for size in (0, 5):
        with pytest.raises(
            ValueError,
            match=rf"batch_size: expected a number from 1 to 4, the number of examples, got {size}",
        ):
            in_memory(x, size)
    assert check_labels(np.array([2, 0], np.uint8), 3).dtype == np.int32
    for labels in ([0, 3], [[0], [-1]]):
        with pytest.raises(
            ValueError,
            match=r"labels: expected integers in \[0, 3\), got (3 at \(1,\)|-1 at \(1, 0\))",
        ):
            check_labels(labels, 3)
    with pytest.raises(ValueError, match="labels: expected integers, got dtype float64"):
        check_labels([0.0], 3)
