"""Training losses, each for one example, and their mean over a batch.

    score matching       explicit, implicit, sliced                    (1.13)
    denoising            w(t) |network(x_t, t) - target|^2             (1.14), (1.15)
    flow matching        to a known velocity, of pairs, of bridges     (1.16), (1.17)
    variational bound    for infinitely many steps, in nats            (1.14) with lambda = g^2
    maximum likelihood   of a continuous normalizing flow              (1.12)
    classification       of noisy data, for classifier guidance        (1.40)

`over_batch` draws the keys and the times (`times`) of a batch, and averages. A squared error is the
mean over the elements of x, so that a loss does not grow with the dimension. Likelihoods and their
bounds are in nats. `weightings` has the weights w, `couplings` the pairs for flow matching.
"""

from .batch import over_batch
from .classification import noisy_classification
from .denoising import denoising
from .flow_matching import bridge_matching, conditional_flow_matching, flow_matching
from .maximum_likelihood import FlowDensity, maximum_likelihood, standard_normal
from .score_matching import explicit_score_matching, implicit_score_matching, sliced_score_matching
from .variational import discrete_reconstruction, gaussian_reconstruction, variational_bound

__all__ = [
    "FlowDensity",
    "bridge_matching",
    "conditional_flow_matching",
    "denoising",
    "discrete_reconstruction",
    "explicit_score_matching",
    "flow_matching",
    "gaussian_reconstruction",
    "implicit_score_matching",
    "maximum_likelihood",
    "noisy_classification",
    "over_batch",
    "sliced_score_matching",
    "standard_normal",
    "variational_bound",
]
