"""Figures of an image model: samples, trajectories, quality against NFE, loss, neighbours."""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

import diffjax as dj
from experiments.image_models import Images, Settings
from experiments.image_models.models import (
    class_labels,
    generate,
    noise,
    save_images,
    to_images,
    training_log,
)
from experiments.image_models.scores import nearest
from experiments.train_images import Model

CAPTIONS = {
    "samples.png": "Guided samples, one row for each class.",
    "trajectories.png": "Guided samples at times from t = 1 (noise) to t = 0 (data).",
    "quality_vs_nfe.png": "Sample quality against the number of network evaluations, unguided.",
    "loss.png": "The training loss.",
    "nearest.png": "Distance to the nearest training image. Copies would have a distance of 0.",
}


def figures(model: Model, data: Images, settings: Settings, result: dict) -> None:
    """Writes every figure of `CAPTIONS`."""
    save_images(settings.out / "samples.png", result["guided"][: 12 * len(data.names)], data)
    trajectories(model, data, settings)
    quality(settings, result)

    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    lines = training_log(settings)
    ax.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1)
    ax.set(xlabel="training step", ylabel="mean square velocity error per pixel", yscale="log")
    ax.grid(alpha=0.3, which="both")
    _save(fig, settings, "loss.png")

    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ours, real = nearest(result["plain"], data), nearest(data.held_out[: settings.samples], data)
    bins = np.linspace(0, max(ours.max(), real.max()), 40)
    ax.hist(real, bins, density=True, alpha=0.5, label="held-out images")
    ax.hist(ours, bins, density=True, histtype="step", color="k", label="samples")
    ax.set_xlabel("distance to the nearest training image (pixels from -1 to 1)")
    ax.set_ylabel("density (1 / pixel)")
    ax.legend()
    _save(fig, settings, "nearest.png")


def trajectories(model: Model, data: Images, settings: Settings) -> None:
    n, ts = len(data.names), dj.uniform(settings.sampling_steps)
    shown = np.linspace(0, settings.sampling_steps, 9).round().astype(int)
    paths = generate(
        model, class_labels(n, data), noise(7, n, data), ts, settings.guidance, run=dj.trajectory
    )
    frames = jnp.swapaxes(paths, 0, 1)[shown].reshape(-1, *data.train.shape[1:])
    columns = [f"{float(ts[i]):.2f}" for i in shown]
    columns[0] = f"t = {columns[0]}"
    save_images(settings.out / "trajectories.png", to_images(frames, data), data, columns)


def quality(settings: Settings, result: dict) -> None:
    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for (name, points), marker in zip(result["curve"].items(), "os", strict=True):
        ax.plot(*zip(*points, strict=True), marker=marker, label=name)
    training_images = result["scores"]["Fréchet distance of training images"]
    ax.axhline(training_images, color="k", ls="--", label="training images")
    ax.set_xlabel("network evaluations per sample (NFE)")
    ax.set_ylabel("Fréchet distance to held-out images\n(squared pixels from -1 to 1)")
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(settings.nfe, [str(nfe) for nfe in settings.nfe])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
    ax.legend(title="unguided samples")
    _save(fig, settings, "quality_vs_nfe.png")


def _save(fig, settings: Settings, name: str) -> None:
    fig.savefig(settings.out / name, dpi=150)
    plt.close(fig)
