"""The scores of an image model: Fréchet distances, a classifier, neighbours, bits/dim."""

import functools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.svm import SVC

import diffjax as dj
from diffjax import divergence, likelihood
from diffjax.metrics import frechet_distance
from experiments.image_models import Images, Settings, pixels
from experiments.image_models.models import class_labels, generate, noise, to_images
from experiments.results import Score
from experiments.train_images import Model

FRECHET = (
    "The Fréchet distance between Gaussians fitted to the pixels of {} and of the held-out images."
)
BITS = "Minus log2 of the model's probability of {}, given its label, per pixel. The trace is {}."
PIXELS = "pixels from -1 to 1"
SCORES = {
    "Fréchet distance": Score(FRECHET.format("samples"), f"squared {PIXELS}", "lower"),
    "Fréchet distance, guided": Score(
        FRECHET.format("guided samples"), f"squared {PIXELS}", "lower"
    ),
    "Fréchet distance of training images": Score(
        FRECHET.format("as many training images"), f"squared {PIXELS}"
    ),
    "Fréchet ratio": Score("The distance of samples over that of training images.", "", "lower"),
    "guided samples classified as asked": Score(
        "The share of the guided samples that an SVM assigns to the class of their label.",
        "",
        "higher",
    ),
    "unguided samples classified as asked": Score(
        "The same share of the unguided samples.", "", "higher"
    ),
    "classifier accuracy on held-out": Score(
        "The share of the held-out images that the SVM classifies correctly."
    ),
    "nearest training distance of samples": Score(
        "The median Euclidean distance to the nearest training image, 0 for copies.", PIXELS
    ),
    "nearest training distance of held-out": Score("The same distance of held-out images.", PIXELS),
    "bits/dim": Score(
        BITS.format("a held-out image", "Hutchinson's estimate with one probe"), "bits", "lower"
    ),
    "bits/dim, standard error of data": Score(
        "The standard error of bits/dim from the choice of images.", "bits"
    ),
    "exact bits/dim": Score(
        BITS.format("one of the first held-out images", "exact"), "bits", "lower"
    ),
    "Hutchinson bits/dim on the same images": Score(
        "The same by Hutchinson's estimate with eight probes. It should agree with the exact one.",
        "bits",
    ),
    "Hutchinson standard error of probes": Score(
        "The standard error of that estimate from the probes.", "bits"
    ),
    "training seconds": Score("The time of the training steps on the machine above.", "s", "lower"),
}


def fit_classifier(data: Images, max_images: int = 10_000) -> SVC:
    images, labels = data.train[:max_images], data.train_labels[:max_images]
    return SVC(kernel="rbf", C=10.0, gamma="scale").fit(pixels(images, data), labels)


def nearest(images: np.ndarray, data: Images) -> np.ndarray:
    """The Euclidean distance from each image to the nearest training image, in pixels()."""
    return pairwise_distances_argmin_min(pixels(images, data), pixels(data.train, data))[1]


def evaluate(model: Model, data: Images, settings: Settings) -> dict[str, Any]:
    """All scores of a trained model, and the samples and curves that the figures show."""
    held_out = pixels(data.held_out, data)
    labels, x1 = class_labels(settings.samples, data), noise(10, settings.samples, data)
    classifier = fit_classifier(data)

    def draw(steps, scale=None, method=dj.heun):
        return to_images(generate(model, labels, x1, dj.uniform(steps), scale, method), data)

    def distance(images):
        return frechet_distance(pixels(images, data), held_out)

    def asked(images):
        return float(np.mean(classifier.predict(pixels(images, data)) == np.asarray(labels)))

    plain, guided = (draw(settings.sampling_steps, scale) for scale in (None, settings.guidance))
    curve = {
        name: [
            [nfe, distance(draw(nfe // order, method=method))]
            for nfe in settings.nfe
            if nfe >= order
        ]
        for name, method, order in (("Euler = DDIM", dj.euler, 1), ("Heun", dj.heun, 2))
    }
    distances = [distance(images) for images in (plain, guided, data.train[: settings.samples])]
    scores = {
        "Fréchet distance": distances[0],
        "Fréchet distance, guided": distances[1],
        "Fréchet distance of training images": distances[2],
        "Fréchet ratio": distances[0] / distances[2],
        "guided samples classified as asked": asked(guided),
        "unguided samples classified as asked": asked(plain),
        "classifier accuracy on held-out": float(
            np.mean(classifier.predict(held_out) == data.held_out_labels)
        ),
        "nearest training distance of samples": float(np.median(nearest(plain, data))),
        "nearest training distance of held-out": float(
            np.median(nearest(data.held_out[: settings.samples], data))
        ),
        **held_out_bits(model, data, settings),
    }
    return {"scores": scores, "curve": curve, "guided": guided, "plain": plain}


def held_out_bits(model: Model, data: Images, settings: Settings) -> dict[str, float]:
    """Bits/dim of held-out images given their labels (1.21), with estimated and exact trace.

    The exact trace is for the first images only. Both use the same dequantization noise, so that
    only the probes make a difference.
    """
    dims = data.held_out[0].size
    controller = diffrax.PIDController(rtol=settings.tolerance, atol=settings.tolerance)

    @functools.partial(jax.jit, static_argnames="probes")
    def log_densities(model, seed, indices, images, labels, probes):
        def one(args):
            index, image, label = args
            pixel_key, key = (jax.random.fold_in(jax.random.key(k), index) for k in (1, seed))
            x = likelihood.dequantize(pixel_key, image, data.levels)
            denoise = model.denoiser(label)
            options = {"probes": probes, "start": 0.0, "stepsize_controller": controller}
            return likelihood.log_likelihood(key, denoise, model.schedule, x, **options)

        block = settings.exact_images if probes is divergence.exact_probes else 64
        return jax.lax.map(one, (indices, images, labels), batch_size=block)

    def bits(n, seed, probes):
        images = data.held_out[:n].astype(np.int32)
        labels = data.held_out_labels[:n].astype(np.int32)
        log_density = log_densities(model, seed, jnp.arange(n), images, labels, probes=probes)
        return np.asarray(likelihood.bits_per_dim(log_density, dims, data.levels), np.float64)

    n, n_exact = min(settings.likelihood_images, len(data.held_out)), settings.exact_images
    all_bits = bits(n, 2, divergence.rademacher_probes)
    exact = bits(n_exact, 0, divergence.exact_probes)
    probed = np.stack([bits(n_exact, 3 + k, divergence.rademacher_probes) for k in range(8)])
    errors = likelihood.standard_errors(jnp.asarray(probed.T))
    return {
        "bits/dim": all_bits.mean(),
        "bits/dim, standard error of data": all_bits.std(ddof=1) / np.sqrt(n),
        "exact bits/dim": exact.mean(),
        "Hutchinson bits/dim on the same images": probed.mean(),
        "Hutchinson standard error of probes": float(errors.of_probes),
    }
