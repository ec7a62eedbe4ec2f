"""Auto-reset in one place: a single environment with honest episode ends becomes the batched contract.

Every adapter describes its library as two unbatched functions and hands them to ``AutoReset``:

    start(key, params)                  -> state, obs
    advance(key, state, action, params) -> state, obs, reward, terminated, truncated, metrics

``advance`` never resets; its ``obs`` is the true successor, and ``terminated`` wins where both flags are set.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.errors import RequestError, close_names
from pgjax.spaces import Box, Space
from pgjax.types import TimeStep

PyTree = Any
RESET_MODES = ("exact", "pool")
# A lane with few environments would otherwise see only a handful of starts between two refreshes.
MIN_POOL_SIZE = 64
# Keeps the stream of the pool apart from that of the first environment, whose key it is derived from.
_POOL_STREAM = 0x706F6F6C


@struct.dataclass
class Pooled:
    """Environment state of reset mode ``"pool"``.

    state: pytree of [B, ...], the environments as they are.
    pool_state, pool_obs: pytree of [M, ...] and [M, *O], M fresh starts shared by the B environments of the lane.
    """

    state: PyTree
    pool_state: PyTree
    pool_obs: jax.Array


class AutoReset:
    """An ``Environment`` (``pgjax.types``) made of one unbatched environment.

    In reset mode ``"exact"`` an episode's end is followed by a start drawn on the spot, which costs one ``start`` per
    step because a vectorised program evaluates both branches. In ``"pool"`` it is followed by a random one of
    ``max(B, 64)`` starts drawn beforehand, which ``refresh`` renews; use it where ``start`` is as dear as a step.

    Args:
        name: public name.
        start: ``(key, params) -> (state, obs [*O])``, the beginning of an episode.
        advance: ``(key, state, action, params) -> (state, obs [*O], reward [], terminated [], truncated [], metrics)``;
            ``metrics`` a flat dict of scalars.
        observation_space, action_space: spaces of one environment.
        max_episode_steps: static upper bound of an episode's length, in steps.
        default_params: pytree of concrete arrays, passed to ``start`` and ``advance``.
        reset_mode: ``"exact"`` or ``"pool"``.
        refresh_size: starts that ``refresh`` renews, a stretch of the pool at a random place; the whole pool if None. For
            environments whose ``start`` costs many steps.
        advance_uses_key: whether ``advance`` draws random numbers. Without one, the step's key goes to the restart
            unsplit, which saves a round of key hashing per step. None traces ``advance`` once to find out.
        source: what the adapter made this of, such as the library's own environment; pictures are drawn from it.
        step_seconds: simulated time of a step, where the environment has a clock.

    Raises:
        RequestError: unknown ``reset_mode``.
        ValueError: the observation that ``start`` returns is not of the space's shape.
        TypeError: while tracing, if ``advance`` returns a state of another structure, shape or kind than it was given.
    """

    host_callback = False

    def __init__(
        self,
        *,
        name: str,
        start: Callable,
        advance: Callable,
        observation_space: Box,
        action_space: Space,
        max_episode_steps: int,
        default_params: PyTree = None,
        reset_mode: str = "exact",
        advance_uses_key: bool | None = None,
        refresh_size: int | None = None,
        source: Any = None,
        step_seconds: float | None = None,
    ):
        if reset_mode not in RESET_MODES:
            raise RequestError(f"reset_mode = {reset_mode!r} is unknown: {close_names(str(reset_mode), RESET_MODES)}")
        self.name = name
        self.observation_space = observation_space
        self.action_space = action_space
        self.max_episode_steps = int(max_episode_steps)
        self.default_params = default_params
        self.reset_mode = reset_mode
        self.refresh_size = refresh_size
        self.source = source
        self.step_seconds = step_seconds
        self._start = start
        self._advance = advance
        if advance_uses_key is None:
            advance_uses_key = self._finds_key_used()
        self._advance_uses_key = advance_uses_key

    def __repr__(self) -> str:
        return f"<{self.name}, reset_mode={self.reset_mode}>"

    def reset(self, key: jax.Array, params: PyTree) -> tuple[PyTree, jax.Array]:
        """Starts B episodes; the start of environment i depends on ``key[i]`` and ``params`` alone.

        Args:
            key: [B] typed keys.
            params: pytree shared by all environments.
        Returns: ``env_state`` and obs [B, *O] float32.
        """
        num_envs = key.shape[0]
        if self.reset_mode == "exact":
            return self._starts(key, params)
        # One vectorised start for both, because compiling it twice can take tens of seconds for a physics engine.
        key_pool = jax.random.fold_in(jax.random.clone(key)[0], _POOL_STREAM)
        key_pool = jax.random.split(key_pool, max(num_envs, MIN_POOL_SIZE))
        states, obs = self._starts(jnp.concatenate([key, key_pool]), params)
        state, pool_state = (jax.tree.map(lambda x: x[:num_envs], states), jax.tree.map(lambda x: x[num_envs:], states))
        return Pooled(state, pool_state, obs[num_envs:]), obs[:num_envs]

    def step(self, key: jax.Array, env_state: PyTree, action: jax.Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        """Advances every environment once and restarts those whose episode ended.

        Args:
            key: [B] typed keys.
            env_state: from ``reset``, ``step`` or ``refresh``.
            action: [B, *A] in the bounds of ``action_space``; neither clipped nor scaled here.
            params: pytree shared by all environments.
        Returns: ``env_state`` and a ``TimeStep``.
        """
        return self.step_presampled(self.presample(key, params), env_state, action, params)

    def presample(self, key: jax.Array, params: PyTree) -> PyTree:
        """All random numbers that steps with these keys will use, drawn in a few large operations.

        ``step_presampled`` with row t of the result equals ``step`` with row t of the keys. A rollout that draws before
        its scan spares every step the hashing of keys, and in mode ``"exact"`` the drawing of starts: on CartPole with
        four environments on a CPU that is two thirds of the rollout's time. Starts that are far larger than their
        observations are left to the steps: a rollout of them would outgrow the rollout itself.

        Args: key: [..., B] typed keys.  Returns: pytree of [..., B, ...].
        """
        flat = key.reshape(-1)
        key_advance, key_restart = None, flat
        if self._advance_uses_key:
            key_advance, key_restart = jax.vmap(lambda key: tuple(jax.random.split(key)))(flat)
        if self.reset_mode == "pool":
            restart = jax.vmap(jax.random.bits)(key_restart)
        else:
            restart = self._starts(key_restart, params) if self._starts_are_small(params) else key_restart
        return jax.tree.map(lambda x: x.reshape(*key.shape, *x.shape[1:]), (key_advance, restart))

    def step_presampled(self, drawn: PyTree, env_state: PyTree, action: jax.Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        """``step`` with random numbers from ``presample``: its result for keys [B], or one row of that for [T, B]."""
        pooled = self.reset_mode == "pool"
        key_advance, restart = drawn
        advanced, timestep = self._advance_all(key_advance, self.running(env_state), action, params)
        _, reward, terminated, truncated, final_obs, metrics = timestep

        if pooled:
            pick = restart % np.uint32(env_state.pool_obs.shape[0])
            fresh, fresh_obs = jax.tree.map(lambda x: x[pick], (env_state.pool_state, env_state.pool_obs))
        else:
            fresh, fresh_obs = restart if isinstance(restart, tuple) else self._starts(restart, params)
        ended = terminated | truncated
        state, obs = jax.tree.map(lambda new, old: _where(ended, new, old), (fresh, fresh_obs), (advanced, final_obs))
        env_state = env_state.replace(state=state) if pooled else state
        return env_state, TimeStep(obs, reward, terminated, truncated, final_obs, metrics)

    def advance(self, key: jax.Array, env_state: PyTree, action: jax.Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        """``step`` with the same keys, but nothing is started anew: for whoever wants to see how an episode ends.

        Returns: ``env_state``, of the last step of an episode too, and a ``TimeStep`` whose ``obs`` is its ``final_obs``.
        What follows after an episode's end means nothing.
        """
        key_advance = jax.vmap(lambda key: jax.random.split(key)[0])(key) if self._advance_uses_key else None
        advanced, timestep = self._advance_all(key_advance, self.running(env_state), action, params)
        return env_state.replace(state=advanced) if self.reset_mode == "pool" else advanced, timestep

    def running(self, env_state: PyTree) -> PyTree:
        """The states of the B environments, as the adapter's ``start`` and ``advance`` have them, [B, ...]."""
        return env_state.state if self.reset_mode == "pool" else env_state

    def _advance_all(self, key: PyTree, state: PyTree, action: jax.Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        advanced, final_obs, reward, terminated, truncated, metrics = jax.vmap(self._advance, (0, 0, 0, None))(
            key, state, action, params
        )
        final_obs = _as(final_obs, jnp.float32)
        terminated = _as(terminated, jnp.bool_)
        truncated = _as(truncated, jnp.bool_) & ~terminated
        timestep = TimeStep(final_obs, _as(reward, jnp.float32), terminated, truncated, final_obs, metrics)
        return _keep_dtypes(advanced, state), timestep

    def refresh(self, key: jax.Array, env_state: PyTree, params: PyTree) -> PyTree:
        """Draws the pool anew from one key, leaving running episodes alone; the identity in mode ``"exact"``."""
        if self.reset_mode == "exact":
            return env_state
        size = env_state.pool_obs.shape[0]
        if self.refresh_size is None or self.refresh_size >= size:
            pool_state, pool_obs = self._starts(jax.random.split(key, size), params)
        else:
            key_place, key_starts = jax.random.split(key)
            place = (jax.random.randint(key_place, (), 0, size) + jnp.arange(self.refresh_size)) % size
            pool_state, pool_obs = jax.tree.map(
                lambda pool, fresh: pool.at[place].set(fresh),
                (env_state.pool_state, env_state.pool_obs),
                self._starts(jax.random.split(key_starts, self.refresh_size), params),
            )
        return env_state.replace(pool_state=pool_state, pool_obs=pool_obs)

    def _starts(self, key: jax.Array, params: PyTree) -> tuple[PyTree, jax.Array]:
        state, obs = jax.vmap(self._start, (0, None))(key, params)
        # Weakly typed leaves (a counter that starts at a Python 0) would change type after the first step.
        return jax.tree.map(lambda x: _as(x, x.dtype), state), _as(obs, jnp.float32)

    def _starts_are_small(self, params: PyTree) -> bool:
        state, obs = jax.eval_shape(lambda params: self._start(jax.random.key(0), params), params)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return size <= max(1024, 4 * obs.size * obs.dtype.itemsize)

    def _finds_key_used(self) -> bool:
        key = jax.random.key(0)
        state, obs = jax.eval_shape(self._start, key, self.default_params)
        if obs.shape != self.observation_space.shape:
            raise ValueError(
                f"{self.name}: start returns an observation of shape {obs.shape}, "
                f"its observation_space says {self.observation_space.shape}"
            )
        action = jax.ShapeDtypeStruct(self.action_space.shape, self.action_space.dtype)
        return trace_with_key(self._advance, key, state, action, self.default_params)[1]


def trace_with_key(function: Callable, key: jax.Array, *args) -> tuple[PyTree, bool]:
    """Shapes that ``function(key, *args)`` returns, and whether it reads its key at all (it may err towards yes)."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(key, *args)
    key_var = closed.jaxpr.invars[0]
    read = [*(v for eqn in closed.jaxpr.eqns for v in eqn.invars), *closed.jaxpr.outvars]
    return shapes, any(v is key_var for v in read)


def _as(x, dtype) -> jax.Array:
    """``x`` as a strongly typed array of ``dtype``; typed keys pass as they are."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else jax.lax.convert_element_type(x, dtype)


def _where(flag: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(flag.reshape(flag.shape + (1,) * (new.ndim - flag.ndim)), new, old)


def _keep_dtypes(new: PyTree, old: PyTree) -> PyTree:
    """``new`` with the dtypes of ``old``, so that the state has one type for ever and can be carried by a scan."""

    def keep(path, o, n):
        n = jnp.asarray(n)
        if n.shape != o.shape or not _converts(n.dtype, o.dtype):
            raise TypeError(
                f"the state's leaf {jax.tree_util.keystr(path) or 'itself'} is {o.dtype}{list(o.shape[1:])} at the "
                f"start of an episode and {n.dtype}{list(n.shape[1:])} after a step; make the two alike"
            )
        return _as(n, o.dtype)

    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            f"the state changes its structure in a step, from {jax.tree.structure(old)} to {jax.tree.structure(new)}"
        )
    return jax.tree_util.tree_map_with_path(keep, old, new)


def _converts(source, target) -> bool:
    if source == target:
        return True
    if any(jnp.issubdtype(d, jax.dtypes.extended) for d in (source, target)):
        return False
    return np.can_cast(source, target, "same_kind")
