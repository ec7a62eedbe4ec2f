"""Gymnasium's MuJoCo tasks: what each observes, earns and ends with, as pure functions of the physics state.

Every function is written for any array namespace and any leading axes: NumPy in float64 over a batch for C MuJoCo,
``jax.numpy`` for one environment of MJX. The models are Gymnasium's own files. A task's keyword arguments are those of
Gymnasium's version 5, with its defaults, but for other models, frame skips and bodies. Version 4 is what most papers were
measured on; docs/mujoco.md lists what version 5 changed.

Source: gymnasium 1.3.0, gymnasium/envs/mujoco/*_v5.py and *_v4.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Range = tuple[float, float]
# Chance that no candidate is accepted: 4e-22 for Reacher, 3e-14 for Pusher.
_NUM_CANDIDATES = 32


@dataclass(frozen=True)
class Physics:
    """What a task may read of one physics engine; arrays [..., *field], with the leading axes of the engine's choice.

    xp: array namespace of the arrays.  model: object with ``body_mass`` and ``opt.timestep``.
    bodies: name of a body -> its index.  The fields are MuJoCo's ``mjData`` fields of the same names; those after ``qvel``
    are there only if the task lists them in ``reads``. They are a little behind ``qpos`` and ``qvel``: of the beginning of the
    last substep, or of the last stage of a Runge-Kutta one. Gymnasium's observations and rewards have that lag in them.
    """

    xp: Any
    model: Any
    bodies: Mapping[str, int]
    qpos: Any
    qvel: Any
    xpos: Any = None
    xipos: Any = None
    site_xpos: Any = None
    cinert: Any = None
    cvel: Any = None
    qfrc_actuator: Any = None
    qfrc_constraint: Any = None
    cfrc_ext: Any = None

    def body(self, name: str) -> Any:
        """[..., 3] position of a body's frame."""
        return self.xpos[..., self.bodies[name], :]


class Outcome(NamedTuple):
    """What a step earned.

    reward: [...].  terminated: [...] bool.  metrics: what version 5's ``info`` says of the reward and the motion.
    """

    reward: Any
    terminated: Any
    metrics: dict[str, Any]


class Task(NamedTuple):
    """A task as pure functions.

    xml: Gymnasium's model file.  frame_skip: physics substeps per step.  reads: the derived fields it needs.
    observe: ``Physics -> [..., O]``.
    recall: ``Physics -> [..., K]``, what the reward of the next step compares with; carried in the state.
    outcome: ``(recalled [..., K], Physics after the step, action [..., A]) -> Outcome``.
    start: ``(key, model) -> [nq + nv]``, a random start of one environment, as its difference from the model's initial
        ``qpos`` and ``qvel``; in ``jax.numpy`` for every engine.
    max_episode_steps: the time limit.
    """

    xml: str
    frame_skip: int
    reads: tuple[str, ...]
    observe: Callable[[Physics], Any]
    recall: Callable[[Physics], Any]
    outcome: Callable[[Any, Physics, Any], Outcome]
    start: Callable[[jax.Array, Any], jax.Array]
    max_episode_steps: int = 1000


def half_cheetah(
    version: int,
    /,
    *,
    forward_reward_weight: float = 1.0,
    ctrl_cost_weight: float = 0.1,
    reset_noise_scale: float = 0.1,
    exclude_current_positions_from_observation: bool = True,
) -> Task:
    """Two-legged runner in a plane; runs on for ever, whatever its posture."""
    del version  # Nothing but the names in ``info`` changed.

    def observe(p: Physics):
        return p.xp.concatenate([p.qpos[..., int(exclude_current_positions_from_observation) :], p.qvel], -1)

    def outcome(before, p: Physics, action) -> Outcome:
        velocity = _velocity(before, p.qpos[..., :1], p, 5)[..., 0]
        forward = forward_reward_weight * velocity
        cost = ctrl_cost_weight * _square_sum(p, action)
        metrics = {"reward_forward": forward, "reward_ctrl": -cost, "x_position": p.qpos[..., 0], "x_velocity": velocity}
        return Outcome(forward - cost, p.xp.zeros(velocity.shape, bool), metrics)

    start = partial(_uniform_and_normal, scale=reset_noise_scale)
    return Task("half_cheetah.xml", 5, (), observe, _x, outcome, start)


def hopper(
    version: int,
    /,
    *,
    forward_reward_weight: float = 1.0,
    ctrl_cost_weight: float = 1e-3,
    healthy_reward: float = 1.0,
    terminate_when_unhealthy: bool = True,
    healthy_state_range: Range = (-100.0, 100.0),
    healthy_z_range: Range = (0.7, math.inf),
    healthy_angle_range: Range = (-0.2, 0.2),
    reset_noise_scale: float = 5e-3,
    exclude_current_positions_from_observation: bool = True,
) -> Task:
    """One-legged hopper in a plane; falls if it leans or sinks."""

    def healthy(p: Physics):
        rest = p.xp.concatenate([p.qpos[..., 2:], p.qvel], -1)
        inside = _inside(rest, healthy_state_range).all(-1)
        return inside & _inside(p.qpos[..., 1], healthy_z_range) & _inside(p.qpos[..., 2], healthy_angle_range)

    return _planar_walker(
        "hopper.xml",
        version,
        healthy,
        forward_reward_weight,
        ctrl_cost_weight,
        healthy_reward,
        terminate_when_unhealthy,
        reset_noise_scale,
        exclude_current_positions_from_observation,
    )


def walker2d(
    version: int,
    /,
    *,
    forward_reward_weight: float = 1.0,
    ctrl_cost_weight: float = 1e-3,
    healthy_reward: float = 1.0,
    terminate_when_unhealthy: bool = True,
    healthy_z_range: Range = (0.8, 2.0),
    healthy_angle_range: Range = (-1.0, 1.0),
    reset_noise_scale: float = 5e-3,
    exclude_current_positions_from_observation: bool = True,
) -> Task:
    """Two-legged walker in a plane; falls if it leans, sinks or jumps too high."""

    def healthy(p: Physics):
        return _inside(p.qpos[..., 1], healthy_z_range) & _inside(p.qpos[..., 2], healthy_angle_range)

    return _planar_walker(
        # Version 5 gave both feet the same friction.
        "walker2d_v5.xml" if version >= 5 else "walker2d.xml",
        version,
        healthy,
        forward_reward_weight,
        ctrl_cost_weight,
        healthy_reward,
        terminate_when_unhealthy,
        reset_noise_scale,
        exclude_current_positions_from_observation,
    )


def _planar_walker(
    xml, version, healthy, forward_weight, ctrl_weight, healthy_weight, terminates, noise_scale, exclude_x
) -> Task:
    """What Hopper and Walker2d have in common."""

    def observe(p: Physics):
        return p.xp.concatenate([p.qpos[..., int(exclude_x) :], p.xp.clip(p.qvel, -10, 10)], -1)

    def outcome(before, p: Physics, action) -> Outcome:
        velocity = _velocity(before, p.qpos[..., :1], p, 4)[..., 0]
        forward, cost = forward_weight * velocity, ctrl_weight * _square_sum(p, action)
        survive, terminated = _survival(version, healthy(p), healthy_weight, terminates)
        metrics = {
            "reward_forward": forward,
            "reward_ctrl": -cost,
            "reward_survive": survive,
            "x_position": p.qpos[..., 0],
            "x_velocity": velocity,
        }
        return Outcome(forward + survive - cost, terminated, metrics)

    return Task(xml, 4, (), observe, _x, outcome, partial(_uniform, scale=noise_scale))


def swimmer(
    version: int,
    /,
    *,
    forward_reward_weight: float = 1.0,
    ctrl_cost_weight: float = 1e-4,
    reset_noise_scale: float = 0.1,
    exclude_current_positions_from_observation: bool = True,
) -> Task:
    """Three-link swimmer in a viscous fluid; goes on for ever."""
    del version  # Nothing but the names in ``info`` changed.

    def observe(p: Physics):
        return p.xp.concatenate([p.qpos[..., 2 * exclude_current_positions_from_observation :], p.qvel], -1)

    def outcome(before, p: Physics, action) -> Outcome:
        velocity = _velocity(before, p.qpos[..., :2], p, 4)
        forward = forward_reward_weight * velocity[..., 0]
        cost = ctrl_cost_weight * _square_sum(p, action)
        metrics = {"reward_forward": forward, "reward_ctrl": -cost, **_motion(p, velocity)}
        return Outcome(forward - cost, p.xp.zeros(forward.shape, bool), metrics)

    return Task("swimmer.xml", 4, (), observe, lambda p: p.qpos[..., :2], outcome, partial(_uniform, scale=reset_noise_scale))


def ant(
    version: int,
    /,
    *,
    forward_reward_weight: float = 1.0,
    ctrl_cost_weight: float = 0.5,
    contact_cost_weight: float = 5e-4,
    healthy_reward: float = 1.0,
    terminate_when_unhealthy: bool = True,
    healthy_z_range: Range = (0.2, 1.0),
    contact_force_range: Range = (-1.0, 1.0),
    reset_noise_scale: float = 0.1,
    exclude_current_positions_from_observation: bool = True,
    include_cfrc_ext_in_observation: bool = True,
) -> Task:
    """Four-legged runner; ends if its torso is too low or too high."""
    # Version 5 leaves out the world's row, which is always zero.
    first_body = 1 if version >= 5 else 0
    uses_contacts = bool(contact_cost_weight) or include_cfrc_ext_in_observation

    def observe(p: Physics):
        parts = [p.qpos[..., 2 * exclude_current_positions_from_observation :], p.qvel]
        if include_cfrc_ext_in_observation:
            parts.append(_rows(p.xp.clip(p.cfrc_ext, *contact_force_range), first_body))
        return p.xp.concatenate(parts, -1)

    def recall(p: Physics):
        return p.xpos[..., 1, :2]

    def outcome(before, p: Physics, action) -> Outcome:
        velocity = _velocity(before, recall(p), p, 5)
        forward, cost = forward_reward_weight * velocity[..., 0], ctrl_cost_weight * _square_sum(p, action)
        low, high = healthy_z_range
        healthy = _finite(p) & (low <= p.qpos[..., 2]) & (p.qpos[..., 2] <= high)
        survive, terminated = _survival(version, healthy, healthy_reward, terminate_when_unhealthy)
        metrics = {"reward_forward": forward, "reward_ctrl": -cost, "reward_survive": survive, **_motion(p, velocity)}
        reward = forward + survive - cost
        if uses_contacts:
            contact = contact_cost_weight * p.xp.square(p.xp.clip(p.cfrc_ext, *contact_force_range)).sum((-2, -1))
            metrics["reward_contact"] = -contact
            reward = reward - contact
        return Outcome(reward, terminated, metrics)

    reads = ("xpos", "cfrc_ext") if uses_contacts else ("xpos",)
    start = partial(_uniform_and_normal, scale=reset_noise_scale)
    return Task("ant.xml", 5, reads, observe, recall, outcome, start)


def ant_v4(
    *,
    forward_reward_weight: float = 1.0,
    ctrl_cost_weight: float = 0.5,
    use_contact_forces: bool = False,
    contact_cost_weight: float = 5e-4,
    healthy_reward: float = 1.0,
    terminate_when_unhealthy: bool = True,
    healthy_z_range: Range = (0.2, 1.0),
    contact_force_range: Range = (-1.0, 1.0),
    reset_noise_scale: float = 0.1,
    exclude_current_positions_from_observation: bool = True,
) -> Task:
    """``ant`` of version 4, whose contact forces are observed (111 numbers in all) and paid for on request only."""
    return ant(
        4,
        forward_reward_weight=forward_reward_weight,
        ctrl_cost_weight=ctrl_cost_weight,
        contact_cost_weight=contact_cost_weight if use_contact_forces else 0.0,
        healthy_reward=healthy_reward,
        terminate_when_unhealthy=terminate_when_unhealthy,
        healthy_z_range=healthy_z_range,
        contact_force_range=contact_force_range,
        reset_noise_scale=reset_noise_scale,
        exclude_current_positions_from_observation=exclude_current_positions_from_observation,
        include_cfrc_ext_in_observation=use_contact_forces,
    )


def humanoid(
    version: int,
    /,
    *,
    forward_reward_weight: float = 1.25,
    ctrl_cost_weight: float = 0.1,
    contact_cost_weight: float = 5e-7,
    contact_cost_range: Range = (-math.inf, 10.0),
    healthy_reward: float = 5.0,
    terminate_when_unhealthy: bool = True,
    healthy_z_range: Range = (1.0, 2.0),
    reset_noise_scale: float = 1e-2,
    exclude_current_positions_from_observation: bool = True,
    include_cinert_in_observation: bool = True,
    include_cvel_in_observation: bool = True,
    include_qfrc_actuator_in_observation: bool = True,
    include_cfrc_ext_in_observation: bool = True,
) -> Task:
    """Two-legged humanoid; ends if its torso is too low or too high."""
    wanted = {
        "cinert": include_cinert_in_observation,
        "cvel": include_cvel_in_observation,
        "qfrc_actuator": include_qfrc_actuator_in_observation,
        "cfrc_ext": include_cfrc_ext_in_observation,
    }
    observe, reads = _humanoid_observation(version, exclude_current_positions_from_observation, wanted)

    def recall(p: Physics):
        """Horizontal position of the centre of mass."""
        return (p.model.body_mass[:, None] * p.xipos).sum(-2)[..., :2] / p.model.body_mass.sum()

    def outcome(before, p: Physics, action) -> Outcome:
        velocity = _velocity(before, recall(p), p, 5)
        forward, cost = forward_reward_weight * velocity[..., 0], ctrl_cost_weight * _square_sum(p, action)
        healthy = _inside(p.qpos[..., 2], healthy_z_range)
        survive, terminated = _survival(version, healthy, healthy_reward, terminate_when_unhealthy)
        metrics = {"reward_forward": forward, "reward_ctrl": -cost, "reward_survive": survive, **_motion(p, velocity)}
        reward = forward + survive - cost
        if contact_cost_weight:
            contact = contact_cost_weight * p.xp.square(p.cfrc_ext).sum((-2, -1))
            contact = p.xp.clip(contact, *contact_cost_range)
            metrics["reward_contact"] = -contact
            reward = reward - contact
        return Outcome(reward, terminated, metrics)

    reads = ("xipos", *reads, "cfrc_ext") if contact_cost_weight else ("xipos", *reads)
    return Task("humanoid.xml", 5, reads, observe, recall, outcome, partial(_uniform, scale=reset_noise_scale))


def humanoid_standup(
    version: int,
    /,
    *,
    uph_cost_weight: float = 1.0,
    ctrl_cost_weight: float = 0.1,
    impact_cost_weight: float = 0.5e-6,
    impact_cost_range: Range = (-math.inf, 10.0),
    reset_noise_scale: float = 1e-2,
    exclude_current_positions_from_observation: bool = True,
    include_cinert_in_observation: bool = True,
    include_cvel_in_observation: bool = True,
    include_qfrc_actuator_in_observation: bool = True,
    include_cfrc_ext_in_observation: bool = True,
) -> Task:
    """Humanoid that lies on its back and is paid for the height of its torso; never ends.

    Gymnasium takes ``uph_cost_weight`` and does not use it; here it multiplies the height's reward.
    """
    wanted = {
        "cinert": include_cinert_in_observation,
        "cvel": include_cvel_in_observation,
        "qfrc_actuator": include_qfrc_actuator_in_observation,
        "cfrc_ext": include_cfrc_ext_in_observation,
    }
    observe, reads = _humanoid_observation(version, exclude_current_positions_from_observation, wanted)

    def recall(p: Physics):
        return p.qpos[..., :0]

    def outcome(before, p: Physics, action) -> Outcome:
        del before
        up = uph_cost_weight * p.qpos[..., 2] / p.model.opt.timestep
        cost = ctrl_cost_weight * _square_sum(p, action)
        impact = p.xp.clip(impact_cost_weight * p.xp.square(p.cfrc_ext).sum((-2, -1)), *impact_cost_range)
        metrics = {"reward_linup": up, "reward_quadctrl": -cost, "reward_impact": -impact}
        return Outcome(up - cost - impact + 1, p.xp.zeros(up.shape, bool), metrics)

    start = partial(_uniform, scale=reset_noise_scale)
    return Task("humanoidstandup.xml", 5, (*reads, "cfrc_ext"), observe, recall, outcome, start)


def _humanoid_observation(version, exclude_xy: bool, wanted: dict[str, bool]) -> tuple[Callable, tuple[str, ...]]:
    """``observe`` of the two humanoids, and the fields it reads: those that are ``wanted``, in their order."""
    # Version 5 leaves out what is always zero: the world's rows, and the actuator forces on the free joint.
    first_body, first_dof = (1, 6) if version >= 5 else (0, 0)
    reads = tuple(field for field in wanted if wanted[field])

    def observe(p: Physics):
        parts = [p.qpos[..., 2 * exclude_xy :], p.qvel]
        for field in reads:
            value = getattr(p, field)
            parts.append(value[..., first_dof:] if field == "qfrc_actuator" else _rows(value, first_body))
        return p.xp.concatenate(parts, -1)

    return observe, reads


def reacher(version: int, /, *, reward_dist_weight: float = 1.0, reward_control_weight: float = 1.0) -> Task:
    """Two-link arm in a plane that reaches for a random target; 50 steps, never ends before."""

    def observe(p: Physics):
        theta = p.qpos[..., :2]
        # The height difference, left out by version 5, is always zero.
        away = _between(p)[..., : 2 if version >= 5 else 3]
        return p.xp.concatenate([p.xp.cos(theta), p.xp.sin(theta), p.qpos[..., 2:], p.qvel[..., :2], away], -1)

    def outcome(before, p: Physics, action) -> Outcome:
        # Version 4 pays for where the arm was before the step.
        away = _between(p) if version >= 5 else before
        distance, cost = reward_dist_weight * _norm(p, away), reward_control_weight * _square_sum(p, action)
        metrics = {"reward_dist": -distance, "reward_ctrl": -cost}
        return Outcome(-distance - cost, p.xp.zeros(distance.shape, bool), metrics)

    def start(key, model):
        key_pos, key_goal, key_vel = jax.random.split(key, 3)
        qpos = jax.random.uniform(key_pos, (model.nq,), minval=-0.1, maxval=0.1)
        goals = jax.random.uniform(key_goal, (_NUM_CANDIDATES, 2), minval=-0.2, maxval=0.2)
        goal = _first(goals, jnp.linalg.norm(goals, axis=-1) < 0.2)
        qvel = jax.random.uniform(key_vel, (model.nv,), minval=-0.005, maxval=0.005)
        return jnp.concatenate([qpos.at[-2:].set(goal - model.qpos0[-2:]), qvel.at[-2:].set(0.0)])

    def _between(p: Physics):
        return p.body("fingertip") - p.body("target")

    return Task("reacher.xml", 2, ("xpos",), observe, _between if version < 5 else _nothing, outcome, start, 50)


def pusher(
    version: int,
    /,
    *,
    reward_near_weight: float = 0.5,
    reward_dist_weight: float = 1.0,
    reward_control_weight: float = 0.1,
) -> Task:
    """Arm that pushes a cylinder to a goal; 100 steps, never ends before."""
    del version  # Gymnasium's version 4 refuses to run on MuJoCo 3 and later.

    def observe(p: Physics):
        bodies = [p.body(name) for name in ("tips_arm", "object", "goal")]
        return p.xp.concatenate([p.qpos[..., :7], p.qvel[..., :7], *bodies], -1)

    def outcome(before, p: Physics, action) -> Outcome:
        del before
        near = reward_near_weight * _norm(p, p.body("object") - p.body("tips_arm"))
        distance = reward_dist_weight * _norm(p, p.body("object") - p.body("goal"))
        cost = reward_control_weight * _square_sum(p, action)
        metrics = {"reward_dist": -distance, "reward_ctrl": -cost, "reward_near": -near}
        return Outcome(-distance - cost - near, p.xp.zeros(near.shape, bool), metrics)

    def start(key, model):
        key_object, key_vel = jax.random.split(key)
        low, high = jnp.array([-0.3, -0.2]), jnp.array([0.0, 0.2])
        objects = jax.random.uniform(key_object, (_NUM_CANDIDATES, 2), minval=low, maxval=high)
        place = _first(objects, jnp.linalg.norm(objects, axis=-1) > 0.17)
        qpos = jnp.zeros(model.nq).at[-4:].set(jnp.concatenate([place, jnp.zeros(2)]) - model.qpos0[-4:])
        qvel = jax.random.uniform(key_vel, (model.nv,), minval=-0.005, maxval=0.005)
        return jnp.concatenate([qpos, qvel.at[-4:].set(0.0)])

    return Task("pusher_v5.xml", 5, ("xpos",), observe, _nothing, outcome, start, 100)


def inverted_pendulum(version: int, /, *, reset_noise_scale: float = 0.01) -> Task:
    """Pole on a cart; ends if the pole leans by more than 0.2 rad."""

    def observe(p: Physics):
        return p.xp.concatenate([p.qpos, p.qvel], -1)

    def outcome(before, p: Physics, action) -> Outcome:
        del before, action
        terminated = ~(_finite(p) & (p.xp.abs(p.qpos[..., 1]) <= 0.2))
        # Version 4 pays for the step that ends the episode too.
        reward = 1.0 - terminated if version >= 5 else p.xp.ones(terminated.shape)
        return Outcome(reward, terminated, {"reward_survive": reward})

    start = partial(_uniform, scale=reset_noise_scale)
    return Task("inverted_pendulum.xml", 2, (), observe, _nothing, outcome, start)


def inverted_double_pendulum(version: int, /, *, healthy_reward: float = 10.0, reset_noise_scale: float = 0.1) -> Task:
    """Two poles on a cart; ends if the tip sinks to 1 or below."""

    def observe(p: Physics):
        angles = p.qpos[..., 1:]
        # Of the forces of the constraints only the cart's can differ from zero; version 4 has all three.
        forces = p.xp.clip(p.qfrc_constraint, -10, 10)[..., : 1 if version >= 5 else None]
        parts = [p.qpos[..., :1], p.xp.sin(angles), p.xp.cos(angles), p.xp.clip(p.qvel, -10, 10), forces]
        return p.xp.concatenate(parts, -1)

    def outcome(before, p: Physics, action) -> Outcome:
        del before, action
        x, y = p.site_xpos[..., 0, 0], p.site_xpos[..., 0, 2]
        distance = 0.01 * x**2 + (y - 2) ** 2
        velocity = 1e-3 * p.qvel[..., 1] ** 2 + 5e-3 * p.qvel[..., 2] ** 2
        terminated = y <= 1
        survive = healthy_reward * (1.0 - terminated if version >= 5 else p.xp.ones(y.shape))
        metrics = {"reward_survive": survive, "distance_penalty": -distance, "velocity_penalty": -velocity}
        return Outcome(survive - distance - velocity, terminated, metrics)

    start = partial(_uniform_and_normal, scale=reset_noise_scale)
    reads = ("site_xpos", "qfrc_constraint")
    return Task("inverted_double_pendulum.xml", 5, reads, observe, _nothing, outcome, start)


TASKS: dict[str, Callable[..., Task]] = {
    "HalfCheetah-v5": partial(half_cheetah, 5),
    "Hopper-v5": partial(hopper, 5),
    "Walker2d-v5": partial(walker2d, 5),
    "Ant-v5": partial(ant, 5),
    "Humanoid-v5": partial(humanoid, 5),
    "HumanoidStandup-v5": partial(humanoid_standup, 5),
    "Swimmer-v5": partial(swimmer, 5),
    "Reacher-v5": partial(reacher, 5),
    "Pusher-v5": partial(pusher, 5),
    "InvertedPendulum-v5": partial(inverted_pendulum, 5),
    "InvertedDoublePendulum-v5": partial(inverted_double_pendulum, 5),
    "HalfCheetah-v4": partial(half_cheetah, 4),
    "Hopper-v4": partial(hopper, 4),
    "Walker2d-v4": partial(walker2d, 4),
    "Ant-v4": ant_v4,
    "Humanoid-v4": partial(humanoid, 4, contact_cost_weight=0.0),
    "HumanoidStandup-v4": partial(humanoid_standup, 4),
    "Swimmer-v4": partial(swimmer, 4),
    "Reacher-v4": partial(reacher, 4),
    "InvertedPendulum-v4": partial(inverted_pendulum, 4),
    "InvertedDoublePendulum-v4": partial(inverted_double_pendulum, 4),
}


def _x(p: Physics):
    return p.qpos[..., :1]


def _nothing(p: Physics):
    return p.qpos[..., :0]


def _velocity(before, after, p: Physics, frame_skip: int):
    return (after - before) / (p.model.opt.timestep * frame_skip)


def _motion(p: Physics, velocity) -> dict[str, Any]:
    """Metrics of a body that moves in the plane."""
    return {
        "x_position": p.qpos[..., 0],
        "y_position": p.qpos[..., 1],
        "distance_from_origin": _norm(p, p.qpos[..., :2]),
        "x_velocity": velocity[..., 0],
        "y_velocity": velocity[..., 1],
    }


def _survival(version: int, healthy, weight: float, terminates: bool):
    """(reward for being healthy, terminated). Version 4 pays it for the step that ends the episode too."""
    paid = healthy | True if version < 5 and terminates else healthy
    return weight * paid, ~healthy if terminates else healthy & False


def _inside(x, limits: Range):
    return (limits[0] < x) & (x < limits[1])


def _finite(p: Physics):
    return p.xp.isfinite(p.qpos).all(-1) & p.xp.isfinite(p.qvel).all(-1)


def _norm(p: Physics, x):
    return p.xp.sqrt((x * x).sum(-1))


def _square_sum(p: Physics, x):
    return p.xp.square(x).sum(-1)


def _rows(x, first: int):
    """[..., bodies, k] from body ``first`` on, as [..., bodies * k]."""
    x = x[..., first:, :]
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _uniform(key, model, *, scale: float):
    return jax.random.uniform(key, (model.nq + model.nv,), minval=-scale, maxval=scale)


def _uniform_and_normal(key, model, *, scale: float):
    key_pos, key_vel = jax.random.split(key)
    qpos = jax.random.uniform(key_pos, (model.nq,), minval=-scale, maxval=scale)
    return jnp.concatenate([qpos, scale * jax.random.normal(key_vel, (model.nv,))])


def _first(candidates, accepted):
    """The first accepted row: rejection sampling with a bounded number of draws."""
    return candidates[jnp.argmax(accepted)]
