"""Adapter for gymnax >= 1.0.1: any of its environments under the contract of ``pgjax.types.Environment``.

gymnax's own ``step`` resets by itself and may set both flags of an episode's end. Here its unbatched pieces
``reset_env``, ``step_env`` and ``is_truncated`` are used, and ``AutoReset`` does the rest.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.envs.auto_reset import AutoReset, trace_with_key
from pgjax.envs.deferred import deferred_imports
from pgjax.errors import RequestError
from pgjax.spaces import Box, Discrete, Space

# Only gymnax's renderers use these, and they cost several seconds.
with deferred_imports("matplotlib", "matplotlib.pyplot", "matplotlib.colors", "matplotlib.animation", "seaborn", "pandas"):
    import gymnax

if not hasattr(gymnax.environments.environment.Environment, "is_truncated"):
    raise RequestError("the installed gymnax does not tell time limits from termination: pip install 'gymnax>=1.0.1'")

PyTree = Any


def from_gymnax(
    env, params: PyTree = None, reset_mode: str = "exact", episode_length: int | None = None, name: str | None = None
) -> AutoReset:
    """An ``Environment`` made of a gymnax environment.

    Observations become one float32 array: a Discrete one is one-hot, a Dict or Tuple is flattened and joined, frames
    keep their shape. Actions are passed on as they are. gymnax's ``discount`` is dropped, ``terminated`` says the same.

    Args:
        env: a gymnax environment, an instance of ``gymnax.environments.environment.Environment``.
        params: default parameters, gymnax's own ``EnvParams``; None means ``env.default_params``.
        reset_mode: ``"exact"`` or ``"pool"``, see ``AutoReset``.
        episode_length: replaces the time limit ``params.max_steps_in_episode``, in steps.
        name: public name; ``gymnax/`` and gymnax's own name if None.

    Raises:
        RequestError: unknown ``reset_mode``, an episode length below 1, or a space this suite has no counterpart of.
        ValueError: the environment's observations are not of its own space's shape.
    """
    params = env.default_params if params is None else params
    if episode_length is not None:
        if episode_length < 1:
            raise RequestError(f"episode_length = {episode_length} must be at least 1")
        limit = type(params.max_steps_in_episode)(episode_length)
        params = params.replace(max_steps_in_episode=limit)
    # Arrays of fixed type: a Python float today and an array tomorrow would compile twice. NumPy ones stay concrete, so
    # that default parameters are folded into the program.
    params = jax.tree.map(_concrete, params)
    gymnax_space = env.observation_space(params)
    observe = _observer(gymnax_space)

    def start(key, params):
        obs, state = env.reset_env(key, params)
        return jax.tree.map(lambda x, dtype: jnp.asarray(x, dtype), state, dtypes), observe(obs)

    def advance(key, state, action, params):
        obs, state, reward, terminated, info = env.step_env(key, state, action, params)
        terminated = jnp.reshape(terminated, ())
        truncated = jnp.reshape(env.is_truncated(state, params), ())
        metrics = {k: v for k, v in info.items() if k != "discount" and jnp.ndim(v) == 0}
        return state, observe(obs), jnp.reshape(reward, ()), terminated, truncated, metrics

    action_space = _space(env.action_space(params), "action")
    observation_space = _observation_box(gymnax_space)
    # gymnax starts counters as Python numbers and bools as ints; the type they have after a step is the one to carry.
    key = jax.random.key(0)
    obs, first = jax.eval_shape(lambda: (lambda obs, state: (observe(obs), state))(*env.reset_env(key, params)))
    if obs.shape != observation_space.shape:
        raise ValueError(f"{env.name} returns an observation of shape {obs.shape}, not of {observation_space.shape}")
    action = jax.ShapeDtypeStruct(action_space.shape, action_space.dtype)
    second, key_used = trace_with_key(lambda *args: env.step_env(*args)[1], key, first, action, params)
    dtypes = jax.tree.map(lambda a, b: jnp.promote_types(a.dtype, b.dtype), first, second)

    return AutoReset(
        name=name or f"gymnax/{env.name}",
        start=start,
        advance=advance,
        observation_space=observation_space,
        action_space=action_space,
        max_episode_steps=math.ceil(params.max_steps_in_episode),
        default_params=params,
        reset_mode=reset_mode,
        advance_uses_key=key_used,
        source=env,
        step_seconds=_seconds(params),
    )


OPTIONS = ("reset_mode", "episode_length")


def registered() -> list[str]:
    """Names that gymnax knows, with those its users registered."""
    return list(gymnax.registered_envs)


def factory(short_name: str):
    """The callable behind one of gymnax's names; its parameters are options of ``make``."""
    return gymnax.registration._registry[short_name]


def make(short_name: str, *, name: str, reset_mode: str = "exact", episode_length: int | None = None, **options):
    """``from_gymnax`` of a registered environment; ``options`` go to its constructor."""
    env, params = gymnax.make(short_name, **options)
    return from_gymnax(env, params, reset_mode=reset_mode, episode_length=episode_length, name=name)


def _concrete(leaf):
    if isinstance(leaf, jax.Array | np.ndarray) and np.ndim(leaf):
        return jnp.asarray(leaf)  # stays indexable by traced numbers
    leaf = np.asarray(leaf)
    kind = {"f": np.float32, "i": np.int32, "u": np.uint32, "b": np.bool_}.get(leaf.dtype.kind, leaf.dtype)
    return kind(leaf) if isinstance(kind, type) else leaf


def _seconds(params) -> float | None:
    # The names that classic control has for it; the other environments have no clock.
    names = [name for name in ("tau", "dt") if np.ndim(getattr(params, name, ())) == 0 and hasattr(params, name)]
    return float(getattr(params, names[0])) if names else None


def _kind(space) -> str:
    return type(space).__name__


def _bound(bound, shape) -> list[float]:
    """One number per entry; gymnax writes the largest float where it means no bound."""
    bound = np.broadcast_to(np.asarray(bound, np.float32), shape).ravel()
    largest = np.finfo(np.float32).max
    return [float(np.sign(b) * np.inf) if abs(b) >= largest else float(b) for b in bound]


def _box(shape, low: list[float], high: list[float]) -> Box:
    def same(bound):
        return bound[0] if len(set(bound)) == 1 else tuple(bound)

    return Box(tuple(int(n) for n in shape), same(low), same(high))


def _space(space, what: str) -> Space:
    if _kind(space) == "Discrete":
        return Discrete(int(space.n))
    if _kind(space) == "Box":
        return _box(space.shape, _bound(space.low, space.shape), _bound(space.high, space.shape))
    raise RequestError(f"{what} space {_kind(space)} is not supported; it must be Discrete or Box")


def _children(space) -> list[tuple[Any, Any]]:
    return list(space.spaces.items()) if isinstance(space.spaces, dict) else list(enumerate(space.spaces))


def _observation_box(space) -> Box:
    if _kind(space) == "Discrete":
        return Box((int(space.n),), 0.0, 1.0)
    if _kind(space) in ("Dict", "Tuple"):
        low, high = [], []
        for _, child in _children(space):
            box = _observation_box(child)
            low += box.bounds[0].ravel().tolist()
            high += box.bounds[1].ravel().tolist()
        return _box((len(low),), low, high)
    box = _space(space, "observation")
    assert isinstance(box, Box)  # Discrete was dealt with above
    return box


def _observer(space):
    """Function from one of gymnax's observations in ``space`` to one float32 array."""
    if _kind(space) == "Discrete":
        return lambda obs: jax.nn.one_hot(obs, int(space.n), dtype=jnp.float32)
    if _kind(space) in ("Dict", "Tuple"):
        parts = [(at, _observer(child)) for at, child in _children(space)]

        def join(obs):
            pick = (lambda at: getattr(obs, at)) if not isinstance(obs, dict | tuple | list) else obs.__getitem__
            return jnp.concatenate([jnp.ravel(observe(pick(at))) for at, observe in parts])

        return join
    return lambda obs: jnp.asarray(obs, jnp.float32)
