"""Parametrizations: a network that outputs its exact target gives the pair (x0, eps) back, on every
path, at every time.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffjax import bind, schedules
from diffjax.exact import gaussian
from diffjax.parametrizations import (
    EPS,
    SCORE,
    VELOCITY,
    X0,
    V,
    as_denoiser,
    at_timesteps,
    batched,
    edm_preconditioning,
    reschedule,
    score,
    target,
    velocity,
)
from diffjax.process import perturb

CLEAN, NOISE = np.array([0.7, -1.2]), np.array([0.4, 2.1])
KINDS = {
    "X0": X0,
    "EPS": EPS,
    "SCORE": SCORE,
    "V": V,
    "VELOCITY": VELOCITY,
    "edm": edm_preconditioning(0.5),
}
# Targets by hand, from (alpha, sigma, f, g^2) of the table
TARGETS = {
    "X0": lambda a, s, f, g2: CLEAN,
    "EPS": lambda a, s, f, g2: NOISE,
    "SCORE": lambda a, s, f, g2: -NOISE / s,  # (1.15)
    "V": lambda a, s, f, g2: a * NOISE - s * CLEAN,
    # (1.9), (1.11)
    "VELOCITY": lambda a, s, f, g2: f * (a * CLEAN + s * NOISE) + g2 / (2 * s) * NOISE,
}


def answer(out, x, t):
    return out


@pytest.mark.parametrize("path", oracles.TABLE)
def test_an_exact_target_gives_the_pair_back(path):
    schedule, ts = getattr(schedules, path)(), np.array([0.01, 0.3, 0.9])

    @jax.jit
    @jax.vmap
    def round_trips(t, outs):
        x = perturb(schedule, jnp.asarray(CLEAN), jnp.asarray(NOISE), t)
        pairs = {
            name: as_denoiser(bind(answer, out), schedule, KINDS[name])(x, t)
            for name, out in outs.items()
        }
        targets = {
            name: target(schedule, kind, jnp.asarray(CLEAN), jnp.asarray(NOISE), t)
            for name, kind in KINDS.items()
        }
        return (
            pairs,
            targets,
            as_denoiser(bind(answer, targets["edm"]), schedule, KINDS["edm"])(x, t),
        )

    exact = [[float(f(oracles.mp.mpf(t))) for f in oracles.TABLE[path][:4]] for t in ts]
    outs = {name: np.stack([f(*row) for row in exact]) for name, f in TARGETS.items()}
    pairs, targets, by_edm = round_trips(ts, outs)
    for name, out in outs.items():
        np.testing.assert_allclose(targets[name], out, rtol=1e-9, err_msg=name)
    # the condition number of the 2x2 system at these times is at most 1e4 (sigma_max / sigma_data):
    # 1e-9 of accuracy left
    for name, pair in {**pairs, "edm": by_edm}.items():
        np.testing.assert_allclose(pair.x0, [CLEAN] * 3, rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(pair.eps, [NOISE] * 3, rtol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("name", "path", "t"),
    [
        *(
            ("V", "gvp", 0.0),
            ("V", "gvp", 1.0),
            ("V", "linear_vp", 0.0),
            ("EPS", "linear", 0.0),
            ("X0", "linear", 1.0),
        ),
        *(("VELOCITY", path, t) for path in ("linear", "gvp") for t in (0.0, 1.0)),
        ("VELOCITY", "edm", 0.0),
    ],
)
def test_regular_parametrizations_are_exact_at_the_ends(name, path, t):
    schedule = getattr(schedules, path)()
    out = target(schedule, KINDS[name], jnp.asarray(CLEAN), jnp.asarray(NOISE), t)
    x = perturb(schedule, jnp.asarray(CLEAN), jnp.asarray(NOISE), t)
    pair = as_denoiser(bind(answer, out), schedule, KINDS[name])(x, t)
    np.testing.assert_allclose(pair.x0, CLEAN, rtol=1e-12)
    np.testing.assert_allclose(pair.eps, NOISE, rtol=1e-12)


def test_edm_preconditioning_is_karras():
    # D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), Table 1 of the paper, on the path where his
    # sigma is ours
    sigma, sd, x = 3.0, 0.5, np.array([1.0, -2.0])
    seen = []

    def network(x, t):
        seen.append((x, t))
        return jnp.sin(x)

    d = as_denoiser(network, schedules.edm(80.0), edm_preconditioning(sd))(
        jnp.asarray(x), sigma / 80
    )
    total = sigma**2 + sd**2
    c_skip, c_out, c_in, c_noise = (
        sd**2 / total,
        sigma * sd / np.sqrt(total),
        1 / np.sqrt(total),
        np.log(sigma) / 4,
    )
    np.testing.assert_allclose(seen[0][0], c_in * x, rtol=1e-12)
    np.testing.assert_allclose(seen[0][1], c_noise, rtol=1e-12)
    np.testing.assert_allclose(d.x0, c_skip * x + c_out * np.sin(c_in * x), rtol=1e-11)


@pytest.mark.parametrize("path", ["linear_vp", "linear", "edm"])
def test_edm_preconditioning_has_unit_variance(path):
    # with x0 of variance sd^2 and eps of variance 1, c_in x and the target: both are linear in the
    # pair, so exactly
    schedule, sd, t = getattr(schedules, path)(), 0.6, 0.4
    kind = edm_preconditioning(sd)
    one, zero = jnp.ones(1), jnp.zeros(1)
    a, b = (float(target(schedule, kind, *pair, t)[0]) for pair in ((one, zero), (zero, one)))
    np.testing.assert_allclose(a**2 * sd**2 + b**2, 1, rtol=1e-12)
    alpha, sigma = oracles.alpha_sigma(path, t)
    c_in, _ = kind.inputs(schedule, t)
    np.testing.assert_allclose(float(c_in) ** 2 * (alpha**2 * sd**2 + sigma**2), 1, rtol=1e-12)


M, S = np.array([0.7, -0.4]), np.array([0.3, 2.0])


@pytest.mark.parametrize("path", oracles.TABLE)
def test_score_and_velocity_of_a_gaussian(path):
    schedule, t, x = getattr(schedules, path)(), 0.6, np.array([0.9, -1.3])
    alpha, sigma = oracles.alpha_sigma(path, t)
    f, g2 = (float(oracles.TABLE[path][k](oracles.mp.mpf(t))) for k in (2, 3))
    denoise = gaussian(jnp.asarray(M), jnp.diag(jnp.asarray(S)), schedule)
    exact = oracles.gaussian_score(M, S, alpha, sigma, x)
    np.testing.assert_allclose(score(denoise, schedule, jnp.asarray(x), t), exact, rtol=1e-10)
    np.testing.assert_allclose(
        velocity(denoise, schedule, jnp.asarray(x), t), f * x - g2 / 2 * exact, rtol=1e-9
    )  # (1.10)


@pytest.mark.parametrize("path", ["linear", "edm", "cosine"])
def test_reschedule_is_an_identity_on_gaussians(path):
    trained, other = schedules.linear_vp(), getattr(schedules, path)()
    cov, x = jnp.array([[1.0, 0.3], [0.3, 0.5]]), jnp.array([0.9, -1.3])
    moved = reschedule(gaussian(jnp.asarray(M), cov, trained), trained, other)
    direct = gaussian(jnp.asarray(M), cov, other)
    ts = (
        jnp.array([0.01, 0.3, 0.8]) if path != "edm" else jnp.array([0.001, 0.01, 0.5])
    )  # within the log-SNRs of the other
    a, b = (jax.jit(jax.vmap(lambda t, d=d: d(x, t)))(ts) for d in (moved, direct))
    np.testing.assert_allclose(a.x0, b.x0, rtol=1e-8)
    np.testing.assert_allclose(a.eps, b.eps, rtol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_a_parametrization_is_an_argument(name):
    # it crosses jit as data, not as a static function
    call = jax.jit(
        lambda kind, x: as_denoiser(lambda x, t: jnp.tanh(x), schedules.linear(), kind)(x, 0.4)
    )
    expected = as_denoiser(lambda x, t: jnp.tanh(x), schedules.linear(), KINDS[name])(
        jnp.ones(2), 0.4
    )
    np.testing.assert_allclose(call(KINDS[name], jnp.ones(2)), expected, rtol=1e-14)


def test_a_network_of_batches_and_timesteps_of_a_ddpm_chain_is_the_exact_denoiser():
    # N(0.5, 0.3^2) data; eps(x, i) = sigma_i (x - m alpha_i) / var_i by the table of the chain, as
    # DDPM's code has it
    betas, mean, std = np.linspace(1e-3, 0.3, 20), 0.5, 0.3
    alphas_bar = jnp.asarray(np.cumprod(1 - betas))

    def network(xs, steps, cond):
        assert jnp.issubdtype(steps.dtype, jnp.integer) and xs.shape[0] == len(steps) == len(cond)
        alpha_bar = alphas_bar[steps][:, None]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (
            cond[:, None] * jnp.sqrt(1 - alpha_bar) * (xs - mean * jnp.sqrt(alpha_bar)) / variance
        )

    schedule = schedules.from_betas(jnp.asarray(betas))
    network = bind(at_timesteps(batched(network), 20), cond=1.0)
    denoise = as_denoiser(network, schedule, EPS)
    exact_denoise = gaussian(jnp.full(2, mean), std**2 * jnp.eye(2), schedule)
    xs, ts = jnp.array([[0.3, -1.0], [2.0, 0.1], [0.5, 0.7]]), jnp.array([1, 7, 20]) / 20
    chex.assert_trees_all_close(
        jax.vmap(denoise)(xs, ts), jax.vmap(exact_denoise)(xs, ts), rtol=1e-10, atol=1e-12
    )


def test_adapters_refuse_what_cannot_be():
    with pytest.raises(ValueError, match=r"n: expected at least 1 step, got 0"):
        at_timesteps(lambda x, i: x, 0)
    with pytest.raises(ValueError, match=r"network: it returned \(2,\) for x of shape \(1, 2\)"):
        batched(lambda xs, ts: xs[0])(jnp.ones(2), 0.5)
