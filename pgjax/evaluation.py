"""What a frozen policy earns: full episodes, raw rewards, nothing of the training run touched."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pgjax.types import Algorithm, PyTree


class Episodes(NamedTuple):
    """Undiscounted return and length in steps of every evaluation episode, [E] each.

    mode_*: the most likely action at every step.  sample_*: actions drawn as in training. Episode i of both starts alike.
    """

    mode_return: jax.Array
    mode_length: jax.Array
    sample_return: jax.Array
    sample_length: jax.Array


def evaluate(algorithm: Algorithm, policy: PyTree, key: jax.Array, num_episodes: int, env_params: PyTree = None) -> Episodes:
    """Plays exactly one episode in each of ``num_episodes`` environments, with the mode and with the sampled policy.

    Counting the first episode of every environment, rather than the first episodes to end, keeps short episodes from being
    counted too often. ``key`` is consumed; ``env_params=None`` means the environment's defaults.
    """
    env = algorithm.env
    if env_params is None:
        env_params = env.default_params
    key_start, key_steps = jax.random.split(key)
    # Both policies side by side in one batch, the mode's half first: the environment compiles once.
    num_envs = 2 * num_episodes
    starts = jax.random.split(key_start, num_episodes)
    env_state, obs = env.reset(jnp.concatenate([starts, starts]), env_params)

    def step(carry):
        t, env_state, obs, alive, return_, length = carry
        key_act, key_env = jax.random.split(jax.random.fold_in(key_steps, t))
        mode = algorithm.act(policy, obs[:num_episodes], None)
        action = jnp.concatenate([mode, algorithm.act(policy, obs[num_episodes:], key_act)])
        env_state, timestep = env.step(jax.random.split(key_env, num_envs), env_state, action, env_params)
        return_ = return_ + jnp.where(alive, timestep.reward, 0)
        length = length + alive
        alive = alive & ~(timestep.terminated | timestep.truncated)
        return t + 1, env_state, timestep.obs, alive, return_, length

    def unfinished(carry):
        t, _, _, alive, _, _ = carry
        return alive.any() & (t < env.max_episode_steps)

    carry = (
        jnp.zeros((), jnp.int32),
        env_state,
        obs,
        jnp.ones(num_envs, bool),
        jnp.zeros(num_envs),
        jnp.zeros(num_envs, jnp.int32),
    )
    _, _, _, _, return_, length = jax.lax.while_loop(unfinished, step, carry)
    return Episodes(return_[:num_episodes], length[:num_episodes], return_[num_episodes:], length[num_episodes:])
