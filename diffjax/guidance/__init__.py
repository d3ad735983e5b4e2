"""Guidance: denoisers in, a denoiser out.

The result keeps `alpha x0 + sigma eps = x`, so samplers and likelihoods take it. What cannot keep
it is a sampler (`samplers.cfg_plus_plus`). The methods for observations (`inverse`) take one
sample, and `vmap` makes them take a batch. Denoisers that differ only in what is bound as `cond`
are evaluated in one call of the network.

A method that needs the numbers of one sample (`rescaled`, `projected`, `zero_star`,
`dynamic_threshold`, `classifier`, `energy`) takes their number of axes, so that a batch is guided
sample by sample.
"""

from .classifier import classifier, energy
from .classifier_free import cfg, composed, interval
from .clipping import clip_x0, dynamic_threshold
from .inverse import diffpir, dps, mmps, pigdm, tweedie_twist
from .projected import projected
from .rescaled import rescaled
from .zero_star import zero_star

__all__ = [
    "cfg",
    "classifier",
    "clip_x0",
    "composed",
    "diffpir",
    "dps",
    "dynamic_threshold",
    "energy",
    "interval",
    "mmps",
    "pigdm",
    "projected",
    "rescaled",
    "tweedie_twist",
    "zero_star",
]
