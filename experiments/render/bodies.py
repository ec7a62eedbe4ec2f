"""Rigid bodies: where the shapes of a MuJoCo or Brax simulation are, from which side to look, and a drawing without OpenGL."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import mujoco as _mujoco
import numpy as np

from pgjax.experiments.render.canvas import GREY, HEIGHT, WIDTH, Canvas
from pgjax.types import PyTree

mujoco: Any = _mujoco  # a compiled module without type information

# MuJoCo's viewer hides geoms of these groups and above: they are there for collisions.
_HIDDEN_GROUP = 3
# As numbers, because NumPy's are not equal to MuJoCo's enumerations.
_PLANE, _SPHERE, _CAPSULE, _ELLIPSOID, _CYLINDER, _MESH = (
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}")) for name in ("PLANE", "SPHERE", "CAPSULE", "ELLIPSOID", "CYLINDER", "MESH")
)
_FREE, _SLIDE, _HINGE = (int(getattr(mujoco.mjtJoint, f"mjJNT_{name}")) for name in ("FREE", "SLIDE", "HINGE"))
_GROUND, _TILE, _TILE_2, _SHADOW = "#e6e6e1", "#ecece8", "#dadad4", "#bcbcb5"
_CIRCLE = np.stack(
    [np.cos(np.linspace(0, 2 * np.pi, 20, endpoint=False)), np.sin(np.linspace(0, 2 * np.pi, 20, endpoint=False))], 1
)


@dataclasses.dataclass(frozen=True)
class Simulation:
    """How to see an environment's simulation.

    model: MuJoCo's model.
    view: ``(env_state, obs [B, *O]) -> pytree [B, ...]``, what is kept of a state; inside a compiled program.
    place: ``(data, view of one state) -> None``, brings MuJoCo's ``data`` into that state, as far as it can be seen.
    """

    model: Any
    view: Callable[[PyTree, jax.Array], PyTree]
    place: Callable[[Any, PyTree], None]


def simulation_of(env) -> Simulation | None:
    """The simulation behind an environment, or None if it is not one of rigid bodies."""
    if hasattr(env, "integration_state"):
        return _of_c_mujoco(env)
    source: Any = getattr(env, "source", None)
    if isinstance(source, mujoco.MjModel):
        return _of_mjx(env, source)
    kind = {cls.__module__.partition(".")[0] for cls in type(source).__mro__}
    if "brax" in kind and getattr(source, "sys", None) is not None:
        return _of_brax(env, env.default_params.sys.mj_model)
    if "mujoco_playground" in kind:
        return _of_playground(env, source.mj_model)
    return None


def _of_c_mujoco(env) -> Simulation:
    def place(data, view):
        numbers = np.ascontiguousarray(view).view(np.float64)
        mujoco.mj_setState(env.model, data, numbers, mujoco.mjtState.mjSTATE_INTEGRATION)
        _derive(env.model, data)

    return Simulation(env.model, lambda env_state, obs: env.integration_state(env_state), place)


def _of_mjx(env, model) -> Simulation:
    def place(data, view):
        data.qpos[:] = view
        _derive(model, data)

    return Simulation(model, lambda env_state, obs: env.running(env_state).qpos, place)


def _of_brax(env, model) -> Simulation:
    def view(env_state, obs):
        state = env.running(env_state).brax.pipeline_state
        return state.q, state.x.pos, state.x.rot

    def place(data, view):
        # Lights and cameras follow the joints. The shapes stay where the backend has them: those that keep bodies together by
        # springs let joints come apart a little.
        q, position, rotation = view
        data.qpos[:] = q
        _derive(model, data)
        for geom in range(model.ngeom):
            link = model.geom_bodyid[geom] - 1
            if link >= 0:
                turn = _matrix(rotation[link])
                data.geom_xpos[geom] = position[link] + turn @ model.geom_pos[geom]
                data.geom_xmat[geom] = (turn @ _matrix(model.geom_quat[geom])).ravel()

    return Simulation(model, view, place)


def _of_playground(env, model) -> Simulation:
    def parts(state) -> tuple:
        # On Warp, the adapter keeps the data in two parts.
        data = state.data[0] if isinstance(state.data, tuple) else state.data
        return data.qpos, data.mocap_pos, data.mocap_quat

    def place(data, view):
        data.qpos[:] = view[0]
        data.mocap_pos[:], data.mocap_quat[:] = view[1].reshape(-1, 3), view[2].reshape(-1, 4)
        _derive(model, data)

    return Simulation(model, lambda env_state, obs: parts(env.running(env_state).playground), place)


def _derive(model, data) -> None:
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    mujoco.mj_camlight(model, data)


def _matrix(quaternion) -> np.ndarray:
    quaternion, matrix = np.array(quaternion, np.float64), np.empty(9)
    # Brax adds noise to the first one of an episode and leaves it as it is.
    mujoco.mju_normalize4(quaternion)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


@dataclasses.dataclass
class Shot:
    """From where an episode is looked at.

    azimuth, elevation: of the camera's direction, in degrees, as MuJoCo has them: 90 and 0 look along y, with x to the right.
    targets: [T + 1, 3], the point in the middle of the picture.  height: of the picture, in metres.
    """

    azimuth: float
    elevation: float
    targets: np.ndarray
    height: float

    @property
    def axes(self) -> np.ndarray:
        """Rows: what points right and up in the picture, and away from the camera."""
        azimuth, elevation = np.deg2rad([self.azimuth, self.elevation])
        away = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
        right = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
        return np.stack([right, np.cross(right, away), away])

    @property
    def is_side(self) -> bool:
        return self.elevation == 0

    @property
    def is_top(self) -> bool:
        return self.elevation == -90


class Scene:
    """An episode of a simulation as a sequence of sets of shapes.

    Args: simulation: see there.  views: pytree [T + 1, ...], what its ``view`` kept.
    """

    def __init__(self, simulation: Simulation, views: PyTree):
        self.simulation, self.model = simulation, simulation.model
        self.data = mujoco.MjData(self.model)
        self._views = views
        self._at: int | None = None
        model = self.model
        seen = (model.geom_group < _HIDDEN_GROUP) & (self.colors()[:, 3] > 0)
        planes = model.geom_type == _PLANE
        self.shapes: list[int] = np.flatnonzero(seen & ~planes).tolist()
        self.planes: list[int] = np.flatnonzero(seen & planes).tolist()
        self.num_states = len(jax.tree.leaves(views)[0])
        self._body = _wanderer(model)

    @property
    def follows(self) -> bool:
        """Whether the camera goes along with a body."""
        return self._body is not None

    def go_to(self, t: int) -> None:
        """Brings ``data`` into the state of time t."""
        if t != self._at:
            self.simulation.place(self.data, jax.tree.map(lambda x: x[t], self._views))
            self._at = t

    def shot(self) -> Shot:
        """A side view for what moves in the vertical plane, from above for what moves in the horizontal one, else oblique.

        The camera goes along with a body that is free to go anywhere, and shows all of it at all times; the ground where
        the episode stays near it.
        """
        azimuth, elevation = _direction(self.model)
        shot = Shot(azimuth, elevation, np.zeros((self.num_states, 3)), 1.0)
        body = self._body
        moving = [g for g in self.shapes if self.model.body_weldid[self.model.geom_bodyid[g]] > 0]
        watched = moving if body is not None and moving else self.shapes
        lows, highs, roots = [], [], []
        for t in _some(self.num_states):
            self.go_to(t)
            root = np.zeros(3) if body is None else self.data.xpos[body] * [1, 1, 0]
            points = np.concatenate([_extremes(self.model, self.data, g, shot.axes) for g in watched]) - root
            across = points @ shot.axes[:2].T
            lows.append(across.min(0))
            highs.append(across.max(0))
        for t in range(self.num_states):
            self.go_to(t)
            roots.append(np.zeros(3) if body is None else self.data.xpos[body] * [1, 1, 0])
        # A tumble or a jump may reach far; what is almost always enough decides, and a little more.
        low, high = np.min(lows, 0), np.max(highs, 0)
        if body is not None and len(self.planes) and shot.is_side:
            low[1] = min(low[1], float(self.model.geom_pos[self.planes[0]][2]))
        size = np.maximum(high - low, 1e-3)
        shot.height = float(1.16 * max(size[1], size[0] * HEIGHT / WIDTH))
        middle = (low + high) / 2
        if body is not None and shot.is_side:
            # The ground near the lower edge, and room above.
            middle[1] = low[1] + 0.43 * shot.height
        shot.targets = np.asarray(roots) + middle[0] * shot.axes[0] + middle[1] * shot.axes[1]
        return shot

    def draw(self, t: int, shot: Shot) -> Canvas:
        """The picture of time t: every shape as the outline that its convex hull has from there, the farthest first."""
        self.go_to(t)
        canvas = Canvas((0, 0), HEIGHT / shot.height)
        axes, target = shot.axes, shot.targets[t]
        self._ground(canvas, shot, target)
        if not shot.is_side:
            self._shadows(canvas, axes, target)
        # The ends of long shapes and not their middles decide what is in front.
        outlines = []
        for geom in self.shapes:
            points = (_extremes(self.model, self.data, geom, axes) - target) @ axes.T
            outlines.append((points[:, 2].min() + points[:, 2].mean(), geom, points[:, :2]))
        colors = self.colors()
        for _, geom, points in sorted(outlines, key=lambda outline: -outline[0]):
            color = mixed(colors[geom])
            canvas.polygon(_hull(points), color, darker(color), 1.2)
        return canvas

    def colors(self) -> np.ndarray:
        """[G, 4], of the material where a geom has one."""
        material = self.model.geom_matid
        colors = np.array(self.model.geom_rgba)
        own = (material >= 0) & (colors == [0.5, 0.5, 0.5, 1.0]).all(-1)
        if own.any():
            colors[own] = self.model.mat_rgba[material[own]]
        return colors

    def _ground(self, canvas: Canvas, shot: Shot, target: np.ndarray) -> None:
        floors = self.floors()
        half = np.array([WIDTH, HEIGHT]) / canvas.scale / 2
        step = _round_step(shot.height / 5)
        if shot.is_side:
            # Where nothing is a floor, a ruler all the same, so that one sees what moves.
            level = float(self.data.geom_xpos[floors[0]][2]) - target[2] if floors else None
            along = shot.axes[0] @ target
            if level is not None:
                canvas.rectangle((-half[0], -half[1] * 2), (half[0], level), _GROUND)
                canvas.line([(-half[0], level), (half[0], level)], GREY, 1.5)
            if level is None or level < -half[1]:
                level = -half[1] + 22 / canvas.scale
            first = int(np.ceil((along - half[0]) / step))
            for k in range(first, int((along + half[0]) / step) + 1):
                x = k * step - along
                canvas.line([(x, level), (x, level - 5 / canvas.scale)], GREY, 1.5)
                canvas.text((x, level - 12 / canvas.scale), f"{k * step:g} m", GREY, 9)
        elif floors:
            level = float(self.data.geom_xpos[floors[0]][2])
            self._tiles(canvas, shot, target, half, step, level)

    def _shadows(self, canvas: Canvas, axes: np.ndarray, target: np.ndarray) -> None:
        """What a light from straight above leaves dark of the floor: it tells how high a body is."""
        for floor in self.floors()[:1]:
            for geom in self.shapes:
                points = _extremes(self.model, self.data, geom, np.eye(3))
                points[:, 2] = self.data.geom_xpos[floor][2]
                canvas.polygon(_hull((points - target) @ axes[:2].T), _SHADOW)

    def floors(self) -> list[int]:
        return [plane for plane in self.planes if self.data.geom_xmat[plane].reshape(3, 3)[2, 2] > 0.99]

    def _tiles(self, canvas: Canvas, shot: Shot, target: np.ndarray, half, step: float, level: float) -> None:
        """A chequered floor, as far as it can be seen."""
        axes = shot.axes
        # The corners of the picture, moved along the line of sight until they are on the floor.
        corners = []
        for sx in (-1, 1):
            for sy in (-1, 1):
                point = target + sx * half[0] * axes[0] + sy * half[1] * axes[1]
                corners.append(point + (level - point[2]) / axes[2, 2] * axes[2])
        low, high = np.floor(np.min(corners, 0) / step).astype(int), np.ceil(np.max(corners, 0) / step).astype(int)
        canvas.rectangle((-half[0], -half[1]), (half[0], half[1]), _TILE)
        for i in range(low[0], high[0]):
            for j in range(low[1], high[1]):
                if (i + j) % 2:
                    tile = np.array([(i, j, 0), (i + 1, j, 0), (i + 1, j + 1, 0), (i, j + 1, 0)]) * step
                    canvas.polygon((tile + np.array([0, 0, level]) - target) @ axes[:2].T, _TILE_2)
        canvas.text((-half[0] + 4 / canvas.scale, -half[1] + 8 / canvas.scale), f"a tile is {step:g} m", GREY, 9, "lm")


def _some(number: int) -> list[int]:
    return sorted({*range(0, number, max(1, number // 120)), number - 1})


def _round_step(length: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below ``length``."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(min(m * power for m in (1, 2, 5, 10) if m * power >= length * (1 - 1e-9)))


def _direction(model) -> tuple[float, float]:
    """Azimuth and elevation from which the joints of a model move across the picture."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    turns, slides = (np.abs(data.xaxis[model.jnt_type == kind]) for kind in (_HINGE, _SLIDE))
    if len(turns) + len(slides) < model.njnt:
        return 120.0, -25.0
    for normal, direction in ((1, (90.0, 0.0)), (2, (90.0, -90.0))):
        if (turns[:, normal] > 0.99).all() and (slides[:, normal] < 0.01).all():
            return direction
    return 120.0, -30.0


def _wanderer(model) -> int | None:
    """The body whose joints let it go anywhere, if there is one."""
    for joint in range(model.njnt):
        goes = model.jnt_type[joint] in (_FREE, _SLIDE)
        body = model.jnt_bodyid[joint]
        # A ball or a target that is moved about is not who is looked at.
        if goes and not model.jnt_limited[joint] and model.body_parentid[body] == 0 and model.body_subtreemass[body] > 0:
            return int(body) if model.body_subtreemass[body] > 0.5 * model.body_subtreemass[0] else None
    return None


def _extremes(model, data, geom: int, axes: np.ndarray) -> np.ndarray:
    """Points [P, 3] of a geom whose convex hull is its outline seen along ``axes[2]``."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    place, turn = data.geom_xpos[geom], data.geom_xmat[geom].reshape(3, 3)
    if kind in (_SPHERE, _CAPSULE):
        # A ball looks like a disc from everywhere.
        disc = size[0] * _CIRCLE @ axes[:2]
        half = size[1] * turn[:, 2] if kind == _CAPSULE else np.zeros(3)
        return np.concatenate([place + half + disc, place - half + disc])
    if kind == _ELLIPSOID:
        # The support points of an ellipsoid in the directions of the picture's plane.
        directions = (_CIRCLE @ axes[:2]) @ turn
        scaled = directions * size**2
        return place + (scaled / np.linalg.norm(directions * size, axis=1, keepdims=True)) @ turn.T
    if kind == _CYLINDER:
        ring = np.concatenate([size[0] * _CIRCLE, np.zeros((len(_CIRCLE), 1))], 1)
        half = np.array([0, 0, size[1]])
        return place + np.concatenate([ring + half, ring - half]) @ turn.T
    if kind == _MESH:
        mesh = model.geom_dataid[geom]
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        vertices = model.mesh_vert[first : first + count]
        return place + vertices[:: max(1, count // 300)] @ turn.T
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * size
    return place + corners @ turn.T


def _hull(points: np.ndarray) -> list[tuple[float, float]]:
    """Corners of the convex hull of [P, 2] points, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted(set(map(tuple, points.tolist())))
    if len(ordered) < 3:
        return ordered * 2 if len(ordered) == 1 else ordered

    def chain(sequence):
        kept: list = []
        for p in sequence:
            while len(kept) > 1:
                (ax, ay), (bx, by) = kept[-2], kept[-1]
                if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 0:
                    break
                kept.pop()
            kept.append(p)
        return kept[:-1]

    return chain(ordered) + chain(reversed(ordered))


def mixed(rgba: np.ndarray) -> tuple[int, int, int]:
    """A colour on white paper."""
    return tuple(int(255 * (1 - rgba[3] + rgba[3] * c)) for c in np.clip(rgba[:3], 0, 1))  # pyright: ignore[reportReturnType]


def darker(color: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(int(0.55 * c) for c in color)  # pyright: ignore[reportReturnType]
