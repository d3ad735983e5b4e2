"""Gaussian data on the linear VP path: grids, and the error of a sampler at their end."""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles

from diffjax import schedules
from diffjax.exact import gaussian
from diffjax.samplers import sample

M, V = np.array([0.7, -0.4]), np.array([0.3, 2.0])
END = 1e-3  # where the grids of linear_vp stop
XS = np.random.default_rng(5).normal(size=(4, 2))


def data(schedule, m=M, v=V):
    return gaussian(jnp.asarray(m), jnp.diag(jnp.asarray(v)), schedule)


def pairs(path, ts):
    """Alpha and sigma at all times, as two vectors."""
    return np.array([oracles.alpha_sigma(path, float(t)) for t in ts]).T


def time_of(half_log_snr):
    """On linear_vp."""
    return float(oracles.TABLE["linear_vp"][4](mp.mpf(float(half_log_snr))))


def even_in_log_snr(n):
    """A grid of linear_vp from 1 to END, from the closed form."""
    start, end = (np.log(np.divide(*oracles.alpha_sigma("linear_vp", t))) for t in (1.0, END))
    return np.array([1.0, *map(time_of, np.linspace(start, end, n + 1)[1:-1]), END])


def column(a):
    return np.asarray(a)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def ends_of(make, grids, x):
    """Where a sampler ends on each of many grids, all of one length."""
    schedule = schedules.linear_vp()
    return jax.vmap(lambda ts: sample(jax.random.key(0), make(data(schedule), schedule), x, ts))(
        grids
    )


def end_errors(make, grids, x):
    # one program: the shorter grids stand still at their end, where a step from t to t is the
    # identity
    n = max(map(len, grids))
    reached = ends_of(
        make, np.stack([np.pad(ts, (0, n - len(ts)), mode="edge") for ts in grids]), jnp.asarray(x)
    )
    span = (oracles.alpha_sigma("linear_vp", float(t)) for t in (grids[0][0], grids[0][-1]))
    return np.sqrt(
        np.mean((np.asarray(reached) - oracles.gaussian_flow(M, V, *span, x)) ** 2, (1, 2))
    )
