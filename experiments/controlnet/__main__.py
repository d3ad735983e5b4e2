"""The study: training, scores on held-out controls, figures and report."""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

from diffjax.metrics import frechet_distance
from experiments.controlnet import models
from experiments.controlnet.controls import CONTROLS, Control
from experiments.image_models import Images, fashion_mnist
from experiments.results import Score, table, write_record, write_report


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the ControlNet experiment."""

    data_dir: pathlib.Path | None = None
    """folder of the four idx .gz files; by default the environment variable DIFFJAX_DATA"""
    out: pathlib.Path = pathlib.Path("runs/controlnet")
    """folder of figures, scores and checkpoints; a run in it is continued"""
    width: int = 32
    """channels of the U-Net's first level"""
    steps: int = 2000
    """training steps of the U-Net"""
    control_steps: int = 800
    """training steps of each control"""
    batch: int = 64
    """images in a step"""
    learning_rate: float = 1e-3
    """peak learning rate of Adam, after warm-up and before cosine decay"""
    label_dropout: float = 0.1
    """share of the labels that the null label replaces"""
    every: int = 50
    """steps between two measurements of the agreement, and between two checkpoints"""
    watched: int = 64
    """held-out controls of those measurements"""
    samples: int = 2000
    """held-out controls of the scores"""
    sampling_steps: int = 10
    """steps of DPM-Solver++(2M), with one evaluation each if unguided"""
    guidance: float = 2.0
    """guidance scale of the guided samples"""
    seed: int = 0
    """seed of all random numbers"""


FRECHET = "squared pixels from -1 to 1"
SCORES = {
    "agreement": Score(
        "How well the control of an image agrees with the control that was asked for, a mean over "
        "the images. For edges it is intersection over union with a tolerance of one pixel, for "
        "masks intersection over union.",
        "a share, from 0 to 1",
        "higher",
    ),
    "Fréchet distance": Score(
        "The Fréchet distance between Gaussians fitted to the pixels of the images and of the "
        "held-out images that gave no control.",
        FRECHET,
        "lower",
    ),
    "step of sudden convergence": Score(
        "The first measurement at which the agreement lies above the middle between its value "
        "without the control and its last value."
    ),
}
WITH, GUIDED = "with the control", "with the control, guided"
WITHOUT, WITHOUT_GUIDED = "the U-Net alone", "the U-Net alone, guided"
OTHERS, THEMSELVES = "other held-out images of the class", "the held-out images themselves"


def agreement(control: Control, images: np.ndarray, asked: np.ndarray) -> float:
    return float(control.agreement(control.of(images), asked).mean())


def vectors(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1.0


def others_of_the_class(labels: np.ndarray, all_labels: np.ndarray, seed: int) -> np.ndarray:
    """For each label the index of an image of the class; the first ones are left out."""
    rng, rest = np.random.default_rng(seed), np.arange(len(labels), len(all_labels))
    return np.array([rng.choice(rest[all_labels[rest] == label]) for label in labels])


class Study:
    """The held-out controls, and the samples that are drawn for them."""

    def __init__(self, data: Images, settings: Settings):
        self.settings = settings
        self.images, self.labels = data.held_out[..., 0], data.held_out_labels.astype(np.int32)
        self.controls = {
            name: c.of(self.images[: settings.samples]) for name, c in CONTROLS.items()
        }

    def draw(self, network_of, name: str, n: int, seed: int = 0, unet=None) -> np.ndarray:
        """Images for the first n controls; guided if the U-Net is given."""
        hints = jnp.asarray(models.fold(self.controls[name][:n].astype(np.float32)))
        labels, key = jnp.asarray(self.labels[:n]), jax.random.key(seed)
        numbers = self.settings.sampling_steps, unet, self.settings.guidance
        return np.asarray(models.draw(key, network_of, labels, hints, *numbers))

    def watch(self, name: str):
        """Writes the agreement during the training to agreement.jsonl."""
        n, path = self.settings.watched, self.settings.out / name / "agreement.jsonl"

        def watch(step, network_of):
            drawn = self.draw(network_of, name, n)
            value = agreement(CONTROLS[name], drawn, self.controls[name][:n])
            with path.open("a") as file:
                file.write(json.dumps({"step": step, "agreement": value}) + "\n")

        return watch

    def curve(self, name: str) -> dict[int, float]:
        """The agreement by step. A run that was continued may have written a step twice."""
        path = self.settings.out / name / "agreement.jsonl"
        lines = map(json.loads, path.read_text().splitlines())
        return dict(sorted((line["step"], line["agreement"]) for line in lines))

    def scores(self, drawn: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict]]:
        """The scores of the images drawn for each control, and of held-out images."""
        n = self.settings.samples
        others = self.images[others_of_the_class(self.labels[:n], self.labels, 0)]
        rest = vectors(self.images[n:])
        scores = {}
        for name, control in CONTROLS.items():
            asked, rows = self.controls[name], {**drawn[name], OTHERS: others}
            scores[name] = {
                row: {
                    "agreement": agreement(control, images, asked),
                    "Fréchet distance": frechet_distance(vectors(images), rest),
                }
                for row, images in rows.items()
            }
            scores[name][THEMSELVES] = {
                "agreement": agreement(control, self.images[:n], asked),
                "Fréchet distance": frechet_distance(vectors(self.images[:n]), rest),
            }
        return scores


def sudden(curve: dict[int, float], before: float) -> int | None:
    """The first step whose agreement lies above the middle between `before` and the last one."""
    middle = (before + list(curve.values())[-1]) / 2
    return next((step for step, value in curve.items() if value >= middle), None)


def samples_figure(study: Study, networks: dict, unet, path: pathlib.Path, rows: int = 5) -> None:
    columns = ["held-out image", "control", "U-Net alone", *[f"controlled, {i}" for i in (1, 2, 3)]]
    fig, axes = plt.subplots(rows, 2 * len(columns) + 1, figsize=(12.5, 5.2), layout="constrained")
    for half, (name, network_of) in enumerate(networks.items()):
        shown = [study.images[:rows], 255 * study.controls[name][:rows]]
        shown += [study.draw(models.without_control(unet), name, rows, seed=1)]
        shown += [study.draw(network_of, name, rows, seed=seed) for seed in (1, 2, 3)]
        block = axes[:, half * (len(columns) + 1) :]
        for j, (title, images) in enumerate(zip(columns, shown, strict=True)):
            block[0, j].set_title(title.replace(" ", "\n", 1), fontsize=9)
            for ax, image in zip(block[:, j], images, strict=True):
                ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        block[-1, 2].set_xlabel(f"control by {name}", fontsize=11, labelpad=8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax in axes[:, len(columns)]:
        ax.axis("off")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def curves_figure(curves: dict, scores: dict, path: pathlib.Path) -> None:
    fig, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for color, (name, curve) in zip(("C0", "C1"), curves.items(), strict=True):
        ax.plot(list(curve), list(curve.values()), color, label=f"{name}, with the control")
        without = scores[name][WITHOUT]["agreement"]
        ax.axhline(without, color=color, ls="--", label=f"{name}, the U-Net alone")
    ax.set(xlabel="training step of the control", ylabel="agreement with the control (0 to 1)")
    ax.set_ylim(0, 1)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(settings: Settings) -> dict:
    start = time.perf_counter()
    if settings.control_steps < settings.every:
        raise ValueError(f"control-steps: expected at least every = {settings.every}")
    settings.out.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist.load(settings.data_dir)
    if not 784 < settings.samples <= len(data.held_out) - 785:
        raise ValueError(f"samples: expected 785 to {len(data.held_out) - 785}, for the distances")
    study = Study(data, settings)
    folded = models.fold(data.train[..., 0]).astype(np.int32), data.train_labels.astype(np.int32)
    unet = models.train_unet(folded, settings)

    n, networks, drawn, curves = settings.samples, {}, {}, {}
    alone = models.without_control(unet)
    plain = {
        WITHOUT: study.draw(alone, "edges", n),
        WITHOUT_GUIDED: study.draw(alone, "edges", n, unet=unet),
    }
    for name, control in CONTROLS.items():
        hints = models.fold(control.of(data.train[..., 0]).astype(np.float32))
        networks[name] = models.train_control(
            unet, (*folded, hints), settings, name, study.watch(name)
        )
        drawn[name] = {
            WITH: study.draw(networks[name], name, n),
            GUIDED: study.draw(networks[name], name, n, unet=unet),
            **plain,
        }
        curves[name] = study.curve(name)

    scores = study.scores(drawn)
    converged = {
        name: sudden(curve, scores[name][WITHOUT]["agreement"]) for name, curve in curves.items()
    }
    samples_figure(study, networks, unet, settings.out / "controlnet.png")
    curves_figure(curves, scores, settings.out / "controlnet_training.png")
    measured = {"scores": scores, "step of sudden convergence": converged, "curves": curves}
    record = write_record(
        settings.out / "result.json", settings, measured, time.perf_counter() - start
    )
    tables = {
        f"Control by {name}": table(
            ["images", "agreement", "Fréchet distance"],
            [
                [row, f"{s['agreement']:.3f}", f"{s['Fréchet distance']:.4g}"]
                for row, s in rows.items()
            ],
        )
        for name, rows in scores.items()
    }
    steps = [(name, step) for name, step in converged.items()]
    tables["Sudden convergence"] = table(["control", "step of sudden convergence"], steps)
    captions = {
        "controlnet.png": "Held-out images, their controls, and samples. Those in the columns "
        "'U-Net alone' and 'controlled, 1' begin at the same noise.",
        "controlnet_training.png": "The agreement during the training of the control.",
    }
    write_report(settings.out, "ControlNet on Fashion-MNIST", record, SCORES, tables, captions)
    return scores


if __name__ == "__main__":
    main(tyro.cli(Settings))
