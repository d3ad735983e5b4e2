"""Denoisers whose prediction is a polynomial of the time alone, on which the steps of a method are
exact.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles

from diffjax import bind
from diffjax.schedules import linear_vp
from diffjax.typing import Estimate

partial = functools.partial
X1 = np.array([0.9, -1.3])
# Four times before the step and its end: uneven, but even enough for every order. The prediction p
# is a polynomial of u alone, whatever x is.
TIMES = [0.8, 0.67, 0.56, 0.43, 0.34]
VARIABLES = {
    "x0": lambda alpha, sigma, t, log: log(alpha / sigma),
    "eps": lambda alpha, sigma, t, log: log(alpha / sigma),
    "eps in t": lambda alpha, sigma, t, log: t,
    "velocity": lambda alpha, sigma, t, log: sigma / (alpha + sigma),
}
# of u^0 ... u^3, for both coordinates
POLYNOMIAL = np.array([[0.7, -0.4], [0.9, 0.3], [-0.5, 0.8], [0.6, -0.7]])


def horner(coefficients, u):
    total = 0
    for c in reversed(coefficients):
        total = total * u + c
    return total


def polynomial_denoiser(kind, degree, schedule):
    return bind(partial(_polynomial, kind, degree), schedule)


def _polynomial(kind, degree, schedule, x, t):
    alpha, sigma = schedule(t)
    p = horner(jnp.asarray(POLYNOMIAL[: degree + 1]), VARIABLES[kind](alpha, sigma, t, jnp.log))
    if kind == "x0":
        return Estimate(p, (x - alpha * p) / sigma)
    if kind == "velocity":
        return Estimate((x - sigma * p) / (alpha + sigma), (x + alpha * p) / (alpha + sigma))
    return Estimate((x - sigma * p) / alpha, p)


def exact_step(kind, degree, path, x, t, s):
    """x / sigma, x / alpha or x / (alpha + sigma) changes by the integral of p over the other
    ratio.
    """
    alpha, sigma = oracles.TABLE[path][:2]
    t, s = mp.mpf(t), mp.mpf(s)
    scale, ratio, u = {
        "x0": (sigma, lambda t: alpha(t) / sigma(t), mp.log),
        "eps": (alpha, lambda t: sigma(t) / alpha(t), lambda ratio: -mp.log(ratio)),
        "velocity": (
            lambda t: alpha(t) + sigma(t),
            lambda t: sigma(t) / (alpha(t) + sigma(t)),
            lambda ratio: ratio,
        ),
        "eps in t": (alpha, lambda t: sigma(t) / alpha(t), None),
    }[kind]
    result = []
    with mp.workdps(25):
        for value, c in zip(x, POLYNOMIAL[: degree + 1].T.tolist(), strict=True):
            if kind == "eps in t":
                change = mp.quad(lambda v, c=c: horner(c, v) * mp.diff(ratio, v), [t, s])
            else:
                change = mp.quad(lambda v, c=c: horner(c, u(v)), [ratio(t), ratio(s)])
            result.append(float(scale(s) * (mp.mpf(float(value)) / scale(t) + change)))
    return np.array(result)


def vp_step(*times):
    """alpha and sigma of linear_vp at the times, and lambda."""
    alphas, sigmas = np.array([oracles.alpha_sigma("linear_vp", t) for t in times]).T
    return alphas, sigmas, np.log(alphas / sigmas)


def warm(step, sampler, times, key=None):
    """The state at the last time, after a run from the first one."""
    state = sampler.init(jnp.asarray(X1), times[0])
    for t, s in itertools.pairwise(times):
        state = step(key, state, t, s)
    return state


def check_exact_step(make, kind, points):
    """A step is exact on the polynomial through that many points, and not on one of a degree more."""
    path, schedule, (t, s) = "linear_vp", linear_vp(), TIMES[-2:]
    for degree in (points - 1, points):
        sampler = make(polynomial_denoiser(kind, degree, schedule), schedule)
        step = jax.jit(sampler.step)
        x = step(None, warm(step, sampler, TIMES[:-1])._replace(x=jnp.asarray(X1)), t, s).x
        error = np.abs(x - exact_step(kind, degree, path, X1, t, s)).max()
        # exact but for rounding, which divided differences of nodes 0.1 apart multiply by 100; one
        # degree more is not
        assert error < 1e-12 if degree < points else error > 1e-6, (degree, error)
