"""The costs of a step from any candidate time to any later one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._calls import call_denoiser
from .._checks import as_float, check_that
from .._once import once
from ..process import Transition, transition
from ..schedules import coefficients, half_log_snr
from ..typing import Denoiser, Sampler, Schedule

__all__ = ["elbo_table", "klub_table", "solver_error_table"]


def elbo_table(
    key: PRNGKeyArray,
    denoise: Denoiser,
    schedule: Schedule,
    ts: Float[ArrayLike, " n"],
    x0: Float[ArrayLike, "batch *event"],
) -> Float[Array, "n n"]:
    """The terms of the evidence lower bound between any two times, in nats per example (1.58).

    If q and p have the same variance,

        L(t, s) = E KL(q(x_s | x_t, x_0) || p(x_s | x_t))
                = (e^(2 (lambda_s - lambda_t)) - 1) / 2 E |eps - eps_hat(x_t, t)|^2,

    so the whole table needs one mean squared error per time. If sigma = 0 at the last time, its
    column holds `-E log p(x_0 | x_t)` with `p = N(x0_hat, (sigma_t / alpha_t)^2 I)`, a Gaussian
    with the noise of the estimate.

    Args:
        key: a PRNG key, for the noise.
        denoise: the denoiser.
        schedule: its path.
        ts: the candidates, descending; alpha may be 0 at the first one, sigma at the last.
        x0: data examples.

    Returns:
        The table, infinite on and below the diagonal.

    Raises:
        ValueError: if ts is not a descending vector of at least 2 times in [0, 1], or concrete
            log-SNRs do not increase along it.

    Reference: Watson et al. 2021 (arXiv 2106.03802), section 3; Kingma et al. 2021 (VDM, arXiv
    2107.00630), eq. 13-14; (1.58).

    >>> schedule = linear_vp()
    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), schedule)
    >>> x0 = jax.random.normal(jax.random.key(0), (1000, 1))
    >>> elbo_table(jax.random.key(1), denoise, schedule, jnp.array([1.0, 0.5, 0.1]), x0).shape
    (3, 3)
    """
    ts, lambdas = _candidates(schedule, ts)
    return _upper(_elbo(key, denoise, schedule, ts, lambdas, x0))


@once
def _elbo(key, denoise, schedule, ts, lambdas, x0):
    dims = x0[0].size

    def mean_errors(key, t):
        alpha, sigma, *_ = coefficients(schedule, t)
        eps = jax.random.normal(key, x0.shape, x0.dtype)
        estimate = call_denoiser(denoise, alpha * x0 + sigma * eps, t)
        return [jnp.sum(error**2) / len(x0) for error in (eps - estimate.eps, x0 - estimate.x0)]

    keys = jax.random.split(key, len(ts) - 1)
    errors, data_errors = jax.lax.map(lambda inputs: mean_errors(*inputs), (keys, ts[:-1]))
    gains = lambdas[None, :] - lambdas[:-1, None]
    table = 0.5 * jnp.expm1(2 * jnp.where(jnp.isfinite(gains), gains, 0.0)) * errors[:, None]
    # the limit alpha_t -> 0 of the same formula
    from_nothing = 0.5 * jnp.exp(2 * lambdas)[None, :] * data_errors[:, None]
    table = jnp.where(jnp.isfinite(lambdas)[:-1, None], table, from_nothing)
    decoder = 0.5 * dims * jnp.log(2 * jnp.pi) - dims * lambdas[:-1] + 0.5 * errors
    return jnp.where(jnp.isfinite(lambdas)[None, :], table, decoder[:, None])


def klub_table(
    key: PRNGKeyArray,
    denoise: Denoiser,
    schedule: Schedule,
    ts: Float[ArrayLike, " n"],
    x0: Float[ArrayLike, "batch *event"],
) -> Float[Array, "n n"]:
    """The KL bound of each step of the discretised reverse SDE: the objective of Align Your Steps.

    `L(t, s) = 1/2 int_{SNR_t}^{SNR_s} E |x0_hat(x_u, u) - x0_hat(x_t, t)|^2 dSNR_u`, where x_u and
    x_t are on one forward path, is the cost of keeping the estimate of t until s. The integral is a
    sum over the candidates, so it is as fine as they are. One evaluation per candidate.

    Args:
        key: a PRNG key, for the forward paths.
        denoise: the denoiser.
        schedule: its path.
        ts: the candidates, descending; alpha > 0 and sigma > 0 at all of them.
        x0: data examples.

    Returns:
        The table, in nats per example, infinite on and below the diagonal.

    Raises:
        ValueError: as for `elbo_table`, or if a concrete log-SNR is infinite.

    Reference: Sabour et al. 2024 (Align Your Steps, arXiv 2404.14507), section 3: their KLUB, which
    they write in sigma / alpha.

    >>> schedule = linear_vp()
    >>> denoise = gaussian(jnp.zeros(1), jnp.eye(1), schedule)
    >>> x0 = jax.random.normal(jax.random.key(0), (1000, 1))
    >>> ts = uniform_log_snr(schedule, 10)
    >>> jax.jit(klub_table)(jax.random.key(1), denoise, schedule, ts, x0).shape
    (11, 11)
    """
    ts, lambdas = _candidates(schedule, ts)
    check_that(jnp.isfinite, "ts: expected times of finite log-SNR, got half log-SNRs {}", lambdas)
    return _upper(_klub(key, denoise, schedule, ts, lambdas, x0))


@once
def _klub(key, denoise, schedule, ts, lambdas, x0):
    def forward(x, inputs):  # from the data to the prior
        key, t, scale, std = inputs
        x = scale * x + std * jax.random.normal(key, x.shape, x.dtype)
        return x, call_denoiser(denoise, x, t).x0

    back = ts[::-1]
    first = Transition(*coefficients(schedule, back[0])[:2])
    later = jax.vmap(lambda s, t: transition(schedule, s, t))(back[:-1], back[1:])
    steps = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)
    _, estimates = jax.lax.scan(forward, x0, (jax.random.split(key, len(ts)), back, *steps))
    estimates = estimates[::-1].reshape(len(ts), len(x0), -1)
    squares = jax.lax.map(lambda a: jnp.sum((estimates - a[None]) ** 2, (1, 2)), estimates)
    distances = squares / len(x0)
    snr = jnp.exp(2 * lambdas)
    middle = 0.5 * (distances[:, 1:] + distances[:, :-1])
    later = jnp.arange(len(ts) - 1)[None, :] >= jnp.arange(len(ts))[:, None]
    parts = 0.5 * jnp.diff(snr)[None, :] * jnp.where(later, middle, 0.0)
    return jnp.concatenate([jnp.zeros((len(ts), 1)), jnp.cumsum(parts, 1)], 1)


def solver_error_table(
    sampler: Sampler,
    schedule: Schedule,
    ts: Float[ArrayLike, " n"],
    xs: Float[ArrayLike, "n batch *event"],
) -> Float[Array, "n n"]:
    """The error of one solver step between any two candidates, against an accurate trajectory.

    `L(t, s) = sqrt(mean |step(x_t; t -> s) - x_s|^2 / (alpha_s^2 + sigma_s^2))`. The step starts
    with an empty memory, so it is always the first step of a multistep method. Use the table of a
    singlestep method of the same order instead.

    Args:
        sampler: a deterministic sampler.
        schedule: its path.
        ts: the candidates, descending.
        xs: an accurate trajectory of a batch along the probability flow at these times, by
            `trajectory` on a fine grid or by `solve_flow` from one candidate to the next.

    Returns:
        The table, infinite on and below the diagonal. It takes one step per pair; if a step has one
        evaluation (DDIM), all s share it.

    Raises:
        ValueError: if ts is not a descending vector, or xs has another length than ts.

    Reference: Watson et al. 2021 (arXiv 2106.03802), whose dynamic program is used here on the
    local error of a solver.

    >>> schedule = linear_vp()
    >>> sampler = ddim(gaussian(jnp.zeros(1), jnp.eye(1), schedule), schedule)
    >>> ts = uniform_log_snr(schedule, 4)
    >>> xs = trajectory(jax.random.key(0), sampler, jnp.ones((3, 1)), ts)
    >>> solver_error_table(sampler, schedule, ts, xs)[0, 1]  # the same step made xs
    Array(0., dtype=float32)
    """
    ts, _ = _candidates(schedule, ts)
    n = jnp.shape(xs)[0]
    if n != len(ts):
        raise ValueError(f"xs: expected one batch for each of the {len(ts)} times, got {n}")
    return _upper(_solver_errors(sampler, schedule, ts, xs))


@once
def _solver_errors(sampler, schedule, ts, xs):
    alphas, sigmas, *_ = jax.vmap(lambda t: coefficients(schedule, t))(ts)
    scales = jnp.hypot(alphas, sigmas)

    def from_one(inputs):
        t, x = inputs

        def error(s, goal, scale):
            reached = sampler.step(jax.random.key(0), sampler.init(x, t), t, jnp.minimum(s, t)).x
            return jnp.sqrt(jnp.mean((reached - goal) ** 2)) / scale

        return jax.vmap(error)(ts, xs, scales)

    return jax.lax.map(from_one, (ts, xs))


def _candidates(schedule, ts):
    ts = as_float(ts, "ts")
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(
            f"ts: expected a vector of at least 2 candidate times, got shape {ts.shape}"
        )
    check_that(lambda ts: (ts >= 0) & (ts <= 1), "ts: expected times in [0, 1], got {}", ts)
    check_that(lambda ts: ts[1:] < ts[:-1], "ts: expected times that descend, got {}", ts)
    lambdas = jax.vmap(lambda t: half_log_snr(schedule, t))(ts)
    message = "schedule: expected a log-SNR that increases along ts, got half log-SNRs {}"
    check_that(lambda v: v[1:] > v[:-1], message, lambdas)
    return ts, lambdas


def _upper(table):
    """Makes the table infinite on and below the diagonal, and adds the last row if it has none."""
    check_that(
        lambda table: ~np.isnan(table),
        "denoise: expected no NaN at any time of ts, got some. A network that predicts the noise "
        "does not define x0 where alpha = 0: start the candidates at a smaller t, as "
        "uniform(20, start=0.999) does",
        table,
    )
    n = table.shape[1]
    table = jnp.concatenate([table, jnp.full((n - len(table), n), jnp.inf, table.dtype)])
    return jnp.where(jnp.arange(n)[:, None] < jnp.arange(n)[None, :], table, jnp.inf)
