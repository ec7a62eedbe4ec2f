"""The toy tasks: what every move pays, worked out by hand, and optima by dynamic programming over their tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.checks.environment import check_env
from pgjax.envs import list_envs, make_env
from pgjax.envs import toy as toy_tasks
from pgjax.errors import RequestError

NAMES = [entry.name for entry in list_envs() if entry.library == "toy"]
# One of each kind; the others differ in size alone.
KINDS = ("toy/TwoStep", "toy/GridWorld-5x5", "toy/Chain-7", "toy/Cliff-3x6", "toy/Bandit5", "toy/Discrete2D-10")


def play(env, actions, params=None, seed=0):
    """Rewards, terminated, truncated, final_obs of one environment under these actions; stops where the episode ends."""
    params = env.default_params if params is None else params
    state, obs = env.reset(jax.random.key(seed)[None], params)
    step = jax.jit(env.step)
    rewards, seen = [], [np.asarray(obs[0])]
    for number, action in enumerate(actions):
        key = jax.random.fold_in(jax.random.key(seed + 1), number)[None]
        state, timestep = step(key, state, jnp.array([action], jnp.int32), params)
        rewards.append(float(timestep.reward[0]))
        seen.append(np.asarray(timestep.final_obs[0]))
        if timestep.terminated[0] or timestep.truncated[0]:
            break
    return rewards, bool(timestep.terminated[0]), bool(timestep.truncated[0]), seen


def test_the_list_is_the_modules():
    assert {f"toy/{name}" for name in toy_tasks.registered()} == set(NAMES)


@pytest.mark.parametrize("name", [n if n in KINDS[:2] else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_the_contract_of_environments(name):
    report = check_env(make_env(name))
    assert report.terminated + report.truncated > 0
    assert report.random_starts == name.startswith("toy/Discrete2D")


@pytest.mark.parametrize(("actions", "rewards"), [((0, 0), (0, 2)), ((0, 1), (0, 0.5)), ((1, 0), (0, 1)), ((1, 1), (0, 1))])
def test_two_step_pays_in_the_second(actions, rewards):
    found, terminated, truncated, seen = play(make_env("toy/TwoStep"), actions)
    assert tuple(found) == rewards and terminated and not truncated
    # Of seven states, the first, one after the first choice, and one of four ends.
    assert [obs.argmax() for obs in seen] == [0, 1 + actions[0], 3 + 2 * actions[0] + actions[1]]
    assert all(obs.sum() == 1 and obs.shape == (7,) for obs in seen)


UP, DOWN, LEFT, RIGHT = range(4)
WALKS = {
    "to the right corner": ("GridWorld-5x5", (DOWN, DOWN, RIGHT, RIGHT), (-0.01, -0.01, -0.01, 1), "terminated"),
    "to the left corner": ("GridWorld-5x5", (LEFT, UP, UP, LEFT), (-0.01, -0.01, -0.01, 0.5), "terminated"),
    "against a wall": ("GridWorld-5x5", (UP,) * 15, (-0.01,) * 15, "truncated"),
    "chain, right": ("Chain-7", (1, 1, 1), (-0.01, -0.01, 1), "terminated"),
    "chain, left": ("Chain-7", (1, 0, 0, 0, 0), (-0.01,) * 4 + (0.8,), "terminated"),
    "chain, to and fro": ("Chain-7", (0, 1) * 14, (-0.01,) * 28, "truncated"),
    "over the cliff": ("Cliff-3x6", (RIGHT,), (-100,), "terminated"),
    "along the cliff": ("Cliff-3x6", (UP, *(RIGHT,) * 5, DOWN), (-1,) * 6 + (0,), "terminated"),
    "stays": ("Cliff-3x6", (LEFT,) * 18, (-1,) * 18, "truncated"),
}


@pytest.mark.parametrize("case", WALKS)
def test_walks(case):
    name, actions, expected, end = WALKS[case]
    rewards, terminated, truncated, _ = play(make_env(f"toy/{name}"), actions)
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert (terminated, truncated) == (end == "terminated", end == "truncated")


def optimum(table):
    """The best undiscounted return within the time limit, by dynamic programming from the end."""
    value = np.zeros(len(table.terminal))
    for _ in range(table.limit):
        follow = np.where(table.terminal[table.successor], 0, value[table.successor])
        value = (table.reward + follow).max(1)
    return value[table.start]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("TwoStep", 2), ("GridWorld-5x5", 0.97), ("Chain-7", 0.98), ("Chain-15", 0.94), ("Cliff-3x6", -6), ("Cliff-5x10", -10)],
)
def test_optima(name, expected):
    np.testing.assert_allclose(optimum(make_env(f"toy/{name}").source), expected, rtol=1e-6)


def test_arms_of_a_bandit():
    env = make_env("toy/Bandit20")
    mean, std = (env.default_params[name] for name in ("mean", "std"))
    assert mean[-1] == 1 and std[-1] == np.float32(0.1)
    assert ((mean[:-1] >= 0) & (mean[:-1] <= 0.5)).all() and ((std >= 0) & (std <= 1)).all() and len(set(mean)) == 20
    arms = jnp.array([3, 19], jnp.int32).repeat(2000)
    keys = jax.random.split(jax.random.key(0), 4000)
    state, obs = env.reset(keys, env.default_params)
    _, timestep = jax.jit(env.step)(keys, state, arms, env.default_params)
    assert (obs == 1).all() and timestep.terminated.all()
    for arm, reward in zip((3, 19), np.asarray(timestep.reward).reshape(2, -1), strict=True):
        # Within four standard errors.
        assert abs(reward.mean() - mean[arm]) < 4 * std[arm] / np.sqrt(2000)
        assert abs(reward.std() - std[arm]) < 4 * std[arm] / np.sqrt(4000)
    other = make_env("toy/Bandit20", seed=1).default_params["mean"]
    assert (other[:-1] != mean[:-1]).all()


def test_steps_in_the_plane():
    env = make_env("toy/Discrete2D-10")
    rewards, _, truncated, seen = play(env, [0, 3, 9] + [2] * 47, seed=3)
    assert truncated and len(rewards) == 50
    for obs, after, action in zip(seen, seen[1:], [0, 3, 9], strict=False):
        angle = 2 * np.pi * action / 9
        np.testing.assert_allclose(after[:2] - obs[:2], 0.05 * np.array([np.sin(angle), np.cos(angle)]), atol=1e-6)
        np.testing.assert_array_equal(after[2:], obs[2:])
    distances = [np.linalg.norm(obs[:2] - obs[2:]) for obs in seen[1:]]
    np.testing.assert_allclose(rewards, -np.array(distances), rtol=1e-5)


def test_the_goal_in_the_plane_is_never_reached_at_once_and_ends_the_episode():
    env = make_env("toy/Discrete2D-100")
    state, obs = jax.jit(env.reset)(jax.random.split(jax.random.key(0), 20_000), env.default_params)
    distance = np.linalg.norm(obs[:, :2] - obs[:, 2:], axis=1)
    assert distance.min() >= 0.05 and np.abs(obs).max() <= 1 and distance.min() < 0.1
    # Straight at the goal from the nearest start: one step is enough.
    near = int(distance.argmin())
    x, y = np.asarray(obs[near, 2:] - obs[near, :2])
    action = round(np.arctan2(x, y) % (2 * np.pi) / (2 * np.pi) * 99)
    one = jax.tree.map(lambda x: x[near : near + 1], state)
    _, timestep = env.step(jax.random.key(0)[None], one, jnp.array([action], jnp.int32), env.default_params)
    assert timestep.terminated[0] and timestep.reward[0] > -0.05


def test_options():
    env = make_env("toy/GridWorld-5x5", episode_length=30)
    assert env.max_episode_steps == env.default_params["max_steps_in_episode"] == 30
    for name, options, words in (
        ("toy/TwoStep", {"seed": 3}, "'seed' is unknown to toy/TwoStep"),
        ("toy/Bandit5", {"seed": -1}, "seed = -1"),
        ("toy/Bandit5", {"episode_length": 0}, "episode_length = 0"),
        ("toy/Bandit6", {}, "did you mean Bandit"),
    ):
        with pytest.raises(RequestError, match=words):
            make_env(name, **options)
