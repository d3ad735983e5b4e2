"""Couplings: how pairing data and prior straightens the paths, on the field's two pairs of distributions in the plane.

    python -m experiments.couplings        # figures and a table in runs/couplings/

A velocity network is trained by conditional flow matching (1.17) on pairs that are independent, optimal in each minibatch,
or entropic; the last as a Schrodinger bridge with its score, sampled as an ODE and as an SDE. Measured on fresh start
points: the length and curvature of the paths, and the 2-Wasserstein distance to fresh data at few steps.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import make_moons

import diffjax as dj
from diffjax import couplings, losses, samplers, times, training
from diffjax.metrics import curvature, path_length, wasserstein
from diffjax.networks import MLP
from experiments.results import write_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the couplings experiment."""

    out: pathlib.Path = pathlib.Path("runs/couplings")
    """where figures and scores go"""
    steps: int = 3000
    """training steps of each network"""
    batch: int = 256
    """pairs a step"""
    width: int = 64
    """of the networks"""
    learning_rate: float = 2e-3
    """the peak, before cosine decay"""
    amplitude: float = 1.0
    """of the bridge's noise"""
    nfe: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Euler steps"""
    points: int = 2000
    """start points that are scored"""
    seeds: int = 3
    """networks of each kind, over which means and standard deviations are taken"""


def eight_gaussians(rng, n):
    angles = 2 * np.pi * rng.integers(8, size=n) / 8
    return 5 * np.stack([np.cos(angles), np.sin(angles)], 1) + np.sqrt(0.1) * rng.normal(size=(n, 2))


def moons(rng, n):
    return 3 * make_moons(n, noise=0.2, random_state=int(rng.integers(2**31)))[0] - 1


def gaussian(rng, n):
    return rng.normal(size=(n, 2))


PAIRS = {"8 Gaussians to moons": (eight_gaussians, moons), "1 Gaussian to 8": (gaussian, eight_gaussians)}
COUPLINGS = {
    "independent": couplings.independent,
    "optimal": couplings.optimal,
    "entropic": couplings.entropic,
}
LOW, HIGH = 1e-3, 1 - 1e-3  # of the bridge's times, whose velocity and score are infinite at the ends


def train(pair, name, settings, seed):
    """Velocity and score networks (the latter is trained for the bridge alone)."""
    prior, data = PAIRS[pair]
    rng = np.random.default_rng(seed)
    bridge = name == "entropic"
    coupling = couplings.entropic(2 * settings.amplitude**2) if bridge else COUPLINGS[name]

    def new(stream):
        return training.functional(MLP(2, width=settings.width, depth=3, rngs=nnx.Rngs(stream)))

    (apply, velocity), (_, score) = new(2 * seed), new(2 * seed + 1)

    def loss(params, key, batch):
        pair_key, key = jax.random.split(key)
        x0, x1 = batch
        x1 = coupling(pair_key, x0, x1)
        ends = (LOW, HIGH) if bridge else (0.0, 1.0)
        velocity = dj.bind(apply, params["velocity"])
        score = dj.bind(scaled_score, apply, params["score"], settings.amplitude)

        def one(key, pair, t):
            if not bridge:
                return losses.conditional_flow_matching(velocity, *pair, t)
            return losses.bridge_matching(key, velocity, score, *pair, t, settings.amplitude)

        return losses.over_batch(key, one, (x0, x1), times=lambda key, n: times.stratified_times(key, n, *ends))

    def batches():
        while True:
            yield tuple(sample(rng, settings.batch).astype(np.float32) for sample in (data, prior))

    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))
    step = training.make_train_step(loss, optimizer, ema=training.power_ema())
    state = training.init_state(jax.random.key(seed), {"velocity": velocity, "score": score}, optimizer)
    state = training.fit(state, jax.jit(step, donate_argnums=0), batches(), settings.steps, progress=False)
    ema = jax.device_get(state.ema)
    return dj.bind(apply, ema["velocity"]), dj.bind(scaled_score, apply, ema["score"], settings.amplitude)


def scaled_score(apply, params, amplitude, x, t):
    """The network predicts the bridge's noise: `score = -eps / (a sqrt(t (1 - t)))`."""
    return -apply(params, x, t) / (amplitude * jnp.sqrt(t * (1 - t)))


@jax.jit
def flow(velocity, x1, ts):
    """Euler's method: a velocity network is a denoiser of the linear path, whatever the prior."""
    denoise = dj.as_denoiser(velocity, dj.linear(), dj.VELOCITY)
    return dj.trajectory(jax.random.key(0), dj.euler(denoise, dj.linear()), x1, ts)


@jax.jit
def diffusion(key, velocity, score, amplitude, x1, ts):
    return dj.trajectory(key, samplers.bridge_sampler(velocity, score, amplitude), x1, ts)


def measure(pair, name, settings, seed):
    """{row: {"distance": by NFE, "length", "curvature"}}, and trajectories to look at."""
    velocity, score = train(pair, name, settings, seed)
    rng = np.random.default_rng(1000 + seed)
    prior, data = PAIRS[pair]
    x1 = jnp.asarray(prior(rng, settings.points), jnp.float32)
    fresh, other = data(rng, settings.points), data(rng, settings.points)
    bridge = name == "entropic"
    low, high = (LOW, HIGH) if bridge else (0.0, 1.0)  # a bridge's velocity is not trained outside

    def row(run, smooth=True):
        ts = dj.uniform(200, high, low)
        xs = run(ts)
        scores = {"distance": {n: wasserstein(run(dj.uniform(n, high, low))[-1], fresh, 2) for n in settings.nfe}}
        if smooth:  # a Brownian path has neither length nor curvature: both grow with the number of steps
            scores["length"] = float(jax.vmap(path_length, 1)(xs).mean())
            scores["curvature"] = float(jax.vmap(curvature, (None, 1))(ts, xs).mean())
        return scores, xs

    rows = {f"{name}, ODE" if bridge else name: row(lambda ts: flow(velocity, x1, ts))}
    if bridge:
        run = functools.partial(diffusion, jax.random.key(seed), velocity, score, settings.amplitude, x1)
        rows[f"{name}, SDE"] = row(run, smooth=False)
    return rows, wasserstein(other, fresh, 2)


def figure(trajectories, table, floor, settings, path):
    fig, axes = plt.subplots(2, 5, figsize=(14, 5.6), layout="constrained")
    for row, (pair, columns) in zip(axes, trajectories.items(), strict=True):
        for ax, (name, xs) in zip(row, columns.items(), strict=False):
            xs = np.asarray(xs)
            ax.plot(xs[:, :80, 0], xs[:, :80, 1], lw=0.4, color="tab:gray", alpha=0.7)
            ax.scatter(*xs[0, :400].T, s=2, color="tab:orange", label="prior")
            ax.scatter(*xs[-1, :400].T, s=2, color="tab:blue", label="samples")
            ax.set(title=name, xticks=(), yticks=(), aspect="equal")
        row[0].set_ylabel(pair)
        for name, scores in table[pair].items():
            means = [np.mean([s["distance"][n] for s in scores]) for n in settings.nfe]
            row[-1].plot(settings.nfe, means, marker="o", ms=3, label=name)
        row[-1].axhline(floor[pair], color="k", ls=":", lw=1, label="data to data")
        row[-1].set(xscale="log", yscale="log", xlabel="Euler steps", ylabel="2-Wasserstein distance to data")
        row[-1].set_xticks(settings.nfe, settings.nfe)
        row[-1].minorticks_off()
        row[-1].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        row[-1].yaxis.set_major_formatter("{x:g}")
        row[-1].legend(fontsize=7)
    axes[0, 0].legend(fontsize=7, markerscale=3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(settings: Settings) -> dict:
    settings.out.mkdir(parents=True, exist_ok=True)
    table, floor, trajectories = {}, {}, {}
    for pair in PAIRS:
        table[pair], floors, trajectories[pair] = {}, [], {}
        for name in COUPLINGS:
            for seed in range(settings.seeds):
                rows, between_data = measure(pair, name, settings, seed)
                floors.append(between_data)
                for label, (scores, xs) in rows.items():
                    table[pair].setdefault(label, []).append(scores)
                    trajectories[pair].setdefault(label, xs)
        floor[pair] = float(np.mean(floors))
        print(f"{pair}: 2-Wasserstein distance of {settings.points} data points to others {floor[pair]:.3f}")
        print("| coupling | length | curvature | " + " | ".join(f"{n} steps" for n in settings.nfe) + " |")
        for label, scores in table[pair].items():
            columns = [[s.get(k) for s in scores] for k in ("length", "curvature")]
            columns += [[s["distance"][n] for s in scores] for n in settings.nfe]
            cells = ["" if None in c else f"{np.mean(c):.3f} ± {np.std(c, ddof=1):.3f}" for c in columns]
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
    figure(trajectories, table, floor, settings, settings.out / "couplings.png")
    record = {"rows": table, "data_to_data": floor}
    write_results(settings.out / "metrics.json", record)
    return record


if __name__ == "__main__":
    main(tyro.cli(Settings))
