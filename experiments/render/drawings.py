"""Which drawing an environment has."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pgjax.experiments.render import classic, grids
from pgjax.experiments.render.bars import Bars
from pgjax.experiments.render.episodes import Episode, View

Paint = Callable[[int], Image.Image]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How an environment is shown.

    about: what is seen, in words.  view: what has to be kept of each step, for ``episodes.play``.
    painter: ``episode -> (time from 0 to T -> picture)``.
    viewer: ``(title, episode, seconds of a step or None) -> HTML``, a page to look at it from any side; None if it is flat.
    """

    about: str
    view: View
    painter: Callable[[Episode], Paint]
    viewer: Callable[[str, Episode, float | None], str] | None = None


def drawing_of(env, renderer: str = "plain") -> Drawing:
    """The drawing of an environment; those that have none of their own show their observations.

    Args: renderer: of rigid bodies, ``plain`` or ``opengl``.
    """
    source = getattr(env, "source", None)
    names = [cls.__name__ for cls in type(source).__mro__ if cls.__module__.startswith("gymnax.")]
    for name in names:
        if name in classic.DRAWINGS:
            return _classic(env, classic.DRAWINGS[name])
    # Most environments need not load MuJoCo for that.
    if hasattr(env, "integration_state") or (source is not None and not names):
        from pgjax.experiments.render.bodies import simulation_of

        simulation = simulation_of(env)
        if simulation is not None:
            return _bodies(simulation, renderer)
    shape = env.observation_space.shape
    if len(shape) == 3 and shape[-1] <= 32:
        channels = next((grids.CHANNELS[name] for name in names if name in grids.CHANNELS), None)
        if channels is not None and len(channels) != shape[-1]:
            channels = None
        about = "the observed board, a colour for each channel"
        return Drawing(about, _is_on, lambda episode: lambda t: grids.board(episode.view[t], channels).finish())
    if len(shape) == 2:
        about = "the observed grid, from dark to light"
        return Drawing(about, _observed, lambda episode: lambda t: grids.heights(episode.view[t]).finish())
    about = "there is no drawing of this environment: its observation as bars, and the return so far"
    return Drawing(about, _observed, _bars)


def _action(episode: Episode, t: int):
    """What is done at time t; None at the end."""
    return episode.action[t] if t < episode.length else None


def _classic(env, draw) -> Drawing:
    params = jax.tree.map(np.asarray, env.default_params)

    def painter(episode: Episode) -> Paint:
        def paint(t: int):
            state = jax.tree.map(lambda x: x[t], episode.view)
            return draw(state, params, _action(episode, t)).finish()

        return paint

    return Drawing("drawn from the state", lambda env_state, obs: env.running(env_state), painter)


def _bodies(simulation, renderer: str) -> Drawing:
    from pgjax.experiments.render.bodies import Scene

    def painter(episode: Episode) -> Paint:
        scene = Scene(simulation, episode.view)
        shot = scene.shot()
        if renderer == "opengl":
            from pgjax.experiments.render.opengl import Camera

            return Camera(scene, shot).draw
        return lambda t: scene.draw(t, shot).finish()

    def viewer(title: str, episode: Episode, step_seconds: float | None) -> str:
        from pgjax.experiments.render.viewer import viewer_page

        scene = Scene(simulation, episode.view)
        return viewer_page(title, scene, scene.shot(), episode.returns, step_seconds)

    about = "drawn by MuJoCo's renderer" if renderer == "opengl" else "outlines of the bodies, drawn without OpenGL"
    return Drawing(about, simulation.view, painter, viewer)


def _bars(episode: Episode) -> Paint:
    bars = Bars(episode.view, episode.returns)
    return lambda t: bars.paint(t, _action(episode, t)).finish()


def _observed(env_state, obs: jax.Array) -> jax.Array:
    return obs


def _is_on(env_state, obs: jax.Array) -> jax.Array:
    return (obs > 0).astype(jnp.uint8)
