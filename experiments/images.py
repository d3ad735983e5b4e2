"""What the image experiments share: training a class-conditional model, sampling it, scoring it, and a page that shows it.

Images are integers in [0, levels); the model sees them dequantized to [-1, 1) (`likelihood.dequantize`), and its samples
are quantized back before they are compared with data. The path is linear and the network predicts the velocity.
"""

import functools
import html
import json
import pathlib
import platform
import time
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.svm import SVC

import diffjax as dj
from diffjax import divergence, likelihood, losses, training
from diffjax.metrics import frechet_distance
from experiments.results import write_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

SCHEDULE = dj.linear()


class Images(NamedTuple):
    """A labelled data set, split; images are integers of shape (n, height, width)."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    levels: int
    classes: int


# ---- the model -------------------------------------------------------------------------------------------------------


def make_loss(apply, data: Images, event: tuple[int, ...], drop: float):
    """Conditional flow matching of dequantized images (1.17); a share `drop` of the labels becomes the null label."""

    def loss(params, key, batch):
        images, labels = batch
        pixel_key, key = jax.random.split(key)
        x0s = likelihood.dequantize(pixel_key, images, data.levels).reshape(len(labels), *event)

        def one(key, x0, t, label):
            return losses.denoising(key, dj.bind(apply, params, cond=label), SCHEDULE, dj.VELOCITY, x0, t)

        return losses.over_batch(key, one, x0s, labels, drop=drop, null=data.classes)

    return loss


def train(network, data: Images, event, settings, directory: pathlib.Path):
    """Trains the network, resuming from `directory`; returns its function, the averaged parameters, and the seconds."""
    apply, params = training.functional(network)
    print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters, {settings.steps} steps", flush=True)
    warmup = min(200, settings.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=settings.weight_decay))
    step = training.make_train_step(
        make_loss(apply, data, event, settings.label_dropout), optimizer, ema=training.power_ema()
    )
    labels = training.check_labels(data.train_labels, data.classes)
    batches = training.in_memory((data.train.astype(np.int32), labels), settings.batch, seed=settings.seed)
    state = training.init_state(jax.random.key(settings.seed), params, optimizer)

    def preview(step: int, state):
        xs = generate(jax.random.key(0), apply, state.ema, class_labels(data, 1), 1.5, dj.uniform(20), event)
        _save_image(image_grid(to_images(xs, data), 10), data, directory / f"preview_{step:06d}.png")

    state = training.fit(
        state,
        jax.jit(step, donate_argnums=0),
        batches,
        settings.steps,
        directory=directory,
        log_every=min(20, settings.steps),
        checkpoint_every=max(settings.steps // 2, 1),
        callback=preview,
        callback_every=max(settings.steps // 2, 1),
        tensorboard=settings.tensorboard,
    )
    return apply, state.ema, training_seconds(directory)


def training_seconds(directory: pathlib.Path) -> float:
    """The seconds of all steps, those before a run was resumed included."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = np.diff([0, *(line["step"] for line in lines)])
    return float(sum(n / line["steps_per_second"] for n, line in zip(steps, lines, strict=True)))


def denoiser(apply, params, label):
    return dj.as_denoiser(dj.bind(apply, params, cond=label), SCHEDULE, dj.VELOCITY)


def guided_denoiser(apply, params, labels, scale):
    """The denoiser given the labels, guided unless the scale is None."""
    conditional = denoiser(apply, params, labels)
    return conditional if scale is None else dj.cfg(conditional, denoiser(apply, params, None), scale)


@functools.partial(jax.jit, static_argnames=("event", "method", "run"))
def generate(key, apply, params, labels, scale, ts, event, method=dj.heun, run=dj.sample):
    """Samples, one a label, of shape (n, *event)."""
    x1 = jax.random.normal(key, (len(labels), *event))
    return run(key, method(guided_denoiser(apply, params, labels, scale), SCHEDULE), x1, ts)


def in_chunks(function, size: int, *arrays):
    """The function's results over chunks of its arguments, joined: bounds the memory, and compiles once."""
    n = len(arrays[0])
    out = []
    for start in range(0, n, size):
        chunk = [np.take(a, np.arange(start, start + size), axis=0, mode="wrap") for a in arrays]
        out.append(np.asarray(function(*chunk)))
    return np.concatenate(out)[:n]


def sample_many(seed, apply, params, labels, scale, ts, event, method=dj.heun, chunk=512):
    """As `generate`, in chunks that draw independent noise."""
    size = min(chunk, len(labels))
    parts = [
        generate(
            jax.random.fold_in(jax.random.key(seed), i),
            apply,
            params,
            jnp.asarray(np.take(labels, np.arange(i, i + size), mode="wrap")),
            scale,
            ts,
            event,
            method,
        )
        for i in range(0, len(labels), size)
    ]
    return np.concatenate([np.asarray(p) for p in parts])[: len(labels)]


# ---- scores ----------------------------------------------------------------------------------------------------------


def class_labels(data: Images, each: int) -> np.ndarray:
    return np.tile(np.arange(data.classes), each)


def to_images(xs, data: Images) -> np.ndarray:
    """Samples in [-1, 1) as integer images: the inverse of dequantization."""
    return np.asarray(likelihood.quantize(xs, data.levels)).reshape(len(xs), *data.train.shape[1:])


def pixels(images: np.ndarray, data: Images) -> np.ndarray:
    """Integer images as vectors in [-1, 1]."""
    return images.reshape(len(images), -1) * (2.0 / (data.levels - 1)) - 1


def fit_classifier(data: Images, most: int = 10_000) -> SVC:
    return SVC(kernel="rbf", C=10.0, gamma="scale").fit(pixels(data.train[:most], data), data.train_labels[:most])


def nearest(images: np.ndarray, data: Images) -> np.ndarray:
    """The Euclidean distance in pixel space from each image to the nearest training image."""
    a, b = pixels(images, data), pixels(data.train, data)
    squares = np.sum(b**2, 1)
    parts = [np.min(squares - 2 * (part @ b.T), 1) for part in np.array_split(a, max(1, len(a) // 100))]
    return np.sqrt(np.maximum(np.concatenate(parts) + np.sum(a**2, 1), 0))


def held_out_bits(apply, params, data: Images, event, settings) -> dict[str, float]:
    """Bits/dim of held-out images given their labels (1.21): Hutchinson on many, and on a few beside the exact trace.

    The same dequantization noise for both; the standard error of their difference is that of the probes alone.
    """
    dims = int(np.prod(event))
    controller = diffrax.PIDController(rtol=settings.tolerance, atol=settings.tolerance)

    @functools.partial(jax.jit, static_argnames="probes")
    def log_densities(params, seed, indices, images, labels, probes):
        def one(index, image, label):
            x = likelihood.dequantize(jax.random.fold_in(jax.random.key(1), index), image, data.levels).reshape(event)
            return likelihood.log_likelihood(
                jax.random.fold_in(jax.random.key(seed), index),
                denoiser(apply, params, label),
                SCHEDULE,
                x,
                probes=probes,
                start=0.0,
                stepsize_controller=controller,
            )

        return jax.vmap(one)(indices, images, labels)

    def bits(n, seed, probes):
        arrays = np.arange(n), data.held_out[:n].astype(np.int32), data.held_out_labels[:n].astype(np.int32)
        of_chunk = functools.partial(log_densities, params, seed, probes=probes)
        size = settings.exact_images if probes is divergence.exact_probes else 64
        log_density = in_chunks(of_chunk, min(n, size), *arrays)
        return np.asarray(likelihood.bits_per_dim(log_density, dims, data.levels), np.float64)

    many, few = min(settings.likelihood_images, len(data.held_out)), settings.exact_images
    all_bits = bits(many, 2, divergence.rademacher_probes)
    exact = bits(few, 0, divergence.exact_probes)
    probed = np.stack([bits(few, 3 + k, divergence.rademacher_probes) for k in range(8)])
    return {
        "bits_per_dim": all_bits.mean(),
        "bits_per_dim_standard_error_of_data": all_bits.std(ddof=1) / np.sqrt(many),
        "bits_per_dim_images": many,
        "exact_bits_per_dim": exact.mean(),
        "hutchinson_bits_per_dim_on_the_same_images": probed.mean(),
        "hutchinson_standard_error_of_probes": float(likelihood.standard_errors(jnp.asarray(probed.T)).of_probes),
        "exact_images": few,
    }


def evaluate(apply, params, data: Images, event, settings) -> dict[str, Any]:
    """All scores of a trained model, and the samples and curves that the figures show."""
    held_out = pixels(data.held_out, data)
    n = settings.samples
    labels = np.resize(np.arange(data.classes), n)
    ts = dj.uniform(settings.sampling_steps)
    classifier = fit_classifier(data)
    draw = functools.partial(sample_many, 10, apply, params, labels, event=event)
    plain, guided = (to_images(draw(scale=scale, ts=ts), data) for scale in (None, settings.guidance))

    def distance(images):
        return frechet_distance(pixels(images, data), held_out)

    curve = {}
    for name, method, order in (("Euler = DDIM", dj.euler, 1), ("Heun", dj.heun, 2)):
        nfe = [k for k in settings.nfe if k >= order]
        images = (to_images(draw(scale=None, ts=dj.uniform(k // order), method=method), data) for k in nfe)
        curve[name] = [[k, distance(i)] for k, i in zip(nfe, images, strict=True)]
    train_subset = data.train[: settings.samples]
    scores = {
        "frechet_distance": distance(plain),
        "frechet_distance_guided": distance(guided),
        "frechet_distance_of_training_images": distance(train_subset),
        "frechet_samples": n,
        "frechet_held_out": len(held_out),
        "guidance_scale": settings.guidance,
        "guided_samples_classified_as_asked": float(np.mean(classifier.predict(pixels(guided, data)) == labels)),
        "unguided_samples_classified_as_asked": float(np.mean(classifier.predict(pixels(plain, data)) == labels)),
        "classifier_accuracy_on_held_out": float(np.mean(classifier.predict(held_out) == data.held_out_labels)),
        "nearest_training_distance_of_samples": float(np.median(nearest(plain, data))),
        "nearest_training_distance_of_held_out": float(np.median(nearest(data.held_out[:n], data))),
        **held_out_bits(apply, params, data, event, settings),
    }
    scores["frechet_ratio"] = scores["frechet_distance"] / scores["frechet_distance_of_training_images"]
    return {"scores": scores, "curve": curve, "guided": guided, "plain": plain}


# ---- figures and the report ------------------------------------------------------------------------------------------


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (n, h, w) as one image of n / columns rows, a pixel apart."""
    n, h, w = images.shape
    padded = np.pad(images, ((0, -n % columns), (1, 0), (1, 0)))
    rows = padded.reshape(-1, columns, h + 1, w + 1).transpose(0, 2, 1, 3)
    return rows.reshape(rows.shape[0] * (h + 1), columns * (w + 1))[1:, 1:]


def _save_image(grid: np.ndarray, data: Images, path: pathlib.Path, ylabel="", xlabel="", xticks=(), yticks=()):
    scale = 0.055 if data.train.shape[1] < 16 else 0.022
    fig, ax = plt.subplots(figsize=(grid.shape[1] * scale + 1.2, grid.shape[0] * scale + 0.8), layout="constrained")
    ax.imshow(grid, cmap="gray", vmin=0, vmax=data.levels - 1, interpolation="nearest")
    h, w = (k + 1 for k in data.train.shape[1:])
    ax.set_xticks([(i + 0.5) * w - 1 for i in range(len(xticks))], xticks)
    ax.set_yticks([(i + 0.5) * h - 1 for i in range(len(yticks))], yticks)
    ax.tick_params(length=0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def figures(apply, params, data: Images, event, settings, result, directory: pathlib.Path, names) -> None:
    scores = result["scores"]
    by_class = result["guided"][: 12 * data.classes].reshape(-1, data.classes, *data.train.shape[1:]).swapaxes(0, 1)
    columns = by_class.shape[1]
    grid = image_grid(by_class.reshape(-1, *data.train.shape[1:]), columns)
    _save_image(grid, data, directory / "samples.png", "class asked for", yticks=names)

    shown = np.linspace(0, settings.sampling_steps, 9).round().astype(int)
    ts = dj.uniform(settings.sampling_steps)
    labels = jnp.arange(data.classes)
    path = generate(jax.random.key(7), apply, params, labels, settings.guidance, ts, event, run=dj.trajectory)
    frames = np.stack([to_images(path[i], data) for i in shown], 1).reshape(-1, *data.train.shape[1:])
    ticks = [f"{float(ts[i]):.2f}" for i in shown]
    title = "time t (1: prior, 0: data)"
    _save_image(
        image_grid(frames, len(shown)), data, directory / "trajectories.png", "class asked for", title, ticks, names
    )

    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ax.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1)
    ax.set(xlabel="training step", ylabel="velocity error, mean square a pixel", yscale="log")
    ax.grid(alpha=0.3, which="both")
    fig.savefig(directory / "loss.png", dpi=150)
    plt.close(fig)

    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for (name, points), marker in zip(result["curve"].items(), "os", strict=True):
        ax.plot(*zip(*points, strict=True), marker=marker, label=name)
    ax.axhline(scores["frechet_distance_of_training_images"], color="k", ls="--", label="training images")
    ax.set(xlabel="network evaluations a sample (NFE)", ylabel="Fréchet distance to held-out (pixels)")
    ax.set(xscale="log", yscale="log", xticks=settings.nfe)
    ax.set_xticklabels(settings.nfe)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
    ax.legend(title="unguided samples")
    fig.savefig(directory / "quality_vs_nfe.png", dpi=150)
    plt.close(fig)

    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ours, real = nearest(result["plain"], data), nearest(data.held_out[: settings.samples], data)
    bins = np.linspace(0, max(ours.max(), real.max()), 40)
    ax.hist(real, bins, density=True, alpha=0.5, label="held-out images")
    ax.hist(ours, bins, density=True, histtype="step", color="k", label="samples")
    ax.set(xlabel="distance to the nearest training image (pixels in [-1, 1])", ylabel="density")
    ax.legend()
    fig.savefig(directory / "nearest.png", dpi=150)
    plt.close(fig)


CAPTIONS = {
    "samples.png": "Guided samples, a row a class.",
    "trajectories.png": "Samples on their way from noise to data.",
    "quality_vs_nfe.png": "Sample quality against the number of network evaluations, unguided.",
    "loss.png": "The training loss.",
    "nearest.png": "Distance to the nearest training image. Samples that were copies would pile up at 0.",
}


def report(title: str, scores: dict, settings, directory: pathlib.Path) -> None:
    """`metrics.json`, and `report.html` that shows it beside the figures."""
    record = {
        "scores": scores,
        "settings": {
            k: v if isinstance(v, (int, float, tuple, type(None))) else str(v) for k, v in vars(settings).items()
        },
        "machine": {"device": jax.devices()[0].device_kind, "processor": platform.machine(), "jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    write_results(directory / "metrics.json", record)
    rows = "".join(f"<tr><td>{html.escape(k.replace('_', ' '))}</td><td>{v:.4g}</td></tr>" for k, v in scores.items())
    pictures = "".join(
        f'<figure><img src="{name}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        for name, text in CAPTIONS.items()
    )
    style = "body{font:16px sans-serif;max-width:60em;margin:2em auto}td{padding:.1em 1em}img{max-width:100%}"
    (directory / "report.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        f"<table>{rows}</table>{pictures}\n"
    )
    width = max(map(len, scores))
    print("\n".join(f"{k:{width}s}  {v:.4g}" for k, v in scores.items()))
    print(f"report: {directory / 'report.html'}")


def run(title: str, network, data: Images, event, settings, names) -> dict[str, Any]:
    """The whole experiment; returns the scores."""
    start = time.perf_counter()
    directory = pathlib.Path(settings.out)
    directory.mkdir(parents=True, exist_ok=True)
    apply, params, seconds = train(network, data, event, settings, directory)
    result = evaluate(apply, params, data, event, settings)
    figures(apply, params, data, event, settings, result, directory, names)
    result["scores"]["training_seconds"] = seconds
    result["scores"]["total_seconds"] = time.perf_counter() - start
    report(title, result["scores"], settings, directory)
    return result["scores"]
