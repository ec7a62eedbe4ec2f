"""Adapter for Gymnasium's MuJoCo tasks on a choice of physics engines, under the contract of ``pgjax.types.Environment``.

``tasks.py`` says what each task observes, earns and ends with; ``c_engine.py`` runs it on C MuJoCo, step for step as
Gymnasium does; ``mjx_engine.py`` on MJX, in JAX or in Warp, on any accelerator.
"""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco as _mujoco

from pgjax.envs import MUJOCO_PHYSICS
from pgjax.envs.auto_reset import RESET_MODES
from pgjax.envs.mjx_tools import quiet_loading
from pgjax.envs.mujoco.tasks import TASKS, Task
from pgjax.envs.options import check_count, fit
from pgjax.errors import RequestError, close_names

mujoco: Any = _mujoco  # a compiled module without type information

OPTIONS = ("physics", "reset_mode", "episode_length", "num_threads")


def registered() -> list[str]:
    """Names that ``make`` knows."""
    return list(TASKS)


def factory(short_name: str) -> Callable[..., Task]:
    """The function behind one name; its parameters are options of ``make``."""
    return TASKS[short_name]


def make(
    short_name: str,
    *,
    name: str,
    physics: str = "c",
    reset_mode: str | None = None,
    episode_length: int | None = None,
    num_threads: int | None = None,
    **options: Any,
):
    """A task on one of the physics engines; ``options`` are those of Gymnasium's constructor that the task has.

    Raises:
        RequestError: an option that is unknown, out of range or of no meaning for these physics, or a missing package.
    """
    if physics not in MUJOCO_PHYSICS:
        raise RequestError(f"physics = {physics!r} is unknown: {close_names(str(physics), MUJOCO_PHYSICS)}")
    if episode_length is not None:
        check_count("episode_length", episode_length)
    if reset_mode not in (None, *RESET_MODES):
        raise RequestError(f"reset_mode = {reset_mode!r} is unknown: {close_names(str(reset_mode), RESET_MODES)}")
    defaults = inspect.signature(TASKS[short_name]).parameters
    task = TASKS[short_name](**{key: fit(key, value, defaults[key].default) for key, value in options.items()})
    model = load_model(task.xml)
    if num_threads is not None:
        check_count("num_threads", num_threads)
    if physics == "c":
        from pgjax.envs.mujoco.c_engine import CMujoco

        if reset_mode not in (None, "exact"):
            raise RequestError(
                f"reset_mode = {reset_mode!r} is not for physics = 'c', where only environments that ended are started anew"
            )
        return CMujoco(name, model, task, episode_length=episode_length, num_threads=num_threads)
    if num_threads is not None:
        raise RequestError(f"num_threads = {num_threads} is for physics = 'c' only")
    from pgjax.envs.mujoco.mjx_engine import mjx_env

    return mjx_env(name, model, task, implementation=physics, reset_mode=reset_mode or "pool", episode_length=episode_length)


def load_model(xml: str) -> Any:
    """MuJoCo's model from one of the files that come with Gymnasium.

    Raises:
        RequestError: Gymnasium is not installed.
    """
    # Importing Gymnasium takes a third of a second and is not needed for its files.
    spec = importlib.util.find_spec("gymnasium")
    if spec is None or spec.origin is None:
        raise RequestError("mujoco environments need the package gymnasium, whose models they use: pip install 'pgjax[mujoco]'")
    path = Path(spec.origin).parent / "envs" / "mujoco" / "assets" / xml
    with quiet_loading():
        return mujoco.MjModel.from_xml_path(str(path))
