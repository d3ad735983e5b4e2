"""Every public constructor under every transform of jax: one table, and a test that nothing public
is missing from it.

A row builds an object from numbers, `make(numbers)`, and uses it, `use(object, x, t)`. The object
crosses every transform as an ordinary argument.
"""

import contextlib
import functools
import importlib
import inspect
import pickle
from typing import NamedTuple

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import diffjax
from diffjax import (
    bind,
    couplings,
    divergence,
    dynamics,
    exact,
    grids,
    guidance,
    likelihood,
    losses,
    optimal_grids,
    process,
    samplers,
    schedules,
    solve,
    times,
    weightings,
)
from diffjax import parametrizations as prm
from diffjax.typing import Estimate, State

X, T, DEVICES = np.array([0.3, -0.8]), 0.6, 4


class Row(NamedTuple):
    make: object
    use: object
    numbers: tuple = ()
    ends: tuple = (0.0, 1.0)  # where the gradient must be finite, too
    covers: tuple = ()
    reverse: bool = True  # whether there is a reverse mode: not through a while loop


def _network(w, x, t):
    return jnp.tanh(w * x) * (1 - 0.3 * t)


def _batch_network(w, xs, ts):
    return jnp.tanh(w * xs) * (1 - 0.3 * ts[:, None])


def _gaussian(mean, scale, schedule):
    return exact.gaussian(mean * jnp.ones(2), scale * jnp.diag(jnp.array([1.0, 2.0])), schedule)


def _both(estimate):
    return jnp.concatenate([estimate.x0, estimate.eps])


def _denoise(denoise, x, t):
    return _both(denoise(x, t))


def _values(schedule, x, t):
    return jnp.stack(schedule(t)) * x[0]


def _drift(t):
    return -1.0 - t


def _diffusion(scale, t):
    return scale * (1.0 + t)


def _inverse(schedule, x, t):
    return schedules.half_log_snr_inverse(schedule, x[0])[None]


def _run(sampler, x, t):
    return samplers.sample(jax.random.key(0), sampler, x, jnp.stack([t, 0.5 * t, 0.2 * t]))


def _trajectory(sampler, x, t):
    return samplers.trajectory(jax.random.key(0), sampler, x, jnp.stack([t, 0.5 * t])).ravel()


def _scanned(scan, sampler, x, t):
    return samplers.sample(
        jax.random.key(0), sampler, x, jnp.stack([t, 0.7 * t, 0.5 * t, 0.2 * t]), scan
    )


def _each(kinds, x, t):
    """Several samplers in one program, on four steps: as many as the multistep methods need, and
    one more.
    """
    ts = jnp.stack([t, 0.8 * t, 0.5 * t, 0.3 * t, 0.2 * t])
    return jnp.concatenate(
        [samplers.sample(jax.random.key(0), sampler, x, ts) for sampler in kinds]
    )


def _kinds(*makes):
    return lambda *numbers: tuple(_sampler(make, *numbers) for make in makes)


def _with_gains(denoise, schedule, gain):
    return samplers.velocity_adams(denoise, schedule, gains=gain * jnp.ones((4, 2)))


def _bh1(denoise, schedule):
    return samplers.unipc(denoise, schedule, 2, samplers.bh1)


def _fast(scale, x, t):
    schedule = schedules.linear_vp()
    return solve.dpm_solver_fast(_gaussian(0.4, scale, schedule), schedule, x, 4, t, 0.2 * t)


def _adaptive(denoise, x, t):
    kinds = [
        functools.partial(solve.dpm_solver_adaptive, pair=pair)
        for pair in (solve.DPM_SOLVER_12, solve.DPM_SOLVER_23)
    ]
    return jnp.concatenate(
        [adaptive(denoise, schedules.linear_vp(), x, t, 0.5 * t).x for adaptive in kinds]
    )


def _candidate_times(t):
    return jnp.stack([t, 0.7 * t, 0.5 * t, 0.2 * t])


def _tables(denoise, x, t):
    ts, schedule, data = _candidate_times(t), schedules.linear_vp(), jnp.stack([x, x[::-1]])
    bounds = [
        table(jax.random.key(0), denoise, schedule, ts, data)
        for table in (optimal_grids.elbo_table, optimal_grids.klub_table)
    ]
    xs = jnp.stack([data, 0.9 * data, 0.7 * data, 0.6 * data])
    error = optimal_grids.solver_error_table(samplers.ddim(denoise, schedule), schedule, ts, xs)
    costs = [optimal_grids.cheapest_paths(table, 3).costs for table in (*bounds, error)]
    return jnp.concatenate(costs)


SGD = optax.sgd(0.1)


def _far(x, ts):
    return jnp.sum(ts**2) + x[0]


def _residuals(x, ts):
    return ts - 0.3 * x[0]


def _learned(scale, x, t):
    z = optimal_grids.increments(_candidate_times(t)) * scale
    ts = optimal_grids.from_increments(z, t, 0.2 * t)
    learned = optimal_grids.learn_grid(bind(_far, x), ts, SGD, 2)
    fitted = optimal_grids.fit_grid(bind(_residuals, x), ts, steps=2)
    return jnp.concatenate([learned.ts, learned.losses, fitted.ts, fitted.losses])


def _shrink(rate, key, x, t, s):
    return x * jnp.exp(rate * (s - t))


def _flow(flow, x, t):
    return flow(t, x, None)


def _sde(sde, x, t):
    return sde.drift(t, x, None) + sde.diffusion(t, x, None).mv(jnp.ones(2))


def _sampler(make, *numbers):
    schedule = schedules.linear_vp()
    return make(_gaussian(0.4, 0.7, schedule), schedule, *numbers)


def _sampler_row(make, *numbers, covers):
    return Row(functools.partial(_sampler, make), _run, numbers, (1.0,), covers)


def _parametrized(name):
    def make(w, *numbers):
        parametrization = prm.edm_preconditioning(*numbers) if numbers else getattr(prm, name)
        return prm.as_denoiser(bind(_network, w), schedules.linear(), parametrization)

    return make


def _weighted(weighting, x, t):
    return weighting(schedules.linear(), prm.V, t)[None] * x[0]


def _denoising(network, x, t):
    return losses.denoising(jax.random.key(0), network, schedules.linear_vp(), prm.EPS, x, t)[None]


def _matching(network, x, t):
    return jnp.stack(
        [
            losses.flow_matching(network, network.args[1], x, t),
            losses.conditional_flow_matching(network, x, 2 * x, t),
        ]
    )


def _score_matching(network, x, t):
    probes = divergence.exact_probes(None, x)
    return jnp.stack(
        [
            losses.explicit_score_matching(network, network.args[1], x, t),
            losses.implicit_score_matching(network, x, t, probes),
            losses.sliced_score_matching(network, x, t, probes[:2]),
        ]
    )


def _two(w, other, x, t):
    return _network(w, x, t)


def _grid_sum(ts, x, t):
    return ts * x[0]


def _posterior(schedule, x, t):
    q, back = process.transition(schedule, 0.5 * t, t), process.posterior(schedule, 0.5 * t, t)
    return (q.scale * x + q.std) + back.x_weight * x + back.x0_weight + back.std


def _prior(schedule, x, t):
    return process.log_prior(schedule, x)[None] + process.sample_prior(
        jax.random.key(0), schedule, (2,)
    )


def _quantities(schedule, x, t):
    quantities = (
        schedules.drift(schedule, t),
        schedules.diffusion(schedule, t),
        schedules.diffusion_squared(schedule, t),
        schedules.half_log_snr(schedule, t),
        *schedules.alpha_sigma(schedule, t),
        *schedules.coefficients(schedule, t),
    )
    return jnp.stack(quantities) * x[0]


def _betas(schedule, x, t):
    return schedules.to_betas(schedule, 4) * x[0]


# What diffrax's solvers do inside is not this table's: the cheapest one stands for all.
CONSTANT = {
    "solver": diffrax.Euler(),
    "stepsize_controller": diffrax.ConstantStepSize(),
    "max_steps": 8,
}


def _solve_flow(denoise, x, t):
    return solve.solve_flow(denoise, schedules.linear(), x, t, 0.3, dt0=-0.1, **CONSTANT)


def _solve_sde(denoise, x, t):
    t = jax.lax.stop_gradient(t)  # diffrax refuses to differentiate a Brownian path by its time
    return solve.solve_sde(
        jax.random.key(0), denoise, schedules.linear_vp(), x, t, 0.3, dt0=0.1, **CONSTANT
    )


def _all_probes(key, x):
    keys = jax.random.split(key)
    kinds = divergence.rademacher_probes(keys[0], x), divergence.gaussian_probes(keys[1], x)
    return jnp.concatenate([divergence.exact_probes(None, x), *kinds])


def _log_likelihood(denoise, x, t):
    value = likelihood.log_likelihood(
        jax.random.key(0),
        denoise,
        schedules.linear(),
        x,
        probes=_all_probes,
        start=0.1,
        dt0=0.25,
        **CONSTANT,
    )
    return value[None]


def _divergence(w, x, t):
    value, trace = divergence.divergence(
        lambda x: jnp.sin(w * x) * t, x, divergence.exact_probes(None, x)
    )
    return value + trace


def _bits(w, x, t):
    pixels = likelihood.quantize(jax.lax.stop_gradient(0.1 * x), 256)
    return likelihood.bits_per_dim(w * x, 2, 256) + likelihood.dequantize(
        jax.random.key(0), pixels, 256
    )


def _discrete(numbers, x, t):
    values, keys = jnp.array([3, 250]), jax.random.split(jax.random.key(0), 3)
    xs, log_qs = jax.vmap(
        lambda key: likelihood.variational_dequantize(key, values, 256, x, t * numbers)
    )(keys)
    return likelihood.importance_weighted_bound(-log_qs) + jnp.stack(likelihood.standard_errors(xs))


def _of_denoiser(denoise, x, t):
    return prm.score(denoise, schedules.linear(), x, t) + prm.velocity(
        denoise, schedules.linear(), x, t
    )


def _target(schedule, x, t):
    return sum(
        prm.target(schedule, p, x, x[::-1], t)
        for p in (prm.X0, prm.EPS, prm.V, prm.VELOCITY, prm.SCORE)
    )


def _perturb(schedule, x, t):
    return process.perturb(schedule, x, jnp.cos(x), t)


def _times(numbers, x, t):
    low, high, mean, std = numbers
    kinds = times.uniform_times, times.stratified_times, times.antithetic_times
    each = [f(jax.random.key(0), 3, low, high) for f in kinds]
    each.append(times.log_snr_times(jax.random.key(0), 3, schedules.linear(), low, high))
    each.append(times.log_normal_times(jax.random.key(0), 3, schedules.linear(), mean, std))
    return jnp.concatenate([part for pair in each for part in pair]) * x[0]


def _kernels(denoise, x, t):
    schedule, s = schedules.linear_vp(), 0.4 * t
    kernels = [
        *(samplers.ddim_kernel(denoise, schedule, 0.3), samplers.ddpm_kernel(denoise, schedule)),
        *(
            samplers.euler_maruyama_kernel(denoise, schedule),
            samplers.sde_dpm_solver_kernel(denoise, schedule, 0.7),
        ),
    ]
    drawn = [
        samplers.sample(jax.random.key(0), samplers.kernel_sampler(k), x, jnp.stack([t, s]))
        for k in kernels
    ]
    values = [samplers.log_transition(k, x, t, x[::-1], s) for k in kernels]
    return jnp.concatenate([*drawn, jnp.stack(values)])


def _given(scale, x, t, cond):
    return _gaussian(cond, scale, schedules.linear())(x, t)


def _pair(a, b):
    return [_gaussian(mean, 0.7, schedules.linear()) for mean in (a, b)]


def _scale(w, t):
    return w * (1 + t)


def _sum(x):
    return jnp.sum(x, keepdims=True) * jnp.array([1.0, 0.5])


def _log_prob(a, x, t):
    return a * jnp.sin(x.sum(-1)) * t


def _guided(a, b, w):
    (c, u), schedule = _pair(a, b), schedules.linear()
    return (
        guidance.composed([c, c], u, [w, -0.5 * w]),
        guidance.interval(c, u, schedule, -9.0, 9.0),
        guidance.rescaled(c, u, schedule, prm.V, w, 0.7, event_ndim=1),
        guidance.projected(c, u, schedule, w, 0.3, 0.9, event_ndim=1),
        guidance.zero_star(c, u, schedule, w, event_ndim=1),
        guidance.classifier(c, bind(_log_prob, b), schedule, w, event_ndim=1),
        guidance.energy(c, bind(_log_prob, b), schedule, w, event_ndim=1),
        guidance.dynamic_threshold(c, schedule, 90.0, 0.1 * w, event_ndim=1),
        guidance.clip_x0(c, schedule, b, 0.9),
    )


def _observed(a, y, noise):
    schedule = schedules.linear()
    args = _gaussian(a, 0.7, schedule), schedule, _sum, y * jnp.ones(2), noise
    return (
        guidance.mmps(*args, 2),
        guidance.pigdm(*args, 0.8, 2),
        guidance.diffpir(*args, 1.3, 2),
        guidance.dps(*args),
    )


def _each_denoise(kinds, x, t):
    return jnp.concatenate([_denoise(denoise, x, t) for denoise in kinds])


def _conditioned(a, x, t):
    cov = jnp.array([[1.0, 0.3], [0.3, 0.5]]) + 0 * t
    given = jnp.array([[1.0, 0.4]]), x[:1], a * jnp.eye(1)
    mean, one = exact.conditioned_gaussian(x, cov, *given)
    means, covs = jnp.stack([x, x[::-1]]), jnp.stack([cov, t * cov + 0.1 * jnp.eye(2)])
    mixture, log_p = exact.conditioned_mixture(jnp.array([0.3, 0.7]), means, covs, *given)
    return jnp.concatenate([mean, one.ravel(), *map(jnp.ravel, mixture), log_p[None]])


def _repainted(denoise, schedule, known):
    inner = samplers.ddpm(denoise, schedule)
    return samplers.repaint(inner, schedule, known, jnp.array([1.0, 0.0]), 2)


def _particles(kinds, x, t):
    (sampler,) = kinds
    xs, ts = jnp.stack([x, x[::-1], -x, 0.5 * x]), jnp.stack([t, 0.5 * t, 0.2 * t])
    tilted = samplers.tilted_cfg(*_pair(x[0], x[1]), schedules.linear(), 2.0, 0.0)
    states = [samplers.final_state(jax.random.key(0), s, xs, ts) for s in (sampler, tilted)]
    drawn = samplers.resample(
        jax.random.key(1), State(states[0].x, samplers.Particles(jnp.arange(4.0)))
    )
    return jnp.concatenate(
        [
            *(state.x.ravel() for state in states),
            drawn.ravel(),
            jnp.stack([f(s) for s in states for f in (samplers.log_evidence, _size)]),
        ]
    )


def _size(state):
    return samplers.effective_sample_size(state)


def _classification(network, x, t):
    return losses.noisy_classification(jax.random.key(0), network, schedules.linear(), x, t, 1)[
        None
    ]


def _over_batch(network, x, t):
    def loss(key, x0, t, label):
        return losses.denoising(key, network, schedules.linear(), prm.X0, x0 + label, t)

    x0s, labels = jnp.stack([x, x[::-1], t * x]), jnp.arange(3.0)
    return losses.over_batch(jax.random.key(0), loss, x0s, labels, drop=0.5 * t, null=3.0)


def _bridge(networks, x, t):
    point = process.brownian_bridge(x, x[::-1], 0.3 * x, t, 0.7)
    loss = losses.bridge_matching(jax.random.key(0), *networks, x, x[::-1], t, 0.7)
    return jnp.concatenate([*point, loss[None]])


def _bound(schedule, x, t):
    denoise = _gaussian(0.4, 0.7, schedule)
    kinds = losses.gaussian_reconstruction, losses.discrete_reconstruction(3)
    bounds = [
        losses.variational_bound(
            jax.random.key(0), denoise, schedule, x, t, start=0.1, reconstruction=kind
        )
        for kind in kinds
    ]
    return jnp.stack(bounds)


def _maximum_likelihood(network, x, t):
    tight = diffrax.PIDController(rtol=1e-8, atol=1e-8)
    flow = losses.maximum_likelihood(
        jax.random.key(0),
        network,
        x,
        jacobian_weight=0.1,
        start=0.5 * t,
        end=t,
        stepsize_controller=tight,
    )
    return jnp.stack(flow)


def _coupled(epsilon, x, t):
    x0, x1 = jnp.stack([x, x[::-1], 2 * x]), jnp.stack([-x, 0.5 * x + t, x])
    plan = couplings.sinkhorn(couplings.squared_distances(x0, x1), epsilon, 1e-8)
    pairings = couplings.independent, couplings.optimal, couplings.entropic(epsilon)
    return jnp.concatenate(
        [plan.log_plan.ravel(), *(pair(jax.random.key(0), x0, x1).ravel() for pair in pairings)]
    )


OPEN = (0.001, 0.999)
ROWS = {
    # name: the first time off the ends where the mathematics itself is infinite there (sigma' or f,
    # or the log-SNR)
    "linear_vp": Row(schedules.linear_vp, _values, (0.1, 20.0)),
    "sub_vp": Row(schedules.sub_vp, _values, (0.1, 20.0)),
    "ve": Row(schedules.ve, _values, (0.01, 50.0)),
    "edm": Row(schedules.edm, _values, (80.0,)),
    "linear": Row(schedules.linear, _values),
    "gvp": Row(schedules.gvp, _values),
    "cosine": Row(schedules.cosine, _values, (0.01,)),
    "from_betas": Row(
        lambda a, b: schedules.from_betas(jnp.linspace(a, b, 5)), _values, (0.1, 0.3)
    ),
    "zero_terminal_snr": Row(
        lambda a, b: schedules.from_betas(schedules.zero_terminal_snr(jnp.linspace(a, b, 5))),
        _values,
        (0.1, 0.3),
    ),
    "to_betas": Row(schedules.linear_vp, _betas, (0.1, 20.0)),
    "from_sde": Row(lambda a: schedules.from_sde(_drift, bind(_diffusion, a), 8), _values, (0.7,)),
    "quantities": Row(
        schedules.linear_vp,
        _quantities,
        (0.1, 20.0),
        OPEN,
        ("alpha_sigma", "coefficients", "drift", "diffusion_squared", "half_log_snr", "diffusion"),
    ),
    "half_log_snr_inverse": Row(schedules.linear_vp, _inverse, (0.1, 20.0)),
    "uniform": Row(lambda a, b: grids.uniform(3, a, b), _grid_sum, (0.9, 0.1)),
    "quadratic": Row(lambda a, b: grids.quadratic(3, a, b), _grid_sum, (0.9, 0.1)),
    "uniform_log_snr": Row(
        lambda a, b, c: grids.uniform_log_snr(schedules.linear_vp(a), 3, b, c),
        _grid_sum,
        (0.1, 0.9, 0.1),
    ),
    "karras": Row(
        lambda a, b, c, d: grids.karras(schedules.linear_vp(a), 3, b, c, d),
        _grid_sum,
        (0.1, 0.9, 0.1, 7.0),
    ),
    "perturb": Row(schedules.linear_vp, _perturb, (0.1, 20.0)),
    "transition": Row(schedules.linear_vp, _posterior, (0.1, 20.0), (0.001, 1.0), ("posterior",)),
    "log_prior": Row(schedules.ve, _prior, (0.01, 50.0), covers=("sample_prior",)),
    "as_denoiser X0": Row(
        _parametrized("X0"),
        _denoise,
        (0.7,),
        (0.001, 1.0),
        ("as_denoiser", "X0", "Parametrization"),
    ),
    "as_denoiser EPS": Row(_parametrized("EPS"), _denoise, (0.7,), (0.0, 0.999), ("EPS",)),
    "as_denoiser SCORE": Row(_parametrized("SCORE"), _denoise, (0.7,), (0.0, 0.999), ("SCORE",)),
    "as_denoiser V": Row(_parametrized("V"), _denoise, (0.7,), covers=("V",)),
    "as_denoiser VELOCITY": Row(_parametrized("VELOCITY"), _denoise, (0.7,), covers=("VELOCITY",)),
    "batched": Row(
        lambda w: prm.as_denoiser(prm.batched(bind(_batch_network, w)), schedules.linear(), prm.V),
        _denoise,
        (0.7,),
    ),
    "at_timesteps": Row(
        lambda w: prm.as_denoiser(
            prm.at_timesteps(bind(_network, w), 10), schedules.linear(), prm.V
        ),
        _denoise,
        (0.7,),
    ),
    "edm_preconditioning": Row(_parametrized("edm"), _denoise, (0.7, 0.5), OPEN),
    "score": Row(
        lambda a, b: _gaussian(a, b, schedules.linear()),
        _of_denoiser,
        (0.4, 0.7),
        covers=("velocity",),
    ),
    "target": Row(schedules.linear_vp, _target, (0.1, 20.0), OPEN),
    "reschedule": Row(
        lambda a, b: prm.reschedule(
            _gaussian(a, 0.7, schedules.linear_vp(b)), schedules.linear_vp(b), schedules.linear()
        ),
        _denoise,
        (0.4, 0.1),
        OPEN,
    ),
    "gaussian": Row(lambda a, b: _gaussian(a, b, schedules.linear_vp()), _denoise, (0.4, 0.7)),
    "gaussian_mixture": Row(
        lambda a, b: exact.gaussian_mixture(
            jnp.array([0.3, 0.7]),
            a * jnp.array([[1.0, 0.2], [-0.5, 1.0]]),
            b * jnp.stack([jnp.diag(jnp.array([1.0, 2.0]))] * 2),
            schedules.linear_vp(),
        ),
        _denoise,
        (0.4, 0.7),
    ),
    "empirical": Row(
        lambda a: exact.empirical(
            a * jnp.array([[1.0, 0.2], [-0.5, 1.0], [0.1, 0.0]]), schedules.linear()
        ),
        _denoise,
        (0.9,),
        (0.01, 1.0),
    ),
    "probability_flow": Row(
        lambda a, b: dynamics.probability_flow(
            _gaussian(a, b, schedules.linear()), schedules.linear()
        ),
        _flow,
        (0.4, 0.7),
    ),
    "forward_sde": Row(
        lambda a: dynamics.forward_sde(schedules.linear_vp(a)), _sde, (0.1,), OPEN, ("SDE",)
    ),
    "reverse_sde": Row(
        lambda a: dynamics.reverse_sde(
            _gaussian(a, 0.7, schedules.linear_vp()), schedules.linear_vp()
        ),
        _sde,
        (0.4,),
        OPEN,
    ),
    "cfg of one network": Row(
        lambda a, b, w: guidance.cfg(
            *(bind(_given, b, cond=cond) for cond in (a, jnp.zeros_like(a))), bind(_scale, w)
        ),
        _denoise,
        (0.4, 0.7, 1.3),
    ),
    "cfg": Row(
        lambda a, b, w: guidance.cfg(*_pair(a, b), w),
        _denoise,
        (0.4, -0.2, 2.0),
    ),
    "guidance": Row(
        _guided,
        _each_denoise,
        (0.4, -0.2, 2.0),
        OPEN,
        (
            *("composed", "interval", "rescaled", "projected", "zero_star"),
            *("classifier", "energy", "dynamic_threshold", "clip_x0"),
        ),
    ),
    "mmps": Row(
        _observed,
        _each_denoise,
        (0.7, 0.3, 0.6),
        OPEN,
        ("pigdm", "diffpir", "dps"),
    ),
    "tweedie_twist": Row(
        lambda a, y, noise: guidance.tweedie_twist(
            _gaussian(a, 0.7, schedules.linear()), schedules.linear(), _sum, y * jnp.ones(2), noise
        ),
        lambda twist, x, t: twist(x, t)[None],
        (0.7, 0.3, 0.6),
        OPEN,
    ),
    "conditioned_gaussian": Row(
        lambda a: a,
        _conditioned,
        (0.7,),
        covers=("conditioned_mixture", "Mixture"),
    ),
    "unweighted": Row(lambda: bind(weightings.unweighted), _weighted, (), OPEN),
    "inverse_variance": Row(lambda: bind(weightings.inverse_variance), _weighted, (), OPEN),
    "likelihood": Row(lambda: bind(weightings.likelihood), _weighted, (), OPEN),
    "snr": Row(lambda: bind(weightings.snr), _weighted, (), OPEN),
    "min_snr": Row(weightings.min_snr, _weighted, (3.0,), OPEN),
    "p2": Row(weightings.p2, _weighted, (0.7, 1.2), OPEN),
    "edm_weighting": Row(weightings.edm_weighting, _weighted, (0.6,), OPEN),
    "explicit_score_matching": Row(
        lambda a, b: bind(_two, a, bind(_network, b)),
        _score_matching,
        (0.7, 0.2),
        covers=("explicit_score_matching", "implicit_score_matching", "sliced_score_matching"),
    ),
    "noisy_classification": Row(lambda w: bind(_network, w), _classification, (0.7,)),
    "denoising": Row(lambda w: bind(_network, w), _denoising, (0.7,)),
    "flow_matching": Row(
        lambda a, b: bind(_two, a, bind(_network, b)),
        _matching,
        (0.7, 0.2),
        covers=("conditional_flow_matching",),
    ),
    "uniform_times": Row(
        lambda *numbers: numbers,
        _times,
        (0.1, 0.8, -1.0, 1.1),
        covers=("stratified_times", "antithetic_times", "log_snr_times", "log_normal_times"),
    ),
    "ddim_kernel": Row(
        lambda a, b: _gaussian(a, b, schedules.linear_vp()),
        _kernels,
        (0.4, 0.7),
        (1.0,),
        (
            "ddpm_kernel",
            "euler_maruyama_kernel",
            "kernel_sampler",
            "log_transition",
            "sde_dpm_solver_kernel",
        ),
    ),
    "over_batch": Row(lambda w: bind(_network, w), _over_batch, (0.7,)),
    "brownian_bridge": Row(
        lambda a, b: (bind(_two, a, bind(_network, b)), bind(_network, a)),
        _bridge,
        (0.7, 0.2),
        OPEN,
        ("Bridge", "bridge_matching"),
    ),
    "variational_bound": Row(
        lambda high, low: schedules.monotone_vp(
            schedules.init_monotone(jax.random.key(0), 3), high, low
        ),
        _bound,
        (2.0, -1.5),
        covers=(
            *("monotone_vp", "init_monotone", "MonotoneNetwork"),
            *("gaussian_reconstruction", "discrete_reconstruction"),
        ),
    ),
    "maximum_likelihood": Row(
        lambda w: bind(_network, w),
        _maximum_likelihood,
        (0.7,),
        (1.0,),
        ("standard_normal", "FlowDensity"),
    ),
    "couplings": Row(
        lambda epsilon: epsilon,
        _coupled,
        (0.7,),
        covers=("Plan", "independent", "optimal", "entropic", "sinkhorn", "squared_distances"),
        reverse=False,
    ),
    "ddim": _sampler_row(samplers.ddim, covers=("sample", "State", "Sampler", "Estimate")),
    "ddim(eta)": _sampler_row(samplers.ddim, 0.4, covers=()),
    "ddpm": _sampler_row(samplers.ddpm, covers=()),
    "euler": _sampler_row(samplers.euler, covers=()),
    "heun": _sampler_row(samplers.heun, covers=()),
    "edm_sampler": _sampler_row(samplers.edm_sampler, covers=()),
    "edm_sampler(churn)": _sampler_row(samplers.edm_sampler, 0.2, 0.01, 50.0, 1.01, covers=()),
    "euler_maruyama": _sampler_row(samplers.euler_maruyama, covers=()),
    "cfg_plus_plus": Row(
        lambda a, b, w: samplers.cfg_plus_plus(*_pair(a, b), schedules.linear(), w, 0.5),
        _run,
        (0.4, -0.2, 0.6),
        (1.0,),
    ),
    "projected_with_momentum": Row(
        lambda a, b, w, beta: samplers.projected_with_momentum(
            samplers.dpm_solver_2m,
            *_pair(a, b),
            schedules.linear(),
            w,
            beta=beta,
            event_ndim=1,
        ),
        _run,
        (0.4, -0.2, 2.0, -0.5),
        (1.0,),
    ),
    "repaint": _sampler_row(_repainted, 0.3, covers=()),
    "twisted": Row(
        lambda a, y: (
            samplers.twisted(
                _gaussian(a, 0.7, schedules.linear()),
                schedules.linear(),
                guidance.tweedie_twist(
                    _gaussian(a, 0.7, schedules.linear()),
                    schedules.linear(),
                    _sum,
                    y * jnp.ones(2),
                    0.6,
                ),
                0.0,  # a particle drawn anew is a jump, which has no derivative
            ),
        ),
        _particles,
        (0.7, 0.3),
        (0.9,),
        (
            *("Particles", "effective_sample_size", "log_evidence", "resample", "final_state"),
            "tilted_cfg",
        ),
    ),
    "bridge_sampler": Row(
        lambda w, a: samplers.bridge_sampler(bind(_network, w), bind(_network, w), a),
        _run,
        (0.7, 0.4),
        (1.0,),
    ),
    "predictor_corrector": _sampler_row(
        lambda d, s, snr: samplers.predictor_corrector(d, s, snr=snr), 0.1, covers=()
    ),
    "adams": Row(
        _kinds(
            samplers.dpm_solver_3m,
            functools.partial(samplers.noise_adams, order=2),
            functools.partial(samplers.deis, order=2),
        ),
        _each,
        (),
        (1.0,),
        ("dpm_solver_2m", "dpm_solver_3m", "data_adams", "noise_adams", "deis"),
    ),
    "velocity_adams": Row(_kinds(_with_gains), _each, (0.9,), (1.0,)),
    "unipc": Row(_kinds(_bh1), _each, (), (1.0,), ("bh1", "bh2")),
    "sa_solver": Row(
        _kinds(lambda d, s, tau: samplers.sa_solver(d, s, 1, tau), samplers.sde_dpm_solver_2m),
        _each,
        (0.8,),
        (1.0,),
        ("sde_dpm_solver_2m",),
    ),
    "dpm_solver_2": Row(
        _kinds(samplers.dpm_solver_2, samplers.dpm_solver_2s, samplers.dpm_solver_3),
        _each,
        (0.4,),
        (1.0,),
        ("dpm_solver_2s", "dpm_solver_3"),
    ),
    "dpm_solver_fast": Row(lambda scale: scale, _fast, (0.7,), (1.0,)),
    "dpm_solver_adaptive": Row(
        lambda a, b: _gaussian(a, b, schedules.linear_vp()),
        _adaptive,
        (0.4, 0.7),
        (),
        ("DPM_SOLVER_12", "DPM_SOLVER_23", "EmbeddedPair", "AdaptiveSolution"),
        reverse=False,
    ),
    "cheapest_paths": Row(
        lambda a, b: _gaussian(a, b, schedules.linear_vp()),
        _tables,
        (0.4, 0.7),
        (1.0,),
        ("Budgets", "elbo_table", "klub_table", "solver_error_table"),
    ),
    "learn_grid": Row(
        lambda scale: scale,
        _learned,
        (0.7,),
        (1.0,),
        ("LearnedGrid", "fit_grid", "increments", "from_increments"),
    ),
    "one_step": Row(lambda a: samplers.one_step(bind(_shrink, a)), _run, (0.7,), (1.0,)),
    "trajectory": Row(functools.partial(_sampler, samplers.ddim), _trajectory, (0.4,), (1.0,)),
    "checkpointed_scan": Row(
        functools.partial(_sampler, samplers.ddim),
        functools.partial(_scanned, samplers.checkpointed_scan),
        (0.4,),
        (1.0,),
    ),
    "truncated_scan": Row(
        functools.partial(_sampler, samplers.ddim),
        functools.partial(_scanned, samplers.truncated_scan(9)),
        (0.4,),
        (1.0,),
    ),
    "solve_flow": Row(
        lambda a, b: _gaussian(a, b, schedules.linear()),
        _solve_flow,
        (0.4, 0.7),
        (1.0,),
        ("integrate",),
    ),
    "solve_sde": Row(
        lambda a, b: _gaussian(a, b, schedules.linear_vp()), _solve_sde, (0.4, 0.7), (1.0,)
    ),
    "log_likelihood": Row(
        lambda a, b: _gaussian(a, b, schedules.linear()),
        _log_likelihood,
        (0.4, 0.7),
        (),
        ("exact_probes", "rademacher_probes", "gaussian_probes"),
    ),
    "divergence": Row(lambda w: w, _divergence, (0.7,)),
    "bits_per_dim": Row(lambda w: w, _bits, (0.7,), covers=("dequantize", "quantize")),
    "variational_dequantize": Row(
        lambda scale: scale,
        _discrete,
        (0.7,),
        (1.0,),
        ("importance_weighted_bound", "standard_errors", "StandardErrors"),
    ),
    "bind": Row(lambda w: bind(_network, w), lambda f, x, t: f(x, t), (0.7,)),
}
EACH = pytest.mark.parametrize("name", ROWS)
DIFFERENTIABLE = pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if row.reverse]
)
MODULES = (
    "_bind",
    "couplings",
    *(name for name in diffjax.__all__ if inspect.ismodule(getattr(diffjax, name))),
)


@pytest.fixture(autouse=True)
def _rightful_reuse(request):
    """The key-reuse checker refuses diffrax's Brownian tree, and a checkpointed step that draws its
    noise again.
    """
    with jax.debug_key_reuse(
        not any(name in request.node.name for name in ("solve_sde", "checkpointed_scan"))
    ):
        yield


def test_every_public_name_has_a_row():
    covered = set(ROWS).union(*(row.covers for row in ROWS.values()))
    results = {"Coefficients", "Transition", "Posterior"}  # what functions return
    results |= {"load_grid", "save_grid"}  # files are not for transforms
    for module in MODULES:
        missing = set(importlib.import_module(f"diffjax.{module}").__all__) - covered - results
        assert not missing, f"{module}: {missing}"
    names = {name for name in diffjax.__all__ if not inspect.ismodule(getattr(diffjax, name))}
    assert not names - covered - results


def batch(row):
    """Objects of DEVICES different sets of numbers, as one object with a leading axis, and points
    and times for each.
    """
    random = np.random.default_rng(0)
    numbers = [jnp.asarray(n * random.uniform(0.9, 1.0, DEVICES)) for n in row.numbers]
    xs, ts = (
        jnp.asarray(random.normal(size=(DEVICES, 2))),
        jnp.asarray(random.uniform(0.55, 0.65, DEVICES)),
    )
    return numbers, xs, ts


# Diffrax's loops start from constants. Meshes with explicit axes and the checks of `shard_map`
# refuse those: https://github.com/patrick-kidger/diffrax/issues/735. With check_vma=False,
# `shard_map` works.
DIFFRAX = ("solve_flow", "solve_sde", "log_likelihood", "maximum_likelihood")


@contextlib.contextmanager
def compilations():
    """The list of the compilations in the context."""
    count = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            count.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def whole(row, numbers, x, t):
    return row.use(row.make(*numbers), x, t)


class Loop(NamedTuple):
    objects: list
    values: np.ndarray
    compilations: int  # of the last call, after three with other numbers


@functools.cache
def looped(name):
    """The reference, which the compiled programs are compared with: a call without jit for each
    point of the batch.
    """
    row = ROWS[name]
    numbers, xs, ts = batch(row)
    objects = [row.make(*(n[i] for n in numbers)) for i in range(DEVICES)]
    calls = list(zip(objects, xs, ts, strict=True))
    values = [row.use(*call) for call in calls[:-1]]
    with compilations() as count:
        values.append(row.use(*calls[-1]))
    return Loop(objects, np.stack(values), len(count))


@EACH
def test_a_second_call_without_jit_compiles_nothing(name):
    assert looped(name).compilations == 0 and np.isfinite(looped(name).values).all()


@EACH
def test_one_trace_serves_changing_numbers(name):
    row, count = ROWS[name], []

    @jax.jit
    def call(obj, x, t):
        count.append(1)
        return row.use(obj, x, t)

    _, xs, ts = batch(row)
    for arguments in zip(looped(name).objects, xs, ts, strict=True):
        out = jax.eval_shape(call, *arguments)  # the trace of a call, without its program
    assert len(count) == 1
    assert (out.shape, out.dtype) == (looped(name).values.shape[1:], looped(name).values.dtype)


@EACH
def test_vmap_in_shard_map_is_the_loop(name):
    row, values = ROWS[name], looped(name).values
    mesh, spec = Mesh(np.array(jax.devices()[: DEVICES // 2]), ("batch",)), PartitionSpec("batch")
    each = jax.vmap(functools.partial(whole, row))  # of two points on each device
    sharded = jax.jit(
        jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=name not in DIFFRAX)
    )
    np.testing.assert_allclose(sharded(*batch(row)), values, rtol=1e-9, atol=1e-11)


EXPLICIT = [name for name in ROWS if name not in DIFFRAX]


@pytest.mark.parametrize("name", EXPLICIT)
def test_vmap_on_a_mesh_with_explicit_axes(name):
    """What explicit axes refuse, they refuse in the trace; every fourth row is run, too."""
    row, values = ROWS[name], looped(name).values
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch(row), NamedSharding(mesh, PartitionSpec("batch")))
        call = jax.jit(jax.vmap(functools.partial(whole, row)))
        out = jax.eval_shape(call, *placed)
        assert (out.shape, out.dtype) == (values.shape, values.dtype)
        assert out.sharding.spec[0] == "batch"
        if EXPLICIT.index(name) % 4 == 0:
            np.testing.assert_allclose(call(*placed), values, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("part", range(4))
def test_pmap_is_the_loop(part):
    # one program for many rows: what pmap adds to vmap is the same for all
    names = list(ROWS)[part::4]
    inputs = {name: batch(ROWS[name]) for name in names}

    def call(inputs):
        return {name: whole(ROWS[name], *arguments) for name, arguments in inputs.items()}

    with jax.debug_key_reuse(False):  # see _rightful_reuse
        outputs = jax.pmap(call)(inputs)
        expected = {name: looped(name).values for name in names}
    for name in names:
        np.testing.assert_allclose(
            outputs[name], expected[name], rtol=1e-9, atol=1e-11, err_msg=name
        )


STEP = 1e-5


@functools.cache
def differentiated(name):
    """One program: values and gradients at a point, at one on each side of it, and at the ends of
    time.
    """
    row = ROWS[name]
    numbers, xs, ts = batch(row)
    flat, unravel = jax.flatten_util.ravel_pytree(([n[0] for n in numbers], xs[0], ts[0]))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=looped(name).values.shape[1:]))

    def scalar(flat):
        return jnp.sum(weights * whole(row, *unravel(flat)))

    direction = np.random.default_rng(2).normal(size=flat.shape) * np.maximum(np.abs(flat), 0.1)
    if name == "solve_sde":  # the Brownian path belongs to its interval: no derivative by the time
        direction[-1] = 0.0
    ends = [flat.at[-1].set(end) for end in row.ends]
    points = jnp.stack([flat, flat - STEP * direction, flat + STEP * direction, *ends])
    return direction, *jax.jit(jax.vmap(jax.value_and_grad(scalar)))(points)


@DIFFERENTIABLE
def test_gradients_are_finite_differences(name):
    # central differences: STEP^2 times a third derivative, and 1e-16 / STEP of rounding: 1e-6 of
    # values of order one
    direction, values, gradients = differentiated(name)
    np.testing.assert_allclose(
        gradients[0] @ direction, (values[2] - values[1]) / (2 * STEP), rtol=1e-5, atol=1e-6
    )


@DIFFERENTIABLE
def test_gradients_are_finite_at_the_ends(name):
    _, values, gradients = differentiated(name)
    assert np.isfinite(values).all()
    assert np.isfinite(gradients[:, :-1]).all(), gradients  # the last one is by the time


PICKLED = [name for name in ROWS if name not in ("truncated_scan",)]


@pytest.mark.parametrize("name", PICKLED)
def test_pickle_gives_the_object_back(name):
    obj = looped(name).objects[0]
    again = pickle.loads(pickle.dumps(obj))
    chex.assert_trees_all_equal(again, obj)


def test_a_batch_of_schedules_is_a_schedule():
    many = jax.vmap(schedules.linear_vp)(jnp.array([0.1, 0.2]), jnp.array([20.0, 10.0]))
    alphas, _ = jax.vmap(lambda schedule: schedule(0.5))(many)
    for alpha, betas in zip(alphas, ((0.1, 20.0), (0.2, 10.0)), strict=True):
        np.testing.assert_allclose(alpha, schedules.linear_vp(*betas)(0.5)[0], rtol=1e-14)
    assert isinstance(
        exact.gaussian(jnp.zeros(1), jnp.eye(1), schedules.linear())(jnp.ones(1), 0.5), Estimate
    )
