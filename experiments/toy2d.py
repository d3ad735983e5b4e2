"""Rings, moons and a mixture in the plane, by score matching and flow matching on four paths.

    python -m experiments.toy2d            # figures and held-out likelihoods in runs/toy2d/

On every path, one network is trained to predict the noise (score matching, (1.14)) and one to
predict the velocity (flow matching, (1.17)). The results are samples, densities and flow lines.
"""

import dataclasses
import pathlib
import time

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx

import diffjax as dj
from diffjax import divergence, losses, training
from diffjax.networks import MLP
from diffjax.parametrizations import Parametrization
from experiments import small_models
from experiments.results import Score, table, write_record, write_report
from experiments.small_models import PATHS, points
from experiments.train_images import Model


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the 2-D experiment."""

    out: pathlib.Path = pathlib.Path("runs/toy2d")
    """folder of figures and scores"""
    data: tuple[str, ...] = ("rings", "moons", "mixture")
    """any of rings, moons and mixture"""
    steps: int = 2000
    """training steps of each network"""
    batch: int = 256
    """points per step"""
    width: int = 64
    """width of the network's layers"""
    learning_rate: float = 3e-3
    """peak learning rate, before cosine decay"""
    grid: int = 50
    """points per side of the density plots"""
    held_out: int = 500
    """held-out points whose likelihood is computed"""
    seed: int = 0
    """seed of all random numbers"""


TARGETS = {"score matching": dj.EPS, "flow matching": dj.VELOCITY}
# Sampling and likelihood stay between these times: sigma' is infinite at t = 0 on VP, and eps does
# not determine x0 where alpha(1) = 0.
DATA_END, PRIOR_END = 1e-3, 0.999


def train(
    data: np.ndarray, schedule: dj.typing.Schedule, target: Parametrization, settings: Settings
) -> Model:
    """A model whose network takes and returns numbers of order one, even on VE."""
    apply, params = training.functional(
        MLP(2, width=settings.width, depth=3, rngs=nnx.Rngs(settings.seed))
    )
    target = small_models.normalized(target)

    def noise_levels(key, n):
        return small_models.log_normal_times(key, n, schedule, DATA_END, PRIOR_END)

    def loss(params, key, x0s):
        def one(key, x0, t):
            return losses.denoising(key, dj.bind(apply, params), schedule, target, x0, t)

        return losses.over_batch(key, one, x0s, times=noise_levels)

    batches = training.in_memory(data.astype(np.float32), settings.batch, seed=settings.seed)
    params, _ = small_models.train(
        loss, params, batches, settings.steps, settings.learning_rate, settings.seed
    )
    return Model(dj.bind(apply, params), schedule, target)


@jax.jit
def flow(model: Model, key: jax.Array) -> jax.Array:
    """Samples along the flow, of shape (times, n, 2)."""
    x1 = dj.sample_prior(key, model.schedule, (1000, 2))
    ts = dj.uniform_log_snr(model.schedule, 60, PRIOR_END, DATA_END)
    return dj.trajectory(key, dj.edm_sampler(model.denoiser(), model.schedule), x1, ts)


@jax.jit
def log_density(model: Model, xs: jax.Array) -> jax.Array:
    def one(x):
        return dj.log_likelihood(
            jax.random.key(0),
            model.denoiser(),
            model.schedule,
            x,
            probes=divergence.exact_probes,
            start=DATA_END,
            end=PRIOR_END,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        )

    return jax.vmap(one)(xs)


def figure(
    path: pathlib.Path, name: str, data: np.ndarray, models: dict[str, Model], settings: Settings
) -> None:
    """One row for each model: the data, flow lines, samples and the density."""
    side = np.linspace(-2.2, 2.2, settings.grid)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), jnp.float32)
    fig, axes = plt.subplots(
        len(models), 4, figsize=(9.2, 2.25 * len(models) + 0.4), layout="constrained"
    )
    titles = (f"data: {name}", "flow lines, noise to data", "samples", "density (log_likelihood)")
    for row, (label, model) in zip(axes, models.items(), strict=True):
        xs = np.asarray(flow(model, jax.random.key(1)))
        density = np.exp(np.asarray(log_density(model, grid))).reshape(settings.grid, -1)
        row[0].scatter(*data[:1000].T, s=1, color="tab:gray")
        row[1].plot(xs[:, :60, 0], xs[:, :60, 1], lw=0.5, color="tab:blue", alpha=0.6)
        row[1].scatter(*xs[-1, :60].T, s=4, color="k", zorder=3)
        row[2].scatter(*xs[-1].T, s=1, color="tab:blue")
        shades = {"cmap": "magma", "vmin": 0, "vmax": np.quantile(density, 0.998)}
        row[3].imshow(density, extent=(-2.2, 2.2, -2.2, 2.2), origin="lower", **shades)
        row[0].set_ylabel(label)
        for ax in row:
            ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=(), yticks=(), aspect="equal")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


NLL = Score(
    "Minus the model's log density at held-out points: the mean and its standard error.",
    "nats",
    "lower",
)


def main(settings: Settings) -> dict:
    begin = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    scores, tables = {}, {}
    for name in settings.data:
        data, held_out = (
            points(name, n, settings.seed + i) for i, n in enumerate((20_000, settings.held_out))
        )
        models, rows = {}, []
        for objective, target in TARGETS.items():
            cells = []
            for path, schedule in PATHS.items():
                model = models[f"{path}\n{objective}"] = train(data, schedule, target, settings)
                nll = -np.asarray(log_density(model, jnp.asarray(held_out, jnp.float32)))
                score = {
                    "held_out_nll": float(nll.mean()),
                    "standard_error": float(nll.std() / np.sqrt(len(nll))),
                }
                scores[f"{name}, {path}, {objective}"] = score
                cells.append(f"{score['held_out_nll']:.2f} ± {score['standard_error']:.2f}")
                print(f"{name:8s} {path:9s} {objective:14s} NLL {nll.mean():.3f} nats", flush=True)
            rows.append([objective, *cells])
        tables[f"Held-out NLL: {name}"] = table(["", *PATHS], rows)
        figure(settings.out / f"{name}.png", name, data, models, settings)
    seconds = time.perf_counter() - begin
    record = write_record(settings.out / "result.json", settings, scores, seconds)
    shown = "data, flow lines, samples and density of each model. Both axes run from -2.2 to 2.2."
    captions = {f"{name}.png": f"{name}: {shown}" for name in settings.data}
    explained = {"Held-out NLL": NLL}
    write_report(settings.out, "Densities in the plane", record, explained, tables, captions)
    return scores


if __name__ == "__main__":
    main(tyro.cli(Settings))
