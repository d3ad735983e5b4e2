"""How samplers do on Gaussian data, whose flow map and whose mean and variance at every time are
known in closed form.

Stochastic steps are affine in x and in their noise there, so mean and variance are propagated
exactly: the noise is replaced by a variable, the coefficients read off by a Jacobian, and no sample
is ever drawn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from diffjax import bind
from diffjax.exact import gaussian
from diffjax.samplers import sample
from diffjax.schedules import edm, gvp, linear, linear_vp, ve

M, V = np.array([0.7, -0.4]), np.array([0.3, 2.0])
X1 = np.array([0.9, -1.3])
PATHS = {
    "linear_vp": linear_vp,
    "linear": linear,
    "gvp": gvp,
    "edm": lambda: edm(4.0),
    "ve": lambda: ve(0.1, 4.0),
}


def data(schedule, m=M, v=V):
    return gaussian(jnp.asarray(m), jnp.diag(jnp.asarray(v)), schedule)


# ---- deterministic samplers, all paths in one program --------------------------------------------

STEPS = np.array([64, 128, 256])
# The first time is below 1 where alpha must not vanish, the last above 0 where sigma ~ sqrt(t) is
# not smooth in t.
SPANS = {
    "linear_vp": (1.0, 0.05),
    "linear": (1.0, 0.0),
    "gvp": (1.0, 0.0),
    "edm": (1.0, 0.0),
    "ve": (1.0, 0.0),
}


def any_path(which, t):
    """The path of that number."""
    branches = [
        lambda t, make=make: jnp.stack(make()(t)).astype(t.dtype) for make in PATHS.values()
    ]
    alpha, sigma = jax.lax.switch(which, branches, jnp.asarray(t))
    return alpha, sigma


@functools.cache
def errors_by_path(make, starts=()):
    """The errors for each number of steps; `starts` are pairs of a path and its first time."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def run(which, grids, x):
        schedule = bind(any_path, which)
        sampler = make(data(schedule), schedule)
        return jax.vmap(lambda ts: sample(jax.random.key(0), sampler, x, ts))(grids)

    spans = {path: (dict(starts).get(path, start), end) for path, (start, end) in SPANS.items()}
    # the shorter grids stand still at their end, where a step from t to t is the identity
    grids = np.stack(
        [
            [np.pad(np.linspace(*span, n + 1), (0, STEPS[-1] - n), mode="edge") for n in STEPS]
            for span in spans.values()
        ]
    )
    results = np.asarray(run(np.arange(len(PATHS)), grids, X1))
    pairs = {
        path: [[float(c) for c in PATHS[path]()(t)] for t in span] for path, span in spans.items()
    }
    exact = np.array([oracles.gaussian_flow(M, V, *pairs[path], X1) for path in PATHS])
    return dict(zip(PATHS, np.linalg.norm(results - exact[:, None], axis=-1), strict=True))


def check_order_and_limit(errors, order):
    # steps of 1/64 to 1/256 are small enough for the leading term to show the order within 0.15
    assert abs(oracles.fitted_order(STEPS, errors) - order) < 0.15, errors
    assert errors[-1] < {1: 3e-2, 2: 2e-3}[order], errors


# ---- stochastic samplers: mean and variance, exactly ---------------------------------------------


def affine(monkeypatch, sampler, grids):
    """Of the step x_s = A x + B + C z on one-dimensional data: A, B, |C|^2 for every step of every
    grid.
    """

    def step(inputs, t, s):
        x, zs = inputs
        with monkeypatch.context() as patch:  # the noise in place of its keys
            patch.setattr(jax.random, "fold_in", lambda zs, i: zs[i])
            patch.setattr(
                jax.random,
                "normal",
                lambda z, shape, dtype=float: jnp.broadcast_to(jnp.ravel(z)[0], shape),
            )
            return sampler.step(zs, sampler.init(x, t), t, s).x

    @jax.jit
    @jax.vmap
    def coefficients_of(t, s):
        zero = jnp.zeros(1), jnp.zeros(3)
        slope, noise = jax.jacfwd(step)(zero, t, s)
        return slope[0, 0], step(zero, t, s)[0], jnp.sum(noise[0] ** 2)

    pairs = [np.stack([ts[:-1], ts[1:]]) for ts in grids]
    flat = np.asarray(coefficients_of(*map(jnp.asarray, np.concatenate(pairs, axis=1))))
    return np.split(flat, np.cumsum([p.shape[1] for p in pairs])[:-1], axis=1)


def moments(schedule, t, m, v):
    alpha, sigma = (float(c) for c in schedule(jnp.asarray(t)))
    mean, variance = oracles.gaussian_marginal(m, v, alpha, sigma)
    return np.array([mean, variance])


def errors_of(monkeypatch, sampler, schedule, grids, m, v):
    errors = []
    for ts, steps in zip(grids, affine(monkeypatch, sampler, grids), strict=True):
        mean, variance = moments(schedule, ts[0], m, v)
        for a, b, c2 in steps.T:
            mean, variance = a * mean + b, a**2 * variance + c2
        errors.append(np.abs(np.array([mean, variance]) - moments(schedule, ts[-1], m, v)).sum())
    return np.array(errors)


def check_that_moments_converge(monkeypatch, make, path, start=1.0):
    """Mean and variance of the last x become those of the data."""
    schedule = PATHS[path]()
    # on edm with a = g the first order vanishes at t = 0
    end = {"linear_vp": 0.05, "linear": 0.0, "edm": 0.25}[path]
    m, v = 0.7, 0.3
    steps = np.array([128, 256, 512, 1024])
    grids = [np.linspace(start, end, n + 1) for n in steps]
    sampler = make(data(schedule, [m], [v]), schedule)
    errors = errors_of(monkeypatch, sampler, schedule, grids, m, v)
    assert errors[-1] < 0.02
    # weak order 1: at these steps the next term moves the slope by at most 0.2
    assert abs(oracles.fitted_order(steps, errors) - 1) < 0.2, errors


# ---- the whole path ------------------------------------------------------------------------------


def _one_of(which, schedules, t):
    branches = [lambda t, f=f: tuple(jnp.asarray(c, t.dtype) for c in f(t)) for f in schedules]
    return jax.lax.switch(which, branches, jnp.asarray(t))


def check_finite_gradients(make, paths):
    """From t = 1, where alpha may be 0, to t = 0, where sigma is 0: values, and gradients with
    respect to x, the path and the grid, in single precision. One program serves the paths.
    """
    dtype = np.float32

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def loss(schedules, x, inner, which):
        schedule = bind(_one_of, which, schedules)
        ts = jnp.concatenate([jnp.ones(1, dtype), inner, jnp.zeros(1, dtype)])
        denoise = gaussian(jnp.asarray(M, dtype), jnp.diag(jnp.asarray(V, dtype)), schedule)
        return jnp.sum(sample(jax.random.key(0), make(denoise, schedule), x, ts))

    schedules = [
        jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PATHS[path]()) for path in paths
    ]
    for which, path in enumerate(paths):
        values = loss(schedules, jnp.asarray(X1, dtype), jnp.array([0.7, 0.3], dtype), which)
        for leaf in jax.tree.leaves(values):
            assert leaf.dtype == dtype and np.isfinite(leaf).all(), (path, values)


def sigma_of(schedule, t):
    return schedule(t)[1]
