"""Gymnasium's MuJoCo tasks on MJX: the same tasks in float32 on any accelerator, with the physics as a traced parameter.

``implementation="mjx"`` is MJX in JAX, ``"warp"`` MJX on MuJoCo Warp, which is made for NVIDIA GPUs. Neither is bit for
bit C MuJoCo: docs/mujoco.md has the differences.
"""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco as _mujoco
import numpy as np
from flax import struct

from pgjax.envs.auto_reset import AutoReset
from pgjax.envs.mjx_tools import light_imports, use_warp
from pgjax.envs.mujoco.tasks import Physics, Task
from pgjax.errors import RequestError
from pgjax.spaces import Box

with light_imports():
    from mujoco import mjx

mujoco: Any = _mujoco  # a compiled module without type information

PyTree = Any
# Of a whole batch, and of one environment. The tasks that Warp can do have up to 8 contacts and 27 constraints at once under
# random actions: enough for 16,000 such environments, or for 4,000 with 32 contacts each.
_WARP_CONTACTS, _WARP_CONSTRAINTS = 1 << 17, 256


@struct.dataclass
class Params:
    """What can be swept, randomised or vmapped over lanes.

    model: ``mjx.Model``: masses, gears, friction, gravity.
    max_episode_steps: int32 [], the time limit in force; at most the environment's static ``max_episode_steps``.
    """

    model: PyTree
    max_episode_steps: jax.Array


@struct.dataclass
class State:
    """One environment. All that MJX's next step depends on is carried, the rest of its data is made anew.

    qpos: [nq].  qvel: [nv].  warmstart: [nv], where the constraint solver begins.
    recalled: [K], what the next reward is compared with.  steps: int32 [], steps since the start of the episode.
    """

    qpos: jax.Array
    qvel: jax.Array
    warmstart: jax.Array
    recalled: jax.Array
    steps: jax.Array


def mjx_env(
    name: str,
    model: Any,
    task: Task,
    *,
    implementation: str = "mjx",
    reset_mode: str = "pool",
    episode_length: int | None = None,
) -> AutoReset:
    """An ``Environment`` on MJX.

    MJX has no PGS solver: the humanoids, whose models ask for it, are solved by Newton's method here. A simulation that
    diverges ends its episode as a termination, with reward 0, an observation of zeros and 1 in the metric ``unstable``.

    Args:
        name: public name.  model: C MuJoCo's model.  task: what is observed and earned.
        implementation: ``"mjx"`` or ``"warp"``.
        reset_mode: ``"pool"`` or ``"exact"``, see ``AutoReset``; exact costs a forward pass of the physics in each step.
        episode_length: time limit in steps; None means the task's own.

    Raises:
        RequestError: unknown ``reset_mode``, Warp asked for and missing or not working, or for a task that it cannot do.
    """
    episode_length = task.max_episode_steps if episode_length is None else episode_length
    impl = {"mjx": "jax", "warp": "warp"}[implementation]
    if impl == "warp":
        if "cfrc_ext" in task.reads:
            raise RequestError(
                f"physics = 'warp' computes no contact forces on bodies, which {name} reads; take physics = 'mjx'"
            )
        use_warp("physics = 'warp'", "physics = 'mjx'")
    supported = _with_supported_options(model)
    # Warp keeps the contacts of a whole batch in one list, of a length that is fixed here; those beyond it are dropped.
    sizes: dict[str, Any] = {"naconmax": _WARP_CONTACTS, "njmax": _WARP_CONSTRAINTS} if impl == "warp" else {}
    template = mjx.make_data(supported, impl=impl, **sizes)
    bodies = {model.body(i).name: i for i in range(model.nbody)}

    def as_arrays(params) -> Params:
        # MJX indexes the model with traced numbers, which NumPy's arrays do not allow.
        return jax.tree.map(jnp.asarray, params)

    def physics(params, data) -> Physics:
        # Some of MuJoCo's fields belong to an implementation's own part of the data.
        fields = {}
        for field in task.reads:
            public = vars(data).get(field)
            fields[field] = getattr(data._impl, field) if public is None else public
        return Physics(jnp, params.model, bodies, data.qpos, data.qvel, **fields)

    def start(key, params):
        params = as_arrays(params)
        offset = task.start(key, model)
        qpos, qvel = jnp.float32(model.qpos0) + offset[: model.nq], offset[model.nq :]
        data = template.replace(qpos=qpos, qvel=qvel)
        # MJX normalises quaternions in place where C MuJoCo, and so Gymnasium's first observation, leaves them as drawn.
        # Contact forces are the template's zeros: Gymnasium computes them after a step only.
        p = physics(params, mjx.forward(params.model, data).replace(qpos=qpos))
        return State(qpos, qvel, data.qacc_warmstart, task.recall(p), jnp.int32(0)), task.observe(p)

    def advance(key, state, action, params):
        del key
        params = as_arrays(params)
        data = template.replace(qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.warmstart, ctrl=action)
        data = jax.lax.fori_loop(0, task.frame_skip, lambda _, data: mjx.step(params.model, data), data)
        if "cfrc_ext" in task.reads:
            data = mjx.rne_postconstraint(params.model, data)
        p = physics(params, data)
        reward, terminated, metrics = task.outcome(state.recalled, p, action)
        # C MuJoCo sets a simulation that diverges back by itself. Here it ends the episode, before a NaN reaches the learner.
        obs = task.observe(p)
        unstable = ~(jnp.isfinite(obs).all() & jnp.isfinite(reward))
        reward = jnp.where(unstable, 0.0, reward)
        obs = jnp.where(unstable, 0.0, obs)
        metrics = {key: jnp.where(unstable, 0.0, value) for key, value in metrics.items()}
        metrics["unstable"] = unstable.astype(jnp.float32)
        terminated = terminated | unstable
        steps = state.steps + 1
        truncated = (steps >= params.max_episode_steps) & ~terminated
        state = State(data.qpos, data.qvel, data.qacc_warmstart, task.recall(p), steps)
        return state, obs, reward, terminated, truncated, metrics

    # On the host, because MJX ties its arrays to one device, and lanes may run on several.
    mjx_model = jax.tree.map(np.asarray, mjx.put_model(supported, impl=impl))
    params = Params(mjx_model, np.asarray(episode_length, np.int32))  # pyright: ignore[reportArgumentType]
    obs = jax.eval_shape(lambda key: start(key, params)[1], jax.random.key(0))
    return AutoReset(
        name=name,
        start=start,
        advance=advance,
        observation_space=Box(obs.shape),
        action_space=Box((model.nu,), *model.actuator_ctrlrange.T.astype(np.float32)),
        max_episode_steps=episode_length,
        default_params=params,
        reset_mode=reset_mode,
        advance_uses_key=False,
        source=model,
        step_seconds=float(model.opt.timestep) * task.frame_skip,
    )


def _with_supported_options(model: Any) -> Any:
    """The model with what MJX cannot do replaced: Newton's method for the PGS solver. The given model is not changed."""
    if model.opt.solver != mujoco.mjtSolver.mjSOL_PGS:
        return model
    model = mujoco.MjModel.__copy__(model)
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    return model
