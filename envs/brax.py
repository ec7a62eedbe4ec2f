"""Adapter for Brax: any of its environments under the contract of ``pgjax.types.Environment``.

None of Brax's wrappers is used: its EpisodeWrapper mixes fall and time limit in one ``done``, and its AutoResetWrapper
replaces the final observation and restarts every environment from its own first start for ever. The adapter counts
steps itself, and ``AutoReset`` does the rest.
"""

import contextlib
import copy
import inspect
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.envs.auto_reset import AutoReset
from pgjax.envs.mjx_tools import flat_obs, light_imports, quiet_loading
from pgjax.errors import RequestError
from pgjax.spaces import Box

with light_imports():
    import brax.envs
    import brax.fluid

PyTree = Any

if "a_min" not in inspect.signature(jnp.clip).parameters:
    # Brax 0.14.2 names an argument of clip that JAX 0.10 no longer has; without this swimmer cannot move.
    brax.fluid.jp = types.SimpleNamespace(**{**vars(jnp), "clip": lambda x, a_min: jnp.maximum(x, a_min)})


@struct.dataclass
class Params:
    """What can be swept, randomised or vmapped over lanes in a Brax environment.

    sys: Brax's ``System``, the physics: masses, gears, friction, gravity. None for an environment without one.
    max_episode_steps: int32 [], the time limit in force; at most the environment's static ``max_episode_steps``.
    """

    sys: PyTree
    max_episode_steps: jax.Array


@struct.dataclass
class State:
    """brax: Brax's own state. steps: int32 [], steps since the start of the episode."""

    brax: PyTree
    steps: jax.Array


def from_brax(env, episode_length: int = 1000, reset_mode: str = "pool", name: str | None = None) -> AutoReset:
    """An ``Environment`` made of a Brax environment.

    Actions are in [-1, 1], which Brax's tasks scale to their actuators; they are passed on as they are. A dict of
    observations is flattened and joined in the order of its sorted keys. Brax's own metrics are ``TimeStep.metrics``.
    What a task derives from its system in its constructor stays as it was when ``params.sys`` is changed.

    Args:
        env: an instance of ``brax.envs.Env`` without Brax's training wrappers. It is never changed.
        episode_length: time limit in steps.
        reset_mode: ``"pool"`` or ``"exact"``, see ``AutoReset``; exact costs a full reset in each step.
        name: public name; ``brax/`` and the class's name in lower case if None.

    Raises:
        RequestError: unknown ``reset_mode`` or an episode length below 1.
    """
    if episode_length < 1:
        raise RequestError(f"episode_length = {episode_length} must be at least 1")
    # A Python number today and an array tomorrow would compile twice.
    sys = jax.tree.map(lambda x: x if np.ndim(x) else np.asarray(x, jnp.result_type(x))[()], getattr(env, "sys", None))

    def start(key, params):
        state = _with_sys(env, params.sys).reset(key)
        return State(state, jnp.int32(0)), flat_obs(state.obs)

    def advance(key, state, action, params):
        del key
        # Brax's tasks write into the metrics of the state they are given; the copy keeps ours as it was.
        stepped = _with_sys(env, params.sys).step(jax.tree.map(lambda x: x, state.brax), action)
        steps = state.steps + 1
        terminated = jnp.asarray(stepped.done) > 0.5
        truncated = (steps >= params.max_episode_steps) & ~terminated
        return State(stepped, steps), flat_obs(stepped.obs), stepped.reward, terminated, truncated, dict(stepped.metrics)

    params = Params(sys, np.asarray(episode_length, np.int32))  # pyright: ignore[reportArgumentType]
    obs = jax.eval_shape(lambda key: start(key, params)[1], jax.random.key(0))
    return AutoReset(
        name=name or f"brax/{type(env.unwrapped).__name__.lower()}",
        start=start,
        advance=advance,
        observation_space=Box(obs.shape),
        action_space=Box((int(env.action_size),), -1.0, 1.0),
        max_episode_steps=episode_length,
        default_params=params,
        reset_mode=reset_mode,
        advance_uses_key=False,
        source=env,
        step_seconds=float(env.dt) if hasattr(env, "dt") else None,
    )


OPTIONS = ("backend", "reset_mode", "episode_length", "n_frames")


def registered() -> list[str]:
    """Names that Brax knows, with those its users registered."""
    return list(brax.envs._envs)


def factory(short_name: str):
    """The class behind one of Brax's names; its parameters are options of ``make``."""
    return brax.envs._envs[short_name]


def make(short_name: str, *, name: str, reset_mode: str = "pool", episode_length: int = 1000, **options):
    """``from_brax`` of a registered environment; ``options`` go to its constructor."""
    with _quiet_loading():
        env = brax.envs.get_environment(short_name, **options)
    return from_brax(env, episode_length, reset_mode, name)


@contextlib.contextmanager
def _quiet_loading():
    """Loading a model, Brax warns that it is no longer maintained, and MuJoCo that the model is dated."""
    with warnings.catch_warnings(), quiet_loading():
        warnings.filterwarnings("ignore", message="Brax System")
        yield


def _with_sys(env, sys: PyTree):
    """A copy of ``env`` with another system; the given environment must not see a traced value."""
    env = copy.copy(env)
    if isinstance(env, brax.envs.Wrapper):
        env.env = _with_sys(env.env, sys)
    elif sys is not None:
        env.sys = sys
    return env
