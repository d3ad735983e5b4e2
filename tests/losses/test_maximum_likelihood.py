"""The maximum likelihood loss against linear fields, exact flows and finite differences."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
import scipy.stats

from diffjax import bind, exact, losses, schedules
from diffjax.divergence import exact_probes, rademacher_probes
from diffjax.likelihood import log_likelihood
from diffjax.parametrizations import velocity
from diffjax.process import log_prior

FIELD = np.array([[0.3, -0.8], [0.5, -0.4]])
OPTIONS = {"stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-9)}


def linear_field(x, t):
    return jnp.asarray(FIELD) @ x


def bent_field(field, x, t):
    return jnp.tanh(field @ x) * (1 + t)


def test_a_linear_field_in_closed_form():
    x0 = np.array([0.4, -1.1])
    flow = losses.maximum_likelihood(
        None,
        linear_field,
        x0,
        kinetic_weight=0.3,
        jacobian_weight=0.2,
        probes=exact_probes,
        **OPTIONS,
    )
    x1 = scipy.linalg.expm(FIELD) @ x0
    log_density = -0.5 * x1 @ x1 - np.log(2 * np.pi) + np.trace(FIELD)
    kinetic = scipy.integrate.quad(
        lambda t: np.sum((FIELD @ scipy.linalg.expm(t * FIELD) @ x0) ** 2), 0, 1
    )[0]
    jacobian = np.sum(FIELD**2)
    loss = -log_density + 0.3 * kinetic + 0.2 * jacobian
    # the solver's 1e-9, and room
    np.testing.assert_allclose(flow, (loss, log_density, kinetic, jacobian), rtol=1e-7)


def test_signs_estimate_trace_and_norm_without_bias():
    """Over all sign vectors the mean of z^T J z is the trace and that of |z^T J|^2 the squared
    norm.
    """
    x0 = jnp.array([0.4, -1.1])
    signs = jnp.asarray([[1.0, 1.0], [1.0, -1.0]])
    of = [
        losses.maximum_likelihood(None, linear_field, x0, probes=p)
        for p in (exact_probes, lambda key, x: signs)
    ]
    np.testing.assert_allclose(of[1], of[0], rtol=1e-10)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_it_is_the_likelihood_of_the_probability_flow(path):
    schedule = getattr(schedules, path)()
    denoise = exact.gaussian(jnp.array([0.7, -0.2]), jnp.diag(jnp.array([0.3, 1.5])), schedule)
    x0 = jnp.array([0.4, -1.1])
    flow = losses.maximum_likelihood(
        jax.random.key(2),
        bind(velocity, denoise, schedule),
        x0,
        log_prior=lambda x: log_prior(schedule, x),
        probes=rademacher_probes,
        **OPTIONS,
    )
    expected = log_likelihood(jax.random.key(2), denoise, schedule, x0, start=0.0, **OPTIONS)
    np.testing.assert_allclose(flow.log_density, expected, rtol=1e-7)


ADJOINTS = [
    diffrax.RecursiveCheckpointAdjoint(),
    diffrax.BacksolveAdjoint(),
    diffrax.DirectAdjoint(),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_gradients_of_every_adjoint_are_finite_differences(adjoint):
    x0 = jnp.array([0.4, -1.1])

    def loss(field, adjoint=adjoint):
        flow = losses.maximum_likelihood(
            jax.random.key(0),
            bind(bent_field, field),
            x0,
            kinetic_weight=0.3,
            jacobian_weight=0.2,
            probes=exact_probes,
            adjoint=adjoint,
            **OPTIONS,
        )
        return flow.loss

    direction = np.array([[0.2, -0.5], [0.7, 0.1]])
    if isinstance(adjoint, diffrax.DirectAdjoint):  # the one for forward mode
        slope = jax.jit(lambda field: jax.jvp(loss, (field,), (jnp.asarray(direction),))[1])(
            jnp.asarray(FIELD)
        )
    else:
        slope = jnp.sum(jax.jit(jax.grad(loss))(jnp.asarray(FIELD)) * direction)
    expected = oracles.central_difference(
        lambda h: loss(jnp.asarray(FIELD + h * direction)), 0.0, 1e-4
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-6)  # 1e-9 of the solves over 2e-4, and h^2


def test_refusals():
    with pytest.raises(ValueError, match=r"network: it returned \(1,\) for x of shape \(2,\)"):
        losses.maximum_likelihood(jax.random.key(0), lambda x, t: x[:1], jnp.ones(2))
    with pytest.raises(ValueError, match=r"probes: expected shape \(n, 2\), n >= 1, got \(3, 1\)"):
        losses.maximum_likelihood(
            None, linear_field, jnp.ones(2), probes=lambda key, x: jnp.ones((3, 1))
        )
    half = lambda x, t: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    assert (
        losses.maximum_likelihood(None, half, jnp.ones(2), probes=exact_probes).loss.dtype
        == jnp.float64
    )
    assert (
        losses.implicit_score_matching(half, jnp.ones(2), 0.5, jnp.ones((1, 2))).dtype
        == jnp.float64
    )
