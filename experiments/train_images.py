"""Train a class-conditional diffusion model on your own images, sample it with guidance, and score it: a file to copy.

    python -m experiments.train_images photos/ --out runs/photos     # photos/<class>/<any name>.png, all of one size
    python -m experiments.train_images images.npz --network dit      # images (n, height, width, channels), labels (n,)

Images are uint8. The output folder gets samples every so often, a log, checkpoints, and at the end `samples.png`,
`samples.npz` and `result.json`. The same command continues a run that was stopped. A U-Net wants an accelerator; on a CPU
take `--network dit` and small images.
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
from experiments.results import write_results


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    data: tyro.conf.Positional[pathlib.Path]
    """a folder with a folder of images for each class, or an .npz file with images and labels"""
    out: pathlib.Path = pathlib.Path("runs/images")
    """where everything goes; a run in a folder that holds one continues it"""
    network: Literal["unet", "dit"] = "unet"
    """a U-Net, or a transformer of patches of 2x2 pixels"""
    width: int = 64
    """channels of the U-Net's first level, or of the transformer's tokens"""
    levels: int = 3
    """resolutions of the U-Net; the transformer has 4 blocks for each"""
    steps: int = 50_000
    """training steps"""
    batch: int = 64
    """images a step"""
    learning_rate: float = 2e-4
    """of Adam, after a warm-up of 500 steps"""
    label_dropout: float = 0.1
    """share of labels replaced by "no class", for guidance"""
    guidance: float = 2.0
    """guidance scale of the samples; 1 is none"""
    sampling_steps: int = 20
    """steps of DPM-Solver++(2M), one evaluation of the guided network each"""
    samples: int = 1000
    """how many samples are drawn and scored at the end"""
    held_out: float = 0.1
    """share of the images that only the score sees"""
    every: int = 1000
    """steps between two pictures, and between two checkpoints"""
    seed: int = 0
    """of everything random"""


def load(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (n, height, width, channels), labels (n,), and the names of the classes."""
    if path.is_dir():
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
        images = [np.asarray(Image.open(file)) for file, _ in files]
        labels, names = [label for _, label in files], [folder.name for folder in folders]
    else:
        data = np.load(path)
        images, labels = list(data["images"]), data["labels"]
        names = [str(label) for label in range(int(labels.max()) + 1)]
    kinds = {(image.shape, str(image.dtype)) for image in images}
    if len(kinds) != 1 or not all(kind == "uint8" for _, kind in kinds):
        raise ValueError(f"data: expected uint8 images of one shape in {path}, got {kinds or 'none'}")
    return np.stack(images).reshape(len(images), *images[0].shape[:2], -1), np.asarray(labels, np.int32), names


def make_network(settings: Settings, shape: tuple[int, ...], classes: int) -> nnx.Module:
    rngs = nnx.Rngs(settings.seed)
    if settings.network == "dit":
        sizes = {"width": settings.width, "depth": 4 * settings.levels, "heads": 4}
        return networks.DiT(shape, **sizes, num_classes=classes, rngs=rngs)
    multipliers = tuple(min(2**i, 4) for i in range(settings.levels))
    return networks.UNet(shape, width=settings.width, multipliers=multipliers, num_classes=classes, rngs=rngs)


class Model(NamedTuple):
    """A trained model as one value: `model.denoiser(label)` is a denoiser on `model.schedule`."""

    apply: jax.tree_util.Partial
    params: dict
    schedule: dj.typing.Schedule

    def network(self, label):
        """The network of a class, `(x, t) -> velocity`."""
        return dj.bind(self.apply, self.params, cond=label)

    def denoiser(self, label):
        """The denoiser of a class."""
        return dj.as_denoiser(self.network(label), self.schedule, dj.VELOCITY)


def loss(apply, schedule, settings, classes, params, key, batch):
    """Flow matching of dequantized images (1.17); a share of the labels becomes "no class"."""
    pixel_key, key = jax.random.split(key)
    x0s = likelihood.dequantize(pixel_key, batch[0], levels=256)

    def one(key, x0, t, label):
        network = Model(apply, params, schedule).network(label)
        return losses.denoising(key, network, schedule, dj.VELOCITY, x0, t)

    return losses.over_batch(key, one, x0s, batch[1], drop=settings.label_dropout, null=classes)


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def draw(key, model: Model, labels, null, scale, shape, steps):
    """Images (n, *shape) of the labels. Each has its own key, so that the size of the blocks does not matter."""
    ts = dj.uniform_log_snr(model.schedule, steps, end=0.0)

    def one(key, label):
        prior_key, key = jax.random.split(key)
        guided = dj.cfg(model.denoiser(label), model.denoiser(null), scale)
        x1 = dj.sample_prior(prior_key, model.schedule, shape)
        return dj.sample(key, dj.dpm_solver_2m(guided, model.schedule), x1, ts)

    x0s = jax.lax.map(lambda args: one(*args), (jax.random.split(key, len(labels)), labels), batch_size=64)
    return likelihood.quantize(x0s, levels=256)


def save_picture(path: pathlib.Path, images: np.ndarray, names: list[str]) -> None:
    """A row for each class. The images come class by class, over and over."""
    n = len(names)
    rows = [np.hstack(images[label::n]) for label in range(n)]
    fig, axes = plt.subplots(n, squeeze=False, figsize=(8, max(1.0, 8 * n * rows[0].shape[0] / rows[0].shape[1])))
    for ax, row, name in zip(axes[:, 0], rows, names, strict=True):
        ax.imshow(row.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
    fig.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(fig)


def main(settings: Settings) -> dict:
    start = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    images, labels, names = load(settings.data)
    classes, shape, schedule = len(names), images.shape[1:], dj.linear()
    train, held_out, train_labels, _ = train_test_split(
        images, labels, test_size=settings.held_out, random_state=settings.seed, stratify=labels
    )
    apply, params = training.functional(make_network(settings, shape, classes))
    sampled = functools.partial(
        draw, null=jnp.asarray(classes), scale=settings.guidance, shape=shape, steps=settings.sampling_steps
    )

    def picture(step, state):
        rows = sampled(jax.random.key(1), Model(apply, state.ema, schedule), jnp.tile(jnp.arange(classes), 8))
        save_picture(settings.out / f"{step:06d}.png", np.asarray(rows, np.uint8), names)

    warmup = optax.linear_schedule(0.0, settings.learning_rate, min(500, settings.steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup))
    step = training.make_train_step(
        functools.partial(loss, apply, schedule, settings, classes), optimizer, ema=training.power_ema()
    )
    state = training.fit(
        training.init_state(jax.random.key(settings.seed), params, optimizer),
        jax.jit(step, donate_argnums=0),
        training.in_memory((train, training.check_labels(train_labels, classes)), settings.batch, seed=settings.seed),
        settings.steps,
        directory=settings.out,
        checkpoint_every=settings.every,
        callback=picture,
        callback_every=settings.every,
    )

    model = Model(apply, state.ema, schedule)
    asked = jnp.resize(jnp.arange(classes), settings.samples)
    samples = np.asarray(sampled(jax.random.key(2), model, asked), np.uint8)
    np.savez_compressed(settings.out / "samples.npz", images=samples, labels=np.asarray(asked))
    save_picture(settings.out / "samples.png", samples[: 8 * classes], names)
    scores = {
        "energy_distance_of_samples": float(metrics.energy_distance(samples / 255, held_out / 255)),
        "energy_distance_of_training_images": float(metrics.energy_distance(train[:1000] / 255, held_out / 255)),
        "seconds": time.perf_counter() - start,
    }
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    write_results(settings.out / "result.json", {"scores": scores, "settings": str(settings), **machine})
    print("\n".join(f"{name}: {value:.4g}" for name, value in scores.items()))
    return scores


if __name__ == "__main__":
    main(tyro.cli(Settings))
