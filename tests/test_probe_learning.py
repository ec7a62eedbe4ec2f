"""Every algorithm on six problems whose values and best actions are known, so that a failure names the faulty part.

All probes and seeds are lanes of one program per algorithm and kind of action: which probe a lane plays is a traced
environment parameter. A bound holds for every seed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import NAMES, Probe

from pgjax import make_train
from pgjax.algorithms import list_algorithms, make

GAMMA, SEEDS = 0.9, 3
VALUE_PROBES = ("constant", "endless", "observed", "delayed")
ACTION_PROBES = ("acting", "responding")
# Observations to ask about, for each probe.
ASK = {name: np.array([[1.0]]) for name in NAMES}
ASK.update(observed=np.array([[-1.0], [1.0]]), responding=np.array([[-1.0], [1.0]]), delayed=np.array([[0.0], [1.0]]))


@dataclasses.dataclass(frozen=True)
class AnyProbe(Probe):
    """The probe whose number in ``NAMES`` is ``params``."""

    kind: str = "any"
    default_params = np.int32(0)
    max_episode_steps = 5

    def _of_each(self, function):
        results = [function(Probe(name, self.continuous)) for name in NAMES]
        return lambda number: jax.tree.map(lambda *leaves: jnp.stack(leaves)[number], *results)

    def reset(self, key, params):
        return self._of_each(lambda probe: probe.reset(key, None))(params)

    def step(self, key, env_state, action, params):
        return self._of_each(lambda probe: probe.step(key, env_state, action, None))(params)


@pytest.mark.parametrize("continuous", [False, True])
def test_probes_are_what_their_table_says(continuous):
    env, num_envs = AnyProbe(continuous=continuous), 8
    keys = jax.random.split(jax.random.key(0), (6, num_envs))

    def play(number):
        probes = [Probe(name, continuous) for name in NAMES]
        env_state, obs = env.reset(keys[0], number)

        def step(carry, key):
            env_state, obs = carry
            best = jnp.stack([probe.optimal_action(obs) for probe in probes])[number]
            env_state, timestep = env.step(key, env_state, best, number)
            return (env_state, timestep.obs), (obs, timestep)

        return jax.lax.scan(step, (env_state, obs), keys)[1]

    all_obs, all_steps = jax.tree.map(np.asarray, jax.jit(jax.vmap(play))(jnp.arange(len(NAMES))))
    for number, name in enumerate(NAMES):
        obs, steps = all_obs[number], jax.tree.map(lambda x, number=number: x[number], all_steps)
        probe = Probe(name, continuous)
        assert set(obs.ravel()) == set(ASK[name].ravel()) or name in ("constant", "endless", "acting")
        ended = (np.arange(6) + 1) % probe.max_episode_steps == 0
        np.testing.assert_array_equal(steps.truncated, np.tile((ended & (name == "endless"))[:, None], (1, num_envs)))
        np.testing.assert_array_equal(steps.terminated, np.tile((ended & (name != "endless"))[:, None], (1, num_envs)))
        np.testing.assert_array_equal(steps.obs[:-1], obs[1:])
        np.testing.assert_array_equal(steps.final_obs[~ended], steps.obs[~ended])
        # Bellman: what a step pays and what follows is worth what the table says.
        value, after = (probe.value(x.reshape(-1, 1), GAMMA).reshape(6, num_envs) for x in (obs, steps.final_obs))
        np.testing.assert_allclose(value, steps.reward + GAMMA * np.where(steps.terminated, 0, after), rtol=1e-5)


SETUP = dict(num_envs=16, num_steps=10, hidden_sizes=(8,))
HYPERS = dict(gamma=GAMMA, learning_rate=0.01, entropy_coef=0.0)
# id -> iterations, and fields of Setup that have to fit the small batch
RUNS = {
    "reinforce": (400, {}),
    "a2c": (400, {}),
    "ppo": (150, {}),
    "ppo_kl": (150, {}),
    "trpo": (100, {"value_minibatches": 4}),
    "vmpo": (200, {}),
    "mdpo": (100, {"value_minibatches": 4}),
    "spo": (100, {}),
    "fixpo": (100, {"num_envs": 16, "num_steps": 10, "num_minibatches": 4, "fixup_minibatches": 2, "normalize_value": False}),
    "dpo": (150, {}),
    "props": (150, {"behavior_num_steps": 5, "behavior_epochs": 4, "behavior_minibatches": 2}),
    "ros": (150, {}),
}
# Methods that learn from a replay buffer, in test_off_policy.py, or from one transition at a time, in test_incremental.py; by a
# learned rule, in test_lpg.py.
ELSEWHERE = {"sac", "mdpo_off", "avg", "iac", "sac1", "td3_1", "lpg"}


def test_every_algorithm_has_a_row():
    assert {*RUNS, *ELSEWHERE} == set(list_algorithms())


def trained(name, env, probes, iterations, **setup):
    """Networks and final learners of lanes [probe, seed], and what evaluates a lane."""
    algorithm = make(name, env, HYPERS, **{**SETUP, **setup})
    train = make_train(algorithm, iterations * 160, log_every=iterations)
    seeds = jax.random.split(jax.random.key(1), SEEDS)
    lanes = jax.jit(jax.vmap(jax.vmap(train, (0, None, None)), (None, None, 0)))
    state, metrics = lanes(seeds, algorithm.hypers, jnp.array([NAMES.index(probe) for probe in probes]))
    assert not metrics["nonfinite"].any()

    def ask(learner, policy, obs):
        return algorithm.core.networks.value(learner.params, obs), algorithm.act(policy, obs, None)

    ask = jax.jit(jax.vmap(jax.vmap(ask, (0, 0, None))))
    obs = jnp.stack([jnp.asarray(np.resize(ASK[probe], (2, 1)), jnp.float32) for probe in probes])
    values, actions = ask(state.learner, algorithm.policy(state), obs)
    return {probe: (np.asarray(obs[i]), np.asarray(values[i]), np.asarray(actions[i])) for i, probe in enumerate(probes)}


# Methods whose heads for discrete actions wait for `make test-all`: they share PPO's loop and its distributions.
LATER = ("ppo_kl", "mdpo", "spo", "fixpo", "dpo", "props")
KINDS = [
    pytest.param((name, continuous), marks=pytest.mark.slow if name in LATER and not continuous else (), id=f"{name}-{kind}")
    for name in RUNS
    for continuous, kind in ((False, "discrete"), (True, "continuous"))
]


@pytest.fixture(scope="module", params=KINDS)
def answers(request):
    name, continuous = request.param
    iterations, setup = RUNS[name]
    return continuous, trained(name, AnyProbe(continuous=continuous), NAMES, iterations, **setup)


@pytest.mark.parametrize("probe", VALUE_PROBES)
def test_the_critic_learns_the_value(answers, probe):
    continuous, results = answers
    obs, values, _ = results[probe]
    exact = Probe(probe, continuous).value(obs, GAMMA)
    # Within 5 per cent of the largest value that occurs, for every seed.
    np.testing.assert_allclose(values, np.tile(exact, (SEEDS, 1)), atol=0.05 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("probe", ACTION_PROBES)
def test_the_actor_learns_the_best_action(answers, probe):
    continuous, results = answers
    obs, _, actions = results[probe]
    best = np.asarray(Probe(probe, continuous).optimal_action(obs))
    # The very action if there are two; within 0.1 of it on [-1, 1] if there is a continuum. For every seed.
    np.testing.assert_allclose(actions, np.broadcast_to(best, actions.shape), atol=0.1 if continuous else 0, rtol=0)


def test_a_cut_that_counts_as_an_end_hides_what_comes_after():
    """One observation for all five steps: their mean value without bootstrap at the cut, far below 1 / (1 - gamma)."""
    results = trained("a2c", AnyProbe(), ("endless",), 400, boundary="terminate", num_steps=10)
    _, values, _ = results["endless"]
    # With lambda-returns V = mean over k of [returns over k steps], bootstrapped from V itself within the episode.
    lam, value = 0.95, 0.0
    for _ in range(200):
        targets, later = [], 0.0
        for step in range(5):
            target = 1 + GAMMA * (0 if step == 0 else (1 - lam) * value + lam * later)
            targets.append(target)
            later = target
        value = np.mean(targets)
    assert value < 4
    np.testing.assert_allclose(values, value, atol=0.05 * 10, rtol=0)
