"""Train a class-conditional model on your own images, sample it and score it: a file to copy.

    python -m experiments.train_images photos/ --out runs/photos  # photos/<class>/<any name>.png
    python -m experiments.train_images images.npz --network dit   # images (n, h, w, c), labels (n,)

Images are uint8, all of one size. The output folder gets pictures of samples during the training, a
log and checkpoints, and at the end `samples.png`, `samples.npz`, `result.json` and `report.md`. The
same command continues a run that was stopped. A U-Net is slow without an accelerator; on a CPU use
`--network dit` and small images.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from flax import nnx
from PIL import Image
from sklearn.model_selection import train_test_split

import diffjax as dj
from diffjax import likelihood, losses, metrics, networks, training
from experiments.results import Score, table, write_record, write_report


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    # a folder with a folder of images for each class, or an .npz file with images and labels
    data: tyro.conf.Positional[pathlib.Path]
    out: pathlib.Path = pathlib.Path("runs/images")  # for all results; a run in it is continued
    network: Literal["unet", "dit"] = "unet"  # a U-Net, or a transformer of patches of 2x2 pixels
    width: int = 64  # channels of the U-Net's first level, or of the transformer's tokens
    levels: int = 3  # resolutions of the U-Net; the transformer has 4 blocks for each
    steps: int = 50_000  # training steps
    batch: int = 64  # images in a training step
    learning_rate: float = 2e-4  # of Adam, after a warm-up of 500 steps
    label_dropout: float = 0.1  # share of the labels that become "no class", for guidance
    guidance: float = 2.0  # guidance scale of the samples; 1 is none
    sampling_steps: int = 20  # steps of DPM-Solver++(2M), with one guided evaluation each
    samples: int = 1000  # how many samples are drawn and scored at the end
    held_out: float = 0.1  # share of the images that only the score sees
    every: int = 1000  # steps between two pictures, and between two checkpoints
    seed: int = 0  # of all random numbers


def load(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (n, height, width, channels), labels (n,), and the names of the classes."""
    if path.is_dir():
        names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        files = [sorted((path / name).iterdir()) for name in names]
        images = [np.asarray(Image.open(file)) for folder in files for file in folder]
        labels = np.repeat(np.arange(len(names)), [len(folder) for folder in files])
    else:
        data = np.load(path)
        images, labels = list(data["images"]), data["labels"]
        names = [str(label) for label in range(int(labels.max()) + 1)]
    kinds = {(image.shape, str(image.dtype)) for image in images}
    if len(kinds) != 1 or not all(kind == "uint8" for _, kind in kinds):
        kinds = kinds or "none"
        raise ValueError(f"data: expected uint8 images of one shape in {path}, got {kinds}")
    stacked = np.stack(images).reshape(len(images), *images[0].shape[:2], -1)
    return stacked, labels.astype(np.int32), names


def make_network(settings: Settings, shape, classes: int) -> nnx.Module:
    options = {"width": settings.width, "num_classes": classes, "rngs": nnx.Rngs(settings.seed)}
    if settings.network == "dit":
        return networks.DiT(shape, depth=4 * settings.levels, heads=4, **options)
    multipliers = tuple(min(2**i, 4) for i in range(settings.levels))
    return networks.UNet(shape, multipliers=multipliers, **options)


class Model(NamedTuple):
    """A trained model as one value: `model.denoiser(label)` is a denoiser on `model.schedule`."""

    network: dj.typing.Network
    schedule: dj.typing.Schedule
    parametrization: dj.parametrizations.Parametrization = dj.VELOCITY

    def denoiser(self, label: jax.Array | int | None = None) -> dj.typing.Denoiser:
        """The denoiser of a class, or of "no class"."""
        network = self.network if label is None else dj.bind(self.network, cond=label)
        return dj.as_denoiser(network, self.schedule, self.parametrization)


def loss(apply, schedule, classes, drop, levels, params, key, batch):
    """Flow matching of dequantized images (1.17). A share of the labels becomes "no class"."""
    pixel_key, key = jax.random.split(key)
    x0s = likelihood.dequantize(pixel_key, batch[0], levels)

    def one(key, x0, t, label):
        network = dj.bind(apply, params, cond=label)
        return losses.denoising(key, network, schedule, dj.VELOCITY, x0, t)

    return losses.over_batch(key, one, x0s, batch[1], drop=drop, null=classes)


def train(network, optimizer, data, classes, settings, picture, levels=256, **options) -> Model:
    """Trains on (images, labels), from the newest checkpoint in the folder."""
    (apply, params), schedule = training.functional(network), dj.linear()
    batch_loss = functools.partial(loss, apply, schedule, classes, settings.label_dropout, levels)
    step = training.make_train_step(batch_loss, optimizer, ema=training.power_ema())
    options |= {"checkpoint_every": settings.every, "callback_every": settings.every}
    state = training.fit(
        training.init_state(jax.random.key(settings.seed), params, optimizer),
        jax.jit(step, donate_argnums=0),
        training.in_memory(data, settings.batch, seed=settings.seed),
        settings.steps,
        directory=settings.out,
        callback=lambda step, state: picture(step, Model(dj.bind(apply, state.ema), schedule)),
        **options,
    )
    return Model(dj.bind(apply, state.ema), schedule)


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def draw(key, model: Model, labels, null, scale, shape, steps):
    """Images (n, *shape) of the labels. Each has its own key, whatever the size of the blocks."""
    ts = dj.uniform_log_snr(model.schedule, steps, end=0.0)

    def one(args):
        (prior_key, key), label = jax.random.split(args[0]), args[1]
        guided = dj.cfg(model.denoiser(label), model.denoiser(null), scale)
        x1 = dj.sample_prior(prior_key, model.schedule, shape)
        return dj.sample(key, dj.dpm_solver_2m(guided, model.schedule), x1, ts)

    x0s = jax.lax.map(one, (jax.random.split(key, len(labels)), labels), batch_size=64)
    return likelihood.quantize(x0s, levels=256)


def save_picture(path, images: np.ndarray, names: list[str], levels=256, columns=()) -> None:
    """One row for each class. The labels of the images are 0, 1, ..., over and over."""
    n = len(names)
    rows = [np.hstack([*images[label::n]]) for label in range(n)]
    height = 8 * n * rows[0].shape[0] / rows[0].shape[1]
    fig, axes = plt.subplots(n, squeeze=False, figsize=(8, max(1.0, height)))
    for ax, row, name in zip(axes[:, 0], rows, names, strict=True):
        ax.imshow(row.squeeze(), cmap="gray", vmin=0, vmax=levels - 1, interpolation="nearest")
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
    axes[-1, 0].set_xticks([(i + 0.5) * images.shape[2] for i in range(len(columns))], columns)
    fig.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(fig)


UNIT = "values of pixels / 255"
SCORES = {
    "samples": Score("Energy distance to the held-out images, 0 for equals.", UNIT, "lower"),
    "training images": Score("The same distance of up to 1000 training images.", UNIT),
}


def main(settings: Settings) -> dict:
    start = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    images, labels, names = load(settings.data)
    labels = training.check_labels(labels, classes := len(names))
    options = {"test_size": settings.held_out, "random_state": settings.seed, "stratify": labels}
    data, held_out, data_labels, _ = train_test_split(images, labels, **options)

    def draw_classes(seed, model, n):
        asked = jnp.resize(jnp.arange(classes), n)
        numbers = classes, settings.guidance, images.shape[1:], settings.sampling_steps
        return np.asarray(draw(jax.random.key(seed), model, asked, *numbers), np.uint8), asked

    def picture(step, model):
        shown, _ = draw_classes(1, model, 8 * classes)
        save_picture(settings.out / f"{step:06d}.png", shown, names)

    warmup = optax.linear_schedule(0.0, settings.learning_rate, min(500, settings.steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup))
    network = make_network(settings, images.shape[1:], classes)
    model = train(network, optimizer, (data, data_labels), classes, settings, picture)

    samples, asked = draw_classes(2, model, settings.samples)
    np.savez_compressed(settings.out / "samples.npz", images=samples, labels=np.asarray(asked))
    save_picture(settings.out / "samples.png", samples[: 8 * classes], names)
    real, *compared = (jnp.asarray(x) / 255 for x in (held_out, samples, data[:1000]))
    distances = [float(metrics.energy_distance(x, real)) for x in compared]
    scores = dict(zip(SCORES, distances, strict=True))
    seconds = time.perf_counter() - start
    record = write_record(settings.out / "result.json", settings, scores, seconds)
    tables = {"Energy distance": table(["images", "distance"], scores.items())}
    figures = {"samples.png": "Guided samples, one row for each class."}
    write_report(settings.out, "Your images", record, SCORES, tables, figures)
    return scores


if __name__ == "__main__":
    main(tyro.cli(Settings))
