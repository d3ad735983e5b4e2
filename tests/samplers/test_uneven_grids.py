"""Multistep samplers on every grid and schedule: never worse than their first-order form, and
nothing lost on good grids.

Data are mixtures on a line. There the probability flow keeps the order of points, so it maps the
quantile of x_t to the same quantile of x_s: a reference without an integrator. Errors are root mean
squares over the points of all mixtures.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.special import ndtr, ndtri

from diffjax import bind, grids, samplers, schedules
from diffjax.exact import gaussian, gaussian_mixture
from diffjax.samplers import (
    bh1,
    data_adams,
    ddim,
    deis,
    noise_adams,
    sa_solver,
    sample,
    unipc,
    velocity_adams,
)
from diffjax.samplers._interpolation import data_prediction
from diffjax.samplers._multistep import multistep

partial = functools.partial

DETERMINISTIC = {
    "dpm_solver_2m": samplers.dpm_solver_2m,
    "dpm_solver_3m": samplers.dpm_solver_3m,
    "unipc(1)": partial(unipc, order=1),
    "unipc(2)": partial(unipc, order=2),
    "unipc(3)": unipc,
    "unipc(2, bh1)": partial(unipc, order=2, b=bh1),
    "sa_solver(3, tau=0)": partial(sa_solver, tau=0.0),
    "data_adams(2)": partial(data_adams, order=2),
    "data_adams(3)": data_adams,
    "noise_adams(2)": partial(noise_adams, order=2),
    "noise_adams(3)": noise_adams,
    "velocity_adams(2)": partial(velocity_adams, order=2),
    "velocity_adams(3)": velocity_adams,
    "deis(2)": partial(deis, order=2),
    "deis(3)": deis,
}
STOCHASTIC = {
    "sde_dpm_solver_2m": samplers.sde_dpm_solver_2m,
    "sa_solver(1)": partial(sa_solver, order=1),
    "sa_solver(2)": partial(sa_solver, order=2),
    "sa_solver(3)": sa_solver,
}

# ---- every grid of every schedule ----------------------------------------------------------------

STEPS = (10, 15, 20)
PATHS = {
    "linear_vp": schedules.linear_vp,
    "sub_vp": schedules.sub_vp,
    "ve": schedules.ve,
    "edm": schedules.edm,
    "linear": schedules.linear,
    "gvp": schedules.gvp,
    "cosine": schedules.cosine,
    "from_betas": lambda: schedules.from_betas(jnp.linspace(1e-4, 0.02, 1000)),
    "monotone_vp": lambda: schedules.monotone_vp(network()),
}


@functools.cache
def network():
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, schedules.init_monotone(jax.random.key(0)))


@jax.jit
def any_path(which, t):
    """The path of that number. Jitted, it is traced once and not at each of its calls."""
    branches = [
        lambda t, make=make: jnp.stack(make()(t)).astype(t.dtype) for make in PATHS.values()
    ]
    return tuple(jax.lax.switch(which, branches, jnp.asarray(t)))


def grids_of(schedule, start, n):
    """All grids: to 0 and to 1e-3, from 1 and from where the log-SNR is finite."""
    found = {}
    for name, grid in (("uniform", grids.uniform), ("quadratic", grids.quadratic)):
        for first, last in ((1.0, 0.0), (1.0, 1e-3), (start, 1e-3)):
            found[f"{name}({first}, {last})"] = grid(n, first, last)
    found["uniform_log_snr"] = grids.uniform_log_snr(schedule, n, start)
    found["karras"] = grids.karras(schedule, n, start)
    return found


@functools.cache
def cases():
    """Names, numbers of the paths, and grids. A short one stands still at its beginning, which
    changes nothing.
    """
    names, which, times = [], [], []
    for number, (path, make) in enumerate(PATHS.items()):
        schedule = make()
        start = 0.999 if path in ("linear", "gvp", "cosine") else 1.0
        every = jax.jit(lambda schedule, start: [grids_of(schedule, start, n) for n in STEPS])(
            schedule, start
        )
        for n, found in zip(STEPS, every, strict=True):
            for name, ts in found.items():
                names.append(f"{path}, {name}, {n}")
                which.append(number)
                times.append(np.pad(np.asarray(ts), (max(STEPS) - n, 0), mode="edge"))
    return names, np.array(which), np.array(times)


@functools.cache
def ends():
    """alpha and sigma at the first and at the last time, of shape (2, cases)."""
    _, which, times = cases()
    pairs = jax.jit(jax.vmap(lambda which, t: jnp.stack(any_path(which, t))))
    return [np.asarray(pairs(which, times[:, i])).T for i in (0, -1)]


# ---- mixtures on a line --------------------------------------------------------------------------

# wide and narrow; one, two and three components. A component of weight 1e-9 stands for one that is
# missing.
WEIGHTS = np.array([[1, 0, 0], [1, 0, 0], [0.3, 0.7, 0], [0.5, 0.5, 0], [0.2, 0.5, 0.3]])
WEIGHTS = (WEIGHTS + 1e-9) / np.sum(WEIGHTS + 1e-9, 1, keepdims=True)
MEANS = np.array([[0, 0, 0], [0, 0, 0], [-1, 1.2, 0], [-1, 1, 0], [-1.5, 0.2, 1]])
VARIANCES = np.array(
    [[0.5, 0.5, 0.5], [0.1, 0.1, 0.1], [0.01, 0.09, 0.1], [0.05, 0.05, 0.1], [0.2, 0.05, 0.01]]
)
QUANTILES = ndtri((np.arange(32) + 0.5) / 32)


def distribution(alpha, sigma, x):
    """The share of x_t below x, of shape (cases, mixtures, points)."""
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    deviations = np.sqrt(alpha**2 * VARIANCES + sigma**2)
    means = alpha * MEANS
    return np.sum(
        WEIGHTS[:, None] * ndtr((x[..., None] - means[:, 0, :, None]) / deviations[:, 0, :, None]),
        -1,
    )


@functools.cache
def flow():
    """Draws of the prior, and where the flow takes them: to the same quantile, by bisection."""
    first, last = ends()
    x = first[1][:, None, None] * np.broadcast_to(QUANTILES, (len(WEIGHTS), len(QUANTILES)))
    shares = distribution(first[0], first[1], x)
    reach = 12 * (1.5 * last[0] + last[1])[:, None, None]
    low, high = -reach + 0 * x, reach + 0 * x
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = distribution(last[0], last[1], middle) < shares
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return x, 0.5 * (low + high)


@functools.cache
def errors(make):
    """The root mean square error of a method in every case."""

    def run(which, ts, x, weights, means, variances):
        schedule = bind(any_path, which)
        denoise = gaussian_mixture(weights, means[:, None], variances[:, None, None], schedule)
        return sample(jax.random.key(0), make(denoise, schedule), x[:, None], ts)[:, 0]

    each = jax.vmap(jax.vmap(run, (None, None, 0, 0, 0, 0)), (0, 0, 0, None, None, None))
    _, which, times = cases()
    x, exact = flow()
    with jax.debug_key_reuse(False):
        got = jax.jit(each)(which, times, x, WEIGHTS, MEANS, VARIANCES)
    return np.sqrt(np.mean((np.asarray(got) - exact) ** 2, (1, 2)))


def worse(new, first_order):
    """The cases in which a method is worse than its first-order form, by more than rounding where
    it is that form.
    """
    ratios = new / first_order
    return {
        name: ratio for name, ratio in zip(cases()[0], ratios, strict=True) if not ratio < 1.001
    }


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_no_multistep_sampler_is_worse_than_ddim(method):
    assert not worse(errors(DETERMINISTIC[method]), errors(ddim))


# ---- stochastic samplers: on Gaussians, where the last x is linear in the first one and in the
# noise

SPREADS = np.array([2.0, 0.5, 0.1, 0.05, 0.01])


def deviation_errors(monkeypatch, make):
    """The error of the standard deviation of the last x: its gradient by the first x and by all
    noise is all there is.
    """

    def last(x, zs, which, variance, ts):
        schedule = bind(any_path, which)
        sampler = make(gaussian(jnp.zeros(1), variance * jnp.eye(1), schedule), schedule)

        def body(state, step):
            z, t, s = step
            return sampler.step(z, state, t, s), None

        return jax.lax.scan(body, sampler.init(x, ts[0]), (zs, ts[:-1], ts[1:]))[0].x[0]

    def variance_of(which, ts, first, variance):
        scale, noise = jax.grad(last, (0, 1))(
            jnp.zeros(1), jnp.zeros(ts.size - 1), which, variance, ts
        )
        return scale[0] ** 2 * first + jnp.sum(noise**2)

    _, which, times = cases()
    first, exact = (np.square(a)[:, None] * SPREADS + np.square(s)[:, None] for a, s in ends())
    each = jax.vmap(jax.vmap(variance_of, (None, None, 0, 0)), (0, 0, 0, None))
    with monkeypatch.context() as patch:  # the noise in place of its key
        patch.setattr(
            jax.random, "normal", lambda z, shape, dtype=float: jnp.broadcast_to(z, shape)
        )
        got = jax.jit(each)(which, times, first, SPREADS)
    return np.sqrt(np.mean((np.sqrt(np.asarray(got)) - np.sqrt(exact)) ** 2, 1))


@pytest.mark.parametrize("method", STOCHASTIC)
def test_no_stochastic_multistep_sampler_is_worse_than_its_first_order_form(monkeypatch, method):
    def first_order(denoise, schedule):
        return multistep(denoise, schedule, data_prediction(tau=1.0), 1, 1.0)

    assert not worse(
        deviation_errors(monkeypatch, STOCHASTIC[method]),
        deviation_errors(monkeypatch, first_order),
    )


# ---- a grid that ruined the best samplers, and good ones, which lose nothing ---------------------


def variances_after(make, ts):
    """Data of variances 0.5 and 0.1 on linear_vp: the variances of the samples."""
    schedule = schedules.linear_vp()
    denoise = gaussian(jnp.zeros(2), jnp.diag(jnp.array([0.5, 0.1])), schedule)
    return np.square(jax.jit(sample)(jax.random.key(0), make(denoise, schedule), jnp.ones(2), ts))


@pytest.mark.parametrize("method", ["dpm_solver_2m", "dpm_solver_3m", "unipc(3)"])
def test_an_uneven_grid_does_not_ruin_a_gaussian(method):
    # without limits 0.672 and 0.167 (2M), 0.144 and 0.133 (3M), 0.140 and 0.130 (UniPC)
    got = np.abs(variances_after(DETERMINISTIC[method], grids.uniform(20, end=1e-3)) - [0.5, 0.1])
    assert np.all(got < np.abs(variances_after(ddim, grids.uniform(20, end=1e-3)) - [0.5, 0.1]))


def test_unipc_on_its_own_grid_keeps_its_accuracy():
    got = variances_after(unipc, grids.uniform_log_snr(schedules.linear_vp(), 20))
    np.testing.assert_allclose(got, [0.499, 0.102], atol=2e-3)  # these are three digits, rounded


# the variable u, the scale of x, and the derivative of x / scale by u, over the prediction
KINDS = {
    "x0": lambda alpha, sigma: (np.log(alpha / sigma), sigma, np.exp),
    "eps": lambda alpha, sigma: (np.log(alpha / sigma), alpha, lambda u: -np.exp(-u)),
    "velocity": lambda alpha, sigma: (sigma / (alpha + sigma), alpha + sigma, np.ones_like),
}
EVEN = ["linear_vp", "sub_vp", "ve", "edm", "linear", "gvp", "cosine"]
GOOD = {  # a method, its prediction, how many it sees, and a grid that is good on some paths
    "data_adams(2)": ("x0", 2, "uniform_log_snr", EVEN),
    "data_adams(3)": ("x0", 3, "uniform_log_snr", EVEN),
    "noise_adams(2)": ("eps", 2, "uniform_log_snr", EVEN),
    "noise_adams(3)": ("eps", 3, "uniform_log_snr", EVEN),
    "velocity_adams(2)": (
        "velocity",
        2,
        "quadratic(1.0, 0.001)",
        ["linear_vp", "sub_vp", "linear", "gvp"],
    ),
    "velocity_adams(3)": (
        "velocity",
        3,
        "quadratic(1.0, 0.001)",
        ["linear_vp", "sub_vp", "linear", "gvp"],
    ),
}
GAUSS = np.polynomial.legendre.leggauss(40)


def unlimited(kind, order, pairs, variance):
    """The Adams-Bashforth method with all of its nodes, on a Gaussian of that variance: x / scale
    grows by the integral.
    """
    us, scales, kernel = KINDS[kind](*pairs)
    x, predictions = 1.0, []
    for i in range(len(us) - 1):
        alpha, sigma = pairs[:, i]
        x0, eps = np.array([alpha * variance, sigma]) * x / (alpha**2 * variance + sigma**2)
        predictions.append({"x0": x0, "eps": eps, "velocity": eps - x0}[kind])
        nodes, values = us[max(0, i + 1 - order) : i + 1], predictions[-order:]
        u = us[i] + 0.5 * (1 + GAUSS[0]) * (us[i + 1] - us[i])
        polynomial = np.polynomial.polynomial.polyfit(nodes - us[i], values, len(nodes) - 1)
        integrand = kernel(u) * np.polynomial.polynomial.polyval(u - us[i], polynomial)
        x = scales[i + 1] * (
            x / scales[i] + 0.5 * (us[i + 1] - us[i]) * np.sum(GAUSS[1] * integrand)
        )
    return x


@pytest.mark.parametrize("method", GOOD)
def test_good_grids_lose_nothing(method):
    kind, order, grid, paths = GOOD[method]
    names, which, times = cases()
    chosen = [names.index(f"{path}, {grid}, {n}") for path in paths for n in (10, 20)]

    def run(which, ts):
        schedule = bind(any_path, which)
        denoise = gaussian(jnp.zeros(1), 0.5 * jnp.eye(1), schedule)
        return sample(jax.random.key(0), DETERMINISTIC[method](denoise, schedule), jnp.ones(1), ts)[
            0
        ]

    with jax.debug_key_reuse(False):
        got = jax.jit(jax.vmap(run))(which[chosen], times[chosen])
    for i, ours in zip(chosen, got, strict=True):
        pairs = np.array(
            [oracles.alpha_sigma(names[i].split(",")[0], t) for t in np.unique(times[i])[::-1]]
        ).T
        exact = oracles.gaussian_flow(0.0, 0.5, pairs[:, 0], pairs[:, -1], 1.0)
        assert abs(ours - exact) < 1.02 * abs(unlimited(kind, order, pairs, 0.5) - exact) + 1e-9, (
            names[i],
            ours,
            exact,
        )


# ---- no NaN inside -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "linear_vp"])
@pytest.mark.parametrize("method", DETERMINISTIC | STOCHASTIC)
def test_no_step_computes_nan(method, path):
    # eagerly, where every operation is checked: from t = 1, where alpha may be 0, to t = 0, where
    # sigma is 0
    make = (DETERMINISTIC | STOCHASTIC)[method]
    schedule = PATHS[path]()
    sampler = make(gaussian(jnp.zeros(1), jnp.eye(1), schedule), schedule)
    ts = np.linspace(1.0, 0.0, 5)
    with jax.debug_nans(True):
        state = sampler.init(jnp.ones(1), ts[0])
        for i in range(4):
            state = sampler.step(jax.random.key(i), state, ts[i], ts[i + 1])
    assert np.isfinite(state.x).all()
