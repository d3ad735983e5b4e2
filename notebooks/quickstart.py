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
# A diffusion model is a denoiser and a path. Here the denoisers are in closed form, so nothing is
# trained, and every error comes from the method and not from a network.
#
# **Conventions**, which hold everywhere in the library:
#
# - Time runs from the data at `t = 0` to the prior at `t = 1`. A sampler goes from 1 to 0, along
#   *descending* times.
# - A path is $x_t = \alpha(t)\,x_0 + \sigma(t)\,\varepsilon$, $\varepsilon \sim N(0, I)$. A
#   **schedule** is any function `t -> (alpha, sigma)`.
# - A **denoiser** is any function `(x, t) -> (x0, eps)`. It returns the two posterior means
#   $E[x_0 \mid x_t = x]$ and $E[\varepsilon \mid x_t = x]$.
# - A guidance **scale** of 0 is unconditional, 1 is conditional, and more is guided.
# - What a constructor returns is a function *and* a pytree, so it passes through `jit`, `vmap` and
#   `grad` as an argument. You decide what to `jax.jit`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import diffjax as dj
from diffjax import exact
from diffjax.divergence import exact_probes

plt.rcParams.update({"figure.dpi": 80, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Paths
#
# The right panel shows $\lambda = \log(\alpha / \sigma)$, half the log signal-to-noise ratio. At
# equal $\lambda$ the $x_t$ of all paths are equal up to a factor. The paths differ only in how fast
# they pass through $\lambda$.

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
# The data are six Gaussians on a ring. `sample` is a scan of a sampler's step over a grid of times.
# `trajectory` also returns the states in between.

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
    ax.set(title=f"t = {float(ts[i]):.2f}", xlabel="$x$")
    ax.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
axes[0].set_ylabel("$y$")
plt.show()

# %% [markdown]
# The lines are the paths of 30 of the samples. Heun's method solves an ODE, the *probability flow*,
# so the same noise always ends at the same sample. `dj.ddpm`, `dj.ddim(..., eta=1.0)` and
# `dj.euler_maruyama` draw fresh noise at each step.
#
# ## Likelihood
#
# The same ODE, solved from the data to the prior, gives the log density of any point. It is the log
# density of the prior plus the integrated divergence of the velocity. In two dimensions the
# divergence can be exact (`exact_probes`). In many dimensions, keep the default, random probes.

# %%
side = jnp.linspace(-2.5, 2.5, 50)
points = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)


@jax.jit
def log_density(x):
    key, options = jax.random.key(0), {"probes": exact_probes}
    return jax.vmap(lambda x: dj.log_likelihood(key, denoise, schedule, x, **options))(x)


@jax.jit
def true_log_density(x):
    logpdf = jax.scipy.stats.multivariate_normal.logpdf
    components = jax.vmap(logpdf, (None, 0, 0))(x, means, covs)
    return jax.scipy.special.logsumexp(components + jnp.log(weights)[:, None], axis=0)


ours, truth = log_density(points), true_log_density(points)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
style = {"origin": "lower", "extent": (-2.5, 2.5, -2.5, 2.5), "cmap": "magma"}
for ax, values, title in ((axes[0], ours, "log_likelihood"), (axes[1], truth, "closed form")):
    image = ax.imshow(jnp.exp(values).reshape(50, 50), **style)
    ax.set(title=f"density by {title}", xlabel="$x$", ylabel="$y$")
    fig.colorbar(image, ax=ax, label="density")
plt.show()

largest = jnp.abs(ours - truth)[truth > -10].max()
print(f"largest error of the log density, where it is above -10 nats: {largest:.1e} nats")

# %% [markdown]
# ## Guidance, swept in one program
#
# Let the two modes on the right be one class. `cfg` makes a denoiser from two denoisers and a
# scale. The scale is a number in a pytree, so `vmap` sweeps it: one compiled program draws five
# sets of samples.

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
    ax.set(title=f"scale {scale:g}", xlabel="$x$")
    ax.set(aspect="equal", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
axes[0].set_ylabel("$y$")
axes[0].legend(fontsize=7, loc="lower left", ncols=2, columnspacing=0.5, handletextpad=0.1)
plt.show()

# %% [markdown]
# At scale 1 the samples are those of the class. At larger scales they move away from the *other*
# modes and beyond the class itself: guidance sharpens and distorts.
#
# ## A gradient through the sampler
#
# With six steps, the choice of the times matters. The error against a fine solution from the same
# noise is a differentiable function of the times, so Adam can learn them. The steps between the
# times are a softmax, so the times always descend. The path is `linear_vp`, on which a good grid is
# far from uniform.

# %%
schedule = dj.linear_vp()
denoise = exact.gaussian_mixture(weights, means, covs, schedule)
steps, end = 6, 1e-3
fine = dj.uniform_log_snr(schedule, 200, end=end)
reference = jax.jit(dj.sample)(jax.random.key(3), dj.heun(denoise, schedule), x1, fine)


def grid(logits):
    shares = jnp.append(0.0, jnp.cumsum(jax.nn.softmax(logits))[:-1])
    return jnp.append(1.0 - (1.0 - end) * shares, end)


@jax.jit
def error(ts, noise, reference):
    x0 = dj.sample(jax.random.key(3), dj.ddim(denoise, schedule), noise, ts)
    return jnp.sqrt(jnp.mean((x0 - reference) ** 2))


optimizer = optax.adam(0.03)


def loss(logits):
    return error(grid(logits), x1[:500], reference[:500])


@jax.jit
def learn(logits):
    def step(carry, _):
        logits, state = carry
        value, gradient = jax.value_and_grad(loss)(logits)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(logits, updates), state), value

    (logits, _), values = jax.lax.scan(step, (logits, optimizer.init(logits)), length=150)
    return logits, values


logits, values = learn(jnp.zeros(steps))
grids = {
    "uniform": dj.uniform(steps, end=end),
    "log-SNR": dj.uniform_log_snr(schedule, steps, end=end),
    "learned": grid(logits),
}

fig, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
axes[0].plot(values)
axes[0].set(title="learning the grid", xlabel="step of Adam", ylim=(0, None))
axes[0].set_ylabel("RMS error of the samples")
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
# A trained network is a denoiser as well: `dj.as_denoiser(network, schedule, dj.EPS)` if it
# predicts the noise, with `dj.X0`, `dj.V`, `dj.VELOCITY`, `dj.SCORE` or
# `dj.edm_preconditioning(...)` otherwise. It can replace `denoise` in the cells above.
# `experiments/` trains networks.
