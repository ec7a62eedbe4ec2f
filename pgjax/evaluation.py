"""What a frozen policy earns: full episodes, raw rewards, nothing of the training run touched."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pgjax.types import Algorithm, PyTree, TimeStep


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
    key_steps, play = begin(algorithm, key, num_episodes, env_params)
    play = jax.lax.while_loop(
        lambda play: play.alive.any() & (play.t < env.max_episode_steps),
        lambda play: play_step(algorithm, policy, key_steps, play, env_params)[0],
        play,
    )
    return_, length = play.return_, play.length
    return Episodes(return_[:num_episodes], length[:num_episodes], return_[num_episodes:], length[num_episodes:])


class Play(NamedTuple):
    """Evaluation under way: E episodes of the mode policy, then the same E starts with the sampled one.

    t: int32 [], steps done.  env_state: of 2E environments.  obs: [2E, *O].  alive: [2E] whether the first episode goes on.
    return_, length: [2E], of the first episode so far.
    """

    t: jax.Array
    env_state: PyTree
    obs: jax.Array
    alive: jax.Array
    return_: jax.Array
    length: jax.Array


def begin(algorithm: Algorithm, key: jax.Array, num_episodes: int, env_params: PyTree = None) -> tuple[jax.Array, Play]:
    """The starts of ``evaluate`` with this key, and the key of all of its steps; for who wants to see them one by one."""
    env = algorithm.env
    key_start, key_steps = jax.random.split(key)
    # Both policies side by side in one batch, the mode's half first: the environment compiles once.
    num_envs = 2 * num_episodes
    starts = jax.random.split(key_start, num_episodes)
    env_state, obs = env.reset(jnp.concatenate([starts, starts]), env.default_params if env_params is None else env_params)
    return key_steps, Play(
        t=jnp.zeros((), jnp.int32),
        env_state=env_state,
        obs=obs,
        alive=jnp.ones(num_envs, bool),
        return_=jnp.zeros(num_envs),
        length=jnp.zeros(num_envs, jnp.int32),
    )


def play_step(
    algorithm: Algorithm,
    policy: PyTree,
    key_steps: jax.Array,
    play: Play,
    env_params: PyTree = None,
    step: Callable | None = None,
) -> tuple[Play, TimeStep, jax.Array]:
    """One step of ``evaluate``, of every episode.

    Args: key_steps: from ``begin``, the same in all steps.  step: in place of the environment's own, with its arguments.
    Returns: what goes on, the environment's answer and the actions [2E, *A].
    """
    env = algorithm.env
    env_params = env.default_params if env_params is None else env_params
    num_envs = len(play.alive)
    key_act, key_env = jax.random.split(jax.random.fold_in(key_steps, play.t))
    mode = algorithm.act(policy, play.obs[: num_envs // 2], None)
    action = jnp.concatenate([mode, algorithm.act(policy, play.obs[num_envs // 2 :], key_act)])
    env_state, timestep = (step or env.step)(jax.random.split(key_env, num_envs), play.env_state, action, env_params)
    played = Play(
        t=play.t + 1,
        env_state=env_state,
        obs=timestep.obs,
        alive=play.alive & ~(timestep.terminated | timestep.truncated),
        return_=play.return_ + jnp.where(play.alive, timestep.reward, 0),
        length=play.length + play.alive,
    )
    return played, timestep, action
