"""Couplings: against scipy's assignment, closed-form plans, and the optimality conditions of
entropic transport.
"""

import functools
import itertools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from diffjax import couplings


def pairs(n, seed=0, shape=(2,)):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(n, *shape))), jnp.asarray(
        random.normal(size=(n, *shape)) + 1
    )


def test_optimal_is_the_cheapest_permutation():
    x0, x1 = pairs(6, shape=(2, 1))
    cost = np.sum((np.asarray(x0)[:, None] - np.asarray(x1)[None]) ** 2, (2, 3))
    best = min(itertools.permutations(range(6)), key=lambda p: cost[range(6), p].sum())
    np.testing.assert_array_equal(couplings.optimal(None, x0, x1), x1[np.array(best)])
    np.testing.assert_allclose(couplings.squared_distances(x0, x1), cost, rtol=1e-12)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_squared_distances_build_no_array_of_pairs_of_points():
    """64 points of 300 numbers: n n d = 1,228,800 in all, n d = 19,200 in a row's differences."""
    x0, x1 = pairs(64, shape=(300,))
    jaxpr = jax.make_jaxpr(couplings.squared_distances)(x0, x1).jaxpr
    assert (
        max(out.aval.size for equation in equations(jaxpr) for out in equation.outvars) <= 64 * 300
    )
    memory = jax.jit(couplings.squared_distances).lower(x0, x1).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 8 * 64 * 300 * 2


def test_squared_distances_of_near_points_far_from_the_origin():
    """In float32, 1000 + k / 1024 is exact; so is every difference, and the sum to 3 roundings."""
    steps = np.random.default_rng(0).integers(0, 8, (2, 5, 3))
    x0, x1 = jnp.asarray(1000 + steps / 1024, jnp.float32)
    expected = np.sum((steps[0][:, None] - steps[1][None]) ** 2, 2) / 1024**2
    np.testing.assert_allclose(couplings.squared_distances(x0, x1), expected, rtol=3e-7)


def test_optimal_is_scipys_assignment_under_every_transform():
    x0, x1 = (x.reshape(4, 6, 2) for x in pairs(24))
    costs = np.sum((np.asarray(x0)[:, :, None] - np.asarray(x1)[:, None]) ** 2, 3)
    expected = np.stack(
        [
            b[scipy.optimize.linear_sum_assignment(c)[1]]
            for c, b in zip(costs, np.asarray(x1), strict=True)
        ]
    )
    couple = functools.partial(couplings.optimal, None)
    np.testing.assert_array_equal(jax.vmap(couple)(x0, x1), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(couple))(x0, x1), expected)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    sharded = jax.jit(
        jax.shard_map(jax.vmap(couple), mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    )
    np.testing.assert_array_equal(sharded(x0, x1), expected)
    gradient = jax.grad(lambda x: jnp.sum((x0[0] - couple(x0[0], x)) ** 2))(x1[0])
    chosen = scipy.optimize.linear_sum_assignment(costs[0])[1]
    np.testing.assert_allclose(gradient[chosen], 2 * (expected[0] - x0[0]), rtol=1e-12)


def cheapest(cost):
    """By brute force over all permutations."""
    rows = np.arange(len(cost))
    return np.array(min(itertools.permutations(rows), key=lambda p: cost[rows, list(p)].sum()))


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 1, 0], [3, 3, 3, 3, 3, 3], [5, 4, 3, 2, 1, 0]])
def test_optimal_within_classes_is_the_cheapest_permutation_that_keeps_them(labels):
    x0, x1 = pairs(6)
    cost = np.sum((np.asarray(x0)[:, None] - np.asarray(x1)[None]) ** 2, 2)
    cost[np.not_equal.outer(labels, labels)] = np.inf
    expected = x1[cheapest(cost)]
    within = functools.partial(couplings.optimal, None)
    np.testing.assert_array_equal(within(x0, x1, labels=jnp.array(labels)), expected)
    np.testing.assert_array_equal(jax.jit(within)(x0, x1, labels=jnp.array(labels)), expected)
    both = jax.vmap(lambda x0, x1, labels: within(x0, x1, labels=labels))
    np.testing.assert_array_equal(both(x0[None], x1[None], jnp.array([labels])), expected[None])


def test_the_draws_of_a_class_keep_the_priors_distribution():
    """Data of class 0 lie at -3, of class 1 at 3. Over the whole batch class 0 would get draws
    below 0.
    """
    labels = jnp.tile(jnp.array([0, 1]), 200)
    x1 = jax.random.normal(jax.random.key(0), (400, 1))
    x0 = 6.0 * labels[:, None] - 3
    mixed, within = couplings.optimal(None, x0, x1), couplings.optimal(None, x0, x1, labels=labels)
    for label in (0, 1):
        np.testing.assert_array_equal(
            np.sort(within[labels == label], 0), np.sort(x1[labels == label], 0)
        )
    assert mixed[labels == 0].max() <= mixed[labels == 1].min()


def test_fewer_draws_than_data_serve_equally_often():
    """Six data points and three draws: by brute force over three draws, each copied."""
    x0, x1 = pairs(6)
    twice = np.repeat(np.asarray(x1[:3]), 2, 0)
    expected = twice[cheapest(np.sum((np.asarray(x0)[:, None] - twice[None]) ** 2, 2))]
    np.testing.assert_array_equal(couplings.optimal(None, x0, x1[:3]), expected)
    np.testing.assert_array_equal(jax.jit(couplings.optimal)(None, x0, x1[:3]), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 6), (4, 6), (3, 2)])
def test_the_plan_of_unequal_numbers_is_that_of_linear_programming(n, m):
    """Both marginals are uniform, and the cost is least. 3000 draws of the partners; five sigma."""
    x0, x1 = pairs(6)
    x0, x1 = x0[:n], x1[:m]
    cost = np.sum((np.asarray(x0)[:, None] - np.asarray(x1)[None]) ** 2, 2)
    marginals = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    masses = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    plan = scipy.optimize.linprog(cost.ravel(), A_eq=marginals, b_eq=masses).x.reshape(n, m)
    keys = jax.random.split(jax.random.key(0), 3000)
    partners = jax.jit(jax.vmap(couplings.optimal, (0, None, None)))(keys, x0, x1)
    drawn = np.mean(np.all(np.asarray(partners)[:, :, None] == np.asarray(x1), -1), 0) / n
    np.testing.assert_allclose(drawn, plan, atol=5 * 0.5 / np.sqrt(3000) / n)
    np.testing.assert_array_equal(drawn > 0, plan > 1e-9)


def test_entropic_draws_of_another_number_than_the_data():
    """The marginal of each draw is 1/m: 3000 draws of the partners of three data points; five
    sigma.
    """
    x0, x1 = pairs(5)
    draw = jax.jit(jax.vmap(couplings.entropic(0.5, 1e-6), (0, None, None)))
    partners = draw(jax.random.split(jax.random.key(0), 3000), x0[:3], x1)
    used = np.mean(np.all(np.asarray(partners)[:, :, None] == np.asarray(x1), -1), (0, 1))
    np.testing.assert_allclose(used, 1 / 5, atol=5 * 0.5 / np.sqrt(3 * 3000))


def test_traced_points_that_are_not_finite_stay_as_they_were_drawn():
    x0, x1 = pairs(4)
    np.testing.assert_array_equal(jax.jit(couplings.optimal)(None, x0.at[0].set(jnp.nan), x1), x1)


def test_optimal_in_one_dimension_is_monotone():
    x0, x1 = pairs(40, shape=())
    partners = np.asarray(jax.jit(couplings.optimal)(None, x0, x1))
    np.testing.assert_array_equal(partners[np.argsort(x0)], np.sort(x1))


def test_independent_leaves_the_draws_alone():
    x0, x1 = pairs(5)
    assert couplings.independent(None, x0, x1) is x1


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 30.0])
def test_sinkhorn_is_the_entropic_optimum(epsilon):
    """A plan is optimal if and only if its marginals hold and log pi + C / eps is a sum of a row's
    and a column's number.
    """
    random = np.random.default_rng(1)
    cost = jnp.asarray(random.uniform(size=(7, 5)))
    plan = jax.jit(couplings.sinkhorn)(cost, epsilon, 1e-10, 100_000)
    pi = np.exp(np.asarray(plan.log_plan))
    np.testing.assert_allclose(pi.sum(1), 1 / 7, rtol=1e-12)
    assert np.abs(pi.sum(0) - 1 / 5).sum() <= plan.error <= 1e-10
    potentials = np.asarray(plan.log_plan) + np.asarray(cost) / epsilon
    np.testing.assert_allclose(
        potentials - potentials[:1] - potentials[:, :1] + potentials[0, 0], 0, atol=1e-9
    )


def test_sinkhorn_stops_at_the_tolerance_or_the_limit():
    cost = couplings.squared_distances(*pairs(20))
    loose, tight = couplings.sinkhorn(cost, 0.5, 1e-2), couplings.sinkhorn(cost, 0.5, 1e-6)
    assert loose.iterations < tight.iterations and tight.error <= 1e-6 < loose.error <= 1e-2
    few = couplings.sinkhorn(cost, 1e-3, 1e-12, 3)
    assert few.iterations == 3 and few.error > 1e-12


def test_the_limits_of_the_entropic_coupling():
    """Without entropy the optimal assignment; with nothing else the independent coupling: every
    partner is as likely.
    """
    x0, x1 = pairs(8)
    plan = couplings.sinkhorn(couplings.squared_distances(x0, x1), 1e-3, 1e-6, 100_000)
    rows, columns = scipy.optimize.linear_sum_assignment(couplings.squared_distances(x0, x1))
    np.testing.assert_array_equal(jnp.argmax(plan.log_plan, 1)[rows], columns)
    sharp = couplings.entropic(1e-3, 1e-4, 100_000)(jax.random.key(0), x0, x1)
    np.testing.assert_array_equal(sharp, couplings.optimal(None, x0, x1))
    flat = couplings.sinkhorn(couplings.squared_distances(x0, x1), 1e9)
    np.testing.assert_allclose(jnp.exp(flat.log_plan), 1 / 64, rtol=1e-6)  # cost / eps = 1e-8


def test_iterations_that_run_out_are_an_error():
    """The columns of such a plan do not have the prior's marginal."""
    x0, x1 = pairs(20)
    with pytest.raises(
        ValueError, match=r"max_iterations: expected enough.*epsilon=0\.001, got 3 and an error of"
    ):
        couplings.entropic(1e-3, max_iterations=3)(jax.random.key(0), x0, x1)


def test_entropic_partners_are_drawn_from_the_plan():
    """Two points, costs 0 and 1, eps = 1/2: the near partner with probability 1 / (1 + e^-2); 4000
    draws, five sigma.
    """
    x = jnp.array([[0.0], [1.0]])
    draw = jax.jit(jax.vmap(lambda key: couplings.entropic(0.5)(key, x, x)))
    partners = draw(jax.random.split(jax.random.key(3), 4000))
    p = 1 / (1 + np.exp(-2))
    near = np.mean(np.asarray(partners) == np.asarray(x), (0, 2))
    np.testing.assert_allclose(near, p, atol=5 * np.sqrt(p * (1 - p) / 4000))


@pytest.mark.usefixtures("without_type_checks")
def test_refusals():
    x0, x1 = pairs(4)
    with pytest.raises(
        ValueError, match=r"as many data points as draws.*got \(4, 2\) and \(3, 2\)"
    ):
        couplings.independent(None, x0, x1[:3])
    for coupling in (couplings.independent, couplings.optimal, couplings.entropic(1.0)):
        with pytest.raises(ValueError, match=r"of one shape.*got \(4, 2\) and \(4, 1\)"):
            coupling(jax.random.key(0), x0, x1[:, :1])
        with pytest.raises(ValueError, match=r">= 1, got \(0, 2\) and \(0, 2\)"):
            coupling(jax.random.key(0), x0[:0], x1[:0])
    with pytest.raises(
        ValueError, match=r"labels: expected 4 integers.*got int64\[3\] and 4 draws"
    ):
        couplings.optimal(None, x0, x1, labels=jnp.arange(3))
    with pytest.raises(ValueError, match=r"labels: expected 4 integers.*got float64\[4\]"):
        couplings.optimal(None, x0, x1, labels=jnp.arange(4.0))
    with pytest.raises(
        ValueError, match=r"labels: expected 4 integers.*as many draws x1.*and 2 draws"
    ):
        couplings.optimal(None, x0, x1[:2], labels=jnp.arange(4))
    with pytest.raises(
        ValueError, match=r"key: expected a key to draw one of the 2 partners.*got None"
    ):
        couplings.optimal(None, x0[:2], x1)
    with pytest.raises(
        ValueError, match=r"least common multiple is at most 8192, got 127 and 128; let one"
    ):
        couplings.optimal(None, jnp.zeros((127, 1)), jnp.zeros((128, 1)))
    with pytest.raises(ValueError, match="x0, x1: expected finite numbers"):
        couplings.optimal(None, x0.at[0].set(jnp.nan), x1)
    with pytest.raises(ValueError, match="cost: expected finite numbers"):
        couplings.sinkhorn(jnp.array([[jnp.inf, 1.0]]), 1.0)
    with pytest.raises(ValueError, match="epsilon: expected a finite number"):
        couplings.entropic(0.0)
    with pytest.raises(ValueError, match=r"cost: expected a matrix.*got shape \(3,\)"):
        couplings.sinkhorn(jnp.ones(3), 1.0)
