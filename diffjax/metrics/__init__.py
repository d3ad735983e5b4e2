"""Distances between samples and data, measured on features that the caller gives.

Features are arrays (n, ...), flattened to (n, d).

    frechet_distance      |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2}); FID for Inception's
    frechet_infinity      its limit as the number of samples grows
    mmd                   E k(x, x') + E k(y, y') - 2 E k(x, y)
    kernel_distance       mmd with k = (x.y / d + 1)^3, in blocks; KID in Inception features
    energy_distance       2 E|x - y| - E|x - x'| - E|y - y'|
    wasserstein           min over pairings of (mean |x_i - y_i|^p)^{1/p}
    sliced_wasserstein    wasserstein of projections on random lines
    precision_recall      shares of samples inside the k-nearest-neighbour balls of the other set
    density_coverage      samples in each ball of the real set, and the share of balls with a sample
    path_length           int |dx/dt| dt
    path_energy           int |dx/dt|^2 dt
    curvature             path_energy minus that of a straight line
    inception_score       exp(E KL(p(c | x) | p(c)))
    classifier_accuracy_score
                          accuracy on real data of a classifier trained on samples

The Fréchet distances, `wasserstein` and `classifier_accuracy_score` are computed on the host, in
float64. The others are pure jax functions, in the precision of the features but at least float32. A
mean over pairs needs no array of pairs: a few rows of x at a time are compared with all of y, by
differences. The matrix product `|x|^2 + |y|^2 - 2 x.y` would lose `eps |x|^2` of each distance: all
of it for features with a large common offset, and for close neighbours even without one.
"""

from .classifier import classifier_accuracy_score, inception_score
from .frechet import Moments, frechet_distance, frechet_infinity, gaussian_frechet_distance, moments
from .kernels import KernelDistance, energy_distance, kernel_distance, mmd, polynomial_kernel
from .neighbours import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from .paths import curvature, path_energy, path_length
from .transport import sliced_wasserstein, wasserstein

__all__ = [
    "DensityCoverage",
    "KernelDistance",
    "Moments",
    "PrecisionRecall",
    "classifier_accuracy_score",
    "curvature",
    "density_coverage",
    "energy_distance",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_frechet_distance",
    "inception_score",
    "kernel_distance",
    "mmd",
    "moments",
    "path_energy",
    "path_length",
    "polynomial_kernel",
    "precision_recall",
    "sliced_wasserstein",
    "wasserstein",
]
