"""One tiny environment in gymnax's and in Brax's terms, for the clauses about the ends of episodes.

An episode starts at a random x in [0, 1) and time 0; x grows by ``stride`` per step; it terminates when the time
reaches ``ends_at``, and the library's time limit stands apart from that. The observation is (x, time).
"""

import brax.envs
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

LIMIT = 3


@struct.dataclass
class GymnaxState(environment.EnvState):
    x: jax.Array


@struct.dataclass
class GymnaxParams(environment.EnvParams):
    ends_at: int = 99
    stride: float = 1.0
    max_steps_in_episode: int = LIMIT


class GymnaxToy(environment.Environment):
    name = "Toy-v0"

    @property
    def default_params(self):
        return GymnaxParams()

    def reset_env(self, key, params):
        state = GymnaxState(time=0, x=jax.random.uniform(key))
        return self.get_obs(state), state

    def step_env(self, key, state, action, params):
        state = GymnaxState(time=state.time + 1, x=state.x + params.stride)
        terminated = self.is_terminated(state, params)
        return self.get_obs(state), state, state.x, terminated, {"discount": 1.0 - terminated, "height": state.x}

    def get_obs(self, state, params=None, key=None):
        return jnp.stack([state.x, jnp.float32(state.time)])

    def is_terminated(self, state, params):
        return state.time == params.ends_at

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0, 100, (2,))


@struct.dataclass
class Sys:
    """Stands where Brax's physics stands."""

    ends_at: jax.Array
    stride: jax.Array


class BraxToy(brax.envs.Env):
    """``ballast``: how many floats the state carries beside what it needs, to make it as large as a physics state."""

    def __init__(self, ballast: int = 0):
        self.sys = Sys(jnp.int32(99), jnp.float32(1.0))
        self.ballast = ballast

    def reset(self, rng):
        obs = jnp.stack([jax.random.uniform(rng), 0.0])
        zero = jnp.float32(0)
        info = {"ballast": jnp.zeros(self.ballast)}
        return brax.envs.State(None, obs, zero, zero, {"height": zero}, info)

    def step(self, state, action):
        obs = state.obs + jnp.stack([self.sys.stride, 1.0])
        # As Brax's own tasks do, into the dict of the state that was given.
        state.metrics.update(height=obs[0])
        return state.replace(obs=obs, reward=obs[0], done=1.0 * (obs[1] == self.sys.ends_at))

    @property
    def observation_size(self):
        return 2

    @property
    def action_size(self):
        return 1

    @property
    def backend(self):
        return "none"
