"""Gymnasium's MuJoCo tasks on C MuJoCo: step for step what Gymnasium itself does."""

import warnings

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import pgjax
from pgjax.envs.mujoco import quiet_loading
from pgjax.envs.mujoco.tasks import TASKS

gymnasium = pytest.importorskip("gymnasium")

NUM_ENVS = 2


def rollout(env, num_steps, seed=0, num_envs=NUM_ENVS):
    """Start, and every state and time step under random actions within the bounds; one compiled program."""

    @jax.jit
    def run(key):
        key_start, key_steps, key_action = jax.random.split(key, 3)
        low, high = env.action_space.bounds
        shape = (num_steps, num_envs, *env.action_space.shape)
        actions = jax.random.uniform(key_action, shape, jnp.float32, low, high)
        drawn = env.presample(jax.random.split(key_steps, (num_steps, num_envs)), env.default_params)
        start, obs = env.reset(jax.random.split(key_start, num_envs), env.default_params)

        def body(state, inputs):
            state, timestep = env.step_presampled(inputs[0], state, inputs[1], env.default_params)
            return state, (state, timestep)

        states, timesteps = jax.lax.scan(body, start, (drawn, actions))[1]
        return start, obs, actions, states, timesteps

    return jax.tree.map(np.asarray, run(jax.random.key(seed)))


def numbers(env, bits):
    """qpos and qvel in float64 from a state's bits [..., W]."""
    state = np.ascontiguousarray(bits).view(np.float64)
    nq, nv = env.model.nq, env.model.nv
    return state[..., 1 : 1 + nq], state[..., 1 + nq : 1 + nq + nv]


def make_original(name, **options):
    """Gymnasium's environment, without what it and MuJoCo say about dated versions and models."""
    with warnings.catch_warnings(), quiet_loading():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*out of date.*")
        return gymnasium.make(name, **options)


def begin(original, qpos, qvel):
    """Starts an episode of Gymnasium's environment in a given state."""
    original.reset(seed=0)
    inner = original.unwrapped
    mujoco.mj_resetData(inner.model, inner.data)
    inner.set_state(qpos, qvel)
    return inner._get_obs()


def check_fidelity(name, num_steps, **options):
    env = pgjax.make_env(f"mujoco/{name}", **options)
    start, first_obs, actions, states, steps = rollout(env, num_steps)
    episodes = 0
    for i in range(NUM_ENVS):
        original = make_original(name, **options)
        obs = begin(original, *numbers(env, start.bits[i]))
        np.testing.assert_allclose(first_obs[i], obs.astype(np.float32), rtol=1e-6, atol=1e-7)
        for t in range(num_steps):
            obs, reward, terminated, truncated, info = original.step(actions[t, i])
            where = f"{name}, environment {i}, step {t}"
            np.testing.assert_array_equal(steps.final_obs[t, i], obs.astype(np.float32), err_msg=where)
            np.testing.assert_allclose(steps.reward[t, i], reward, rtol=3e-6, atol=3e-6, err_msg=where)
            assert steps.terminated[t, i] == terminated, where
            assert steps.truncated[t, i] == (truncated and not terminated), where
            # Version 4 gave other names, and in places other meanings, to what it reports.
            if name.endswith("-v5"):
                for key, value in steps.metrics.items():
                    np.testing.assert_allclose(value[t, i], info[key], rtol=3e-6, atol=3e-6, err_msg=f"{where}, {key}")
            if terminated or truncated:
                episodes += 1
                obs = begin(original, *numbers(env, states.bits[t, i]))
            # The physics itself, in float64: not a bit of difference.
            qpos, qvel = numbers(env, states.bits[t, i])
            inner = original.unwrapped
            np.testing.assert_array_equal(qpos, inner.data.qpos, err_msg=where)
            np.testing.assert_array_equal(qvel, inner.data.qvel, err_msg=where)
            np.testing.assert_allclose(steps.obs[t, i], obs.astype(np.float32), rtol=1e-6, atol=1e-7, err_msg=where)
    return episodes


@pytest.mark.parametrize("name", sorted(TASKS))
def test_physics_c_is_gymnasium_step_by_step(name):
    check_fidelity(name, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TASKS))
def test_physics_c_is_gymnasium_through_whole_episodes(name):
    assert check_fidelity(name, 1100) >= NUM_ENVS
