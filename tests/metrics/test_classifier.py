"""Scores by a classifier in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from point_sets import normal
from sklearn.dummy import DummyClassifier

from diffjax.metrics import classifier_accuracy_score, inception_score


def test_inception_score_in_closed_form():
    score = jax.jit(inception_score)
    np.testing.assert_allclose(score(np.eye(4)), 4, rtol=1e-12)
    np.testing.assert_allclose(score(np.tile([0.5, 0.2, 0.3, 0.0], (4, 1))), 1, rtol=1e-12)
    a = 0.9  # a marginal of (1/2, 1/2): log 2 less the entropy of one row
    np.testing.assert_allclose(
        score(np.array([[a, 1 - a], [1 - a, a]])), 2 * a**a * (1 - a) ** (1 - a), rtol=1e-12
    )


def test_the_inception_score_of_traced_nan_is_nan():
    assert np.isnan(jax.jit(inception_score)(jnp.full((2, 3), jnp.nan)))


def test_inception_score_of_splits():
    p = np.random.default_rng(0).dirichlet(np.ones(5), (3, 4))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(inception_score))(p), [inception_score(rows) for rows in p], rtol=1e-12
    )


def test_the_gradient_of_the_inception_score_is_finite_where_a_probability_is_zero():
    logits = jnp.array([[0.0, -1e4, 0.5], [1.0, -1e4, 0.0]])  # exp(-1e4) = 0
    assert np.all(
        np.isfinite(jax.jit(jax.grad(lambda z: inception_score(jax.nn.softmax(z))))(logits))
    )


class Nearest:
    """A classifier that keeps what it was given."""

    def fit(self, x, labels):
        self.x, self.labels = x, labels

    def predict(self, x):
        return self.labels[np.argmin(np.linalg.norm(x[:, None] - self.x[None], axis=-1), axis=1)]


def test_classifier_accuracy_score():
    generated, real = np.array([[[0.0]], [[10.0]]]), np.array([[[1.0]], [[2.0]], [[9.0]], [[4.0]]])
    assert (
        classifier_accuracy_score(Nearest(), generated, ["a", "b"], real, ["a", "b", "b", "a"])
        == 0.75
    )
    classifier, labels = DummyClassifier(strategy="most_frequent"), np.array([1, 1, 0])
    assert (
        classifier_accuracy_score(
            classifier, normal(0, 3, 2), labels, normal(1, 4, 2), [1, 0, 0, 0]
        )
        == 0.25
    )


X = normal(0, 6, 3)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: inception_score(np.ones(3)),
            r"probabilities: expected shape \(n, classes\), got \(3,\)",
        ),
        (lambda: inception_score(np.ones((0, 3))), "probabilities: expected at least 1 samples"),
        (
            lambda: inception_score(X),
            r"probabilities: expected numbers in \[0, 1\] .* give the softmax",
        ),
        (lambda: inception_score(np.nan * X), "probabilities: expected finite"),
        (
            lambda: classifier_accuracy_score(Nearest(), X, X[0], X, np.ones(6)),
            r"generated_labels: expected shape \(6,\)",
        ),
        (
            lambda: classifier_accuracy_score(Nearest(), X, np.ones(6), X, np.ones((6, 1))),
            r"real_labels: .* got \(6, 1\)",
        ),
        (
            lambda: classifier_accuracy_score(Nearest(), X, np.ones(6), X[:, :2], np.ones(6)),
            "real: expected samples of the",
        ),
    ],
)
def test_refusals(use, message):
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(ValueError, match=message):
        use()
