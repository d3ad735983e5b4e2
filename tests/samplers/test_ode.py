"""Euler and Heun on Gaussian data: order, limit, and finite gradients on the whole path."""

import pytest
from on_gaussians import PATHS, check_finite_gradients, check_order_and_limit, errors_by_path

from diffjax.samplers import euler, heun


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("make", "order"), [(euler, 1), (heun, 2)])
def test_order_and_limit(make, order, path):
    check_order_and_limit(errors_by_path(make)[path], order)


@pytest.mark.parametrize("make", [euler, heun])
def test_finite_with_finite_gradients_on_the_whole_path(make):
    check_finite_gradients(make, ["linear", "gvp", "edm"])
