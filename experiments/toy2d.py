"""Rings, moons and a mixture in the plane: four paths x score and flow matching; samples, densities and flows.

    python -m experiments.toy2d            # figures and held-out likelihoods in runs/toy2d/

On every path one network is trained on the noise (score matching, (1.14)) and one on the velocity (flow matching, (1.17)).
"""

import dataclasses
import pathlib

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import make_circles, make_moons

import diffjax as dj
from diffjax import divergence, losses, schedules, times, training, weightings
from diffjax.networks import MLP
from experiments.results import write_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the 2-D experiment."""

    out: pathlib.Path = pathlib.Path("runs/toy2d")
    """where figures and scores go"""
    data: tuple[str, ...] = ("rings", "moons", "mixture")
    """which of rings, moons and mixture"""
    steps: int = 2000
    """training steps of each network"""
    batch: int = 256
    """points a step"""
    width: int = 64
    """of the network"""
    learning_rate: float = 3e-3
    """the peak, before cosine decay"""
    grid: int = 50
    """points a side of the density plots"""
    held_out: int = 500
    """points whose likelihood is computed"""
    seed: int = 0
    """of everything random"""


PATHS = {"linear VP": dj.linear_vp(), "VE": dj.ve(0.02, 10.0), "linear": dj.linear(), "GVP": dj.gvp()}
TARGETS = {"score matching": dj.EPS, "flow matching": dj.VELOCITY}
# Sampling and likelihood stay this far inside: sigma' is infinite at t = 0 on VP, eps leaves x0 open where alpha(1) = 0.
DATA_END, PRIOR_END = 1e-3, 0.999
# Every path trains at the same noise levels: mean and deviation of log(sigma / alpha), for data 1 wide and 0.1 fine.
LOG_NOISE = -1.2, 1.5


def points(name: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if name == "rings":
        return 1.5 * make_circles(n, noise=0.05, factor=0.4, random_state=seed)[0]
    if name == "moons":
        return make_moons(n, noise=0.07, random_state=seed)[0] - np.array([0.5, 0.25])
    if name == "mixture":
        angles = 2 * np.pi * rng.integers(6, size=n) / 6
        return 1.3 * np.stack([np.cos(angles), np.sin(angles)], 1) + 0.12 * rng.normal(size=(n, 2))
    raise ValueError(f"data: expected rings, moons or mixture, got {name!r}")


def scaled(network, schedule, target):
    """A network that sees and returns numbers of order one: on VE, x and its velocity grow to sigma_max and beyond."""
    return dj.bind(_scaled_noise if target is dj.EPS else _scaled_velocity, network, schedule)


def _scaled_noise(network, schedule, x, t):
    return network(x / jnp.hypot(*schedule(t)), t)


def _scaled_velocity(network, schedule, x, t):
    return speed(schedule, t) * _scaled_noise(network, schedule, x, t)


def speed(schedule, t):
    *_, dalpha, dsigma = schedules.coefficients(schedule, t)
    return jnp.hypot(dalpha, dsigma)


def relative(schedule, parametrization, t):
    """The weighting that makes flow matching's error relative to the speed of the path: constant on linear and GVP."""
    return 1 / speed(schedule, t) ** 2


def train(data, schedule, target, settings):
    apply, params = training.functional(MLP(2, width=settings.width, depth=3, rngs=nnx.Rngs(settings.seed)))
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))

    def network(params):
        return scaled(dj.bind(apply, params), schedule, target)

    def noise_levels(key, n):
        ts, weights = times.log_normal_times(key, n, schedule, *LOG_NOISE)
        return ts.clip(DATA_END, PRIOR_END), weights

    def loss(params, key, x0s):
        weighting = weightings.unweighted if target is dj.EPS else relative

        def one(key, x0, t):
            return losses.denoising(key, network(params), schedule, target, x0, t, weighting)

        return losses.over_batch(key, one, x0s, times=noise_levels)

    step = training.make_train_step(loss, optimizer, ema=training.power_ema())
    batches = training.in_memory(data.astype(np.float32), settings.batch, seed=settings.seed)
    state = training.init_state(jax.random.key(settings.seed), params, optimizer)
    state = training.fit(state, jax.jit(step, donate_argnums=0), batches, settings.steps, progress=False)
    return dj.as_denoiser(network(state.ema), schedule, target)


@jax.jit
def flow(denoise, schedule, key):
    """Samples along the flow, of shape (times, n, 2)."""
    x1 = dj.sample_prior(key, schedule, (1000, 2))
    ts = dj.uniform_log_snr(schedule, 60, PRIOR_END, DATA_END)
    return dj.trajectory(key, dj.edm_sampler(denoise, schedule), x1, ts)


@jax.jit
def log_density(denoise, schedule, xs):
    def one(x):
        return dj.log_likelihood(
            jax.random.key(0),
            denoise,
            schedule,
            x,
            probes=divergence.exact_probes,
            start=DATA_END,
            end=PRIOR_END,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        )

    return jax.vmap(one)(xs)


def figure(name, data, models, settings, path):
    """A row a model: samples on their way, where the flow took them, and the density."""
    side = np.linspace(-2.2, 2.2, settings.grid)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), jnp.float32)
    fig, axes = plt.subplots(len(models), 4, figsize=(9.2, 2.25 * len(models) + 0.4), layout="constrained")
    titles = (f"data: {name}", "flow lines, noise to data", "samples", "density (log_likelihood)")
    for row, (label, (schedule, denoise)) in zip(axes, models.items(), strict=True):
        xs = np.asarray(flow(denoise, schedule, jax.random.key(1)))
        density = np.exp(np.asarray(log_density(denoise, schedule, grid))).reshape(settings.grid, -1)
        row[0].scatter(*data[:1000].T, s=1, color="tab:gray")
        row[1].plot(xs[:, :60, 0], xs[:, :60, 1], lw=0.5, color="tab:blue", alpha=0.6)
        row[1].scatter(*xs[-1, :60].T, s=4, color="k", zorder=3)
        row[2].scatter(*xs[-1].T, s=1, color="tab:blue")
        row[3].imshow(
            density,
            extent=(-2.2, 2.2, -2.2, 2.2),
            origin="lower",
            cmap="magma",
            vmin=0,
            vmax=np.quantile(density, 0.998),
        )
        row[0].set_ylabel(label)
        for ax in row:
            ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=(), yticks=(), aspect="equal")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    scores = {}
    for name in settings.data:
        data, held_out = points(name, 20_000, settings.seed), points(name, settings.held_out, settings.seed + 1)
        models = {}
        for path, schedule in PATHS.items():
            for objective, target in TARGETS.items():
                denoise = train(data, schedule, target, settings)
                nll = -np.asarray(log_density(denoise, schedule, jnp.asarray(held_out, jnp.float32)))
                score = {"held_out_nll": float(nll.mean()), "standard_error": float(nll.std() / np.sqrt(len(nll)))}
                scores[f"{name}, {path}, {objective}"] = score
                print(f"{name:8s} {path:9s} {objective:14s} NLL {nll.mean():.3f} nats", flush=True)
                models[f"{path}\n{objective}"] = schedule, denoise
        figure(name, data, models, settings, settings.out / f"{name}.png")
    write_results(settings.out / "metrics.json", scores)
    return scores


if __name__ == "__main__":
    main(tyro.cli(Settings))
