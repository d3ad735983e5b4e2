"""Scores by a classifier: its probabilities of samples, and its accuracy after training on them."""

from typing import Any

import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import check_that
from ._features import features, host_features, nan_unless_finite, pair

__all__ = ["classifier_accuracy_score", "inception_score"]


def inception_score(probabilities: Float[ArrayLike, "n classes"]) -> Float[Array, ""]:
    """The inception score: `exp(mean_i KL(p(c | x_i) | p(c)))`, with `p(c) = mean_i p(c | x_i)`.

    It lies between 1, where all samples look alike, and the number of classes. It does not depend
    on the data, and is biased downwards for few samples. For logits, give `jax.nn.softmax(logits)`.
    The usual "mean and standard deviation over ten splits" is
    `scores = jax.vmap(inception_score)(probabilities.reshape(10, -1, classes))`.

    Args:
        probabilities: p(c | x_i), (n, classes), rows that sum to one.

    Returns:
        The score.

    Raises:
        ValueError: if the rank is not 2, there is no sample, the dtype is not floating-point, or
            a row is not a probability distribution.

    Reference: Salimans et al. 2016 (arXiv 1606.03498), section 4.

    >>> inception_score(jnp.eye(4))
    Array(4., dtype=float32)
    """
    if jnp.ndim(probabilities) != 2:
        raise ValueError(
            f"probabilities: expected shape (n, classes), got {jnp.shape(probabilities)}"
        )
    p = features(probabilities, "probabilities")
    message = (
        "probabilities: expected numbers in [0, 1] whose rows sum to 1 (to within 1e-2); "
        "for logits, give the softmax"
    )
    check_that(lambda p: (p >= 0) & (abs(p.sum(1, keepdims=True) - 1) < 1e-2), message, p)
    return _inception_score(p)


@jax.jit
def _inception_score(p):
    marginal = jnp.mean(p, axis=0, keepdims=True)
    divergences = jnp.sum(jax.scipy.special.rel_entr(p, marginal), axis=1)
    return nan_unless_finite(jnp.exp(jnp.mean(divergences)), p)


def classifier_accuracy_score(
    classifier: Any,
    generated: npt.ArrayLike,
    generated_labels: npt.ArrayLike,
    real: npt.ArrayLike,
    real_labels: npt.ArrayLike,
) -> float:
    """The classification accuracy score (CAS) of generated samples.

    It is the accuracy on real data of a classifier trained on generated samples alone. For
    comparison, call it with real training samples in place of the generated ones.

    Args:
        classifier: an object with scikit-learn's `fit(x, labels)` and `predict(x)`. It is fitted in
            place.
        generated: samples (n, ...), flattened to (n, d) for the classifier.
        generated_labels: the classes for which they were generated, (n,).
        real: held-out data (m, ...).
        real_labels: their classes, (m,).

    Returns:
        The share of real data whose class is predicted, in [0, 1].

    Raises:
        ValueError: if there are no samples, trailing shapes differ, values are not finite, or
            labels have another shape.

    Reference: Ravuri and Vinyals 2019 (arXiv 1905.10887).

    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> generated, real = [[0.0], [1.0]], [[0.1], [0.2], [0.8], [0.9]]
    >>> nearest, labels = KNeighborsClassifier(1), ["a", "b", "b", "b"]
    >>> classifier_accuracy_score(nearest, generated, ["a", "b"], real, labels)
    0.75
    """
    generated, real = pair(generated, real, ("generated", "real"), to=host_features)
    named = (("generated", generated, generated_labels), ("real", real, real_labels))
    for name, samples, labels in named:
        if np.shape(labels) != (len(samples),):
            raise ValueError(
                f"{name}_labels: expected shape ({len(samples)},), got {np.shape(labels)}"
            )
    classifier.fit(generated, np.asarray(generated_labels))
    return float(np.mean(classifier.predict(real) == np.asarray(real_labels)))
