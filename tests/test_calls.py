"""What a denoiser or a network returns is checked wherever one is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import (
    bind,
    dynamics,
    exact,
    guidance,
    likelihood,
    losses,
    optimal_grids,
    parametrizations,
    samplers,
    solve,
)
from diffjax.grids import uniform
from diffjax.parametrizations import EPS, as_denoiser
from diffjax.schedules import linear, linear_vp
from diffjax.typing import Estimate

# the errors are the library's own
pytestmark = pytest.mark.usefixtures("without_type_checks")
KEY, X, PROBES = jax.random.key(0), np.ones(2), np.ones((1, 2))
VP, LINEAR = linear_vp(), linear()


def fit(denoise, schedule=VP):
    return exact.gaussian(jnp.zeros(2), jnp.eye(2), schedule)


def run(make):
    return lambda denoise: samplers.sample(KEY, make(denoise), X, uniform(4, end=0.1))


MAKERS = (
    "ddim ddpm euler heun edm_sampler euler_maruyama dpm_solver_2 dpm_solver_2s "
    "dpm_solver_3 dpm_solver_2m "
)
MAKERS += (
    "dpm_solver_3m sde_dpm_solver_2m sa_solver unipc deis data_adams noise_adams velocity_adams"
)
TAKES_A_DENOISER = {
    **{name: run(lambda d, name=name: getattr(samplers, name)(d, VP)) for name in MAKERS.split()},
    "ddim, eta": run(lambda d: samplers.ddim(d, VP, 0.5)),
    "edm_sampler, churn": run(lambda d: samplers.edm_sampler(d, VP, 0.5)),
    "predictor_corrector": run(lambda d: samplers.predictor_corrector(d, VP)),
    "dpm_solver_fast": lambda d: solve.dpm_solver_fast(d, VP, X, 4),
    "dpm_solver_adaptive": lambda d: solve.dpm_solver_adaptive(d, VP, X),
    "clip_x0": lambda d: guidance.clip_x0(d, VP)(X, 0.5),
    "reschedule": lambda d: parametrizations.reschedule(d, VP, LINEAR)(X, 0.5),
    "score": lambda d: parametrizations.score(d, VP, X, 0.5),
    "velocity": lambda d: parametrizations.velocity(d, VP, X, 0.5),
    "probability_flow": lambda d: dynamics.probability_flow(d, VP)(0.5, X, None),
    "reverse_sde": lambda d: dynamics.reverse_sde(d, VP).drift(0.5, X, None),
    "solve_flow": lambda d: solve.solve_flow(d, VP, X, 1.0, 0.1),
    "solve_sde": lambda d: solve.solve_sde(KEY, d, VP, X, 1.0, 0.1),
    "log_likelihood": lambda d: likelihood.log_likelihood(KEY, d, VP, X),
    "variational_bound": lambda d: losses.variational_bound(KEY, d, VP, X, 0.5),
    "elbo_table": lambda d: optimal_grids.elbo_table(KEY, d, VP, uniform(3, end=0.1), X[None]),
    "klub_table": lambda d: optimal_grids.klub_table(KEY, d, VP, uniform(3, end=0.1), X[None]),
}


@pytest.mark.parametrize("name", TAKES_A_DENOISER)
def test_a_network_in_place_of_a_denoiser_is_an_error(name):
    # x of shape (2,): an array of two numbers would unpack into an estimate of x0 and one of eps
    with pytest.raises(
        ValueError, match=r"(?s)^denoise: expected a denoiser.*got an array of shape .*as_denoiser"
    ):
        jax.eval_shape(lambda: TAKES_A_DENOISER[name](lambda x, t: -x))


def test_guidance_names_which_of_its_denoisers_is_none():
    for name, pair in {
        "conditional": (jnp.sin, fit(None)),
        "unconditional": (fit(None), jnp.sin),
    }.items():
        pair = [(lambda x, t: jnp.sin(x)) if f is jnp.sin else f for f in pair]
        with pytest.raises(ValueError, match=rf"^{name}: expected a denoiser"):
            guidance.cfg(*pair, 2.0)(X, 0.5)


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (lambda x: (x, x), r"got tuple\(an array of shape \(2,\), an array of shape \(2,\)\)"),
        (
            lambda x: Estimate(x, x[:1]),
            r"got Estimate\(an array of shape \(2,\), an array of shape \(1,\)\)",
        ),
        (lambda x: Estimate(x, None), r"got Estimate\(an array of shape \(2,\), NoneType\)"),
        (lambda x: None, "got NoneType"),
    ],
)
def test_an_estimate_is_two_arrays_of_the_shape_of_x(estimate, shown):
    with pytest.raises(ValueError, match=shown):
        parametrizations.velocity(lambda x, t: estimate(x), VP, X, 0.5)


TAKES_A_NETWORK = {
    "as_denoiser": lambda n: as_denoiser(n, VP, EPS)(X, 0.5),
    "denoising": lambda n: losses.denoising(KEY, n, VP, EPS, X, 0.5),
    "flow_matching": lambda n: losses.flow_matching(n, lambda x, t: x, X, 0.5),
    "conditional_flow_matching": lambda n: losses.conditional_flow_matching(n, X, X, 0.5),
    "bridge_matching, velocity": lambda n: losses.bridge_matching(
        KEY, n, lambda x, t: x, X, X, 0.5, 1.0
    ),
    "bridge_matching, score": lambda n: losses.bridge_matching(
        KEY, lambda x, t: x, n, X, X, 0.5, 1.0
    ),
    "explicit_score_matching": lambda n: losses.explicit_score_matching(n, lambda x, t: x, X, 0.5),
    "implicit_score_matching": lambda n: losses.implicit_score_matching(n, X, 0.5, PROBES),
    "sliced_score_matching": lambda n: losses.sliced_score_matching(n, X, 0.5, PROBES),
    "maximum_likelihood": lambda n: losses.maximum_likelihood(KEY, n, X),
    "bridge_sampler, velocity": run(lambda n: samplers.bridge_sampler(n, lambda x, t: x, 1.0)),
    "bridge_sampler, score": run(lambda n: samplers.bridge_sampler(lambda x, t: x, n, 1.0)),
}


@pytest.mark.parametrize("name", TAKES_A_NETWORK)
def test_a_network_that_returns_more_than_an_array_is_an_error(name):
    kind = name.partition(", ")[2] if name.startswith("bridge_sampler") else "network"
    message = (
        rf"(?s)^{kind}: expected.*got tuple\(an array of shape \(2,\), dict\).*returns "
        rf"the array alone"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: TAKES_A_NETWORK[name](lambda x, t: (x, {})))
    with pytest.raises(ValueError, match=rf"^{kind}: it returned \(1,\) for x of shape \(2,\)"):
        jax.eval_shape(lambda: TAKES_A_NETWORK[name](lambda x, t: x[:1]))


def test_a_right_denoiser_passes_in_any_disguise():
    # bound, guided, clipped, moved to another path: the result of each is an Estimate again
    denoise = as_denoiser(bind(lambda w, x, t: w * x, 0.5), VP, EPS)
    disguised = parametrizations.reschedule(
        guidance.clip_x0(guidance.cfg(denoise, denoise, 2.0), VP), VP, LINEAR
    )
    assert np.isfinite(
        samplers.sample(KEY, samplers.ddim(disguised, LINEAR), X, uniform(4, 0.9, 0.1))
    ).all()
