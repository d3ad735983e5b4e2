"""The compiled program of every method: the network once, noise only where it is drawn, and no
branch in a step.

`METHODS` must name all of `samplers` and `solve`, so that a new method cannot be forgotten.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from diffjax import bind, guidance, samplers, solve
from diffjax.parametrizations import X0, as_denoiser
from diffjax.samplers import sample
from diffjax.schedules import linear

SCHEDULE = linear()
START, END = 0.9, 0.1


def network(w, x, t, cond=1.0):
    """The only program here that has a Fourier transform, which no compiler copies, fuses or
    splits.
    """
    return cond * jnp.fft.fft(w * x).real


def denoiser(w):
    return as_denoiser(bind(network, w), SCHEDULE, X0)


def conditional(w, x, t, cond):
    return as_denoiser(bind(network, w, cond=cond), SCHEDULE, X0)(x, t)


def run(make, **settings):
    def program(key, w, x):
        return sample(key, make(denoiser(w), SCHEDULE, **settings), x, np.linspace(START, END, 21))

    return program


def to_the_end(solver, *args, draws=False):
    def program(key, w, x):
        result = solver(*[key] * draws, denoiser(w), SCHEDULE, x, *args)
        return getattr(result, "x", result)

    return program


def kernel(make):
    return run(lambda denoise, schedule: samplers.kernel_sampler(make(denoise, schedule)))


def bridge(key, w, x):
    sampler = samplers.bridge_sampler(bind(network, w), lambda x, t: -x, 0.5)
    return sample(key, sampler, x, np.linspace(START, END, 21))


def guided(make, **settings):
    def program(key, w, x):
        conditions = (bind(conditional, w, cond=cond) for cond in (1.0, 0.0))
        sampler = make(*conditions, SCHEDULE, **settings)
        return sample(key, sampler, x, np.linspace(START, END, 21))

    return program


def particles(make):
    def program(key, w, x):
        return sample(key, make(w), x[:, None], np.linspace(START, END, 21)).ravel()

    return program


def momentum(*conditions, **settings):
    return samplers.projected_with_momentum(samplers.dpm_solver_2m, *conditions, **settings)


def repainted(denoise, schedule):
    return samplers.repaint(samplers.ddim(denoise, schedule), schedule, 1.0, jnp.ones(2), 3)


# A row: the program, and how often it draws noise in a step. A draw in a loop within the step
# counts once.
METHODS = {
    "bridge_sampler": (bridge, 1),
    "cfg_plus_plus": (guided(samplers.cfg_plus_plus), 0),
    "data_adams": (run(samplers.data_adams), 0),
    "ddim": (run(samplers.ddim), 0),
    "ddim(eta)": (run(samplers.ddim, eta=0.5), 1),
    "ddim_kernel": (kernel(samplers.ddim_kernel), 1),
    "ddpm": (run(samplers.ddpm), 1),
    "ddpm_kernel": (kernel(samplers.ddpm_kernel), 1),
    "deis": (run(samplers.deis), 0),
    "dpm_solver_2": (run(samplers.dpm_solver_2), 0),
    "dpm_solver_2m": (run(samplers.dpm_solver_2m), 0),
    "dpm_solver_2s": (run(samplers.dpm_solver_2s), 0),
    "dpm_solver_3": (run(samplers.dpm_solver_3), 0),
    "dpm_solver_3m": (run(samplers.dpm_solver_3m), 0),
    "edm_sampler": (run(samplers.edm_sampler), 0),
    "edm_sampler(churn)": (run(samplers.edm_sampler, churn=0.2), 1),
    "euler": (run(samplers.euler), 0),
    "euler_maruyama": (run(samplers.euler_maruyama), 1),
    "euler_maruyama_kernel": (kernel(samplers.euler_maruyama_kernel), 1),
    "heun": (run(samplers.heun), 0),
    "noise_adams": (run(samplers.noise_adams), 0),
    "predictor_corrector": (run(samplers.predictor_corrector), 1),
    "predictor_corrector(corrections)": (run(samplers.predictor_corrector, corrections=3), 1),
    "projected_with_momentum": (guided(momentum, scale=2.0, event_ndim=1), 0),
    "repaint": (run(repainted), 1),
    "sa_solver": (run(samplers.sa_solver), 1),
    "sde_dpm_solver_2m": (run(samplers.sde_dpm_solver_2m), 1),
    "sde_dpm_solver_kernel": (kernel(samplers.sde_dpm_solver_kernel), 1),
    # drawing particles anew takes one number more
    "tilted_cfg": (
        particles(
            lambda w: samplers.tilted_cfg(
                *(bind(conditional, w, cond=cond) for cond in (1.0, 0.0)), SCHEDULE, 2.0
            )
        ),
        2,
    ),
    "twisted": (
        particles(lambda w: samplers.twisted(denoiser(w), SCHEDULE, lambda x, t: -(x**2).sum())),
        2,
    ),
    "unipc": (run(samplers.unipc), 0),
    "velocity_adams": (run(samplers.velocity_adams), 0),
    "dpm_solver_fast": (to_the_end(solve.dpm_solver_fast, 9, START, END), 0),
    "dpm_solver_adaptive": (to_the_end(solve.dpm_solver_adaptive, START, END), 0),
    "solve_flow": (to_the_end(solve.solve_flow, START, END), 0),
    # diffrax draws, in a tree of its own
    "solve_sde": (to_the_end(solve.solve_sde, START, END, draws=True), None),
}
OF_DIFFRAX = {"solve_flow", "solve_sde"}
# What the modules hold besides: engines, rules and results.
OTHERS = {
    *(
        "bh1",
        "bh2",
        "checkpointed_scan",
        "effective_sample_size",
        "final_state",
        "log_evidence",
        "Particles",
        "resample",
        "kernel_sampler",
        "log_transition",
        "one_step",
        "sample",
        "trajectory",
    ),
    *(
        "truncated_scan",
        "AdaptiveSolution",
        "DPM_SOLVER_12",
        "DPM_SOLVER_23",
        "EmbeddedPair",
        "integrate",
    ),
}


def test_the_table_names_every_method():
    assert {name.partition("(")[0] for name in METHODS} == {
        *samplers.__all__,
        *solve.__all__,
    } - OTHERS


def networks_in(compiled):
    return compiled.as_text().count(" fft(")


def trace(program):
    return jax.jit(program).trace(jax.random.key(0), jnp.ones(()), jnp.ones(2))


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_method_holds_the_network_once_and_draws_only_its_noise(name):
    program, draws = METHODS[name]
    # diffrax's Brownian tree splits one key in two ways
    with jax.debug_key_reuse(name != "solve_sde"):
        traced = trace(program)
        compiled = traced.lower().compile()
    assert networks_in(compiled) == 1
    jaxpr = str(traced.jaxpr)
    if draws is not None:
        assert jaxpr.count("random_bits") == draws
        # of an unused key nothing is left, nor of its fold_in
        assert (" xor(" in compiled.as_text()) == (draws > 0)
    if name not in {*OF_DIFFRAX, "dpm_solver_adaptive"}:  # they raise errors from a branch
        assert " cond[" not in jaxpr  # under vmap one would run both sides


def test_guidance_by_one_conditional_network_holds_it_once_and_by_two_networks_twice():
    def together(key, w, x):
        conditions = (bind(conditional, w, cond=cond) for cond in (1.0, 0.0))
        sampler = samplers.ddim(guidance.cfg(*conditions, 2.0), SCHEDULE)
        return sample(key, sampler, x, np.linspace(START, END, 21))

    def apart(key, w, x):
        sampler = samplers.ddim(guidance.cfg(denoiser(w), denoiser(0.5 * w), 2.0), SCHEDULE)
        return sample(key, sampler, x, np.linspace(START, END, 21))

    assert [networks_in(trace(program).lower().compile()) for program in (together, apart)] == [
        1,
        2,
    ]


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in OF_DIFFRAX]
)  # which start their loops from constants
def test_a_network_that_varies_over_a_mesh_takes_an_x_that_does_not(name):
    mesh, each = jax.make_mesh((4,), ("w",), axis_types=(AxisType.Auto,)), PartitionSpec("w")
    program = partial(METHODS[name][0], jax.random.key(0))
    mapped = jax.shard_map(
        lambda w, x: program(w[0], x), mesh=mesh, in_specs=(each, PartitionSpec()), out_specs=each
    )
    assert jax.eval_shape(mapped, jnp.ones(4), jnp.ones(2)).shape == (8,)
