"""The likelihood of a diffusion model: of continuous data by its probability flow, of discrete data
by dequantization.
"""

from .discrete import (
    bits_per_dim,
    dequantize,
    importance_weighted_bound,
    quantize,
    variational_dequantize,
)
from .flow import StandardErrors, log_likelihood, standard_errors

__all__ = [
    "StandardErrors",
    "bits_per_dim",
    "dequantize",
    "importance_weighted_bound",
    "log_likelihood",
    "quantize",
    "standard_errors",
    "variational_dequantize",
]
