"""Replay: the latest transitions of a lane, sampled uniformly with replacement. Storage is flashbax's item buffer.

Its functions change the buffer in place where it is the carry of a loop, so a step costs the same at any capacity. A select
over it, or a branch that returns it, would copy it at every step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flashbax import make_item_buffer

from pgjax.spaces import Box, Discrete, Space
from pgjax.types import PyTree


class Transition(NamedTuple):
    """Transitions, with the same axes in front of each field.

    obs [*O] raw.  action [A] in [-1, 1], or int32 [].  reward [] in the environment's units.
    terminated [] bool: the task itself ended. A cut by a time limit is none, and its successor's value counts.
    final_obs [*O]: the successor before any reset.
    """

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    final_obs: jax.Array


class Replay:
    """A buffer of ``capacity`` transitions as pure functions. The newest take the place of the oldest."""

    def __init__(self, capacity: int, batch_size: int, observation_space: Box, action_space: Space):
        self._spaces = observation_space, action_space
        self._buffer: Any = make_item_buffer(
            max_length=capacity, min_length=1, sample_batch_size=batch_size, add_sequences=True, add_batches=True
        )

    def init(self) -> PyTree:
        """An empty buffer."""
        observation_space, action_space = self._spaces
        obs = jnp.zeros(observation_space.shape, jnp.float32)
        action = jnp.zeros(action_space.shape, jnp.int32 if isinstance(action_space, Discrete) else jnp.float32)
        return self._buffer.init(Transition(obs, action, jnp.zeros(()), jnp.zeros((), bool), obs))

    def add(self, state: PyTree, transitions: Transition) -> PyTree:
        """Stores transitions [K, B], at most ``capacity``, in this order."""
        return self._buffer.add(state, transitions)

    def sample(self, state: PyTree, key: jax.Array) -> Transition:
        """Transitions [batch_size], any that are stored; consumes ``key``. There must be at least one."""
        return self._buffer.sample(state, key).experience
