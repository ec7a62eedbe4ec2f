"""Small tasks with known optima, on which PROPS and its sampling error were studied: walks, bandits, a plane.

| name          | what                                                                | actions | optimum               |
|---------------|---------------------------------------------------------------------|---------|-----------------------|
| TwoStep       | two choices; 2 after (0, 0), 0.5 after (0, 1), 1 after a first 1    | 2       | 2                     |
| GridWorld-LxL | from the centre to a corner: top left pays 0.5, bottom right 1      | 4       | 1 - 0.01 (L - 2)      |
| Chain-L       | from the middle to an end: the left one pays 0.8, the right one 1   | 2       | 1 - 0.01 (L // 2 - 1) |
| Cliff-Lx2L    | -1 a step along a cliff, which costs 100 and ends; the goal pays 0  | 4       | -2 L                  |
| BanditK       | one pull of K arms, paid normally; the last arm is the best         | K       | 1                     |
| Discrete2D-K  | across the plane to a goal by steps in K directions, -distance each | K       | no closed form        |

Optima are undiscounted returns, for an odd L. In walks every step that reaches no end pays -0.01 (Cliff: -1; TwoStep: 0), and
an observation is one-hot.

Source: Corrado and Hanna 2023, arXiv 2311.08290, as in its authors' code (NicholasCorrado/PPOROS and NicholasCorrado/PROPS).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.envs.auto_reset import AutoReset
from pgjax.envs.options import check_count
from pgjax.errors import RequestError
from pgjax.spaces import Box, Discrete

OPTIONS = ("reset_mode", "episode_length")
_UP, _DOWN, _LEFT, _RIGHT = (-1, 0), (1, 0), (0, -1), (0, 1)
# Length of a step in the plane, and how near to the goal is there.
_STRIDE = 0.05


class Table(NamedTuple):
    """A deterministic task with S states and A actions; the task's ``source``.

    successor: [S, A] int, the next state.  reward: [S, A].  terminal: [S] bool, states that end the episode.
    start: the first state.  limit: time limit in steps.
    """

    successor: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    start: int
    limit: int


class Parts(NamedTuple):
    """What ``AutoReset`` is made of."""

    start: Callable
    advance: Callable
    observation_space: Box
    action_space: Discrete
    limit: int
    params: dict[str, np.ndarray]
    source: Any


def two_step() -> Parts:
    """Seven states: 0 first, 1 and 2 after the first choice, 3 to 6 after the second. The safe branch pays 1."""
    successor = np.array([[1, 2], [3, 4], [5, 6], [3, 3], [4, 4], [5, 5], [6, 6]])
    reward = np.zeros((7, 2), np.float32)
    reward[1], reward[2] = (2, 0.5), (1, 1)
    return _walk(Table(successor, reward, np.arange(7) >= 3, 0, 2))


def grid_world(length: int) -> Parts:
    """Two corners end the episode: (0, 0) pays 0.5, (L - 1, L - 1) pays 1. Limit 3 L; actions up, down, left, right.

    authors' code: with even L the start lies between cells, and its observation is another cell's / here: up and left of it.
    """
    pay = np.full((length, length), -0.01)
    pay[0, 0], pay[-1, -1] = 0.5, 1
    centre = (length - 1) // 2
    return _walk(_grid(pay, pay > 0, (centre, centre), (_UP, _DOWN, _LEFT, _RIGHT), 3 * length))


def chain(length: int) -> Parts:
    """A row of L cells with an end at either side; actions left and right. Limit 4 L."""
    pay = np.full((1, length), -0.01)
    pay[0, 0], pay[0, -1] = 0.8, 1
    return _walk(_grid(pay, pay > 0, (0, length // 2), (_LEFT, _RIGHT), 4 * length))


def cliff(length: int) -> Parts:
    """L rows and 2 L columns; the bottom row is a cliff between the start, bottom left, and the goal, bottom right. Limit 6 L.

    authors' code: starts in the middle, with observations that several cells share / here: Sutton and Barto's start.
    """
    pay = np.full((length, 2 * length), -1.0)
    pay[-1, 1:-1], pay[-1, -1] = -100, 0
    terminal = np.zeros_like(pay, bool)
    terminal[-1, 1:] = True
    return _walk(_grid(pay, terminal, (length - 1, 0), (_UP, _DOWN, _LEFT, _RIGHT), 6 * length))


def bandit(num_arms: int, seed: int = 0) -> Parts:
    """Arms of mean U(0, 0.5) and standard deviation U(0, 1), the last one of mean 1 and 0.1; the observation is [1].

    ``seed`` draws the arms; they are parameters, so lanes may have arms of their own.
    """
    random = np.random.default_rng(seed)
    mean, std = (random.uniform(0, high, num_arms).astype(np.float32) for high in (0.5, 1.0))
    mean[-1], std[-1] = 1, 0.1

    def start(key, params):
        return {"steps": jnp.zeros((), jnp.int32)}, jnp.ones(1)

    def advance(key, state, action, params):
        mean, std = (jnp.asarray(params[name])[action] for name in ("mean", "std"))
        reward = mean + std * jax.random.normal(key)
        return {"steps": state["steps"] + 1}, jnp.ones(1), reward, jnp.ones((), bool), jnp.zeros((), bool), {}

    return Parts(start, advance, Box((1,), 0.0, 1.0), Discrete(num_arms), 1, {"mean": mean, "std": std}, None)


def discrete_2d(num_directions: int) -> Parts:
    """Position and goal in [-1, 1]², at least a step apart; the observation is (position, goal).

    Action k goes 0.05 far along (sin θ_k, cos θ_k), θ = linspace(0, 2π, K), so the first and the last are the same. The reward
    is the distance that is left, negative; below 0.05 the episode ends. Limit 50.
    """
    angle = np.linspace(0, 2 * np.pi, num_directions)
    stride = (_STRIDE * np.stack([np.sin(angle), np.cos(angle)], 1)).astype(np.float32)

    def observe(state):
        return jnp.concatenate([state["position"], state["goal"]])

    def start(key, params):
        # One goal in five hundred is too near; of eight, the first that is not.
        drawn = jax.random.uniform(key, (9, 2), minval=-1, maxval=1)
        position, goals = drawn[0], drawn[1:]
        far = jnp.linalg.norm(goals - position, axis=-1) >= _STRIDE
        state = {"position": position, "goal": goals[jnp.argmax(far)], "steps": jnp.zeros((), jnp.int32)}
        return state, observe(state)

    def advance(key, state, action, params):
        state = {**state, "position": state["position"] + jnp.asarray(stride)[action], "steps": state["steps"] + 1}
        distance = jnp.linalg.norm(state["position"] - state["goal"])
        truncated = state["steps"] >= params["max_steps_in_episode"]
        return state, observe(state), -distance, distance < _STRIDE, truncated, {}

    return Parts(start, advance, Box((4,)), Discrete(num_directions), 50, {}, None)


_TASKS: dict[str, Callable[..., Parts]] = {
    "TwoStep": two_step,
    **{f"GridWorld-{n}x{n}": partial(grid_world, n) for n in (5, 10, 20)},
    **{f"Chain-{n}": partial(chain, n) for n in (7, 15)},
    **{f"Cliff-{n}x{2 * n}": partial(cliff, n) for n in (3, 4, 5)},
    **{f"Bandit{n}": partial(bandit, n) for n in (5, 10, 20, 100, 1000)},
    **{f"Discrete2D-{n}": partial(discrete_2d, n) for n in (10, 50, 100)},
}


def registered() -> list[str]:
    """Names without the library's."""
    return list(_TASKS)


def factory(short_name: str) -> Callable:
    """The callable behind a name; its parameters are options of ``make``."""
    return _TASKS[short_name]


def make(short_name: str, *, name: str, reset_mode: str = "exact", episode_length: int | None = None, **options) -> AutoReset:
    """The task of that name. ``episode_length``: time limit in steps, the task's own if None."""
    if episode_length is not None:
        check_count("episode_length", episode_length)
    if "seed" in options and (type(options["seed"]) is not int or options["seed"] < 0):
        raise RequestError(f"seed = {options['seed']!r} must be a whole number, at least 0")
    parts = _TASKS[short_name](**options)
    limit = parts.limit if episode_length is None else episode_length
    return AutoReset(
        name=name,
        start=parts.start,
        advance=parts.advance,
        observation_space=parts.observation_space,
        action_space=parts.action_space,
        max_episode_steps=limit,
        default_params={**parts.params, "max_steps_in_episode": np.int32(limit)},
        reset_mode=reset_mode,
        source=parts.source,
    )


def _grid(pay: np.ndarray, terminal: np.ndarray, start: tuple[int, int], moves, limit: int) -> Table:
    """Cells [H, W] as states, row by row; a move off the edge stays. ``pay``: what arriving in a cell pays."""
    height, width = pay.shape
    cells = np.stack(np.divmod(np.arange(height * width), width), 1)
    moved = np.clip(cells[:, None] + np.array(moves)[None], 0, (height - 1, width - 1))
    successor = moved[..., 0] * width + moved[..., 1]
    return Table(successor, pay.ravel()[successor].astype(np.float32), terminal.ravel(), start[0] * width + start[1], limit)


def _walk(table: Table) -> Parts:
    num_states, num_actions = table.successor.shape

    def observe(cell):
        return jax.nn.one_hot(cell, num_states)

    def start(key, params):
        return {"cell": jnp.int32(table.start), "steps": jnp.zeros((), jnp.int32)}, observe(table.start)

    def advance(key, state, action, params):
        reward = jnp.asarray(params["reward"])[state["cell"], action]
        cell = jnp.asarray(table.successor, jnp.int32)[state["cell"], action]
        steps = state["steps"] + 1
        terminated = jnp.asarray(table.terminal)[cell]
        return {"cell": cell, "steps": steps}, observe(cell), reward, terminated, steps >= params["max_steps_in_episode"], {}

    space = Box((num_states,), 0.0, 1.0)
    return Parts(start, advance, space, Discrete(num_actions), table.limit, {"reward": table.reward}, table)
