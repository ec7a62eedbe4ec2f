"""A page to look at an episode of rigid bodies from any side; it needs no network and no other file."""

import base64
import json
from pathlib import Path
from typing import Any

import mujoco as _mujoco
import numpy as np

from pgjax.experiments.html_page import document, esc
from pgjax.experiments.render.bodies import Scene, Shot, darker, mixed
from pgjax.experiments.render.gif import DEFAULT_SECONDS

mujoco: Any = _mujoco  # a compiled module without type information

# More would make the page large without making the motion smoother.
_MAX_FRAMES = 500
_MAX_VERTICES = 150
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1000px; padding: 1rem; color: #222; }
h1 { font-size: 1.2rem; margin: 0 0 .4rem; }
canvas { width: 100%; height: 65vh; border: 1px solid #ccc; touch-action: none; cursor: grab; display: block; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: .5rem 0; }
#time { flex: 1; min-width: 10rem; }
small { color: #666; }
"""


def viewer_page(title: str, scene: Scene, shot: Shot, returns: np.ndarray, step_seconds: float | None) -> str:
    """The HTML text. Drag turns the scene, the wheel makes it larger; it can be stopped, slowed down and gone through.

    Args: returns: [T + 1], so far.  step_seconds: of a step.
    """
    # In a comment or a string of JSON nothing may end the element that it stands in.
    data = json.dumps(_scene(scene, shot, returns, step_seconds or DEFAULT_SECONDS)).replace("<", "\\u003c")
    script = (Path(__file__).parent / "viewer.js").read_text()
    speeds = "".join(
        f'<option value="{speed}"{" selected" if speed == 1 else ""}>{speed}x</option>' for speed in (0.1, 0.25, 0.5, 1, 2, 4)
    )
    body = f"""<h1>{esc(title)}</h1>
<canvas id="picture"></canvas>
<div class="controls">
<button id="play">pause</button>
<input id="time" type="range" min="0" max="{len(_times(scene)) - 1}" value="0" aria-label="time">
<label>speed <select id="speed">{speeds}</select></label>
<button id="back">first view</button>
<span id="told"></span>
</div>
<small>Drag turns the scene, the wheel changes its size.</small>
<script type="application/json" id="scene">{data}</script>"""
    return document(title, _STYLE, body, script)


def _scene(scene: Scene, shot: Shot, returns: np.ndarray, seconds: float) -> dict[str, Any]:
    times = _times(scene)
    place, turn = np.empty((len(times), len(scene.shapes), 3)), np.empty((len(times), len(scene.shapes), 4))
    for i, t in enumerate(times):
        scene.go_to(t)
        for g, geom in enumerate(scene.shapes):
            place[i, g] = scene.data.geom_xpos[geom]
            mujoco.mju_mat2Quat(turn[i, g], scene.data.geom_xmat[geom])
    floors = scene.floors()
    return {
        "shapes": [_shape(scene, geom) for geom in scene.shapes],
        "place": _packed(place),
        "turn": _packed(turn),
        "target": _packed(shot.targets[times]),
        "floor": float(scene.data.geom_xpos[floors[0]][2]) if floors else None,
        "azimuth": shot.azimuth,
        # So that from the side, too, a floor can be seen.
        "elevation": min(shot.elevation, -8.0),
        "height": shot.height,
        "step": times,
        "return": [float(value) if np.isfinite(value) else 0.0 for value in returns[times]],
        "seconds": seconds,
    }


def _shape(scene: Scene, geom: int) -> dict[str, Any]:
    model, color = scene.model, mixed(scene.colors()[geom])
    kinds = {"SPHERE": "sphere", "CAPSULE": "capsule", "ELLIPSOID": "ellipsoid", "CYLINDER": "cylinder", "MESH": "mesh"}
    kind = {int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}")): kind for name, kind in kinds.items()}
    shape = {
        "kind": kind.get(int(model.geom_type[geom]), "box"),
        "size": model.geom_size[geom].tolist(),
        "color": f"rgb({color[0]}, {color[1]}, {color[2]})",
        "edge": "rgb({}, {}, {})".format(*darker(color)),
    }
    if shape["kind"] == "mesh":
        mesh = model.geom_dataid[geom]
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        vertices = model.mesh_vert[first : first + count : max(1, count // _MAX_VERTICES)]
        shape["vertices"] = np.round(vertices.astype(float), 4).tolist()
    return shape


def _times(scene: Scene) -> list[int]:
    last = scene.num_states - 1
    return sorted({*range(0, last, -(-scene.num_states // _MAX_FRAMES)), last})


def _packed(numbers: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers, "<f4").tobytes()).decode()
