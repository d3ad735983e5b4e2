r"""Noise schedules: paths `x_t = alpha(t) x0 + sigma(t) eps` from data (t = 0) to prior (t = 1).

A schedule is any function `t -> (alpha, sigma)` of a scalar time. It defines

    p(x_t | x_0) = N(alpha x_0, sigma^2 I)                                   (1.3), (1.24)
    dx = f x dt + g dw,  f = alpha'/alpha,  g^2 = (sigma^2)' - 2 f sigma^2    (1.2), (1.25)
    half log-SNR  lambda = log(alpha / sigma), decreasing in t

The derivatives come from one forward-mode pass, so none is derived by hand. The constructors are
the paths of Table 1.1. Their alpha and sigma are accurate to *relative* precision at both ends:
sigma is `sqrt(-expm1(2 log alpha))` and not `sqrt(1 - alpha^2)`, which in float32 is 9% off at
t = 1e-6.

Your own schedule is a function. Bind its numbers to make them visible to jax:

    def power(exponent, t):
        return 1 - t**exponent, t**exponent

    schedule = bind(power, 2.0)
"""

from .coefficients import (
    Coefficients,
    alpha_sigma,
    coefficients,
    diffusion,
    diffusion_squared,
    drift,
    half_log_snr,
    half_log_snr_inverse,
)
from .converted import from_betas, from_sde, to_betas, zero_terminal_snr
from .learned import MonotoneNetwork, init_monotone, monotone_vp
from .paths import cosine, edm, gvp, linear, linear_vp, sub_vp, ve

__all__ = [
    "Coefficients",
    "MonotoneNetwork",
    "alpha_sigma",
    "coefficients",
    "cosine",
    "diffusion",
    "diffusion_squared",
    "drift",
    "edm",
    "from_betas",
    "from_sde",
    "gvp",
    "half_log_snr",
    "half_log_snr_inverse",
    "init_monotone",
    "linear",
    "linear_vp",
    "monotone_vp",
    "sub_vp",
    "to_betas",
    "ve",
    "zero_terminal_snr",
]
