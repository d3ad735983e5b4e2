"""Distances of samples to held-out data: in the plane, in pixels, and in features."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.neural_network import MLPClassifier

from diffjax.features import efficientnet_lite0
from diffjax.metrics import frechet_distance, kernel_distance, sliced_wasserstein, wasserstein
from experiments.image_models import digits, image_quality, pixels
from experiments.image_models.models import to_images
from experiments.objectives import Data, Settings

Distances = dict[str, Callable[..., float]]
"""Distances of samples to held-out data, by name. The first one is cheap."""


def distances_of(name: str, data: Data, settings: Settings) -> tuple[Distances, dict[str, float]]:
    """The distances, and their values between two sets of data."""
    return digits_distances(settings) if name == "digits" else plane_distances(data, settings)


def plane_distances(data: Data, settings: Settings) -> tuple[Distances, dict[str, float]]:
    held_out = data.held_out[: settings.samples]

    def sliced(x):
        samples = jnp.asarray(x), jnp.asarray(held_out)
        return float(sliced_wasserstein(jax.random.key(0), *samples, p=1))

    functions: Distances = {
        "sliced 1-Wasserstein": sliced,
        "2-Wasserstein": lambda x: wasserstein(x, held_out, 2),
    }
    others = data.held_out[settings.samples :][: len(held_out)]
    return functions, {name: distance(others) for name, distance in functions.items()}


def digits_distances(settings: Settings) -> tuple[Distances, dict[str, float]]:
    data = digits.load(0)
    held_out, train = pixels(data.held_out, data), pixels(data.train, data)
    classifier = MLPClassifier((64, 32), max_iter=400, random_state=0).fit(train, data.train_labels)

    def features(x):
        for weights, bias in list(zip(classifier.coefs_, classifier.intercepts_, strict=True))[:-1]:
            x = np.maximum(x @ weights + bias, 0)
        return x

    functions: Distances = {
        "Fréchet (pixels)": lambda images: frechet_distance(pixels(images, data), held_out),
        "Fréchet (classifier)": lambda images: frechet_distance(
            features(pixels(images, data)), features(held_out)
        ),
    }
    # 360 images are too few for a Fréchet distance of 1280 features.
    if settings.efficientnet is not None:
        network = efficientnet_lite0(settings.efficientnet)

        def embed(images):
            images = images.reshape(-1, *data.shape)
            return image_quality.features(network, images, data.levels, chunk=100)

        reference = embed(data.held_out)

        def kid(images):
            key, size = jax.random.key(0), len(reference)
            return float(kernel_distance(key, embed(images), reference, size=size).value)

        functions["KID (EfficientNet)"] = kid
    others = data.train[: settings.samples]
    between = {name: distance(others) for name, distance in functions.items()}
    between["classifier's accuracy"] = float(classifier.score(held_out, data.held_out_labels))

    def on_samples(distance):
        return lambda xs: distance(to_images(jnp.asarray(xs), data))

    return {name: on_samples(distance) for name, distance in functions.items()}, between
