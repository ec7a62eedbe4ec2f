"""Grid-World: levels on which learned update rules are meta-trained; an agent collects objects that pay and come back.

A level is all numbers: its size, walls, time limit and objects are the traced ``params``, so lanes may have levels of their
own, and new levels never compile again. In a step the agent moves (up, down, left, right, stay; into a wall or off the edge it
stays), collects the object that is there, and each object missing before the step returns with its probability; collecting one
may end the episode.

| name                   | levels                                                                                          |
|------------------------|-------------------------------------------------------------------------------------------------|
| all                    | sampled: 4 to 10 wide, 1 to 5 objects, limit 20 to 750; the family of meta-training             |
| small, medium, large   | its parts: 4-6 wide, limit 20-100; 6-8, 100-250; 8-10, 250-750                                  |
| debug                  | sampled, 4 wide, 1 or 2 objects, limit 10-20, for tests                                         |
| dense, sparse, long, longer, long_dense | hand-made, tabular                                                             |
| rand_dense, rand_sparse, rand_long, rand_small, rand_very_dense | hand-made, new places in every episode, pixel-like     |
| maze-0 ... maze-8      | mazes 13 wide with sampled objects, never meta-trained on                                       |

Source: Jackson et al. 2023, arXiv 2310.02782, as in its authors' code (EmptyJackson/groove). paper: - / authors' code: cells of
hand-made levels, and mazes, of its own / here: ours, with the same sizes, objects and limits.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.envs.auto_reset import AutoReset
from pgjax.errors import RequestError
from pgjax.spaces import Box, Discrete

OPTIONS = ("reset_mode", "observation", "seed")
OBSERVATIONS = ("one_hot", "index")
NUM_ACTIONS = 5
# Rows and columns that up, down, left, right and stay go.
_MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)], np.int32)
# The clock's part of an observation, per step.
_TIME_SCALE = 1e-3
_REWARD, _END, _RETURN = range(3)


class Level(NamedTuple):
    """One level; C cells of the largest grid, K objects at most, E types of objects. Cells are numbered row by row.

    size: int32 [], cells in a row and in a column; only the first size² of C exist.  wall: [C] bool.  start: int32 [].
    object_cell, object_type: int32 [K].  object_there: [K] bool, whether there is such an object at all.
    reward, p_terminate, p_respawn: [E], of each type.  max_steps_in_episode: int32 [].
    """

    size: jax.Array
    wall: jax.Array
    start: jax.Array
    object_cell: jax.Array
    object_type: jax.Array
    object_there: jax.Array
    reward: jax.Array
    p_terminate: jax.Array
    p_respawn: jax.Array
    max_steps_in_episode: jax.Array


@dataclasses.dataclass(frozen=True)
class Family:
    """Levels of one shape.

    max_size, max_objects, num_types: √C, K and E of ``Level``.  max_steps: the largest limit.
    tabular: every state has an observation of its own; else objects and start are drawn anew in each episode.
    sample: ``key -> Level``.  drawn: whether levels differ; else ``sample`` always gives the same one.
    """

    max_size: int
    max_objects: int
    num_types: int
    max_steps: int
    tabular: bool
    sample: Callable[[jax.Array], Level]
    drawn: bool = True

    @property
    def num_states(self) -> int:
        """Places of the agent times sets of objects that are there; the clock not counted."""
        return self.max_size**2 * 2**self.max_objects


class GridWorld(AutoReset):
    """A family's ``Environment``; ``default_params`` is one of its levels. ``family`` samples others."""

    def __init__(self, family: Family, **kwargs):
        super().__init__(**kwargs)
        self.family = family

    def sample_level(self, key: jax.Array) -> Level:
        """A level of the family, as ``params``; consumes ``key``."""
        return self.family.sample(key)


# ---- Levels ---------------------------------------------------------------------------------------------------------


def _log_uniform(key, low, high, shape=()):
    return jnp.exp(jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high)))


def _whole(key, low, high):
    return jax.random.randint(key, (), low, high + 1, jnp.int32)


def _distinct_cells(key: jax.Array, free: jax.Array, num: int) -> jax.Array:
    """``num`` different ones of the ``free`` [C] bool cells, int32 [num]."""
    return jax.lax.top_k(jnp.where(free, jax.random.uniform(key, free.shape), -1.0), num)[1].astype(jnp.int32)


def _sampled(sizes, objects, limits, num_walls, wall: np.ndarray | None = None, min_reward: float = -1.0) -> Family:
    """Sampled levels. Ranges are inclusive; ``wall`` [C] fixes the walls, of which ``num_walls`` are drawn otherwise."""
    max_size, max_objects = sizes[1], objects[1]
    cells = max_size**2

    def sample(key):
        keys = jax.random.split(key, 8)
        size, num_objects = _whole(keys[0], *sizes), _whole(keys[1], *objects)
        if wall is None:
            # In smaller grids some of them are outside, where they have no effect.
            drawn = _distinct_cells(keys[2], jnp.ones(cells, bool), num_walls)
            walls = jnp.zeros(cells, bool).at[drawn].set(True)
        else:
            walls = jnp.asarray(wall)
        free = ~walls & (jnp.arange(cells) < size**2)
        start, *object_cell = _distinct_cells(keys[3], free, 1 + max_objects)
        low = jnp.full(max_objects, min_reward).at[0].set(0.0)
        return Level(
            size=size,
            wall=walls,
            start=start,
            object_cell=jnp.stack(object_cell),
            object_type=jnp.arange(max_objects, dtype=jnp.int32),
            object_there=jnp.arange(max_objects) < num_objects,
            reward=jax.random.uniform(keys[4], (max_objects,), minval=low, maxval=1.0),
            p_terminate=_log_uniform(keys[5], 0.01, 1, (max_objects,)),
            p_respawn=_log_uniform(keys[6], 0.001, 0.1, (max_objects,)),
            max_steps_in_episode=jnp.round(_log_uniform(keys[7], *limits)).astype(jnp.int32),
        )

    return Family(max_size, max_objects, max_objects, limits[1], True, sample)


def _level(size: int, wall, start: int, cells: list[int], types: list[int], kinds: np.ndarray, limit: int) -> Level:
    numbers: dict[str, Any] = dict(
        size=np.int32(size),
        wall=np.asarray(wall, bool),
        start=np.int32(start),
        object_cell=np.array(cells, np.int32),
        object_type=np.array(types, np.int32),
        object_there=np.ones(len(cells), bool),
        reward=kinds[:, _REWARD],
        p_terminate=kinds[:, _END],
        p_respawn=kinds[:, _RETURN],
        max_steps_in_episode=np.int32(limit),
    )
    return Level(**numbers)


def _fixed(level: Level, tabular: bool) -> Family:
    size = math.isqrt(len(level.wall))
    shape = (size, len(level.object_cell), len(level.reward), int(level.max_steps_in_episode))
    return Family(*shape, tabular, lambda key: level, drawn=False)


def _drawn(text: str, kinds: dict[str, tuple[float, float, float]], limit: int) -> Family:
    """A level from a picture: ``#`` a wall, ``S`` the start, letters objects of a kind (reward, p_terminate, p_respawn)."""
    rows = text.split()
    letters, flat = sorted(kinds), "".join(rows)
    cells = [cell for cell, letter in enumerate(flat) if letter in kinds]
    types = [letters.index(flat[cell]) for cell in cells]
    table = np.array([kinds[letter] for letter in letters], np.float32)
    wall = [letter == "#" for letter in flat]
    return _fixed(_level(len(rows), wall, flat.index("S"), cells, types, table, limit), tabular=True)


def _scattered(size: int, kinds: list[tuple[float, float, float]], types: list[int], limit: int) -> Family:
    """A level without walls whose start and objects are somewhere else in every episode."""
    cells = list(range(1, len(types) + 1))
    level = _level(size, np.zeros(size**2), 0, cells, types, np.array(kinds, np.float32), limit)
    return _fixed(level, tabular=False)


def carve(size: int, seed: int, openings: int) -> np.ndarray:
    """Walls [size²] bool of a maze, ``size`` odd: one way between any two rooms, then ``openings`` more walls taken out.

    Rooms are the cells of even row and column. They are joined depth first, in an order that ``seed`` draws.
    """
    random = np.random.default_rng(seed)
    wall = np.ones((size, size), bool)
    wall[::2, ::2] = False
    seen, path = {(0, 0)}, [(0, 0)]
    while path:
        row, column = path[-1]
        steps = [(row + 2 * dr, column + 2 * dc) for dr, dc in _MOVES[:4].tolist()]
        steps = [(r, c) for r, c in steps if 0 <= r < size and 0 <= c < size and (r, c) not in seen]
        if not steps:
            path.pop()
            continue
        there = steps[random.integers(len(steps))]
        wall[(row + there[0]) // 2, (column + there[1]) // 2] = False
        seen.add(there)
        path.append(there)
    # Between two rooms: one of row and column is odd.
    between = [(r, c) for r in range(size) for c in range(size) if (r + c) % 2 and wall[r, c]]
    for index in random.permutation(len(between))[:openings]:
        wall[between[index]] = False
    return wall.ravel()


_DENSE = """
...........
.a.......b.
...........
...........
...........
.....S.....
...........
...........
...........
.c.......a.
...........
"""
_SPARSE = """
.............
.............
..a..........
.............
.............
.............
......S......
.............
.............
.............
..........b..
.............
.............
"""
_LONG = """
a..........
...........
..b........
...........
...........
.....S.....
...........
...........
........b..
...........
..........a
"""
_LONGER = """
a...#...b
....#....
.........
..b.#....
....#.S..
....#....
.........
....#.b..
....#...a
"""
_LONG_DENSE = """
.....#.....
.a...#...a.
...........
.....#.....
.....#.....
##.##S##.##
.....#.....
.....#.....
...........
.a...#...a.
.....#.....
"""
_GOOD, _BAD = (1, 0, 0.05), (-1, 0.5, 0.1)

_FAMILIES: dict[str, Callable[[], Family]] = {
    "all": lambda: _sampled((4, 10), (1, 5), (20, 750), 15),
    "small": lambda: _sampled((4, 6), (1, 3), (20, 100), 7),
    "medium": lambda: _sampled((6, 8), (2, 4), (100, 250), 10),
    "large": lambda: _sampled((8, 10), (2, 5), (250, 750), 15),
    "debug": lambda: _sampled((4, 4), (1, 2), (10, 20), 2),
    "dense": lambda: _drawn(_DENSE, {"a": _GOOD, "b": _BAD, "c": (-1, 0, 0.5)}, 500),
    "sparse": lambda: _drawn(_SPARSE, {"a": (1, 1, 0), "b": (-1, 1, 0)}, 50),
    "long": lambda: _drawn(_LONG, {"a": (1, 0, 0.01), "b": (-1, 0.5, 1)}, 1000),
    "longer": lambda: _drawn(_LONGER, {"a": (1, 0.1, 0.01), "b": (-1, 0.8, 1)}, 2000),
    "long_dense": lambda: _drawn(_LONG_DENSE, {"a": (1, 0, 0.005)}, 2000),
    "rand_dense": lambda: _scattered(11, [_GOOD, _BAD, (-1, 0, 0.5)], [0, 0, 1, 2], 500),
    "rand_long": lambda: _scattered(11, [(1, 0, 0.01), (-1, 0.5, 1)], [0, 0, 1, 1], 1000),
    "rand_small": lambda: _scattered(7, [_GOOD, _BAD], [0, 0, 1, 1], 500),
    "rand_sparse": lambda: _scattered(7, [(1, 1, 1), (-1, 1, 1)], [0, 1, 1], 50),
    "rand_very_dense": lambda: _scattered(11, [(1, 0, 1)], [0], 2000),
    **{
        # From mazes with a single way between any two rooms to such with many.
        f"maze-{i}": lambda i=i: _sampled((13, 13), (3, 3), (25, 50), 0, carve(13, i, openings=4 * i), min_reward=0.0)
        for i in range(9)
    },
}
MAZES = tuple(name for name in _FAMILIES if name.startswith("maze-"))


def family(short_name: str) -> Family:
    """The levels of that name, such as ``all``."""
    return _FAMILIES[short_name]()


# ---- Dynamics -------------------------------------------------------------------------------------------------------


def moved(level: Level, cell: jax.Array, action: jax.Array) -> jax.Array:
    """The cell after a move."""
    row, column = cell // level.size, cell % level.size
    step = jnp.asarray(_MOVES)[action]
    row, column = (jnp.clip(x + dx, 0, level.size - 1) for x, dx in ((row, step[..., 0]), (column, step[..., 1])))
    there = row * level.size + column
    return jnp.where(jnp.asarray(level.wall)[there], cell, there)


class _State(NamedTuple):
    """cell: int32 [], of the agent.  object_cell: int32 [K].  there: [K] bool, objects to be collected.  steps: int32 []."""

    cell: jax.Array
    object_cell: jax.Array
    there: jax.Array
    steps: jax.Array


def state_index(family: Family, cell: jax.Array, there: jax.Array) -> jax.Array:
    """The number of a tabular state, below ``family.num_states``: cell + C Σ_k 2^k there[k]."""
    return cell + family.max_size**2 * (there * 2 ** jnp.arange(family.max_objects)).sum(-1)


def _observer(family: Family, observation: str) -> tuple[Callable, Box]:
    cells = family.max_size**2

    def index(level, state):
        number = state_index(family, state.cell, state.there)
        return jnp.stack([number.astype(jnp.float32), _TIME_SCALE * state.steps])

    def one_hot(level, state):
        number = state_index(family, state.cell, state.there)
        return jnp.append(jax.nn.one_hot(number, family.num_states), _TIME_SCALE * state.steps)

    def planes(level, state):
        """The agent's cell, then the cells of every type's objects."""
        place = jax.nn.one_hot(state.object_cell, cells) * state.there[:, None]
        kinds = jax.nn.one_hot(jnp.asarray(level.object_type), family.num_types, axis=0) @ place
        return jnp.concatenate([jax.nn.one_hot(state.cell, cells), kinds.ravel(), _TIME_SCALE * state.steps[None]])

    clock = _TIME_SCALE * family.max_steps
    if observation == "index":
        return index, Box((2,), 0.0, (float(family.num_states - 1), clock))
    size = family.num_states if family.tabular else cells * (1 + family.num_types)
    high = (1.0,) * size + (clock,)
    return (one_hot if family.tabular else planes), Box((size + 1,), 0.0, high)


def _dynamics(family: Family, observe: Callable) -> tuple[Callable, Callable]:
    cells = family.max_size**2

    def start(key, level):
        cell, object_cell = jnp.asarray(level.start), jnp.asarray(level.object_cell)
        if not family.tabular:
            free = ~jnp.asarray(level.wall) & (jnp.arange(cells) < level.size**2)
            places = _distinct_cells(key, free, 1 + family.max_objects)
            cell, object_cell = places[0], places[1:]
        state = _State(cell, object_cell, jnp.asarray(level.object_there), jnp.zeros((), jnp.int32))
        return state, observe(level, state)

    def advance(key, state, action, level):
        kind = jnp.asarray(level.object_type)
        reward, p_terminate, p_respawn = (jnp.asarray(x)[kind] for x in (level.reward, level.p_terminate, level.p_respawn))
        draw = jax.random.uniform(key, (1 + family.max_objects,))
        cell = moved(level, state.cell, action)
        collected = state.there & (state.object_cell == cell)
        # What was missing before the step may return; what is collected in it may not.
        returns = ~state.there & level.object_there & (draw[1:] < p_respawn)
        there = (state.there & ~collected) | returns
        state = _State(cell, state.object_cell, there, state.steps + 1)
        terminated = draw[0] < (collected * p_terminate).sum()
        truncated = state.steps >= level.max_steps_in_episode
        return state, observe(level, state), (collected * reward).sum(), terminated, truncated, {}

    return start, advance


def registered() -> list[str]:
    """Names without the library's."""
    return list(_FAMILIES)


def factory(short_name: str) -> Callable:
    """The callable behind a name; its parameters are options of ``make``, besides ``OPTIONS``."""
    return _FAMILIES[short_name] if not short_name.startswith("maze-") else lambda: family(short_name)


def make(short_name: str, *, name: str, reset_mode: str = "exact", observation: str = "one_hot", seed: int = 0) -> GridWorld:
    """The environment of that name.

    Args:
      observation: ``one_hot``: [S + 1], the state and 0.001 times the clock; for levels that are not tabular, planes of the
        agent and of each type of object, flat, in place of the state. ``index``: [2], the state's number and the clock, for
        agents that look their parameters up; tabular levels only.
      seed: of the level that is the default, where levels are sampled.

    Raises: RequestError for an observation that there is not, and for a seed that is no whole number.
    """
    levels = family(short_name)
    if observation not in OBSERVATIONS:
        raise RequestError(f"observation = {observation!r} is not one of {', '.join(OBSERVATIONS)}")
    if observation == "index" and not levels.tabular:
        raise RequestError(f"observation = 'index' needs states that can be numbered, and {name} has none; use 'one_hot'")
    if type(seed) is not int or seed < 0:
        raise RequestError(f"seed = {seed!r} must be a whole number, at least 0")
    observe, space = _observer(levels, observation)
    start, advance = _dynamics(levels, observe)
    return GridWorld(
        levels,
        name=name,
        start=start,
        advance=advance,
        observation_space=space,
        action_space=Discrete(NUM_ACTIONS),
        max_episode_steps=levels.max_steps,
        default_params=jax.tree.map(np.asarray, levels.sample(jax.random.key(seed))),
        reset_mode=reset_mode,
        advance_uses_key=True,
        source=levels,
    )


# ---- Optimal returns ------------------------------------------------------------------------------------------------


def _backup(family: Family, level: Level, value: jax.Array) -> jax.Array:
    """V with one step more to go, [C, M], from V [C, M]; M sets of objects, bit k for object k."""
    num = family.max_objects
    sets = np.arange(2**num)
    holds = (sets[None] >> np.arange(num)[:, None]) & 1 == 1  # [K, M]
    there = jnp.asarray(level.object_there)
    p_respawn = jnp.asarray(level.p_respawn)[level.object_type] * there

    def respawn(value, k):
        """The expectation over whether object k returns, where it is missing; sets are the last axis."""
        back = value[..., sets | (1 << k)]
        return jnp.where(holds[k], value, (1 - p_respawn[k]) * value + p_respawn[k] * back)

    arrival = value
    for k in range(num):
        arrival = respawn(arrival, k)
    for k in range(num):
        cell = jnp.asarray(level.object_cell)[k]
        after = value[cell]
        for other in range(num):
            after = after if other == k else respawn(after, other)
        kind = jnp.asarray(level.object_type)[k]
        goes_on = 1 - jnp.minimum(jnp.asarray(level.p_terminate)[kind], 1)
        collecting = jnp.asarray(level.reward)[kind] + goes_on * after[sets & ~(1 << k)]
        arrival = arrival.at[cell].set(jnp.where(holds[k] & there[k], collecting, arrival[cell]))
    cell = jnp.arange(family.max_size**2)
    successor = jax.vmap(lambda action: moved(level, cell, action))(jnp.arange(NUM_ACTIONS))
    return arrival[successor].max(0)


def _no_steps_left(family: Family) -> jax.Array:
    if not family.tabular:
        raise RequestError("optimal returns are known for tabular levels only; this one draws new places in every episode")
    return jnp.zeros((family.max_size**2, 2**family.max_objects))


def optimal_values(family: Family, level: Level) -> jax.Array:
    """V*, undiscounted, [H + 1, C, M] with h = 0 ... H = ``family.max_steps`` steps to go, in cell c with set m of objects."""
    first = _no_steps_left(family)

    def back(value, _):
        value = _backup(family, level, value)
        return value, value

    return jnp.concatenate([first[None], jax.lax.scan(back, first, length=family.max_steps)[1]])


def optimal_return(family: Family, level: Level) -> jax.Array:
    """The largest expected undiscounted return of an episode, []: exact, by dynamic programming over the level's states."""
    first = _no_steps_left(family)
    value = jax.lax.fori_loop(0, level.max_steps_in_episode, lambda _, value: _backup(family, level, value), first)
    all_there = (jnp.asarray(level.object_there) * 2 ** jnp.arange(family.max_objects)).sum()
    return value[level.start, all_there]
