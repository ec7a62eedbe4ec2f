"""MuJoCo's own renderer, where OpenGL can draw without a screen."""

import os
import platform
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
from PIL import Image

from pgjax.errors import RequestError
from pgjax.experiments.render.canvas import HEIGHT, WIDTH

_BACKENDS = ("egl", "osmesa")
# In a process of its own, because a driver that does not fit may take the process with it.
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='.1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 8, 8)
renderer.update_scene(data)
renderer.render()
from OpenGL import GL
print("drawn by", GL.glGetString(GL.GL_RENDERER).decode())
renderer.close()
"""
_LEAST_ELEVATION = -8.0
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")


def find_backend() -> tuple[str, str] | None:
    """A value of ``MUJOCO_GL`` that can draw here and what draws, or None. One that is set already is the only one tried."""
    chosen = os.environ.get("MUJOCO_GL")
    candidates = (chosen,) if chosen else _BACKENDS if platform.system() == "Linux" else ("",)
    for backend in candidates:
        environment = {**os.environ, "MUJOCO_GL": backend}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        told = [line for line in done.stdout.splitlines() if line.startswith("drawn by ")]
        if done.returncode == 0 and told:
            return backend, told[0].removeprefix("drawn by ")
    return None


def choose(renderer: str) -> tuple[str, str]:
    """Which renderer to use, ``opengl`` or ``plain``, and one sentence on why. To be asked before MuJoCo is imported.

    Args: renderer: ``opengl``, ``plain``, or ``auto``: OpenGL where a graphics card does the work.
    Raises: RequestError if OpenGL is asked for and cannot draw here.
    """
    if renderer == "plain":
        return "plain", "as asked for"
    found = find_backend()
    if found is None:
        if renderer == "opengl":
            raise RequestError(
                "--renderer opengl: MuJoCo cannot draw here without a screen; install EGL or OSMesa, or take --renderer plain"
            )
        return "plain", "OpenGL cannot draw here without a screen"
    backend, by = found
    if renderer == "auto" and any(word in by.lower() for word in _SOFTWARE):
        return "plain", f"OpenGL would draw on the processor here, {by}; --renderer opengl has it do so"
    if backend:
        os.environ["MUJOCO_GL"] = backend
    return "opengl", by


class Camera:
    """Draws a scene of ``bodies`` with OpenGL."""

    def __init__(self, scene, shot):
        import mujoco as _mujoco

        mujoco: Any = _mujoco
        self._scene, self._shot = scene, shot
        try:
            self._renderer = mujoco.Renderer(scene.model, HEIGHT, WIDTH)
        except (mujoco.FatalError, RuntimeError) as error:
            raise RequestError(
                "renderer = 'opengl': MuJoCo has no OpenGL context; set MUJOCO_GL, such as to egl, before Python starts, "
                "or take renderer = 'plain'"
            ) from error
        flags = self._renderer.scene.flags
        # It doubles the size of the file, and the time where no graphics card helps.
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        # From a little above, so that a floor can be seen.
        self._camera.azimuth, self._camera.elevation = shot.azimuth, min(shot.elevation, _LEAST_ELEVATION)
        field_of_view = np.deg2rad(scene.model.vis.global_.fovy)
        # What is nearer than the middle looks larger than in the plain drawing, which knows no perspective.
        self._camera.distance = 0.57 * shot.height / np.tan(field_of_view / 2)
        # Before Python takes itself apart, which the renderer does not survive.
        weakref.finalize(self, self._renderer.close)

    def draw(self, t: int) -> Image.Image:
        scene, target = self._scene, self._shot.targets[t]
        scene.go_to(t)
        self._camera.lookat[:] = target
        # Runners leave the floor that the model has. It comes along by whole repetitions of its pattern.
        for plane in scene.planes:
            material = scene.model.geom_matid[plane]
            if scene.follows and material >= 0:
                period = 2 * scene.model.geom_size[plane, :2] / np.maximum(scene.model.mat_texrepeat[material], 1e-6)
                shift = period * np.round(target[:2] / np.maximum(period, 1e-6))
                scene.data.geom_xpos[plane, :2] = scene.model.geom_pos[plane, :2] + shift
        self._renderer.update_scene(scene.data, self._camera)
        return Image.fromarray(self._renderer.render())
