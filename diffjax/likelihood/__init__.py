"""The likelihood of continuous data, by the probability flow, and of discrete data."""

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
