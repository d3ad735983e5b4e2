"""Every solver on every grid, on a trained model of images."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import diffjax as dj
from diffjax import optimal_grids, samplers
from diffjax.metrics import frechet_distance
from experiments.fast_sampling import Settings
from experiments.fast_sampling.comparison import Results, compare
from experiments.fast_sampling.solvers import programmed_grids, published_grid
from experiments.image_models import Images, digits, fashion_mnist, pixels
from experiments.image_models.models import class_labels, generate, noise, to_images, train
from experiments.train_images import Model

PUBLISHED = ("uniform log-SNR", "uniform t", "quadratic t")
FOUND = ("DP KLUB", "learned", "learned with gains")


class Case(NamedTuple):
    """A trained model, and the size of its experiment."""

    title: str
    model: Model
    data: Images
    samples: int
    learning_samples: int
    """start points for learning, apart from those that are scored"""
    accurate_steps: int
    """steps of Heun's method to the accurate ends"""
    nfe: tuple[int, ...]


def digits_case(settings: Settings) -> Case:
    data = digits.load(settings.digits.seed)
    model, _ = train(digits.make_network(settings.digits), data, settings.digits)
    return Case("digits", model, data, 1400, 200, 200, settings.nfe)


def fashion_case(settings: Settings) -> Case:
    data = fashion_mnist.load(settings.fashion.data_dir)
    model, _ = train(fashion_mnist.make_network(settings.fashion), data, settings.fashion)
    samples, nfe = settings.fashion_samples, settings.fashion_nfe
    return Case("Fashion-MNIST", model, data, samples, 16, 40, nfe)


CASES = {"digits": digits_case, "fashion": fashion_case}


def on_images(case: Case, settings: Settings) -> tuple[Results, float, dict[str, float]]:
    """The results, the Fréchet distance of the accurate ends, and the seconds to learn grids."""
    model, data = case.model, case.data
    held_out = pixels(data.held_out, data)
    labels, x1 = class_labels(case.samples, data), noise(1, case.samples, data)

    def sampled(ts, make, gains=None, labels=labels, x1=x1):
        options = {} if gains is None else {"gains": gains}
        return generate(model, labels, x1, ts, method=make, **options)

    def distance(x) -> float:
        return frechet_distance(pixels(to_images(x, data), data), held_out, allow_few=True)

    accurate = dj.quadratic(case.accurate_steps)
    x0 = sampled(accurate, samplers.heun)
    learning_labels = labels[: case.learning_samples]
    learning_x1 = noise(2, case.learning_samples, data)
    learning_x0 = sampled(accurate, samplers.heun, labels=learning_labels, x1=learning_x1)
    learning_points = learning_labels, learning_x1, learning_x0
    frechet = distance(x0)
    print(f"{case.title}: Fréchet distance of the accurate ends {frechet:.3f}", flush=True)
    programmed = klub_grids(case, settings)

    def grids(_, n):
        published = {grid: published_grid(grid, model.schedule, n, 1.0, 0.0) for grid in PUBLISHED}
        return published | {"DP KLUB": programmed[n][0].at[0].set(1.0).at[-1].set(0.0)}

    def learning(make, ts, with_gains):
        gains = jnp.ones((len(ts) - 1, 2)) if with_gains else None
        rate, steps = settings.learning_rate, settings.learning_steps
        numbers = learn(model, learning_points, ts, gains, make, rate, steps)
        yield "learned with gains" if with_gains else "learned", numbers

    def score(make, ts, gains):
        x = sampled(ts, make, gains)
        return distance(x), float(jnp.sqrt(jnp.mean((x - x0) ** 2)))

    results, costs = compare(
        case.nfe,
        settings.learned_nfe,
        grids=grids,
        error=lambda make, ts: float(error(model, learning_points, ts, None, make)),
        learn=learning,
        score=score,
    )
    return results, frechet, costs


def klub_grids(case: Case, settings: Settings) -> dict[int, jax.Array]:
    """Grids by a dynamic program over the KLUB of training images."""
    model, data, n = case.model, case.data, case.learning_samples
    candidates = dj.uniform_log_snr(model.schedule, settings.candidates, 0.999, 0.001)
    images = pixels(data.train[:n], data).reshape(n, *data.train.shape[1:])
    denoise = model.denoiser(jnp.asarray(data.train_labels[:n]))
    batch = jnp.asarray(images, jnp.float32)
    klub = optimal_grids.klub_table(jax.random.key(3), denoise, model.schedule, candidates, batch)
    return programmed_grids(candidates, klub[None], min(max(case.nfe), settings.candidates))


@functools.partial(jax.jit, static_argnames="make")
def error(
    model: Model, points: tuple, ts: jax.Array, gains: jax.Array | None, make: Callable
) -> jax.Array:
    """The mean square distance of samples to the accurate ends from the same start points."""
    labels, x1, x0 = points
    options = {} if gains is None else {"gains": gains}
    return jnp.mean((generate(model, labels, x1, ts, method=make, **options) - x0) ** 2)


@functools.partial(jax.jit, static_argnames=("make", "rate", "steps"))
def learn(
    model: Model, points: tuple, ts: jax.Array, gains, make: Callable, rate: float, steps: int
):
    """The learned grid, and the learned gains if gains are given."""

    def loss(ts, gains=None):
        return jnp.log(error(model, points, ts, gains, make))

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    learned = optimal_grids.learn_grid(loss, ts, optimizer, steps, gains)
    return learned.ts, learned.numbers
