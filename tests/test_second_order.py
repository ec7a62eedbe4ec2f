"""Fisher-vector products against dense matrices, conjugate gradient and the line search against their definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree

from pgjax.networks import ActorCritic, make_networks
from pgjax.solvers import second_order
from pgjax.spaces import Box, Discrete

KINDS = ("categorical", "gaussian", "gaussian_state", "tanh_gaussian", "tanh_gaussian_state")
FORMS = ("gauss_newton", "double_backprop")
NUM = 7


def plain_kl(old, new):
    """KL(old || new) from the definitions, per state."""
    if hasattr(old, "logits"):
        log_p, log_q = (x.logits - jax.nn.logsumexp(x.logits, axis=-1, keepdims=True) for x in (old, new))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    var_old, var = jnp.exp(2 * old.log_std), jnp.exp(2 * new.log_std)
    return (0.5 * jnp.log(var / var_old) + (var_old + (old.mean - new.mean) ** 2) / (2 * var) - 0.5).sum(-1)


def actions_and_probabilities(dist):
    """Points [K, N, ...] and weights [K, N] whose weighted sums are expectations over actions.

    All actions of a categorical; for a Gaussian the nodes of Gauss-Hermite quadrature, exact for the polynomials here.
    """
    if hasattr(dist, "logits"):
        action = np.broadcast_to(np.arange(dist.logits.shape[-1])[:, None], dist.logits.shape[::-1])
        return action, jax.nn.softmax(dist.logits).T
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    z = np.array(list(itertools.product(nodes, repeat=dist.mean.shape[-1])))[:, None]
    weight = np.prod(list(itertools.product(weights / weights.sum(), repeat=dist.mean.shape[-1])), axis=-1)
    return dist.mean + jnp.exp(dist.log_std) * z, np.broadcast_to(weight[:, None], (len(z), len(dist.mean)))


class Net:
    """A policy with fewer than 50 parameters on NUM states, some way from its initial values."""

    def __init__(self, kind, dtype=np.float64):
        space = Discrete(3) if kind == "categorical" else Box((2,))
        networks = make_networks(Box((2,)), space, hidden_sizes=(3,), distribution=kind)
        shapes = jax.eval_shape(networks.init, jax.random.key(0)).actor
        params, unravel = ravel_pytree(jax.tree.map(lambda x: np.zeros(x.shape, dtype), shapes))
        rng = np.random.default_rng(KINDS.index(kind))
        self.params = (rng.normal(size=params.shape) / 2).astype(dtype)
        self.obs = rng.normal(size=(NUM, 2)).astype(dtype)
        self.dist = lambda params, obs: networks.policy(ActorCritic(unravel(params), None), obs)


@pytest.fixture(scope="module", params=KINDS)
def matrices(request):
    """The Fisher matrix [P, P] by both operators, by the Hessian of the KL and by the scores, all in float64."""
    with jax.enable_x64(True):
        net = Net(request.param)

        @jax.jit
        def compute(params, obs):
            def dist_of(params):
                return net.dist(params, obs)

            eye = jnp.eye(params.size)
            result = {form: jax.vmap(second_order.fisher_operator(dist_of, params, form))(eye) for form in FORMS}
            old = dist_of(params)
            result["hessian"] = jax.hessian(lambda params: plain_kl(old, dist_of(params)).mean())(params)
            action, probability = actions_and_probabilities(old)
            scores = jax.jacfwd(lambda params: dist_of(params).log_prob(action))(params)
            result["scores"] = jnp.einsum("kn,knp,knq->pq", probability, scores, scores) / NUM
            result["kl_slope"] = jax.grad(lambda params: plain_kl(old, dist_of(params)).mean())(params)
            # Two batch axes: the mean is over both.
            shaped = obs.reshape(1, NUM, 2).repeat(2, 0)
            operator = second_order.fisher_operator(lambda params: net.dist(params, shaped), params)
            result["two axes"] = jax.vmap(operator)(eye)
            return result

        return {name: np.asarray(x) for name, x in compute(net.params, net.obs).items()}


@pytest.mark.parametrize("form", FORMS)
def test_fisher_products_are_the_hessian_of_the_mean_kl_and_the_mean_outer_product_of_scores(matrices, form):
    scale = np.abs(matrices["hessian"]).max()
    assert scale > 0.01 and len(matrices["hessian"]) <= 50
    for other in ("hessian", "scores"):
        np.testing.assert_allclose(matrices[form], matrices[other], rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(matrices["two axes"], matrices[form], rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(matrices["kl_slope"], 0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_fisher_products_are_symmetric_and_never_negative(matrices, form):
    dense = matrices[form]
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=1e-14 * np.abs(dense).max())
    assert np.linalg.eigvalsh((dense + dense.T) / 2).min() > -1e-12


def quadratic(net, form):
    @jax.jit
    def products(params, obs, v):
        return jax.vmap(second_order.fisher_operator(lambda params: net.dist(params, obs), params, form))(v)

    return products


@pytest.mark.parametrize("kind", ["categorical", "tanh_gaussian_state"])
def test_both_forms_agree_in_single_precision_and_are_linear(kind):
    net = Net(kind, np.float32)
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, net.params.size)).astype(np.float32)
    args = (net.params, net.obs, np.stack([u, v, 2 * u - 3 * v]))
    one, other = (np.asarray(quadratic(net, form)(*args)) for form in FORMS)
    scale = np.abs(one).max()
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(one[2], 2 * one[0] - 3 * one[1], rtol=0, atol=1e-5 * scale)
    # u·Fv = v·Fu
    np.testing.assert_allclose(u @ one[1], v @ one[0], rtol=0, atol=1e-4 * scale)


def dot_precisions(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for inner in jaxprs_in_params(eqn.params):
            yield from dot_precisions(inner)


@pytest.mark.parametrize("form", FORMS)
def test_every_matrix_product_runs_at_the_highest_precision(form):
    net = Net("gaussian", np.float32)
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)

    def solve(params, obs):
        product = second_order.fisher_operator(lambda params: net.dist(params, obs), params, form)
        return second_order.conjugate_gradient(product, params, 2)

    found = list(dot_precisions(jax.make_jaxpr(solve)(net.params, net.obs).jaxpr))
    assert len(found) > 4 and set(found) == {highest}


def test_the_quadratic_model_leaves_a_remainder_of_third_order(float64):
    """K(θ + ε s) = ½ ε² sᵀ F s + O(ε³): half the ε, an eighth of the remainder."""
    net = Net("gaussian_state")
    step = np.random.default_rng(3).normal(size=net.params.size)
    square = step @ quadratic(net, "gauss_newton")(net.params, net.obs, step[None])[0]

    @jax.jit
    def model_error(epsilon):
        old, new = (net.dist(params, jnp.asarray(net.obs)) for params in (net.params, net.params + epsilon * step))
        return plain_kl(old, new).mean() - 0.5 * epsilon**2 * square

    errors = np.array([model_error(0.02 / 2**i) for i in range(4)])
    np.testing.assert_allclose(errors[:-1] / errors[1:], 8, rtol=0.1)


# ---- Conjugate gradient ---------------------------------------------------------------------------------------------


def positive_definite(rng, n):
    factor = rng.normal(size=(n, n))
    return factor @ factor.T + 0.1 * np.eye(n)


@jax.jit
def solutions(matrix, b, tolerance):
    """What is found after 0, 1, … n + 2 iterations, [n + 3, n]."""
    count = b.size + 3
    return jnp.stack([second_order.conjugate_gradient(lambda v: matrix @ v, b, k, tolerance) for k in range(count)])


@pytest.mark.parametrize("n", [1, 4, 10])
def test_conjugate_gradient_is_exact_after_as_many_steps_as_unknowns_and_ever_closer_before(float64, n):
    rng = np.random.default_rng(n)
    matrix, b = positive_definite(rng, n), rng.normal(size=n)
    exact = np.linalg.solve(matrix, b)
    found = np.asarray(solutions(matrix, b, 1e-20))
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[n], exact, rtol=1e-6, atol=1e-8)
    # Solved: further iterations leave it alone.
    np.testing.assert_allclose(found[-1], exact, rtol=1e-8, atol=1e-9)
    error = found - exact
    distance = np.sqrt(np.einsum("ki,ij,kj->k", error, matrix, error))
    assert (np.diff(distance[: n + 1]) < 0).all()


def test_the_first_iterate_of_conjugate_gradient_is_steepest_descent(float64):
    rng = np.random.default_rng(0)
    matrix, b = positive_definite(rng, 4), rng.normal(size=4)
    np.testing.assert_allclose(solutions(matrix, b, 1e-10)[1], (b @ b) / (b @ matrix @ b) * b, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_the_tolerance_is_on_the_squared_residual_relative_to_the_right_side(float64, scale):
    rng = np.random.default_rng(1)
    matrix, b = positive_definite(rng, 4), scale * rng.normal(size=4)
    found = np.asarray(solutions(matrix, b, 0.0))
    square = ((b - found @ matrix) ** 2).sum(-1)
    stopping = np.asarray(solutions(matrix, b, square[2] * 1.01 / (b @ b)))
    # The iterate that first came below it is kept, bit for bit.
    first = np.flatnonzero(square < square[2] * 1.01)[0]
    np.testing.assert_allclose(stopping[first], found[first], rtol=1e-12)
    for later in stopping[first:]:
        np.testing.assert_array_equal(later, stopping[first])


def test_conjugate_gradient_of_zero_is_zero_and_nothing_turns_a_nan_into_a_number(float64):
    matrix = positive_definite(np.random.default_rng(0), 4)
    np.testing.assert_array_equal(solutions(matrix, np.zeros(4), 1e-10), 0)
    assert np.isnan(solutions(matrix, np.array([1, np.nan, 0, 0]), 1e-10)[-1]).any()
    # A direction without positive curvature: x stays where it was.
    np.testing.assert_array_equal(solutions(-matrix, np.ones(4), 1e-10), 0)


def test_lanes_of_conjugate_gradient_equal_single_solves(float64):
    rng = np.random.default_rng(2)
    matrices = np.stack([positive_definite(rng, 4), np.eye(4), positive_definite(rng, 4)])
    b = np.stack([rng.normal(size=4), rng.normal(size=4), np.zeros(4)])
    lanes = jax.jit(jax.vmap(solutions, (0, 0, None)))(matrices, b, 1e-10)
    for lane, matrix, one in zip(lanes, matrices, b, strict=True):
        np.testing.assert_allclose(lane, solutions(matrix, one, 1e-10), rtol=1e-10, atol=1e-14)


# ---- Line search ----------------------------------------------------------------------------------------------------

START, STEP = np.array([0.1, -0.3], np.float32), np.array([1.0, 3.0], np.float32)
TRIALS = 5


def search_for(keep_last=False):
    def search(table, backtrack, step):
        """``table[j]``: whether trial j is to be accepted."""

        def accept(params, fraction):
            number = jnp.round(jnp.log(fraction) / jnp.log(backtrack)).astype(jnp.int32)
            return table[number] & jnp.isfinite(params).all()

        return second_order.line_search(accept, jnp.asarray(START), step, backtrack, TRIALS, keep_last=keep_last)

    return search


search = jax.jit(search_for())
TABLES = np.array(list(itertools.product([False, True], repeat=TRIALS)))


@pytest.mark.parametrize("lanes", [False, True])
def test_the_first_accepted_trial_is_taken_and_refusals_before_it_are_counted(lanes):
    backtrack = np.float32(0.8)
    if lanes:
        found = jax.jit(jax.vmap(search, (0, None, None)))(TABLES, backtrack, STEP)
    else:
        found = jax.tree.map(lambda *x: np.stack(x), *(search(table, backtrack, STEP) for table in TABLES))
    for i, table in enumerate(TABLES):
        if not table.any():
            np.testing.assert_array_equal(found.params[i], START)
            assert not found.accepted[i] and found.trials[i] == TRIALS
            continue
        first = int(np.argmax(table))
        np.testing.assert_allclose(found.params[i], START + 0.8**first * STEP, rtol=1e-6)
        assert found.accepted[i] and found.trials[i] == first
    assert found.accepted.dtype == bool and found.trials.dtype == np.int32


def test_the_defect_of_keeping_the_last_trial_only_shows_where_none_is_accepted():
    keeping = jax.jit(search_for(keep_last=True))
    found = keeping(np.zeros(TRIALS, bool), np.float32(0.5), STEP)
    np.testing.assert_allclose(found.params, START + 0.5 ** (TRIALS - 1) * STEP, rtol=1e-6)
    assert not found.accepted and found.trials == TRIALS
    for first in range(TRIALS):
        table = np.arange(TRIALS) == first
        for one, other in zip(keeping(table, np.float32(0.5), STEP), search(table, np.float32(0.5), STEP), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_step_that_is_not_a_number_leaves_the_start_bit_for_bit():
    found = search(np.ones(TRIALS, bool), np.float32(0.8), np.array([np.nan, 1], np.float32))
    np.testing.assert_array_equal(found.params, START)
    assert not found.accepted
