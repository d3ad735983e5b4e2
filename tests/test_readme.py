"""The README's programs run."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj
from diffjax.exact import gaussian

TEXT = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@functools.cache
def composed():
    """The names that the program which composes leaves, on which others build."""
    names = {}
    exec(PROGRAMS[1], names)
    return names


def test_the_program_for_own_images_trains_samples_resumes_and_scores(
    tmp_path, monkeypatch, capsys
):
    """At a small size: 8x8 images of two classes, a U-Net of width 32, and a few steps."""
    lines = [line for line in PROGRAMS[0].strip().splitlines() if line]
    assert len(lines) <= 30
    labels = np.arange(80) % 2
    np.savez(
        tmp_path / "images.npz",
        images=np.full((80, 8, 8, 1), 255, np.uint8) * labels[:, None, None, None],
        labels=labels,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.imsave", saved := Saved())
    text = PROGRAMS[0].replace(
        "=classes, rngs", "=classes, width=32, multipliers=(1,), blocks=1, rngs"
    )
    for steps in (4, 6):
        names = {}
        exec(
            text.replace("50_000", str(steps)).replace("=watch", "=watch, callback_every=2"), names
        )
        assert int(names["state"].step) == steps
        assert names["samples"].shape == (80, 8, 8, 1) and names["samples"].dtype == np.uint8
        assert math.isfinite(float(capsys.readouterr().out.splitlines()[-1]))
    assert [path for path, *_ in saved.calls] == [f"runs/mine/{step}.png" for step in (2, 4, 6)]
    assert all(row.shape == (8, 64) and row.dtype == np.uint8 for _, row in saved.calls)


class Saved:
    """Keeps what `imsave` is given."""

    def __init__(self):
        self.calls = []

    def __call__(self, path, row, cmap):
        self.calls.append((path, row))


def test_the_program_composes():
    names = composed()
    assert len(PROGRAMS[1].strip().splitlines()) <= 15
    # more guidance, further along the direction from the unconditional mean 0 to the conditional
    # mean 1
    unguided, conditional, guided = names["sweep"]
    assert unguided < conditional < guided
    assert names["slope"] > 0
    assert names["density"].shape == (1000,) and bool(jnp.isfinite(names["density"]).all())
    assert jnp.allclose(names["x0"].mean(), guided, rtol=1e-5)


def test_optimal_pairs_are_nearer():
    names = dict(composed())
    exec(PROGRAMS[2], names)
    x1 = names["x1"][:200]
    # the optimal partner of 2 z is z: of mean squared distance E z^2 = 1, and 5 as they came
    x0 = 2 * x1[::-1]
    # mean |x1 - x0|^2
    loss = names["flow_matching_loss"](lambda x, t: jnp.zeros_like(x), jax.random.key(4), x0, x1)
    assert jnp.allclose(loss, jnp.mean(x1**2), rtol=1e-5) and loss < 0.3 * jnp.mean((x1 - x0) ** 2)


def test_the_found_grids_are_grids_and_the_fitted_one_is_better():
    names = dict(composed())
    exec(PROGRAMS[3], names)
    ts, fitted = names["ts"], names["fitted"]
    for grid in (ts, fitted.ts):
        assert grid.shape == (9,) and bool(jnp.all(jnp.diff(grid) < 0))
    errors = [
        jnp.sum(names["errors"](*args) ** 2)
        for args in ((ts, jnp.ones((8, 2))), (fitted.ts, fitted.numbers))
    ]
    assert errors[1] < 0.25 * errors[0]


def test_the_added_sampler_is_of_second_order():
    lines = [line for line in PROGRAMS[4].strip().splitlines() if line]
    assert len(lines) <= 15
    names = {"dj": dj}
    exec(PROGRAMS[4], names)
    schedule = dj.gvp()
    sampler = names["midpoint"](gaussian(jnp.zeros(1), 4 * jnp.eye(1), schedule), schedule)
    # the flow of N(0, 4) stretches x by its marginal's standard deviation, from 1 at t = 1
    end = 0.3
    exact = 1.5 * math.sqrt(4 * math.cos(math.pi * end / 2) ** 2 + math.sin(math.pi * end / 2) ** 2)
    ends = [
        dj.sample(jax.random.key(0), sampler, jnp.array([1.5]), dj.uniform(n, end=end))
        for n in (64, 128)
    ]
    errors = [abs(float(x[0]) - exact) for x in ends]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_a_restarted_step_has_the_variance_of_its_rounds():
    names = {"dj": dj, "jax": jax, "jnp": jnp}
    exec(PROGRAMS[5], names)
    schedule, t, s, n = dj.gvp(), 0.7, 0.3, 100_000
    sampler = dj.ddim(gaussian(jnp.zeros(1), jnp.eye(1), schedule), schedule)
    step, x = jnp.array([t, s]), jnp.zeros((n, 1))

    def variance(count):
        restarted = names["restart"](sampler, schedule, count)
        return float(jax.jit(dj.sample)(jax.random.key(0), restarted, x, step).var())

    # For N(0, 1) on this path x_t is N(0, 1) at every t. DDIM multiplies x by cos(pi (t - s) / 2),
    # and going back to t multiplies the variance by the ratio of the alphas squared and fills it up
    # to 1.
    shrink, ratio = (
        math.cos(math.pi * (t - s) / 2) ** 2,
        (math.cos(math.pi * t / 2) / math.cos(math.pi * s / 2)) ** 2,
    )
    exact = 0.0
    for count in range(3):
        # 4 standard errors
        assert variance(count) == pytest.approx(exact, abs=4 * exact * math.sqrt(2 / n))
        exact = shrink * (1 - ratio + ratio * exact)
