"""The objectives: the loss of one example, the parametrization, and the draw of times."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp

import diffjax as dj
from diffjax import couplings, divergence, losses, times, weightings
from diffjax.parametrizations import Parametrization
from diffjax.process import log_prior
from experiments.objectives import Path, at_low
from experiments.small_models import log_normal_times, normalized

X0, EPS, V, VELOCITY = map(normalized, (dj.X0, dj.EPS, dj.V, dj.VELOCITY))


def uniform_t(key, n, path):
    return times.stratified_times(key, n, path.low, path.high)


def log_snr_t(key, n, path):
    return times.log_snr_times(key, n, *path)


def log_normal_t(key, n, path):
    return log_normal_times(key, n, *path)


class Objective(NamedTuple):
    """A loss of one example, `(key, model, path, x0, x1, t, weight) -> loss`, and its times."""

    loss: Callable
    parametrization: Parametrization
    times: Callable = uniform_t
    takes_network: bool = False
    """whether the model in the loss is the network, not its denoiser"""
    any_path: bool = True
    pairs: bool = False
    """whether the loss needs x1"""
    simulates: bool = False
    """whether a training step solves the flow"""


def denoising(parametrization, weighting, draw=uniform_t):
    def loss(key, network, path, x0, x1, t, weight):
        value = losses.denoising(key, network, path.schedule, parametrization, x0, t, weighting)
        return weight * value

    return Objective(loss, parametrization, draw, takes_network=True)


def score_matching(point_loss, probes):
    """Losses that need only the samples x_t, weighted by sigma^2."""

    def loss(key, denoise, path, x0, x1, t, weight):
        noise_key, probe_key = jax.random.split(key)
        x = dj.perturb(path.schedule, x0, jax.random.normal(noise_key, x0.shape), t)
        score = dj.bind(dj.score, denoise, path.schedule)
        return weight * path.schedule(t)[1] ** 2 * point_loss(score, x, t, probes(probe_key, x))

    return Objective(loss, EPS)


def pair(key, denoise, path, x0, x1, t, weight):
    velocity = dj.bind(dj.velocity, denoise, path.schedule)
    return weight * losses.conditional_flow_matching(velocity, x0, x1, t)


def maximum_likelihood(kinetic_weight, jacobian_weight):
    def loss(key, denoise, path, x0, x1, t, weight):
        x, log_volume = at_low(path, x0)
        flow = losses.maximum_likelihood(
            key,
            dj.bind(dj.velocity, denoise, path.schedule),
            x,
            kinetic_weight=kinetic_weight,
            jacobian_weight=jacobian_weight,
            log_prior=lambda x: log_prior(path.schedule, x, path.high),
            start=path.low,
            end=path.high,
            solver=diffrax.Bosh3(),
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2),
            max_steps=256,
        )
        return flow.loss - log_volume

    return Objective(loss, VELOCITY, any_path=False, simulates=True)


def bound(key, denoise, path, x0, x1, t, weight):
    """The variational bound per dimension. The schedule is learned, too."""
    return variational_bound(key, denoise, path, x0, t, weight) / x0.size


def variational_bound(key, denoise, path, x0, t, weight):
    schedule, low, high = path
    return losses.variational_bound(
        key, denoise, schedule, x0, t, start=low, end=high, weight=weight
    )


def batch_loss(
    objective: Objective, network: dj.typing.Network, path: Path, key: jax.Array, x0s, labels
) -> jax.Array:
    """The mean of an objective over a batch.

    `losses.over_batch` does not fit, because the weight of a time multiplies only one term of the
    variational bound.
    """
    time_key, pair_key, noise_key = jax.random.split(key, 3)
    ts, weights = objective.times(time_key, len(x0s), path)
    keys = jax.random.split(noise_key, len(x0s))
    x1s = None
    if objective.pairs:
        x1s = couplings.optimal(None, x0s, jax.random.normal(pair_key, x0s.shape))

    def one(key, x0, x1, t, weight, label):
        model = network if label is None else dj.bind(network, cond=label)
        if not objective.takes_network:
            model = dj.as_denoiser(model, path.schedule, objective.parametrization)
        return objective.loss(key, model, path, x0, x1, t, weight)

    return jnp.mean(jax.vmap(one)(keys, x0s, x1s, ts, weights, labels))


OBJECTIVES = {
    "noise (DDPM)": denoising(EPS, weightings.snr),
    "noise, min-SNR": denoising(EPS, weightings.min_snr(5.0)),
    "noise, P2": denoising(EPS, weightings.p2()),
    "noise, g^2, uniform t": denoising(EPS, weightings.likelihood),
    "noise, g^2, importance t": denoising(EPS, weightings.likelihood, log_snr_t),
    "data": denoising(X0, weightings.unweighted),
    "v": denoising(V, weightings.unweighted),
    "velocity (flow matching)": denoising(VELOCITY, weightings.unweighted),
    "EDM": denoising(dj.edm_preconditioning(0.7), weightings.edm_weighting(0.7), log_normal_t),
    "score, implicit": score_matching(losses.implicit_score_matching, divergence.exact_probes),
    "score, sliced": score_matching(losses.implicit_score_matching, divergence.rademacher_probes),
    "score, sliced, no variance reduction": score_matching(
        losses.sliced_score_matching, divergence.gaussian_probes
    ),
    "flow matching, optimal pairs": Objective(pair, VELOCITY, any_path=False, pairs=True),
    "maximum likelihood": maximum_likelihood(0.0, 0.0),
    "maximum likelihood, regularized": maximum_likelihood(0.05, 0.05),
    "variational bound, learned schedule": Objective(bound, EPS, log_snr_t),
}
LEARNED_SCHEDULE = "variational bound, learned schedule"
# The cost of these grows with the dimension, and optimal pairs would change each class's prior.
PLANE_ONLY = (
    "score, implicit",
    "score, sliced",
    "maximum likelihood",
    "flow matching, optimal pairs",
)
