"""The Python blocks of each page in docs/ run from top to bottom, in one namespace."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import diffjax as dj

PAGES = sorted((pathlib.Path(__file__).parent.parent / "docs").glob("*.md"))


def run(page):
    names = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _as_a_user_runs():
    with jax.enable_x64(False):
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page):
    names = run(page)
    checks = {
        "training.md": _check_training,
        "checkpoints.md": _check_checkpoints,
        "kernels.md": _check_kernels,
    }
    checks.get(page.name, lambda names: None)(names)


def _check_training(names):
    """The last network, of Equinox, has dropout in training alone, and its last state is on all
    devices.
    """
    x = jnp.ones(2)
    assert jnp.array_equal(names["network"](x, 0.5), names["network"](x, 0.5))
    dropped = [names["network"](x, 0.5, key=jax.random.key(i)) for i in range(20)]
    assert len({tuple(out.tolist()) for out in dropped}) > 1
    assert all(
        len(leaf.sharding.device_set) == jax.device_count()
        for leaf in jax.tree.leaves(names["state"].params)
    )
    assert int(names["state"].step) == 3


def _check_checkpoints(names):
    """The samples come from the average, which is not the parameters."""
    state = names["state"]
    denoise = dj.as_denoiser(dj.bind(names["apply"], state.ema), names["schedule"], dj.VELOCITY)
    expected = dj.sample(
        jax.random.key(1), dj.ddim(denoise, names["schedule"]), jnp.zeros((3, 2)), dj.uniform(10)
    )
    assert jnp.array_equal(names["samples"], expected)
    leaves = zip(jax.tree.leaves(names["ema"]), jax.tree.leaves(state.params), strict=True)
    assert any(not jnp.array_equal(ema, param) for ema, param in leaves)


def _check_kernels(names):
    """The mean of the last x is m(center), affine in it: the gradient of E -(x - 2)^2 is 2 (2 - m)
    dm/dcenter.
    """
    means = []
    for center in (0.0, 1.0):
        kernel, x = names["kernel_of"](jnp.asarray(center)), jnp.zeros(1)
        for t, s in itertools.pairwise(names["ts"]):
            x, _ = kernel(x, t, s)
        means.append(float(x[0]))
    exact = 2 * (2 - means[0]) * (means[1] - means[0])
    # the standard deviations of one draw are about 13 and 0.5
    assert abs(names["estimate"] - exact) < 5 * 13 / 20_000**0.5
    assert abs(names["through"] - exact) < 5 * 0.5 / 20_000**0.5
