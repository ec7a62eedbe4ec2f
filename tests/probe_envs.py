"""Six tiny environments whose values and optimal actions are known, each with discrete and with continuous actions.

They separate the faults of a learner: a critic that fails ``constant`` cannot fit a number, one that passes it and
fails ``observed`` ignores the observation, and so on. They implement ``pgjax.types.Environment`` directly, without the
auto-reset that the adapters share.

| probe      | obs             | steps | reward                    | value at discount gamma, acting optimally   |
|------------|-----------------|-------|---------------------------|---------------------------------------------|
| constant   | 1               | 1     | 1                         | 1                                           |
| endless    | 1               | 5     | 1, then cut, not ended    | 1 / (1 - gamma), if the cut is bootstrapped |
| observed   | -1 or 1, random | 1     | obs                       | obs                                         |
| delayed    | 0, then 1       | 2     | 0, then 1                 | gamma, then 1                               |
| acting     | 1               | 1     | best action 1, or 0.5     | 1; continuous 0                             |
| responding | -1 or 1, random | 1     | best: obs > 0, or obs / 2 | 1; continuous 0                             |

The reward of a discrete action is 1 if it is the best one, else -1; of a continuous one -(action - best)^2. In the
other probes every action is as good as any other.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.spaces import Box, Discrete
from pgjax.types import TimeStep

NAMES = ("constant", "endless", "observed", "delayed", "acting", "responding")
_STEPS = {"endless": 5, "delayed": 2}


@struct.dataclass
class State:
    """obs: [B, 1]. steps: [B] int32."""

    obs: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Probe:
    kind: str
    continuous: bool = False
    default_params = None
    host_callback = False

    @property
    def name(self) -> str:
        return f"probe/{self.kind}-{'continuous' if self.continuous else 'discrete'}"

    @property
    def observation_space(self) -> Box:
        return Box((1,), -1.0, 1.0)

    @property
    def action_space(self) -> Box | Discrete:
        return Box((1,), -1.0, 1.0) if self.continuous else Discrete(2)

    @property
    def max_episode_steps(self) -> int:
        return _STEPS.get(self.kind, 1)

    def reset(self, key, params):
        if self.kind in ("observed", "responding"):
            obs = jax.vmap(lambda k: jax.random.rademacher(k, (1,), jnp.float32))(key)
        else:
            obs = jnp.full((key.shape[0], 1), 0.0 if self.kind == "delayed" else 1.0)
        return State(obs, jnp.zeros(key.shape[0], jnp.int32)), obs

    def step(self, key, env_state, action, params):
        obs, steps = env_state.obs, env_state.steps + 1
        if self.kind in ("observed", "delayed"):
            reward = obs[:, 0]
        elif self.kind in ("constant", "endless"):
            reward = jnp.ones_like(obs[:, 0])
        elif self.continuous:
            reward = -jnp.square(action - self.optimal_action(obs))[:, 0]
        else:
            reward = jnp.where(action == self.optimal_action(obs), 1.0, -1.0)
        ended = steps >= self.max_episode_steps
        final_obs = jnp.ones_like(obs) if self.kind == "delayed" else obs
        fresh, fresh_obs = self.reset(key, params)
        next_obs = jnp.where(ended[:, None], fresh_obs, final_obs)
        cut = ended if self.kind == "endless" else jnp.zeros_like(ended)
        timestep = TimeStep(next_obs, reward, ended & ~cut, cut, final_obs, {})
        return State(next_obs, jnp.where(ended, fresh.steps, steps)), timestep

    def refresh(self, key, env_state, params):
        return env_state

    def optimal_action(self, obs: jax.Array) -> jax.Array:
        """The best action for obs [N, 1]: [N] int32, or [N, 1] if continuous. For four of the probes, any action is."""
        best = obs if self.kind == "responding" else jnp.ones_like(obs)
        return best / 2 if self.continuous else (best[:, 0] > 0).astype(jnp.int32)

    def value(self, obs: np.ndarray, gamma: float) -> np.ndarray:
        """Value of obs [N, 1] under the optimal policy, [N] in reward units."""
        obs = np.asarray(obs)[:, 0]
        if self.kind == "endless":
            return np.full_like(obs, 1 / (1 - gamma))
        if self.kind == "observed":
            return obs
        if self.kind == "delayed":
            return np.where(obs > 0.5, 1.0, gamma)
        return np.full_like(obs, 0.0 if self.continuous and self.kind in ("acting", "responding") else 1.0)


PROBES = [Probe(kind, continuous) for kind in NAMES for continuous in (False, True)]
