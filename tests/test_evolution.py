"""The evolution strategy: its update by hand, its invariances, and the start from which it cannot move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax
from pgjax.learned import evolution

TEMPLATE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def population_rows(population):
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(population)], 1)


def test_partners_are_adjacent_and_opposite():
    es = evolution.open_es(TEMPLATE, 16, sigma=0.3)
    mean = {"a": jnp.arange(6.0).reshape(2, 3), "b": -jnp.ones(4)}
    population, _ = es.ask(es.init(jax.random.key(0), mean), jax.random.key(1))
    rows = population_rows(population)
    np.testing.assert_allclose(rows[0::2] + rows[1::2], np.broadcast_to(2 * flat(mean), (8, 10)), atol=1e-5)
    assert np.abs(rows[0] - rows[2]).min() > 1e-4, "two pairs share their noise"
    assert 0.2 < np.std(rows - flat(mean)) < 0.4


@pytest.mark.parametrize("shaping", ["z_score", "centred_ranks", "pair_ranks"])
def test_two_generations_equal_a_calculation_in_float64(shaping):
    """The estimate, Adam, and both decays, worked out again from Salimans et al. and Kingma and Ba."""
    popsize, sigma, rate = 8, 0.2, 0.05
    es = evolution.open_es(
        TEMPLATE, popsize, sigma, rate, sigma_decay=0.5, sigma_min=0.15, learning_rate_decay=0.5, learning_rate_min=0.0,
        shaping=shaping,
    )  # fmt: skip
    state = es.init(jax.random.key(0), TEMPLATE)
    fitness = np.array([[3.0, 1.0, 2.0, 2.0, -5.0, 0.0, 7.0, 8.0], [1.0, 2.0, 0.0, -1.0, 4.0, 4.5, 9.0, 3.0]])
    m, first, second = np.zeros(10), np.zeros(10), np.zeros(10)
    for t in range(2):
        population, state = es.ask(state, jax.random.key(10 + t))
        noise = (population_rows(population).astype(np.float64) - m) / [sigma, 0.15][t]
        f = fitness[t]
        if shaping == "z_score":
            shaped = (f - f.mean()) / f.std()
        elif shaping == "centred_ranks":
            shaped = np.array([((f < x).sum() + ((f == x).sum() - 1) / 2) / 7 - 0.5 for x in f])
        else:
            shaped = np.array([[1.0, 0.0] if x > y else [0.5, 0.5] if x == y else [0.0, 1.0] for x, y in f.reshape(4, 2)])
        gradient = (noise * shaped.reshape(8, 1)).sum(0) / (popsize * [sigma, 0.15][t])
        first, second = 0.99 * first + 0.01 * gradient, 0.999 * second + 0.001 * gradient**2
        m_hat, v_hat = first / (1 - 0.99 ** (t + 1)), second / (1 - 0.999 ** (t + 1))
        m = m + rate * 0.5**t * m_hat / (np.sqrt(v_hat) + 1e-8)
        state = es.tell(state, population, jnp.asarray(fitness[t], jnp.float32), jax.random.key(0))
        np.testing.assert_allclose(flat(es.mean(state)), m, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(es.sigma(state), 0.15)


def test_decays_reach_the_published_values():
    """After 1025 generations of LPO's schedule, and of TA-LPG's after 2500."""
    es = evolution.open_es(jnp.zeros(1), 2)

    def generation(state, key):
        population, state = es.ask(state, key)
        return es.tell(state, population, population[:, 0], key), None

    state, _ = jax.lax.scan(generation, es.init(jax.random.key(0), jnp.zeros(1)), jax.random.split(jax.random.key(1), 1025))
    np.testing.assert_allclose(es.sigma(state), 0.01434, rtol=1e-3)
    # Adam's step on a cost that is noise says nothing of the learning rate: the schedule itself does.
    np.testing.assert_allclose(evolution._falling(0.01, 0.999, 0.001)(1025), 0.00359, rtol=2e-3)
    np.testing.assert_allclose(evolution._falling(0.01, 0.999, 1e-5)(2500), 0.00082, rtol=1e-2)
    for generation in (0, 10, 10**6):
        np.testing.assert_allclose(evolution._falling(0.05, 1.0, 0.001)(generation), 0.05, rtol=1e-6)
        assert evolution._falling(0.05, 0.9, 0.02)(generation) >= 0.02 - 1e-7


def test_the_estimate_points_along_the_gradient():
    centre = jnp.linspace(-1.0, 1.0, 20)
    es = evolution.open_es(centre, 512, 0.05, 1e-3, shaping=lambda f: f)
    mean = jnp.zeros(20)
    population, state = es.ask(es.init(jax.random.key(0), mean), jax.random.key(1))
    fitness = -((population - centre) ** 2).sum(1)
    state = es.tell(state, population, fitness, jax.random.key(0))
    estimate = np.asarray(state.opt_state[0].mu)  # of the cost: evosax minimises
    analytic = np.asarray(2 * (mean - centre))
    cosine = estimate @ analytic / np.linalg.norm(estimate) / np.linalg.norm(analytic)
    assert cosine > 0.9
    np.testing.assert_allclose(np.linalg.norm(estimate) / (1 - 0.99), np.linalg.norm(analytic), rtol=0.3)
    assert ((np.asarray(es.mean(state)) - mean) * -analytic).sum() > 0, "the mean went away from the centre"


@pytest.mark.parametrize("shaping", ["z_score", "centred_ranks", "pair_ranks"])
def test_exchanging_partners_turns_the_update_round_exactly(shaping):
    es = evolution.open_es(jnp.ones(30), 8, shaping=shaping)
    population, state = es.ask(es.init(jax.random.key(0), jnp.ones(30)), jax.random.key(1))
    fitness = jax.random.normal(jax.random.key(2), (8,))
    swapped = fitness.reshape(4, 2)[:, ::-1].reshape(-1)
    one, other = (es.tell(state, population, f, jax.random.key(0)).opt_state[0].mu for f in (fitness, swapped))
    np.testing.assert_array_equal(np.asarray(one), -np.asarray(other))
    assert np.abs(one).max() > 1e-3


@pytest.mark.parametrize("shaping", ["z_score", "centred_ranks", "pair_ranks"])
def test_a_population_of_equals_stays_where_it_is(shaping):
    """Not nearly: Adam would make whole steps of what rounding leaves."""
    start = jnp.linspace(1.0, 50.0, 30)
    es = evolution.open_es(start, 8, shaping=shaping)
    population, state = es.ask(es.init(jax.random.key(0), start), jax.random.key(1))
    state = es.tell(state, population, jnp.full(8, 3.0), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(es.mean(state)), np.asarray(start))


@pytest.mark.parametrize("shaping", ["z_score", "centred_ranks", "pair_ranks"])
def test_pairs_that_tie_leave_the_mean_where_it_is(shaping):
    """However much one pair has over another: compilers contract products and differences, and leave crumbs."""
    es = evolution.open_es(jnp.zeros(30), 8, shaping=shaping)
    for seed in range(5):
        population, state = es.ask(es.init(jax.random.key(0), jnp.zeros(30)), jax.random.key(1))
        fitness = jnp.repeat(-45 + 3 * jax.random.normal(jax.random.key(seed), (4,)), 2)
        state = es.tell(state, population, fitness, jax.random.key(0))
        np.testing.assert_array_equal(np.asarray(es.mean(state)), np.zeros(30))


def test_pair_ranks_see_only_who_won():
    fitness = jnp.array([1.0, 3.0, -2.0, -2.0, 5.0, 4.0])
    ranks = evolution.pair_ranks(fitness)
    np.testing.assert_array_equal(np.asarray(ranks), [0, 1, 0.5, 0.5, 1, 0])
    per_pair = jnp.repeat(jnp.array([100.0, -7.0, 3.0]), 2)
    scale = jnp.repeat(jnp.array([1e-3, 50.0, 2.0]), 2)
    np.testing.assert_array_equal(np.asarray(evolution.pair_ranks(scale * fitness + per_pair)), np.asarray(ranks))


def test_centred_ranks_of_ties_are_shared():
    np.testing.assert_allclose(
        np.asarray(evolution.centred_ranks(jnp.array([2.0, 9.0, 2.0, -1.0, 2.0]))), [0, 0.5, 0, -0.5, 0], atol=1e-7
    )


def test_failed_members_count_as_the_worst():
    fitness = jnp.array([1.0, jnp.nan, 4.0, jnp.inf, -jnp.inf, 2.0])
    told = np.asarray(evolution.without_failures(fitness))
    np.testing.assert_allclose(told, [1, 1, 4, 1, 1, 2], atol=2e-6)
    # Never an equal of who earned the least.
    assert (told[[1, 3, 4]] < 1).all()
    pairs = jnp.array([0.0, jnp.nan, 0.0, 0.0, jnp.nan, -jnp.inf])
    np.testing.assert_array_equal(evolution.ties(pairs), [False, True, True])
    np.testing.assert_array_equal(evolution.pair_ranks(evolution.without_failures(pairs)), [1, 0, 0.5, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(np.asarray(evolution.without_failures(jnp.full(4, jnp.nan))), np.zeros(4))
    es = evolution.open_es(jnp.zeros(3), 6)
    population, state = es.ask(es.init(jax.random.key(0), jnp.zeros(3)), jax.random.key(1))
    assert np.isfinite(es.mean(es.tell(state, population, fitness, jax.random.key(0)))).all()


CENTRE = jnp.full(4, 1.0)


def test_pair_ranks_converge_on_tasks_of_any_height():
    """Every pair has a task of its own, whose returns have an offset a thousand times what the members differ by."""
    es = evolution.open_es(CENTRE, 16, 0.1, 0.05, sigma_decay=1.0, learning_rate_decay=1.0, adam_b1=0.9, shaping="pair_ranks")

    def generation(state, key):
        key_ask, key_offset = jax.random.split(key)
        population, state = es.ask(state, key_ask)
        offset = 1000 * jnp.repeat(jax.random.normal(key_offset, (8,)), 2)
        return es.tell(state, population, -((population - CENTRE) ** 2).sum(1) + offset, key), None

    def run(key):
        state, _ = jax.lax.scan(generation, es.init(key, jnp.zeros(4)), jax.random.split(key, 150))
        return jnp.linalg.norm(es.mean(state) - CENTRE)

    assert jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 8)).max() < 0.3


def test_only_pair_ranks_keep_their_signal_as_tasks_differ():
    """The size of the estimate: pair ranks do not see offsets at all; the others, over the whole population, drown in them."""
    size = {}
    for shaping in evolution.SHAPINGS:
        es = evolution.open_es(CENTRE, 64, 0.1, shaping=shaping)
        population, state = es.ask(es.init(jax.random.key(0), jnp.zeros(4)), jax.random.key(1))
        for spread in (0.0, 1000.0):
            offset = spread * jnp.repeat(jax.random.normal(jax.random.key(2), (32,)), 2)
            fitness = -((population - CENTRE) ** 2).sum(1) + offset
            told = es.tell(state, population, fitness, jax.random.key(0))
            size[shaping, spread] = float(jnp.linalg.norm(told.opt_state[0].mu))
    np.testing.assert_allclose(size["pair_ranks", 1000.0], size["pair_ranks", 0.0], rtol=1e-6)
    assert size["centred_ranks", 1000.0] < 0.1 * size["centred_ranks", 0.0]
    assert size["z_score", 1000.0] < 0.01 * size["z_score", 0.0]


def test_init_has_the_types_that_a_generation_keeps():
    es = evolution.open_es(TEMPLATE, 4)
    state = es.init(jax.random.key(0), TEMPLATE)
    population, asked = es.ask(state, jax.random.key(1))
    after = es.tell(asked, population, jnp.arange(4.0), jax.random.key(2))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), after
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"popsize": 5}, "popsize = 5"),
        ({"popsize": 0}, "popsize = 0"),
        ({"popsize": 4, "sigma": 0.0}, "sigma = 0.0"),
        ({"popsize": 4, "learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"popsize": 4, "sigma_decay": 1.5}, "sigma_decay = 1.5"),
        ({"popsize": 4, "shaping": "pair_rank"}, "did you mean pair_ranks"),
    ],
)
def test_wrong_numbers_are_refused(fields, said):
    with pytest.raises(pgjax.RequestError, match=said):
        evolution.open_es(TEMPLATE, **fields)
