"""Grid-World: moves worked out by hand, and optimal returns against a plain recursion and against episodes played out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax
from pgjax.checks.environment import check_env
from pgjax.envs import grid_world, list_envs, make_env
from pgjax.errors import RequestError

UP, DOWN, LEFT, RIGHT, STAY = range(5)
NAMES = [entry.name for entry in list_envs() if entry.library == "grid"]
# Four cells wide, two objects at most; every level below is one of these, so its programs are compiled once.
ENV = make_env("grid/debug")
FAMILY = ENV.family


def level(
    start=5, cells=(6, 15), reward=(1.0, -0.5), ends=(0.0, 0.0), returns=(0.0, 0.0), there=(True, True), wall=(), limit=20
):
    """A level with the cells 0 1 2 3 / 4 5 6 7 / 8 9 10 11 / 12 13 14 15; the agent starts left of the first object."""
    walls = np.zeros(16, bool)
    walls[list(wall)] = True
    numbers = (np.array(x, np.float32) for x in (reward, ends, returns))
    objects = (np.array(cells, np.int32), np.arange(2, dtype=np.int32), np.array(there))
    return grid_world.Level(np.int32(4), walls, np.int32(start), *objects, *numbers, np.int32(limit))


@jax.jit
def played(actions, params, key):
    """Rewards [T], ends (terminated, truncated) [T] and final observations [T, O] of one environment."""
    key_start, key_steps = jax.random.split(key)
    state, obs = ENV.reset(key_start[None], params)

    def step(state, x):
        action, key = x
        state, timestep = ENV.step(key[None], state, action[None], params)
        return state, jax.tree.map(lambda x: x[0], timestep._replace(metrics=None))

    _, steps = jax.lax.scan(step, state, (actions, jax.random.split(key_steps, len(actions))))
    return obs[0], steps


def play(actions, params, seed=0):
    """The same for up to 20 actions, of which the rest is left out."""
    padded = jnp.array(list(actions) + [STAY] * (20 - len(actions)), jnp.int32)
    obs, steps = played(padded, params, jax.random.key(seed))
    steps = jax.tree.map(lambda x: np.asarray(x)[: len(actions)], steps)
    states = [int(np.argmax(o[:-1])) for o in (obs, *steps.final_obs)]
    return [divmod(state, 16)[::-1] for state in states], steps


def test_the_list_is_the_modules():
    assert {f"grid/{name}" for name in grid_world.registered()} == set(NAMES)


def test_moves_walls_and_edges():
    places, _ = play([LEFT, LEFT, UP, UP, RIGHT, DOWN, STAY, DOWN], level(wall=(1,)))
    assert [cell for cell, _ in places] == [5, 4, 4, 0, 0, 0, 4, 4, 8]


def test_objects_are_collected_once_and_pay():
    places, steps = play([RIGHT, LEFT, RIGHT, STAY], level())
    assert places == [(5, 3), (6, 2), (5, 2), (6, 2), (6, 2)]
    np.testing.assert_array_equal(steps.reward, [1, 0, 0, 0])
    assert not steps.terminated.any() and not steps.truncated.any()


def test_an_object_that_always_returns_is_back_on_the_step_after():
    places, steps = play([RIGHT, STAY, STAY, STAY, STAY], level(returns=(1.0, 0.0)))
    assert [there for _, there in places] == [3, 2, 3, 2, 3, 2]
    np.testing.assert_array_equal(steps.reward, [1, 0, 1, 0, 1])


def test_ends():
    _, steps = play([RIGHT, STAY], level(ends=(1.0, 0.0)))
    assert list(steps.terminated) == [True, False] and steps.reward[0] == 1
    # Ended by the object in the very step of the time limit: that wins.
    _, steps = play([STAY] * 2 + [RIGHT], level(ends=(1.0, 0.0), limit=3))
    assert list(steps.terminated) == [False, False, True] and not steps.truncated.any()
    _, steps = play([STAY] * 7, level(limit=3))
    assert list(steps.truncated) == [False, False, True] * 2 + [False] and not steps.terminated.any()
    # An episode starts afresh: the clock, the place, the objects.
    assert steps.obs[2][-1] == 0 and steps.final_obs[2][-1] == np.float32(0.003)
    assert np.argmax(steps.obs[2][:-1]) == 5 + 16 * 3


def test_chances_of_ending_and_of_returning():
    params = level(ends=(0.3, 0.0), returns=(0.2, 0.0))

    @jax.jit
    def many(key):
        state, _ = ENV.reset(jax.random.split(key, 4000), params)
        keys = jax.random.split(jax.random.key(1), (2, 4000))
        state, first = ENV.step(keys[0], state, jnp.full(4000, RIGHT), params)
        _, second = ENV.step(keys[1], state, jnp.full(4000, STAY), params)
        return first, second

    first, second = many(jax.random.key(0))
    ended, missing = np.asarray(first.terminated), ~np.asarray(first.terminated)
    returned = np.argmax(np.asarray(second.final_obs)[missing, :-1], 1) // 16 == 3
    # Within four standard errors.
    assert abs(ended.mean() - 0.3) < 4 * np.sqrt(0.21 / 4000) and abs(returned.mean() - 0.2) < 4 * np.sqrt(0.16 / 2800)


def test_state_numbers_are_all_different_and_all_used():
    numbers = [
        int(grid_world.state_index(FAMILY, np.int32(cell), np.array(there)))
        for cell in range(16)
        for there in itertools.product([False, True], repeat=2)
    ]
    assert sorted(numbers) == list(range(FAMILY.num_states)) == list(range(64))


def test_the_two_observations_say_the_same():
    indexed = make_env("grid/debug", observation="index")
    params = level(returns=(0.5, 0.0))
    keys = jax.random.split(jax.random.key(0), 8)
    (state, obs), (_, number) = ENV.reset(keys, params), indexed.reset(keys, params)
    _, step = jax.jit(ENV.step)(keys, state, jnp.arange(8) % 5, params)
    _, short = jax.jit(indexed.step)(keys, state, jnp.arange(8) % 5, params)
    for one, other in ((obs, number), (step.obs, short.obs)):
        np.testing.assert_array_equal(one[:, :-1].argmax(1), other[:, 0])
        np.testing.assert_array_equal(one[:, -1], other[:, 1])
    assert indexed.observation_space.bounds[1][0] == 63
    with pytest.raises(RequestError, match="observation = 'index'"):
        make_env("grid/rand_small", observation="index")


@pytest.mark.parametrize("name", ["all", "small"])
def test_sampled_levels(name):
    family = grid_world.family(name)
    sizes, objects, limits, walls = {
        "all": ((4, 10), (1, 5), (20, 750), 15),
        "small": ((4, 6), (1, 3), (20, 100), 7),
    }[name]
    levels = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 1000))
    levels = jax.tree.map(np.asarray, levels)
    cells = np.arange(sizes[1] ** 2)
    assert set(levels.size) == set(range(sizes[0], sizes[1] + 1))
    assert set(levels.object_there.sum(1)) == set(range(objects[0], objects[1] + 1))
    assert (levels.wall.sum(1) == walls).all() and abs(levels.wall.mean(0) - walls / len(cells)).max() < 0.06
    places = np.column_stack([levels.start, levels.object_cell])
    for place, wall, size in zip(places, levels.wall, levels.size, strict=True):
        assert len(set(place)) == len(place) and not wall[place].any() and (place < size**2).all()
    assert levels.reward[:, 0].min() >= 0 and levels.reward[:, 1:].min() < -0.95 and np.abs(levels.reward).max() <= 1
    for chance, (low, high) in ((levels.p_terminate, (0.01, 1)), (levels.p_respawn, (0.001, 0.1))):
        assert low * 0.999 <= chance.min() and chance.max() <= high * 1.001
        uniform_in_logs(chance, low, high)
    steps = levels.max_steps_in_episode
    assert limits[0] <= steps.min() and steps.max() <= limits[1] == family.max_steps
    uniform_in_logs(steps, *limits)


def uniform_in_logs(x, low, high):
    """The mean logarithm, within four standard errors, and its spread."""
    width = np.log(high / low)
    logs = np.log(x) - np.log(low)
    assert abs(logs.mean() - width / 2) < 4 * width / np.sqrt(12 * x.size)
    np.testing.assert_allclose(logs.std(), width / np.sqrt(12), rtol=0.1)


def value_by_recursion(params, horizon):
    """The best expected return, by trying every action and every set of objects that may return."""
    reward, ends, returns = (np.float64(x) for x in (params.reward, params.p_terminate, params.p_respawn))
    known = {}

    def value(cell, there, left):
        if not left:
            return 0.0
        if (cell, there, left) not in known:
            known[cell, there, left] = max(after(move(cell, dr, dc), there, left) for dr, dc in MOVES)
        return known[cell, there, left]

    def move(cell, dr, dc):
        row, column = cell // 4 + dr, cell % 4 + dc
        inside = 0 <= row < 4 and 0 <= column < 4
        return 4 * row + column if inside and not params.wall[4 * row + column] else cell

    def after(cell, there, left):
        got = [k for k in range(2) if there[k] and params.object_cell[k] == cell]
        missing = [k for k in range(2) if params.object_there[k] and not there[k]]
        follow = 0.0
        for back in itertools.product([False, True], repeat=len(missing)):
            chance = np.prod([returns[k] if b else 1 - returns[k] for k, b in zip(missing, back, strict=True)])
            new = tuple((there[k] and k not in got) or (k in missing and back[missing.index(k)]) for k in range(2))
            follow += chance * value(cell, new, left - 1)
        return sum(reward[k] for k in got) + (1 - sum(ends[k] for k in got)) * follow

    return value(int(params.start), tuple(map(bool, params.object_there)), horizon)


MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
best = jax.jit(lambda params: grid_world.optimal_return(FAMILY, params))
LEVELS = {
    "one that returns": level(returns=(0.3, 0.2), ends=(0.2, 0.0), reward=(0.7, 0.4), limit=12),
    "a punishment in the way": level(cells=(6, 4), wall=(1, 9, 2, 10), reward=(-0.3, 0.9), ends=(0.5, 0.1), limit=15),
    "one is not there": level(there=(True, False), returns=(0.1, 1.0), limit=10),
    "both end it": level(ends=(1.0, 0.4), returns=(0.5, 0.5), reward=(1.0, 0.8), cells=(0, 3), limit=20),
}


@pytest.mark.parametrize("name", LEVELS)
def test_optimal_returns_are_those_of_a_plain_recursion(name):
    params = LEVELS[name]
    expected = value_by_recursion(params, int(params.max_steps_in_episode))
    np.testing.assert_allclose(best(params), expected, rtol=1e-5)
    assert expected > 0.3


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_an_object_that_always_returns_pays_every_other_step(limit):
    params = level(returns=(1.0, 0.0), limit=limit, there=(True, False))
    np.testing.assert_allclose(best(params), 1 + (limit - 1) // 2)


def test_the_best_policy_earns_the_optimal_return():
    """Episodes of the policy that is greedy in the values, by the environment itself: within three standard errors."""
    params = jax.tree.map(jnp.asarray, LEVELS["one that returns"]._replace(max_steps_in_episode=np.int32(20)))
    num = 2000

    @jax.jit
    def returns(key):
        value = grid_world.optimal_values(FAMILY, params)
        key_start, key_steps = jax.random.split(key)
        state, _ = ENV.reset(jax.random.split(key_start, num), params)

        def step(carry, x):
            state, alive, total = carry
            key, left = x
            # One step of lookahead with expected respawns left out: those are the same for all actions but in the cell.
            there = (state.there * 2 ** jnp.arange(2)).sum(-1)
            cells = jnp.stack([grid_world.moved(params, state.cell, jnp.int32(a)) for a in range(5)])  # [5, num]
            gain = jax.vmap(lambda cell: arrival(value[left - 1], cell, there, state.there))(cells)
            action = gain.argmax(0).astype(jnp.int32)
            state, timestep = ENV.step(jax.random.split(key, num), state, action, params)
            total = total + alive * timestep.reward
            return (state, alive & ~(timestep.terminated | timestep.truncated), total), None

        def arrival(value, cell, there, has):
            got = has & (params.object_cell == cell[:, None])
            kept = there - (got * 2 ** jnp.arange(2)).sum(-1)
            p = jnp.where(has | ~params.object_there, 0.0, params.p_respawn)
            follow = 0.0
            for back in itertools.product([0, 1], repeat=2):
                chance = jnp.prod(jnp.where(jnp.array(back) == 1, p, 1 - p), axis=-1)
                follow += chance * value[cell, jnp.minimum(kept + back[0] * (p[:, 0] > 0) + 2 * back[1] * (p[:, 1] > 0), 3)]
            return (got * params.reward).sum(-1) + (1 - (got * params.p_terminate).sum(-1)) * follow

        xs = (jax.random.split(key_steps, 20), jnp.arange(20, 0, -1))
        (_, _, total), _ = jax.lax.scan(step, (state, jnp.ones(num, bool), jnp.zeros(num)), xs)
        return total

    total = np.asarray(returns(jax.random.key(0)))
    assert abs(total.mean() - best(params)) < 3 * total.std() / np.sqrt(num)
    assert total.std() > 0.1


def test_levels_of_ones_own_in_every_lane():
    levels = jax.tree.map(lambda *x: jnp.stack(x), *LEVELS.values())
    together = jax.jit(jax.vmap(lambda params: grid_world.optimal_return(FAMILY, params)))(levels)
    np.testing.assert_allclose(together, [best(params) for params in LEVELS.values()], rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), (4, 1))
    _, obs = jax.vmap(ENV.reset)(keys, levels)
    starts = np.argmax(np.asarray(obs)[:, 0, :-1], 1) % 16
    np.testing.assert_array_equal(starts, [int(params.start) for params in LEVELS.values()])


def test_new_places_in_every_episode():
    env = make_env("grid/rand_small")
    obs = np.asarray(jax.jit(env.reset)(jax.random.split(jax.random.key(0), 500), env.default_params)[1])
    agent, good, bad = obs[:, :-1].reshape(500, 3, 49).swapaxes(0, 1)
    assert (agent.sum(1) == 1).all() and (good.sum(1) == 2).all() and (bad.sum(1) == 2).all()
    assert (agent + good + bad).max() == 1 and len(set(agent.argmax(1))) == 49
    with pytest.raises(RequestError, match="tabular levels only"):
        grid_world.optimal_return(env.family, env.default_params)


def test_mazes_have_a_way_between_any_two_rooms():
    for number, name in enumerate(grid_world.MAZES):
        wall = make_env(f"grid/{name}").default_params.wall.reshape(13, 13)
        reached, frontier = {(0, 0)}, [(0, 0)]
        while frontier:
            row, column = frontier.pop()
            for r, c in ((row + dr, column + dc) for dr, dc in MOVES):
                if 0 <= r < 13 and 0 <= c < 13 and not wall[r, c] and (r, c) not in reached:
                    reached.add((r, c))
                    frontier.append((r, c))
        assert len(reached) == (~wall).sum() == 97 + 4 * number
    assert len({make_env(f"grid/{name}").default_params.wall.tobytes() for name in grid_world.MAZES}) == 9


def test_hand_made_levels_are_as_specified():
    wanted = {
        "dense": (11, 500, [(-1, 0, 0.5), (-1, 0.5, 0.1), (1, 0, 0.05), (1, 0, 0.05)]),
        "sparse": (13, 50, [(-1, 1, 0), (1, 1, 0)]),
        "long": (11, 1000, [(-1, 0.5, 1)] * 2 + [(1, 0, 0.01)] * 2),
        "longer": (9, 2000, [(-1, 0.8, 1)] * 3 + [(1, 0.1, 0.01)] * 2),
        "long_dense": (11, 2000, [(1, 0, 0.005)] * 4),
        "rand_dense": (11, 500, [(-1, 0, 0.5), (-1, 0.5, 0.1), (1, 0, 0.05), (1, 0, 0.05)]),
        "rand_very_dense": (11, 2000, [(1, 0, 1)]),
        "rand_sparse": (7, 50, [(-1, 1, 1)] * 2 + [(1, 1, 1)]),
    }
    for name, (size, limit, objects) in wanted.items():
        found = grid_world.family(name).sample(jax.random.key(0))
        kinds = np.stack([found.reward, found.p_terminate, found.p_respawn], 1)[found.object_type]
        assert (found.size, found.max_steps_in_episode) == (size, limit)
        np.testing.assert_allclose(sorted(map(tuple, kinds.tolist())), objects, rtol=1e-6)


def test_the_contract_of_environments():
    report = check_env(ENV)
    assert report.truncated > 0 and not report.random_starts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid/rand_small", "grid/all", "grid/maze-4"])
def test_the_contract_of_other_environments(name):
    assert check_env(make_env(name)).random_starts == name.startswith("grid/rand")


def test_parameters_by_name():
    changed = pgjax.change_params(ENV, {"p_respawn": 0.5, "max_steps_in_episode": 12})
    assert (changed.p_respawn == 0.5).all() and changed.max_steps_in_episode == 12
    with pytest.raises(RequestError, match="above the limit"):
        pgjax.change_params(ENV, {"max_steps_in_episode": 21})
    with pytest.raises(RequestError, match="seed = -1"):
        make_env("grid/all", seed=-1)
