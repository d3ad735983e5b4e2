"""RePaint and replacement: their laws on Gaussian data, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special

from diffjax import grids
from diffjax.exact import gaussian
from diffjax.samplers import ddim, ddpm, dpm_solver_2m, repaint, sample
from diffjax.schedules import gvp, linear

R, Y = 0.8, 1.0
COV = np.array([[1.0, R], [R, 1.0]])
KNOWN, MASK = jnp.array([Y, 0.0]), jnp.array([1.0, 0.0])
EXACT = R * Y, 1 - R**2
# the law of the unknown number after replacement, as steps get short
SDE = Y / R * (1 - np.sqrt(1 - R**2)), (1 - R**2) * np.arctanh(R) / R
FLOW = (
    Y * R / 3 * (1 - R**2) ** 0.25 * scipy.special.hyp2f1(0.75, 1.25, 1.75, R**2),
    np.sqrt(1 - R**2),
)


def law(monkeypatch, method, n, resamples, schedule=None):
    """Mean and variance of the unknown number at the end: every step is affine in x and noise."""
    schedule = schedule or gvp()
    prior = gaussian(jnp.zeros(2), jnp.asarray(COV), schedule)
    sampler = repaint(method(prior, schedule), schedule, KNOWN, MASK, resamples)

    def step(inputs, t, s):
        x, zs = inputs  # (resamples, 3, 2): noise in place of its keys
        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "fold_in", lambda zs, i: zs[i])
            patch.setattr(jax.random, "split", lambda zs, n: zs)
            patch.setattr(jax.random, "normal", lambda z, shape, dtype=float: z)
            return sampler.step(zs, sampler.init(x, t), t, s).x

    @jax.jit
    def run(ts):
        def advance(law, times):
            mean, cov = law
            zero = jnp.zeros((resamples, 3, 2))
            a, c = jax.jacfwd(step)((mean, zero), *times)
            c = c.reshape(2, -1)
            return (step((mean, zero), *times), a @ cov @ a.T + c @ c.T), None

        return jax.lax.scan(advance, (jnp.zeros(2), jnp.eye(2)), (ts[:-1], ts[1:]))[0]

    mean, cov = run(jnp.linspace(1.0, 0.0, n + 1))
    assert float(mean[0]) == Y and abs(cov[0]).max() < 1e-30
    return np.array([mean[1], cov[1, 1]])


def test_the_closed_forms_have_the_published_digits():
    np.testing.assert_allclose((*SDE, *FLOW), (0.5, 0.4944, 0.3468, 0.6), atol=5e-5)


@pytest.mark.parametrize(("method", "expected"), [(ddpm, SDE), (ddim, FLOW)], ids=["sde", "flow"])
def test_replacement_ends_in_its_own_law(monkeypatch, method, expected):
    steps = [64, 128, 256, 512]
    found = [abs(law(monkeypatch, method, n, 1) - expected).max() for n in steps]
    assert found[-1] < 0.01
    # the law of the flow converges like 1 / n log n
    assert abs(oracles.fitted_order(steps, found) - 1) < 0.2, found


def test_more_resampling_brings_the_law_to_the_posterior(monkeypatch):
    errors = [abs(law(monkeypatch, ddpm, 400, u) - EXACT).max() for u in (1, 2, 5, 10)]
    assert (np.diff(errors) < 0).all() and errors[-1] < 0.2 * errors[0], errors


def test_one_resample_is_a_step_and_a_replacement():
    schedule, t, s = linear(), 0.7, 0.4
    prior = gaussian(jnp.zeros(2), jnp.asarray(COV), schedule)
    sampler, key = repaint(ddim(prior, schedule), schedule, KNOWN, MASK, 1), jax.random.key(3)
    x = jnp.array([0.4, -0.3])
    got = sampler.step(key, sampler.init(x, t), t, s).x
    inner = ddim(prior, schedule)
    np.testing.assert_allclose(got[1], inner.step(key, inner.init(x, t), t, s).x[1], rtol=1e-14)
    # the known number is noisy data, and it is the data at the end
    draws = jax.vmap(lambda key: sampler.step(key, sampler.init(x, t), t, s).x[0])(
        jax.random.split(key, 4000)
    )
    assert abs(draws.mean() - 0.6 * Y) < 4 * 0.4 / np.sqrt(4000)
    assert abs(draws.std() / 0.4 - 1) < 4 / np.sqrt(2 * 4000)


def test_a_multistep_method_keeps_the_memory_of_its_time():
    # every repetition starts from the history that the step began with
    schedule, ts = linear(), grids.uniform(8, end=0.0)
    prior = gaussian(jnp.zeros(2), jnp.asarray(COV), schedule)
    sampler = repaint(dpm_solver_2m(prior, schedule), schedule, KNOWN, MASK, 3)
    state = sampler.init(jnp.zeros(2), ts[0])
    for i in range(4):
        state = sampler.step(jax.random.key(i), state, ts[i], ts[i + 1])
        assert int(state.memory.steps) == i + 1
    out = sample(jax.random.key(0), sampler, jnp.zeros((5, 2)), ts)
    np.testing.assert_array_equal(out[:, 0], Y)


@pytest.mark.usefixtures("without_type_checks")
def test_wrong_arguments_are_named():
    schedule = linear()
    sampler = ddim(gaussian(jnp.zeros(2), jnp.eye(2), schedule), schedule)
    for resamples in (0, 2.5):
        with pytest.raises(ValueError, match="resamples: expected an integer of at least 1, got"):
            repaint(sampler, schedule, KNOWN, MASK, resamples)
    with pytest.raises(ValueError, match="mask: expected values 0 and 1, got"):
        repaint(sampler, schedule, KNOWN, 0.5 * MASK)
    for name, arguments in {"known": (jnp.zeros(3), MASK), "mask": (KNOWN, jnp.zeros(3))}.items():
        with pytest.raises(ValueError, match=rf"{name}: expected a shape that broadcasts to x"):
            sample(
                jax.random.key(0),
                repaint(sampler, schedule, *arguments),
                jnp.zeros(2),
                grids.uniform(3),
            )
