"""Boundary tests for any environment: does it keep the contract of ``pgjax.types.Environment``?"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.spaces import Box, Discrete
from pgjax.types import Environment, TimeStep

PyTree = Any
# Starts drawn to learn what a fresh start looks like.
_NUM_SAMPLES = 64
# Below this chance, a coincidence of two random starts is taken for a fault.
_CHANCE = 1e-3
_TIME_LIMITS = ("max_steps_in_episode", "max_episode_steps")
# Steps compared one by one between one lane and a vectorised program of two.
_NUM_COMPARED = 10


class Report(NamedTuple):
    """What ``check_env`` saw.

    env_steps: steps taken by all environments together. terminated, truncated: episodes that ended so.
    random_starts: whether episodes begin differently.
    unseen: clauses that could not be tested, because nothing of the kind happened in these steps.
    """

    name: str
    env_steps: int
    terminated: int
    truncated: int
    random_starts: bool
    unseen: tuple[str, ...]


def check_env(env: Environment, num_envs: int = 3, num_steps: int | None = None, key: jax.Array | None = None) -> Report:
    """Runs ``env`` with random actions under jit, vmap and scan, and checks every clause of the contract.

    The time limit in force is taken from the field ``max_steps_in_episode`` or ``max_episode_steps`` of the parameters,
    else from ``env.max_episode_steps``; a truncation at any other moment counts as a fault.

    Args:
        env: what to check.
        num_envs: environments per lane, at least 2.
        num_steps: length of the rollout; None reaches past the time limit, or stops at 2000 steps.
        key: one key; None means ``jax.random.key(0)``.

    Returns: a ``Report``; its ``unseen`` tells what these steps could not show.

    Raises:
        AssertionError: one line that names the environment, the clause and what was found.
    """
    if num_envs < 2:
        raise ValueError(f"num_envs = {num_envs} must be at least 2, so that environments can be told apart")
    key = jax.random.key(0) if key is None else key
    check = _Checker(getattr(env, "name", type(env).__name__))

    _check_description(env, check)
    params = env.default_params
    with check.clause("the time limit in force is between 1 and max_episode_steps"):
        limit = _time_limit(env, params)
        check(1 <= limit <= env.max_episode_steps, f"limit {limit}, max_episode_steps {env.max_episode_steps}")
    if num_steps is None:
        num_steps = min(env.max_episode_steps + 2, 2000)

    start_keys, other_keys, step_keys, actions, key_refresh, key_sample = _draw(env, key, num_envs, num_steps)

    with check.clause("reset works under jit"):
        reset = jax.jit(env.reset)
        env_state, obs = reset(start_keys, params)
    with check.clause("reset returns obs [B, *O] float32"):
        _check_array(check, obs, (num_envs, *env.observation_space.shape), jnp.float32)
    with check.clause("the start of environment i depends on key[i] and params alone"):
        other_obs = reset(other_keys, params)[1]
        check(_close(obs[0], other_obs[0]), "the first start changed with the other keys")

    step = _Counted(env.step)
    action = actions[0, 0]
    with check.clause("step works under jit"):
        next_state, timestep = step(step_keys[0, 0], env_state, action, params)
    _check_timestep(check, env, timestep, num_envs)
    with check.clause("env_state keeps its structure, shapes and dtypes in a step"):
        check(_types(next_state) == _types(env_state), _difference(env_state, next_state))
    with check.clause("new params do not recompile"):
        step(step_keys[0, 0], env_state, action, _changed(params))
        step(step_keys[0, 0], env_state, action, jax.tree.map(jnp.asarray, params))
        check(step.traces == 1, "step was traced again; give default_params a fixed type, such as jnp.float32(1.0)")
    with check.clause("the same key, state and action give the same step"):
        again = step(step_keys[0, 0], env_state, action, params)
        check(_equal((next_state, timestep), again), "two calls differ")
    _check_refresh(env, check, step, key_refresh, step_keys[0, 0], env_state, action, params)

    lane_params = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), jnp.asarray(b)]), params, _changed(params))
    with check.clause("reset and step work under jit, vmap over lanes with their own params, and scan"):
        first_obs, steps = _rollouts(env)(jnp.stack([start_keys, start_keys]), step_keys, actions, lane_params)
    with check.clause("a lane under vmap equals its single run"):
        _check_lane(check, step, env_state, step_keys[0], actions[0], params, steps)
    return _check_episodes(env, check, limit, first_obs, steps, key_sample, params)


_MEMBERS = (
    *("name", "observation_space", "action_space", "max_episode_steps", "default_params", "host_callback"),
    *("reset", "step", "refresh"),
)


class _Checker:
    """Turns a failed check, or whatever is raised while a clause is tested, into one line naming the clause."""

    def __init__(self, name: str):
        self._name = name
        self._clause = ""

    @contextmanager
    def clause(self, text: str):
        self._clause = text
        try:
            yield
        except _BrokenError:
            raise
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise AssertionError(f"{self._name}: broken clause: {text}: {type(error).__name__}: {line}") from error

    def __call__(self, holds: Any, found: str) -> None:
        if not holds:
            raise _BrokenError(f"{self._name}: broken clause: {self._clause}: {found}")


class _BrokenError(AssertionError):
    pass


class _Counted:
    """A jitted function that counts how often it is traced."""

    def __init__(self, function: Callable):
        self.traces = 0

        def counted(*args):
            self.traces += 1
            return function(*args)

        self._call = jax.jit(counted)

    def __call__(self, *args):
        return self._call(*args)


def _check_description(env: Environment, check: _Checker) -> None:
    with check.clause("the environment has every member of the contract"):
        missing = [n for n in _MEMBERS if not hasattr(env, n)]
        check(not missing, f"missing: {', '.join(missing)}")
        check(isinstance(env.name, str), f"name is {env.name!r}")
        check(isinstance(env.observation_space, Box), f"observation_space is {env.observation_space!r}, not a Box")
        check(isinstance(env.action_space, Box | Discrete), f"action_space is {env.action_space!r}")
        check(isinstance(env.max_episode_steps, int), f"max_episode_steps is {env.max_episode_steps!r}, not an int")
        check(isinstance(env.host_callback, bool), f"host_callback is {env.host_callback!r}, not a bool")
    with check.clause("params are a pytree of arrays"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(env.default_params):
            check(hasattr(leaf, "dtype"), f"default_params{jax.tree_util.keystr(path)} is a {type(leaf).__name__}")


def _draw(env: Environment, key: jax.Array, num_envs: int, num_steps: int) -> tuple[jax.Array, ...]:
    """All keys and actions of the check, in one program: start keys and others that share only the first, step keys and
    actions of two lanes, a key for ``refresh`` and one for samples.
    """

    @jax.jit
    def draw(key):
        key_start, key_rollout, key_action, key_refresh, key_sample = jax.random.split(key, 5)
        drawn = jax.random.split(key_start, 2 * num_envs - 1)
        other = jnp.concatenate([drawn[:1], drawn[num_envs:]])
        step_keys = jax.random.split(key_rollout, (2, num_steps, num_envs))
        actions = _random_action(env.action_space, key_action, (2, num_steps, num_envs))
        return drawn[:num_envs], other, step_keys, actions, key_refresh, key_sample

    return draw(key)


def _check_array(check: _Checker, array: Any, shape: tuple[int, ...], dtype: Any, what: str = "obs") -> None:
    check(hasattr(array, "dtype"), f"{what} is {type(array).__name__}, not an array")
    found, wanted = f"{array.dtype}{list(array.shape)}", f"{jnp.dtype(dtype)}{list(shape)}"
    check(found == wanted, f"{what} is {found}, not {wanted}")


def _check_timestep(check: _Checker, env: Environment, timestep: TimeStep, num_envs: int) -> None:
    with check.clause("step returns a TimeStep with the contract's shapes and dtypes"):
        check(isinstance(timestep, TimeStep), f"it is a {type(timestep).__name__}")
        obs_shape = (num_envs, *env.observation_space.shape)
        for field, shape, dtype in (
            ("obs", obs_shape, jnp.float32),
            ("final_obs", obs_shape, jnp.float32),
            ("reward", (num_envs,), jnp.float32),
            ("terminated", (num_envs,), jnp.bool_),
            ("truncated", (num_envs,), jnp.bool_),
        ):
            _check_array(check, getattr(timestep, field), shape, dtype, field)
        for metric, value in timestep.metrics.items():
            check(value.shape[:1] == (num_envs,), f"metrics[{metric!r}] has shape {value.shape}, not [B]")


def _check_refresh(env, check, step, key, step_keys, env_state, action, params) -> None:
    with check.clause("refresh keeps the structure, shapes and dtypes of env_state"):
        refreshed = jax.jit(env.refresh)(key, env_state, params)
        check(_types(refreshed) == _types(env_state), _difference(env_state, refreshed))
    with check.clause("refresh leaves running episodes alone"):
        before, after = (step(step_keys, s, action, params)[1] for s in (env_state, refreshed))
        same = all(_equal(getattr(before, f), getattr(after, f)) for f in ("final_obs", "reward", "terminated"))
        check(same, "the step after it differs")


def _check_lane(check, step, env_state, step_keys, actions, params, steps: TimeStep) -> None:
    for t in range(min(_NUM_COMPARED, len(actions))):
        env_state, single = step(step_keys[t], env_state, actions[t], params)
        for field in ("final_obs", "reward", "terminated", "truncated", "obs"):
            check(_close(getattr(steps, field)[0, t], getattr(single, field)), f"{field} differs at step {t + 1}")


def _check_episodes(env, check, limit: int, first_obs, steps: TimeStep, key, params) -> Report:
    """Clauses about a rollout of two lanes: first_obs [2, B, *O], steps [2, T, B, ...]."""
    first_obs, obs, final_obs = (np.asarray(x) for x in (first_obs, steps.obs, steps.final_obs))
    terminated, truncated = np.asarray(steps.terminated), np.asarray(steps.truncated)
    ended = terminated | truncated
    with check.clause("terminated and truncated are never both true"):
        check(not (terminated & truncated).any(), f"both are at {_where(terminated & truncated)}")
    with check.clause("final_obs equals obs while the episode goes on"):
        differ = (final_obs != obs) & ~(np.isnan(final_obs) & np.isnan(obs))
        differ = differ.reshape(*ended.shape, -1).any(-1) & ~ended
        check(not differ.any(), f"they differ at {_where(differ)}")
    with check.clause("observations and rewards are finite"):
        for what, array in (("obs", obs), ("final_obs", final_obs), ("reward", np.asarray(steps.reward))):
            bad = np.asarray(~np.isfinite(array).reshape(*ended.shape, -1).all(-1))
            check(not bad.any(), f"{what} is not at {_where(bad)}")
    _check_lengths(check, limit, ended, truncated)
    # Lane 0 alone has the parameters that the sampled starts were drawn with.
    random_starts, unseen = _check_starts(env, check, first_obs[0], obs[0], final_obs[0], ended[0], key, params)
    unseen += ["termination"] * (not terminated.any()) + ["truncation at the time limit"] * (not truncated.any())
    return Report(env.name, ended.size, int(terminated.sum()), int(truncated.sum()), random_starts, tuple(unseen))


def _check_lengths(check: _Checker, limit: int, ended: np.ndarray, truncated: np.ndarray) -> None:
    length = np.zeros(ended.shape[::2], int)  # [2, B]
    for t in range(ended.shape[1]):
        length += 1
        with check.clause("no episode is longer than the time limit"):
            check((length <= limit).all(), f"one has {length.max()} steps, the limit is {limit}")
        with check.clause("truncation comes exactly at the time limit"):
            early = truncated[:, t] & (length != limit)
            check(not early.any(), f"an episode was truncated after {length[early][:1]} steps, the limit is {limit}")
        length[ended[:, t]] = 0


def _check_starts(env, check, first_obs, obs, final_obs, ended, key, params) -> tuple[bool, list[str]]:
    """Compares what follows an episode's end with starts drawn by ``reset``. obs [T, B, *O], ended [T, B]."""
    sampled, second = (np.asarray(x) for x in _sampled_starts(env, key, params))
    equal_pairs = [_close(a, b) for a, b in zip(sampled, np.roll(sampled, 1, axis=0), strict=True)]
    random_starts = not all(equal_pairs)
    ends = np.argwhere(ended)
    if not len(ends):
        return random_starts, ["fresh starts"]
    fresh = obs[ended]

    with check.clause("after the end of an episode obs is a fresh start"):
        low, high = _plausible(sampled)
        bad = ((fresh < low) | (fresh > high)).reshape(len(fresh), -1).any(-1)
        check(not bad.any(), f"it is no start after the end at {_where(ended, bad)}")
    with check.clause("after the end of an episode the state is that of the fresh start"):
        low, high = _plausible(second)
        follows = np.array([[t + 1, i] for t, i in ends if t + 1 < len(obs)], int).reshape(-1, 2)
        after = final_obs[follows[:, 0], follows[:, 1]]
        bad = ((after < low) | (after > high)).any()
        check(not bad, "the step after a fresh start is unlike the first step of an episode")
    if not random_starts:
        return False, []

    # Both clauses fail only where chance would hardly do the same.
    if np.mean(equal_pairs) ** len(ends) > _CHANCE:
        return True, ["starts that differ between episodes"]
    with check.clause("after the end of an episode obs is a fresh start"):
        check(not all(map(_close, fresh, final_obs[ended])), "it is final_obs every time")
    with check.clause("every episode has a start of its own"):
        previous = first_obs.copy()
        same = []
        for t, i in ends:
            same.append(_close(previous[i], obs[t, i]))
            previous[i] = obs[t, i]
        check(not all(same), "an environment begins each of its episodes alike")
    return True, []


def _sampled_starts(env: Environment, key: jax.Array, params: PyTree) -> tuple[jax.Array, jax.Array]:
    """Observations of fresh starts and of the step after them, both [M, *O]."""

    @jax.jit
    def sample(key, params):
        key_start, key_step, key_action = jax.random.split(key, 3)
        state, obs = env.reset(jax.random.split(key_start, _NUM_SAMPLES), params)
        action = _random_action(env.action_space, key_action, (_NUM_SAMPLES,))
        return obs, env.step(jax.random.split(key_step, _NUM_SAMPLES), state, action, params)[1].final_obs

    return sample(key, params)


def _plausible(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds that hardly any further sample exceeds, per entry of an observation.

    Frames have entries that are rarely set, so the range of all entries is added to that of each one.
    """
    low, high = samples.min(0), samples.max(0)
    margin = (high - low) + (high - low).max(initial=0.0) + 1e-4 * (1 + np.abs(low) + np.abs(high))
    return low - margin, high + margin


def _rollouts(env: Environment) -> Callable:
    @jax.jit
    @jax.vmap
    def rollout(start_keys, step_keys, actions, params):
        def body(env_state, inputs):
            key, action = inputs
            env_state, timestep = env.step(key, env_state, action, params)
            return env_state, timestep._replace(metrics={})

        env_state, obs = env.reset(start_keys, params)
        return obs, jax.lax.scan(body, env_state, (step_keys, actions))[1]

    return rollout


def _random_action(space, key: jax.Array, leading: tuple[int, ...]) -> jax.Array:
    if isinstance(space, Discrete):
        return jax.random.randint(key, leading, 0, space.num, jnp.int32)
    low, high = (np.clip(bound, -1e3, 1e3) for bound in space.bounds)
    return jax.random.uniform(key, leading + space.shape, jnp.float32, low, high)


def _time_limit(env: Environment, params: PyTree) -> int:
    for field in _TIME_LIMITS:
        limit = params.get(field) if isinstance(params, dict) else getattr(params, field, None)
        if limit is not None:
            return math.ceil(limit)
    return env.max_episode_steps


def _changed(params: PyTree) -> PyTree:
    """``params`` with slightly larger floats, as new arrays; time limits stay."""

    def change(path, leaf):
        fixed = any(str(getattr(p, "name", getattr(p, "key", ""))) in _TIME_LIMITS for p in path)
        fixed = fixed or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf) if fixed else jnp.asarray(leaf * 1.001, leaf.dtype)

    return jax.tree_util.tree_map_with_path(change, params)


def _types(tree: PyTree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _difference(before: PyTree, after: PyTree) -> str:
    if jax.tree.structure(before) != jax.tree.structure(after):
        return "the structure changed"
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, a), b in leaves:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"env_state{jax.tree_util.keystr(path)} was {a.dtype}{list(a.shape)} and is {b.dtype}{list(b.shape)}"
    return ""


def _equal(a: PyTree, b: PyTree) -> bool:
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return np.array_equal(np.asarray(x), np.asarray(y), equal_nan=jnp.issubdtype(x.dtype, jnp.inexact))

    return all(jax.tree.leaves(jax.tree.map(same, a, b)))


def _close(a: Any, b: Any) -> bool:
    """Equal but for rounding: programs of other batch sizes round differently."""
    return np.allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-3, atol=1e-5, equal_nan=True)


def _where(flags: np.ndarray, among: np.ndarray | None = None) -> str:
    """The first place where the flags [..., T, B] are set; ``among`` picks some of the set ones."""
    places = np.argwhere(flags) if among is None else np.argwhere(flags)[among]
    return f"step {places[0][-2] + 1} of environment {places[0][-1]}" if len(places) else "no place"
