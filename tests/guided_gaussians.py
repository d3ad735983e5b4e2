"""Laws of guided samplers on Gaussian data, where every step is affine in x."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

from diffjax.schedules import coefficients
from experiments.guidance_laws import law


def errors(kernel, expected, steps, mean, cov, start=1.0, end=0.0):
    """The largest error of mean and covariance, for each number of steps of a uniform grid."""
    found = (law(kernel, np.linspace(start, end, n + 1), mean, cov) for n in steps)
    return np.array(
        [max(abs(a - b).max() for a, b in zip(f, expected, strict=True)) for f in found]
    )


def limit(estimate, schedule, noise, mean, cov, start, end):
    """Mean and covariance at the end of the SDE of noise amplitude `noise` g, by an ODE of moments.

    `estimate(alpha, sigma) -> (P, q)` with x0' = P x + q, in numpy: the method, not by the library.
    With v = alpha' x0' + sigma' eps', eps' = (x - alpha x0') / sigma, the drift in decreasing t is
    -v + (noise g)^2 / 2 score', score' = -eps' / sigma.
    """
    d = len(mean)
    table = jax.jit(lambda t: jnp.stack(coefficients(schedule, t)))

    def rates(t, state):
        alpha, sigma, dalpha, dsigma = np.asarray(table(t))
        p, q = estimate(alpha, sigma)
        e, f = (np.eye(d) - alpha * p) / sigma, -alpha * q / sigma
        g2 = noise**2 * 2 * sigma * (dsigma - sigma * dalpha / alpha)
        # d/dt of the mean and of the covariance of the process that runs to smaller t
        a = dalpha * p + (dsigma + 0.5 * g2 / sigma) * e
        b = dalpha * q + (dsigma + 0.5 * g2 / sigma) * f
        mean, cov = state[:d], state[d:].reshape(d, d)
        return np.concatenate([a @ mean + b, (a @ cov + cov @ a.T - g2 * np.eye(d)).ravel()])

    solved = scipy.integrate.solve_ivp(
        rates,
        (start, end),
        np.concatenate([mean, np.ravel(cov)]),
        rtol=1e-10,
        atol=1e-12,
        method="DOP853",
    )
    assert solved.success
    return solved.y[:d, -1], solved.y[d:, -1].reshape(d, d)
