"""Adapter for MuJoCo Playground: its tasks, and anyone's ``MjxEnv``, under the contract of ``pgjax.types.Environment``.

None of Playground's training wrappers is used. They lose the final observation, and with ``full_reset=True`` they also
replace the ``info`` that says that a step was truncated, so that every time limit looks like a failure. The adapter counts
steps itself, and ``AutoReset`` does the rest.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.envs import PLAYGROUND_IMPLS
from pgjax.envs.auto_reset import AutoReset
from pgjax.envs.mjx_tools import flat_obs, light_imports, quiet_loading, use_warp, with_attribute
from pgjax.envs.options import check_count, fit
from pgjax.errors import RequestError, close_names
from pgjax.spaces import Box

_TASKS = "mujoco_playground._src"
# The robots of the first two need a download. The registry asks both for their names, the wrappers want Brax.
with light_imports(*(f"{_TASKS}.{part}" for part in ("locomotion", "manipulation", "registry", "wrapper", "wrapper_torch"))):
    import mujoco_playground
    from mujoco import mjx
    from mujoco.mjx import warp as mjx_warp

PyTree = Any
# Control steps that a task simulates to find a start. There the pool is renewed in small parts: all of it would cost
# more than the rollout.
_STEPS_TO_START = {"CheetahRun": 200}
_SHARE_RENEWED = 16


@struct.dataclass
class Params:
    """What can be swept, randomised or vmapped over lanes in a Playground environment.

    model: MJX's ``Model``, the physics: masses, gears, friction, gravity.
    max_episode_steps: int32 [], the time limit in force; at most the environment's static ``max_episode_steps``.
    """

    model: PyTree
    max_episode_steps: jax.Array


@struct.dataclass
class State:
    """playground: Playground's own state. steps: int32 [], steps since the start of the episode."""

    playground: PyTree
    steps: jax.Array


def from_playground(
    env,
    episode_length: int = 1000,
    reset_mode: str = "pool",
    name: str | None = None,
    action_repeat: int = 1,
    refresh_size: int | None = None,
) -> AutoReset:
    """An ``Environment`` made of a MuJoCo Playground environment.

    Actions are in [-1, 1], which Playground's tasks scale to their actuators; they are passed on as they are. A dict of
    observations is flattened and joined in the order of its sorted keys. ``TimeStep.metrics`` has Playground's own, as
    floats, and ``unstable``: 1 where the simulation went non-finite. Such a step ends the episode as a termination, as
    Playground has it; its reward is 0 and its observation the last finite one, so that no NaN reaches the learner.
    What a task derives from its model in its constructor stays as it was when ``params.model`` is changed.

    Args:
        env: an instance of ``mujoco_playground.MjxEnv`` that keeps its model in ``_mjx_model``, as all tasks do, without
            training wrappers. It is never changed.
        episode_length: time limit in steps.
        reset_mode: ``"pool"`` or ``"exact"``, see ``AutoReset``; exact costs a full reset in each step.
        name: public name; ``playground/`` and the class's name if None.
        action_repeat: how often a step repeats its action; rewards are added up, and a failure ends the repetition.
        refresh_size: starts of the pool that ``refresh`` renews, see ``AutoReset``; all if None.

    Raises:
        RequestError: unknown ``reset_mode``, an episode length or repetition below 1, or an ``env`` without a model.
    """
    check_count("episode_length", episode_length)
    check_count("action_repeat", action_repeat)
    task = env.unwrapped
    if not hasattr(task, "_mjx_model"):
        raise RequestError(f"env = {type(task).__name__} keeps no model in _mjx_model; Playground's tasks do")
    # On the host, because MJX ties its arrays to one device, and lanes may run on several.
    model = jax.tree.map(np.asarray, task._mjx_model)
    share, join = _shared_arrays(env) if _is_warp(model) else (lambda state: state, lambda state: state)

    def start(key, params):
        state = _with_model(env, params.model).reset(key)
        return State(share(state), jnp.int32(0)), flat_obs(state.obs)

    def advance(key, state, action, params):
        del key
        act = _with_model(env, params.model)
        stepped, reward, ended, unstable = _step(act, join(state.playground), action)
        for _ in range(action_repeat - 1):
            more = _step(act, join(share(stepped)), action)
            held = (stepped, jnp.zeros_like(reward), ended, unstable)
            stepped, added, ended, unstable = jax.tree.map(lambda old, new, over=ended: _hold(over, old, new), held, more)
            reward = reward + added
        steps = state.steps + 1
        truncated = (steps >= params.max_episode_steps) & ~ended
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in stepped.metrics.items()}
        metrics = {k: jnp.where(unstable, 0.0, v) for k, v in metrics.items()} | {"unstable": jnp.float32(unstable)}
        return State(share(stepped), steps), flat_obs(stepped.obs), reward, ended, truncated, metrics

    params = Params(model, np.asarray(episode_length, np.int32))  # pyright: ignore[reportArgumentType]
    obs = jax.eval_shape(lambda key: start(key, params)[1], jax.random.key(0))
    return AutoReset(
        name=name or f"playground/{type(task).__name__}",
        start=start,
        advance=advance,
        observation_space=Box(obs.shape),
        action_space=Box((int(env.action_size),), -1.0, 1.0),
        max_episode_steps=int(episode_length),
        default_params=params,
        reset_mode=reset_mode,
        advance_uses_key=False,
        refresh_size=refresh_size,
        source=env,
        step_seconds=float(env.dt) * action_repeat,
    )


def _step(env, state, action):
    """One control step: ``(state, reward [], ended [], unstable [])``; observation and reward are finite."""
    # Tasks write into the metrics of the state they are given; the copy keeps ours as it was.
    stepped = env.step(jax.tree.map(lambda x: x, state), action)
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((stepped.obs, stepped.reward))]
    unstable = ~jnp.stack(finite).all()
    obs = jax.tree.map(lambda new, old: _hold(unstable, old, new), stepped.obs, state.obs)
    reward = jnp.where(unstable, 0.0, stepped.reward)
    return stepped.replace(obs=obs, reward=reward), reward, (stepped.done > 0.5) | unstable, unstable


def _hold(flag, old, new):
    """``old`` where the flag [] is set, else ``new``."""
    return jnp.where(flag, old, new)


OPTIONS = ("impl", "reset_mode", "episode_length", "action_repeat")
# Of a task's configuration: what is an option by itself, and pictures for observations, which need a GPU renderer.
_NO_OVERRIDES = (*OPTIONS, "vision", "vision_config")


def registered() -> list[str]:
    """Names of the DM Control Suite in Playground, with those its users registered."""
    return list(mujoco_playground.dm_control_suite.ALL_ENVS)


def factory(short_name: str):
    """A function whose parameters are the settings of a task that are options of ``make``."""

    def settings():
        pass

    names = _settings(short_name)
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=names[name]) for name in names]
    settings.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return settings


def make(
    short_name: str,
    *,
    name: str,
    impl: str = "jax",
    reset_mode: str = "pool",
    episode_length: int | None = None,
    action_repeat: int | None = None,
    **overrides,
):
    """``from_playground`` of a registered task.

    Args:
        impl: of the physics, ``"jax"`` or ``"warp"``. Playground's own default is Warp, made for NVIDIA's GPUs.
        episode_length: time limit in steps; None for the task's own, which counts every repetition of an action.
        action_repeat: None for the task's own.
        overrides: other settings of the task, such as ``ctrl_dt`` and ``sim_dt`` in seconds.

    Raises: RequestError for an unknown ``impl``, Warp where it is missing, or a value that does not fit its setting.
    """
    if impl not in PLAYGROUND_IMPLS:
        raise RequestError(f"impl = {impl!r} is unknown: {close_names(str(impl), PLAYGROUND_IMPLS)}")
    config = mujoco_playground.dm_control_suite.get_default_config(short_name)
    overrides = {key: _fit(key, value, config[key]) for key, value in overrides.items()}
    ctrl_dt, sim_dt = (overrides.get(key, config[key]) for key in ("ctrl_dt", "sim_dt"))
    if round(ctrl_dt / sim_dt) < 1 or abs(ctrl_dt / sim_dt - round(ctrl_dt / sim_dt)) > 1e-3:
        raise RequestError(f"ctrl_dt = {ctrl_dt} is not a whole number of sim_dt = {sim_dt}; change one of them")
    action_repeat = config.action_repeat if action_repeat is None else action_repeat
    check_count("action_repeat", action_repeat)
    limit = -(-config.episode_length // action_repeat) if episode_length is None else episode_length
    if impl == "warp":
        use_warp("impl = 'warp'", "impl = 'jax'")
    with quiet_loading():
        env = mujoco_playground.dm_control_suite.load(short_name, config, {"impl": impl, **overrides})
    # The whole pool where a start is cheap.
    share = _SHARE_RENEWED if short_name in _STEPS_TO_START else None
    return from_playground(env, limit, reset_mode, name, action_repeat, share)


def _settings(short_name: str) -> dict[str, Any]:
    config = mujoco_playground.dm_control_suite.get_default_config(short_name)
    return {key: config[key] for key in config if key not in _NO_OVERRIDES and not isinstance(config[key], Mapping)}


def _fit(key: str, value: Any, default: Any) -> Any:
    """``value`` in the type of the setting that it replaces; every number here is a size or a duration."""
    value = fit(key, value, default)
    if not isinstance(value, bool) and (value < 0 or (isinstance(value, float) and value == 0)):
        raise RequestError(f"{key} = {value!r} must be positive")
    return value


def _with_model(env, model: PyTree):
    """A copy of ``env`` with another model, whichever wrappers are around it."""
    if "env" in vars(env):
        return with_attribute(env, "env", _with_model(env.env, model))
    return with_attribute(env, "_mjx_model", jax.tree.map(jnp.asarray, model))


def _shared_arrays(env):
    """``(share, join)``: Playground's state without, and again with, what Warp keeps once for a whole batch.

    Warp's data has arrays without an axis for the environments, above all the contacts of all of them in one list. They
    are written anew in every step, so they need not be carried; and an axis put in front would copy them B times.
    """
    kept = jax.eval_shape(env.reset, jax.random.key(0)).data._impl
    kind, names = type(kept), [f.name for f in dataclasses.fields(kept)]
    common = {n: getattr(kept, n) for n in names if n in mjx_warp.types.DATA_NON_VMAP}

    def share(state):
        own = {n: getattr(state.data._impl, n) for n in names if n not in common}
        return state.replace(data=(state.data.replace(_impl=None), own))

    def join(state):
        data, own = state.data
        blank = {n: jnp.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x for n, x in common.items()}
        return state.replace(data=data.replace(_impl=kind(**own, **blank)))

    return share, join


def _is_warp(model: PyTree) -> bool:
    return model.impl == mjx.Impl.WARP
