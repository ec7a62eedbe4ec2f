"""Classic control, drawn from the state: each function is ``(state, params, action or None) -> Canvas``.

``state`` and ``params`` are gymnax's own, of one environment at one time; ``action`` is what is done next.
"""

from typing import Any

import numpy as np

from pgjax.experiments.render.canvas import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PALE, RED, SKY, WIDTH, Canvas, fitting

_CART = (0.56, 0.32)


def cartpole_tip(state: Any, params: Any) -> tuple[float, float]:
    """Where the pole ends; the cart's axle is at height 0. ``length`` is half of the pole's, as in the equations of motion."""
    return (
        float(state.x + 2 * params.length * np.sin(state.theta)),
        float(2 * params.length * np.cos(state.theta)),
    )


def cartpole(state: Any, params: Any, action: Any = None) -> Canvas:
    """The cart between the ends of its track, the pole on it, an arrow for the push."""
    reach, pole = float(params.x_threshold) + 0.5, 2 * float(params.length)
    canvas = fitting((-reach, -0.6), (reach, max(pole, 0.9) + 0.3), margin=0.0)
    canvas.center = (0.0, -0.6 + canvas.height / canvas.scale / 2)
    x, (w, h) = float(state.x), _CART
    floor = -h / 2 - 0.14
    canvas.line([(-10 * reach, floor), (10 * reach, floor)], GREY, 1.5)
    for end in (-params.x_threshold, params.x_threshold):
        canvas.line([(end, floor - 0.12), (end, floor + 0.12)], RED, 2)
    # Beyond these lines the pole counts as fallen.
    for sign in (-1, 1):
        angle = sign * float(params.theta_threshold_radians)
        canvas.line([(x, 0), (x + 1.1 * pole * np.sin(angle), 1.1 * pole * np.cos(angle))], PALE, 1.5)
    for wheel in (-w / 4, w / 4):
        canvas.circle((x + wheel, floor + 0.07), 0.07, INK)
    canvas.rectangle((x - w / 2, -h / 2), (x + w / 2, h / 2), BLUE)
    canvas.line([(x, 0), cartpole_tip(state, params)], ORANGE, 0.1 * canvas.scale)
    canvas.circle((x, 0), 0.045, INK)
    if action is not None:
        side = 1 if action > 0 else -1
        canvas.arrow((x + side * (w / 2 + 0.04), 0), (x + side * (w / 2 + 0.4), 0), GREEN)
    return canvas


def acrobot_joints(state: Any, params: Any) -> list[tuple[float, float]]:
    """The fixed joint at the origin, the elbow and the tip; both angles are 0 where the links hang down."""
    # The goal is in lengths of the book's links, which are 1.
    first, second = float(state.joint_angle1), float(state.joint_angle1 + state.joint_angle2)
    elbow = (float(params.link_length_1) * np.sin(first), -float(params.link_length_1) * np.cos(first))
    length = float(params.link_length_2)
    return [(0.0, 0.0), elbow, (elbow[0] + length * np.sin(second), elbow[1] - length * np.cos(second))]


def acrobot(state: Any, params: Any, action: Any = None) -> Canvas:
    """Two links that hang from a joint, and the line that the tip has to rise above."""
    reach = float(params.link_length_1 + params.link_length_2)
    canvas = fitting((-reach, -reach), (reach, reach))
    canvas.line([(-10, 1.0), (10, 1.0)], GREEN, 2)
    joints = acrobot_joints(state, params)
    canvas.line(joints[:2], BLUE, 0.14 * canvas.scale)
    canvas.line(joints[1:], SKY, 0.14 * canvas.scale)
    canvas.circle(joints[0], 0.08, INK)
    canvas.circle(joints[1], 0.08, ORANGE)
    canvas.circle(joints[2], 0.08, GREEN if joints[2][1] > 1 else GREY)
    if action is not None:
        torque = float(params.available_torque[int(action)])
        _turn(canvas, joints[1], 0.28, torque, 2.0)
    return canvas


def hill(position: Any) -> Any:
    """Height of the road, between 0.1 and 1: the slope that pulls at the car is its derivative."""
    return 0.45 * np.sin(3 * np.asarray(position, np.float64)) + 0.55


def mountain_car(state: Any, params: Any, action: Any = None) -> Canvas:
    """A car on a hill with a flag, and an arrow for the way it is pushed. A discrete action pushes back, not or forward."""
    low, high = float(params.min_position), float(params.max_position)
    canvas = fitting((low - 0.05, -0.05), (high + 0.05, 1.3), margin=0.02)
    road = np.linspace(low, high, 120)
    ground = [*zip(road, hill(road), strict=True), (high, -1.0), (low, -1.0)]
    canvas.polygon(ground, PALE)
    canvas.line(list(zip(road, hill(road), strict=True)), GREY, 2)
    goal = float(params.goal_position)
    canvas.line([(goal, hill(goal)), (goal, hill(goal) + 0.24)], INK, 2)
    canvas.polygon([(goal, hill(goal) + 0.24), (goal - 0.13, hill(goal) + 0.195), (goal, hill(goal) + 0.15)], GREEN)
    position = float(state.position)
    angle = np.arctan(1.35 * np.cos(3 * position))
    along, up = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    at = np.array([position, float(hill(position))])

    def place(x: float, y: float) -> np.ndarray:
        return at + x * along + y * up

    canvas.polygon([place(-0.11, 0.035), place(0.11, 0.035), place(0.11, 0.075), place(-0.11, 0.075)], BLUE)
    canvas.polygon([place(-0.07, 0.07), place(0.06, 0.07), place(0.035, 0.115), place(-0.05, 0.115)], SKY)
    for wheel in (-0.06, 0.06):
        canvas.circle(place(wheel, 0.03), 0.03, INK)
    if action is not None:
        push = float(action) - 1 if np.issubdtype(np.asarray(action).dtype, np.integer) else float(np.ravel(action)[0])
        push = float(np.clip(push, -1, 1))
        canvas.arrow(place(0, 0.17), place(0.2 * push, 0.17), ORANGE)
    return canvas


def pendulum_tip(state: Any, params: Any) -> tuple[float, float]:
    """Where the rod ends; at angle 0 it stands upright, and it grows counter-clockwise."""
    return -float(params.l) * float(np.sin(state.theta)), float(params.l) * float(np.cos(state.theta))


def pendulum(state: Any, params: Any, action: Any = None) -> Canvas:
    """A rod about a fixed joint, and an arc as long as the torque that turns it."""
    reach = 1.25 * float(params.l)
    canvas = fitting((-reach, -reach), (reach, reach))
    canvas.line([(0, float(params.l) * 1.12), (0, float(params.l) * 1.2)], FAINT, 2)
    canvas.line([(0, 0), pendulum_tip(state, params)], RED, 0.16 * canvas.scale)
    canvas.circle((0, 0), 0.05, INK)
    if action is not None:
        torque = float(np.clip(np.ravel(action)[0], -params.max_torque, params.max_torque))
        _turn(canvas, (0, 0), 0.45 * float(params.l), torque / float(params.max_torque), 2.4)
    return canvas


def _turn(canvas: Canvas, center, radius: float, share: float, most: float) -> None:
    """An arc with a head about ``center``; ``share`` in [-1, 1] of the angle ``most``, counter-clockwise if positive."""
    if abs(share) < 0.02:
        return
    angles = np.pi / 2 + np.linspace(-share * most / 2, share * most / 2, 24)
    points = np.asarray(center) + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    canvas.line(points, GREEN, 2.5)
    way = np.sign(share) * np.array([-np.sin(angles[-1]), np.cos(angles[-1])])
    canvas.arrow(points[-1], points[-1] + 0.12 * WIDTH / canvas.scale / 3 * way, GREEN, 2.5)


DRAWINGS = {
    "CartPole": cartpole,
    "Acrobot": acrobot,
    "MountainCar": mountain_car,
    "ContinuousMountainCar": mountain_car,
    "Pendulum": pendulum,
}
