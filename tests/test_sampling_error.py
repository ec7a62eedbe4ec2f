"""The sampling error against exact counts, least squares and Wilks' law."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from probe_envs import Probe

from pgjax import on_policy, sampling_error
from pgjax.algorithms import get, list_algorithms, make, ppo
from pgjax.distributions import Categorical
from pgjax.networks import ActorCritic
from pgjax.spaces import Box, Discrete

K = 10


def bandit_core(**setup):
    """A softmax over K arms by the bias of a linear network; the observation is 0."""
    spaces = SimpleNamespace(observation_space=Box((1,)), action_space=Discrete(K))
    defaults = dict(num_envs=1, num_steps=64, hidden_sizes=(), sampling_error="last_layer")
    return ppo.make(spaces, ppo.Setup(**{**defaults, **setup})).core


def actor_of(core, logits):
    """Parameters with these logits at the observation 0."""
    params = core.networks.init(jax.random.key(0))
    tree = core.unravel(params)
    tree.actor["head"]["params"]["Dense_0"]["bias"] = jnp.asarray(logits)
    return ActorCritic(jax.flatten_util.ravel_pytree(tree.actor)[0], params.critic)


def exact(actions, prob):
    """KL of the frequencies from ``prob`` [K], by counting."""
    freq = np.bincount(actions, minlength=len(prob)) / len(actions)
    some = freq > 0
    return (freq[some] * np.log(freq[some] / prob[some])).sum()


def random_bandit(seed, num):
    rng = np.random.default_rng(seed)
    logits = 0.5 * rng.normal(size=K)
    prob = np.exp(logits) / np.exp(logits).sum()
    return logits.astype(np.float32), prob, rng.choice(K, num, p=prob)


def test_wilks_law_on_a_bandit():
    """E[SE] = (K - 1) / 2N of on-policy data."""
    _, prob, _ = random_bandit(0, 1)
    num, rounds = 2000, 3000
    actions = np.random.default_rng(1).choice(K, (rounds, num), p=prob)
    of_all = jax.jit(jax.vmap(lambda a: sampling_error.tabular(jnp.zeros_like(a), a, jnp.asarray(prob[None], jnp.float32))))
    errors = np.asarray(of_all(actions))
    np.testing.assert_allclose(errors[:20], [exact(a, prob) for a in actions[:20]], rtol=1e-3, atol=1e-6)
    expected = sampling_error.expected_on_policy(K - 1, num)
    assert expected == 9 / 4000
    # 2 N SE is chi-squared with K - 1 degrees of freedom; four standard errors.
    assert abs(errors.mean() - expected) < 4 * np.sqrt(2 * (K - 1)) / (2 * num) / np.sqrt(rounds)


def test_tabular_weighs_states_by_their_visits_and_leaves_out_what_is_not_there(float64):
    prob = jnp.array([[0.5, 0.5], [0.25, 0.75]])
    state, action = jnp.array([0, 0, 0, 1, 1]), jnp.array([0, 0, 1, 1, 0])
    # State 0, three of five: (2/3, 1/3) from (1/2, 1/2); state 1, two of five: (1/2, 1/2) from (1/4, 3/4).
    first = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    second = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(sampling_error.tabular(state, action, prob), 0.6 * first + 0.4 * second, rtol=1e-12)
    np.testing.assert_allclose(sampling_error.tabular(state, action, prob, state == 0), first, rtol=1e-12)


@pytest.mark.parametrize("protocol", ["last_layer", "authors"])
def test_fitted_error_of_a_softmax_is_the_exact_one(protocol):
    core = bandit_core(sampling_error=protocol)
    logits, prob, actions = random_bandit(7, 200)
    assert len(set(actions[:100])) == K  # of an action that never came the most likely logit is minus infinity
    obs, action = jnp.zeros((200, 1, 1)), jnp.asarray(actions[:, None], jnp.int32)
    args = core, jax.random.key(0), actor_of(core, logits), obs, action
    (error,) = jax.jit(lambda: sampling_error.of_batch(*args))().values()
    np.testing.assert_allclose(error, exact(actions, prob), rtol=2e-3)
    assert error > 0.005
    # Of the first half alone, when the rest is said to be missing.
    (half,) = jax.jit(lambda: sampling_error.of_batch(*args, jnp.arange(200)[:, None] < 100))().values()
    np.testing.assert_allclose(half, exact(actions[:100], prob), rtol=2e-3)
    assert abs(half - error) > 0.005


def test_it_is_zero_where_frequencies_are_those_of_the_policy():
    core = bandit_core(sampling_error_epochs=200)
    action = jnp.arange(K, dtype=jnp.int32).repeat(4)[:, None]
    (error,) = sampling_error.of_batch(core, None, actor_of(core, jnp.zeros(K)), jnp.zeros((40, 1, 1)), action).values()
    assert 0 <= error < 1e-6
    prob = jnp.full((1, K), 1 / K)
    assert abs(sampling_error.tabular(jnp.zeros_like(action), action, prob)) < 1e-7
    gap = sampling_error.frequency_gap(Categorical(jnp.zeros((40, 1, K))), action)
    assert gap["action_frequency_gap"] < 1e-6


def gaussian_gain(policy, obs, action):
    """max log-likelihood less that of ``policy``, per sample: least squares, and the spread of what it leaves."""
    features = np.concatenate([obs, np.ones((len(obs), 1))], 1)
    weights, *_ = np.linalg.lstsq(features, action, rcond=None)
    fitted = {"W": weights[:-1], "b": weights[-1], "s": np.log((action - features @ weights).std(0))}
    return (synthetic.log_prob(fitted, obs, action) - synthetic.log_prob(policy, obs, action)).mean()


def test_gaussian_error_is_that_of_least_squares_and_obeys_wilks_law():
    case = synthetic.shipped(ppo, num_steps=100, sampling_error="last_layer", sampling_error_epochs=600)
    policy = synthetic.random_policy()
    learner = synthetic.make_learner(case, policy)
    rng = np.random.default_rng(5)
    rounds, shape = 40, (100, synthetic.B)
    obs = rng.normal(size=(rounds, *shape, synthetic.O))
    mean, log_std = synthetic.distribution(policy, obs)
    action = mean + np.exp(log_std) * rng.normal(size=mean.shape)

    def error(obs, action):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), learner.params)
        return sampling_error.of_batch(case.core, None, params, obs, action)["sampling_error"]

    errors = jax.jit(jax.vmap(error))(obs.astype(np.float32), action.astype(np.float32))
    expected = [
        gaussian_gain(policy, o.reshape(-1, synthetic.O), a.reshape(-1, synthetic.A)) for o, a in zip(obs, action, strict=True)
    ]
    np.testing.assert_allclose(errors, expected, rtol=1e-2, atol=5e-5)
    # Weights, biases and log standard deviations of two dimensions: k = 3 * 2 + 2 + 2.
    wilks = sampling_error.expected_on_policy(10, 400)
    assert abs(errors.mean() - wilks) < 4 * np.sqrt(20) / 800 / np.sqrt(rounds)


def test_features_are_frozen():
    """With hidden layers fitting the last layer alone explains less than fitting everything."""
    core = bandit_core(hidden_sizes=(8,))
    weights, policy_of = core.networks.last_layer(core.networks.init(jax.random.key(0)), jnp.ones((5, 1)))
    assert sum(x.size for x in jax.tree.leaves(weights)) == 8 * K + K
    params = core.networks.init(jax.random.key(0))
    np.testing.assert_allclose(policy_of(weights).logits, core.networks.policy(params, jnp.ones((5, 1))).logits, rtol=1e-6)


def test_what_the_authors_leave_free():
    """k = 64 + 64 + 64 d + 2 d on Hopper, of eleven observations and d = 3 actions: 326."""
    spaces = SimpleNamespace(observation_space=Box((11,)), action_space=Box((3,)))
    core = ppo.make(spaces).core
    shapes = jax.eval_shape(core.networks.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    free = sampling_error._free_mask(core, params)
    assert free.sum() == 326 and free.size == 326 + 11 * 64 + 64 * 64


def test_the_authors_fit_step_by_step(float64):
    """A buffer of two batches of 1024: two minibatches a pass, gradients cut to norm one, log σ held at 1 without a slope."""
    case = synthetic.shipped(ppo, num_steps=256, sampling_error="authors", sampling_error_epochs=2)
    policy = synthetic.random_policy() | {"s": np.array([0.3, 1.4])}
    rng, shape = np.random.default_rng(2), (512, synthetic.B)
    obs = rng.normal(size=(*shape, synthetic.O))
    # Far from what the policy does, so that every gradient is cut.
    action = synthetic.distribution(policy, obs)[0] + 4 + 3 * rng.normal(size=(*shape, synthetic.A))
    present = np.broadcast_to(np.arange(512)[:, None] >= 100, shape)
    params = synthetic.make_learner(case, policy).params
    args = case.core, jax.random.key(5), params, *map(jnp.asarray, (obs, action, present))
    error = jax.jit(lambda: sampling_error.by_authors(*args))()

    obs, action, present = (x.reshape(2048, *x.shape[2:]) for x in (obs, action, present))

    def held(policy):
        return policy | {"s": np.clip(policy["s"], -3, 1)}

    fitted, adam = policy, synthetic.Adam(len(synthetic.vector(policy)))
    for key in jax.random.split(jax.random.key(5), 2):
        for rows in np.asarray(jax.random.permutation(key, 2048)).reshape(2, 1024):
            rows = rows[present[rows]]
            to_mean, to_log_std = synthetic.score(held(fitted), obs[rows], action[rows])
            to_log_std = to_log_std * (np.abs(fitted["s"] + 1) <= 2)
            gradient = synthetic.pull_back(obs[rows], to_mean / len(rows), to_log_std / len(rows))
            assert np.linalg.norm(gradient) > 1
            fitted = synthetic.moved(fitted, 1e-3 * adam.direction(gradient / np.linalg.norm(gradient)))
    assert fitted["s"][0] > 0.3 and fitted["s"][1] == 1.4
    after, before = (synthetic.log_prob(held(p), obs, action)[present].mean() for p in (fitted, policy))
    assert after > before
    np.testing.assert_allclose(error, after - before, rtol=1e-9)


def metrics_of(name, **setup):
    """Names that a method reports."""
    fields = get(name).Setup.__dataclass_fields__
    cut = {field: 2 for field in ("value_minibatches", "fixup_minibatches", "num_minibatches") if field in fields}
    cut = {field: value for field, value in cut.items() if (name, field) not in NOT_CUT}
    algorithm = make(name, Probe("responding"), **{**SMALL, **cut, **setup})
    state = jax.eval_shape(algorithm.init, jax.random.key(0), algorithm.hypers)
    return set(jax.eval_shape(algorithm.step, state, algorithm.hypers)[1])


ON_POLICY = [name for name in list_algorithms() if issubclass(get(name).Setup, on_policy.Setup)]


@pytest.mark.parametrize("name", ON_POLICY)
def test_every_on_policy_method_measures_it_when_asked_to(name):
    assert "sampling_error" in metrics_of(name, sampling_error="last_layer")


def test_it_is_off_unless_asked_for():
    names = metrics_of("ppo")
    assert metrics_of("ppo", sampling_error="authors") - names == {"sampling_error", "action_frequency_gap"}
    assert not any("sampling" in name for name in metrics_of("props"))


SMALL = dict(num_envs=4, num_steps=32, sampling_error_epochs=2)
# A trust-region step, and MDPO's, is on the whole batch.
NOT_CUT = {("trpo", "num_minibatches"), ("mdpo", "num_minibatches")}


def test_the_error_of_a_batch_is_taken_from_the_policy_that_was_to_collect_it():
    """Whatever the update does: PPO's on-policy error on a bandit is that of Wilks' law at any learning rate."""
    env = dataclasses.replace(Probe("constant"))
    setup = dict(num_envs=8, num_steps=32, hidden_sizes=(), sampling_error="last_layer", sampling_error_epochs=300)
    algorithm = make("ppo", env, {"learning_rate": 0.5}, **setup)

    def errors(key):
        state = algorithm.init(key, algorithm.hypers)
        return algorithm.step(state, algorithm.hypers)[1]["sampling_error"]

    found = np.asarray(jax.jit(jax.vmap(errors))(jax.random.split(jax.random.key(0), 100)))
    # One free parameter, the difference of two logits; chi-squared with one degree of freedom.
    assert abs(found.mean() - 1 / 512) < 4 * np.sqrt(2) / 512 / np.sqrt(100)
    assert (found >= 0).all()
