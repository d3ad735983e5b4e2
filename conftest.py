"""Names that the examples in docstrings use without importing them."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    import jax.numpy as jnp

    from diffjax import (
        _bind,
        divergence,
        dynamics,
        exact,
        grids,
        guidance,
        likelihood,
        losses,
        optimal_grids,
        parametrizations,
        process,
        samplers,
        schedules,
        solve,
        times,
        weightings,
    )

    doctest_namespace.update(jax=jax, jnp=jnp)
    for module in (
        *(_bind, exact, divergence, dynamics, grids, guidance, likelihood, losses, optimal_grids, parametrizations),
        *(process, samplers, schedules, solve, times, weightings),
    ):
        doctest_namespace.update({name: getattr(module, name) for name in getattr(module, "__all__", ())})
