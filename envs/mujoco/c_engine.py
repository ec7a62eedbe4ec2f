"""C MuJoCo as a pure function: Gymnasium's physics bit for bit, on the CPU's cores, inside any jitted program.

A step leaves the device through ``jax.pure_callback``. Nothing is remembered between calls: all that MuJoCo's next step
depends on, warm start included, is in the environment's state, as the bits of its float64 numbers. So float32 stays
JAX's default, and a state that was carried by a scan, vmapped, saved and restored goes on bit for bit.
"""

import logging
import os
import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import mujoco as _mujoco
import numpy as np
from flax import struct
from mujoco.batch import Batch

from pgjax.envs.mujoco.tasks import Physics, Task
from pgjax.spaces import Box
from pgjax.types import TimeStep

mujoco: Any = _mujoco  # a compiled module without type information

_logger = logging.getLogger(__name__)
_told: set[str] = set()


def _tell_once(message: str) -> None:
    """MuJoCo's warnings, one of a kind in a process. Its own handler prints each, and writes a file where the user works."""
    kind = re.sub(r"[-+.\d]+(e[-+]?\d+)?", "", message)
    if kind not in _told:
        _told.add(kind)
        _logger.warning("MuJoCo: %s (said once)", message)


if mujoco.get_mju_user_warning() is None:
    mujoco.set_mju_user_warning(_tell_once)

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_SIZES_KEPT = 4
# In place of whether an environment's time is up: it is not to be started anew, whatever happens.
_NEVER = 2
_NO_STAGE = int(mujoco.mjtStage.mjSTAGE_NONE)


@struct.dataclass
class Params:
    """max_episode_steps: int32 [], the time limit in force; at most the environment's static ``max_episode_steps``."""

    max_episode_steps: jax.Array


@struct.dataclass
class State:
    """State of B environments.

    bits: uint32 [B, 2 * (S + K)], the float64 numbers of MuJoCo's integration state (S) and of what the next reward is
        compared with (K), each as two words.
    steps: int32 [B], steps since the start of the episode.
    """

    bits: jax.Array
    steps: jax.Array


class CMujoco:
    """An ``Environment`` on C MuJoCo; ``reset_mode`` is ``"exact"``: only environments that ended are started anew.

    Actions that are not finite earn a reward of NaN and act as zeros; MuJoCo itself would zero them silently. A simulation
    that diverges is set back to the model's initial state by MuJoCo within the step, as in Gymnasium.

    Args:
        name: public name.  model: MuJoCo's model.  task: what is observed and earned.
        episode_length: time limit in steps; None means the task's own.
        num_threads: cores a step uses; None means all that this process may run on.
    """

    host_callback = True
    reset_mode = "exact"

    def __init__(self, name: str, model: Any, task: Task, *, episode_length: int | None = None, num_threads: int | None = None):
        episode_length = task.max_episode_steps if episode_length is None else episode_length
        self.name = name
        self.model = model
        self.task = task
        self.max_episode_steps = int(episode_length)
        self.step_seconds = float(model.opt.timestep) * task.frame_skip
        self.default_params = Params(np.asarray(episode_length, np.int32))  # pyright: ignore[reportArgumentType]
        self._pool = _Pool(model, task, num_threads or len(os.sched_getaffinity(0)))
        self.observation_space = Box((self._pool.observation_size,))
        self.action_space = Box((model.nu,), *model.actuator_ctrlrange.T.astype(np.float32))

    def __repr__(self) -> str:
        return f"<{self.name}, physics=c>"

    def reset(self, key: jax.Array, params: Params) -> tuple[State, jax.Array]:
        """Starts B episodes; ``key`` [B]. Returns the state and obs [B, O]."""
        del params
        start = self._starts(key)
        shapes = (
            jax.ShapeDtypeStruct((*key.shape, self._pool.num_words), jnp.uint32),
            jax.ShapeDtypeStruct((*key.shape, self._pool.observation_size), jnp.float32),
        )
        bits, obs = jax.pure_callback(self._pool.reset, shapes, start, vmap_method="broadcast_all")
        return State(bits, jnp.zeros(key.shape, jnp.int32)), obs

    def step(self, key: jax.Array, env_state: State, action: jax.Array, params: Params) -> tuple[State, TimeStep]:
        """Advances every environment once and restarts those whose episode ended; ``key`` [B], ``action`` [B, A]."""
        return self.step_presampled(self.presample(key, params), env_state, action, params)

    def refresh(self, key: jax.Array, env_state: State, params: Params) -> State:
        """The identity: every episode has a start of its own."""
        del key, params
        return env_state

    def presample(self, key: jax.Array, params: Params) -> jax.Array:
        """The starts of the episodes that may begin in steps with these keys [..., B], as [..., B, nq + nv]."""
        del params
        return self._starts(key.reshape(-1)).reshape(*key.shape, -1)

    def step_presampled(self, drawn: jax.Array, env_state: State, action: jax.Array, params: Params) -> tuple[State, TimeStep]:
        """``step`` with one row of what ``presample`` drew."""
        return self._step(drawn, env_state, action, params, restarts=True)

    def advance(self, key: jax.Array, env_state: State, action: jax.Array, params: Params) -> tuple[State, TimeStep]:
        """``step`` with the same keys, but nothing is started anew: for whoever wants to see how an episode ends.

        The ``obs`` of the result is its ``final_obs``; what follows after an episode's end means nothing.
        """
        return self._step(self.presample(key, params), env_state, action, params, restarts=False)

    def integration_state(self, env_state: State) -> jax.Array:
        """MuJoCo's integration state of each environment, for ``mj_setState``: float64 [B, S] as uint32 [B, 2 * S]."""
        return env_state.bits[:, : 2 * self._pool.num_state]

    def _step(self, drawn, env_state: State, action, params: Params, *, restarts: bool) -> tuple[State, TimeStep]:
        steps = env_state.steps + 1
        out_of_time = steps >= params.max_episode_steps
        ending = out_of_time.astype(jnp.uint32) if restarts else jnp.full_like(steps, _NEVER, jnp.uint32)
        finite = jnp.isfinite(action).all(-1)
        action = jnp.where(finite[:, None], action, 0.0).astype(jnp.float32)
        # One argument and one result, because each argument more costs 65 microseconds per call.
        words = [env_state.bits, _words(action), _words(drawn), ending[:, None]]
        result = jax.ShapeDtypeStruct((*steps.shape, self._pool.num_result_words), jnp.uint32)
        out = jax.pure_callback(self._pool.step, result, jnp.concatenate(words, -1), vmap_method="broadcast_all")
        bits, terminated, floats = jnp.split(out, [self._pool.num_words, self._pool.num_words + 1], axis=-1)
        floats = jax.lax.bitcast_convert_type(floats, jnp.float32)
        size = self._pool.observation_size
        obs, final_obs, rest = jnp.split(floats, [size, 2 * size], axis=-1)
        reward = jnp.where(finite, rest[:, 0], jnp.nan)
        metrics = {name: rest[:, 1 + i] for i, name in enumerate(self._pool.metrics)}
        terminated = terminated[:, 0] > 0
        truncated = out_of_time & ~terminated
        if restarts:
            steps = jnp.where(terminated | truncated, 0, steps)
        return State(bits, steps), TimeStep(obs, reward, terminated, truncated, final_obs, metrics)

    def _starts(self, key: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: self.task.start(key, self.model))(key).astype(jnp.float32)


def _words(floats: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(floats, jnp.uint32)


class _Pool:
    """The host's side: batches of simulations, whose content is overwritten by every call.

    Rows of arguments and results are environments, in any number of leading axes. Calls are serialised.
    """

    def __init__(self, model: Any, task: Task, num_threads: int):
        self.model = model
        self.task = task
        self.num_threads = num_threads
        self._batches: dict[int, _Simulations] = {}
        self._lock = threading.Lock()
        one = self._simulations(1)
        physics = one.physics()
        self.num_state = one.batch.nstate
        self.observation_size = task.observe(physics).shape[-1]
        recalled = task.recall(physics)
        self.num_words = 2 * (self.num_state + recalled.shape[-1])
        self.metrics = tuple(task.outcome(recalled, physics, np.zeros((1, model.nu))).metrics)
        self.num_result_words = self.num_words + 1 + 2 * self.observation_size + 1 + len(self.metrics)

    def reset(self, start: Any) -> tuple[np.ndarray, np.ndarray]:
        start = np.asarray(start)
        leading, start = start.shape[:-1], start.reshape(-1, start.shape[-1])
        with self._lock, np.errstate(all="ignore"):
            simulations = self._simulations(len(start))
            simulations.begin(np.arange(len(start)), start)
            physics = simulations.physics()
            obs = self.task.observe(physics).astype(np.float32)
            words = self._words(simulations, self.task.recall(physics))
        return words.reshape(*leading, -1), obs.reshape(*leading, -1)

    def step(self, words: Any) -> np.ndarray:
        """words: uint32 [..., W], of each environment the bits of its state, the action, the start of the episode that
        follows if this one ends, and whether its time is up (or ``_NEVER``). Returns uint32 [..., V]: the bits of the new
        state, terminated, and as float32 obs, final_obs, reward and the metrics.
        """
        words = np.asarray(words)
        leading, words = words.shape[:-1], words.reshape(-1, words.shape[-1])
        num, size = len(words), self.observation_size
        floats = words.view(np.float32)
        numbers = words[:, : self.num_words].copy().view(np.float64)
        action = floats[:, self.num_words : self.num_words + self.model.nu].astype(np.float64)
        start, ending = floats[:, self.num_words + self.model.nu : -1], words[:, -1]
        result = np.empty((num, self.num_result_words), np.uint32)
        floats = result[:, self.num_words + 1 :].view(np.float32)
        with self._lock, np.errstate(all="ignore"):
            simulations = self._simulations(num)
            simulations.batch.state[:] = numbers[:, : self.num_state]
            simulations.advance(action)
            physics = simulations.physics()
            reward, terminated, metrics = self.task.outcome(numbers[:, self.num_state :], physics, action)
            obs, recalled = self.task.observe(physics), self.task.recall(physics)
            result[:, self.num_words] = terminated
            floats[:, size : 2 * size] = obs
            floats[:, 2 * size] = reward
            for i, value in enumerate(metrics.values()):
                floats[:, 2 * size + 1 + i] = value
            ended = np.flatnonzero((terminated | (ending == 1)) & (ending != _NEVER))
            if len(ended):
                simulations.begin(ended, start[ended])
                physics = simulations.physics()
                obs, recalled = self.task.observe(physics), self.task.recall(physics)
            floats[:, :size] = obs
            result[:, : self.num_words] = self._words(simulations, recalled)
        return result.reshape(*leading, -1)

    def _words(self, simulations: "_Simulations", recalled: np.ndarray) -> np.ndarray:
        return np.concatenate([simulations.batch.state, recalled], 1).view(np.uint32)

    def _simulations(self, num: int) -> "_Simulations":
        """Those of one batch size. The last few sizes are kept: training, evaluation, and a single one for a look."""
        if num not in self._batches:
            while len(self._batches) >= _SIZES_KEPT:
                del self._batches[next(iter(self._batches))]
            self._batches[num] = _Simulations(self.model, self.task, num, self.num_threads)
        self._batches[num] = self._batches.pop(num)
        return self._batches[num]


class _Simulations:
    """``num`` simulations side by side, with the derived fields that the task reads."""

    def __init__(self, model: Any, task: Task, num: int, num_threads: int):
        self.model = model
        self.frame_skip = task.frame_skip
        # Contact forces on bodies have to be asked for after a step, from MuJoCo's whole data: it must be kept then.
        reads_forces = "cfrc_ext" in task.reads
        self._contact_forces = np.zeros((num, model.nbody, 6)) if reads_forces else None
        self._scratch: Any = mujoco.MjData(model) if reads_forces else None
        self.batch = Batch(model, num, min(num, num_threads), persistent=reads_forces)
        if self.batch.nstate != mujoco.mj_stateSize(model, _STATE):
            raise RuntimeError("MuJoCo's batch no longer keeps the integration state that pgjax carries")
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._fields = {name: self.batch.bind(name) for name in task.reads if name != "cfrc_ext"}
        self._bodies = {model.body(i).name: i for i in range(model.nbody)}

    def physics(self) -> Physics:
        fields = self._fields if self._contact_forces is None else {**self._fields, "cfrc_ext": self._contact_forces}
        return Physics(np, self.model, self._bodies, self._qpos, self._qvel, **fields)

    def advance(self, action: np.ndarray) -> None:
        """One step of the task from the states in ``batch.state``. action: [num, nu]."""
        self._ctrl[:] = action
        self.batch.step(nstep=self.frame_skip)
        if self._contact_forces is not None:
            for i in range(self.batch.nsim):
                self.batch.get_data(i, self._scratch)
                mujoco.mj_rnePostConstraint(self.model, self._scratch)
                self._contact_forces[i] = self._scratch.cfrc_ext

    def begin(self, rows: np.ndarray, start: np.ndarray) -> None:
        """Begins new episodes in these simulations. start: [len(rows), nq + nv], relative to the model's initial state."""
        self.batch.reset(rows, stage=_NO_STAGE)
        self._qpos[rows] += start[:, : self.model.nq]
        self._qvel[rows] += start[:, self.model.nq :]
        self.batch.forward(rows)
        if self._contact_forces is not None:
            # Gymnasium computes contact forces after a step only.
            self._contact_forces[rows] = 0.0
