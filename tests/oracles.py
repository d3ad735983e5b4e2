"""Closed forms in numpy and mpmath, written from the mathematics and not from the library.

Nothing here imports diffjax. A Gaussian N(m, S) with diagonal S stays Gaussian along every path, so
its marginals, score, posterior means, probability flow and log density are all known; a mixture has
a known density, whose gradient is the score.
"""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np

mp.mp.dps = 40

# ---- Table 1.1, in 40 digits
# ----------------------------------------------------------------------------------------- Each
# row: alpha, sigma, f, g^2 as functions of t, and t(lambda). The numbers are those of the
# constructors' defaults.

B0, B1 = mp.mpf("0.1"), mp.mpf(20)
S_MIN, S_MAX, EDM_MAX = mp.mpf("0.01"), mp.mpf(50), mp.mpf(80)
OFFSET = mp.pi / 2 * mp.mpf("0.008") / mp.mpf("1.008")


def _beta(t):
    return B0 + t * (B1 - B0)


def _integral_beta(t):
    return t * B0 + t**2 * (B1 - B0) / 2


def _vp_inverse(value):
    total = mp.log1p(mp.exp(-2 * value))
    return 2 * total / (B0 + mp.sqrt(B0**2 + 2 * (B1 - B0) * total))


def _angle(t):
    return OFFSET + (mp.pi / 2 - OFFSET) * t


TABLE = {
    "linear_vp": (
        lambda t: mp.exp(-_integral_beta(t) / 2),
        lambda t: mp.sqrt(1 - mp.exp(-_integral_beta(t))),
        lambda t: -_beta(t) / 2,
        _beta,
        _vp_inverse,
    ),
    "sub_vp": (
        lambda t: mp.exp(-_integral_beta(t) / 2),
        lambda t: 1 - mp.exp(-_integral_beta(t)),
        lambda t: -_beta(t) / 2,
        lambda t: _beta(t) * (1 - mp.exp(-2 * _integral_beta(t))),
        None,
    ),
    "ve": (
        lambda t: mp.mpf(1),
        lambda t: S_MIN * (S_MAX / S_MIN) ** t,
        lambda t: mp.mpf(0),
        lambda t: 2 * mp.log(S_MAX / S_MIN) * (S_MIN * (S_MAX / S_MIN) ** t) ** 2,
        lambda value: -(value + mp.log(S_MIN)) / mp.log(S_MAX / S_MIN),
    ),
    "edm": (
        lambda t: mp.mpf(1),
        lambda t: t * EDM_MAX,
        lambda t: mp.mpf(0),
        lambda t: 2 * t * EDM_MAX**2,
        lambda value: mp.exp(-value) / EDM_MAX,
    ),
    "linear": (
        lambda t: 1 - t,
        lambda t: t,
        lambda t: -1 / (1 - t),
        lambda t: 2 * t / (1 - t),
        lambda value: 1 / (1 + mp.exp(value)),
    ),
    "gvp": (
        lambda t: mp.cos(mp.pi * t / 2),
        lambda t: mp.sin(mp.pi * t / 2),
        lambda t: -mp.pi / 2 * mp.tan(mp.pi * t / 2),
        lambda t: mp.pi * mp.tan(mp.pi * t / 2),
        lambda value: 2 / mp.pi * mp.atan(mp.exp(-value)),
    ),
    "cosine": (
        lambda t: mp.cos(_angle(t)) / mp.cos(OFFSET),
        lambda t: mp.sqrt(1 - (mp.cos(_angle(t)) / mp.cos(OFFSET)) ** 2),
        lambda t: -(mp.pi / 2 - OFFSET) * mp.tan(_angle(t)),
        lambda t: 2 * (mp.pi / 2 - OFFSET) * mp.tan(_angle(t)),
        lambda value: (
            (mp.acos(mp.cos(OFFSET) / mp.sqrt(1 + mp.exp(-2 * value))) - OFFSET)
            / (mp.pi / 2 - OFFSET)
        ),
    ),
}


def alpha_sigma(name, t):
    """Float64 alpha and sigma of a row of the table at a (float) time."""
    return float(TABLE[name][0](mp.mpf(t))), float(TABLE[name][1](mp.mpf(t)))


# ---- Gaussian data N(m, diag(v)) -----------------------------------------------------------------


def gaussian_marginal(m, v, alpha, sigma):
    """Mean and variances of x_t."""
    return alpha * m, alpha**2 * v + sigma**2


def gaussian_score(m, v, alpha, sigma, x):
    mean, variance = gaussian_marginal(m, v, alpha, sigma)
    return -(x - mean) / variance


def gaussian_log_density(m, v, alpha, sigma, x):
    mean, variance = gaussian_marginal(m, v, alpha, sigma)
    return float(np.sum(-0.5 * np.log(2 * np.pi * variance) - 0.5 * (x - mean) ** 2 / variance))


def gaussian_flow(m, v, start, end, x):
    """Where the probability flow takes x; start and end are the pairs (alpha, sigma)."""
    mean_0, variance_0 = gaussian_marginal(m, v, *start)
    mean_1, variance_1 = gaussian_marginal(m, v, *end)
    return mean_1 + np.sqrt(variance_1 / variance_0) * (x - mean_0)


# ---- mixtures ------------------------------------------------------------------------------------


def mixture_log_density(weights, means, covs, alpha, sigma, x):
    """log p(x_t) of a Gaussian mixture, component by component through the Cholesky factor; jax can
    differentiate it.
    """
    terms = []
    for w, m, c in zip(weights, means, covs, strict=True):
        factor = jnp.linalg.cholesky(alpha**2 * c + sigma**2 * jnp.eye(m.size))
        white = jax.scipy.linalg.solve_triangular(factor, x - alpha * m, lower=True)
        norm = jnp.sum(jnp.log(jnp.diag(factor))) + 0.5 * m.size * jnp.log(2 * jnp.pi)
        terms.append(jnp.log(w) - 0.5 * jnp.sum(white**2) - norm)
    return jax.scipy.special.logsumexp(jnp.stack(terms))


# ---- measuring -----------------------------------------------------------------------------------


def fitted_order(steps, errors):
    """The exponent p of error ~ steps^-p, by least squares in the logarithms."""
    return -np.polyfit(np.log(np.asarray(steps, float)), np.log(np.asarray(errors, float)), 1)[0]


def central_difference(f, x, h=1e-5):
    """df/dx of a scalar function, with error O(h^2) + 1e-16/h: about 1e-10 relative for smooth f of
    order one.
    """
    return (float(f(x + h)) - float(f(x - h))) / (2 * h)
