"""Training: a state that is one pytree, a pure step, and a loop.

    apply, params = functional(network)     # apply(params, x, t) = network(x, t)
    loss = lambda params, key, batch: ...   # a scalar; the network is `bind(apply, params)`
    step = make_train_step(loss, optimizer, ema=constant_ema(0.999))
    state = init_state(key, params, optimizer)
    state = fit(state, jax.jit(step, donate_argnums=0), batches, num_steps=10_000)
    network = merge(apply, state.ema)

A module is split once into a function and a plain dict of arrays. Passing a dict to a jitted
function costs a tenth of passing a module, and optax, the average and Orbax work on dicts as they
are.
Nothing here depends on diffusion.
"""

from . import checkpoints
from .data import check_labels, in_memory
from .ema import constant_ema, power_ema
from .loop import fit
from .modules import functional, merge
from .step import TrainState, init_state, make_train_step

__all__ = [
    "TrainState",
    "check_labels",
    "checkpoints",
    "constant_ema",
    "fit",
    "functional",
    "in_memory",
    "init_state",
    "make_train_step",
    "merge",
    "power_ema",
]
