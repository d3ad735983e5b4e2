# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # diffjax in a minute
#
# A diffusion model is a denoiser and a path. Here the denoisers are in closed form, so nothing is trained, and
# whatever goes wrong is the method's doing and not a network's.
#
# **Conventions**, which hold everywhere in the library:
#
# - Time runs from the data at `t = 0` to the prior at `t = 1`. A sampler goes from 1 to 0, along *descending*
#   times.
# - A path is $x_t = \alpha(t)\,x_0 + \sigma(t)\,\varepsilon$, $\varepsilon \sim N(0, I)$. A **schedule** is any
#   function `t -> (alpha, sigma)`.
# - A **denoiser** is any function `(x, t) -> (x0, eps)`: the two posterior means $E[x_0 \mid x_t = x]$ and
#   $E[\varepsilon \mid x_t = x]$.
# - A guidance **scale** of 0 is unconditional, 1 is conditional, more is guided.
# - What a constructor returns is a function *and* a pytree: it goes through `jit`, `vmap` and `grad` as an
#   argument. You call `jax.jit`; the library never does.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import diffjax as dj
from diffjax import exact
from diffjax.divergence import exact_probes

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## Paths
#
# The right panel shows $\lambda = \log(\alpha / \sigma)$, half the log signal-to-noise ratio. At equal $\lambda$
# all paths show the same picture up to a factor: they differ in how fast they go through it.

# %%
schedules = {
    "linear_vp": dj.linear_vp(),
    "cosine": dj.cosine(),
    "linear": dj.linear(),
    "edm": dj.edm(80.0),
}
t = jnp.linspace(1e-3, 1 - 1e-3, 200)


@jax.jit
def curves(schedule, t):
    alpha, sigma = jax.vmap(schedule)(t)
    return alpha, sigma, jax.vmap(lambda t: dj.half_log_snr(schedule, t))(t)


fig, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for name, schedule in schedules.items():
    for ax, values in zip(axes, curves(schedule, t), strict=True):
        ax.plot(t, values, label=name)
axes[0].set(title=r"signal $\alpha(t)$", xlabel="t  (0 = data, 1 = prior)")
axes[1].set(title=r"noise $\sigma(t)$  (edm: up to 80)", xlabel="t", ylim=(0, 1.05))
axes[2].set(title=r"half log-SNR $\lambda(t)$", xlabel="t", ylim=(-7, 7))
axes[2].legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Sampling
#
# Data: six Gaussians on a ring. `sample` is a scan of a sampler's step over a grid of times, `trajectory` also
# keeps what is on the way.

# %%
angles = 2 * jnp.pi * jnp.arange(6) / 6
means = 1.5 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
covs = jnp.broadcast_to(0.03 * jnp.eye(2), (6, 2, 2))
weights = jnp.ones(6) / 6

schedule = dj.linear()
denoise = exact.gaussian_mixture(weights, means, covs, schedule)
x1 = dj.sample_prior(jax.random.key(0), schedule, (1000, 2))
ts = dj.uniform(40)

path = jax.jit(dj.trajectory)(jax.random.key(1), dj.heun(denoise, schedule), x1, ts)

fig, axes = plt.subplots(1, 4, figsize=(11, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, i in zip(axes, (0, 20, 30, 40), strict=True):
    ax.plot(*path[: i + 1, :30].T.swapaxes(1, 2), color="0.4", lw=0.6)
    ax.scatter(*path[i].T, s=3, color="C0", alpha=0.5)
    ax.set(title=f"t = {float(ts[i]):.2f}", xlabel="$x$", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
axes[0].set_ylabel("$y$")
plt.show()

# %% [markdown]
# The lines are the paths of 30 of the samples: Heun's method solves an ODE, the *probability flow*, so the
# same noise always ends at the same sample. `dj.ddpm`, `dj.ddim(..., eta=1.0)` and `dj.euler_maruyama` draw fresh
# noise at each step.
#
# ## Likelihood
#
# The same ODE, from the data to the prior, gives the density of any point: the prior's, plus the integrated
# divergence of the velocity. In two dimensions the divergence can be exact (`exact_probes`); in many, leave the
# default, random probes.

# %%
side = jnp.linspace(-2.5, 2.5, 50)
points = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)


@jax.jit
def log_density(x):
    return jax.vmap(lambda x: dj.log_likelihood(jax.random.key(0), denoise, schedule, x, probes=exact_probes))(x)


@jax.jit
def true_log_density(x):
    components = jax.vmap(lambda mean, cov: jax.scipy.stats.multivariate_normal.logpdf(x, mean, cov))(means, covs)
    return jax.scipy.special.logsumexp(components + jnp.log(weights)[:, None], axis=0)


ours, truth = log_density(points), true_log_density(points)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
for ax, values, title in ((axes[0], ours, "log_likelihood"), (axes[1], truth, "closed form")):
    image = ax.imshow(jnp.exp(values).reshape(50, 50), origin="lower", extent=(-2.5, 2.5, -2.5, 2.5), cmap="magma")
    ax.set(title=f"density by {title}", xlabel="$x$", ylabel="$y$")
    fig.colorbar(image, ax=ax, label="density")
plt.show()

near = truth > -10
print(f"largest error of the log density, where it is above -10 nats: {jnp.abs(ours - truth)[near].max():.1e} nats")

# %% [markdown]
# ## Guidance, swept in one program
#
# Let the two modes on the right be one class. `cfg` makes a denoiser of two denoisers and a scale; as the scale is
# just a number in a pytree, `vmap` sweeps it: five sets of samples, compiled once.

# %%
label = jnp.array([0, 1])
conditional = exact.gaussian_mixture(jnp.ones(2) / 2, means[label], covs[label], schedule)
scales = jnp.array([0.0, 0.5, 1.0, 2.0, 4.0])


@jax.jit
def sweep(scales):
    def samples(scale):
        guided = dj.cfg(conditional, denoise, scale)
        return dj.sample(jax.random.key(2), dj.ddim(guided, schedule), x1[:400], ts)

    return jax.vmap(samples)(scales)


fig, axes = plt.subplots(1, 5, figsize=(11, 2.7), sharex=True, sharey=True, layout="constrained")
for ax, scale, x0 in zip(axes, scales, sweep(scales), strict=True):
    ax.scatter(*x0.T, s=3, color="C0")
    ax.scatter(*means.T, s=50, marker="+", color="0.5", label="all modes")
    ax.scatter(*means[label].T, s=50, marker="+", color="C3", label="the class")
    ax.set(title=f"scale {scale:g}", xlabel="$x$", aspect="equal", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
axes[0].set_ylabel("$y$")
axes[0].legend(fontsize=7, loc="lower left", ncols=2, columnspacing=0.5, handletextpad=0.1)
plt.show()

# %% [markdown]
# At scale 1 the samples are those of the class. Beyond, they move away from the *other* modes, past the class
# itself: guidance sharpens, and it distorts.
#
# ## A gradient through the sampler
#
# With six steps it matters where they are. The error against a fine solution from the same noise is a
# differentiable function of the six times, so let us learn them: the times are a softmax, hence always descending,
# and Adam does the rest. (On `linear_vp`, where a good grid is far from uniform.)

# %%
schedule = dj.linear_vp()
denoise = exact.gaussian_mixture(weights, means, covs, schedule)
steps, end = 6, 1e-3
reference = jax.jit(dj.sample)(
    jax.random.key(3), dj.heun(denoise, schedule), x1, dj.uniform_log_snr(schedule, 200, end=end)
)


def grid(logits):
    return jnp.append(1.0 - (1.0 - end) * jnp.append(0.0, jnp.cumsum(jax.nn.softmax(logits))[:-1]), end)


@jax.jit
def error(ts, noise, reference):
    x0 = dj.sample(jax.random.key(3), dj.ddim(denoise, schedule), noise, ts)
    return jnp.sqrt(jnp.mean((x0 - reference) ** 2))


optimizer = optax.adam(0.03)


@jax.jit
def learn(logits):
    def step(carry, _):
        logits, state = carry
        value, gradient = jax.value_and_grad(lambda w: error(grid(w), x1[:500], reference[:500]))(logits)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(logits, updates), state), value

    (logits, _), values = jax.lax.scan(step, (logits, optimizer.init(logits)), length=150)
    return logits, values


logits, values = learn(jnp.zeros(steps))
grids = {"uniform": dj.uniform(steps, end=end), "log-SNR": dj.uniform_log_snr(schedule, steps, end=end)}
grids["learned"] = grid(logits)

fig, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
axes[0].plot(values)
axes[0].set(title="learning the grid", xlabel="step of Adam", ylabel="RMS error of the samples", ylim=(0, None))
for name, ts in grids.items():
    axes[1].plot(ts, "o-", ms=4, label=name)
axes[1].set(title="three grids", xlabel="step of the sampler", ylabel="t")
axes[1].legend()
held_out = [float(error(ts, x1[500:], reference[500:])) for ts in grids.values()]
axes[2].bar(list(grids), held_out, color=["C0", "C1", "C2"])
axes[2].set(title="error on new noise", ylabel="RMS error of the samples")
plt.show()

# %% [markdown]
# ## From here
#
# A trained network is a denoiser as well: `dj.as_denoiser(network, schedule, dj.EPS)` for one that predicts the
# noise, with `dj.X0`, `dj.V`, `dj.VELOCITY`, `dj.SCORE` or `dj.edm_preconditioning(...)` for the others. Put it in
# the place of `denoise` above and every cell still runs. `experiments/` trains some.
