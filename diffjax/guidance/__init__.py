"""Guidance: denoisers in, a denoiser out.

The result keeps `alpha x0 + sigma eps = x`: classifier-free guidance is affine in both estimates,
and clipping changes both together. So every sampler and every likelihood takes it.
"""

from .classifier_free import cfg, conditional_cfg
from .clipping import clip_x0

__all__ = ["cfg", "clip_x0", "conditional_cfg"]
